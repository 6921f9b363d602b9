"""RNN, LSTM and GRU: torch.nn's layers, run by the fused engine.

Construction, parameters, state and most helper methods are torch.nn.RNNBase's. They derive from it and not from
torch.nn.LSTM and its kin, because torch.compile refuses instances of those. What is not the engine's business stays
torch's: a call that the engine does not take, a malformed one included, runs through the stock class's own `forward`,
so that it is served, or refused, exactly as there.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import functional, onnx, select, shared

Sequence = TypeVar("Sequence", Tensor, PackedSequence, Tensor | PackedSequence)  # the output is what the input is
Pair = tuple[Tensor, Tensor]

CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


class FusedLayer(RNNBase):
    """What RNN, LSTM and GRU share: a call, from torch's arguments to the engine's and back. Not for direct use."""

    # Their constructors take (*args, **kwargs) for the sake of the words of torch's TypeErrors. The signatures that they
    # show serve torch.nn.utils.skip_init too, which refuses a class without a `device`.

    stock: type[RNNBase]  # the torch.nn class that this one stands for

    def _call(self, input: Any, hx: Any, lengths: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
            onnx.refuse_packed()
        else:
            data, batch_sizes = input, None
        ragged = batch_sizes if lengths is None else self._checked_lengths(lengths, data, packed)
        h, c = self._split_states(hx)
        states = () if h is None else (h,) if c is None else (h, c)
        weights = shared.weights_by_name(self, self._flat_weights_names)

        cell, run = CELL_OF_MODE[self.mode], functional.stack
        if not select.is_ordinary(data, states, weights):
            if isinstance(input, Proxy) or isinstance(h, Proxy):
                return shared.record_as_leaf(self, input, hx, **({} if lengths is None else {"lengths": lengths}))
            reason = select.reason_for_fallback(data, states, weights)
            if reason is not None:
                return self._run_stock(input, hx, ragged, reason)
            onednn = cell == "lstm" and not packed and not self.proj_size
            dtype = select.autocast_dtype(cell, data, h, onednn)
            if dtype is not None:
                run = partial(functional.stack_cast, dtype)
        if not self._fits(data, h, c, batch_sizes):
            return self._run_stock(input, hx, ragged, select.MISFIT)
        if lengths is not None and data.is_cuda:
            return shared.run_packed(self, input, hx, ragged)  # type: ignore[arg-type]

        batched = packed or data.dim() == 3
        if not batched:
            data = data.unsqueeze(1)
            h = h if h is None else h.unsqueeze(1)
            c = c if c is None else c.unsqueeze(1)
        elif packed and sorted_indices is not None:
            h = h if h is None else h.index_select(1, sorted_indices)
            c = c if c is None else c.index_select(1, sorted_indices)

        output, hy, cy = run(
            cell, data, h, c, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first and batched and not packed, ragged,
        )

        if not batched:
            output, hy = output.squeeze(1), hy.squeeze(1)
            cy = cy if cy is None else cy.squeeze(1)
        elif packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                hy = hy.index_select(1, unsorted_indices)
                cy = cy if cy is None else cy.index_select(1, unsorted_indices)
        return output, hy if cy is None else (hy, cy)

    def _run_stock(self, input: Any, hx: Any, ragged: Any, reason: str) -> Any:
        if ragged is None or isinstance(input, PackedSequence):
            return shared.run_stock(self, input, hx, reason)
        if reason == select.MISFIT:
            self.stock.forward(self, input, hx)  # which is to say what does not fit
        return shared.run_packed(self, input, hx, ragged)

    def _checked_lengths(self, lengths: Any, data: Any, packed: bool) -> Tensor:
        """As the engine takes them. Their values are the operator's business."""
        if isinstance(data, Proxy) or isinstance(lengths, Proxy):  # to be recorded
            return lengths
        who = f"fusedrnn.{self.stock.__name__}"
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
        return lengths.to(torch.int64) if lengths.is_meta else lengths.to("cpu", torch.int64)

    def _split_states(self, hx: Any) -> Any:
        """(h, c) out of the caller's hx, (None, None) if there is none."""
        return hx, None

    def _fits(self, data: Tensor, h: Tensor | None, c: Tensor | None, batch_sizes: Tensor | None) -> bool:
        """Whether the shapes are those of this module. If not, torch's own check, in the stock forward, says how."""
        shape = data.shape
        if not shape or shape[-1] != self.input_size or self.proj_size and self.mode != "LSTM":
            return False
        if batch_sizes is not None:
            if len(shape) != 2 or not is_compiling() and int(batch_sizes.sum()) != shape[0]:
                return False
            batch = () if h is None else (int(batch_sizes[0]),)
        elif len(shape) == 3:
            steps, batch = (shape[1], shape[:1]) if self.batch_first else (shape[0], shape[1:2])
            if steps == 0:
                return False
        elif len(shape) == 2 and shape[0] > 0:
            batch = ()
        else:
            return False
        if h is None:
            return True
        if (c is None) == (self.mode == "LSTM"):
            return False
        rows = self.num_layers * (2 if self.bidirectional else 1)
        return h.shape == (rows, *batch, self.proj_size or self.hidden_size) and (
            c is None or c.shape == (rows, *batch, self.hidden_size))

    def reason_for_stock(self, input: Tensor | PackedSequence, hx: Tensor | Pair | None = None) -> str | None:
        """Why this call runs on torch's own kernels, or is refused by torch; None if it runs on the engine.

        Args:
            input, hx: as for the call, which is not made.

        Returns:
            words that end "... because <reason>", or None.
        """
        data, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        h, c = self._split_states(hx)
        states = [state for state in (h, c) if state is not None]
        reason = select.reason_for_fallback(data, states, shared.weights_by_name(self, self._flat_weights_names))
        return reason or (None if self._fits(data, h, c, batch_sizes) else select.MISFIT)

    def __prepare_scriptable__(self) -> RNNBase:
        """torch.jit.script gets the stock layer with these very Parameters: it cannot compile this `forward`.

        torch.jit.script also leaves that stock layer in the place of this one in the model it was given.
        """
        return shared.as_stock(self)

    # torch keeps weak references to the weights in order to notice that one was replaced, and they forbid to swap the
    # weights (torch.__future__.set_swap_module_params_on_conversion). `_flat_weights` itself tells as much.

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self._flat_weight_refs = []

    def _weights_have_changed(self) -> bool:
        known = zip(self._flat_weights_names, self._flat_weights, strict=True)
        return any(getattr(self, name, None) is not weight for name, weight in known)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flat_weight_refs = []


class RNN(FusedLayer):
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

    Raises:
        ValueError, TypeError: where torch.nn.RNN raises them, in its words.

    >>> import torch
    >>> output, hy = RNN(10, 20, 2)(torch.randn(5, 3, 10))
    >>> output.shape, hy.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    stock = torch.nn.RNN

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                  bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                  device: Device = None, dtype: torch.dtype | None = None) -> None: ...

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
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    def forward(self, input: Sequence, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> tuple[Sequence, Tensor]:
        """Run all layers over a sequence.

        Args:
            input: `(T, B, I)`, `(B, T, I)` if batch_first, `(T, I)` unbatched, or a PackedSequence.
            hx: initial states `(L*D, B, H)`, unbatched `(L*D, H)`, or None for zeros.
            lengths: (B,) integers from 0 to T, the steps that each sequence of a padded input has, in any order; None: all
                have T. Behind its end the output is zero, and its last states are those of its own last step. The input's
                product is taken of all T*B rows: if most are padding, a PackedSequence is faster.

        Returns:
            the output, `(T, B, D*H)` or as the input is laid out, and the last states hy, shaped as hx.

        Raises:
            RuntimeError, ValueError: where torch.nn.RNN raises them, in its words; TypeError, ValueError, RuntimeError: lengths
                that do not fit.
        """
        return self._call(input, hx, lengths)

    if TYPE_CHECKING:  # torch.nn.Module's own takes anything and gives Any
        @shared.signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class LSTM(FusedLayer):
    """Long short-term memory: torch.nn.LSTM on the fused engine.

        i, f, o = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), each its own rows; g = tanh(...) likewise
        c_t = f c_(t-1) + i g,  h_t = o tanh(c_t),  and with projections h_t = W_hr o tanh(c_t)

    Source: Hochreiter and Schmidhuber (1997); the forget gate: Gers, Schmidhuber and Cummins (2000); projections: Sak, Senior
    and Beaufays, arXiv:1402.1128 (2014); in the form of torch.nn.LSTM.

    Args:
        proj_size: P > 0 projects h to P features: a state h is (..., P), c is (..., H). 0: no projection, and
            P below stands for H.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`.

    Raises:
        ValueError, TypeError: where torch.nn.LSTM raises them, in its words.

    >>> import torch
    >>> output, (hy, cy) = LSTM(10, 20, bidirectional=True)(torch.randn(5, 3, 10))
    >>> output.shape, hy.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    stock = torch.nn.LSTM

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                  batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
                  device: Device = None, dtype: torch.dtype | None = None) -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        super().__init__("LSTM", *args, **kwargs)

    def forward(self, input: Sequence, hx: Pair | None = None, *, lengths: Tensor | None = None) -> tuple[Sequence, Pair]:
        """Run all layers over a sequence.

        Args:
            input: as in `RNN.forward`.
            hx: a pair of initial states, h `(L*D, B, P)` and c `(L*D, B, H)`, unbatched without B, or None for zeros.
            lengths: as in `RNN.forward`.

        Returns:
            the output, `(T, B, D*P)` or as the input is laid out, and the last states (hy, cy), shaped as hx.

        Raises:
            RuntimeError, ValueError, TypeError: as there.
        """
        return self._call(input, hx, lengths)

    if TYPE_CHECKING:
        @shared.signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _split_states(self, hx: Any) -> Any:
        return shared.split_pair(hx)

    # What the stock forward needs beyond RNNBase.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(FusedLayer):
    """Gated recurrent unit: torch.nn.GRU on the fused engine.

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), each its own rows
        n = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn)),  h_t = (1 - z) n + z h_(t-1)

    Source: Cho and others, arXiv:1406.1078 (2014), in the form of torch.nn.GRU: r multiplies after the recurrent product.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`.

    Raises:
        ValueError, TypeError: where torch.nn.GRU raises them, in its words.

    >>> import torch
    >>> output, hy = GRU(10, 20, batch_first=True)(torch.randn(3, 5, 10))
    >>> output.shape, hy.shape
    (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    stock = torch.nn.GRU

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                  batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                  device: Device = None, dtype: torch.dtype | None = None) -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        _refuse_proj_size(kwargs)
        super().__init__("GRU", *args, **kwargs)

    def forward(self, input: Sequence, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> tuple[Sequence, Tensor]:
        """Run all layers over a sequence.

        Args:
            input, hx, lengths: as in `RNN.forward`.

        Returns:
            output and hy, as there.

        Raises:
            RuntimeError, ValueError, TypeError: as there.
        """
        return self._call(input, hx, lengths)

    if TYPE_CHECKING:
        @shared.signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _refuse_proj_size(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
