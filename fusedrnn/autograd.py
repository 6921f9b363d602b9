"""One layer, differentiable: for autograd, for torch.compile, and for torch.func.

The engine computes the layer and its first derivatives (`fusedrnn/layer.py`, `derivatives.py`). Forward mode, and what transforms of
torch.func cannot have of the engine, run through `fusedrnn.reference`, in plain torch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.nn.functional import linear

from . import onnx, reference, select
from .derivatives import (InputProduct, Layer, TransformedLayer, apply_layer, gradients, kept_by_others, needs_grad, of_results,
                          saved_for_backward)
from .layer import FIRST_WEIGHT, GIVEN, MANY_ROWS, OUTPUT, backward, forward, is_for_one_step, is_watched, with_gaps
from .layer import input_product as plain_product
from .one_step import step
from .ops import SAVE_NOTHING, SAVE_STATES, TRAITS
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
        if is_exporting() or not needs_grad(tensors):  # an exported program is to be run, and not to be trained
            save = SAVE_STATES if return_states else SAVE_NOTHING
            output, hy, cy, _, states = forward(cell, ragged, batch_first, carry, input, hx, cx, tensors[GIVEN:], save)
        else:
            there = [tensor for tensor in tensors[GIVEN:] if tensor is not None]
            save = saved_for_backward(cell, recompute)
            output, hy, cy, _, states = _compiled(cell, *tensors[:GIVEN], there, len(weights), ragged, batch_first, *masks, save)
    elif _are_functorch_transforms_active():
        if carry is not NO_CARRY or return_states:
            select.warn_once(f"fusedrnn's {cell}", "its reference in plain torch", "torch.func's transforms of the engine take no "
                             "resets, zoneout and recurrent dropout, and give no states of every step")
            return reference.layer(cell, input, hx, cx, weights, ragged, batch_first, carry)
        output, hy, cy, _, states = TransformedLayer.apply(cell, ragged, batch_first, *tensors)
    elif _is_one_step(cell, input, weights, ragged, batch_first, carry, recompute or return_states):
        output, hy, *inner_states = step(cell, [*tensors[:3], *weights[0][:4]])
        return output, hy, inner_states[0] if inner else None, None
    elif needs_grad(tensors):
        output, hy, cy, states = apply_layer(cell, ragged, batch_first, masks, recompute, return_states, *tensors)
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
    if input.numel() > MANY_ROWS * input.shape[-1] and needs_grad(tensors):
        return None  # the gradients of weights may be a library's
    return step(cell, tensors)


def _is_one_step(cell, input, weights, ragged, batch_first, carry, wants_more):
    """Whether a layer's call is one step of nothing but what a cell of torch.nn's has, in one direction, so that `cell_forward` takes it."""
    if input.dim() != 3 or input.shape[1 if batch_first else 0] != 1 or type(input) is not Tensor or not input.is_cpu:
        return False
    w_ih, w_hh, *_, w_hr = weights[0]
    if len(weights) > 1 or w_hr is not None or carry is not NO_CARRY or ragged is not None or wants_more or not w_ih.shape[0]:
        return False
    traits = TRAITS[cell]
    if not traits["multiplies"] or traits["norms"] or traits["late"] or traits["states"] > 2 or is_watched():
        return False
    if input.shape[-1] == 0 or input.numel() > MANY_ROWS * input.shape[-1]:
        return False
    return is_for_one_step(input, w_ih, w_hh.shape[0] // traits["gates"])


# torch.compile forgets, of an autograd.Function, to notice that what it saved was edited in place; of an operator it does not.
@torch.library.custom_op("fusedrnn::layer", mutates_args=())
def _compiled(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, reset_hx: Tensor | None, reset_cx: Tensor | None,
              weights: Sequence[Tensor], directions: int, ragged: Tensor | None, batch_first: bool, reset: Tensor | None,
              zoneout: Tensor | None, hidden_mask: Tensor | None, save: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All five results of the recurrence's operator, for a layer with the weights that there are, direction after direction."""
    carry = (reset, zoneout, hidden_mask, reset_hx, reset_cx)
    return forward(cell, ragged, batch_first, carry, input, hx, cx, with_gaps(weights, directions), save)


_compiled.register_fake(_compiled._init_fn)  # the shapes of what it calls


# An operator as well: as calls of its own, a compiler would give the products of backward to the slower library.
@torch.library.custom_op("fusedrnn::layer_backward", mutates_args=())
def _compiled_backward(cell: str, batch_first: bool, grads: Sequence[Tensor | None], saved: Sequence[Tensor | None],
                       wanted: Sequence[bool]) -> list[Tensor]:
    """The gradients that are wanted of what `Layer.keep` saved."""
    device = saved[OUTPUT].device.type  # type: ignore[union-attr]
    usual = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with usual:  # autocast may be at work where backward is called
        found = backward(kept_by_others(cell, batch_first, saved), grads, wanted)
    return [grad for grad in found if grad is not None]


_compiled_backward.register_fake(_compiled_backward._init_fn)


def _run_compiled_backward(kept, grads, wanted):
    """`fusedrnn.layer.backward` by that operator."""
    found = iter(_compiled_backward(kept.cell, kept.batch_first, list(grads), list(kept.saved_tensors), list(wanted)))
    return [next(found) if want else None for want in wanted]


def _keep_for_compiled(ctx, inputs, output):
    cell, *given, weights, directions, ragged, batch_first, reset, zoneout, hidden_mask, _save = inputs
    Layer.keep(ctx, cell, ragged, batch_first, (reset, zoneout, hidden_mask), [*given, *with_gaps(weights, directions)], output)


def _backward_of_compiled(ctx, grad_output, grad_hy, grad_cy, _grad_saved, grad_states):
    present = [tensor is not None for tensor in ctx.saved_tensors[FIRST_WEIGHT:]]
    needed = iter(ctx.needs_input_grad[1 + GIVEN])
    wanted = [*ctx.needs_input_grad[1 : 1 + GIVEN], *(there and next(needed) for there in present)]
    found = gradients(ctx, of_results(ctx.cell, grad_output, grad_hy, grad_cy, grad_states), wanted, _run_compiled_backward)
    weights = [grad for grad, there in zip(found[GIVEN:], present) if there]
    return None, *found[:GIVEN], weights, None, None, None, None, None, None, None


_compiled.register_autograd(_backward_of_compiled, setup_context=_keep_for_compiled)


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
