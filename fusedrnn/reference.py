"""The readable truth: every cell and the scan over time, in plain torch.

One step of each cell, then the loop that carries a state through a sequence. Any dtype, any device, differentiable any
number of times. The engine is tested against this file in float64, and second derivatives run through it. It is slow.

Shapes: T steps, B sequences, I inputs, H hidden units, P = proj_size or H, G gates, D directions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""One direction: weight_ih `(G*H, I)`, weight_hh `(G*H, P)`, bias_ih `(G*H,)`, bias_hh `(G*H,)`, weight_hr (P, H)."""


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


Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
CELLS: dict[str, Step] = {"rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "lstm": lstm, "gru": gru}


class Carry(NamedTuple):
    """What becomes of the states between steps, besides what the cell makes of them."""

    reset: Tensor | None = None
    """Where a sequence of its own begins, from states of zeros: (T, B) of bool; packed (N,)."""
    zoneout: Tensor | None = None
    """How much of each of the S states stays what it was: (T, B, D, S, H), packed (N, D, S, H), or of all rows alike (D, S, H)."""
    hidden_mask: Tensor | None = None
    """What h is multiplied by before weight_hh is: (D, B, H)."""


NO_CARRY = Carry()


def scan(step: Step, inputs: list[Tensor], states: tuple[Tensor, ...], weights: Weights, reverse: bool,
         lengths: Tensor | None = None, reset: list[Tensor] | None = None, zoneout: list[Tensor] | None = None,
         hidden_mask: Tensor | None = None) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Carry the states through one direction of one layer.

    Args:
        step: a cell's, of `CELLS`.
        inputs: one (b, I) tensor a step. b never grows: of B sequences sorted by length, the first b still run.
        states: before the first step, (h (B, P),) or (h (B, P), c (B, H)).
        weights: of this direction, as `Weights` says.
        reverse: from the last step to the first.
        lengths: (B,), the steps that each sequence has, if not all of them; every x is (B, I) then.
        reset, zoneout: (b,) and (b, S, H) for each step, as in `Carry`. In reverse a sequence begins with its last step.
        hidden_mask: (B, H).

    Returns:
        the states after each step, (b, P) or (b, H) each, in the order of `inputs`; and those after the last step taken.
    """
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    outputs = []
    for t in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        x = inputs[t]
        running = tuple(state[: len(x)] for state in states)
        if reset is not None and (not reverse or t + 1 < len(inputs)):
            anew = reset[t + 1 if reverse else t]
            if reverse and lengths is not None:
                anew = anew & (t + 1 < lengths)
            kept = len(anew)
            running = tuple(torch.cat([torch.where(anew.unsqueeze(-1), 0, state[:kept]), state[kept:]]) for state in running)
        h = running[0] if hidden_mask is None else running[0] * hidden_mask[: len(x)]
        new = step(linear(x, weight_ih, bias_ih), linear(h, weight_hh, bias_hh), running)
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


def layer(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: list[Weights],
          ragged: Tensor | None = None, batch_first: bool = False,
          carry: Carry = NO_CARRY) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer with all its directions: what `autograd.layer` computes, step by step.

    Args:
        cell: a key of `CELLS`.
        input: (T, B, I); (B, T, I) if batch_first; or the data (N, I) of a PackedSequence.
        hx, cx: (D, B, P) and (D, B, H), or None for zeros. cx for "lstm" only.
        weights: one tuple a direction; direction 1 runs in reverse.
        ragged: batch_sizes (T,) of a PackedSequence, or the lengths (B,) of padded sequences; None: all have T steps.
        batch_first: see input.
        carry: (T, B) and so on also if batch_first.

    Returns:
        output `(T, B, D*P)` or `(N, D*P)`; hy (D, B, P); cy (D, B, H), None but for "lstm"; and likewise c after each step,
        (T, B, D, 1, H) or (N, D, 1, H).

    >>> m = torch.nn.GRU(3, 5)
    >>> output, hy, _, _ = layer("gru", torch.randn(7, 2, 3), None, None, [(*m.parameters(), None)])
    >>> output.shape, hy.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    packed = input.dim() == 2
    lengths = None if packed or ragged is None else ragged.to(input.device)
    if lengths is not None:  # what lies behind an end is multiplied by zeros below, and may be NaN
        runs = torch.arange(input.size(1 if batch_first else 0), device=input.device) < lengths.unsqueeze(-1)
        input = torch.where((runs if batch_first else runs.transpose(0, 1)).unsqueeze(-1), input, 0)
    if packed:
        inputs = list(input.split(ragged.tolist()))  # type: ignore[union-attr]
    else:
        inputs = list((input.transpose(0, 1) if batch_first else input).unbind(0))
    batch = len(inputs[0])
    outputs, inner, last = [], [], []
    join = torch.cat if packed else torch.stack

    def steps_of(rows: Tensor) -> list[Tensor]:
        return list(rows.split(ragged.tolist()) if packed else rows.unbind(0))  # type: ignore[union-attr]

    reset = None if carry.reset is None else steps_of(carry.reset)
    for d, direction in enumerate(weights):
        _, weight_hh, _, _, weight_hr = direction
        P = weight_hh.size(1)
        H = P if weight_hr is None else weight_hr.size(1)
        states = (input.new_zeros(batch, P) if hx is None else hx[d],)
        if cell == "lstm":
            states += (input.new_zeros(batch, H) if cx is None else cx[d],)
        zoneout = None
        if carry.zoneout is not None:
            alike = carry.zoneout.dim() == 3
            zoneout = [carry.zoneout[d]] * len(inputs) if alike else steps_of(carry.zoneout.select(-3, d))
        mask = None if carry.hidden_mask is None else carry.hidden_mask[d]
        each, states = scan(CELLS[cell], inputs, states, direction, d == 1, lengths, reset, zoneout, mask)
        output, *others = (join(state) for state in zip(*each))
        outputs.append(output)
        inner += others
        last.append(states)
    hy, *cy = (torch.stack(state) for state in zip(*last))
    return torch.cat(outputs, -1), hy, cy[0] if cy else None, torch.stack(inner, -2).unsqueeze(-2) if cy else None
