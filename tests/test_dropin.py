"""A module made, printed, saved and copied: the same call on torch.nn and on fusedrnn, compared in everything seen.

Calls of `forward` are in test_inputs.py, weights that change under the module in test_weights.py.
"""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fusedrnn
from conftest import CELLS, make_pair, states_for
from same import compare, same

KINDS = ["RNN", "LSTM", "GRU"]
CELL_KINDS = ["RNNCell", "LSTMCell", "GRUCell"]
kinds = pytest.mark.parametrize("kind", KINDS)
cell_kinds = pytest.mark.parametrize("kind", CELL_KINDS)


def make(kind, *args, **kwargs):
    return lambda home: getattr(home, kind)(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Constructor
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(4, 5), (4, 5, 2), (True, 5)], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(bias=False),
        dict(batch_first=True),
        dict(bidirectional=True),
        dict(bidirectional=1),
        dict(bidirectional=1, bias=False, batch_first=True, dtype=torch.float64),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.complex64),
        dict(device="cpu"),
        dict(device="meta"),
        dict(dropout=0),
    ],
    ids=str,
)
@kinds
def test_constructor(kind, args, kwargs):
    same(make(kind, *args, **kwargs))


@pytest.mark.parametrize("kwargs", [dict(proj_size=2), dict(proj_size=2, bias=False, bidirectional=True)], ids=str)
def test_projections(kwargs):
    same(make("LSTM", 4, 5, 2, **kwargs))


def test_positional_arguments():
    same(make("LSTM", 4, 5, 2, False, True, 0.5, True, 3, "cpu", torch.float64))
    same(make("GRU", 4, 5, 2, False, True, 0.5, True))
    same(make("GRU", 4, 5, 2, True, False, 0.0, False, 3))  # the ninth slips through; a call then fails
    same(make("RNN", 4, 5, 2, "relu", False, True, 0.5, True))
    same(make("RNN", 4, 5, 2, "tanh"))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearity(nonlinearity):
    ours, _ = same(make("RNN", 4, 5, nonlinearity=nonlinearity))
    assert ours.mode == f"RNN_{nonlinearity.upper()}" and ours.nonlinearity == nonlinearity


DROPOUT = "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        (dict(dropout="a"), ValueError, "could not convert string to float: 'a'"),
        (dict(dropout=None), TypeError, "float() argument must be"),
        (dict(dropout=True), ValueError, DROPOUT),
        (dict(dropout=-0.1), ValueError, DROPOUT),
        (dict(dropout=1.1), ValueError, DROPOUT),
        (dict(dropout=float("nan")), ValueError, DROPOUT),
        (dict(dropout="0.5"), ValueError, DROPOUT),
        (dict(bias=1), TypeError, "bias should be of type bool, got: int"),
        (dict(batch_first=None), TypeError, "batch_first should be of type bool, got: NoneType"),
        (dict(input_size=1.0), TypeError, "input_size should be of type int, got: float"),
        (dict(input_size=np.int64(3)), TypeError, "input_size should be of type int, got: int64"),
        (dict(input_size=0), ValueError, "input_size must be greater than zero"),
        (dict(hidden_size="5"), TypeError, "hidden_size should be of type int, got: str"),
        (dict(hidden_size=-1), ValueError, "hidden_size must be greater than zero"),
        (dict(num_layers=0), ValueError, "num_layers must be greater than zero"),
        (dict(num_layers=1.5), TypeError, "'float' object cannot be interpreted as an integer"),
        (dict(num_layers="2"), TypeError, "'<=' not supported between instances of 'str' and 'int'"),
        (dict(foo=1), TypeError, "unexpected keyword argument 'foo'"),
        (dict(dtype=torch.int64), RuntimeError, "Only Tensors of floating point and complex dtype can require gradients"),
        # Two mistakes: the one that torch checks first is the one reported.
        (dict(dropout=2.0, bias=1, input_size=0), ValueError, DROPOUT),
        (dict(bias=1, input_size=0), TypeError, "bias should be"),
        (dict(hidden_size=0, num_layers=0), ValueError, "hidden_size must"),
    ],
    ids=lambda value: str(value)[:50],
)
@kinds
def test_constructor_errors(kind, kwargs, error, text):
    same(make(kind, **dict(input_size=4, hidden_size=5) | kwargs), raises=error, match=text)


@kinds
def test_missing_arguments(kind):
    same(make(kind), raises=TypeError, match="missing 2 required positional arguments: 'input_size' and 'hidden_size'")
    same(make(kind, 4), raises=TypeError, match="missing 1 required positional argument: 'hidden_size'")
    same(make(kind, 4, 5, input_size=4), raises=TypeError, match="multiple values for argument 'input_size'")
    same(make(kind, *range(1, 14)), raises=(ValueError if kind == "RNN" else TypeError))


@pytest.mark.parametrize(
    "proj_size, error, text",
    [
        (-1, ValueError, "proj_size should be a positive integer or zero to disable projections"),
        (5, ValueError, "proj_size has to be smaller than hidden_size"),
        (6, ValueError, "proj_size has to be smaller than hidden_size"),
        (1.5, TypeError, None),
        ("2", TypeError, None),
    ],
)
def test_projection_errors(proj_size, error, text):
    same(make("LSTM", 4, 5, proj_size=proj_size), raises=error, match=text)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_projections_are_for_lstm(kind):
    text = "proj_size argument is only supported for LSTM, not RNN or GRU"
    same(make(kind, 4, 5, proj_size=0), raises=ValueError, match=text)
    same(make(kind, proj_size=2), raises=ValueError, match=text)


def test_nonlinearity_errors():
    same(make("RNN", 4, 5, nonlinearity="x"), raises=ValueError, match="Unknown nonlinearity 'x'. Select from 'tanh' or")
    same(make("RNN", 4, 5, 1, "relu", nonlinearity="tanh"), raises=TypeError, match="unexpected keyword argument")
    same(make("LSTM", 4, 5, nonlinearity="tanh"), raises=TypeError, match="unexpected keyword argument 'nonlinearity'")
    same(make("RNN", 4, 5, 1, False), raises=ValueError, match="Unknown nonlinearity 'False'")


@pytest.mark.parametrize("dropout", [0.5, 1, 1.0])
@kinds
def test_dropout_warning(kind, dropout):
    text = f"dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers " \
           f"greater than 1, but got dropout={dropout} and num_layers=1"
    same(make(kind, 4, 5, dropout=dropout), warns=text)
    same(make(kind, 4, 5, 2, dropout=dropout))


@kinds
def test_is_an_rnnbase(kind):
    module = getattr(fusedrnn, kind)(4, 5)
    assert isinstance(module, nn.RNNBase)
    assert not isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)), "torch.compile refuses instances of these"
    assert type(module).__name__ == kind and module._get_name() == kind
    assert module.__constants__ == getattr(nn, kind)(4, 5).__constants__
    assert module.__jit_unused_properties__ == ["all_weights"]


def test_default_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    for kind in KINDS + CELL_KINDS:
        ours, _ = same(make(kind, 4, 5))
        assert next(ours.parameters()).dtype == torch.float64
    with torch.device("meta"):
        for kind in KINDS + CELL_KINDS:
            same(make(kind, 4, 5))


@cell_kinds
def test_cell_constructor(kind):
    for args, kwargs in [
        ((4, 5), {}),
        ((4, 5), dict(bias=False)),
        ((4, 5, False), dict(dtype=torch.float64, device="cpu")),
        ((0, 5), {}),
        ((4, 0), {}),
        ((4, 5), dict(bias=1)),
    ]:
        same(make(kind, *args, **kwargs))
    same(make(kind, 4, -5), raises=RuntimeError, match="negative dimension")
    same(make(kind, 4), raises=TypeError, match="missing 1 required positional argument: 'hidden_size'")
    same(make(kind, 4, 5, foo=1), raises=TypeError, match="unexpected keyword argument 'foo'")
    same(make(kind, 4, 5, dtype=torch.int32), raises=RuntimeError, match="Only Tensors of floating point")


def test_rnn_cell_nonlinearity():
    same(make("RNNCell", 4, 5, False, "relu"))
    same(make("RNNCell", 4, 5, nonlinearity="relu"))
    same(make("RNNCell", 4, 5, nonlinearity="x"))  # no check here; a call raises
    same(lambda home: home.RNNCell(4, 5, nonlinearity="x")(torch.randn(2, 4)),
         raises=RuntimeError, match="Unknown nonlinearity: x")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What a module shows and keeps
# ---------------------------------------------------------------------------------------------------------------------


@kinds
def test_repr(kind):
    """`same` compares reprs; here they are spelled out, so that both cannot change unseen."""
    module = getattr(fusedrnn, kind)(4, 5, num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True)
    options = "num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True"
    assert repr(module) == f"{kind}(4, 5, {options})"
    assert repr(getattr(fusedrnn, kind)(4, 5)) == f"{kind}(4, 5)"
    assert repr(type("Mine", (getattr(fusedrnn, kind),), {})(4, 5)) == "Mine(4, 5)"


def test_repr_of_cells():
    assert repr(fusedrnn.LSTM(4, 5, proj_size=2)) == "LSTM(4, 5, proj_size=2)"
    assert repr(fusedrnn.RNNCell(4, 5, bias=False, nonlinearity="relu")) == "RNNCell(4, 5, bias=False, nonlinearity=relu)"
    assert repr(fusedrnn.GRUCell(4, 5)) == "GRUCell(4, 5)"


@pytest.mark.parametrize("cell", CELLS)
def test_initialisation(cell):
    """One uniform_ for each parameter, in order, within 1/sqrt(H): written out, and bit-equal to torch.nn's."""
    ours, stock = make_pair(cell, 4, 9, num_layers=2, bidirectional=True)
    torch.manual_seed(5)
    ours.reset_parameters()
    torch.manual_seed(5)
    for parameter in ours.parameters():
        assert torch.equal(parameter, torch.empty_like(parameter).uniform_(-1 / 3, 1 / 3))
    torch.manual_seed(5)
    stock.reset_parameters()
    compare(ours.state_dict(), stock.state_dict())


def test_parameter_names():
    names = list(fusedrnn.LSTM(4, 5, 2, bidirectional=True, proj_size=2).state_dict())
    assert names == [
        f"{name}_l{layer}{suffix}"
        for layer in range(2)
        for suffix in ("", "_reverse")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    ]
    assert list(fusedrnn.LSTM(4, 5, bias=False, proj_size=2).state_dict()) == [
        "weight_ih_l0", "weight_hh_l0", "weight_hr_l0"
    ]  # fmt: skip
    assert list(fusedrnn.GRUCell(4, 5).state_dict()) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    assert fusedrnn.GRUCell(4, 5, bias=False)._parameters["bias_hh"] is None


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_pickle, through_save, copy.deepcopy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS + CELL_KINDS)
def test_copies(kind, copied):
    ours, _ = same(lambda home: copied(getattr(home, kind)(4, 5).double().eval()))
    original = getattr(fusedrnn, kind)(4, 5)
    twin = copied(original)
    assert type(twin) is type(original)
    input = torch.randn(3, 4) if "Cell" in kind else torch.randn(3, 2, 4)
    compare(twin(input), original(input))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in original.parameters()), "the copy shares its weights"
    result = twin(input)
    while isinstance(result, tuple):
        result = result[0]
    assert not result.any(), "the copy does not read its own weights"


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_both_ways(kind):
    stock, ours = getattr(nn, kind)(4, 5, 2), getattr(fusedrnn, kind)(4, 5, 2)
    input = torch.randn(3, 2, 4)
    assert repr(ours.load_state_dict(stock.state_dict())) == "<All keys matched successfully>"
    compare(ours(input), stock(input))
    ours.reset_parameters()
    stock.load_state_dict(ours.state_dict())
    compare(ours(input), stock(input))
    same(lambda home: getattr(home, kind)(4, 5, 2).load_state_dict(getattr(home, kind)(4, 6, 2).state_dict()),
         raises=RuntimeError, match="size mismatch for weight_ih_l0")  # fmt: skip


@pytest.mark.parametrize("bias, proj_size", [(True, 0), (False, 0), (True, 2)])
def test_states_from_before_names(bias, proj_size):
    """Pickles of old torch hold the weights themselves where names are now, and no proj_size (torch before 1.8)."""

    def restored(home):
        module = home.LSTM(4, 5, 2, bias=bias, bidirectional=True, proj_size=proj_size)
        state = module.__getstate__().copy()
        state["all_weights"] = module.all_weights
        for name in ("_flat_weights_names", "_all_weights") + (("proj_size",) if not proj_size else ()):
            del state[name]
        old = home.LSTM.__new__(home.LSTM)
        old.__setstate__(state)
        return old._flat_weights_names, old.proj_size, old._all_weights, old, old(torch.randn(3, 2, 4))

    same(restored)


@pytest.mark.parametrize("kind", KINDS)
def test_getstate_has_no_weak_references(kind):
    ours, _ = same(lambda home: sorted(getattr(home, kind)(4, 5).__getstate__()))
    assert "_flat_weight_refs" not in ours


@pytest.mark.parametrize("kind", KINDS + CELL_KINDS)
def test_no_reference_cycle(kind):
    gc.collect()
    gc.disable()
    try:
        module = getattr(fusedrnn, kind)(4, 5)
        input = torch.randn(3, 4) if "Cell" in kind else torch.randn(3, 2, 4)
        result = module(input)
        while isinstance(result, tuple):
            result = result[0]
        result.sum().backward()
        module.load_state_dict(module.state_dict())
        ghosts = [weakref.ref(module), weakref.ref(next(module.parameters())), weakref.ref(result)]
        del module, result, input
        assert [ghost() for ghost in ghosts] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
def test_public_methods(kind):
    ours, stock = getattr(fusedrnn, kind)(4, 5), getattr(nn, kind)(4, 5)
    missing = {name for name in dir(stock) if not name.startswith("__")} - set(dir(ours))
    assert not missing
    assert ours.flatten_parameters() is None
    assert ours.all_weights[0][1] is ours.weight_hh_l0


@pytest.mark.parametrize("kind", KINDS)
def test_module_machinery(kind):
    """Hooks, apply, train and eval, buffers and attributes of the user's own."""

    def use(home):
        module = getattr(home, kind)(4, 5)
        seen = []
        module.register_forward_pre_hook(lambda m, args: seen.append(len(args)))
        module.register_forward_hook(lambda m, args, result: seen.append(type(result).__name__))
        module.register_full_backward_hook(lambda m, before, after: seen.append((len(before), len(after))))
        module.register_buffer("mine", torch.ones(2))
        module.own = "kept"
        module.apply(lambda m: seen.append(m._get_name()))
        input = torch.randn(3, 2, 4, requires_grad=True)
        module(input)[0].sum().backward()
        return seen, module.eval(), input.grad, module.own, list(module.state_dict())

    same(use)


def test_dropout_changed_later():
    """`rnn.dropout = p` counts from then on."""

    def use(home):
        results = []
        for kind in KINDS:
            module = getattr(home, kind)(4, 5, 2, dropout=0.5)
            module.dropout = 0.0
            torch.manual_seed(1)
            results.append(module(torch.randn(3, 2, 4))[0])
            module.dropout = 1.0
            results.append(module(torch.randn(3, 2, 4))[0])
        return results

    same(use)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("options", [{}, dict(bidirectional=True), dict(batch_first=True)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_is_bit_equal(cell, packed, options, p):
    """The same elements are dropped: the second layer sees exact zeros in the same places, so outputs agree to rounding."""
    ours, stock = make_pair(cell, 4, 5, num_layers=3, dropout=p, **options)
    input = torch.randn(6, 6, 4)
    if packed:
        input = nn.utils.rnn.pack_padded_sequence(input, torch.tensor([6, 4, 4, 3, 1, 1]))
    results = []
    for module in (ours, stock):
        torch.manual_seed(11)
        results.append((module(input), module.eval()(input), torch.rand(3)))
        module.train()
    compare(*results)
    (trained, evaluated, _), _ = results
    assert not torch.equal(trained[0][0], evaluated[0][0])


def test_extra_helpers_of_rnnbase():
    """get_expected_hidden_size, check_input, check_hidden_size and permute_hidden are public and users call them."""

    def use(home):
        results = []
        for kind in KINDS:
            module = getattr(home, kind)(4, 5, 2, batch_first=True)
            input = torch.randn(3, 7, 4)
            results.append(module.get_expected_hidden_size(input, None))
            hx = states_for(module, 3)
            module.check_forward_args(input, hx, None)
            results.append(module.permute_hidden(hx, torch.tensor([2, 0, 1])))
            results.append(module.permute_hidden(hx, None))
        results.append(module.check_input(input, None))
        return results

    same(use)
