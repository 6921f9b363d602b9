"""Swap stock recurrent layers for fused ones in a model, and back."""

from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.ao.quantization.quantization_mappings import DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
from torch.nn.utils.parametrize import is_parametrized

from . import cells, modules, shared
from .base import FusedLayer

Model = TypeVar("Model", bound=nn.Module)

FUSED_OF_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    fused.stock: fused
    for fused in (modules.RNN, modules.LSTM, modules.GRU, cells.RNNCell, cells.LSTMCell, cells.GRUCell)
}
STOCK_OF_FUSED = {fused: stock for stock, fused in FUSED_OF_STOCK.items()}


def convert(model: Model, to: Literal["fused", "torch"] = "fused") -> Model:
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
        ValueError: `to` is neither; or torch's layer cannot do what one of ours is asked to, or torch has no such layer.

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
        if to == "torch" and isinstance(module, FusedLayer):
            extras, name = ", ".join(module.extras()), module._who.removeprefix("fusedrnn.")
            if module.stock is shared.Unstocked:
                raise ValueError(f"fusedrnn.convert: torch.nn has no {name}, and this is one: {module}")
            if extras:
                raise ValueError(f"fusedrnn.convert: torch.nn.{name} has no {extras}, and this has: {module}")
        if kind in classes:
            module.__class__ = classes[kind]
        elif is_parametrized(module) and kind.__bases__[0] in classes:
            # parametrize gives the module a class of its own, whose properties compute the weights: the same, new base
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind)(kind.__name__, (classes[kind.__bases__[0]],), own)  # type: ignore[misc]
        else:
            continue
        if isinstance(module, nn.RNNBase):
            with torch.no_grad():  # a computed weight would keep its graph alive and stand in the way of deepcopy
                module._init_flat_weights()  # the two classes keep track of their weights differently
    return model


class _Quantized:
    """Makes torch's dynamically quantized layer of one of ours; what torch.ao.quantization.quantize_dynamic calls."""

    def __init__(self, quantized: Any) -> None:
        self.quantized = quantized

    def __deepcopy__(self, memo: Any) -> "_Quantized":
        return self

    def from_float(self, module: Any, use_precomputed_fake_quant: bool = False) -> Any:
        return self.quantized.from_float(shared.as_stock(module), use_precomputed_fake_quant)


for _fused, _stock in STOCK_OF_FUSED.items():
    if _stock in DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS:
        DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS[_fused] = _Quantized(DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS[_stock])
