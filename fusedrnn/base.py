"""What the layers share: a call, from torch's arguments to the engine's and back.

Construction, parameters, state and most helper methods are torch.nn.RNNBase's. The layers derive from it and not from
torch.nn.LSTM and its kin, because torch.compile refuses instances of those. What is not the engine's business stays
torch's: a call that the engine does not take, a malformed one included, runs through the stock class's own `forward`,
so that it is served, or refused, exactly as there. The layers themselves are in modules.py and newer.py.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn import Parameter, RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import functional, onnx, options, select, shared
from .reference import with_heads

Sequence = TypeVar("Sequence", Tensor, PackedSequence, Tensor | PackedSequence)  # the output is what the input is
Pair = tuple[Tensor, Tensor]
EveryState = tuple[Tensor, ...]  # of each layer, after each step

CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


class FusedLayer(RNNBase):
    """What the layers share. Not for direct use."""

    # Their constructors take (*args, **kwargs) for the sake of the words of torch's TypeErrors. The signatures that they
    # show serve torch.nn.utils.skip_init too, which refuses a class without a `device`.

    stock: type[RNNBase]  # the torch.nn class that this one stands for, or `shared.Unstocked`
    _who: str  # in messages
    _takes: tuple[str, ...]  # the names of what the constructor takes and torch's does not, in the order of repr
    _inner = 0  # how many states there are besides h

    # What torch.nn has not, as attributes, which a layer that was torch.nn's has as well; see `RNN` and the other classes.
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    save: Literal["all", "states"] = "all"
    num_heads: int = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give each of our classes a forward that goes by its name, as Python's TypeErrors tell it to the caller."""
        super().__init_subclass__(**kwargs)
        if "forward" not in vars(cls) and cls.__module__.startswith("fusedrnn."):
            cls.forward = shared.renamed(cls.forward, f"{cls.__qualname__}.forward")  # type: ignore[arg-type]

    def _take_options(self, kwargs: dict[str, Any]) -> None:
        """Set those of the arguments, and take them out of kwargs. Called before there are parameters."""
        for name in self._takes:
            if name in kwargs:
                setattr(self, name, options.checked(self._who, name, kwargs.pop(name)))

    def _take_form(self) -> None:
        """Give the parameters, which are as torch has them so far, the shapes and names that the options ask for."""
        form, H, N, there = self.form(), self.hidden_size, self.num_heads, dict(self.named_parameters())
        if self.proj_size and form:
            names = ", ".join(form)
            raise ValueError(f"{self._who}: {names} and projections do not go together, got proj_size={self.proj_size}")
        if H % N:
            raise ValueError(f"{self._who}: num_heads must divide hidden_size, which is {H}, got {N}")
        shapes: dict[str, tuple[int, ...]] = {}
        for names in self._all_weights:
            own = self._own_shapes(names[0].removeprefix("weight_ih"))
            names += [name for name in own if name not in names]
            shapes.update({name: own.get(name) or tuple(there[name].shape) for name in names})
        if all(name in there and shape == there[name].shape for name, shape in shapes.items()):
            return
        like = there["weight_ih_l0"]
        self._flat_weights_names = []  # of which torch takes notes when one is set
        for name, shape in shapes.items():
            self._parameters.pop(name, None)
            self.register_parameter(name, Parameter(like.new_empty(shape)))
        self._flat_weights_names = list(shapes)
        self._init_flat_weights()
        self.reset_parameters()

    def _own_shapes(self, suffix: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a direction's weights that may be others than torch's; suffix: "_l0" and so on."""
        H, N = self.hidden_size, self.num_heads
        rows = (3 if self.mode == "GRU" else 4) * H
        return {} if N == 1 else {f"weight_hh{suffix}": (rows, H // N)}

    def _cell(self) -> str:
        """The engine's name of the cell."""
        return CELL_OF_MODE[self.mode]

    def extra_repr(self) -> str:
        """What differs from torch's defaults, and from ours.

        Returns:
            words for `repr`.
        """
        own = [f", {name}={value!r}" for name in self._takes if (value := getattr(self, name)) != getattr(type(self), name)]
        return super().extra_repr() + "".join(own)

    def extras(self) -> list[str]:
        """Names of the options at work without which torch.nn's layer would give other numbers.

        Returns:
            some of zoneout, recurrent_dropout and weight_dropout, and those of `form`.
        """
        return [name for name in options.RATES if getattr(self, name) not in (0, (0, 0))] + self.form()

    def form(self) -> list[str]:
        """Names of the options at work that make another cell of it, in training or not.

        Returns:
            some of `fusedrnn.options.FORM`.
        """
        return [name for name, usual in options.FORM.items() if name in self._takes and getattr(self, name) != usual]

    def _options(self, data: Any, packed: bool, reset: Any, return_states: bool, begun: tuple[Any, ...]) -> functional.Options:
        who, extras = self._who, self.extras()
        if self.proj_size and ("zoneout" in extras or "recurrent_dropout" in extras):
            raise ValueError(f"{who}: zoneout and recurrent_dropout do not go with projections, got proj_size={self.proj_size}")
        if packed and (reset is not None or return_states or self.save != "all"):
            raise ValueError(f"{who}: reset, return_states and save='states' are for padded input, got a PackedSequence; "
                             "lengths tells the lengths of padded sequences")
        if reset is not None:
            shape = data.shape[:-1]
            if not isinstance(reset, Tensor) or reset.dtype != torch.bool or reset.shape != shape:
                got = f"{tuple(reset.shape)} of {reset.dtype}" if isinstance(reset, Tensor) else type(reset).__name__
                raise ValueError(f"{who}: reset must be a tensor of shape {tuple(shape)} of torch.bool, got {got}")
            reset = reset.to(data.device)
            reset = reset.unsqueeze(1) if data.dim() == 2 else reset.t().contiguous() if self.batch_first else reset
        both = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        zoneout = both if self._inner == 1 else both[:1]
        return functional.Options(reset, zoneout, self.recurrent_dropout, self.weight_dropout, self.save == "states",
                                  return_states, *_h_and_c(begun if data.dim() == 3 else tuple(state.unsqueeze(-2) for state in begun)))

    def _call(self, input: Any, hx: Any, lengths: Any = None, reset: Any = None, return_states: bool = False,
              reset_to: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
            onnx.refuse_packed()
        else:
            data, batch_sizes = input, None
        ragged = batch_sizes if lengths is None else self._checked_lengths(lengths, data, packed)
        states = self._split_states(hx)
        weights = shared.weights_by_name(self, self._flat_weights_names)
        begun = () if reset_to is None else self._checked_reset_to(reset_to, reset, data, packed)
        given = states + begun

        cell, run, more = with_heads(self._cell(), self.num_heads), functional.stack, functional.PLAIN
        plain = reset is None and not return_states and not (
            self.zoneout or self.recurrent_dropout or self.weight_dropout) and self.save == "all"
        if not select.is_ordinary(data, given, weights):
            if isinstance(input, Proxy) or any(isinstance(state, Proxy) for state in states):
                others = {"lengths": lengths, "reset": reset, "return_states": return_states, "reset_to": reset_to}
                return shared.record_as_leaf(self, input, hx, **{k: v for k, v in others.items() if v is not None and v is not False})
            reason = select.reason_for_fallback(data, given, weights)
            if reason is not None:
                return self._run_stock(input, hx, ragged, reason, self._own(reset, return_states))
            onednn = self.mode == "LSTM" and not packed and not self.proj_size
            dtype = select.autocast_dtype(cell, data, states[0] if states else None, onednn)
            if dtype is not None:
                run = partial(functional.stack_cast, dtype)
        if not self._fits(data, states, batch_sizes):
            return self._run_stock(input, hx, ragged, select.MISFIT, self._own(reset, return_states))
        if not plain:
            more = self._options(data, packed, reset, return_states, begun)
        h, c = _h_and_c(states)

        batched = packed or data.dim() == 3
        if not batched:
            data = data.unsqueeze(1)
            h = h if h is None else h.unsqueeze(-2)
            c = c if c is None else c.unsqueeze(-2)
        elif packed and sorted_indices is not None:
            h = h if h is None else h.index_select(-2, sorted_indices)
            c = c if c is None else c.index_select(-2, sorted_indices)

        batch_first = self.batch_first and batched and not packed
        output, hy, cy, every = run(
            cell, data, h, c, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            batch_first, ragged, more,
        )

        if not batched:
            output, hy = output.squeeze(1), hy.squeeze(-2)
            cy = cy if cy is None else cy.squeeze(-2)
        elif packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                hy = hy.index_select(-2, unsorted_indices)
                cy = cy if cy is None else cy.index_select(-2, unsorted_indices)
        hidden = hy if cy is None else (hy, cy) if self._inner == 1 else (hy, *cy.unbind(0))
        if every is None:
            return output, hidden
        kinds = [tuple(state if batched and not batch_first else state.transpose(0, 1) if batched else state.squeeze(1)
                       for state in each if state is not None) for each in zip(*every)]
        return output, hidden, tuple(kinds) if cy is not None else kinds[0]

    def _run_stock(self, input: Any, hx: Any, ragged: Any, reason: str, own: list[str]) -> Any:
        stocked = self.stock is not shared.Unstocked
        if stocked and not own and (ragged is None or isinstance(input, PackedSequence)):
            return shared.run_stock(self, input, hx, reason)
        if reason == select.MISFIT:  # somebody is to say what does not fit
            (shared.Unstocked if self.form() else self.stock).forward(self, input, hx)
        if own or not stocked:
            what = f"{', '.join(own)}: for" if own else "torch.nn has none, and it is for"
            raise RuntimeError(f"{self._who}: {what} the fused engine alone, which does not take this call because {reason}")
        return shared.run_packed(self, input, hx, ragged)

    def _own(self, reset: Any, return_states: bool) -> list[str]:
        """What of a call torch's layer cannot do."""
        return ["reset"] * (reset is not None) + ["return_states"] * return_states + self.extras()

    def _checked_lengths(self, lengths: Any, data: Any, packed: bool) -> Tensor:
        """As the engine takes them. Their values are the operator's business."""
        if isinstance(data, Proxy) or isinstance(lengths, Proxy):  # to be recorded
            return lengths
        who = self._who
        if packed or data.dim() != 3:
            got = "a PackedSequence" if packed else f"{data.dim()} dimensions"
            raise ValueError(f"{who}: lengths are for padded input of 3 dimensions, got {got}")
        if not isinstance(lengths, Tensor):
            raise TypeError(f"{who}: lengths must be a tensor of integers, got {type(lengths).__name__}")
        batch = data.shape[0 if self.batch_first else 1]
        if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
            raise TypeError(f"{who}: lengths must be a tensor of integers, got {lengths.dtype}")
        if lengths.dim() != 1 or lengths.shape[0] != batch:
            raise ValueError(f"{who}: lengths must be of shape ({batch},), got {tuple(lengths.shape)}")
        return lengths.to(torch.int64) if lengths.is_meta else lengths.to(data.device, torch.int64)

    def _checked_reset_to(self, reset_to: Any, reset: Any, data: Any, packed: bool) -> tuple[Any, ...]:
        """As `_split_states` has them; nothing of calls that are refused for the sake of others, or recorded."""
        who, states = self._who, tuple(self._split_states(reset_to))
        if reset is None:
            raise ValueError(f"{who}: reset_to is for calls with reset, which says where the states become these, got reset=None")
        if packed or not isinstance(data, Tensor):
            return ()
        names = ("h", "c", "n", "m")[: 1 + self._inner]
        what = f"a tuple of tensors ({', '.join(names)})" if self._inner else "a tensor"
        if len(states) != len(names) or not all(isinstance(state, Tensor) for state in states):
            of = f" of {', '.join(type(state).__name__ for state in reset_to)}" if isinstance(reset_to, (tuple, list)) else ""
            raise TypeError(f"{who}: reset_to must be {what} or None, got {type(reset_to).__name__}{of}")
        batch = () if data.dim() != 3 else (data.shape[0 if self.batch_first else 1],)
        for name, state, width in zip(names, states, (self.proj_size or self.hidden_size, *(self.hidden_size,) * 3)):
            expected = (self.num_layers * (2 if self.bidirectional else 1), *batch, width)
            if tuple(state.shape) != expected or state.device != data.device:
                raise ValueError(f"{who}: {name} of reset_to must be of shape {expected} on {data.device}, like that of hx, "
                                 f"got {tuple(state.shape)} on {state.device}")
        return states

    def _split_states(self, hx: Any) -> tuple[Any, ...]:
        """The states that the caller gave; hx alone if it is not as many as there are to be."""
        return () if hx is None else (hx,)

    def _fits(self, data: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None) -> bool:
        """Whether the shapes are those of this module. If not, torch's own check, in the stock forward, says how."""
        shape = data.shape
        if not shape or shape[-1] != self.input_size or self.proj_size and self.mode != "LSTM":
            return False
        if batch_sizes is not None:
            if len(shape) != 2 or not is_compiling() and int(batch_sizes.sum()) != shape[0]:
                return False
            batch = (int(batch_sizes[0]),) if states else ()
        elif len(shape) == 3:
            steps, batch = (shape[1], shape[:1]) if self.batch_first else (shape[0], shape[1:2])
            if steps == 0:
                return False
        elif len(shape) == 2 and shape[0] > 0:
            batch = ()
        else:
            return False
        if not states:
            return True
        if len(states) != 1 + self._inner:
            return False
        rows = self.num_layers * (2 if self.bidirectional else 1)
        if states[0].shape != (rows, *batch, self.proj_size or self.hidden_size):
            return False
        for state in states[1:]:  # a generator would take longer than the comparison
            if state.shape != (rows, *batch, self.hidden_size):
                return False
        return True

    def reason_for_stock(self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, ...] | None = None) -> str | None:
        """Why this call runs on torch's own kernels, or is refused; None if it runs on the engine.

        Args:
            input, hx: as for the call, which is not made.

        Returns:
            words that end "... because <reason>", or None.
        """
        data, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        states = self._split_states(hx)
        reason = select.reason_for_fallback(data, states, shared.weights_by_name(self, self._flat_weights_names))
        return reason or (None if self._fits(data, states, batch_sizes) else select.MISFIT)

    def __prepare_scriptable__(self) -> RNNBase:
        """torch.jit.script gets the stock layer with these very Parameters: it cannot compile this `forward`.

        torch.jit.script also leaves that stock layer in the place of this one in the model it was given.

        Raises:
            RuntimeError: there is no stock layer that computes this.
        """
        if self.stock is shared.Unstocked or self.extras():
            has = ", ".join(self.extras()) or self._who.removeprefix("fusedrnn.")
            raise RuntimeError(f"{self._who}: torch.jit.script compiles torch.nn's layers, and torch.nn has no {has}")
        return shared.as_stock(self)

    # torch keeps weak references to the weights in order to notice that one was replaced, and they forbid to swap the
    # weights (torch.__future__.set_swap_module_params_on_conversion). `_flat_weights` itself tells as much.

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self._flat_weight_refs = []

    def flatten_parameters(self) -> None:
        """Lay the weights out for cuDNN on a CUDA device, as torch does, if they are of a form that cuDNN has."""
        if self.stock is not shared.Unstocked and not self.form():
            super().flatten_parameters()

    def _weights_have_changed(self) -> bool:
        known = zip(self._flat_weights_names, self._flat_weights, strict=True)
        return any(getattr(self, name, None) is not weight for name, weight in known)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flat_weight_refs = []


class OfOneState(FusedLayer):
    """What the layers share whose only state is h. Not for direct use."""

    @overload
    def forward(self, input: Sequence, hx: Tensor | None = None, *, lengths: Tensor | None = None,
                reset: Tensor | None = None, return_states: Literal[False] = False,
                reset_to: Tensor | None = None) -> tuple[Sequence, Tensor]: ...

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None,
                reset: Tensor | None = None, return_states: Literal[True],
                reset_to: Tensor | None = None) -> tuple[Tensor, Tensor, EveryState]: ...

    def forward(self, input: Any, hx: Tensor | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None,
                return_states: bool = False, reset_to: Tensor | None = None) -> Any:
        """Run all layers over a sequence.

        Args:
            input: `(T, B, I)`, `(B, T, I)` if batch_first, `(T, I)` unbatched, or a PackedSequence.
            hx: initial states `(L*D, B, H)`, unbatched `(L*D, H)`, or None for zeros.
            lengths: (B,) integers from 0 to T, the steps that each sequence of a padded input has, in any order; None: all
                have T. Behind its end the output is zero, and its last states are those of its own last step. The input's
                product is taken of all T*B rows: if most are padding, a PackedSequence is faster. On a CUDA device nobody waits
                for their values, and more than T count as T.
            reset: bool, shaped as the input without its features: True where a sequence of its own begins within the row, from
                reset_to, such as an episode's first step. The reverse direction ends its sequences there.
            return_states: return a third result, for inputs that are no PackedSequence.
            reset_to: the states that these sequences begin with, shaped as hx, or None for zeros. Their gradients are sums over
                all resets of a row.

        Returns:
            the output, `(T, B, D*H)` or as the input is laid out, and the last states hy, shaped as hx; if return_states also the
            states after every step, a tuple of one for each layer, each laid out as the output.

        Raises:
            RuntimeError, ValueError: where torch's layer raises them, in its words, if there is one; TypeError, ValueError,
                RuntimeError: arguments that do not fit, or that the engine has no kernel for.
        """
        return self._call(input, hx, lengths, reset, return_states, reset_to)

    if TYPE_CHECKING:  # torch.nn.Module's own takes anything and gives Any
        __call__ = forward


class OfTwoStates(FusedLayer):
    """What the layers share whose states are h and c. Not for direct use."""

    _inner = 1

    @overload
    def forward(self, input: Sequence, hx: Pair | None = None, *, lengths: Tensor | None = None,
                reset: Tensor | None = None, return_states: Literal[False] = False,
                reset_to: Pair | None = None) -> tuple[Sequence, Pair]: ...

    @overload
    def forward(self, input: Tensor, hx: Pair | None = None, *, lengths: Tensor | None = None,
                reset: Tensor | None = None, return_states: Literal[True],
                reset_to: Pair | None = None) -> tuple[Tensor, Pair, tuple[EveryState, EveryState]]: ...

    def forward(self, input: Any, hx: Pair | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None,
                return_states: bool = False, reset_to: Pair | None = None) -> Any:
        """Run all layers over a sequence.

        Args:
            input: as in `RNN.forward`.
            hx: a pair of initial states, h `(L*D, B, P)` and c `(L*D, B, H)`, unbatched without B, or None for zeros.
            lengths, reset, return_states: as in `RNN.forward`.
            reset_to: as there, a pair like hx.

        Returns:
            the output, `(T, B, D*P)` or as the input is laid out, and the last states (hy, cy), shaped as hx; if return_states also
            a pair of tuples, h and c after every step.

        Raises:
            RuntimeError, ValueError, TypeError: as there.
        """
        return self._call(input, hx, lengths, reset, return_states, reset_to)

    if TYPE_CHECKING:
        __call__ = forward

    def _split_states(self, hx: Any) -> tuple[Any, ...]:
        h, c = shared.split_pair(hx)
        return () if h is None else (h,) if c is None else (h, c)


def _h_and_c(states: tuple[Any, ...]) -> tuple[Any, Any]:
    """A layer's states as the engine takes them: h, and the inner ones in one tensor."""
    if len(states) < 3:
        return (*states, None, None)[:2]
    return states[0], torch.stack(states[1:])
