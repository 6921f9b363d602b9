"""RNN, LSTM and GRU: torch.nn's layers, run by the fused engine, with options that torch's have not.

A call of theirs is base.py's. Here is what makes each of them: its arguments and parameters, and which of the engine's cells it is.
"""

from typing import Any, Literal

import torch
from torch.types import Device

from . import options, shared
from .base import FusedLayer, OfOneState, OfTwoStates
from .reference import Choice

GateFunction = Literal["sigmoid", "hard_sigmoid", "hard_sigmoid_of_fifths"]
ValueFunction = Literal["tanh", "relu", "identity"]

EVERY_LAYER = (*options.RATES, "save")  # what all three have and torch.nn's have not


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
