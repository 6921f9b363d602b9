"""One layer, with its gradients: the input product, the recurrence, and what autograd needs of both.

The product of the input and weight_ih, the gradient of the input, and those of large weights are single matrix products of
ATen's, over all rows of the sequence at once; all else is the operators' (`fusedrnn/ops.py`).
"""

from functools import lru_cache

import torch
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import linear

from . import _C, reference
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
        batch_first: see input.

    Returns:
        output `(T, B, D*P)` in this order of memory, also if `batch_first`, or `(rows, D*P)`; hy (D, B, P); and cy (D, B, H),
        None for cells without one.
    """
    tensors = [input, hx, cx]
    for group in weights:
        tensors += group
    transformed = _are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or is_compiling():
        output, hy, cy, _, _ = TransformedLayer.apply(cell, batch_sizes, batch_first, *tensors)
    elif _needs_grad(tensors):
        return _apply(cell, batch_sizes, batch_first, *tensors)
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
        gates = _input_product(input, w_ih, b_ih)
        gates_x.append(gates.transpose(0, 1) if batch_first else gates)
        weight_hh.append(w_hh)
        if w_hr is not None:
            weight_hr.append(w_hr)
    return recurrence_forward(cell, gates_x, weight_hh, bias_hh, weight_hr, hx, cx, batch_sizes, save,
                              allows_tf32(input, batch_sizes, batch_first))


def _input_product(input, weight, bias):
    """torch.nn.functional.linear, into large pages where that is worth it."""
    # Before anything that costs a small call time; and a graph that is compiled for any size must not ask for the size.
    if is_compiling() or input.numel() * len(weight) <= LARGE * input.shape[-1]:
        return linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    out = _large_empty(rows, len(weight))
    if out is None:
        return linear(input, weight, bias)
    out = torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    return out.view(*input.shape[:-1], -1)


LARGE = 1 << 20  # numbers of a result for which large pages are worth asking for; csrc/pages.h has the limit in bytes


def _large_empty(rows, columns):
    """Memory for a product of `rows` and so many columns, on large pages; None if it is small, or no plain memory of a CPU."""
    if is_compiling() or len(rows) * columns < LARGE or not rows.is_cpu or _are_functorch_transforms_active():
        return None
    out = rows.new_empty(len(rows), columns)
    if type(out) is not torch.Tensor:  # a fake one
        return None
    _C.want_large_pages(out.data_ptr(), out.nbytes)
    return out


def allows_tf32(input, batch_sizes, batch_first):
    """Whether torch lets float32 numbers be rounded to TF32 before they are multiplied.

    By cuDNN's setting, which takes its layers, or by cuBLAS's, which takes its cells, and here every single step.

    Args:
        input: (T, B, features), batch first (B, T, features), or the data of a packed sequence.
        batch_sizes: of a packed sequence; None: padded.
        batch_first: whether the batch is the first dimension.
    Returns:
        True if so; always False on a CPU.
    """
    if not input.is_cuda:
        return False
    steps = len(batch_sizes) if batch_sizes is not None else input.shape[1 if batch_first else 0]
    by_cudnn = steps > 1 and torch.backends.cudnn.enabled
    return (torch.backends.cudnn.rnn if by_cudnn else torch.backends.cuda.matmul).fp32_precision == "tf32"


def _groups(tensors):
    return [tensors] if len(tensors) == 5 else [tensors[i : i + 5] for i in range(0, len(tensors), 5)]


class Layer(torch.autograd.Function):
    """`layer` for autograd where no transform is present."""

    @staticmethod
    def forward(ctx, cell, batch_sizes, batch_first, *tensors):
        """Run the layer and keep what backward needs.

        Args:
            ctx: autograd's.
            cell, batch_sizes, batch_first: as in `layer`.
            tensors: input, hx, cx, and the weights of all directions, one after the other.

        Returns:
            output, hy and cy, as `layer`.
        """
        input, hx, cx, *weights = tensors
        outputs = _forward(cell, batch_sizes, batch_first, input, hx, cx, _groups(weights), save=True)
        Layer.keep(ctx, cell, batch_sizes, batch_first, tensors, outputs)
        output, hy, cy, _, _ = outputs
        return output, hy, cy if cell == "lstm" else None

    @staticmethod
    def keep(ctx, cell, batch_sizes, batch_first, tensors, outputs):
        """Keep what backward needs.

        Args:
            ctx, cell, batch_sizes, batch_first, tensors: as in `Layer.forward`.
            outputs: the operator's.
        """
        output, _, _, saved, states = outputs
        ctx.cell, ctx.batch_first = cell, batch_first
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, output, saved, states, *tensors)

    @staticmethod
    def backward(ctx, grad_output, grad_hy, grad_cy, *_):
        """Compute the gradients of all arguments of forward.

        Args:
            ctx: as forward left it.
            grad_output, grad_hy, grad_cy: gradients of its results, None where there is none.

        Returns:
            a gradient for each argument, None where none is wanted.
        """
        grads = (grad_output, grad_hy, grad_cy if ctx.cell == "lstm" else None)
        wanted = ctx.needs_input_grad[3:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        backward = _differentiable_backward if _is_transformed(grads) else _backward
        return None, None, None, *backward(ctx, grads, wanted)


class TransformedLayer(Layer):
    """`Layer` for torch.func and torch.compile, whose backward can have no tensors but inputs and outputs of forward.

    So what it needs besides is two more outputs, which take longer than the arithmetic of a small layer.
    """

    @staticmethod
    def forward(cell, batch_sizes, batch_first, input, hx, cx, *weights):
        """Run the layer.

        Args:
            cell, batch_sizes, batch_first, input, hx, cx: as in `layer`.
            weights: of all directions, one after the other.

        Returns:
            all five results of the operator.
        """
        return _forward(cell, batch_sizes, batch_first, input, hx, cx, _groups(weights), save=True)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        """Keep what backward needs.

        Args:
            ctx: autograd's.
            inputs, outputs: of forward.
        """
        cell, batch_sizes, batch_first, *tensors = inputs
        ctx.mark_non_differentiable(*outputs[3:])
        Layer.keep(ctx, cell, batch_sizes, batch_first, tensors, outputs)


# Function.apply inspects the signature of forward at every call, which takes longer than a small layer does, for the sake of
# default arguments and of transforms. Neither is present where this is called.
_apply = super(torch.autograd.Function, Layer).apply


def _is_transformed(grads):
    """Whether these gradients will be differentiated again, or are many at once (is_grads_batched, torch.func)."""
    if torch.is_grad_enabled():
        return True
    if is_compiling():
        return False
    if _are_functorch_transforms_active():
        return True
    for grad in grads:
        if grad is not None and is_legacy_batchedtensor(grad):
            return True
    return False


def _differentiable_backward(ctx, grads, wanted):
    """`_backward` through the reference recurrence in plain torch, which every transform can take."""
    batch_sizes, _output, _saved, _states, *tensors = ctx.saved_tensors
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


def _backward(ctx, grads, wanted):
    """Gradients of (input, hx, cx, *weights), None where not wanted."""
    cell, batch_first = ctx.cell, ctx.batch_first
    batch_sizes, output, saved, states, input, hx, cx, *weights = ctx.saved_tensors
    if not is_compiling():
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained, so that what is deleted below is freed
    weights = _groups(weights)
    weight_hh = [group[1] for group in weights]
    weight_hr = [group[4] for group in weights if group[4] is not None]
    steps_first = input.transpose(0, 1) if batch_first else input
    want_weights = wanted[3:] if len(weights) == 1 else [any(both) for both in zip(*_groups(wanted[3:]))]
    want_ih, want_hh, want_b_ih, want_b_hh, want_hr = want_weights
    many_rows = batch_sizes is None and steps_first.shape[0] * steps_first.shape[1] > MANY_ROWS
    library_ih = many_rows and want_ih and min(weights[0][0].shape) > NARROW
    library_hh = many_rows and want_hh and min(weights[0][1].shape) > NARROW
    grad_pre, grad_hx, grad_cx, grad_weights = recurrence_backward(
        cell, steps_first, weight_hh, weight_hr, hx, cx, output, saved, states, batch_sizes, *grads, wanted[1], wanted[2],
        want_ih and not library_ih, want_hh and not library_hh, want_b_ih or want_b_hh, want_hr,
        allows_tf32(input, batch_sizes, batch_first),
    )
    del saved, states  # the largest tensors, and more are to be made
    for d in range(len(weights)):
        if library_ih and wanted[3 + 5 * d]:
            grad_weights[5 * d] = _grad_weight_ih(cell, d, grad_pre, steps_first)
        if library_hh and wanted[4 + 5 * d]:
            grad_weights[5 * d + 1] = _grad_weight_hh(cell, d, grad_pre, output, hx)
    return (
        _grad_input(cell, grad_pre, weights, steps_first.shape, batch_first) if wanted[0] else None,
        grad_hx if wanted[1] else None,
        grad_cx if wanted[2] else None,
        *[grad if want else None for grad, want in zip(grad_weights, wanted[3:])],
    )


# The engine adds up the rows of a sequence in short parts, as accurately as torch.nn, which adds up one step's at a time. Of more
# rows than these the steps are many too, and a matrix library's sum is no worse than torch.nn's, and takes a sixth less time. If a
# side of the weight is narrow, MKL's sum is neither: one chain of additions (6400 rows, 512 by 3: 70 units in the last place).
MANY_ROWS, NARROW = 1024, 32


def _grad_weight_ih(cell, direction, grad_pre, input):
    gates = grad_pre[:, :, direction, : TRAITS[cell]["gates"]]  # x_pre is the identity
    return _rows(gates).t() @ _rows(input)


def _grad_weight_hh(cell, direction, grad_pre, output, hx):
    """Padded sequences: each step began with the output of the step before, the first with hx."""
    steps, batch, directions, _, hidden = grad_pre.shape
    states = output.view(steps, batch, directions, -1)[:, :, direction]
    first, begun, before = (-1, slice(0, -1), slice(1, None)) if direction else (0, slice(1, None), slice(0, -1))
    grad = output.new_empty(TRAITS[cell]["gates"] * hidden, states.shape[-1])
    gate = 0
    for pre, count in _runs(cell):
        gates, part = grad_pre[:, :, direction, pre : pre + count], grad[gate * hidden : (gate + count) * hidden]
        torch.mm(_rows(gates[begun]).t(), _rows(states[before]), out=part)
        if hx is not None:
            part.addmm_(gates[first].flatten(1).t(), hx[direction])
        gate += count
    return grad


def _rows(tensor):
    """(T, B, ...) as a matrix of T*B rows."""
    return tensor.flatten(2).flatten(0, 1) if tensor.dim() > 3 else tensor.flatten(0, 1)


@lru_cache
def _runs(cell):
    """(first pre-activation, how many) for each run of recurrent halves of gates that follow each other."""
    runs = []
    for pre in TRAITS[cell]["h_pre"]:
        if runs and sum(runs[-1]) == pre:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((pre, 1))
    return runs


def _grad_input(cell, grad_pre, weights, shape, batch_first):
    """Every direction's gradients of the gates' input halves, which come first of the pre-activations, times its weight_ih."""
    width = TRAITS[cell]["pre"] * grad_pre.shape[-1]
    grad_pre = grad_pre.view(-1, len(weights) * width)
    grad_input = None
    for d, (w_ih, *_) in enumerate(weights):
        gates = w_ih.shape[0]
        grad_gates = grad_pre if gates == grad_pre.shape[1] else grad_pre[:, d * width : d * width + gates]
        if d == 0:
            grad_input = torch.mm(grad_gates, w_ih, out=_large_empty(grad_gates, w_ih.shape[1]))
        else:
            grad_input.addmm_(grad_gates, w_ih)
    grad_input = grad_input.view(*shape)  # in half the time of view(shape)
    return grad_input.transpose(0, 1) if batch_first else grad_input
