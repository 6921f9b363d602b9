"""One layer without autograd: the input product, the recurrence, and the gradients of both.

The product of the input and weight_ih, the gradient of the input, and those of large weights are single matrix products of
ATen's, over all rows of the sequence at once, or the first is the engine's; all else is the operators' (`fusedrnn/ops.py`).
`fusedrnn/derivatives.py` makes them differentiable.
"""

from functools import lru_cache
from sys import getrefcount
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.nn.functional import linear

from . import _C
from .ops import OVERWRITE, SAVE_ALL, TRAITS, recurrence_backward, recurrence_backward_, recurrence_forward
from .reference import heads_of, without_padding


view_of_its_own = torch.ops.aten._unsafe_view.default  # without a tensor behind it that it is a view of


def forward(cell, ragged, batch_first, carry, input, hx, cx, weights, save):
    """Run the layer.

    Args:
        cell, ragged, batch_first, carry, input, hx, cx: as in `fusedrnn.autograd.layer`.
        weights: of all directions, one after the other.
        save: which of the last two results are wanted, as in `fusedrnn.ops`. `backward` needs both, or, to make the one again, states.

    Returns:
        output, hy, cy, saved and states, as the operator has them.
    """
    gates_x, weight_hh, bias_hh, weight_hr = [], [], [], []
    groups = by_direction(weights)
    fed = ()
    if _engine_multiplies(cell, input, weights[0], batch_first):
        gates_x = [input.transpose(0, 1) if batch_first else input] * len(groups)
        fed = _input_weights(groups)
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(groups):
        if b_hh is not None:
            bias_hh.append(b_hh)
        if not fed:
            gates_x.append(_gates_of(input, w_ih, b_ih, d, len(groups), batch_first))
        weight_hh.append(w_hh)
        if w_hr is not None:
            weight_hr.append(w_hr)
    return recurrence_forward(cell, gates_x, weight_hh, bias_hh or None, weight_hr or None, hx, cx, ragged, *carry, save,
                              allows_tf32(input, ragged, batch_first), *fed)


def _input_weights(groups):
    """(weight_ih, bias_ih) of some directions, as the operator takes them."""
    return [group[0] for group in groups], [group[2] for group in groups if group[2] is not None] or None


# Where the engine multiplies the input. Inference is then 1.0 to 1.1 times as fast as after a product of oneDNN's or MKL's, and 1.3 to 1.9
# times where there are tens of thousands of rows (two threads; AVX-512, and less of it with AVX2). It is not for
#   little work, or so few rows that weight_ih is not worth being packed;
#   a weight_ih of more numbers: of four times as many (I1024 H1024, T25 B32) it took 27 ms, oneDNN 16;
#   an input much wider than the state, heads narrower than a block of units, or more than two threads for a block, which one of them owns.
FED_LEAST, FED_ROWS, FED_MOST, FED_WIDEST, FED_UNITS = 2_000_000, 24, 1 << 20, 4, 16


def _engine_multiplies(cell, input, weight_ih, batch_first):
    """Whether the recurrence's operator is to multiply the input, too: what comes of it is then used where it is made, some steps at a
    time, and takes no memory. In float16, where ATen has loops of its own that take 5 to 10 times as long, it always is; in bfloat16,
    which oneDNN is quick at, never, but for single steps of a few rows.
    """
    if type(input) is not torch.Tensor or is_compiling() or not input.is_cpu:
        return False
    one_step = input.dim() == 3 and input.shape[1 if batch_first else 0] == 1 and input.numel() > 0 < weight_ih.shape[0]
    if not one_step and input.numel() * weight_ih.shape[0] <= FED_LEAST:
        return False
    traits = TRAITS[cell]
    if traits["norms"] or traits["late"] or is_watched():
        return False
    hidden, width = weight_ih.shape[0] // traits["gates"], input.shape[-1]
    if one_step:
        return is_for_one_step(input, weight_ih, hidden)
    if input.dtype in (torch.float16, torch.bfloat16):
        return _slow_in_aten(input)
    if input.numel() <= FED_ROWS * width or weight_ih.numel() > FED_MOST or width > FED_WIDEST * hidden:
        return False
    return hidden >= FED_UNITS * max(heads_of(cell), torch.get_num_threads() // 2) and _C.cpu_isa() != "baseline"


def is_watched() -> bool:
    """Whether a transform or a dispatch mode is to see the operators that a call makes, or to take their place.

    Returns:
        True if so.
    """
    return _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0


def is_for_one_step(input, weight_ih, hidden):
    """Whether one step on a CPU is faster where the engine multiplies the input, too.

    Args:
        input: a plain tensor of rows.
        weight_ih: theirs.
        hidden: H.

    Returns:
        True for few rows, where a call of a cell then takes 0.4 to 0.6 of the time; and for more, until a library's product is
        the faster.
    """
    if _slow_in_aten(input):
        return True
    rows = input.numel() // input.shape[-1]
    if input.dtype in (torch.float16, torch.bfloat16) or _C.cpu_isa() == "baseline":
        return rows * hidden <= STEP_SMALL
    return rows <= FED_ROWS or weight_ih.numel() <= FED_MOST


STEP_SMALL = 4096  # numbers of a state


def _gates_of(input, w_ih, b_ih, direction, directions, batch_first):
    """The input's half of a direction's gates, steps first; without a weight_ih the input has those of all directions."""
    gates = input_product(input, w_ih, b_ih) if w_ih.shape[0] else input.chunk(directions, -1)[direction]
    return gates.transpose(0, 1) if batch_first else gates


def input_product(input, weight, bias=None):
    """Run torch.nn.functional.linear without derivatives, by oneDNN or into large pages where that is worth it.

    Args:
        input, weight, bias: as there.

    Returns:
        what it returns.
    """
    # Before anything that costs a small call time; and a graph that is compiled for any size must not ask for the size.
    if type(input) is not torch.Tensor or is_compiling():
        return linear(input, weight, bias)
    work = input.numel() * weight.shape[0]  # len() of a tensor is torch's in Python, and takes three times as long
    if work <= ONEDNN_LEAST and work <= LARGE * input.shape[-1]:
        return linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    out = by_onednn(rows, weight, bias)
    if out is None:
        out = _large_empty(rows, len(weight))
        if out is None:
            return linear(input, weight, bias)
        out = torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    return out.view(*input.shape[:-1], -1)


# Multiply-adds of a product that oneDNN is worth being called for.
ONEDNN_LEAST = 2_000_000
LONG = 400  # rows of a product that pay for turning the weight over


def _mkl_is_slow() -> bool:
    """Whether MKL, which torch's linear takes, is no match for the processor: AMD's with AVX-512, for whose maker it has no such code.
    On a Zen 5 oneDNN is 2.2 times as fast (430 against 190 GF/s on two cores), the engine's sums for weights 1.5 times."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo") as about:
            return "AuthenticAMD" in about.read(1024)  # of the first core: there may be hundreds
    except OSError:
        return False


MKL_IS_SLOW = _mkl_is_slow()


def _half_is_slow() -> bool:
    """Whether ATen multiplies float16 in loops of its own, as it does where the processor has no instructions for that."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is None or not supported()


HALF_IS_SLOW = _half_is_slow()


def _slow_in_aten(tensor):
    """Whether a tensor is of the format that ATen multiplies in loops of its own."""
    return HALF_IS_SLOW and tensor.is_cpu and tensor.dtype == torch.float16


def by_onednn(rows, weight, bias=None):
    """A product by oneDNN, where it is the faster library.

    Args:
        rows: (N, K).
        weight: (M, K).
        bias: (M,), None for zeros.

    Returns:
        rows weight^T + bias, (N, M); None where oneDNN is no gain, or where they are not plain tensors of float32 on a CPU.
    """
    if not MKL_IS_SLOW or type(rows) is not torch.Tensor or is_compiling() or rows.numel() * weight.shape[0] <= ONEDNN_LEAST:
        return None
    if rows.dtype != torch.float32 or not rows.is_cpu or not torch.backends.mkldnn.enabled:
        return None
    if is_watched() or len(rows) <= LONG and not weight.is_contiguous():
        return None
    return torch.ops.mkldnn._linear_pointwise(rows, weight.contiguous(), bias, "none", [], "")


SHORT = 256  # rows that oneDNN adds up in one chain: of more its sums are less accurate than MKL's


def sum_of_rows(grads, rows):
    """The gradient of a weight, without derivatives, by oneDNN where that is worth it.

    Args:
        grads: (N, M) of its product.
        rows: (N, K) that it was multiplied with.

    Returns:
        grads^T rows, (M, K).
    """
    if not MKL_IS_SLOW:
        return grads.t() @ rows
    total: Any = None
    for some, others in zip(grads.split(SHORT), rows.split(SHORT)):
        part = by_onednn(some.t(), others.t())
        if part is None:
            part = some.t() @ others
        total = part if total is None else total.add_(part)
    return total


LARGE = 1 << 20  # numbers of a result for which large pages are worth asking for; csrc/pages.h has the limit in bytes


def _large_empty(rows, columns):
    """Memory for a product of `rows` and so many columns, on large pages; None if it is small, or no plain memory of a CPU."""
    if type(rows) is not torch.Tensor or is_compiling():  # a fake one
        return None
    if rows.shape[0] * columns < LARGE or not rows.is_cpu or _are_functorch_transforms_active():
        return None
    out = rows.new_empty(len(rows), columns)
    _C.want_large_pages(out.data_ptr(), out.nbytes)
    return out


def with_gaps(weights, directions):
    """The weights of all directions, five to each, with None for those that there are none of.

    Args:
        weights: those that there are, as a list without gaps.
        directions: how many.

    Returns:
        a list of 5 a direction.
    """
    each = len(weights) // directions
    found = []
    for at in range(0, len(weights), each):
        some = list(weights[at : at + each])
        biases = some[2:4] if each >= 4 else [None, None]
        found += [*some[:2], *biases, some[-1] if each % 2 else None]
    return found


def allows_tf32(input: Tensor, ragged: Tensor | None, batch_first: bool) -> bool:
    """Whether torch lets float32 numbers be rounded to TF32 before they are multiplied.

    By cuDNN's setting, which takes its layers, or by cuBLAS's, which takes its cells, and here every single step.

    Args:
        input: (T, B, features), batch first (B, T, features), or the data of a packed sequence, (rows, features).
        ragged: batch_sizes, if the input is packed.
        batch_first: whether the batch is the first dimension.
    Returns:
        True if so; always False on a CPU.
    """
    if not input.is_cuda:
        return False
    steps = len(ragged) if input.dim() == 2 else input.shape[1 if batch_first else 0]  # type: ignore[arg-type]
    by_cudnn = steps > 1 and torch.backends.cudnn.enabled
    return (torch.backends.cudnn.rnn if by_cudnn else torch.backends.cuda.matmul).fp32_precision == "tf32"


def by_direction(tensors):
    """The five tensors of each direction's weights.

    Args:
        tensors: of all directions, one after the other.

    Returns:
        a list of five for each direction.
    """
    return [tensors] if len(tensors) == 5 else [tensors[i : i + 5] for i in range(0, len(tensors), 5)]


def backward(kept, grads, wanted):
    """Compute the gradients of a run of `forward`.

    Args:
        kept: has cell, batch_first, and saved_tensors: ragged, reset, zoneout, hidden_mask, output, saved, states, input, hx, cx,
            reset_hx, reset_cx and the weights. A ctx of autograd's is let go of what it saved, unless its graph is retained.
        grads: of output, hy, cy and states, None for zeros.
        wanted: for input, hx, cx, reset_hx, reset_cx and each weight whether its gradient is asked for.

    Returns:
        a list of these gradients, None where not wanted.
    """
    cell, batch_first = kept.cell, kept.batch_first
    everything = kept.saved_tensors  # once: a checkpoint gives each but once
    ragged, *masks, output, saved, states, input, hx, cx, reset_hx, reset_cx = everything[:FIRST_WEIGHT]
    carry = [*masks, reset_hx, reset_cx]
    weights = by_direction(everything[FIRST_WEIGHT:])
    del everything
    if not is_compiling():
        kept.maybe_clear_saved_tensors()  # so that what is deleted below is freed
    weight_hh = [group[1] for group in weights]
    weight_hr = [group[4] for group in weights if group[4] is not None] or None
    if saved.dim() == 1:  # empty, where the cell saves something
        return _backward_in_parts(cell, ragged, batch_first, carry, output, states, input, hx, cx, weights, grads, wanted)
    steps_first = input.transpose(0, 1) if batch_first else input
    tf32 = allows_tf32(input, ragged, batch_first)
    if ragged is not None and input.dim() == 3 and weights[0][0].shape[0] and input.device.type not in SKIPS_PADDING:
        steps_first = without_padding(steps_first, ragged, False)
    want_each = wanted[GIVEN:]
    want_weights = want_each if len(weights) == 1 else [any(both) for both in zip(*by_direction(want_each))]
    want_ih, want_hh, want_b_ih, want_b_hh, want_hr = want_weights
    by_mkl = output.is_cpu and output.dtype in (torch.float32, torch.float64)
    many_rows = ragged is None and masks == [None] * 3 and steps_first.shape[0] * steps_first.shape[1] > MANY_ROWS
    many_rows = many_rows and not (by_mkl and MKL_IS_SLOW) and not _slow_in_aten(output)
    library_ih = many_rows and want_ih and min(weights[0][0].shape) > NARROW
    library_hh = many_rows and want_hh and min(weights[0][1].shape) > NARROW and not TRAITS[cell]["late"]  # which multiplies no h
    # In this frame and not in another: where torch.compile has taken over calls, an argument of a function has one reference more.
    in_place = not is_compiling() and getrefcount(saved) == REFERENCES and _may_overwrite(cell, saved)
    run = recurrence_backward_ if in_place else recurrence_backward
    grad_pre, *grad_states, grad_weights = run(
        cell, steps_first, weight_hh, weight_hr, hx, cx, output, saved, states, ragged, *carry, *grads, *wanted[1:GIVEN],
        want_ih and not library_ih, want_hh and not library_hh, want_b_ih or want_b_hh, want_hr, tf32,
    )
    if in_place:
        grad_pre = saved
    del saved, states  # the largest tensors, and more are to be made
    for d in range(len(weights)):
        if library_ih and want_each[5 * d]:
            grad_weights[5 * d] = _grad_weight_ih(cell, d, grad_pre, steps_first)
        if library_hh and want_each[5 * d + 1]:
            grad_weights[5 * d + 1] = _grad_weight_hh(cell, d, grad_pre, output, hx)
    return [
        _grad_input(grad_pre, weights, steps_first.shape, batch_first) if wanted[0] else None,
        *[grad if want else None for grad, want in zip([*grad_states, *grad_weights], wanted[1:])],
    ]


# Where gradients of gates may take the place of what was saved, if nobody else has that.
OVERWRITING = ("cpu",)
OVERWRITE_LEAST = 1 << 14  # numbers: of fewer a second tensor costs no more than these questions


def _may_overwrite(cell, saved):
    """Whether what a cell saved, which one variable in Python holds, is nobody's else, and such that gradients can take its place."""
    if type(saved) is not Tensor or saved.numel() < OVERWRITE_LEAST or saved.device.type not in OVERWRITING:
        return False
    if cell.partition(":")[0] not in OVERWRITE:
        return False
    if not COUNTS_OWNERS or is_watched():
        return False
    memory = saved.untyped_storage()  # numpy may know it, a file, another process
    if not memory.resizable() or memory.is_shared() or not saved.is_contiguous():
        return False
    return _owners(saved, memory) == ALONE


def _owners(tensor, memory):
    """How many references there are to a tensor outside of Python, and to its memory."""
    count: Any = Tensor._use_count  # type: ignore[attr-defined]
    return count(tensor), torch._C._storage_Use_Count(memory._cdata)


def _of_one_variable():
    one = torch.empty(1)
    return getrefcount(one), _owners(one, one.untyped_storage()) if COUNTS_OWNERS else None


COUNTS_OWNERS = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
REFERENCES, ALONE = _of_one_variable()

GIVEN = 5  # tensors before the weights, in the arguments of a layer: input, hx, cx, reset_hx, reset_cx
# Where what `Layer.keep` of fusedrnn/derivatives.py saved has the output, these, and the weights.
OUTPUT, FIRST_TENSOR, FIRST_WEIGHT = 4, 7, 7 + GIVEN


def _backward_in_parts(cell, ragged, batch_first, carry, output, states, input, hx, cx, weights, grads, wanted):
    """`backward` where forward saved the states alone: a part of the steps after the other, so that what the cells saved, and the
    gradients of gates, are never there for all steps at once. Parts of two directions would run against each other: they are one.
    """
    steps = output.shape[0]
    in_one = len(weights) > 1 or is_compiling()
    each = steps if in_one else max(-(-steps // PARTS), -(-PART_ROWS // max(1, output.shape[1])))
    reset, zoneout, hidden_mask, reset_hx, reset_cx = carry
    # The input's gradient multiplies weight_ih the other way round, in every part, as oneDNN is quicker to if it lies so.
    turns = MKL_IS_SLOW and wanted[0] and input.is_cpu and input.dtype == torch.float32
    tensors = [tensor for w_ih, *group in weights for tensor in (w_ih.t().contiguous().t() if turns else w_ih, *group)]
    tf32 = allows_tf32(input, ragged, batch_first)
    time = 1 if batch_first else 0
    grad_output, grad_h, grad_c, grad_states = grads
    grad_input = torch.empty_like(input) if wanted[0] else None
    sums: Any = None  # of the gradients of what all parts have in common: reset_hx, reset_cx and the weights
    for begin in reversed(range(0, steps, each)):
        part = slice(begin, begin + each)
        count = len(output[part])
        inner = TRAITS[cell]["states"] - 1
        h0 = hx if begin == 0 else output[begin - 1].unsqueeze(0)
        c0 = cx if begin == 0 or not inner else _inner(states[begin - 1].unsqueeze(0), inner)[0]
        lengths = None if ragged is None else (ragged - begin).clamp(0, count)
        masks = [None if reset is None else reset[part],
                 zoneout if zoneout is None or zoneout.dim() == 3 else zoneout[part], hidden_mask]
        x, out, state = input.narrow(time, begin, count), output[part], states[part]
        saved = _saved_again(cell, lengths, batch_first, [*masks, reset_hx, reset_cx], out, state, x, h0, c0, weights, tf32)
        held = [lengths, *masks, out, saved, state, x, h0, c0, reset_hx, reset_cx, *tensors]
        kept = SimpleNamespace(cell=cell, batch_first=batch_first, saved_tensors=held, maybe_clear_saved_tensors=held.clear)
        del saved
        some = (None if grad_output is None else grad_output[part], grad_h, grad_c,
                None if grad_states is None else grad_states[part])
        want = [wanted[0], wanted[1] or begin > 0, wanted[2] or begin > 0 and inner > 0, *wanted[3:]]
        grad_x, grad_h, grad_c, *found = backward(kept, some, want)
        if grad_input is not None:
            grad_input.narrow(time, begin, count).copy_(grad_x)
        del grad_x
        wide = [None if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in found]
        sums = wide if sums is None else [a if a is None else a.add_(b) for a, b in zip(sums, wide)]
    return [
        grad_input, grad_h if wanted[1] else None, grad_c if wanted[2] else None,
        *[None if grad is None else grad.to(output.dtype) for grad in sums],
    ]


# A part is a sixteenth of the steps, or so many rows: fewer would be a loss, as each part lays out the weights again. Eighths take an
# LSTM's training step no less time (T1024 B32 H128), and a quarter more memory.
PARTS, PART_ROWS = 16, 256


def _inner(states, count):
    """States 1.. after some steps, (T, B, D, extra, H), as the operators take initial ones: (T, D, B, H), with T for D = 1 and T = 1;
    of several states (T, S - 1, D, B, H)."""
    found = states[:, :, :, :count].permute(0, 3, 2, 1, 4)
    return found.squeeze(1) if count == 1 else found


def _saved_again(cell, lengths, batch_first, carry, output, states, input, hx, cx, weights, tf32):
    """What the cells of some steps saved, from the states: all rows of all steps are the rows of one step."""
    reset, _, hidden_mask, reset_hx, reset_cx = carry
    steps, batch = output.shape[:2]
    inner = TRAITS[cell]["states"] - 1
    each = []

    def as_one_step(tensor):
        return tensor.reshape(1, steps * batch, tensor.shape[-1])

    # Of several steps a library's product takes three quarters of the time: all rows at once are too many to be fed from a cache.
    feeds = (steps == 1 or _slow_in_aten(input)) and _engine_multiplies(cell, input, weights[0][0], batch_first)
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        def before(given, begun, after, *at):
            """The state that each step began with, from the one after it; given[at]: before the first, begun[at]: anew."""
            d = at[-1]
            first = after.new_zeros(after.shape[1:]) if given is None else given[at]
            anew_from = 0 if begun is None else begun[at]
            if d == 0:
                found = torch.cat([first.unsqueeze(0), after[:-1]])
                return found if reset is None else torch.where(reset.unsqueeze(-1), anew_from, found)
            found = torch.cat([after[1:], first.unsqueeze(0)])
            time = torch.arange(1, steps + 1, device=output.device).unsqueeze(-1)
            if lengths is not None:
                found = torch.where((time < lengths.to(output.device)).unsqueeze(-1), found, first)
            if reset is None:
                return found
            anew = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
            if lengths is not None:
                anew = anew & (time < lengths.to(output.device))
            return torch.where(anew.unsqueeze(-1), anew_from, found)

        h = before(hx, reset_hx, output.unflatten(-1, (len(weights), -1))[:, :, d], d)
        if hidden_mask is not None:
            h = h * hidden_mask[d]
        c = None
        if inner == 1:
            c = as_one_step(before(cx, reset_cx, states[:, :, d, 0], d))
        elif inner:
            c = torch.stack([as_one_step(before(cx, reset_cx, states[:, :, d, k], k, d)) for k in range(inner)])
        if feeds:
            gates, fed = (input.transpose(0, 1) if batch_first else input), _input_weights([weights[d]])
        else:
            gates, fed = _gates_of(input, w_ih, b_ih, d, len(weights), batch_first), ()
        saved = recurrence_forward(cell, [as_one_step(gates)], [w_hh], None if b_hh is None else [b_hh],
                                   None if w_hr is None else [w_hr], as_one_step(h), c, *[None] * 6, SAVE_ALL, tf32, *fed)[3]
        each.append(view_of_its_own(saved, (steps, batch, 1, *saved.shape[3:])))
    return each[0] if len(each) == 1 else torch.cat(each, 2)


# Where the gradients of weights are sums over those steps alone that sequences have.
SKIPS_PADDING = ("cpu",)

# The engine adds up the rows of a sequence in short parts, as accurately as torch.nn, which adds up one step's at a time. Of more
# rows than these the steps are many too, and a matrix library's sum is no worse than torch.nn's, and takes a sixth less time. If a
# side of the weight is narrow, MKL's sum is neither: one chain of additions (6400 rows, 512 by 3: 70 units in the last place).
MANY_ROWS, NARROW = 1024, 32


def _grad_weight_ih(cell, direction, grad_pre, input):
    gates = grad_pre[:, :, direction, : TRAITS[cell]["gates"]]  # x_pre is the identity
    return _rows(gates).t() @ _rows(input)


def _grad_weight_hh(cell, direction, grad_pre, output, hx):
    """Padded sequences: each step began with the output of the step before, the first with hx. Of heads, a product for each gate."""
    steps, batch, directions, _, hidden = grad_pre.shape
    states = output.view(steps, batch, directions, -1)[:, :, direction]
    first, begun, before = (-1, slice(0, -1), slice(1, None)) if direction else (0, slice(1, None), slice(0, -1))
    heads = heads_of(cell)
    units = states.shape[-1] // heads
    grad = output.new_empty(TRAITS[cell]["gates"] * hidden, units)
    gate = 0

    def by_head(rows):
        return rows.unflatten(-1, (heads, units)).transpose(0, 1)

    for pre, count in _runs(cell) if heads == 1 else [(pre, 1) for pre in TRAITS[cell]["h_pre"]]:
        gates, part = grad_pre[:, :, direction, pre : pre + count], grad[gate * hidden : (gate + count) * hidden]
        if heads > 1:
            part = part.view(heads, units, units)
            torch.bmm(by_head(_rows(gates[begun])).transpose(1, 2), by_head(_rows(states[before])), out=part)
            if hx is not None:
                torch.baddbmm(part, by_head(gates[first].flatten(1)).transpose(1, 2), by_head(hx[direction]), out=part)
        else:
            torch.mm(_rows(gates[begun]).t(), _rows(states[before]), out=part)
            if hx is not None:
                torch.addmm(part, gates[first].flatten(1).t(), hx[direction], out=part)
        gate += count
    return grad


def _rows(tensor):
    """(T, B, ...) as a matrix of T*B rows."""
    return tensor.flatten(2).flatten(0, 1) if tensor.dim() > 3 else tensor.flatten(0, 1)


@lru_cache
def _runs(cell):
    """(first pre-activation, how many) for each run of recurrent halves of gates that follow each other."""
    runs: list[tuple[int, int]] = []
    for pre in TRAITS[cell]["h_pre"]:
        if runs and sum(runs[-1]) == pre:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((pre, 1))
    return runs


def input_gradient(grad_gates, weight_ih):
    """Compute the gradient of rows of the input, without derivatives.

    Args:
        grad_gates: (N, G*H).
        weight_ih: (G*H, I).

    Returns:
        grad_gates weight_ih, (N, I).
    """
    part = _quicker_gradient(grad_gates, weight_ih)
    return torch.mm(grad_gates, weight_ih, out=_large_empty(grad_gates, weight_ih.shape[1])) if part is None else part


def _quicker_gradient(grad_gates, weight_ih):
    """`input_gradient`, where torch.mm is not the quickest way to it; else None."""
    part = by_onednn(grad_gates, weight_ih.t())
    if part is None and _slow_in_aten(weight_ih):
        part = linear(grad_gates, weight_ih.t().contiguous())  # a product of the weight as it lies takes ATen 16 times as long
    return part


def _grad_input(grad_pre, weights, shape, batch_first):
    """Every direction's gradients of the gates' input halves, which come first of the pre-activations, times its weight_ih."""
    if weights[0][0].shape[0] == 0:  # the input is the gates
        each = shape[-1] // (len(weights) * grad_pre.shape[-1])
        gates = grad_pre[..., :each, :].flatten(-3)
        return gates.transpose(0, 1) if batch_first else gates
    width = grad_pre.shape[-2] * grad_pre.shape[-1]
    grad_pre = grad_pre.view(-1, len(weights) * width)
    grad_input: Any = None
    for d, (w_ih, *_) in enumerate(weights):
        gates = w_ih.shape[0]
        grad_gates = grad_pre if gates == grad_pre.shape[1] else grad_pre[:, d * width : d * width + gates]
        if d == 0:
            grad_input = input_gradient(grad_gates, w_ih)
            continue
        part = _quicker_gradient(grad_gates, w_ih)
        if part is None:
            torch.addmm(grad_input, grad_gates, w_ih, out=grad_input)  # and not addmm_, which a FlopCounterMode does not see
        else:
            grad_input.add_(part)
    grad_input = grad_input.view(*shape)  # in half the time of view(shape)
    return grad_input.transpose(0, 1) if batch_first else grad_input
