"""One step of a cell or of a layer on a CPU: an operator forward, another backward (csrc/cpu/one_step.cpp), and autograd's half of it.

Of so little work a call's own cost is most of the time. So nothing is viewed, listed or asked here that need not be.
"""

import torch

from .derivatives import go_further, gradients, kept_by_others, needs_grad, of_results
from .layer import GIVEN, input_gradient
from .ops import TRAITS, cell_backward, cell_forward


def step(cell, tensors):
    """Take one step, with derivatives where they are wanted.

    Args:
        cell, tensors: as in `Step.forward`.

    Returns:
        what it returns.
    """
    if needs_grad(tensors):
        return _apply_step(cell, *tensors)
    hy, cy, output, _, _ = cell_forward(cell, *tensors)
    return _results_of_step(cell, hy, cy, output)


def _results_of_step(cell, hy, cy, output):
    inner = () if TRAITS[cell]["states"] == 1 else (cy,)
    return (output, hy, *inner) if hy.dim() == 3 else (hy, *inner) if inner else hy


class Step(torch.autograd.Function):
    """One step of a cell or a layer for autograd where no transform is present."""

    @staticmethod
    def forward(ctx, cell, *tensors):
        """Take the step and keep what backward needs.

        Args:
            ctx: autograd's.
            cell: as in `fusedrnn.autograd.layer`.
            tensors: input, hx, cx, weight_ih, weight_hh, bias_ih and bias_hh, as `cell_forward` takes them.

        Returns:
            hy, or for the lstm (hy, cy); of a layer the output, hy, and for the lstm cy.
        """
        hy, cy, *made = cell_forward(cell, *tensors, True)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*made, *tensors)  # not hy and cy, which may be edited in place
        return _results_of_step(cell, hy, cy, made[0])

    @staticmethod
    def backward(ctx, *grads):
        """Compute the gradients of all arguments of forward.

        Args:
            ctx: as forward left it.
            grads: of its results, None where there is none.

        Returns:
            a gradient for each argument, None where none is wanted.
        """
        _, *wanted = ctx.needs_input_grad
        grad_cy = None
        if TRAITS[ctx.cell]["states"] > 1:
            *grads, grad_cy = grads
        given = [grad for grad in grads if grad is not None]  # of a layer's two copies of hy
        grad_hy = None if not given else given[0] if len(given) == 1 else given[0] + given[1]
        if grad_hy is None and grad_cy is None:
            return (None,) * (1 + len(wanted))
        if go_further((grad_hy, grad_cy)):
            return None, *_gradients_of_step(ctx, grad_hy, grad_cy, wanted)
        output, saved, states, input, hx, cx, w_ih, w_hh, _, _ = ctx.saved_tensors
        want_input, want_hx, want_cx, want_ih, want_hh, want_b_ih, want_b_hh = wanted
        grad_pre, *grads = cell_backward(ctx.cell, input, hx, cx, w_hh, output, saved, states, grad_hy, grad_cy, want_hx, want_cx, want_ih,
                                         want_hh, want_b_ih or want_b_hh)
        grad_input = None
        if want_input:
            gates = w_ih.shape[0]
            grad_input = input_gradient(grad_pre if gates == grad_pre.shape[1] else grad_pre[:, :gates], w_ih)
            grad_input = grad_input if input.dim() == 2 else grad_input.view(input.shape)
        return None, grad_input, *[grad if want else None for grad, want in zip(grads, wanted[1:])]


_apply_step = super(torch.autograd.Function, Step).apply


def _gradients_of_step(ctx, grad_hy, grad_cy, wanted):
    """The gradients of `Step` in a form that can be differentiated and transformed: as those of a sequence of one step."""
    output, saved, states, *tensors = ctx.saved_tensors

    def as_sequence(rows):
        return None if rows is None else rows.reshape(1, -1, rows.shape[-1])

    output = as_sequence(output)
    made = [each.reshape(1, output.shape[1], 1, *each.shape[-2:]) for each in (saved, states)]
    held = [*[None] * 4, output, *made, *map(as_sequence, tensors[:3]), None, None, *tensors[3:], None]
    kept = kept_by_others(ctx.cell, False, held)
    grads = of_results(ctx.cell, None, as_sequence(grad_hy), as_sequence(grad_cy))
    found = gradients(kept, grads, [*wanted[:3], False, False, *wanted[3:], False])
    own = [*found[:3], *found[GIVEN : GIVEN + 4]]
    return [None if grad is None else grad.reshape(tensor.shape) for grad, tensor in zip(own, tensors)]
