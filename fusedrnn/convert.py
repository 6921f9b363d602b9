"""Swap stock recurrent layers for fused ones in a model, and back."""

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import cells, modules

FUSED_OF_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    fused.stock: fused
    for fused in (modules.RNN, modules.LSTM, modules.GRU, cells.RNNCell, cells.LSTMCell, cells.GRUCell)
}
STOCK_OF_FUSED = {fused: stock for stock, fused in FUSED_OF_STOCK.items()}


def convert(model: nn.Module, to: str = "fused") -> nn.Module:
    """Turn every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in a model into fusedrnn's, or the reverse.

    It works in place: a layer stays the object it was, with its Parameters, buffers, hooks, mode and every reference to
    it, and only its class changes. Optimizers made before go on working. For a copy: `convert(copy.deepcopy(model))`.

    Only the very classes are converted, and parametrized ones (torch.nn.utils.parametrize). A subclass may rely on its
    base and stays as it is.

    Args:
        model: any module; a single layer too.
        to: "fused", or "torch" for the way back (torch.ao.quantization, for one, looks for stock layers).

    Returns:
        model itself.

    Raises:
        ValueError: `to` is neither.

    >>> import torch
    >>> model = convert(torch.nn.Sequential(torch.nn.LSTM(3, 5)))
    >>> type(model[0]).__module__
    'fusedrnn.modules'
    """
    if to not in ("fused", "torch"):
        raise ValueError(f"fusedrnn.convert: to must be 'fused' or 'torch', got {to!r}")
    classes = FUSED_OF_STOCK if to == "fused" else STOCK_OF_FUSED
    for module in model.modules():
        kind = type(module)
        if kind in classes:
            module.__class__ = classes[kind]
        elif is_parametrized(module) and kind.__bases__[0] in classes:
            # parametrize gives the module a class of its own, whose properties compute the weights: the same, new base
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind)(kind.__name__, (classes[kind.__bases__[0]],), own)
        else:
            continue
        if isinstance(module, nn.RNNBase):
            with torch.no_grad():  # a computed weight would keep its graph alive and stand in the way of deepcopy
                module._init_flat_weights()  # the two classes keep track of their weights differently
    return model
