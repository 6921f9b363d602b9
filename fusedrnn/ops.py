"""The registered operators under typed names, what they give to a compiler, and the cells' traits.

An operator computes the recurrence of one layer in all its directions, backward with the gradients of its weights;
`fusedrnn/layer.py` puts the product of the input, and its gradient, around it. Shapes: T steps, B rows of the batch, H
hidden units, P projection size or H, D directions, G gates. `ragged`, int64 on the CPU, is batch_sizes (T,) of packed sequences,
whose leading (T, B) is (rows,), or the lengths (B,) of padded ones.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _C
from .reference import heads_of


class _Traits(dict[str, Any]):
    def __missing__(self, cell: str) -> Any:
        name, _, choice = cell.partition(":")
        if choice and name in self:  # of which there are as many as there are limits
            return self[name]
        raise RuntimeError(f"fusedrnn: cell must be one of {', '.join(self)}, got {cell!r}")


#: For each cell: gates, pre (pre-activations per unit), states, saved, unit (numbers that each unit has of its own), norms, late,
#: chooses, multiplies, and the maps x_pre and h_pre from gate to pre-activation; csrc/cells/cell.h says what these are. A cell that chooses
#: is asked for by its name, a colon, and what `fusedrnn.reference.Choice.of` makes of the choice; and so, by `with_heads`, are heads.
TRAITS = _Traits(_C.cell_traits())
#: Those whose gradients of gates may take the place of what they saved.
OVERWRITE = frozenset(name for name, cell in TRAITS.items()
                      if 0 < cell["saved"] == cell["pre"] + cell["unit"] and not cell["norms"] and not cell["late"])

#: (cell, gates_x, weight_hh, bias_hh, weight_hr, hx, cx, ragged, reset, zoneout, hidden_mask, reset_hx, reset_cx, save, allow_tf32,
#: weight_ih=None, bias_ih=None) -> (output, hy, cy, saved, states). save: one of the following. With weight_ih, of each direction,
#: gates_x is the input, once for each, and its product is taken with the rest: CPU only.
recurrence_forward = torch.ops.fusedrnn.recurrence_forward.default

SAVE_NOTHING, SAVE_STATES, SAVE_ALL = range(3)

#: (cell, input, weight_hh, weight_hr, hx, cx, output, saved, states, ragged, reset, zoneout, hidden_mask, reset_hx, reset_cx, grad_output,
#: grad_hy, grad_cy, grad_states, need_grad_hx, need_grad_cx, need_grad_reset_hx, need_grad_reset_cx, need_grad_weight_ih,
#: need_grad_weight_hh, need_grad_bias, need_grad_weight_hr, allow_tf32)
#: -> (grad_pre, grad_hx, grad_cx, grad_reset_hx, grad_reset_cx, grad_weights). grad_weights: for each direction the gradients of
#: weight_ih, weight_hh, bias_ih, bias_hh and weight_hr. What is not needed is empty.
recurrence_backward = torch.ops.fusedrnn.recurrence_backward.default

#: The same, but grad_pre takes the place of saved, and is empty in the result; for the cells in OVERWRITE. CPU only.
recurrence_backward_ = torch.ops.fusedrnn.recurrence_backward_.default

#: (cell, gates_x, weight_ih, weight_hh, bias_ih, bias_hh, hx, cx, batch_sizes, save, allow_tf32)
#: -> (output, hy, cy, saved, states), each a list: of several layers, one upon the other, what recurrence_forward gives for each. CUDA only.
#: gates_x is of the first layer; weight_ih and bias_ih are of the others; hx and cx (L, B, H).
stack_forward = torch.ops.fusedrnn.stack_forward.default

#: (cell, input, weight_ih, weight_hh, hx, cx, output, saved, states, batch_sizes, grad_output, grad_hy, grad_cy, need_grad_hx, need_grad_cx,
#: need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, allow_tf32)
#: -> (grad_pre, grad_hx, grad_cx, grad_weights): its gradients, from output, saved and states of all layers, and the gradients of the last
#: output and of all last states (L, B, H). grad_pre is the first layer's; grad_weights has five a layer, as recurrence_backward. CUDA only.
stack_backward = torch.ops.fusedrnn.stack_backward.default

#: (cell, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, save=False) -> (hy, cy, output, saved, states): one step, of input
#: (B, I) and states (B, H), or (I) and (H), or of a layer (1, B, I) or (B, 1, I) and (1, B, H). The last three are for cell_backward, and empty if
#: not wanted, but for a layer's output. CPU only.
cell_forward = torch.ops.fusedrnn.cell_forward.default

#: (cell, input, hx, cx, weight_hh, output, saved, states, grad_hy, grad_cy, need_grad_hx, need_grad_cx, need_grad_weight_ih, need_grad_weight_hh,
#: need_grad_bias) -> (grad_pre, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh): its gradients, but for
#: that of the input, which the first G*H columns of grad_pre make with weight_ih. What is not needed is empty. CPU only.
cell_backward = torch.ops.fusedrnn.cell_backward.default

#: (packed, input, hx, cx, cell, num_layers, bidirectional, hidden_size, proj_size, batch_first, one_step)
#: -> (output, hy, cy): a stack of layers, or with one_step a cell, on weights that `fusedrnn.freeze` has packed. CPU only,
#: without derivatives.
frozen_forward = torch.ops.fusedrnn.frozen_forward.default


def _batch_size(sequence, hx):
    if sequence.dim() == 3:
        return sequence.shape[1]
    return torch.library.get_ctx().new_dynamic_size() if hx is None else hx.shape[1]


def _hidden(traits, weight_hh):
    return weight_hh.shape[0] // traits["gates"] if traits["multiplies"] else weight_hh.shape[1]


def _inner(traits):
    """What leads the shape of a cell's inner states where it has several."""
    return (traits["states"] - 1,) if traits["states"] > 2 else ()


@torch.library.register_fake("fusedrnn::recurrence_forward")
def _(cell, gates_x, weight_hh, bias_hh, weight_hr, hx, cx, ragged, reset, zoneout, hidden_mask, reset_hx, reset_cx, save, allow_tf32,
      weight_ih=None, bias_ih=None):
    traits, directions, like = TRAITS[cell], len(weight_hh), weight_hh[0]
    hidden, width = _hidden(traits, like), like.shape[1] * heads_of(cell)
    rows, batch = gates_x[0].shape[:-1], _batch_size(gates_x[0], hx)
    projected = bool(weight_hr) and not traits["unit"]
    extra = traits["states"] - 1 + projected + (0 if zoneout is None else traits["states"])
    return (
        like.new_empty(*rows, directions * width),
        like.new_empty(directions, batch, width),
        like.new_empty(*_inner(traits), directions, batch, hidden) if traits["states"] > 1 else like.new_empty(0),
        like.new_empty(*rows, directions, traits["saved"], hidden) if save == SAVE_ALL else like.new_empty(0),
        like.new_empty(*rows, directions, extra, hidden) if save else like.new_empty(0),
    )


@torch.library.register_fake("fusedrnn::stack_forward")
def _(cell, gates_x, weight_ih, weight_hh, bias_ih, bias_hh, hx, cx, batch_sizes, save, allow_tf32):
    traits, like = TRAITS[cell], weight_hh[0]
    hidden, inner, rows, batch = like.shape[1], traits["states"] - 1, gates_x.shape[:-1], _batch_size(gates_x, hx)

    def each(wanted, *shape):
        return [like.new_empty(*shape) if wanted else like.new_empty(0) for _ in weight_hh]

    return (
        each(True, *rows, hidden), each(True, 1, batch, hidden), each(inner, 1, batch, hidden),
        each(save == SAVE_ALL, *rows, 1, traits["saved"], hidden), each(save, *rows, 1, inner, hidden),
    )


@torch.library.register_fake("fusedrnn::stack_backward")
def _(cell, input, weight_ih, weight_hh, hx, cx, output, saved, states, batch_sizes, grad_output, grad_hy, grad_cy, need_grad_hx,
      need_grad_cx, need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, allow_tf32):
    traits, like, layers = TRAITS[cell], weight_hh[0], len(weight_hh)
    gates, hidden = like.shape
    batch = _batch_size(output[0], hx)
    grad_weights = [
        like.new_empty(*shape) if need else like.new_empty(0)
        for k in range(layers)
        for need, shape in (
            (need_grad_weight_ih, (gates, hidden if k else 0 if input is None else input.shape[-1])), (need_grad_weight_hh, like.shape),
            (need_grad_bias, (gates,)), (need_grad_bias, (gates,)), (False, ()),
        )
    ]  # fmt: skip
    return (
        like.new_empty(*output[0].shape[:-1], 1, traits["pre"], hidden),
        like.new_empty(layers, batch, hidden) if need_grad_hx else like.new_empty(0),
        like.new_empty(layers, batch, hidden) if need_grad_cx else like.new_empty(0),
        grad_weights,
    )


@torch.library.register_fake("fusedrnn::recurrence_backward")
def _fake_backward(cell, input, weight_hh, weight_hr, hx, cx, output, saved, states, ragged, reset, zoneout, hidden_mask, reset_hx,
                   reset_cx, grad_output, grad_hy, grad_cy, grad_states, need_grad_hx, need_grad_cx, need_grad_reset_hx,
                   need_grad_reset_cx, need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, need_grad_weight_hr, allow_tf32):
    traits, directions, like = TRAITS[cell], len(weight_hh), weight_hh[0]
    hidden, width = _hidden(traits, like), like.shape[1] * heads_of(cell)
    gates = traits["gates"] * hidden
    rows, batch = output.shape[:-1], _batch_size(output, hx)
    grad_weights = [
        like.new_empty(*shape) if need else like.new_empty(0)
        for _ in range(directions)
        for need, shape in (
            (need_grad_weight_ih, (gates, 0 if input is None else input.shape[-1])),
            (need_grad_weight_hh, like.shape),
            (need_grad_bias, (gates,)),
            (need_grad_bias, (gates,)),
            (need_grad_weight_hr, (traits["unit"] or width, hidden)),
        )
    ]
    return (
        like.new_empty(*rows, directions, traits["pre"] + traits["unit"], hidden),
        like.new_empty(directions, batch, width) if need_grad_hx else like.new_empty(0),
        like.new_empty(*_inner(traits), directions, batch, hidden) if need_grad_cx else like.new_empty(0),
        like.new_empty(directions, batch, width) if need_grad_reset_hx else like.new_empty(0),
        like.new_empty(*_inner(traits), directions, batch, hidden) if need_grad_reset_cx else like.new_empty(0),
        grad_weights,
    )


@torch.library.register_fake("fusedrnn::recurrence_backward_")
def _(*args):
    grad_pre, *others = _fake_backward(*args)
    return grad_pre.new_empty(0), *others


@torch.library.register_fake("fusedrnn::cell_forward")
def _(cell, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, save=False):
    traits, rows, hidden = TRAITS[cell], input.shape[:-1], weight_hh.shape[0] // TRAITS[cell]["gates"]
    rows = rows if len(rows) < 2 else (1, rows[1] if rows[0] == 1 else rows[0])
    inner = traits["states"] - 1
    shapes = ((True, ()), (inner, ()), (save or len(rows) == 2, ()), (save, (traits["saved"],)), (save, (inner,)))
    return tuple(weight_hh.new_empty(*rows, *units, hidden) if there else weight_hh.new_empty(0) for there, units in shapes)


@torch.library.register_fake("fusedrnn::cell_backward")
def _(cell, input, hx, cx, weight_hh, output, saved, states, grad_hy, grad_cy, need_grad_hx, need_grad_cx, need_grad_weight_ih,
      need_grad_weight_hh, need_grad_bias):
    traits, gates, hidden = TRAITS[cell], weight_hh.shape[0], output.shape[-1]
    grads = ((need_grad_hx, output.shape), (need_grad_cx, output.shape), (need_grad_weight_ih, (gates, input.shape[-1])),
             (need_grad_weight_hh, weight_hh.shape), (need_grad_bias, (gates,)), (need_grad_bias, (gates,)))
    grad_pre = output.new_empty(output.shape[-2] if output.dim() > 1 else 1, (traits["pre"] + traits["unit"]) * hidden)
    return grad_pre, *[output.new_empty(*shape) if need else output.new_empty(0) for need, shape in grads]


@torch.library.register_fake("fusedrnn::frozen_forward")
def _(packed, input, hx, cx, cell, num_layers, bidirectional, hidden_size, proj_size, batch_first, one_step):
    directions, width = 2 if bidirectional else 1, proj_size or hidden_size
    batch = input.shape[:-1] if one_step else input.shape[:-2] if batch_first else input.shape[1:-1]
    rows = batch if one_step else (num_layers * directions, *batch)
    return (
        input.new_empty(0) if one_step else input.new_empty(*input.shape[:-1], directions * width),
        input.new_empty(*rows, width),
        input.new_empty(*rows, hidden_size) if TRAITS[cell]["states"] > 1 else input.new_empty(0),
    )


@register_flop_formula(torch.ops.fusedrnn.recurrence_forward)
def _(cell, gates_x, weight_hh, bias_hh, weight_hr, hx, cx, ragged, reset, zoneout, hidden_mask, reset_hx, reset_cx, save, allow_tf32,
      weight_ih=None, bias_ih=None, out_shape=None, **kwargs):
    rows = math.prod(gates_x[0][:-1])
    return 2 * rows * sum(math.prod(shape) for shape in [*weight_hh, *(weight_hr or []), *(weight_ih or [])])


@register_flop_formula(torch.ops.fusedrnn.cell_forward)
def _(cell, input, hx, cx, weight_ih, weight_hh, *args, out_shape=None, **kwargs):
    return 2 * math.prod(input[:-1]) * (math.prod(weight_ih) + math.prod(weight_hh))


@register_flop_formula(torch.ops.fusedrnn.cell_backward)
def _(cell, input, hx, cx, weight_hh, output, saved, states, grad_hy, grad_cy, need_grad_hx, need_grad_cx, need_grad_weight_ih,
      need_grad_weight_hh, *args, out_shape=None, **kwargs):
    units = input[-1] * need_grad_weight_ih + weight_hh[1] * (need_grad_hx + need_grad_weight_hh)
    return 2 * math.prod(output[:-1]) * weight_hh[0] * units


@register_flop_formula(torch.ops.fusedrnn.stack_forward)
def _(cell, gates_x, weight_ih, weight_hh, *args, out_shape=None, **kwargs):
    return 2 * math.prod(gates_x[:-1]) * sum(math.prod(shape) for shape in [*weight_ih, *weight_hh])


@register_flop_formula(torch.ops.fusedrnn.stack_backward)
def _(cell, input, weight_ih, weight_hh, hx, cx, output, saved, states, batch_sizes, grad_output, grad_hy, grad_cy, need_grad_hx,
      need_grad_cx, need_grad_weight_ih, need_grad_weight_hh, *args, out_shape=None, **kwargs):
    rows, first = math.prod(output[0][:-1]), 0 if need_grad_hx or len(output[0]) == 2 else output[0][1]
    fed, own = (sum(math.prod(shape) for shape in shapes) for shapes in (weight_ih, weight_hh))
    inputs = (fed + weight_hh[0][0] * input[-1]) * rows if need_grad_weight_ih else 0
    return 2 * (fed * rows + own * (rows * (1 + need_grad_weight_hh) - first) + inputs)


@register_flop_formula([torch.ops.fusedrnn.recurrence_backward, torch.ops.fusedrnn.recurrence_backward_])
def _(cell, input, weight_hh, weight_hr, hx, cx, output, saved, states, ragged, reset, zoneout, hidden_mask, reset_hx, reset_cx,
      grad_output, grad_hy, grad_cy, grad_states, need_grad_hx, need_grad_cx, need_grad_reset_hx, need_grad_reset_cx,
      need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, need_grad_weight_hr, *args, out_shape=None, **kwargs):
    rows, first = math.prod(output[:-1]), 0 if need_grad_hx or need_grad_reset_hx or len(output) == 2 else output[1]
    states = sum(math.prod(shape) for shape in weight_hh)
    projections = sum(math.prod(shape) for shape in weight_hr or [])
    inputs = len(weight_hh) * weight_hh[0][0] * input[-1] if need_grad_weight_ih else 0
    return 2 * (states * (rows * (1 + need_grad_weight_hh) - first) + rows * (projections * (1 + need_grad_weight_hr) + inputs))
