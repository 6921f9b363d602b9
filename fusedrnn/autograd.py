"""One layer, with its gradients: the input product, the recurrence, and what autograd needs of both.

The input product of all steps and the gradients of the weights are single matrix products of ATen's, over all rows of the
sequence at once; what lies between is the operators' (`fusedrnn/ops.py`).
"""

import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear

from . import reference
from .ops import TRAITS, recurrence_backward, recurrence_forward


def layer(cell, input, hx, cx, weights, batch_sizes=None, batch_first=False):
    """Runs one recurrent layer, forward and, with two directions, in reverse beside it.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        input: (T, B, I); (B, T, I) if `batch_first`; or (rows, I), the data of a PackedSequence, with `batch_sizes`.
        hx: (D, B, P) initial hidden states, or None for zeros (not with `batch_sizes`).
        cx: (D, B, H) initial cell states of the lstm, or None for zeros.
        weights: for each of the D directions (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), None where there is none.
        batch_sizes: (T,) int64 on the CPU, as in a PackedSequence.

    Returns:
        output (T, B, D*P) in this order of memory, also if `batch_first`, or (rows, D*P); hy (D, B, P); and cy (D, B, H), None
        for cells without one.
    """
    tensors = (input, hx, cx, *(tensor for group in weights for tensor in group))
    if _needs_function(tensors):
        output, hy, cy, _, _ = Layer.apply(cell, batch_sizes, batch_first, *tensors)
    else:
        output, hy, cy, _, _ = _forward(cell, batch_sizes, batch_first, input, hx, cx, weights, save=False)
    return output, hy, cy if cell == "lstm" else None


def _needs_function(tensors):
    """Whether somebody differentiates or transforms this call. A transform that Layer does not serve raises there."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _forward(cell, batch_sizes, batch_first, input, hx, cx, weights, save):
    gates_x, weight_hh, bias_hh, weight_hr = [], [], [], []
    for w_ih, w_hh, b_ih, b_hh, w_hr in weights:
        if b_hh is not None:
            if _halves_are_summed(cell):
                b_ih = b_ih + b_hh
            else:
                bias_hh.append(b_hh)
        gates = linear(input, w_ih, b_ih)
        gates_x.append(gates.transpose(0, 1) if batch_first else gates)
        weight_hh.append(w_hh)
        if w_hr is not None:
            weight_hr.append(w_hr)
    return recurrence_forward(cell, gates_x, weight_hh, bias_hh, weight_hr, hx, cx, batch_sizes, save)


def _halves_are_summed(cell):
    """Whether the input and the recurrent half of every gate add up, so that their biases may, ahead of time."""
    return TRAITS[cell]["x_pre"] == TRAITS[cell]["h_pre"]


def _groups(tensors):
    return [tensors[i : i + 5] for i in range(0, len(tensors), 5)]


class Layer(torch.autograd.Function):
    """`layer` for autograd. The last two outputs are what backward needs of the recurrence besides its results."""

    @staticmethod
    def forward(cell, batch_sizes, batch_first, input, hx, cx, *weights):
        return _forward(cell, batch_sizes, batch_first, input, hx, cx, _groups(weights), save=True)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        cell, batch_sizes, batch_first, *tensors = inputs
        output, _, _, saved, states = outputs
        ctx.cell, ctx.batch_first = cell, batch_first
        ctx.mark_non_differentiable(saved, states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, output, saved, states, *tensors)

    @staticmethod
    def backward(ctx, grad_output, grad_hy, grad_cy, _saved, _states):
        batch_sizes, output, saved, states, *tensors = ctx.saved_tensors
        grads = (grad_output, grad_hy, grad_cy if ctx.cell == "lstm" else None)
        wanted = ctx.needs_input_grad[3:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            return None, None, None, *_differentiable_backward(ctx, tensors, batch_sizes, grads, wanted)
        input, hx, cx, *weights = tensors
        return None, None, None, *_backward(
            ctx.cell, batch_sizes, ctx.batch_first, input, hx, cx, _groups(weights), output, saved, states, grads, wanted
        )


def _differentiable_backward(ctx, tensors, batch_sizes, grads, wanted):
    """The same gradients through the reference recurrence in plain torch, which autograd can differentiate again."""
    input, hx, cx, *weights = tensors
    outputs = reference.layer(ctx.cell, input, hx, cx, _groups(weights), batch_sizes, ctx.batch_first)
    pairs = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [tensor for tensor, want in zip(tensors, wanted) if want],
            [grad for _, grad in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(found) if want else None for want in wanted]


def _backward(cell, batch_sizes, batch_first, input, hx, cx, weights, output, saved, states, grads, wanted):
    """Gradients of (input, hx, cx, *weights), None where not wanted."""
    traits = TRAITS[cell]
    weight_hh = [group[1] for group in weights]
    weight_hr = [group[4] for group in weights if group[4] is not None]
    grad_pre, grad_hx, grad_cx, grad_proj = recurrence_backward(
        cell, weight_hh, weight_hr, hx, cx, output, saved, states, batch_sizes, *grads, wanted[1], wanted[2]
    )
    rows, directions = output.shape[:-1].numel(), len(weights)
    hidden = grad_pre.shape[-1]
    grad_pre = grad_pre.view(rows, directions, -1)
    rows_input = (input.transpose(0, 1) if batch_first else input).reshape(rows, -1)

    grad_input, grad_weights = None, []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        want_ih, want_hh, want_b_ih, want_b_hh, want_hr = wanted[3 + 5 * d : 8 + 5 * d]
        grad_gates_x = grad_pre[:, d, : traits["gates"] * hidden]  # x_pre is the identity: see cells/cell.h
        if wanted[0]:
            grad_input = grad_gates_x @ w_ih if d == 0 else grad_input.addmm_(grad_gates_x, w_ih)
        grad_b_ih = grad_gates_x.sum(0) if want_b_ih or (want_b_hh and _halves_are_summed(cell)) else None
        if want_b_hh:
            grad_b_hh = grad_b_ih if _halves_are_summed(cell) else _gather_gates(cell, grad_pre[:, d].sum(0), hidden)
        grad_weights += [
            grad_gates_x.t() @ rows_input if want_ih else None,
            _grad_weight_hh(cell, d, grad_pre[:, d], output, hx, batch_sizes, w_hh) if want_hh else None,
            grad_b_ih if want_b_ih else None,
            grad_b_hh if want_b_hh else None,
            grad_proj.view(rows, directions, -1)[:, d].t() @ states.view(rows, directions, -1, hidden)[:, d, -1]
            if want_hr
            else None,
        ]
    if grad_input is not None and batch_sizes is None:
        grad_input = grad_input.view(*output.shape[:-1], -1)
        if batch_first:
            grad_input = grad_input.transpose(0, 1)
    return grad_input, grad_hx if wanted[1] else None, grad_cx if wanted[2] else None, *grad_weights


def _gather_gates(cell, grad, hidden):
    """From gradients of all pre-activations, (kPre*H, ...), those of the gates' recurrent halves, (G*H, ...)."""
    return torch.cat([grad[pre * hidden : (pre + 1) * hidden] for pre in TRAITS[cell]["h_pre"]])


def _grad_weight_hh(cell, direction, grad_pre, output, hx, batch_sizes, weight_hh):
    """Sum over all rows of the gates' gradients times the hidden state that the row's step began with."""
    width = weight_hh.shape[1]
    output = output.unflatten(-1, (-1, width))[..., direction, :]
    first = None if hx is None else hx[direction]
    if batch_sizes is not None:
        begins, firsts = _packed_begins(output, first, batch_sizes, direction), None
    else:
        batch = output.shape[1]
        begins = (output[1:] if direction else output[:-1]).reshape(-1, width)
        firsts = grad_pre[-batch:] if direction else grad_pre[:batch]
        grad_pre = grad_pre[:-batch] if direction else grad_pre[batch:]

    hidden = weight_hh.shape[0] // TRAITS[cell]["gates"]
    grad = torch.empty_like(weight_hh, memory_format=torch.contiguous_format)
    for gate, pre, count in _runs(TRAITS[cell]["h_pre"]):
        rows, columns = slice(gate * hidden, (gate + count) * hidden), slice(pre * hidden, (pre + count) * hidden)
        torch.mm(grad_pre[:, columns].t(), begins, out=grad[rows])
        if firsts is not None and first is not None:
            grad[rows].addmm_(firsts[:, columns].t(), first)
    return grad


def _runs(pre_of_gate):
    """(first gate, its pre-activation, count) for each run of gates whose pre-activations follow each other."""
    runs = []
    for gate, pre in enumerate(pre_of_gate):
        if runs and runs[-1][1] + runs[-1][2] == pre:
            runs[-1][2] += 1
        else:
            runs.append([gate, pre, 1])
    return runs


def _packed_begins(output, first, batch_sizes, direction):
    """For each packed row, the hidden state of the same sequence one step earlier in this direction, or its initial one."""
    steps, device = batch_sizes.shape[0], output.device
    offsets = torch.cumsum(batch_sizes, 0) - batch_sizes
    step = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    batch = torch.arange(output.shape[0]) - offsets[step]
    other = step + 1 if direction else step - 1
    inside = (other >= 0) & (other < steps)
    other = other.clamp(0, steps - 1)
    inside &= batch < batch_sizes[other]
    index = torch.where(inside, offsets[other] + batch, output.shape[0] + batch).to(device)
    if first is None:
        first = output.new_zeros(int(batch_sizes[0]), output.shape[1])
    return torch.cat([output, first]).index_select(0, index)
