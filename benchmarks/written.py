"""Options of fusedrnn's layers that torch.nn's have not, and what one writes in torch for each: modules of one layer.

Both hold torch.nn's parameters under torch.nn's names and are called like torch.nn's layers, so that the gate, the clock and
the meters need not tell them apart. Masks come from torch's generator, of float32 and in one order: after one seed both
sides draw the same ones where the gate compares them (`gate.judge`). RATES are those of the papers that fusedrnn.RNN names.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .shapes import USUAL_MODES, Case, Shape

SEED = 20240229
EPISODE = 25  # steps between two resets of a row, on average
RATES = {"recurrent_dropout": 0.25, "weight_dropout": 0.5}
ZONEOUT = {"lstm": (0.05, 0.5), "gru": 0.05}  # of h, and of c
ZONEOUTS = ("zoneout", "zoneout_eval")


@dataclasses.dataclass(frozen=True)
class Option:
    """What is measured of an option."""

    written: str  # in torch, in a few words
    cells: tuple[str, ...] = ("lstm", "gru")
    modes: tuple[str, ...] = USUAL_MODES
    masks: bool = False  # whether masks are drawn, in inference too, where there would be nothing to measure otherwise


OPTIONS = {
    "lengths": Option("packed, padded again"),
    "reset": Option("loop of cells"),
    "zoneout": Option("loop of cells", masks=True),
    "zoneout_eval": Option("loop of cells", modes=("inference",)),
    "recurrent_dropout": Option("loop of cells", masks=True),
    "weight_dropout": Option("functional_call", masks=True),
    "return_states": Option("loop of cells", cells=("lstm",)),  # a GRU's states are its output
    "save": Option("checkpoint", modes=("training",)),
    "peepholes": Option("loop of steps", cells=("lstm",)),
    "coupled": Option("loop of steps", cells=("lstm",)),
    "hard_sigmoid": Option("loop of steps", cells=("lstm",)),
    "cell_clip": Option("loop of steps", cells=("lstm",)),
    "num_heads": Option("loop of steps", cells=("lstm",)),
    "slstm": Option("loop of steps", cells=("lstm",)),
    "indrnn": Option("loop of steps", cells=("rnn",)),
    "layer_norm_lstm": Option("loop of steps", cells=("lstm",)),
    "layer_norm_gru": Option("loop of steps", cells=("gru",)),
    "reset_before": Option("loop of steps", cells=("gru",)),
}
HEADS, CLIP = 4, 0.1
# The options that make another cell: fusedrnn's keywords, its class if it is another, and the cell of fusedrnn/reference.py.
FORMS: dict[str, tuple[dict, str | None, str]] = {
    "peepholes": ({"peepholes": True}, None, "lstm_general"),
    "coupled": ({"coupled": True}, None, "lstm_coupled"),
    "hard_sigmoid": ({"gate_activation": "hard_sigmoid"}, None, "lstm_general:hard_sigmoid,tanh,tanh,0"),
    "cell_clip": ({"cell_clip": CLIP}, None, f"lstm_general:sigmoid,tanh,tanh,{CLIP}"),
    "num_heads": ({"num_heads": HEADS}, None, "lstm"),
    "slstm": ({}, "SLSTM", "slstm"),
    "indrnn": ({}, "IndRNN", "indrnn"),
    "layer_norm_lstm": ({}, "LayerNormLSTM", "lstm_norm"),
    "layer_norm_gru": ({}, "LayerNormGRU", "gru_norm"),
    "reset_before": ({"reset_after": False}, None, "gru_reset_before"),
}


def lengths_of(shape: Shape) -> Tensor:
    """(B,), steps of each sequence of a padded batch: those of the packed one, shuffled."""
    lengths = torch.tensor(dataclasses.replace(shape, packed=True).lengths)
    return lengths[torch.randperm(shape.B, generator=torch.Generator().manual_seed(SEED))]


def resets_of(shape: Shape) -> Tensor:
    """(T, B) of bool."""
    return torch.rand(shape.T, shape.B, generator=torch.Generator().manual_seed(SEED)) < 1 / EPISODE


def settings(case: Case) -> dict:
    """The keywords with which fusedrnn's constructor asks for the case's option."""
    if case.option in ZONEOUTS:
        return {"zoneout": ZONEOUT[case.cell]}
    if case.option in RATES:
        return {case.option: RATES[case.option]}
    if case.option in FORMS:
        return FORMS[case.option][0]
    return {"save": "states"} if case.option == "save" else {}


def asked(layer: torch.nn.Module, case: Case) -> torch.nn.Module:
    """fusedrnn's layer, made with `settings`, called with the arguments that ask for the case's option."""
    arguments = {"lengths": lengths_of, "reset": resets_of}
    if case.option in arguments:
        return Asked(layer, **{case.option: arguments[case.option](case.shape)})
    return AskedStates(layer) if case.option == "return_states" else layer


def written(layer: torch.nn.Module, case: Case) -> torch.nn.Module:
    """torch.nn's layer with what one writes around it, or instead of it, for the case's option."""
    if case.option == "lengths":
        return Packed(layer, lengths_of(case.shape))
    if case.option in FORMS:
        return Steps(layer, case)
    if case.option in ("weight_dropout", "save"):
        return (WeightDropped if case.option == "weight_dropout" else Checkpointed)(layer)
    return Loop(layer, case)


class Around(torch.nn.Module):
    """A module with the parameters of `layer`, which `inner`, by default the layer itself, computes with."""

    num_layers = 1  # by which fusedrnn.testing tells a layer from a cell

    def __init__(self, layer: torch.nn.Module, inner: torch.nn.Module | None = None):
        super().__init__()
        self.inner = (inner or layer,)  # in a tuple, lest its parameters be found a second time
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for inner in self.inner:
            if hasattr(inner, "flatten_parameters"):
                inner.flatten_parameters()  # for cuDNN
        return self


class Asked(Around):
    """fusedrnn's layer, called with tensors by name."""

    def __init__(self, layer: torch.nn.Module, **tensors: Tensor):
        super().__init__(layer)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, input: Tensor):
        return self.inner[0](input, **self._buffers)


class AskedStates(Around):
    """fusedrnn's LSTM: (h, c) of every step."""

    def forward(self, input: Tensor):
        output, _, (_, c) = self.inner[0](input, return_states=True)
        return output, c[0]


class Packed(Around):
    """Sequences of any lengths and order, packed for the layer, and its output padded again."""

    def __init__(self, layer: torch.nn.Module, lengths: Tensor):
        super().__init__(layer)
        self.lengths = lengths  # wanted on the CPU

    def forward(self, input: Tensor):
        output, hidden = self.inner[0](pack_padded_sequence(input, self.lengths, enforce_sorted=False))
        return pad_packed_sequence(output, total_length=len(input))[0], hidden


class WeightDropped(Around):
    """The layer with another weight_hh."""

    def forward(self, input: Tensor):
        weight = self.weight_hh_l0
        dropped = weight * drawn(torch.ones_like(weight, dtype=torch.float32), "weight_dropout", weight.dtype)
        return torch.func.functional_call(self.inner[0], {"weight_hh_l0": dropped}, (input,))


class Checkpointed(Around):
    """The layer, run once more in backward."""

    def forward(self, input: Tensor):
        return torch.utils.checkpoint.checkpoint(self.inner[0], input, use_reentrant=False)


class Loop(Around):
    """torch.nn's cell in a loop over steps, with the operations on its states that the case's option stands for.

    A GRU adds h to the result as well as multiplying it by weight_hh, and recurrent dropout is of the product alone: its
    cell cannot say that, and is written out.
    """

    def __init__(self, layer: torch.nn.Module, case: Case):
        self.lstm = case.cell == "lstm"
        cell = (torch.nn.LSTMCell if self.lstm else torch.nn.GRUCell)(case.shape.I, case.shape.H)
        for name, parameter in layer.named_parameters():
            setattr(cell, name.removesuffix("_l0"), parameter)
        super().__init__(layer, cell)
        from fusedrnn.reference import gru  # which need not be built where this file is read

        self.gru, self.option = gru, case.option
        zoneout = ZONEOUT[case.cell] if case.option in ZONEOUTS else ()
        self.zoneout = zoneout if isinstance(zoneout, tuple) else (zoneout,)
        self.register_buffer("reset", resets_of(case.shape) if case.option == "reset" else None, persistent=False)

    def forward(self, input: Tensor):
        (cell,) = self.inner
        T, B, _ = input.shape
        states = (input.new_zeros(B, cell.hidden_size),) * (2 if self.lstm else 1)
        kept = None if self.reset is None else (~self.reset).to(input.dtype).unsqueeze(-1).unbind(0)
        olds, mask = self.zoneout, None
        if self.zoneout and self.training:
            empty = lambda: torch.empty(T, B, cell.hidden_size, device=input.device)  # noqa: E731
            olds = [empty().bernoulli_(rate).to(input.dtype).unbind(0) for rate in self.zoneout]
        if self.option == "recurrent_dropout":
            mask = drawn(torch.ones(B, cell.hidden_size, device=input.device), self.option, input.dtype)
        every = []
        for t, x in enumerate(input.unbind(0)):
            if kept is not None:
                states = tuple(kept[t] * state for state in states)
            h = states[0] if mask is None else states[0] * mask
            if self.lstm:
                new = cell(x, (h, states[1]))
            elif mask is None:
                new = (cell(x, h),)
            else:
                new = self.gru(linear(x, cell.weight_ih, cell.bias_ih), linear(h, cell.weight_hh, cell.bias_hh), states)
            if olds:
                now = [old[t] for old in olds] if self.training else olds
                new = tuple(torch.lerp(fresh, before, old) for fresh, before, old in zip(new, states, now))
            states = new
            every.append(states)
        output = torch.stack([h for h, *_ in every])
        if self.option == "return_states":
            return output, torch.stack([c for _, c in every])
        h, *c = (state.unsqueeze(0) for state in states)
        return output, (h, *c) if c else h


class Steps(Around):
    """A cell that torch has not, step by step in plain torch: fusedrnn's reference.

    Its parameters are torch's where they have the same shapes, and parts of them where they are smaller.
    """

    def __init__(self, layer: torch.nn.Module, case: Case):
        super().__init__(layer)
        H, option = case.shape.H, case.option
        self.option, self.cell = option, FORMS[option][2]
        smaller = {"num_heads": lambda w: w[:, : H // HEADS], "indrnn": lambda w: w[:1], "coupled": lambda w: w[: 3 * H]}
        for name, parameter in list(self.named_parameters()):
            if option in smaller and (option == "coupled" or name == "weight_hh_l0"):
                self.register_parameter(name, torch.nn.Parameter(smaller[option](parameter.detach()).clone()))
        if option == "peepholes":
            self.register_parameter("weight_ch_l0", torch.nn.Parameter(layer.weight_hh_l0.detach()[:3].clone()))
        self.normed = option.startswith("layer_norm")
        if self.normed:
            gain = torch.ones_like(layer.weight_ih_l0.detach()[:, 0])
            for name in ("norm_ih_l0", "norm_hh_l0"):
                self.register_parameter(name, torch.nn.Parameter(gain.clone()))
            if case.cell == "lstm":
                self.register_parameter("norm_c_l0", torch.nn.Parameter(torch.stack([gain[:H], torch.zeros_like(gain[:H])])))

    def forward(self, input: Tensor):
        from fusedrnn.normed import group_normed, normed_gates  # as above
        from fusedrnn.reference import layer

        if self.normed:  # the input's products are one, and normalised at once
            ((group,),), ((gain,),) = group_normed(self.cell, list(self.parameters()), True, 1, 1)
            input, weights = normed_gates(input, [group], [gain], None, False)
            return self.results(*layer(self.cell, input, None, None, weights))
        weight_ih, weight_hh, bias_ih, bias_hh, *fifth = self.parameters()
        if self.option == "num_heads":
            units = weight_hh.shape[1]
            each = weight_hh.unflatten(0, (-1, HEADS, units)).unbind(1)
            weight_hh = torch.stack([torch.block_diag(*gate) for gate in zip(*each)]).flatten(0, 1)
        return self.results(*layer(self.cell, input, None, None, [(weight_ih, weight_hh, bias_ih, bias_hh, *(fifth or [None]))]))

    @staticmethod
    def results(output: Tensor, hy: Tensor, cy: Tensor | None, _: Tensor | None):
        return output, hy if cy is None else (hy, cy) if cy.dim() == 3 else (hy, *cy)


def drawn(ones: Tensor, option: str, dtype: torch.dtype) -> Tensor:
    """The mask of an option, shaped as `ones`: zeros, and 1 / (1 - rate)."""
    return torch.dropout(ones, RATES[option], True).to(dtype)
