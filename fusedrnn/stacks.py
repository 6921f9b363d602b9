"""Several layers, one upon the other, in one launch: what `fusedrnn/layer.py` and `fusedrnn/derivatives.py` are for one layer."""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import select
from .derivatives import go_further, gradients, needs_grad, of_results
from .layer import _gates_of, _grad_input, allows_tf32, by_direction
from .ops import SAVE_ALL, SAVE_NOTHING, TRAITS, stack_backward, stack_forward
from .reference import Weights


def layers_at_once(cell: str, input: Tensor, layers: list[list[Weights]], ragged: Tensor | None, batch_first: bool) -> tuple[int, bool]:
    """How many of some layers, each on the output of the one below and with nothing in between, `stacked` takes in one launch.

    Args:
        cell, input, ragged, batch_first: as in `fusedrnn.autograd.layer`.
        layers: the weights of each.

    Returns:
        a number of the first of them, 1 where each goes by itself; and whether `stacked` is to take them in one launch backward, too.
    """
    if input.device.type not in select.STACKING or is_compiling() or _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return 1, False
    packed = input.dim() == 2
    if len(layers[0]) > 1 or layers[0][0][4] is not None or (ragged is not None and not packed):
        return 1, False
    if not needs_grad([input, *layers[0][0]]) and needs_grad([tensor for (group,) in layers for tensor in group]):
        return 1, False  # nothing of it is kept for backward, which ends above it
    if packed:
        steps, batch = len(ragged), int(ragged[0])  # type: ignore[arg-type,index]
    else:
        steps, batch = input.shape[1::-1] if batch_first else input.shape[:2]
    sizes = {"T": steps, "B": batch, "H": layers[0][0][1].shape[1]}
    if any(type(size) is not int for size in sizes.values()):  # of a graph for any size
        return 1, False
    tf32 = input.dtype == torch.float32 and allows_tf32(input, ragged, batch_first)
    return select.layers_at_once(input.device, cell, input.dtype, layers=len(layers), tf32=tf32, **sizes)


def stacked(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, layers: list[list[Weights]],
            ragged: Tensor | None, batch_first: bool, backward: bool) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Run so many layers as `layers_at_once` found, in one launch.

    Args:
        cell, input, ragged, batch_first: as in `fusedrnn.autograd.layer`.
        hx, cx: (L, B, H), or None for zeros.
        layers: the weights of each.
        backward: as it found.

    Returns:
        for each layer output, hy and cy, as `fusedrnn.autograd.layer` gives them.
    """
    weights = [group for (group,) in layers]
    differentiable = needs_grad([input, hx, cx, *(tensor for group in weights for tensor in group)])
    with torch.no_grad():
        made = forward_stacked(cell, ragged, batch_first, input, hx, cx, weights, SAVE_ALL if differentiable else SAVE_NOTHING)
    has_inner = TRAITS[cell]["states"] > 1
    if not differentiable:
        return [(output, hy, cy if has_inner else None) for output, hy, cy, _, _ in made]
    *outputs, hy, cy = _apply_stacked(cell, ragged, batch_first, made, backward, input, hx, cx, *(tensor for group in weights for tensor in group))
    cys = [None] * len(outputs) if cy is None else cy.split(1)
    return list(zip(outputs, hy.split(1), cys))


class StackedLayers(torch.autograd.Function):
    """Several layers, which have been run together."""

    @staticmethod
    def forward(ctx, cell, ragged, batch_first, made, backward, *tensors):
        """Keep what backward needs.

        Args:
            ctx: autograd's.
            cell, ragged, batch_first: as in `fusedrnn.autograd.layer`.
            made: for each layer all five results of the operator.
            backward: as in `stacked`.
            tensors: input, hx and cx (L, B, H), and the weights of all layers, one after the other.

        Returns:
            the outputs of all layers, hy, and cy, None for cells without one.
        """
        outputs, hys, cys, saved, states = zip(*made)
        ctx.cell, ctx.batch_first, ctx.layers, ctx.backward_at_once = cell, batch_first, len(made), backward
        ctx.tf32 = allows_tf32(tensors[0], ragged, batch_first)  # for which the plan of both passes was made
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ragged, *outputs, *saved, *states, *tensors)
        return *outputs, torch.cat(hys), torch.cat(cys) if TRAITS[cell]["states"] > 1 else None

    @staticmethod
    def backward(ctx, *grads):
        """Compute the gradients of all arguments of forward.

        Args:
            ctx: as forward left it.
            grads: of its results, None where there is none.

        Returns:
            a gradient for each argument, None where none is wanted.
        """
        cell, batch_first, layers, wanted = ctx.cell, ctx.batch_first, ctx.layers, ctx.needs_input_grad[5:]
        if all(grad is None for grad in grads):
            return (None,) * (5 + len(wanted))
        transformed = go_further(grads)
        ragged, *everything = ctx.saved_tensors
        made = [list(everything[i * layers : (i + 1) * layers]) for i in range(3)]
        input, hx, cx, *weights = everything[3 * layers :]
        del everything
        if not (transformed or is_compiling()):
            ctx.maybe_clear_saved_tensors()  # so that what is let go of below is freed
        at_once = ctx.backward_at_once and all(grad is None for grad in grads[: layers - 1])  # nobody else took what is between two layers
        if at_once and not transformed:
            last = (*grads[layers - 1 : layers + 1], grads[-1] if TRAITS[cell]["states"] > 1 else None)
            found = backward_stacked(cell, ragged, batch_first, made, input, hx, cx, by_direction(weights), last, wanted, ctx.tf32)
        else:
            found = _gradients_by_layer(ctx, ragged, made, input, hx, cx, weights, grads, wanted)
        return None, None, None, None, None, *found


def _gradients_by_layer(ctx, ragged, made, input, hx, cx, weights, grads, wanted):
    """The gradients of `StackedLayers`, layer after layer, from the last one down; `made` is let go of on the way."""
    *grad_outputs, grad_hy, grad_cy = grads
    grad_states: list[list[Tensor | None]] = []
    grad_weights: list[Tensor | None] = []
    grad_input = None
    for k in reversed(range(ctx.layers)):
        h0, c0, grad_h, grad_c = (None if state is None else state[k : k + 1] for state in (hx, cx, grad_hy, grad_cy))
        fed = made[0][k - 1] if k else input
        held = [ragged, None, None, None, *(each.pop() for each in made), fed, h0, c0, None, None, *weights[5 * k : 5 * k + 5]]
        kept = SimpleNamespace(cell=ctx.cell, batch_first=ctx.batch_first and k == 0, saved_tensors=held, maybe_clear_saved_tensors=held.clear)
        del fed
        both = [grad for grad in (grad_outputs[k], grad_input) if grad is not None]
        own = of_results(ctx.cell, sum(both[1:], both[0]) if both else None, grad_h, grad_c)
        want = [wanted[0] or k > 0, wanted[1], wanted[2], False, False, *wanted[3 + 5 * k : 8 + 5 * k]]
        grad_input, *found = gradients(kept, own, want)
        grad_states.insert(0, found[:2])
        grad_weights[:0] = found[4:]
    whole = []
    for parts, state in zip(zip(*grad_states), (hx, cx)):
        there = any(part is not None for part in parts)
        whole.append(torch.cat([torch.zeros_like(state[:1]) if part is None else part for part in parts]) if there else None)
    return [grad_input, *whole, *grad_weights]


_apply_stacked = super(torch.autograd.Function, StackedLayers).apply


def forward_stacked(cell, ragged, batch_first, input, hx, cx, layers, save):
    """Run several layers in one launch, each on the output of the one below.

    Args:
        cell, batch_first, input, save: as in `fusedrnn.layer.forward`.
        ragged: batch_sizes, if the input is packed.
        hx, cx: (L, B, H), or None for zeros.
        layers: the weights of each, in one direction.

    Returns:
        for each layer output, hy, cy, saved and states, as in `fusedrnn.layer.forward`.
    """
    (w_ih, _, b_ih, b_hh, _), *above = layers
    biased = b_hh is not None
    results = stack_forward(
        cell, _gates_of(input, w_ih, b_ih, 0, 1, batch_first), [weights[0] for weights in above], [weights[1] for weights in layers],
        [weights[2] for weights in above] if biased else None, [weights[3] for weights in layers] if biased else None,
        hx, cx, ragged, save, allows_tf32(input, ragged, batch_first))  # fmt: skip
    return list(zip(*results))


def backward_stacked(cell, ragged, batch_first, made, input, hx, cx, layers, grads, wanted, tf32):
    """Compute the gradients of a run of `forward_stacked` in one launch.

    Args:
        cell, ragged, batch_first, input, hx, cx, layers: as there.
        made: lists of output, saved and states, which it left, of all layers; emptied as soon as nobody needs them.
        grads: of the last output, and of all hy and cy, None for zeros.
        wanted: for input, hx, cx and the five weights of each layer whether its gradient is asked for.
        tf32: what `fusedrnn.layer.allows_tf32` was when it ran.

    Returns:
        a list of these gradients, None where not wanted.
    """
    steps_first = input.transpose(0, 1) if batch_first else input
    want_ih, want_hh, want_b_ih, want_b_hh, _ = [any(some) for some in zip(*by_direction(wanted[3:]))]
    grad_pre, *grad_states, grad_weights = stack_backward(
        cell, steps_first, [weights[0] for weights in layers[1:]], [weights[1] for weights in layers], hx, cx, *made, ragged, *grads,
        wanted[1], wanted[2], want_ih, want_hh, want_b_ih or want_b_hh, tf32)  # fmt: skip
    made.clear()
    grad_input = _grad_input(grad_pre, [layers[0]], steps_first.shape, batch_first) if wanted[0] else None
    return [grad_input, *[grad if want else None for grad, want in zip([*grad_states, *grad_weights], wanted[1:])]]
