"""The readable truth: every cell and the scan over time, in plain torch.

One step of each cell, then the loop that carries a state through a sequence. Any dtype, any device, differentiable any
number of times. The engine is tested against this file in float64, and second derivatives run through it. It is slow.

Shapes: T steps, B sequences, I inputs, H hidden units, P = proj_size or H, G gates, D directions, N heads.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""One direction: weight_ih `(G*H, I)`, weight_hh `(G*H, P)` or, of N heads, `(G*H, H/N)`, bias_ih `(G*H,)`, bias_hh `(G*H,)`,
weight_hr (P, H). A weight_ih of shape (0, 0): the input is the gates themselves, those of all directions side by side."""


# A step takes gates_x = x W_ih^T + b_ih and gates_h = h W_hh^T + b_hh, both (B, G*H), and the states before it, each
# (B, H): (h,) or (h, c). It returns the states after it.


def rnn_tanh(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """h' = tanh(gates_x + gates_h). Elman, "Finding structure in time" (1990); torch.nn.RNN.

    Args:
        gates_x: x W_ih^T + b_ih, `(B, G*H)`; G is 1.
        gates_h: h W_hh^T + b_hh, `(B, G*H)`.
        states: those before the step, (h,), each (B, H).

    Returns:
        the states after the step, (h',).
    """
    return (torch.tanh(gates_x + gates_h),)


def rnn_relu(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """h' = max(0, gates_x + gates_h). Le, Jaitly, Hinton, arXiv:1504.00941 (2015); torch.nn.RNN.

    Args:
        gates_x, gates_h, states: as in `rnn_tanh`.

    Returns:
        (h',).
    """
    return (torch.relu(gates_x + gates_h),)


def lstm(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """c' = f c + i g, h' = o tanh(c'). Gers, Schmidhuber, Cummins, "Learning to forget" (2000); torch.nn.LSTM.

    Args:
        gates_x, gates_h: as in `rnn_tanh`; G is 4, in the order i, f, g, o.
        states: (h, c), each (B, H).

    Returns:
        (h', c').
    """
    _, c = states
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """h' = (1 - z) n + z h, n = tanh(n_x + r n_h). Cho and others, arXiv:1406.1078 (2014), as torch.nn.GRU has it:
    the reset gate multiplies after the recurrent product, so the halves of the candidate stay apart.

    Args:
        gates_x, gates_h, states: as in `rnn_tanh`; G is 3, in the order r, z, n.

    Returns:
        (h',).
    """
    (h,) = states
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = gates_h.chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return ((1 - z) * n + z * h,)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1), "tanh": torch.tanh,
    "hard_sigmoid_of_fifths": lambda x: (0.2 * x + 0.5).clamp(0, 1), "relu": torch.relu, "identity": lambda x: x,
}  # fmt: skip
GATE_FUNCTIONS = ("sigmoid", "hard_sigmoid", "hard_sigmoid_of_fifths")
"""Functions of gates. A hard sigmoid's slope is a sixth, as in torch and Keras 3, or a fifth, as in ONNX and Keras before."""
VALUE_FUNCTIONS = ("tanh", "relu", "identity")
"""Functions of candidates and outputs."""


class Choice(NamedTuple):
    """What is chosen of a cell that has a choice."""

    gate: str = "sigmoid"
    candidate: str = "tanh"
    output: str = "tanh"
    clip: float = 0.0
    """How far the cell state may go from zero; 0: anywhere."""

    def of(self, cell: str) -> str:
        """The cell with this choice, as the operators and `step_of` take it.

        Args:
            cell: one of `CHOOSES`.

        Returns:
            its name with the choice behind it.
        """
        return f"{cell}:{self.gate},{self.candidate},{self.output},{self.clip!r}"


def named(cell: str) -> tuple[str, Choice]:
    """What `Choice.of` has put together.

    Args:
        cell: a key of `CELLS`, with a choice behind it, and heads, or without.

    Returns:
        the key, and the choice, or the usual one.
    """
    name, _, words = cell.partition(":")
    gate, candidate, output, clip = words.split(",")[:4] if "," in words else Choice()
    return name, Choice(gate, candidate, output, float(clip))


def with_heads(cell: str, heads: int) -> str:
    """A cell whose units are in heads that know only their own hidden states, as the operators and `step_of` take it.

    Args:
        cell: as `Choice.of` makes it, or a key of `CELLS`.
        heads: how many.

    Returns:
        its name with their number behind it, if there are several.
    """
    return cell if heads == 1 else f"{cell}{',' if ':' in cell else ':'}{heads}"


def heads_of(cell: str) -> int:
    """What `with_heads` was given.

    Args:
        cell: as it returns it.

    Returns:
        the number of heads.
    """
    words = cell.partition(":")[2].split(",")
    return int(words[-1]) if words[0] and len(words) in (1, 5) else 1


def recurrent(h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None) -> Tensor:
    """The products of the hidden state, of heads each with its own units': weight_hh is the blocks of a block-diagonal matrix.

    Args:
        h: (B, P).
        weight_hh: `(G*H, P)`, or `(G*H, H/N)` of N heads.
        bias_hh: `(G*H,)`, None for zeros.

    Returns:
        h W_hh^T + b_hh, `(B, G*H)`.
    """
    units = weight_hh.shape[1]
    if units == h.shape[-1]:
        return linear(h, weight_hh, bias_hh)
    heads = h.unflatten(-1, (-1, units)).transpose(0, 1)  # (N, B, H/N)
    blocks = weight_hh.unflatten(0, (-1, len(heads), units)).transpose(-1, -2)  # (G, N, H/N, H/N)
    products = (heads @ blocks).permute(2, 0, 1, 3).flatten(1)
    return products if bias_hh is None else products + bias_hh


def lstm_general(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...], unit: Tensor | None,
                 choice: Choice) -> tuple[Tensor, ...]:
    """The LSTM with functions to choose, peepholes and a limit c may not pass. Gers, Schraudolph, Schmidhuber, "Learning precise
    timing with LSTM recurrent networks" (2002); the limit: Sak, Senior, Beaufays, arXiv:1402.1128 (2014).

    Args:
        gates_x, gates_h, states: as in `lstm`.
        unit: (3, H), the peepholes from c to i and f, and from c' to o; None: there are none.
        choice: of all four.

    Returns:
        (h', c').
    """
    _, c = states
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    p_i, p_f, p_o = (0, 0, 0) if unit is None else unit
    gate = FUNCTIONS[choice.gate]
    c = _clip(gate(f + p_f * c) * c + gate(i + p_i * c) * FUNCTIONS[choice.candidate](g), choice)
    return gate(o + p_o * c) * FUNCTIONS[choice.output](c), c


def lstm_coupled(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...], unit: Tensor | None,
                 choice: Choice) -> tuple[Tensor, ...]:
    """`lstm_general` whose forget gate is 1 - i: coupled gates, arXiv:1503.04069 (2015).

    Args:
        gates_x, gates_h: as in `rnn_tanh`; G is 3, in the order i, g, o.
        states, choice: as in `lstm_general`.
        unit: (2, H), the peepholes to i and o; None: there are none.

    Returns:
        (h', c').
    """
    _, c = states
    i, g, o = (gates_x + gates_h).chunk(3, -1)
    p_i, p_o = (0, 0) if unit is None else unit
    gate = FUNCTIONS[choice.gate]
    i = gate(i + p_i * c)
    c = _clip((1 - i) * c + i * FUNCTIONS[choice.candidate](g), choice)
    return gate(o + p_o * c) * FUNCTIONS[choice.output](c), c


def _clip(c: Tensor, choice: Choice) -> Tensor:
    return c.clamp(-choice.clip, choice.clip) if choice.clip else c


def gru_general(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...], choice: Choice) -> tuple[Tensor, ...]:
    """`gru` with the functions of its gates and of n to choose.

    Args:
        gates_x, gates_h, states: as in `gru`.
        choice: of gate and candidate.

    Returns:
        (h',).
    """
    (h,) = states
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = gates_h.chunk(3, -1)
    gate = FUNCTIONS[choice.gate]
    r, z = gate(r_x + r_h), gate(z_x + z_h)
    n = FUNCTIONS[choice.candidate](n_x + r * n_h)
    return ((1 - z) * n + z * h,)


def gru_reset_before(gates_x: Tensor, h: Tensor, states: tuple[Tensor, ...], weight_hh: Tensor, bias_hh: Tensor | None,
                     choice: Choice) -> tuple[Tensor, ...]:
    """`gru_general` whose reset gate multiplies before the recurrent product: n = tanh(n_x + W_hn (r h) + b_hn). Cho and others,
    arXiv:1406.1078 (2014), in their own form; Keras' reset_after=False, ONNX's linear_before_reset=0.

    Args:
        gates_x, states: as in `gru`.
        h: (B, H), what weight_hh is to multiply: the state, or what recurrent dropout leaves of it.
        weight_hh, bias_hh: as `recurrent` takes them, of three gates.
        choice: of gate and candidate.

    Returns:
        (h',).
    """
    (before,) = states
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    (w_r, w_z, w_n), (b_r, b_z, b_n) = weight_hh.chunk(3), (None,) * 3 if bias_hh is None else bias_hh.chunk(3)
    gate = FUNCTIONS[choice.gate]
    r, z = gate(r_x + recurrent(h, w_r, b_r)), gate(z_x + recurrent(h, w_z, b_z))
    n = FUNCTIONS[choice.candidate](n_x + recurrent(r * h, w_n, b_n))
    return ((1 - z) * n + z * before,)


def indrnn(gates_x: Tensor, gates_h: Tensor | None, states: tuple[Tensor, ...], unit: Tensor, choice: Choice) -> tuple[Tensor, ...]:
    """h' = f(gates_x + b_hh + u h): each unit remembers itself alone. Li and others, arXiv:1803.04831 (2018).

    Args:
        gates_x: as in `rnn_tanh`.
        gates_h: b_hh, None for zeros.
        states: (h,), (B, H).
        unit: (1, H), u.
        choice: of the output.

    Returns:
        (h',).
    """
    (h,) = states
    return (FUNCTIONS[choice.output](gates_x + (0 if gates_h is None else gates_h) + unit[0] * h),)


def slstm(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """h' = o c' / n' with an exponential input gate, scaled down by exp(m). Beck and others, "xLSTM", arXiv:2405.04517 (2024), with
    the sigmoid as its forget gate.

    Args:
        gates_x, gates_h: as in `rnn_tanh`; G is 4, in the order i, f, g, o.
        states: (h, c, n, m), each (B, H); all zeros at the start of a sequence.

    Returns:
        (h', c', n', m').
    """
    _, c, n, m = states
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    past = torch.nn.functional.logsigmoid(f) + m
    scale = torch.where(n == 0, i, torch.maximum(past, i))
    forget, write = torch.where(n == 0, 0, torch.exp(past - scale)), torch.exp(i - scale)
    c, n = forget * c + write * torch.tanh(g), forget * n + write
    return torch.sigmoid(o) * (c / n), c, n, scale


def lstm_norm(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...], unit: Tensor | None) -> tuple[Tensor, ...]:
    """`lstm` whose recurrent products are normalised, all gates of a row together, and c' on its way out. Ba, Kiros, Hinton,
    arXiv:1607.06450 (2016).

    Args:
        gates_x: as in `lstm`, but normalised already, and with all that shifts the gates.
        gates_h: h W_hh^T, `(B, 4*H)`.
        states: as in `lstm`.
        unit: (6, H), the gains of i, f, g and o, then the gain and the shift of the normalised c'; None for zeros.

    Returns:
        (h', c').
    """
    _, c = states
    unit = c.new_zeros(6, c.shape[-1]) if unit is None else unit
    i, f, g, o = (gates_x + unit[:4].flatten() * layer_norm(gates_h, gates_h.shape[-1:])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(unit[4] * layer_norm(c, c.shape[-1:]) + unit[5]), c


def gru_norm(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...], unit: Tensor | None) -> tuple[Tensor, ...]:
    """`gru` whose recurrent products are normalised, all gates of a row together. Ba, Kiros, Hinton, arXiv:1607.06450 (2016).

    Args:
        gates_x: as in `gru`, but normalised already, and with all that shifts r and z.
        gates_h: h W_hh^T, `(B, 3*H)`.
        states: as in `gru`.
        unit: (4, H), the gains of r, z and n, then the shift of what r multiplies; None for zeros.

    Returns:
        (h',).
    """
    (h,) = states
    unit = h.new_zeros(4, h.shape[-1]) if unit is None else unit
    r_h, z_h, n_h = (unit[:3].flatten() * layer_norm(gates_h, gates_h.shape[-1:])).chunk(3, -1)
    return gru(gates_x, torch.cat([r_h, z_h, n_h + unit[3]], -1), states)


Step = Callable[..., tuple[Tensor, ...]]
CELLS: dict[str, Step] = {
    "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "lstm": lstm, "gru": gru, "lstm_general": lstm_general,
    "lstm_coupled": lstm_coupled, "gru_general": gru_general, "indrnn": indrnn, "slstm": slstm,
    "lstm_norm": lstm_norm, "gru_norm": gru_norm, "gru_reset_before": gru_reset_before,
}  # fmt: skip
INNER = {"lstm": 1, "lstm_general": 1, "lstm_coupled": 1, "slstm": 3, "lstm_norm": 1}
"""How many states a cell has besides h, if any."""
NORMALISES = {"lstm_norm", "gru_norm"}
"""Cells that normalise the products of h, and take those of the input normalised."""
OWN_NUMBERS = {"lstm_general", "lstm_coupled", "indrnn"} | NORMALISES
"""Cells whose units have numbers of their own: in the place of weight_hr, or, of "indrnn", which has no product, of weight_hh."""
CHOOSES = {"lstm_general", "lstm_coupled", "indrnn", "gru_general", "gru_reset_before"}
"""Cells that have a `Choice`."""
MULTIPLIES = {"gru_reset_before"}
"""Cells that multiply by weight_hh themselves, and take h in the place of gates_h."""


def step_of(cell: str, weights: Weights) -> Step:
    """A cell's step without arguments of its own.

    Args:
        cell: a key of `CELLS`, or of one that has a choice also `Choice.of`; `with_heads` or without.
        weights: of the direction.

    Returns:
        (gates_x, gates_h, states) -> the states after the step; of "indrnn" gates_h is bias_hh, and of `MULTIPLIES` it is h.
    """
    name, choice = named(cell)
    step = CELLS[name]
    if name in MULTIPLIES:
        step = partial(step, weight_hh=weights[1], bias_hh=weights[3])
    if name in OWN_NUMBERS:
        step = partial(step, unit=weights[1] if name == "indrnn" else weights[4])
    if name in CHOOSES:
        step = partial(step, choice=choice)
    return step


class Carry(NamedTuple):
    """What becomes of the states between steps, besides what the cell makes of them."""

    reset: Tensor | None = None
    """Where a sequence of its own begins, from the last two: (T, B) of bool; packed (N,)."""
    zoneout: Tensor | None = None
    """How much of each of the S states stays what it was: (T, B, D, S, H), packed (N, D, S, H), or of all rows alike (D, S, H)."""
    hidden_mask: Tensor | None = None
    """What h is multiplied by before weight_hh is: (D, B, H)."""
    reset_hx: Tensor | None = None
    """The hidden states that sequences within a row begin with, shaped as hx; None: zeros. Like the next it may want gradients."""
    reset_cx: Tensor | None = None
    """Likewise the inner states, shaped as cx."""


NO_CARRY = Carry()


def scan(cell: str, inputs: list[Tensor], states: tuple[Tensor, ...], weights: Weights, reverse: bool,
         lengths: Tensor | None = None, reset: list[Tensor] | None = None, zoneout: list[Tensor] | None = None,
         hidden_mask: Tensor | None = None,
         begun: tuple[Tensor, ...] | None = None) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Carry the states through one direction of one layer.

    Args:
        cell: as in `step_of`.
        inputs: one (b, I) tensor a step, or without a weight_ih `(b, G*H)`, the gates of the direction. b never grows: of B
            sequences sorted by length, the first b still run.
        states: before the first step, (h (B, P),) or (h (B, P), c (B, H)), and so on.
        weights: of this direction, as `Weights` says.
        reverse: from the last step to the first.
        lengths: (B,), the steps that each sequence has, if not all of them; every x is (B, I) then.
        reset, zoneout: (b,) and (b, S, H) for each step, as in `Carry`. In reverse a sequence begins with its last step.
        hidden_mask: (B, H).
        begun: the states that sequences within a row begin with, as `states`; None: zeros.

    Returns:
        the states after each step, (b, P) or (b, H) each, in the order of `inputs`; and those after the last step taken.
    """
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    name = cell.partition(":")[0]
    step = step_of(cell, weights)
    if name in OWN_NUMBERS:
        weight_hr = None
    outputs = []
    for t in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        x = inputs[t]
        running = tuple(state[: len(x)] for state in states)
        if reset is not None and (not reverse or t + 1 < len(inputs)):
            anew = reset[t + 1 if reverse else t]
            if reverse and lengths is not None:
                anew = anew & (t + 1 < lengths)
            kept = len(anew)
            running = tuple(torch.cat([torch.where(anew.unsqueeze(-1), 0 if to is None else to[:kept], state[:kept]), state[kept:]])
                            for to, state in zip(begun or (None,) * len(running), running))
        h = running[0] if hidden_mask is None else running[0] * hidden_mask[: len(x)]
        gates_h = bias_hh if name == "indrnn" else h if name in MULTIPLIES else recurrent(h, weight_hh, bias_hh)
        new = step(linear(x, weight_ih, bias_ih) if len(weight_ih) else x, gates_h, running)
        if zoneout is not None:  # Krueger and others, arXiv:1606.01305 (2016)
            new = tuple(z * before + (1 - z) * now for z, before, now in zip(zoneout[t].unbind(-2), running, new))
        if weight_hr is not None:  # Sak, Senior, Beaufays, arXiv:1402.1128 (2014)
            new = (linear(new[0], weight_hr), *new[1:])
        if lengths is not None:  # who has no such step keeps the state, and puts out zeros
            runs = (t < lengths).unsqueeze(-1)
            states = tuple(torch.where(runs, now, before) for now, before in zip(new, states))
            outputs.append(tuple(torch.where(runs, now, 0) for now in new))
            continue
        outputs.append(new)
        # The rows after b have ended (forward) or not yet begun (reverse): they keep the state they have.
        states = tuple(torch.cat([now, before[len(x):]]) for now, before in zip(new, states))
    return outputs[::-1] if reverse else outputs, states


def without_padding(input: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """Padded sequences with zeros behind their ends: what is there may be NaN, and zero times that is not zero.

    Args:
        input: (T, B, I), or (B, T, I) if batch_first.
        lengths: (B,), where the input is.
        batch_first: see input.

    Returns:
        a copy.
    """
    runs = torch.arange(input.size(1 if batch_first else 0), device=input.device) < lengths.unsqueeze(-1)
    return torch.where((runs if batch_first else runs.transpose(0, 1)).unsqueeze(-1), input, 0)


def layer(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: list[Weights],
          ragged: Tensor | None = None, batch_first: bool = False,
          carry: Carry = NO_CARRY) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer with all its directions: what `autograd.layer` computes, step by step.

    Args:
        cell: as in `step_of`.
        input: (T, B, I); (B, T, I) if batch_first; or the data (N, I) of a PackedSequence. Without a weight_ih I is `D*G*H`.
        hx, cx: (D, B, P) and (D, B, H), or None for zeros. cx only for cells of `INNER`, and (3, D, B, H) for "slstm".
        weights: one tuple a direction; direction 1 runs in reverse.
        ragged: batch_sizes (T,) of a PackedSequence, or the lengths (B,) of padded sequences; None: all have T steps.
        batch_first: see input.
        carry: (T, B) and so on also if batch_first.

    Returns:
        output `(T, B, D*P)` or `(N, D*P)`; hy (D, B, P); cy (D, B, H), as cx, or None; and likewise the inner states after each
        step, (T, B, D, 1, H) or (N, D, 1, H), with 3 in the place of 1 for "slstm".

    >>> m = torch.nn.GRU(3, 5)
    >>> output, hy, _, _ = layer("gru", torch.randn(7, 2, 3), None, None, [(*m.parameters(), None)])
    >>> output.shape, hy.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    packed = input.dim() == 2
    lengths = None if packed or ragged is None else ragged.to(input.device)
    if lengths is not None:  # what lies behind an end is multiplied by zeros below
        input = without_padding(input, lengths, batch_first)
    if packed:
        inputs = list(input.split(ragged.tolist()))  # type: ignore[union-attr]
    else:
        inputs = list((input.transpose(0, 1) if batch_first else input).unbind(0))
    batch = len(inputs[0])
    outputs, inner, last = [], [], []
    count = INNER.get(cell.partition(":")[0], 0)
    join = torch.cat if packed else torch.stack

    def steps_of(rows: Tensor) -> list[Tensor]:
        return list(rows.split(ragged.tolist()) if packed else rows.unbind(0))  # type: ignore[union-attr]

    def states_of(h: Tensor | None, c: Tensor | None, d: int) -> tuple[Tensor, ...]:
        _, weight_hh, _, _, weight_hr = weights[d]
        P = weight_hh.size(1) * heads_of(cell)
        H = P if weight_hr is None else weight_hr.size(1)
        states = (input.new_zeros(batch, P) if h is None else h[d],)
        for k in range(count):
            states += (input.new_zeros(batch, H) if c is None else c[d] if count == 1 else c[k, d],)
        return states

    reset = None if carry.reset is None else steps_of(carry.reset)
    for d, direction in enumerate(weights):
        begun = None
        if carry.reset_hx is not None or carry.reset_cx is not None:
            begun = states_of(carry.reset_hx, carry.reset_cx, d)
        zoneout = None
        if carry.zoneout is not None:
            alike = carry.zoneout.dim() == 3
            zoneout = [carry.zoneout[d]] * len(inputs) if alike else steps_of(carry.zoneout.select(-3, d))
        mask = None if carry.hidden_mask is None else carry.hidden_mask[d]
        own = inputs if len(direction[0]) else [x.chunk(len(weights), -1)[d] for x in inputs]
        each, states = scan(cell, own, states_of(hx, cx, d), direction, d == 1, lengths, reset, zoneout, mask, begun)
        output, *others = (join(state) for state in zip(*each))
        outputs.append(output)
        inner += others
        last.append(states)
    hy, *cy = (torch.stack(state) for state in zip(*last))
    output = torch.cat(outputs, -1)
    if not cy:
        return output, hy, None, None
    every = torch.stack(inner, -2).unflatten(-2, (len(weights), count))
    return output, hy, cy[0] if count == 1 else torch.stack(cy), every
