"""`same(call)`: make one call on torch.nn and on fusedrnn and compare everything that can be seen."""

import re
import warnings
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn.fuzz import strides

# Bookkeeping of the weights, compared by what it does and not by how it is held.
PRIVATE = {"_flat_weight_refs"}
# Values agree to this many ulp of the largest. Accuracy has tests of its own; here a wrong number is wrong by far more.
ULPS = 32


def observe(home, call, seed=0) -> SimpleNamespace:
    """What `call(home)` does: result or exception, warnings, and torch's random state after it."""
    torch.manual_seed(seed)
    result = failure = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(home)
        except Exception as error:  # every exception is an outcome to compare
            failure = error
    said = [(w.category, str(w.message)) for w in caught if "oneDNN" not in str(w.message)]
    return SimpleNamespace(result=result, failure=failure, warnings=said, random=torch.get_rng_state(), caught=caught)


FALLBACK = "not on the fused engine"


def same(call, raises=None, match=None, warns=None, falls_back=False):
    """Assert that `call(fusedrnn)` does what `call(torch.nn)` does; return both results (ours, stock).

    Args:
        call: function of the module that has RNN, LSTM, GRU and the cells; torch is seeded alike before both calls.
        raises, match: what torch.nn must raise, so that a test cannot pass because both calls went well.
        warns: text that a warning of torch.nn must hold. Without it no warning is expected.
        falls_back: fusedrnn leaves the call to torch.nn, and must say so.
    """
    stock, ours = observe(nn, call), observe(fusedrnn, call)
    if raises is None and stock.failure is not None:
        raise stock.failure
    if raises is not None:
        assert type(stock.failure) is raises, f"torch.nn did not raise {raises.__name__}: {stock.failure!r}"
        assert match is None or match in str(stock.failure), f"torch.nn said: {stock.failure}"
        assert type(ours.failure) is raises, f"torch.nn raised {stock.failure!r}, fusedrnn {ours.failure!r}"
        assert plain(str(ours.failure)) == plain(str(stock.failure))
    elif ours.failure is not None:
        raise ours.failure
    assert any(warns in text for _, text in stock.warnings) if warns else not stock.warnings, stock.warnings
    assert any(FALLBACK in text for _, text in ours.warnings) == falls_back, ours.warnings
    assert [w for w in ours.warnings if FALLBACK not in w[1]] == stock.warnings
    compare(ours.result, stock.result)
    assert torch.equal(ours.random, stock.random), "random state after the call"
    return ours.result, stock.result


def plain(text: str) -> str:
    """Text without what names the package or an address."""
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return re.sub(r"torch\.nn\.modules\.rnn\.|fusedrnn\.(modules|cells)\.", "", text)


def compare(ours, stock, where="result"):
    """Assert that two things look alike: tensors, modules, containers, anything with ==."""
    if isinstance(stock, nn.Module):
        return compare_modules(ours, stock, where)
    if isinstance(stock, Tensor):
        return compare_tensors(ours, stock, where)
    assert type(ours) is type(stock), f"{where}: {type(ours)}, torch.nn has {type(stock)}"
    if isinstance(stock, PackedSequence):
        for name in stock._fields:
            compare(getattr(ours, name), getattr(stock, name), f"{where}.{name}")
    elif isinstance(stock, (tuple, list)):
        assert len(ours) == len(stock), f"{where}: {len(ours)} items, torch.nn has {len(stock)}"
        for i, (a, b) in enumerate(zip(ours, stock)):
            compare(a, b, f"{where}[{i}]")
    elif isinstance(stock, dict):
        assert list(ours) == list(stock), f"{where}: keys {list(ours)}, torch.nn has {list(stock)}"
        for key in stock:
            compare(ours[key], stock[key], f"{where}[{key!r}]")
    elif isinstance(stock, str):
        assert plain(ours) == plain(stock), where
    elif type(stock).__eq__ is not object.__eq__:
        assert ours == stock, f"{where}: {ours}, torch.nn has {stock}"


def compare_tensors(ours, stock, where):
    for what in ("shape", "dtype", "device", "requires_grad", "is_leaf", "layout"):
        a, b = getattr(ours, what), getattr(stock, what)
        assert a == b, f"{where}: {what} {a}, torch.nn has {b}"
    assert isinstance(ours, nn.Parameter) == isinstance(stock, nn.Parameter), f"{where}: Parameter or not"
    assert strides(ours) == strides(stock), f"{where}: strides {ours.stride()}, torch.nn has {stock.stride()}"
    if stock.is_meta or not stock.numel():
        return
    if not stock.is_floating_point() or isinstance(stock, nn.Parameter):
        assert torch.equal(ours, stock), f"{where}: values differ"
        return
    ours, stock = ours.detach(), stock.detach()
    allowed = ULPS * torch.finfo(stock.dtype).eps * max(stock.double().nan_to_num(0, 0, 0).abs().max().item(), 1e-30)
    torch.testing.assert_close(ours, stock, rtol=0, atol=allowed, equal_nan=True, msg=lambda text: f"{where}: {text}")


def compare_modules(ours, stock, where):
    assert repr(ours) == repr(stock), where
    assert ours.training == stock.training, where
    compare(ours.state_dict(), stock.state_dict(), f"{where}.state_dict()")
    compare(dict(ours.named_parameters()), dict(stock.named_parameters()), f"{where} parameters")
    compare({k: getattr(ours, k) for k in attributes(stock)}, {k: getattr(stock, k) for k in attributes(stock)}, where)
    if hasattr(stock, "_flat_weights"):
        compare(ours.all_weights, stock.all_weights, f"{where}.all_weights")
        for name, weight in zip(ours._flat_weights_names, ours._flat_weights):
            assert weight is getattr(ours, name), f"{where}._flat_weights: {name} is another tensor"


def attributes(module) -> list[str]:
    """Names of what the constructor set, less the weights' bookkeeping and nn.Module's own."""
    return [name for name in vars(module) if name not in PRIVATE and name not in vars(nn.Module())]
