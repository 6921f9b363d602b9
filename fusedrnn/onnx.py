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
from . import reference
from .layer import by_direction, with_gaps
from .reference import Choice, heads_of, named

#: For each cell the operator of ONNX, and the place of its gates among ours. With coupled gates ONNX keeps a place for f, and does
#: not look at what is there: i once more.
NODES = {"rnn_tanh": ("RNN", (0,)), "rnn_relu": ("RNN", (0,)), "lstm": ("LSTM", (0, 3, 1, 2)), "gru": ("GRU", (1, 0, 2)),
         "lstm_general": ("LSTM", (0, 3, 1, 2)), "lstm_coupled": ("LSTM", (0, 2, 0, 1)),
         "gru_general": ("GRU", (1, 0, 2)), "gru_reset_before": ("GRU", (1, 0, 2))}  # fmt: skip
#: The place of ONNX's peepholes, i, o and f, among ours.
PEEPHOLES = {"lstm_general": (0, 2, 1), "lstm_coupled": (0, 1, 0)}
#: ONNX's names of functions, and alpha and beta of those that have them.
FUNCTIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "sigmoid": ("Sigmoid", ()), "hard_sigmoid": ("HardSigmoid", (1 / 6, 0.5)),
    "hard_sigmoid_of_fifths": ("HardSigmoid", (0.2, 0.5)), "tanh": ("Tanh", ()), "relu": ("Relu", ()),
    "identity": ("Affine", (1.0, 0.0)),
}  # fmt: skip
#: What of `fusedrnn.options.FORM` a node can be.
FORM = ("peepholes", "coupled", "gate_activation", "activation", "reset_after")

_recording = False


def is_recording() -> bool:
    """Whether `export` is at work, and a layer is to be recorded as one node.

    Returns:
        True or False.
    """
    return _recording


def has_node(cell: str) -> bool:
    """Whether a node of ONNX computes a cell.

    Args:
        cell: as `fusedrnn.reference.step_of` takes it.

    Returns:
        True or False, such as of a cell whose state has a limit.
    """
    name, choice = named(cell)
    return name in NODES and not choice.clip and heads_of(cell) == 1


def export(model: nn.Module, args: tuple[Any, ...], f: Any = None, **options: Any) -> Any:
    """Export a model, each layer of ours as one ONNX node for both its directions.

    Lengths become ONNX's sequence_lens, peepholes its P, and the other options of a layer's form its attributes. It has no
    cell_clip: its clip limits what activations are given, and not the state. For what torch.nn has and ONNX cannot say take
    torch.onnx.export.

    Args:
        model: in eval mode, or dropout between layers is written out as well.
        args: arguments of a call.
        f: file to write; None writes none.
        options: of torch.onnx.export, such as dynamic_shapes, input_names or opset_version.

    Returns:
        torch's ONNXProgram.

    Raises:
        ValueError: a layer has projections, cell_clip or heads, which ONNX has not, or is of a class that it has not.
        RuntimeError: an input is packed: give padded input and lengths instead.

    >>> import fusedrnn, torch
    >>> program = export(fusedrnn.GRU(3, 5).eval(), (torch.randn(7, 2, 3),), verbose=False)
    >>> [node.op_type for node in program.model_proto.graph.node if node.op_type == "GRU"]
    ['GRU']
    """
    from .base import FusedLayer  # which imports this
    from .shared import Unstocked

    for name, module in model.named_modules():
        if getattr(module, "proj_size", 0):
            raise ValueError(f"fusedrnn.onnx.export: ONNX has no projections, and '{name}' has proj_size={module.proj_size}")
        if isinstance(module, FusedLayer) and module.stock is Unstocked:
            raise ValueError(f"fusedrnn.onnx.export: ONNX has no {type(module).__name__}, and '{name}' is one: {module}")
        for option in module.form() if isinstance(module, FusedLayer) else []:
            if option not in FORM:
                got = f"'{name}' has {option}={getattr(module, option)!r}"
                raise ValueError(f"fusedrnn.onnx.export: ONNX has no {option}, and {got}")
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
    flat = [tensor for group in weights for tensor in group if tensor is not None]
    hx, cx = (None if state is None else state.contiguous() for state in (hx, cx))
    output, hy, cy = _layer(cell, input.transpose(0, 1) if batch_first else input, hx, cx, flat, len(weights), ragged)
    return output, hy, cy if named(cell)[0] in reference.INNER else None


@torch.library.custom_op("fusedrnn::onnx_layer", mutates_args=())
def _layer(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Sequence[Tensor], directions: int,
           lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A layer without projections: input (T, B, I); for each direction weight_ih, weight_hh, the biases, if there are any, and the
    peepholes, if there are any. The last result is cy, for cells without one of no meaning."""
    groups = [tuple(group) for group in by_direction(with_gaps(weights, directions))]
    output, hy, cy, _ = reference.layer(cell, input, hx, cx, groups, lengths)
    return output, hy, torch.zeros_like(hy) if cy is None else cy


@_layer.register_fake
def _(cell, input, hx, cx, weights, directions, lengths):
    T, B, _ = input.shape
    H = weights[1].shape[1]
    hy, cy = (input.new_empty(directions, B, H) for _ in range(2))
    return input.new_empty(T, B, directions * H), hy, cy


def _translate(cell: str, input, hx, cx, weights, directions: int, lengths):
    """The node. ONNX: X (T, B, I), W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), P (D, 3*H), Y (T, D, B, H), Y_h and Y_c (D, B, H).
    """
    from onnxscript import opset18 as op

    name, choice = named(cell)
    kind, order = NODES[name]
    H, each = weights[1].shape[1], len(weights) // directions

    rows = op.Constant(value_ints=[gate * H + unit for gate in order for unit in range(H)])

    def of_directions(*kinds, rows=rows):
        parts = [op.Concat(*(op.Gather(weights[at + k], rows) for k in kinds), axis=0) for at in range(0, len(weights), each)]
        return op.Concat(*(op.Unsqueeze(part, op.Constant(value_ints=[0])) for part in parts), axis=0)

    biases = of_directions(2, 3) if each > 3 else None
    lengths = None if lengths is None else op.Cast(lengths, to=6)  # int32
    inputs = [input, of_directions(0), of_directions(1), biases, lengths, hx]
    extra: dict[str, Any] = {}
    if kind == "RNN":
        functions = (name.removeprefix("rnn_"),)
    elif kind == "GRU":
        functions = (choice.gate, choice.candidate)
        extra["linear_before_reset"] = int(name != "gru_reset_before")
    else:
        functions = (choice.gate, choice.candidate, choice.output)
        inputs.append(cx)
        if each % 2:
            peepholes = of_directions(each - 1, rows=op.Constant(value_ints=list(PEEPHOLES[name])))
            inputs.append(op.Reshape(peepholes, op.Constant(value_ints=[0, -1])))
        if name == "lstm_coupled":
            extra["input_forget"] = 1
    if functions != Choice()[: len(functions)]:  # which are those of ONNX too, but of its RNN
        extra |= _activations(functions, directions)
    found = getattr(op, kind)(*inputs, hidden_size=H, direction="bidirectional" if directions == 2 else "forward", **extra)
    output = op.Reshape(op.Transpose(found[0], perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return output, found[1], found[2] if kind == "LSTM" else op.Identity(found[1])


def _activations(functions, directions):
    """The attributes of a node for functions of ours. Only functions that have alpha and beta take from the lists of these."""
    found = [FUNCTIONS[function] for function in functions] * directions
    values = [of_one for _, of_one in found if of_one]
    attributes = {"activations": [name for name, _ in found]}
    if values:
        attributes["activation_alpha"], attributes["activation_beta"] = (list(each) for each in zip(*values))
    return attributes
