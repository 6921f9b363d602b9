"""RNNCell, LSTMCell and GRUCell: torch.nn's cells, at home beside the layers.

A single step runs torch's own kernels. The engine gains by what it carries from step to step, packed weights above
all, and one step has no next: taken through the engine it ran at 0.4 to 1.1 times torch's speed, for H from 64 to 1024
and B from 1 to 256. A loop over a cell is better written as a layer. What is added here: torch.fx and torch.jit take
the cells as they take torch.nn's, and `convert` and `explain` know them.
"""

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNCellBase

from . import shared


class FusedCell(RNNCellBase):
    """What the three cells share. Not for direct use."""

    stock: type[RNNCellBase]  # the torch.nn class that this one stands for

    def __prepare_scriptable__(self) -> RNNCellBase:
        """torch.jit.script gets the stock cell with these very Parameters: it cannot compile this `forward`."""
        return shared.as_stock(self)


class RNNCell(FusedCell):
    """One step of Elman's network, tanh or ReLU: torch.nn.RNNCell.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    Args:
        input_size: I, features of an input.
        hidden_size: H, features of a state.
        bias: False leaves out b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Call:
        input (B, I) or (I,); hx (B, H) or (H,), None for zeros. Returns h', shaped as hx.

    Raises:
        what torch.nn.RNNCell raises, in its words.

    >>> import torch
    >>> RNNCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    __constants__ = torch.nn.RNNCell.__constants__
    stock = torch.nn.RNNCell
    nonlinearity: str

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", device=None,
                 dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return shared.record_as_leaf(self, input, hx)
        return torch.nn.RNNCell.forward(self, input, hx)


class LSTMCell(FusedCell):
    """One step of long short-term memory: torch.nn.LSTMCell.

    i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh), each its own rows; g = tanh(...) likewise
    c' = f c + i g,  h' = o tanh(c')

    Args:
        input_size, hidden_size, bias, device, dtype: as in `RNNCell`.

    Call:
        input (B, I) or (I,); hx a pair (h, c), each (B, H) or (H,), or None for zeros. Returns (h', c').

    Raises:
        what torch.nn.LSTMCell raises, in its words.

    >>> import torch
    >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
    >>> h.shape
    torch.Size([3, 20])
    """

    stock = torch.nn.LSTMCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(input, Proxy):
            return shared.record_as_leaf(self, input, hx)
        return torch.nn.LSTMCell.forward(self, input, hx)


class GRUCell(FusedCell):
    """One step of a gated recurrent unit: torch.nn.GRUCell.

    r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh), each its own rows
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h' = (1 - z) n + z h

    Args:
        input_size, hidden_size, bias, device, dtype: as in `RNNCell`.

    Call:
        As `RNNCell`.

    Raises:
        what torch.nn.GRUCell raises, in its words.

    >>> import torch
    >>> GRUCell(10, 20)(torch.randn(10)).shape
    torch.Size([20])
    """

    stock = torch.nn.GRUCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return shared.record_as_leaf(self, input, hx)
        return torch.nn.GRUCell.forward(self, input, hx)
