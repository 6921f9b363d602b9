"""IndRNN, SLSTM, LayerNormLSTM and LayerNormGRU: recurrent layers that torch.nn has not, called as its layers are.

What they share with the others is `fusedrnn.base.FusedLayer`, and so torch.nn.RNNBase: names of parameters, dropout
between layers, directions, state_dict. Where the others leave a call to torch's kernels these refuse it.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.types import Device

from . import shared
from .base import EveryState, FusedLayer, OfOneState, OfTwoStates, Sequence
from .modules import EVERY_LAYER, ValueFunction, set_forget_bias
from .reference import VALUE_FUNCTIONS, Choice

Four = tuple[Tensor, Tensor, Tensor, Tensor]
StatesOfFour = tuple[EveryState, EveryState, EveryState, EveryState]


class IndRNN(OfOneState):
    """Independently recurrent network: each unit remembers itself alone, by a weight of its own.

        h_t = f(W_ih x_t + b_ih + b_hh + u h_(t-1)),  u: a number for each unit, the parameter weight_hh

    Source: Li and others, arXiv:1803.04831 (2018).

    Args:
        nonlinearity: f: "relu", "tanh" or "identity". The 4th positional argument, as in `RNN`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`. weight_hh_l0
            and so on are (1, H), drawn evenly from 0 to 1, which is the paper's advice for ReLU; the others are drawn as torch
            draws an RNN's.
        zoneout, weight_dropout, save: as in `RNN`. There is no recurrent_dropout, for want of a recurrent product.

    Raises:
        ValueError, TypeError: for arguments of no such layer.

    >>> import torch
    >>> output, hy = IndRNN(10, 20, 2)(torch.randn(5, 3, 10))
    >>> output.shape, hy.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    stock, _who, _takes = shared.Unstocked, "fusedrnn.IndRNN", ("zoneout", "weight_dropout", "save")
    nonlinearity: ValueFunction

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: ValueFunction = "relu",
                  bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                  device: Device = None, dtype: torch.dtype | None = None, *, zoneout: float = 0.0, weight_dropout: float = 0.0,
                  save: Literal["all", "states"] = "all") -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: ValueFunction = "relu",
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 device: Device = None, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        if nonlinearity not in VALUE_FUNCTIONS:
            names = ", ".join(map(repr, VALUE_FUNCTIONS))
            raise ValueError(f"{self._who}: nonlinearity must be one of {names}, got {nonlinearity!r}")
        if "recurrent_dropout" in kwargs:
            raise ValueError(f"{self._who}: recurrent_dropout is of what weight_hh multiplies, and here there is no such "
                             f"product; got {kwargs['recurrent_dropout']!r}")
        self.nonlinearity = nonlinearity
        self._take_options(kwargs)
        shared.refuse_unknown(self._who, kwargs)
        super().__init__("RNN_RELU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         device=device, dtype=dtype)
        self.mode = "INDRNN"
        self._take_form()

    def _own_shapes(self, suffix: str) -> dict[str, tuple[int, ...]]:
        return {f"weight_hh{suffix}": (1, self.hidden_size)}

    def _cell(self) -> str:
        return Choice(output=self.nonlinearity).of("indrnn")

    def reset_parameters(self) -> None:
        """Draw them anew: weight_hh from 0 to 1, the others as torch does."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("weight_hh"):
                torch.nn.init.uniform_(parameter)

    def extra_repr(self) -> str:
        """What differs from the defaults.

        Returns:
            words for `repr`.
        """
        return super().extra_repr() + (f", nonlinearity={self.nonlinearity!r}" if self.nonlinearity != "relu" else "")


class SLSTM(FusedLayer):
    """The LSTM with an exponential input gate, normalised: sLSTM of xLSTM, its recurrent cell alone.

        i, f, g, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh, each its own rows
        m_t = max(log sigmoid(f) + m_(t-1), i),  i' = exp(i - m_t),  f' = exp(log sigmoid(f) + m_(t-1) - m_t)
        c_t = f' c_(t-1) + i' tanh(g),  n_t = f' n_(t-1) + i',  h_t = sigmoid(o) c_t / n_t

    m only keeps numbers small: c and n are what they would be without it, times exp(-m). Source: Beck and others,
    arXiv:2405.04517 (2024), equations 8 to 17, with the sigmoid as forget gate.

    Args:
        num_heads: N heads, each of H/N units that lie side by side and know only each other's states: weight_hh has H/N columns.
        forget_bias: as in `LSTM`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`; gates lie in
            the order i, f, g, o.
        recurrent_dropout, weight_dropout, save: as in `RNN`. There is no zoneout: c and n of two steps are scaled by two m, and
            cannot be mixed.

    Raises:
        ValueError, TypeError: for arguments of no such layer.

    >>> import torch
    >>> output, (hy, cy, ny, my) = SLSTM(10, 20, num_heads=4)(torch.randn(5, 3, 10))
    >>> output.shape, my.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    stock, _who = shared.Unstocked, "fusedrnn.SLSTM"
    _takes = ("recurrent_dropout", "weight_dropout", "save", "forget_bias", "num_heads")
    _inner = 3
    forget_bias: float | None = None

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                  dropout: float = 0.0, bidirectional: bool = False, device: Device = None, dtype: torch.dtype | None = None, *,
                  num_heads: int = 1, recurrent_dropout: float = 0.0, weight_dropout: float = 0.0,
                  save: Literal["all", "states"] = "all", forget_bias: float | None = None) -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                 dropout: float = 0.0, bidirectional: bool = False, device: Device = None, dtype: torch.dtype | None = None,
                 **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        if "zoneout" in kwargs:
            raise ValueError(f"{self._who}: zoneout mixes the states of two steps, and here they are of different scales; "
                             f"got {kwargs['zoneout']!r}")
        self._take_options(kwargs)
        shared.refuse_unknown(self._who, kwargs)
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         device=device, dtype=dtype)
        self.mode = "SLSTM"
        self._take_form()

    def _cell(self) -> str:
        return "slstm"

    def reset_parameters(self) -> None:
        """Draw them anew, as torch does an LSTM's, and give the forget gates their bias."""
        super().reset_parameters()
        set_forget_bias(self, self.forget_bias)

    @overload
    def forward(self, input: Sequence, hx: Four | None = None, *, lengths: Tensor | None = None,
                reset: Tensor | None = None, return_states: Literal[False] = False,
                reset_to: Four | None = None) -> tuple[Sequence, Four]: ...

    @overload
    def forward(self, input: Tensor, hx: Four | None = None, *, lengths: Tensor | None = None,
                reset: Tensor | None = None, return_states: Literal[True],
                reset_to: Four | None = None) -> tuple[Tensor, Four, StatesOfFour]: ...

    def forward(self, input: Any, hx: Four | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None,
                return_states: bool = False, reset_to: Four | None = None) -> Any:
        """Run all layers over a sequence.

        Args:
            input, lengths, reset, return_states: as in `RNN.forward`.
            reset_to: as there, four states like hx.
            hx: initial states (h, c, n, m), each `(L*D, B, H)`, unbatched without B, or None for zeros. Where n is zero nothing
                has been written yet.

        Returns:
            the output, as there, and the last states (h, c, n, m), shaped as hx; if return_states also four tuples, of each state
            after every step.

        Raises:
            RuntimeError, ValueError, TypeError: arguments that do not fit, or that the engine has no kernel for.
        """
        return self._call(input, hx, lengths, reset, return_states, reset_to)

    if TYPE_CHECKING:
        __call__ = forward

    def _split_states(self, hx: Any) -> tuple[Any, ...]:
        return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 4 else super()._split_states(hx)


class LayerNormLSTM(OfTwoStates):
    """The LSTM whose products and whose cell state on its way out are normalised: layer normalisation inside each step.

        N(v) = (v - E v) / sqrt(Var v + 1e-5)
        gates = a_ih N(W_ih x_t) + b_ih + a_hh N(W_hh h_(t-1)) + b_hh, the rows of i, f, g and o
        c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(a_c N(c_t) + b_c)

    N is of a whole row: of all 4H numbers of a product at once, and of the H of c_t, which is carried on as it is. Source: Ba,
    Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), supplement, equations 20 to 22, for the gates of
    torch.nn.LSTM.

    Args:
        forget_bias: as in `LSTM`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`; gates lie in the
            order i, f, g, o. norm_ih_l0, norm_hh_l0 (4H,) and so on are a_ih and a_hh, ones at first; norm_c_l0 (2, H) is a_c and
            b_c, ones and zeros. bias=False leaves out b_ih and b_hh, and not b_c.
        zoneout: as in `RNN`, of h and of c, or two probabilities.
        recurrent_dropout, weight_dropout: as in `RNN`.
        save: as in `RNN`; the products of the input are kept all the same.

    Raises:
        ValueError, TypeError: for arguments of no such layer.

    >>> import torch
    >>> output, (hy, cy) = LayerNormLSTM(10, 20, 2)(torch.randn(5, 3, 10))
    >>> output.shape, cy.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    stock, _who = shared.Unstocked, "fusedrnn.LayerNormLSTM"
    _takes = (*EVERY_LAYER, "forget_bias")
    forget_bias: float | None = None

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                  dropout: float = 0.0, bidirectional: bool = False, device: Device = None, dtype: torch.dtype | None = None, *,
                  zoneout: float | tuple[float, float] = 0.0, recurrent_dropout: float = 0.0, weight_dropout: float = 0.0,
                  save: Literal["all", "states"] = "all", forget_bias: float | None = None) -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                 dropout: float = 0.0, bidirectional: bool = False, device: Device = None, dtype: torch.dtype | None = None,
                 **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        self._take_options(kwargs)
        shared.refuse_unknown(self._who, kwargs)
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         device=device, dtype=dtype)
        self.mode = "LAYERNORMLSTM"
        self._take_form()

    def _own_shapes(self, suffix: str) -> dict[str, tuple[int, ...]]:
        H = self.hidden_size
        return {f"norm_ih{suffix}": (4 * H,), f"norm_hh{suffix}": (4 * H,), f"norm_c{suffix}": (2, H)}

    def _cell(self) -> str:
        return "lstm_norm"

    def reset_parameters(self) -> None:
        """Draw weights and biases anew, as torch does an LSTM's, give the forget gates their bias, and set gains to 1, b_c to 0."""
        super().reset_parameters()
        set_forget_bias(self, self.forget_bias)
        set_norms(self)


class LayerNormGRU(OfOneState):
    """The GRU whose products are normalised: layer normalisation inside each step.

        N(v) = (v - E v) / sqrt(Var v + 1e-5)
        r, z = sigmoid(a_ih N(W_ih x_t) + b_ih + a_hh N(W_hh h_(t-1)) + b_hh), each its own rows
        n = tanh(a_in N(W_ih x_t) + b_in + r (a_hn N(W_hh h_(t-1)) + b_hn)), likewise,  h_t = (1 - z) n + z h_(t-1)

    N is of a whole row: of all 3H numbers of a product at once. Source: Ba, Kiros and Hinton, "Layer normalization",
    arXiv:1607.06450 (2016), for the gates of torch.nn.GRU.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `RNN`; gates lie in the
            order r, z, n. norm_ih_l0, norm_hh_l0 (3H,) and so on are a_ih and a_hh, ones at first.
        zoneout, recurrent_dropout, weight_dropout: as in `RNN`.
        save: as in `LayerNormLSTM`.

    Raises:
        ValueError, TypeError: for arguments of no such layer.

    >>> import torch
    >>> output, hy = LayerNormGRU(10, 20, bidirectional=True)(torch.randn(5, 3, 10))
    >>> output.shape, hy.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    stock, _who, _takes = shared.Unstocked, "fusedrnn.LayerNormGRU", EVERY_LAYER

    def _declared(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                  dropout: float = 0.0, bidirectional: bool = False, device: Device = None, dtype: torch.dtype | None = None, *,
                  zoneout: float = 0.0, recurrent_dropout: float = 0.0, weight_dropout: float = 0.0,
                  save: Literal["all", "states"] = "all") -> None: ...

    @shared.signature_of(_declared)
    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                 dropout: float = 0.0, bidirectional: bool = False, device: Device = None, dtype: torch.dtype | None = None,
                 **kwargs: Any) -> None:
        """Take what the class says under Arguments."""
        self._take_options(kwargs)
        shared.refuse_unknown(self._who, kwargs)
        super().__init__("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         device=device, dtype=dtype)
        self.mode = "LAYERNORMGRU"
        self._take_form()

    def _own_shapes(self, suffix: str) -> dict[str, tuple[int, ...]]:
        return {f"norm_ih{suffix}": (3 * self.hidden_size,), f"norm_hh{suffix}": (3 * self.hidden_size,)}

    def _cell(self) -> str:
        return "gru_norm"

    def reset_parameters(self) -> None:
        """Draw weights and biases anew, as torch does a GRU's, and set gains to 1."""
        super().reset_parameters()
        set_norms(self)


def set_norms(module: FusedLayer) -> None:
    """Give a layer that normalises its first gains, ones, and shifts of c, zeros.

    Args:
        module: the layer.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter.fill_(1)
            if name.startswith("norm_c"):
                parameter[1] = 0
