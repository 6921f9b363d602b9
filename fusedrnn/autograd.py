"""One layer, differentiable: for autograd, for torch.compile, and for torch.func.

The engine computes the layer and its first derivatives (`fusedrnn/layer.py`). A batch of calls, as torch.vmap makes it, is folded
into the engine's batch. Second derivatives and forward mode run through `fusedrnn.reference`, in plain torch.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.nn.functional import linear

from . import onnx, reference, select
from .layer import FIRST_TENSOR, FIRST_WEIGHT, GIVEN, MANY_ROWS, backward, by_direction, forward, input_gradient, with_gaps
from .layer import input_product as plain_product
from .layer import is_for_one_step, is_watched, sum_of_rows
from .ops import SAVE_ALL, SAVE_NOTHING, SAVE_STATES, TRAITS, cell_backward, cell_forward
from .reference import NO_CARRY, Carry, Weights


def layer(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: list[Weights],
          ragged: Tensor | None = None, batch_first: bool = False, carry: Carry = NO_CARRY, recompute: bool = False,
          return_states: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs one recurrent layer, forward and, with two directions, in reverse beside it.

    Args:
        cell: as `fusedrnn.reference.step_of` takes it, such as "lstm".
        input: (T, B, I); (B, T, I) if `batch_first`; or (rows, I), the data of a PackedSequence. With a weight_ih of shape (0, 0) I is
            `D*G*H`: the gates of all directions, side by side.
        hx: (D, B, P) initial hidden states, or None for zeros (not with packed data).
        cx: (D, B, H) initial cell states of the lstm, (S - 1, D, B, H) of a cell of S > 2 states, or None for zeros.
        weights: for each of the D directions (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), None where there is none.
        ragged: int64, batch_sizes (T,) of packed data, on the CPU, or the lengths (B,) of padded sequences, on the CPU or, on CUDA, where
            the input is; None: all have T steps.
        batch_first: see input.
        carry: what becomes of the states between steps; of its tensors reset_hx and reset_cx have gradients.
        recompute: keep, for backward, only the states, and make the rest again (not with packed data).
        return_states: whether the last result is wanted.

    Returns:
        output `(T, B, D*P)` in this order of memory, also if `batch_first`, or `(rows, D*P)`; hy (D, B, P); cy as cx, None for
        cells without one; and likewise c after each step, (T, B, D, 1, H) or (rows, D, 1, H), with S - 1 in the place of 1.

    Raises:
        RuntimeError: fusedrnn.onnx.export is at work, and ONNX has not what is asked for.
    """
    inner = TRAITS[cell]["states"] - 1
    if forward_ad._current_level >= 0:
        select.warn_once(f"fusedrnn's {cell}", "its reference in plain torch", "the engine has no forward-mode derivative")
        return reference.layer(cell, input, hx, cx, weights, ragged, batch_first, carry)
    masks = carry[:3]
    tensors = [input, hx, cx, *carry[3:]]
    for group in weights:
        tensors += group
    if is_compiling():
        if _are_functorch_transforms_active():  # torch.compile cannot tell there which gradients are wanted, and gives zeros
            return reference.layer(cell, input, hx, cx, weights, ragged, batch_first, carry)
        if onnx.is_recording():
            if carry is not NO_CARRY or return_states or not onnx.has_node(cell):
                raise RuntimeError("fusedrnn.onnx.export: ONNX has no resets, no zoneout and no states of every step, and is not "
                                   f"written for the cell {cell}")
            return *onnx.layer(cell, input, hx, cx, weights, ragged, batch_first), None
        if is_exporting() or not _needs_grad(tensors):  # an exported program is to be run, and not to be trained
            save = SAVE_STATES if return_states else SAVE_NOTHING
            output, hy, cy, _, states = forward(cell, ragged, batch_first, carry, input, hx, cx, tensors[GIVEN:], save)
        else:
            there = [tensor for tensor in tensors[GIVEN:] if tensor is not None]
            save = _saved_for_backward(cell, recompute)
            output, hy, cy, _, states = _compiled(cell, *tensors[:GIVEN], there, len(weights), ragged, batch_first, *masks, save)
    elif _are_functorch_transforms_active():
        if carry is not NO_CARRY or return_states:
            select.warn_once(f"fusedrnn's {cell}", "its reference in plain torch", "torch.func's transforms of the engine take no "
                             "resets, zoneout and recurrent dropout, and give no states of every step")
            return reference.layer(cell, input, hx, cx, weights, ragged, batch_first, carry)
        output, hy, cy, _, states = TransformedLayer.apply(cell, ragged, batch_first, *tensors)
    elif _is_one_step(cell, input, weights, ragged, batch_first, carry, recompute or return_states):
        output, hy, *inner_states = _one_step(cell, [*tensors[:3], *weights[0][:4]])
        return output, hy, inner_states[0] if inner else None, None
    elif _needs_grad(tensors):
        output, hy, cy, states = _apply(cell, ragged, batch_first, masks, recompute, return_states, *tensors)
        return output, hy, cy, states[..., :inner, :] if return_states and inner else None
    else:
        save = SAVE_STATES if return_states else SAVE_NOTHING
        output, hy, cy, _, states = forward(cell, ragged, batch_first, carry, input, hx, cx, tensors[GIVEN:], save)
    return output, hy, cy if inner else None, states[..., :inner, :] if return_states and inner else None


def one_step(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Sequence[Any]) -> Any:
    """The step of a cell in one operator, and its derivatives in another.

    Args:
        cell: as in `layer`.
        input, hx, cx: (B, I), (B, H) and (B, H), or (I), (H) and (H), plain tensors in no context that changes what a call means.
        weights: weight_ih and weight_hh, or with bias_ih and bias_hh.

    Returns:
        hy, or for the lstm (hy, cy); None where the step is for `layer`.
    """
    w_ih, w_hh, *biases = weights
    if not input.is_cpu or is_compiling() or is_watched() or not is_for_one_step(input, w_ih, w_hh.shape[-1]):
        return None
    tensors = (input, hx, cx, w_ih, w_hh, *(biases or (None, None)))
    if input.numel() > MANY_ROWS * input.shape[-1] and _needs_grad(tensors):
        return None  # the gradients of weights may be a library's
    return _one_step(cell, tensors)


def _one_step(cell, tensors):
    """What `Step.forward` returns, with derivatives where they are wanted."""
    if _needs_grad(tensors):
        return _apply_step(cell, *tensors)
    hy, cy, _ = cell_forward(cell, *tensors)
    return _results_of_step(cell, hy, cy)


def _results_of_step(cell, hy, cy):
    """Of a layer the output as well, which is kept for backward, and of which hy is another copy."""
    inner = () if TRAITS[cell]["states"] == 1 else (cy,)
    return (hy, hy.clone(), *inner) if hy.dim() == 3 else (hy, *inner) if inner else hy


def _is_one_step(cell, input, weights, ragged, batch_first, carry, wants_more):
    """Whether a layer's call is one step that `cell_forward` takes, in one direction, of nothing but torch's tensors and a cell of theirs."""
    if input.dim() != 3 or input.shape[1 if batch_first else 0] != 1 or type(input) is not Tensor or not input.is_cpu:
        return False
    w_ih, w_hh, *_, w_hr = weights[0]
    if len(weights) > 1 or w_hr is not None or carry is not NO_CARRY or ragged is not None or wants_more or not w_ih.shape[0]:
        return False
    traits = TRAITS[cell]
    if not traits["multiplies"] or traits["norms"] or traits["late"] or traits["states"] > 2 or is_watched():
        return False
    return input.numel() <= MANY_ROWS * input.shape[-1] and is_for_one_step(input, w_ih, w_hh.shape[0] // traits["gates"])


def _saved_for_backward(cell, recompute):
    """What the operator saves; a cell that needs nothing but states has nothing to make again."""
    return SAVE_STATES if recompute and TRAITS[cell]["saved"] else SAVE_ALL


def _needs_grad(tensors):
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class Layer(torch.autograd.Function):
    """`layer` for autograd where no transform is present."""

    @staticmethod
    def forward(ctx, cell, ragged, batch_first, masks, recompute, return_states, *tensors):
        """Run the layer and keep what backward needs.

        Args:
            ctx: autograd's.
            cell, ragged, batch_first, recompute, return_states: as in `layer`.
            masks: the first three of `Carry`.
            tensors: input, hx, cx, the last two of `Carry`, and the weights of all directions, one after the other.

        Returns:
            output, hy, cy, and the operator's states if they are wanted.
        """
        outputs = _forward(cell, ragged, batch_first, masks, tensors, _saved_for_backward(cell, recompute))
        Layer.keep(ctx, cell, ragged, batch_first, masks, tensors, outputs)
        output, hy, cy, _, states = outputs
        return output, hy, cy if TRAITS[cell]["states"] > 1 else None, states if return_states else None

    @staticmethod
    def keep(ctx, cell, ragged, batch_first, masks, tensors, outputs):
        """Keep what backward needs.

        Args:
            ctx, cell, ragged, batch_first, masks, tensors: as in `Layer.forward`.
            outputs: the operator's.
        """
        output, _, _, saved, states = outputs
        ctx.cell, ctx.batch_first = cell, batch_first
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ragged, *masks, output, saved, states, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        """Compute the gradients of all arguments of forward.

        Args:
            ctx: as forward left it.
            grads: of its results, None where there is none.

        Returns:
            a gradient for each argument, None where none is wanted.
        """
        return None, None, None, None, None, None, *_gradients(ctx, grads, ctx.needs_input_grad[6:])


def _forward(cell, ragged, batch_first, masks, tensors, save):
    """`fusedrnn.layer.forward` of what `Layer.forward` takes."""
    input, hx, cx, *begun = tensors[:GIVEN]
    return forward(cell, ragged, batch_first, (*masks, *begun), input, hx, cx, tensors[GIVEN:], save)


def _of_results(cell, grad_output, grad_hy, grad_cy, grad_states=None):
    """Gradients of the results that a cell has: there may be one for the empty tensor that stands for another."""
    inner = TRAITS[cell]["states"] > 1
    return grad_output, grad_hy, grad_cy if inner else None, grad_states if inner else None


def _are_transformed(grads):
    """Whether it is forward mode over reverse mode, or is_grads_batched."""
    return forward_ad._current_level >= 0 or any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads)


def _gradients(ctx, grads, wanted):
    """`fusedrnn.layer.backward`, in a form that can be differentiated and transformed where that will happen."""
    if all(grad is None for grad in grads):
        return [None] * len(wanted)
    if _are_transformed(grads):
        everything = ctx.saved_tensors
        ragged, *masks = everything[:4]
        tensors = everything[FIRST_TENSOR:]
        return _reference_gradients(ctx.cell, ragged, ctx.batch_first, masks, wanted, grads, tensors)
    if torch.is_grad_enabled() or _are_functorch_transforms_active():
        chosen = frozenset(i for i, want in enumerate(wanted) if want)
        some = iter(LayerGradients.apply(ctx.cell, ctx.batch_first, chosen, *grads, *ctx.saved_tensors))
        return [next(some) if want else None for want in wanted]
    return backward(ctx, grads, wanted)


# Function.apply inspects the signature of forward at every call, which takes longer than a small layer does, for the sake of
# default arguments and of transforms. Neither is present where this is called.
_apply = super(torch.autograd.Function, Layer).apply


class Step(torch.autograd.Function):
    """One step of a cell or a layer for autograd where no transform is present."""

    @staticmethod
    def forward(ctx, cell, *tensors):
        """Take the step and keep what backward needs.

        Args:
            ctx: autograd's.
            cell: as in `layer`.
            tensors: input, hx, cx, weight_ih, weight_hh, bias_ih and bias_hh, as `cell_forward` takes them.

        Returns:
            hy, or for the lstm (hy, cy); of a layer the output, hy, and for the lstm cy.
        """
        hy, cy, saved = cell_forward(cell, *tensors, True)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hy, cy, saved, *tensors)
        return _results_of_step(cell, hy, cy)

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
        if torch.is_grad_enabled() or _are_functorch_transforms_active() or _are_transformed((grad_hy, grad_cy)):
            return None, *_gradients_of_step(ctx, grad_hy, grad_cy, wanted)
        hy, cy, saved, input, hx, cx, w_ih, w_hh, _, _ = ctx.saved_tensors
        want_input, want_hx, want_cx, want_ih, want_hh, want_b_ih, want_b_hh = wanted
        grad_pre, *grads = cell_backward(ctx.cell, input, hx, cx, w_hh, hy, cy, saved, grad_hy, grad_cy, want_hx, want_cx, want_ih, want_hh,
                                         want_b_ih or want_b_hh)
        grad_input = None
        if want_input:
            gates = w_ih.shape[0]
            grad_input = input_gradient(grad_pre if gates == grad_pre.shape[1] else grad_pre[:, :gates], w_ih)
            grad_input = grad_input if input.dim() == 2 else grad_input.view(input.shape)
        return None, grad_input, *[grad if want else None for grad, want in zip(grads, wanted[1:])]


_apply_step = super(torch.autograd.Function, Step).apply


def _gradients_of_step(ctx, grad_hy, grad_cy, wanted):
    """The gradients of `Step` in a form that can be differentiated and transformed: as those of a sequence of one step."""
    hy, cy, saved, *tensors = ctx.saved_tensors

    def as_sequence(rows):
        return None if rows is None else rows.reshape(1, -1, rows.shape[-1])

    output = as_sequence(hy)
    states = cy.unsqueeze(-2) if TRAITS[ctx.cell]["states"] > 1 else hy.new_empty(*hy.shape[:-1], 0, hy.shape[-1])
    made = [each.reshape(1, output.shape[1], 1, *each.shape[-2:]) for each in (saved, states)]
    held = [*[None] * 4, output, *made, *map(as_sequence, tensors[:3]), None, None, *tensors[3:], None]
    kept = SimpleNamespace(cell=ctx.cell, batch_first=False, saved_tensors=held, maybe_clear_saved_tensors=lambda: None)
    grads = _of_results(ctx.cell, None, as_sequence(grad_hy), as_sequence(grad_cy))
    found = _gradients(kept, grads, [*wanted[:3], False, False, *wanted[3:], False])
    own = [*found[:3], *found[GIVEN : GIVEN + 4]]
    return [None if grad is None else grad.reshape(tensor.shape) for grad, tensor in zip(own, tensors)]


# torch.compile forgets, of an autograd.Function, to notice that what it saved was edited in place; of an operator it does not.
@torch.library.custom_op("fusedrnn::layer", mutates_args=())
def _compiled(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, reset_hx: Tensor | None, reset_cx: Tensor | None,
              weights: Sequence[Tensor], directions: int, ragged: Tensor | None, batch_first: bool, reset: Tensor | None,
              zoneout: Tensor | None, hidden_mask: Tensor | None, save: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All five results of the recurrence's operator, for a layer with the weights that there are, direction after direction."""
    carry = (reset, zoneout, hidden_mask, reset_hx, reset_cx)
    return forward(cell, ragged, batch_first, carry, input, hx, cx, with_gaps(weights, directions), save)


_compiled.register_fake(_compiled._init_fn)  # the shapes of what it calls


def _keep_for_compiled(ctx, inputs, output):
    cell, *given, weights, directions, ragged, batch_first, reset, zoneout, hidden_mask, _save = inputs
    Layer.keep(ctx, cell, ragged, batch_first, (reset, zoneout, hidden_mask), [*given, *with_gaps(weights, directions)], output)


def _backward_of_compiled(ctx, grad_output, grad_hy, grad_cy, _grad_saved, grad_states):
    present = [tensor is not None for tensor in ctx.saved_tensors[FIRST_WEIGHT:]]
    needed = iter(ctx.needs_input_grad[1 + GIVEN])
    wanted = [*ctx.needs_input_grad[1 : 1 + GIVEN], *(there and next(needed) for there in present)]
    found = _gradients(ctx, _of_results(ctx.cell, grad_output, grad_hy, grad_cy, grad_states), wanted)
    weights = [grad for grad, there in zip(found[GIVEN:], present) if there]
    return None, *found[:GIVEN], weights, None, None, None, None, None, None, None


_compiled.register_autograd(_backward_of_compiled, setup_context=_keep_for_compiled)


class TransformedLayer(Layer):
    """`Layer` for the transforms of torch.func, whose backward can have no tensors but inputs and outputs of forward.

    So what it needs besides is two more outputs.
    """

    @staticmethod
    def forward(cell, ragged, batch_first, *tensors):  # type: ignore[override]
        """Run the layer.

        Args:
            cell, ragged, batch_first, tensors: as in `Layer.forward`.

        Returns:
            all five results of the operator.
        """
        return _forward(cell, ragged, batch_first, NO_CARRY[:3], tensors, SAVE_ALL)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        """Keep what backward needs.

        Args:
            ctx: autograd's.
            inputs, outputs: of forward.
        """
        cell, ragged, batch_first, *tensors = inputs
        ctx.mark_non_differentiable(*outputs[3:])
        Layer.keep(ctx, cell, ragged, batch_first, NO_CARRY[:3], tensors, outputs)

    @staticmethod
    def backward(ctx, *grads):
        """Compute the gradients of all arguments of forward.

        Args:
            ctx: as forward left it.
            grads: of its results, None where there is none.

        Returns:
            a gradient for each argument, None where none is wanted.
        """
        return None, None, None, *_gradients(ctx, _of_results(ctx.cell, *grads[:3]), ctx.needs_input_grad[3:])

    @staticmethod
    def vmap(info, in_dims, cell, ragged, batch_first, *tensors):
        """Many calls at once: as one with a larger batch, or, if they have weights of their own, one after the other.

        Args:
            info: torch.vmap's.
            in_dims: for each argument the dimension that counts the calls, None if it is the same for all.
            cell, ragged, batch_first, tensors: as in `Layer.forward`.

        Returns:
            the results, and where their calls are counted.
        """
        size, dims = info.batch_size, in_dims[3:]
        if size == 0:
            return _none_of(in_dims, TransformedLayer.apply, cell, ragged, batch_first, *tensors)
        if any(dim is not None for dim in dims[3:]):
            return _one_by_one(size, in_dims, TransformedLayer.apply, cell, ragged, batch_first, *tensors)
        packed = tensors[0].dim() - (dims[0] is not None) == 2
        at = 0 if packed else 1  # of the batch in what has rows of the sequence
        ins = (0 if packed or batch_first else 1, 1, _inner_at(cell))
        folded = [_fold(*each, size) for each in zip(tensors, dims, ins)]
        ragged = _fold_ragged(ragged, in_dims[1], packed, size)
        results = TransformedLayer.apply(cell, ragged, batch_first, *folded, *tensors[3:])
        outs = (at, 1, _inner_at(cell), at, at)
        return _unfold_all(results, outs, size)


class LayerGradients(torch.autograd.Function):
    """The gradients of a layer as a function of their own, which can be differentiated and taken many at once."""

    @staticmethod
    def forward(cell, batch_first, chosen, grad_output, grad_hy, grad_cy, grad_states, *saved):
        """Run the layer's backward pass.

        Args:
            cell, batch_first: as in `layer`.
            chosen: whose gradients are asked for, as a set of places in the tensors of `Layer.forward`.
            grad_output, grad_hy, grad_cy, grad_states: gradients of the layer's results, None where there is none.
            saved: what `Layer.keep` saved.

        Returns:
            these gradients.
        """
        wanted = [i in chosen for i in range(len(saved) - FIRST_TENSOR)]
        kept = SimpleNamespace(cell=cell, batch_first=batch_first, saved_tensors=saved, maybe_clear_saved_tensors=lambda: None)
        grads = (grad_output, grad_hy, grad_cy, grad_states)
        return tuple(grad for grad in backward(kept, grads, wanted) if grad is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep what the second derivative needs.

        Args:
            ctx: autograd's.
            inputs, output: of forward.
        """
        ctx.cell, ctx.batch_first, ctx.chosen, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        """Differentiate the reference's gradients.

        Args:
            ctx: as forward left it.
            grads: gradients of the gradients that it returned.

        Returns:
            a gradient for each argument of forward, None where none is wanted.
        """
        everything = ctx.saved_tensors
        outer, saved = everything[:4], everything[4:]
        ragged, masks, tensors = saved[0], saved[1:4], saved[FIRST_TENSOR:]
        arguments = [*outer, *tensors]
        needed = [*ctx.needs_input_grad[3:7], *ctx.needs_input_grad[7 + FIRST_TENSOR :]]
        variables = [i for i, need in enumerate(needed) if need]
        given = [k for k, grad in enumerate(grads) if grad is not None]
        wanted = [i in ctx.chosen for i in range(len(tensors))]
        found = [None] * len(arguments)
        if given and variables:

            def gradients(*primals):
                inputs = list(arguments)
                for i, primal in zip(variables, primals):
                    inputs[i] = primal
                all_of_them = _reference_gradients(ctx.cell, ragged, ctx.batch_first, masks, wanted, inputs[:4], inputs[4:])
                some = [grad for grad in all_of_them if grad is not None]
                return tuple(some[k] for k in given)

            _, pullback = torch.func.vjp(gradients, *(arguments[i] for i in variables))  # type: ignore[misc]
            for i, grad in zip(variables, pullback(tuple(grads[k] for k in given))):
                found[i] = grad
        return None, None, None, *found[:4], *[None] * FIRST_TENSOR, *found[4:]

    @staticmethod
    def vmap(info, in_dims, cell, batch_first, chosen, *tensors):
        """Many backward passes: as one with a larger batch; one after the other if there are gradients of weights, which are sums
        over the batch.

        Args:
            info, in_dims: as in `TransformedLayer.vmap`.
            cell, batch_first, chosen, tensors: as in `forward`.

        Returns:
            the results, and where their calls are counted.
        """
        size, dims = info.batch_size, in_dims[3:]
        if size == 0:
            return _none_of(in_dims, LayerGradients.apply, cell, batch_first, chosen, *tensors)
        first, end = 4 + FIRST_TENSOR, 4 + FIRST_TENSOR + 3  # input, hx and cx; what is behind them is no batch's, or a reset's
        if max(chosen) >= 3 or any(dim is not None for dim in dims[end:]) or any(part is not None for part in tensors[5:8]):
            return _one_by_one(size, in_dims, LayerGradients.apply, cell, batch_first, chosen, *tensors)
        packed = tensors[first].dim() - (dims[first] is not None) == 2
        at = 0 if packed else 1
        input_at = 0 if packed or batch_first else 1
        inner_at = _inner_at(cell)
        places = (at, 1, inner_at, at, None, None, None, None, at, at, at, input_at, 1, inner_at)
        folded = [tensor if place is None else _fold(tensor, dim, place, size)
                  for tensor, dim, place in zip(tensors, dims, places)]
        folded[4] = _fold_ragged(tensors[4], dims[4], packed, size)
        results = LayerGradients.apply(cell, batch_first, chosen, *folded, *tensors[end:])
        outs = [place for i, place in enumerate((input_at, 1, inner_at)) if i in chosen]
        return _unfold_all(results, outs, size)


def _inner_at(cell):
    """Where the batch is in a cell's initial inner states; None if it has none."""
    states = TRAITS[cell]["states"]
    return None if states == 1 else 1 if states == 2 else 2


def _fold(tensor, dim, at, size):
    """A tensor of many calls as one of a larger batch: dimension `at`, the batch, times `size`, the calls, counted by `dim`."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(at + 1).expand(*tensor.shape[: at + 1], size, *tensor.shape[at + 1 :])
    else:
        tensor = tensor.movedim(dim, at + 1)
    return tensor.flatten(at, at + 1)


def _fold_ragged(ragged, dim, packed, size):
    """batch_sizes, which grow, or lengths, which are repeated, as `_fold` does it."""
    if ragged is None:
        return None
    return ragged * size if packed else _fold(ragged, dim, 0, size)


def _unfold_all(results, places, size):
    """The reverse of `_fold` for results whose batch is in these places, None where there is none; and where calls are counted."""
    found = [result if at is None else result.unflatten(at, (result.shape[at] // size, size))
             for result, at in zip(results, places)]
    return tuple(found), tuple(None if at is None else at + 1 for at in places)


def _one_by_one(size, in_dims, call, *args):
    """The results of each call, stacked, and where they are counted."""
    each = []
    for n in range(size):
        one = [arg if dim is None else arg.select(dim, n) for arg, dim in zip(args, in_dims)]
        each.append(call(*one))
    results = tuple(torch.stack(parts) for parts in zip(*each))
    return results, (0,) * len(results)


def _none_of(in_dims, call, *args):
    """The results of no call at all, by the shapes of one."""
    one = [arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:]) for arg, dim in zip(args, in_dims)]
    results = tuple(result.new_empty(0, *result.shape) for result in call(*one))
    return results, (0,) * len(results)


def _reference_gradients(cell, ragged, batch_first, masks, wanted, grads, tensors):
    """What `fusedrnn.layer.backward` computes, by the reference in plain torch, which every transform can take.

    Args:
        cell, ragged, batch_first, wanted: as there.
        masks, tensors: as in `Layer.forward`.
        grads: of output, hy, cy and the operator's states, None for zeros.

    Returns:
        a list of gradients, None where not wanted.
    """
    chosen = [i for i, want in enumerate(wanted) if want]
    given = [k for k, grad in enumerate(grads) if grad is not None]
    inner = TRAITS[cell]["states"] - 1

    def run(*primals):
        inputs = list(tensors)
        for i, primal in zip(chosen, primals):
            inputs[i] = primal
        input, hx, cx, *begun = inputs[:GIVEN]
        outputs = reference.layer(cell, input, hx, cx, by_direction(inputs[GIVEN:]), ragged, batch_first, Carry(*masks, *begun))
        return tuple(outputs[k] for k in given)

    _, pullback = torch.func.vjp(run, *(tensors[i] for i in chosen))  # type: ignore[misc]
    found = iter(pullback(tuple(grads[k][..., :inner, :] if k == 3 else grads[k] for k in given)))
    return [next(found) if want else None for want in wanted]


def input_product(input: Tensor, weight: Tensor) -> Tensor:
    """Run torch.nn.functional.linear, by the library that is the faster one, which `fusedrnn.layer.input_product` knows.

    Args:
        input: (..., I).
        weight: (G*H, I).

    Returns:
        (..., G*H).
    """
    if is_compiling() or _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return linear(input, weight)
    return InputProduct.apply(input, weight) if torch.is_grad_enabled() else plain_product(input, weight)


class InputProduct(torch.autograd.Function):
    """`input_product` for autograd where no transform is present."""

    @staticmethod
    def forward(ctx, input, weight):
        """Multiply, and keep both.

        Args:
            ctx: autograd's.
            input, weight: as in `input_product`.

        Returns:
            what it returns.
        """
        ctx.save_for_backward(input, weight)
        return plain_product(input, weight)

    @staticmethod
    def backward(ctx, grad):
        """Compute the gradients of both.

        Args:
            ctx: as forward left it.
            grad: (..., G*H).

        Returns:
            a gradient for each, None where none is wanted.
        """
        input, weight = ctx.saved_tensors
        want_input, want_weight = ctx.needs_input_grad
        differs = torch.is_grad_enabled() or _are_functorch_transforms_active() or _are_transformed([grad])
        product, sums = (linear, lambda a, b: a.t() @ b) if differs else (plain_product, sum_of_rows)
        rows, grads = (each.reshape(-1, each.shape[-1]) for each in (input, grad))
        return product(grad, weight.t()) if want_input else None, sums(grads, rows) if want_weight else None
