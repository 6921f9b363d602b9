"""RNN, LSTM and GRU: torch.nn's layers, run by the fused engine.

Construction, parameters, state and most helper methods are torch.nn.RNNBase's. They derive from it and not from
torch.nn.LSTM and its kin, because torch.compile refuses instances of those. What is not the engine's business stays
torch's: a call that the engine does not take, a malformed one included, runs through the stock class's own `forward`,
so that it is served, or refused, exactly as there.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn import Parameter, RNNBase
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import functional, onnx, options, select, shared
from .reference import Choice, with_heads

Sequence = TypeVar("Sequence", Tensor, PackedSequence, Tensor | PackedSequence)  # the output is what the input is
Pair = tuple[Tensor, Tensor]
EveryState = tuple[Tensor, ...]  # of each layer, after each step

GateFunction = Literal["sigmoid", "hard_sigmoid", "hard_sigmoid_of_fifths"]
ValueFunction = Literal["tanh", "relu", "identity"]

EVERY_LAYER = (*options.RATES, "save")  # what all three have and torch.nn's have not
CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


class FusedLayer(RNNBase):
    """What RNN, LSTM and GRU share: a call, from torch's arguments to the engine's and back. Not for direct use."""

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


class RNN(OfOneState):
    """Elman's recurrent network, tanh or ReLU: torch.nn.RNN on the fused engine.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh),  x_t: the input, or what the layer below gives at t

    Source: Elman, "Finding structure in time" (1990), in the form of torch.nn.RNN.

    Args:
        input_size: I, features of an input.
        hidden_size: H, features of a state.
        num_layers: L, layers one upon the other.
        nonlinearity: "tanh" or "relu". The 4th positional argument, as in torch.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...). Does not touch the states.
        dropout: probability with which, in training, an element between two layers is zeroed.
        bidirectional: a second direction runs from the end; D is 2 then, otherwise 1.
        device, dtype: of the parameters.
        zoneout: probability with which, in training, a number of the state stays what it was at a step; otherwise that part of it
            does. Krueger and others, arXiv:1606.01305 (2016).
        recurrent_dropout: probability with which, in training, a number of h does not reach weight_hh, at all steps of a sequence
            alike. Gal and Ghahramani, arXiv:1512.05287 (2016).
        weight_dropout: probability with which, in training, a number of weight_hh is zero during a call (DropConnect). Merity, Keskar
            and Socher, arXiv:1708.02182 (2017).
        save: "states" keeps only the states for backward and makes the gates again there, a part of the steps at a time, for less
            memory and more time. (Of both directions all steps are one part.)

    Raises:
        ValueError, TypeError: where torch.nn.RNN raises them, in its words; ValueError for what torch.nn has not.

    >>> import torch
    >>> output, hy = RNN(10, 20, 2)(torch.randn(5, 3, 10))
    >>> output.shape, hy.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    stock, _who, _takes = torch.nn.RNN, "fusedrnn.RNN", EVERY_LAYER

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                  bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                  device: Device = None, dtype: torch.dtype | None = None, *, zoneout: float = 0.0,
                  recurrent_dropout: float = 0.0, weight_dropout: float = 0.0,
                  save: Literal["all", "states"] = "all") -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        _refuse_proj_size(kwargs)
        if len(args) > 3:
            self.nonlinearity: str = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        self._take_options(kwargs)
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class LSTM(OfTwoStates):
    """Long short-term memory: torch.nn.LSTM on the fused engine.

        i, f, o = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), each its own rows; g = tanh(...) likewise
        c_t = f c_(t-1) + i g,  h_t = o tanh(c_t),  and with projections h_t = W_hr o tanh(c_t)

    With peepholes p_i c_(t-1) is added inside i, p_f c_(t-1) inside f, and p_o c_t inside o, unit by unit.

    Source: Hochreiter and Schmidhuber (1997); the forget gate: Gers, Schmidhuber and Cummins (2000); projections and cell_clip:
    Sak, Senior and Beaufays, arXiv:1402.1128 (2014); in the form of torch.nn.LSTM.

    Args:
        proj_size: P > 0 projects h to P features: a state h is (..., P), c is (..., H). 0: no projection, and
            P below stands for H.
        zoneout: as in `RNN`, of h and of c, or two probabilities.
        forget_bias: what bias_ih has for the forget gates at first, and bias_hh 0; None: as torch draws them.
        peepholes: each direction has also weight_ch_l0 and so on, (3, H): p_i, p_f and p_o, drawn as the others are. Gers,
            Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks" (2002).
        coupled: the forget gate is 1 - i; weights and biases have 3H rows, of i, g and o, and weight_ch is (2, H), p_i and p_o.
            Greff and others, arXiv:1503.04069 (2015).
        gate_activation: what stands for sigmoid: "hard_sigmoid" (x/6 + 1/2, from 0 to 1; as torch and Keras 3 have it) or
            "hard_sigmoid_of_fifths" (x/5 + 1/2; as ONNX and Keras 2 have it).
        activation: what stands for tanh, of g and of c_t alike, or a pair for each: "tanh", "relu" or "identity".
        cell_clip: how far a number of c_t may go from zero.
        num_heads: N heads, each of H/N units that lie side by side and know only each other's states: weight_hh has H/N columns.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`.
        recurrent_dropout, weight_dropout, save: as in `RNN`.

    Raises:
        ValueError, TypeError: where torch.nn.LSTM raises them, in its words; ValueError for what torch.nn has not.

    >>> import torch
    >>> output, (hy, cy) = LSTM(10, 20, bidirectional=True)(torch.randn(5, 3, 10))
    >>> output.shape, hy.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    stock, _who = torch.nn.LSTM, "fusedrnn.LSTM"
    _takes = (*EVERY_LAYER, "forget_bias", "peepholes", "coupled", "gate_activation", "activation", "cell_clip", "num_heads")
    forget_bias: float | None = None
    peepholes: bool = False
    coupled: bool = False
    gate_activation: GateFunction = "sigmoid"
    activation: ValueFunction | tuple[ValueFunction, ValueFunction] = "tanh"
    cell_clip: float | None = None

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                  batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
                  device: Device = None, dtype: torch.dtype | None = None, *, zoneout: float | tuple[float, float] = 0.0,
                  recurrent_dropout: float = 0.0, weight_dropout: float = 0.0, save: Literal["all", "states"] = "all",
                  forget_bias: float | None = None, peepholes: bool = False, coupled: bool = False,
                  gate_activation: GateFunction = "sigmoid",
                  activation: ValueFunction | tuple[ValueFunction, ValueFunction] = "tanh", cell_clip: float | None = None,
                  num_heads: int = 1) -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        self._take_options(kwargs)
        if self.coupled and self.forget_bias is not None:
            raise ValueError(f"{self._who}: forget_bias must be None with coupled gates, of which none is a forget gate, "
                             f"got {self.forget_bias}")
        super().__init__("LSTM", *args, **kwargs)
        self._take_form()

    def _own_shapes(self, suffix: str) -> dict[str, tuple[int, ...]]:
        H, N, gates = self.hidden_size, self.num_heads, 3 if self.coupled else 4
        shapes: dict[str, tuple[int, ...]]
        if gates == 4:
            shapes = super()._own_shapes(suffix)
        else:
            inputs = self.input_size if suffix.startswith("_l0") else H * (2 if self.bidirectional else 1)
            shapes = {f"weight_ih{suffix}": (gates * H, inputs), f"weight_hh{suffix}": (gates * H, H // N)}
            if self.bias:
                shapes[f"bias_ih{suffix}"] = shapes[f"bias_hh{suffix}"] = (gates * H,)
        if self.peepholes:
            shapes[f"weight_ch{suffix}"] = (gates - 1, H)
        return shapes

    def _cell(self) -> str:
        clip = self.cell_clip
        if not (self.peepholes or self.coupled or clip) and self.gate_activation == "sigmoid" and self.activation == "tanh":
            return "lstm"
        candidate, output = self.activation if isinstance(self.activation, tuple) else (self.activation, self.activation)
        choice = Choice(self.gate_activation, candidate, output, float(clip or 0))
        return choice.of("lstm_coupled" if self.coupled else "lstm_general")

    def reset_parameters(self) -> None:
        """Draw them anew, as torch does, and give the forget gates their bias."""
        super().reset_parameters()
        set_forget_bias(self, self.forget_bias)

    # What the stock forward needs beyond RNNBase.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(OfOneState):
    """Gated recurrent unit: torch.nn.GRU on the fused engine.

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), each its own rows
        n = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn)),  h_t = (1 - z) n + z h_(t-1)

    Source: Cho and others, arXiv:1406.1078 (2014), in the form of torch.nn.GRU: r multiplies after the recurrent product.

    Args:
        gate_activation, num_heads: as in `LSTM`.
        activation: what stands for tanh: "tanh", "relu" or "identity".
        reset_after: False for n = tanh(W_in x_t + b_in + W_hn (r h_(t-1)) + b_hn), in which r multiplies before the product, as in
            the paper; reset_after=False of Keras and linear_before_reset=0 of ONNX.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`.
        zoneout, recurrent_dropout, weight_dropout, save: as in `RNN`.

    Raises:
        ValueError, TypeError: where torch.nn.GRU raises them, in its words; ValueError for what torch.nn has not.

    >>> import torch
    >>> output, hy = GRU(10, 20, batch_first=True)(torch.randn(3, 5, 10))
    >>> output.shape, hy.shape
    (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    stock, _who = torch.nn.GRU, "fusedrnn.GRU"
    _takes = (*EVERY_LAYER, "gate_activation", "activation", "num_heads", "reset_after")
    gate_activation: GateFunction = "sigmoid"
    activation: ValueFunction = "tanh"
    reset_after: bool = True

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                  batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                  device: Device = None, dtype: torch.dtype | None = None, *, zoneout: float = 0.0,
                  recurrent_dropout: float = 0.0, weight_dropout: float = 0.0,
                  save: Literal["all", "states"] = "all", gate_activation: GateFunction = "sigmoid",
                  activation: ValueFunction = "tanh", num_heads: int = 1, reset_after: bool = True) -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        _refuse_proj_size(kwargs)
        self._take_options(kwargs)
        super().__init__("GRU", *args, **kwargs)
        self._take_form()

    def _cell(self) -> str:
        if self.reset_after and self.gate_activation == "sigmoid" and self.activation == "tanh":
            return "gru"
        return Choice(self.gate_activation, self.activation).of("gru_general" if self.reset_after else "gru_reset_before")


def _h_and_c(states: tuple[Any, ...]) -> tuple[Any, Any]:
    """A layer's states as the engine takes them: h, and the inner ones in one tensor."""
    if len(states) < 3:
        return (*states, None, None)[:2]
    return states[0], torch.stack(states[1:])


def set_forget_bias(module: FusedLayer, value: float | None) -> None:
    """Give the forget gates of a layer of gates i, f, g, o their first bias.

    Args:
        module: the layer.
        value: what bias_ih gets; None leaves all as it is.
    """
    if value is None or not module.bias:
        return
    forget = slice(module.hidden_size, 2 * module.hidden_size)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias"):
                parameter[forget] = value if name.startswith("bias_ih") else 0.0


def _refuse_proj_size(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
