"""What the layers and the cells share beside the engine: their weights, and the ways to their torch.nn counterparts.

A module of ours names its counterpart in `stock`. The two keep the same attributes, so that the stock class's `forward`
runs on our module, and that a change of class turns one into the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import select

if TYPE_CHECKING:
    from .cells import FusedCell
    from .modules import FusedLayer

P = ParamSpec("P")
R = TypeVar("R")
Stock = TypeVar("Stock", RNNBase, RNNCellBase)


def signature_of(declared: Callable[P, R]) -> Callable[[Callable[..., Any]], Callable[P, R]]:
    """Let a function of (*args, **kwargs) show the signature it has in fact: to help(), editors and type checkers.

    Args:
        declared: a function of this signature, which is not called.

    Returns:
        a decorator, which gives the function back.
    """
    def show(function: Callable[..., Any]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(declared)  # type: ignore[attr-defined]
        return function

    return show


def weights_by_name(module: nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    """The weights as they are now: a name may hold another tensor at every call (parametrize, functional_call).

    Args:
        module: a layer or cell.
        names: of its weights.

    Returns:
        a weight for each name; None stands for one that is absent.
    """
    parameters = module._parameters  # nearly always there, and getattr takes many times as long
    weights = []
    for name in names:
        weight = parameters.get(name)
        weights.append(getattr(module, name, None) if weight is None else weight)
    return weights


def split_pair(hx: Any) -> Sequence[Any]:
    """The two states of an LSTM's hx.

    Args:
        hx: what the caller gave.

    Returns:
        (h, c); (None, None) if hx is None; (hx, None) if it is no pair of states, which fits no LSTM.
    """
    if hx is None:
        return None, None
    if isinstance(hx, (tuple, list)) and len(hx) == 2 and hx[0] is not None and hx[1] is not None:
        return hx
    return hx, None


def run_stock(module: FusedLayer | FusedCell, input: Any, hx: Any, reason: str) -> Any:
    """The call as torch.nn runs it. If torch raises, its error is all there is to say; if not, say why torch ran it.

    Args:
        module: one of ours.
        input, hx: the call's.
        reason: as `fusedrnn.select.reason_for_fallback` gives it.

    Returns:
        what torch.nn returns.
    """
    result = module.stock.forward(module, input, hx)
    name = module.stock.__name__
    select.warn_once(f"fusedrnn.{name}", f"torch.nn.{name}", reason)
    return result


def as_stock(module: Stock) -> Stock:
    """The module's torch.nn counterpart.

    Args:
        module: one of ours, which stays as it is.

    Returns:
        a module of class `stock`, holding the very same Parameters, buffers, submodules and hooks.
    """
    from .convert import convert  # which imports the modules, which import this

    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return convert(twin, to="torch")


def run_packed(module: FusedLayer, input: Tensor, hx: Any, lengths: Tensor) -> tuple[Tensor, Any]:
    """A call with lengths as one on a PackedSequence, for engines that take no lengths.

    Args:
        module: a layer of ours.
        input, hx: the call's; input is padded.
        lengths: one for each sequence.

    Returns:
        what the module returns.

    Raises:
        RuntimeError: a length is 0.
    """
    packed = pack_padded_sequence(input, lengths.cpu(), module.batch_first, enforce_sorted=False)
    output, hidden = module.forward(packed, hx)  # and not module(), which would run its hooks once more
    steps = input.shape[1 if module.batch_first else 0]
    return pad_packed_sequence(output, module.batch_first, total_length=steps)[0], hidden


def record_as_leaf(module: nn.Module, input: Any, hx: Any, **kwargs: Any) -> Proxy:
    """Record a call of the module as one node of torch.fx's graph, as torch.fx does for torch.nn's own modules.

    Args:
        module: the one called.
        input, hx: the call's, at least one of them a Proxy.
        kwargs: its other arguments.

    Returns:
        the Proxy of what the call will return.
    """
    args = (input,) if hx is None else (input, hx)
    pair = hx if isinstance(hx, (tuple, list)) else (hx,)
    tracer: Any = next(arg for arg in (input, *pair) if isinstance(arg, Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
