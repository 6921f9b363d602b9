"""The derivatives of a layer, for autograd and for the transforms of torch.func.

The engine computes the first (`fusedrnn/layer.py`). A batch of calls, as torch.vmap makes it, is folded into the engine's batch. Second
derivatives run through `fusedrnn.reference`, in plain torch.
"""

from types import SimpleNamespace

import torch
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from . import reference
from .layer import FIRST_TENSOR, GIVEN, backward, by_direction, forward, sum_of_rows
from .layer import input_product as plain_product
from .ops import SAVE_ALL, SAVE_STATES, TRAITS
from .reference import NO_CARRY, Carry


def saved_for_backward(cell, recompute):
    """Say what the operator is to save.

    Args:
        cell, recompute: as in `fusedrnn.autograd.layer`.

    Returns:
        its argument; a cell that needs nothing but states has nothing to make again.
    """
    return SAVE_STATES if recompute and TRAITS[cell]["saved"] else SAVE_ALL


def needs_grad(tensors):
    """Say whether a call is to be differentiated.

    Args:
        tensors: of the call, None among them.

    Returns:
        True if so.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class Layer(torch.autograd.Function):
    """`fusedrnn.autograd.layer` for autograd where no transform is present."""

    @staticmethod
    def forward(ctx, cell, ragged, batch_first, masks, recompute, return_states, *tensors):
        """Run the layer and keep what backward needs.

        Args:
            ctx: autograd's.
            cell, ragged, batch_first, recompute, return_states: as in `fusedrnn.autograd.layer`.
            masks: the first three of `Carry`.
            tensors: input, hx, cx, the last two of `Carry`, and the weights of all directions, one after the other.

        Returns:
            output, hy, cy, and the operator's states if they are wanted.
        """
        outputs = _forward(cell, ragged, batch_first, masks, tensors, saved_for_backward(cell, recompute))
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
        return None, None, None, None, None, None, *gradients(ctx, grads, ctx.needs_input_grad[6:])


def _forward(cell, ragged, batch_first, masks, tensors, save):
    """`fusedrnn.layer.forward` of what `Layer.forward` takes."""
    input, hx, cx, *begun = tensors[:GIVEN]
    return forward(cell, ragged, batch_first, (*masks, *begun), input, hx, cx, tensors[GIVEN:], save)


def of_results(cell, grad_output, grad_hy, grad_cy, grad_states=None):
    """Choose those of the results that a cell has: there may be one for the empty tensor that stands for another.

    Args:
        cell: as in `fusedrnn.autograd.layer`.
        grad_output, grad_hy, grad_cy, grad_states: gradients of the operator's results but saved.

    Returns:
        all four, None where there is no such result.
    """
    inner = TRAITS[cell]["states"] > 1
    return grad_output, grad_hy, grad_cy if inner else None, grad_states if inner else None


def _are_transformed(grads):
    """Whether it is forward mode over reverse mode, or is_grads_batched."""
    return forward_ad._current_level >= 0 or any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads)


def go_further(grads):
    """Say whether gradients are to be differentiated or transformed in turn, for which the engine's own are not enough.

    Args:
        grads: of results, None where there is none.

    Returns:
        True if so.
    """
    return torch.is_grad_enabled() or _are_functorch_transforms_active() or _are_transformed(grads)


def gradients(ctx, grads, wanted, run=backward):
    """Run `fusedrnn.layer.backward`, in a form that can be differentiated and transformed where that will happen.

    Args:
        ctx, grads, wanted: kept, grads and wanted as there.
        run: what to run where it will not.

    Returns:
        what it returns.
    """
    if all(grad is None for grad in grads):
        return [None] * len(wanted)
    if _are_transformed(grads):
        everything = ctx.saved_tensors
        ragged, *masks = everything[:4]
        tensors = everything[FIRST_TENSOR:]
        return _reference_gradients(ctx.cell, ragged, ctx.batch_first, masks, wanted, grads, tensors)
    if go_further(grads):
        chosen = frozenset(i for i, want in enumerate(wanted) if want)
        some = iter(LayerGradients.apply(ctx.cell, ctx.batch_first, chosen, *grads, *ctx.saved_tensors))
        return [next(some) if want else None for want in wanted]
    return run(ctx, grads, wanted)


# Function.apply inspects the signature of forward at every call, which takes longer than a small layer does, for the sake of
# default arguments and of transforms. Neither is present where this is called.
apply_layer = super(torch.autograd.Function, Layer).apply


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
        return None, None, None, *gradients(ctx, of_results(ctx.cell, *grads[:3]), ctx.needs_input_grad[3:])

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


def kept_by_others(cell, batch_first, saved):
    """Make of tensors what `fusedrnn.layer.backward` takes as kept, where others hold them, too.

    Args:
        cell, batch_first: as in `fusedrnn.autograd.layer`.
        saved: what `Layer.keep` saved.

    Returns:
        an object that lets go of nothing.
    """
    return SimpleNamespace(cell=cell, batch_first=batch_first, saved_tensors=saved, maybe_clear_saved_tensors=lambda: None)


class LayerGradients(torch.autograd.Function):
    """The gradients of a layer as a function of their own, which can be differentiated and taken many at once."""

    @staticmethod
    def forward(cell, batch_first, chosen, grad_output, grad_hy, grad_cy, grad_states, *saved):
        """Run the layer's backward pass.

        Args:
            cell, batch_first: as in `fusedrnn.autograd.layer`.
            chosen: whose gradients are asked for, as a set of places in the tensors of `Layer.forward`.
            grad_output, grad_hy, grad_cy, grad_states: gradients of the layer's results, None where there is none.
            saved: what `Layer.keep` saved.

        Returns:
            these gradients.
        """
        wanted = [i in chosen for i in range(len(saved) - FIRST_TENSOR)]
        kept = kept_by_others(cell, batch_first, saved)
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

            def chosen_gradients(*primals):
                inputs = list(arguments)
                for i, primal in zip(variables, primals):
                    inputs[i] = primal
                all_of_them = _reference_gradients(ctx.cell, ragged, ctx.batch_first, masks, wanted, inputs[:4], inputs[4:])
                some = [grad for grad in all_of_them if grad is not None]
                return tuple(some[k] for k in given)

            _, pullback = torch.func.vjp(chosen_gradients, *(arguments[i] for i in variables))  # type: ignore[misc]
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
        product, sums = (linear, lambda a, b: a.t() @ b) if go_further([grad]) else (plain_product, sum_of_rows)
        rows, grads = (each.reshape(-1, each.shape[-1]) for each in (input, grad))
        return product(grad, weight.t()) if want_input else None, sums(grads, rows) if want_weight else None
