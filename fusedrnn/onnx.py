"""ONNX: layers and cells as ONNX's own RNN, LSTM and GRU nodes, for any number of steps and rows.

torch.onnx.export takes models with our modules as it takes torch.nn's: for one number of steps, and an RNN's steps written out one
by one. `export` here is the same function, and every layer one node for as many steps as there will be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  which loads the operators

#: For each cell the operator of ONNX, and the place of its gates among torch's.
NODES = {"rnn_tanh": ("RNN", (0,)), "rnn_relu": ("RNN", (0,)), "lstm": ("LSTM", (0, 3, 1, 2)), "gru": ("GRU", (1, 0, 2))}

_recording = False


def is_recording() -> bool:
    """Whether `export` is at work, and a layer is to be recorded as one node.

    Returns:
        True or False.
    """
    return _recording


def export(model: nn.Module, args: tuple[Any, ...], f: Any = None, **options: Any) -> Any:
    """Export a model, each layer of ours as one ONNX node for both its directions.

    Lengths become ONNX's sequence_lens. For what ONNX cannot say take torch.onnx.export.

    Args:
        model: in eval mode, or dropout between layers is written out as well.
        args: arguments of a call.
        f: file to write; None writes none.
        options: of torch.onnx.export, such as dynamic_shapes, input_names or opset_version.

    Returns:
        torch's ONNXProgram.

    Raises:
        ValueError: a layer has projections, which ONNX has not, or is of a form that torch.nn has not.
        RuntimeError: an input is packed: give padded input and lengths instead.

    >>> import fusedrnn, torch
    >>> program = export(fusedrnn.GRU(3, 5).eval(), (torch.randn(7, 2, 3),), verbose=False)
    >>> [node.op_type for node in program.model_proto.graph.node if node.op_type == "GRU"]
    ['GRU']
    """
    from .modules import FusedLayer  # which imports this
    from .shared import Unstocked

    for name, module in model.named_modules():
        if getattr(module, "proj_size", 0):
            raise ValueError(f"fusedrnn.onnx.export: ONNX has no projections, and '{name}' has proj_size={module.proj_size}")
        if isinstance(module, FusedLayer) and (module.form() or module.stock is Unstocked):
            raise ValueError(f"fusedrnn.onnx.export: it writes layers that torch.nn has, and '{name}' is another: {module}")
    with _recorded():
        table = {torch.ops.fusedrnn.onnx_layer.default: _translate, **options.pop("custom_translation_table", {})}
        return torch.onnx.export(model, args, f, dynamo=True, custom_translation_table=table, **options)


@contextlib.contextmanager
def _recorded():
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def refuse_packed() -> None:
    """Say, while `export` is at work, that it has no use for packed input.

    Raises:
        RuntimeError: it is at work.
    """
    if _recording:
        raise RuntimeError("fusedrnn.onnx.export: ONNX has no packed sequences; give padded input and lengths")


def layer(cell, input, hx, cx, weights, ragged, batch_first):
    """`fusedrnn.autograd.layer` as one operator, for the time of an export.

    Args:
        cell, input, hx, cx, weights, ragged, batch_first: as there; input is padded.

    Returns:
        output, hy and cy, as there.
    """
    flat = [tensor for group in weights for tensor in group[:4] if tensor is not None]
    hx, cx = (None if state is None else state.contiguous() for state in (hx, cx))
    output, hy, cy = _layer(cell, input.transpose(0, 1) if batch_first else input, hx, cx, flat, len(weights), ragged)
    return output, hy, cy if cell == "lstm" else None


@torch.library.custom_op("fusedrnn::onnx_layer", mutates_args=())
def _layer(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Sequence[Tensor], directions: int,
           lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A layer without projections: input (T, B, I); for each direction weight_ih, weight_hh and the biases, if there are any.
    The last result is cy, for cells without one of no meaning."""
    from .layer import forward, with_gaps
    from .ops import SAVE_NOTHING
    from .reference import NO_CARRY

    output, hy, cy, _, _ = forward(cell, lengths, False, NO_CARRY, input, hx, cx, with_gaps(weights, directions), SAVE_NOTHING)
    return output, hy, cy if cell == "lstm" else torch.zeros_like(hy)


@_layer.register_fake
def _(cell, input, hx, cx, weights, directions, lengths):
    T, B, _ = input.shape
    H = weights[1].shape[1]
    hy, cy = (input.new_empty(directions, B, H) for _ in range(2))
    return input.new_empty(T, B, directions * H), hy, cy


def _translate(cell: str, input, hx, cx, weights, directions: int, lengths):
    """The node. ONNX: X (T, B, I), W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), Y (T, D, B, H), Y_h and Y_c (D, B, H)."""
    from onnxscript import opset18 as op

    kind, order = NODES[cell]
    H, each = weights[1].shape[1], len(weights) // directions

    rows = op.Constant(value_ints=[gate * H + unit for gate in order for unit in range(H)])

    def of_directions(*kinds):
        parts = [op.Concat(*(op.Gather(weights[at + k], rows) for k in kinds), axis=0) for at in range(0, len(weights), each)]
        return op.Concat(*(op.Unsqueeze(part, op.Constant(value_ints=[0])) for part in parts), axis=0)

    biases = of_directions(2, 3) if each > 2 else None
    lengths = None if lengths is None else op.Cast(lengths, to=6)  # int32
    states = (hx, cx) if cell == "lstm" else (hx,)
    extra = {"linear_before_reset": 1} if cell == "gru" else {}
    if kind == "RNN":
        extra = {"activations": [cell.removeprefix("rnn_").capitalize()] * directions}
    node = getattr(op, kind)
    found = node(input, of_directions(0), of_directions(1), biases, lengths, *states, hidden_size=H,
                 direction="bidirectional" if directions == 2 else "forward", **extra)
    output = op.Reshape(op.Transpose(found[0], perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return output, found[1], found[2] if cell == "lstm" else op.Identity(found[1])
