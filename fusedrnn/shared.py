"""What the layers and the cells share beside the engine: their weights, and the ways to their torch.nn counterparts.

A module of ours names its counterpart in `stock`. The two keep the same attributes, so that the stock class's `forward`
runs on our module, and that a change of class turns one into the other.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from . import select


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


def split_pair(hx: Any) -> tuple:
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


def run_stock(module: nn.Module, input: Any, hx: Any, reason: str) -> Any:
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


def as_stock(module: nn.Module) -> nn.Module:
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


def record_as_leaf(module: nn.Module, input: Any, hx: Any) -> Proxy:
    """Record a call of the module as one node of torch.fx's graph, as torch.fx does for torch.nn's own modules.

    Args:
        module: the one called.
        input, hx: the call's, at least one of them a Proxy.

    Returns:
        the Proxy of what the call will return.
    """
    args = (input,) if hx is None else (input, hx)
    pair = hx if isinstance(hx, (tuple, list)) else (hx,)
    tracer = next(arg for arg in (input, *pair) if isinstance(arg, Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
