"""What the layers and the cells share beside the engine: their weights, and the ways to their torch.nn counterparts.

A module of ours names its counterpart in `stock`. The two keep the same attributes, so that the stock class's `forward`
runs on our module, and that a change of class turns one into the other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import select

if TYPE_CHECKING:
    from .cells import FusedCell
    from .base import FusedLayer

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


def renamed(function: FunctionType, name: str) -> Any:
    """A function that does the same, goes by another name, and has code of its own: torch.compile counts recompilations by code.

    Args:
        function: a plain function.
        name: what `__qualname__` is to be.

    Returns:
        the other one.
    """
    code = function.__code__.replace()
    same = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(same, function)
    del same.__dict__["__wrapped__"]  # it wraps nothing
    same.__qualname__ = name
    return same


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


class Unstocked(RNNBase):
    """Stands in `stock` where torch.nn has no such layer. Not for direct use.

    Its `forward` says, of a module of ours and a call that does not fit it, what does not fit.
    """

    def forward(self, input: Any, hx: Any = None) -> None:
        """Refuse a call.

        Args:
            input, hx: the call's.

        Raises:
            TypeError, RuntimeError: always.
        """
        module: Any = self
        who, I, H = module._who, module.input_size, module.hidden_size
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        if not isinstance(data, Tensor):
            raise TypeError(f"{who}: input must be a tensor or a PackedSequence, got {type(data).__name__}")
        shape = tuple(data.shape)
        batched = "(B, T, {})" if module.batch_first else "(T, B, {})"
        wanted = "(N, {})" if packed else f"{batched} or (T, {{}})"
        if len(shape) not in ((2,) if packed else (2, 3)) or shape[-1] != I:
            raise RuntimeError(f"{who}: input must be of shape {wanted.format(I, I)}, got {shape}")
        steps_at = 1 if module.batch_first and len(shape) == 3 else 0
        if not packed and shape[steps_at] == 0:
            raise RuntimeError(f"{who}: input must have at least one step, got shape {shape}")
        rows = int(input.batch_sizes.sum()) if packed else None
        if packed and rows != shape[0]:
            raise RuntimeError(f"{who}: input must have as many rows as its batch_sizes say, {rows}, got {shape[0]}")
        states, count = module._split_states(hx), 1 + module._inner
        names = ("h", "c", "n", "m")[:count]
        what = f"a tuple of tensors ({', '.join(names)})" if count > 1 else "a tensor"
        if len(states) not in (0, count):
            got = f"{type(hx).__name__} of {len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"{who}: hx must be {what} or None, got {got}")
        for state in states:
            if not isinstance(state, Tensor):
                raise TypeError(f"{who}: hx must be {what} or None, got {type(state).__name__}" + " in it" * (count > 1))
        batch = (int(input.batch_sizes[0]),) if packed else shape[1 - steps_at: 2 - steps_at] if len(shape) == 3 else ()
        expected = (module.num_layers * (2 if module.bidirectional else 1), *batch, H)
        for name, state in zip(names, states):
            if tuple(state.shape) != expected:
                raise RuntimeError(f"{who}: {name} of hx must be of shape {expected}, got {tuple(state.shape)}")
        weights = weights_by_name(module, module._flat_weights_names)
        for name, weight in zip(module._flat_weights_names, weights):
            if not isinstance(weight, Tensor):
                raise TypeError(f"{who}: {name} must be a tensor, got {type(weight).__name__}")
        devices = sorted({str(tensor.device) for tensor in (data, *states, *weights) if tensor is not None})
        raise RuntimeError(f"{who}: input, hx and weights must be on one device, got {', '.join(devices)}")


def refuse_unknown(who: str, kwargs: dict[str, Any]) -> None:
    """Say that a constructor has no such arguments.

    Args:
        who: the class, for the message.
        kwargs: what is left of the arguments.

    Raises:
        TypeError: there are some.
    """
    for name in kwargs:
        raise TypeError(f"{who} has no argument {name!r}")


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
