"""Inference on the CPU with weights packed once: for a step or a few, again and again, where reading them takes the time.

The packed form is csrc/frozen.h's; the operator that reads it is `fusedrnn.ops.frozen_forward`.
"""

import copy
import struct
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from . import _C
from .base import CELL_OF_MODE, FusedLayer
from .cells import NAMES, NONLINEAR
from .convert import FUSED_OF_STOCK, STOCK_OF_FUSED
from .ops import TRAITS, frozen_forward
from .shared import Unstocked, split_pair

VERSION = 2
#: Format of the weights: its number in the header, the inputs that share a line, and the order in which a line has them.
FORMATS = {torch.float32: (0, [0]), torch.bfloat16: (1, [0, 1]), torch.int8: (2, [0, 2, 1, 3])}
UNITS, HEADER = 16, 128


def freeze(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a copy for inference on the CPU, whose recurrent layers and cells have their weights packed once.

    For repeated small calls, steps of a stream with their states carried along, or one long sequence. A frozen layer is
    called as the layer was, with tensors of float32 or bfloat16, and gives what it gave in eval mode. It has no parameters
    and no gradients; its weights are one buffer, `packed`, so that state_dict, pickle and deepcopy work. The weights are
    rounded to `dtype`, int8 with a scale for each row, and all arithmetic is float32; but what int8 weights multiply is
    rounded to 16 bits, with a scale for each vector, and an infinity in it comes out as NaN. Where the processor multiplies pairs of
    bfloat16 (AVX512_BF16), the input of a layer with such weights is rounded to bfloat16 too, and its state to 16 bits.

    Args:
        module: torch.nn's or fusedrnn's RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell, or a model that has such inside. It
            stays as it is. As in `fusedrnn.convert` only the very classes, and parametrized ones, are taken.
        dtype: of the packed weights: torch.float32, torch.bfloat16 or torch.int8.

    Returns:
        the copy.

    Raises:
        ValueError: dtype is another; module has no such layer; a layer has forward hooks, which would not run; weights are
            not on the CPU; int8 and a weight that is not finite; or a layer has zoneout, or is of a form that torch.nn has not.

    >>> import fusedrnn, torch
    >>> frozen = freeze(fusedrnn.LSTM(3, 5), torch.int8)
    >>> output, states = frozen(torch.randn(1, 1, 3))
    >>> output, states = frozen(torch.randn(1, 1, 3), states)
    >>> output.shape
    torch.Size([1, 1, 5])
    """
    if dtype not in FORMATS:
        raise ValueError(f"fusedrnn.freeze: dtype must be torch.float32, torch.bfloat16 or torch.int8, got {dtype}")
    for part in module.modules():
        if isinstance(part, FusedLayer) and part.stock is Unstocked:
            raise ValueError(f"fusedrnn.freeze: there is no frozen form of {part._who}, and this is one: {part}")
    found = {part: kind for part in module.modules() if (kind := _stock_class(part)) is not None}
    if not found:
        raise ValueError("fusedrnn.freeze: module must be or have a recurrent layer or cell of torch.nn or fusedrnn, "
                         f"got {type(module).__name__}")
    # deepcopy takes what it finds here for copies that it has made: every reference to a layer leads to the frozen one.
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for part, kind in found.items():
            frozen = FrozenCell if issubclass(kind, RNNCellBase) else FrozenLayer
            memo[id(part)] = frozen(part, kind.__name__, dtype)
        copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def _stock_class(module: nn.Module) -> type[nn.Module] | None:
    kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
    return kind if kind in FUSED_OF_STOCK else STOCK_OF_FUSED.get(kind)


class Frozen(nn.Module):
    """What frozen layers and cells share. Not for direct use."""

    packed: Tensor
    cell: str

    def __init__(self, module: Any, kind: str, cell: str | None, dtype: torch.dtype,
                 weights: list[list[Tensor | None]]) -> None:
        """Pack the weights of a layer or cell."""
        super().__init__()
        if cell is None:
            raise ValueError(f"fusedrnn.freeze: nonlinearity must be 'tanh' or 'relu', got {module.nonlinearity!r}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"fusedrnn.freeze: {kind} must have no forward hooks, which would not run, got some")
        if isinstance(module, FusedLayer) and module.form():
            raise ValueError(f"fusedrnn.freeze: {kind} must be torch.nn's, got one with {', '.join(module.form())}: {module}")
        if getattr(module, "zoneout", 0) not in (0, (0, 0)):
            raise ValueError(f"fusedrnn.freeze: {kind} must have no zoneout, got zoneout={module.zoneout}")
        self.kind, self.cell, self.dtype = kind, cell, dtype
        self.input_size, self.hidden_size, self.bias = module.input_size, module.hidden_size, bool(module.bias)
        layers = getattr(module, "num_layers", 1)
        proj_size = getattr(module, "proj_size", 0)
        sizes = module.input_size, module.hidden_size, proj_size
        self.register_buffer("packed", pack(cell, dtype, weights, layers, len(weights) // layers, sizes))
        self._arguments = (cell, layers, len(weights) > layers, module.hidden_size, proj_size)
        self.eval()

    def _get_name(self) -> str:
        return f"Frozen{self.kind}"

    def reason_for_refusal(self, input: Tensor | PackedSequence) -> str | None:
        """Why a call with this input is refused; None if it is not, as far as the kind of input goes.

        Args:
            input: as for the call.

        Returns:
            the reason in words, or None.
        """
        if isinstance(input, PackedSequence):
            return f"input of {self._get_name()} must be a tensor"
        if not input.is_cpu:
            return f"input of {self._get_name()} must be on the CPU"
        taken = input.dtype in (torch.float32, torch.bfloat16)
        return None if taken else f"input of {self._get_name()} must be float32 or bfloat16"

    def _call(self, input: Any, hx: Any, batch_first: bool, one_step: bool) -> Any:
        pair = self.cell == "lstm"
        h, c = split_pair(hx) if pair else (hx, None)
        if isinstance(input, PackedSequence):
            raise TypeError(f"fusedrnn.freeze: {self.reason_for_refusal(input)}, got a PackedSequence")
        if torch.is_grad_enabled() and (input.requires_grad or h is not None and h.requires_grad
                                        or c is not None and c.requires_grad):
            raise RuntimeError(f"fusedrnn.freeze: {self._get_name()} has no gradients, got an input or state that requires "
                               "one; call it under torch.no_grad()")
        output, hy, cy = frozen_forward(self._buffers["packed"], input, h, c, *self._arguments, batch_first, one_step)
        states = (hy, cy) if pair else hy
        return states if one_step else (output, states)


class FrozenLayer(Frozen):
    """A layer that `freeze` has made: RNN, LSTM or GRU. Not for direct use."""

    def __init__(self, module: Any, kind: str, dtype: torch.dtype) -> None:
        """Pack the weights of a layer."""
        names = module._flat_weights_names
        directions = module.num_layers * (2 if module.bidirectional else 1)
        flat = [getattr(module, name) for name in names]
        each = len(flat) // directions
        weights = [_whole(flat[at: at + each], module.bias) for at in range(0, len(flat), each)]
        super().__init__(module, kind, CELL_OF_MODE[module.mode], dtype, weights)
        self.num_layers, self.bidirectional, self.batch_first = module.num_layers, module.bidirectional, module.batch_first
        self.mode, self.proj_size, self.dropout = module.mode, module.proj_size, module.dropout

    def forward(self, input: Tensor, hx: Any = None, *, lengths: None = None) -> Any:
        """Run all layers over a sequence.

        Args:
            input: as the layer took it, but for a PackedSequence: `(T, B, I)`, `(B, T, I)` if batch_first, or `(T, I)`.
            hx: as the layer took it, of the input's dtype.
            lengths: not taken.

        Returns:
            what the layer gave: output and last states, of the input's dtype.

        Raises:
            RuntimeError: a shape, dtype or device does not fit, or a gradient is asked for.
            TypeError: input is a PackedSequence, or there are lengths.
        """
        if lengths is not None:
            raise TypeError(f"fusedrnn.freeze: {self._get_name()} takes no lengths, got some")
        return self._call(input, hx, self.batch_first, False)

    def flatten_parameters(self) -> None:
        """Do nothing, for the sake of models that call it."""

    def extra_repr(self) -> str:
        """Describe the layer.

        Returns:
            the words between the brackets.
        """
        options: dict[str, Any] = {"num_layers": self.num_layers, "bias": self.bias, "batch_first": self.batch_first,
                                   "bidirectional": self.bidirectional, "proj_size": self.proj_size}
        usual = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False, "proj_size": 0}
        words = [f"{name}={value}" for name, value in options.items() if value != usual[name]]
        return ", ".join([str(self.input_size), str(self.hidden_size), *words, f"dtype={self.dtype}"])


class FrozenCell(Frozen):
    """A cell that `freeze` has made: RNNCell, LSTMCell or GRUCell. Not for direct use."""

    def __init__(self, module: Any, kind: str, dtype: torch.dtype) -> None:
        """Pack the weights of a cell."""
        cell = NONLINEAR.get(module.nonlinearity) if kind == "RNNCell" else kind.removesuffix("Cell").lower()
        super().__init__(module, kind, cell, dtype, [_whole([getattr(module, name) for name in NAMES], True)])

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Take one step.

        Args:
            input: (B, I) or (I,).
            hx: as the cell took it, of the input's dtype.

        Returns:
            the new state or states, of the input's dtype.

        Raises:
            RuntimeError, TypeError: as in `FrozenLayer.forward`.
        """
        return self._call(input, hx, False, True)

    def extra_repr(self) -> str:
        """Describe the cell.

        Returns:
            the words between the brackets.
        """
        bias = ["bias=False"] * (not self.bias)
        return ", ".join([str(self.input_size), str(self.hidden_size), *bias, f"dtype={self.dtype}"])


def _whole(weights: list[Any], has_biases: bool) -> list[Tensor | None]:
    """One direction's weight_ih, weight_hh, bias_ih, bias_hh and weight_hr, None where it has none."""
    biases = weights[2:4] if has_biases else [None, None]
    rest = weights[4:] if has_biases else weights[2:]
    return [*weights[:2], *biases, rest[0] if rest else None]


def pack(cell: str, dtype: torch.dtype, weights: list[list[Tensor | None]], layers: int, directions: int,
         sizes: tuple[int, int, int]) -> Tensor:
    """Write weights as csrc/frozen.h describes them.

    Args:
        cell: the engine's name of it.
        dtype: a key of `FORMATS`.
        weights: for each layer, for each direction, weight_ih, weight_hh, bias_ih, bias_hh and weight_hr, None if absent.
        layers, directions: how many.
        sizes: input_size, hidden_size and proj_size, 0 without projections.

    Returns:
        a one-dimensional uint8 tensor.

    Raises:
        ValueError: int8 and a weight that is not finite, or weights that are not on the CPU.
    """
    for tensor in (tensor for each in weights for tensor in each if tensor is not None):
        if not tensor.is_cpu:
            raise ValueError(f"fusedrnn.freeze: weights must be on the CPU, got {tensor.device}")
        if dtype == torch.int8 and not tensor.isfinite().all():
            raise ValueError("fusedrnn.freeze: weights must be finite to become int8, got an infinity or NaN")
    header = struct.pack("<8sii16siiqqq", b"fusedrnn", VERSION, FORMATS[dtype][0], cell.encode(), layers, directions, *sizes)
    parts = [torch.frombuffer(bytearray(header.ljust(HEADER, b"\0")), dtype=torch.uint8)]
    for w_ih, w_hh, b_ih, b_hh, w_hr in weights:
        gates = TRAITS[cell]["gates"]
        scales_ih, lines_ih = _panel(w_ih, gates, dtype)  # type: ignore[arg-type]
        scales_hh, lines_hh = _panel(w_hh, gates, dtype)  # type: ignore[arg-type]
        start = _by_block(_starts(cell, b_ih, b_hh, sizes[1]))
        parts.append(torch.cat([start, scales_ih, scales_hh, lines_ih, lines_hh], 1).flatten())
        if w_hr is not None:
            parts.append(torch.cat(_panel(w_hr, 1, dtype), 1).flatten())
    packed = torch.empty(sum(map(len, parts)), dtype=torch.uint8)
    _C.want_large_pages(packed.data_ptr(), packed.nbytes)  # a tenth less time to read what is far from a core
    return torch.cat(parts, out=packed)


def _starts(cell: str, b_ih: Tensor | None, b_hh: Tensor | None, units: int) -> Tensor:
    """(pre-activations, H): the biases that add to each."""
    start = torch.zeros(TRAITS[cell]["pre"], units, dtype=torch.float64)
    for bias, slots in ((b_ih, TRAITS[cell]["x_pre"]), (b_hh, TRAITS[cell]["h_pre"])):
        if bias is not None:
            start.index_add_(0, torch.tensor(slots), bias.double().view(-1, units))
    return start.float()


def _by_block(values: Tensor) -> Tensor:
    """(n, H) float32 to (blocks, bytes): n lines of a number for each of a block's units."""
    values = pad(values, (0, -values.shape[1] % UNITS))
    return values.view(len(values), -1, UNITS).transpose(0, 1).contiguous().flatten(1).view(torch.uint8)


def _panel(weight: Tensor, gates: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight (gates * rows, depth) as scales, none but for int8, and lines: each (blocks, bytes)."""
    order, stored = FORMATS[dtype][1], torch.uint8 if dtype == torch.int8 else dtype
    weight = weight.detach().float()
    scales = weight.new_empty(0, 1)
    if dtype == torch.int8:
        scales = weight.abs().amax(1, keepdim=True) / 127
        weight = (weight / scales.where(scales > 0, 1)).round() + 128
    lines = weight.to(stored).view(gates, -1, weight.shape[1])
    lines = pad(lines, (0, -lines.shape[2] % len(order), 0, -lines.shape[1] % UNITS))
    blocks, groups = lines.shape[1] // UNITS, lines.shape[2] // len(order)
    lines = lines.view(gates, blocks, UNITS, groups, len(order)).permute(1, 3, 0, 2, 4)[..., order]
    rows = _by_block(scales.view(gates, -1)) if len(scales) else lines.new_empty(blocks, 0).view(torch.uint8)
    return rows, lines.contiguous().flatten(1).view(torch.uint8)
