"""One layer, with its gradients: the input product, the recurrence, and what autograd needs of both.

The input product of all steps and the gradients of the weights are single matrix products of ATen's, over all rows of the
sequence at once; what lies between is the operators' (`fusedrnn/ops.py`).
"""

from functools import lru_cache

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
    tensors = [input, hx, cx]
    for group in weights:
        tensors += group
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or torch.compiler.is_compiling():
        output, hy, cy, _, _ = Layer.apply(cell, batch_sizes, batch_first, *tensors)
    elif _needs_grad(tensors):
        output, hy, cy, _, _ = _apply(cell, batch_sizes, batch_first, *tensors)
    else:
        output, hy, cy, _, _ = _forward(cell, batch_sizes, batch_first, input, hx, cx, weights, save=False)
    return output, hy, cy if cell == "lstm" else None


def _needs_grad(tensors):
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _forward(cell, batch_sizes, batch_first, input, hx, cx, weights, save):
    gates_x, weight_hh, bias_hh, weight_hr = [], [], [], []
    for w_ih, w_hh, b_ih, b_hh, w_hr in weights:
        if b_hh is not None:
            bias_hh.append(b_hh)
        gates = linear(input, w_ih, b_ih)
        gates_x.append(gates.transpose(0, 1) if batch_first else gates)
        weight_hh.append(w_hh)
        if w_hr is not None:
            weight_hr.append(w_hr)
    return recurrence_forward(cell, gates_x, weight_hh, bias_hh, weight_hr, hx, cx, batch_sizes, save)


@lru_cache
def _halves_are_summed(cell):
    """Whether the input and the recurrent half of every gate add up, so that their gradients are the same."""
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
        if _is_transformed(grads):
            return None, None, None, *_differentiable_backward(ctx, tensors, batch_sizes, grads, wanted)
        input, hx, cx, *weights = tensors
        return None, None, None, *_backward(
            ctx.cell, batch_sizes, ctx.batch_first, input, hx, cx, _groups(weights), output, saved, states, grads, wanted
        )


# Function.apply inspects the signature of forward at every call, which takes longer than a small layer does, for the sake of
# default arguments and of transforms. Neither is present where this is called.
_apply = super(torch.autograd.Function, Layer).apply


def _is_transformed(grads):
    """Whether these gradients will be differentiated again, or are many at once (is_grads_batched, torch.func)."""
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def _differentiable_backward(ctx, tensors, batch_sizes, grads, wanted):
    """The same gradients through the reference recurrence in plain torch, which every transform can take."""
    chosen = [i for i, want in enumerate(wanted) if want]
    given = [k for k, grad in enumerate(grads) if grad is not None]

    def forward(*primals):
        inputs = list(tensors)
        for i, primal in zip(chosen, primals):
            inputs[i] = primal
        input, hx, cx, *weights = inputs
        outputs = reference.layer(ctx.cell, input, hx, cx, _groups(weights), batch_sizes, ctx.batch_first)
        return tuple(outputs[k] for k in given)

    _, pullback = torch.func.vjp(forward, *(tensors[i] for i in chosen))
    found = iter(pullback(tuple(grads[k] for k in given)))
    return [next(found) if want else None for want in wanted]


def _backward(cell, batch_sizes, batch_first, input, hx, cx, weights, output, saved, states, grads, wanted):
    """Gradients of (input, hx, cx, *weights), None where not wanted."""
    traits = TRAITS[cell]
    weight_hh = [group[1] for group in weights]
    weight_hr = [group[4] for group in weights if group[4] is not None]
    grad_pre, grad_hx, grad_cx, grad_proj = recurrence_backward(
        cell, weight_hh, weight_hr, hx, cx, output, saved, states, batch_sizes, *grads, wanted[1], wanted[2]
    )
    packed, directions, hidden = batch_sizes is not None, len(weights), grad_pre.shape[-1]
    step_rows = int(batch_sizes[0]) if packed else output.shape[1]
    rows_input = (input.transpose(0, 1) if batch_first else input).reshape(output.shape[:-1].numel(), input.shape[-1])
    summed = _halves_are_summed(cell)

    grad_input, grad_weights = None, []
    for d, (w_ih, w_hh, _, _, w_hr) in enumerate(weights):
        want_ih, want_hh, want_b_ih, want_b_hh, want_hr = wanted[3 + 5 * d : 8 + 5 * d]
        grad_gates = _direction(grad_pre, d, directions, packed)
        grad_gates_x = grad_gates if summed else grad_gates[:, : traits["gates"] * hidden]  # x_pre is the identity
        if wanted[0]:
            grad_input = grad_gates_x @ w_ih if d == 0 else grad_input.addmm_(grad_gates_x, w_ih)
        grad_b = None
        if want_b_ih or want_b_hh:
            grad_b = grad_gates.sum(0) if grad_gates.shape[0] != 1 else grad_gates[0]
        grad_weights += [
            _sum_of_products([(grad_gates_x, rows_input)], step_rows) if want_ih else None,
            _grad_weight_hh(cell, d, grad_gates, output, hx, batch_sizes, w_hh) if want_hh else None,
            (grad_b if summed else grad_b[: traits["gates"] * hidden]) if want_b_ih else None,
            (grad_b.clone() if summed else _recurrent_halves(cell, grad_b, hidden)) if want_b_hh else None,
            None,
        ]
        if want_hr:
            unprojected = _direction(states, d, directions, packed)[:, -hidden:]
            grad_weights[-1] = _sum_of_products([(_direction(grad_proj, d, directions, packed), unprojected)], step_rows)
    if grad_input is not None and batch_sizes is None:
        grad_input = grad_input.view(*output.shape[:-1], input.shape[-1])
        if batch_first:
            grad_input = grad_input.transpose(0, 1)
    return grad_input, grad_hx if wanted[1] else None, grad_cx if wanted[2] else None, *grad_weights


def _direction(tensor, direction, directions, packed):
    """One direction of (T, B, D, ...) or, packed, (rows, D, ...) as a matrix of as many rows. A view."""
    leading = 1 if packed else 2
    rows, width = tensor.shape[:leading].numel(), tensor.shape[leading:].numel() // directions  # no -1: B may be 0
    if directions == 1:
        return tensor.view(rows, width)
    return tensor.view(rows, directions, width)[:, direction]


def _recurrent_halves(cell, grad, hidden):
    """From gradients of all pre-activations, (kPre*H,), those of the gates' recurrent halves, (G*H,)."""
    return torch.cat([grad[pre * hidden : (pre + count) * hidden] for _, pre, count in _runs(cell)])


def _grad_weight_hh(cell, direction, grad_gates, output, hx, batch_sizes, weight_hh):
    """Sum over all rows of the gates' gradients times the hidden state that the row's step began with."""
    width = weight_hh.shape[1]
    rows, directions = grad_gates.shape[0], output.shape[-1] // width
    output_rows = _direction(output, direction, directions, batch_sizes is not None)
    first = None if hx is None else hx[direction]
    if batch_sizes is not None:
        parts = [(grad_gates, _packed_begins(output_rows, first, batch_sizes, direction))]
    else:  # the first rows begin with hx, the others with the output of the step before
        batch, parts = output.shape[1], []
        if rows > batch:
            later, earlier = slice(batch, rows), slice(0, rows - batch)
            if direction:
                later, earlier = earlier, later
            parts.append((grad_gates[later], output_rows[earlier]))
        if first is not None:
            parts.append((grad_gates[rows - batch :] if direction else grad_gates[:batch], first))
    if not parts:
        return torch.zeros_like(weight_hh)

    step_rows = output.shape[1] if batch_sizes is None else int(batch_sizes[0])
    if len(_runs(cell)) == 1:
        return _sum_of_products(parts, step_rows)
    hidden = weight_hh.shape[0] // TRAITS[cell]["gates"]
    grad = torch.empty_like(weight_hh, memory_format=torch.contiguous_format)
    for gate, pre, count in _runs(cell):
        columns = slice(pre * hidden, (pre + count) * hidden)
        run = [(gates[:, columns], begins) for gates, begins in parts]
        _sum_of_products(run, step_rows, out=grad[gate * hidden : (gate + count) * hidden])
    return grad


# The gradient of a weight is a sum over all rows of the sequence. torch.nn adds up one product a step; a product over many rows
# at once is one chain of additions for each element, in MKL 256 rows long or more, and rounds more where the rows are alike.
# So few rows are taken in parts. Of many, the steps are many too, and torch.nn's own sum is the longer chain. Rows alike, 800
# in steps of 32, 1024 by 256, the error in units of the last place: whole 29, in parts of 64 11, torch.nn 5 (17 is allowed).
FEW_ROWS, PART = 1024, 64
# With a side this narrow MKL's chain is as long as the rows are many (6400 rows, 512 by 3: 70 units), and it is slow: 10 GF/s.
# A batch of products with the narrow side first takes a tenth of the time, and 3 units.
NARROW, MOST_PARTS = 32, 64


def _sum_of_products(pairs, step_rows, out=None):
    """The sum of a.t() @ b over the pairs (a, b) of matrices with as many rows, `step_rows` of them to a step."""
    a, b = pairs[0]
    exact = a.element_size() > 2  # 16-bit sums are rounded as they leave a product, so that parts would be rounded more often
    if len(pairs) == 1 and (a.shape[0] <= PART or not exact):  # a small call is nothing but such small steps
        return torch.mm(a.t(), b, out=out)
    narrow = exact and min(a.shape[1], b.shape[1]) <= NARROW
    if narrow and b.shape[1] < a.shape[1]:
        total = _narrow_sum([(b, a) for a, b in pairs]).t()
    elif narrow:
        total = _narrow_sum(pairs)
    if narrow:
        return total.contiguous() if out is None else out.copy_(total)
    started = False
    for a, b in pairs:
        rows = a.shape[0]
        part = max(PART, 2 * step_rows) if exact and rows <= FEW_ROWS else rows
        for first in range(0, rows, part):
            columns, others = a[first : first + part].t(), b[first : first + part]
            out = out.addmm_(columns, others) if started else torch.mm(columns, others, out=out)
            started = True
    return out


def _narrow_sum(pairs):
    """`_sum_of_products` where a is narrow."""
    total = None
    for a, b in pairs:
        rows, width = a.shape
        part = max(PART // 2, 4 * width, rows // MOST_PARTS)  # 4 times the width: all products are a quarter of b
        parts = rows // part
        batched = parts * part
        if parts:
            products = torch.bmm(a[:batched].view(parts, part, width).transpose(1, 2), b[:batched].view(parts, part, -1))
            total = products.sum(0) if total is None else total.add_(products.sum(0))
        if batched < rows:
            last = a[batched:].t() @ b[batched:]
            total = last if total is None else total.add_(last)
    return total


@lru_cache
def _runs(cell):
    """(first gate, its pre-activation, count) for each run of gates whose recurrent halves follow each other."""
    runs = []
    for gate, pre in enumerate(TRAITS[cell]["h_pre"]):
        if runs and runs[-1][1] + runs[-1][2] == pre:
            runs[-1][2] += 1
        else:
            runs.append([gate, pre, 1])
    return runs


def _packed_begins(output, first, batch_sizes, direction):
    """For each packed row, the hidden state of the same sequence one step earlier in this direction, or its initial one."""
    steps, rows, device = batch_sizes.shape[0], output.shape[0], output.device
    offsets = torch.cumsum(batch_sizes, 0) - batch_sizes
    step = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    batch = torch.arange(rows) - offsets[step]
    other = step + 1 if direction else step - 1
    inside = (other >= 0) & (other < steps)
    other.clamp_(0, steps - 1)
    inside &= batch < batch_sizes[other]
    starts = inside.logical_not().nonzero().flatten()  # rows that no step came before
    begins = output.index_select(0, torch.where(inside, offsets[other] + batch, 0).to(device))
    return begins.index_copy_(0, starts.to(device), first.index_select(0, batch[starts].to(device)))
