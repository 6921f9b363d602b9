"""RNNCell, LSTMCell and GRUCell: one step of torch.nn's cells, as a sequence of length one on the fused engine.

Like the layers (base.py), they leave to the stock class's `forward` every call that the engine does not take.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNCellBase
from torch.types import Device

from . import autograd, functional, select, shared
from .layer import view_of_its_own

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
NONLINEAR = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


class FusedCell(RNNCellBase):
    """What the three cells share. Not for direct use."""

    stock: type[RNNCellBase]  # the torch.nn class that this one stands for

    def _call(self, input: Any, hx: Any) -> Any:
        h, c = self._split_states(hx)
        states = () if h is None else (h,) if c is None else (h, c)
        weights = self._weights_by_name()
        cell: Any = self._cell()

        run, ordinary = functional.stack, select.is_ordinary(input, states, weights)
        if not ordinary:
            if isinstance(input, Proxy) or isinstance(h, Proxy):
                return shared.record_as_leaf(self, input, hx)
            reason = select.MISFIT if cell is None else select.reason_for_fallback(input, states, weights)
            if reason is not None:
                return shared.run_stock(self, input, hx, reason)
            dtype = select.autocast_dtype(cell, input, h)
            if dtype is not None:
                run = partial(functional.stack_cast, dtype)
        if not self._fits(input, h, c):
            return shared.run_stock(self, input, hx, select.MISFIT)
        step = autograd.one_step(cell, input, h, c, weights) if ordinary else None
        if step is not None:
            return step

        # (B, features) or (features,) to (T, B, features) and back; T is 1, and so is D.
        size = (*input.shape[:-1], self.hidden_size)
        added = (0,) if input.dim() == 2 else (0, 0)
        for dim in added:
            input = input.unsqueeze(dim)
            h = h if h is None else h.unsqueeze(dim)
            c = c if c is None else c.unsqueeze(dim)
        _, hy, cy, _ = run(cell, input, h, c, weights, len(weights) == 4, 1, 0.0, False, False, False, None)
        # In training no view, as in torch: fully_shard would lose its hook on one that is edited in place. But that takes longer.
        resize = view_of_its_own if hy.requires_grad else Tensor.view
        hy, cy = resize(hy, size), cy if cy is None else resize(cy, size)
        return hy if cy is None else (hy, cy)

    def reason_for_stock(self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None) -> str | None:
        """Why this call runs on torch's own kernels, or is refused by torch; None if it runs on the engine.

        Args:
            input, hx: as for the call, which is not made.

        Returns:
            words that end "... because <reason>", or None.
        """
        h, c = self._split_states(hx)
        states = [state for state in (h, c) if state is not None]
        reason = select.reason_for_fallback(input, states, self._weights_by_name())
        return reason or (None if self._fits(input, h, c) else select.MISFIT)

    def _cell(self) -> str | None:
        """The cell's name in the engine; None if it has no such cell."""
        raise NotImplementedError

    def _split_states(self, hx: Any) -> Any:
        """(h, c) out of the caller's hx, (None, None) if there is none."""
        return hx, None

    def _weights_by_name(self) -> list[Tensor | None]:
        """The weights as they are now, without the biases if the cell has none."""
        weight_ih, weight_hh, bias_ih, bias_hh = shared.weights_by_name(self, NAMES)
        no_bias = bias_ih is None and bias_hh is None
        return [weight_ih, weight_hh] if no_bias else [weight_ih, weight_hh, bias_ih, bias_hh]

    def __prepare_scriptable__(self) -> RNNCellBase:
        """torch.jit.script gets the stock cell with these very Parameters: it cannot compile this `forward`."""
        return shared.as_stock(self)

    def _fits(self, input: Tensor, h: Tensor | None, c: Tensor | None) -> bool:
        """Whether this is a call for the engine's cell. If not, the stock forward serves it or says what is wrong."""
        shape = input.shape
        if not 1 <= len(shape) <= 2 or shape[-1] != self.input_size or not self.input_size or not self.hidden_size:
            return False
        expected = (*shape[:-1], self.hidden_size)
        return (h is None or h.shape == expected) and (c is None or c.shape == expected) and self._cell() is not None


class RNNCell(FusedCell):
    """One step of Elman's network, tanh or ReLU: torch.nn.RNNCell on the fused engine.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    Args:
        input_size: I, features of an input.
        hidden_size: H, features of a state.
        bias: False leaves out b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Raises:
        TypeError: where torch.nn.RNNCell raises it, in its words.

    >>> import torch
    >>> RNNCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    __constants__ = torch.nn.RNNCell.__constants__
    stock = torch.nn.RNNCell
    nonlinearity: str

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Take what the class says under Arguments."""
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            input: (B, I) or (I,).
            hx: the state (B, H) or (H,), None for zeros.

        Returns:
            the new state h', shaped as hx.

        Raises:
            RuntimeError, ValueError: where torch.nn.RNNCell raises them, in its words.
        """
        return self._call(input, hx)

    if TYPE_CHECKING:  # torch.nn.Module's own takes anything and gives Any
        @shared.signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _cell(self) -> str | None:
        return NONLINEAR.get(self.nonlinearity)


class LSTMCell(FusedCell):
    """One step of long short-term memory: torch.nn.LSTMCell on the fused engine.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh), each its own rows; g = tanh(...) likewise
        c' = f c + i g,  h' = o tanh(c')

    Args:
        input_size, hidden_size, bias, device, dtype: as in `RNNCell`.

    Raises:
        TypeError: where torch.nn.LSTMCell raises it, in its words.

    >>> import torch
    >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
    >>> h.shape
    torch.Size([3, 20])
    """

    stock = torch.nn.LSTMCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        """Take what the class says under Arguments."""
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            input: (B, I) or (I,).
            hx: the states (h, c), each (B, H) or (H,), or None for zeros.

        Returns:
            the new states (h', c'), shaped as hx.

        Raises:
            RuntimeError, ValueError: where torch.nn.LSTMCell raises them, in its words.
        """
        return self._call(input, hx)

    if TYPE_CHECKING:
        @shared.signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _cell(self) -> str:
        return "lstm"

    def _split_states(self, hx: Any) -> Any:
        return shared.split_pair(hx)

    def _fits(self, input: Tensor, h: Tensor | None, c: Tensor | None) -> bool:
        return (h is None) == (c is None) and super()._fits(input, h, c)


class GRUCell(FusedCell):
    """One step of a gated recurrent unit: torch.nn.GRUCell on the fused engine.

        r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh), each its own rows
        n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h' = (1 - z) n + z h

    Args:
        input_size, hidden_size, bias, device, dtype: as in `RNNCell`.

    Raises:
        TypeError: where torch.nn.GRUCell raises it, in its words.

    >>> import torch
    >>> GRUCell(10, 20)(torch.randn(10)).shape
    torch.Size([20])
    """

    stock = torch.nn.GRUCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        """Take what the class says under Arguments."""
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            input, hx: as in `RNNCell.forward`.

        Returns:
            the new state h', shaped as hx.

        Raises:
            RuntimeError, ValueError: where torch.nn.GRUCell raises them, in its words.
        """
        return self._call(input, hx)

    if TYPE_CHECKING:
        @shared.signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _cell(self) -> str:
        return "gru"
