"""Recurrent layers as functions of their weights, and the stack of layers that the modules run.

`rnn`, `rnn_tanh`, `rnn_relu`, `lstm` and `gru` take what torch.lstm and its kin take, in the same order; the padded and
the packed form are one function, told apart by `batch_sizes`. Shapes and gate order are torch's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, _VF

from . import autograd, masks, select, stacks
from .normed import group_normed, normed_gates
from .reference import INNER, NO_CARRY, NORMALISES, Carry, Weights, heads_of
from .shared import signature_of


def group_weights(params: Sequence[Tensor | None], has_biases: bool, num_layers: int,
                  num_directions: int) -> list[list[Weights]]:
    """Cut torch's flat list of weights into layers of directions.

    Args:
        params, has_biases, num_layers: as in `lstm`.
        num_directions: 1 or 2.

    Returns:
        for each layer, for each direction: (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), None if absent.

    Raises:
        ValueError: the count is that of no layer. A direction has 2 weights, 2 biases if has_biases, and 1 projection
            or none, or peepholes in its place.
    """
    if len(params) == 4 and has_biases and num_layers == num_directions == 1:  # by far the most frequent call
        return [[(*params, None)]]  # type: ignore[list-item]
    bare = 4 if has_biases else 2
    directions = num_layers * num_directions
    size = len(params) // directions
    if size * directions != len(params) or not bare <= size <= bare + 1:
        raise ValueError(
            f"fusedrnn.functional: params must hold {bare} tensors, or {bare + 1} with projections, for each of "
            f"{num_layers} layers and {num_directions} directions, got {len(params)} tensors in all"
        )
    grouped: list[Any] = []
    for at in range(0, len(params), size):
        bias_ih, bias_hh = params[at + 2: at + 4] if has_biases else (None, None)
        weight_hr = params[at + bare] if size > bare else None
        grouped.append((params[at], params[at + 1], bias_ih, bias_hh, weight_hr))
    return [grouped[at: at + num_directions] for at in range(0, directions, num_directions)]


class Options(NamedTuple):
    """What a stack of layers can do that torch.nn's cannot. The masks are torch's own generator's, drawn layer after layer."""

    reset: Tensor | None = None
    """(T, B) of bool: where a sequence of its own begins, from the last two."""
    zoneout: tuple[float, ...] = ()
    """For each state the probability with which a number of it stays what it was; not training, how much of it does."""
    recurrent_dropout: float = 0.0
    """The probability with which a number of h is zeroed where weight_hh multiplies it: at all steps alike, if training."""
    weight_dropout: float = 0.0
    """The probability with which a number of weight_hh is zeroed, if training."""
    recompute: bool = False
    """Whether only the states are kept for backward, and the gates made again there."""
    return_states: bool = False
    """Whether the last result of `stack` is wanted."""
    reset_hx: Tensor | None = None
    """The hidden states that these begin with, of all layers, shaped as hx; None: zeros."""
    reset_cx: Tensor | None = None
    """Likewise the inner states, shaped as cx."""

    def carry(self, cell: str, input: Tensor, weights: list[Weights], ragged: Tensor | None, batch_first: bool,
              train: bool) -> Carry:
        """The masks of a layer.

        Args:
            cell, input, ragged, batch_first: as in `fusedrnn.autograd.layer`.
            weights: of the layer.
            train: whether masks are drawn.

        Returns:
            them, and reset; without the states that sequences begin with.
        """
        directions, hidden = len(weights), weights[0][1].shape[1] * heads_of(cell)
        packed = input.dim() == 2
        zoneout = hidden_mask = None
        if any(self.zoneout):
            steps = input.shape[:1] if packed else input.shape[1::-1] if batch_first else input.shape[:2]
            of_all = (*steps, directions) if train else (directions,)
            zoneout = input.new_empty(*of_all, len(self.zoneout), hidden)
            for k, rate in enumerate(self.zoneout):
                of_state = zoneout.select(-2, k)
                masks.draw(of_state, rate) if train else of_state.fill_(rate)
        if self.recurrent_dropout and train:
            batch = int(ragged[0]) if packed else input.shape[0 if batch_first else 1]  # type: ignore[index]
            hidden_mask = masks.dropout(input.new_ones(directions, batch, hidden), self.recurrent_dropout)
        if self.reset is None and zoneout is None and hidden_mask is None:
            return NO_CARRY  # by which `fusedrnn.autograd.layer` knows that there is nothing
        return Carry(self.reset, zoneout, hidden_mask)


PLAIN = Options()
"""Nothing of that."""
States = list[tuple[Tensor, ...]]
"""For each layer h after each step `(T, B, D*P)` and, of an lstm, c `(T, B, D*H)`, and so on."""


def stack(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, params: Sequence[Tensor | None],
          has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
          ragged: Tensor | None, options: Options = PLAIN) -> tuple[Tensor, Tensor, Tensor | None, States | None]:
    """Run the engine layer upon layer, on arguments already known to suit it: see `fusedrnn.select`.

    Args:
        cell: the engine's name of it, as in `fusedrnn.reference.step_of`.
        input, has_biases, num_layers, dropout, train, bidirectional, batch_first: as in `lstm`.
        params: as in `lstm`, or, of a cell that normalises, in `fusedrnn.normed.group_normed`.
        ragged: batch_sizes, as in `lstm`, or the lengths (B,) of padded sequences, where the input is; None: all have T steps.
        hx, cx: initial states `(L*D, B, P)` and `(L*D, B, H)`, with more than two `(S-1, L*D, B, H)`, or None for zeros.
        options: what torch has not; resets, recompute and return_states are for padded input.

    Returns:
        output, hy and cy as in `lstm`; cy is None for cells of one state; and, if options.return_states, the states of every step.

    Raises:
        ValueError, RuntimeError: as in `lstm`.
    """
    num_directions = 2 if bidirectional else 1
    if cell in NORMALISES:
        layers, gains = group_normed(cell, params, has_biases, num_layers, num_directions)
    else:
        layers, gains = group_weights(params, has_biases, num_layers, num_directions), None
    if input.dim() == 2 and hx is None:
        hx, cx = zero_states(cell, input, int(ragged[0]), layers)  # type: ignore[index]
    if num_layers == 1 and options is PLAIN and gains is None:
        output, hy, cy, _ = autograd.layer(cell, input, hx, cx, layers[0], ragged, batch_first)
        return output.transpose(0, 1) if batch_first else output, hy, cy, None

    def by_layer(states: Tensor | None) -> Sequence[Any]:
        return (None,) * num_layers if states is None else states.split(num_directions, -3)

    each_hx, each_cx, each_reset_hx, each_reset_cx = map(by_layer, (hx, cx, options.reset_hx, options.reset_cx))
    output, hys, cys, states = input, [], [], []
    may_stack, first = options is PLAIN and gains is None and not (dropout and train), 0
    for k, weights in enumerate(layers):
        if k < first:  # it ran together with the one below
            continue
        count, backward = stacks.layers_at_once(cell, output, layers[k:], ragged, batch_first and k == 0) if may_stack else (1, False)
        if count > 1:
            first = k + count
            h0, c0 = (None if state is None else state[k:first] for state in (hx, cx))
            for output, hy, cy in stacks.stacked(cell, output, h0, c0, layers[k:first], ragged, batch_first and k == 0, backward):
                hys.append(hy)
                cys.append(cy)
            continue
        if k > 0 and dropout and train:
            # torch's own dropout on torch's own layout, so that a seeded run draws the mask torch.nn would draw
            output = torch.dropout(output, dropout, True)
        steps_second = batch_first and k == 0
        carry = NO_CARRY if options is PLAIN else options.carry(cell, output, weights, ragged, steps_second, train)
        if options.reset_hx is not None:
            carry = carry._replace(reset_hx=each_reset_hx[k], reset_cx=each_reset_cx[k])
        if options.weight_dropout and train:
            weights = [(group[0], masks.dropout(group[1], options.weight_dropout), *group[2:]) for group in weights]
        if gains is not None:
            output, weights = normed_gates(output, weights, gains[k], ragged, steps_second)
        output, hy, cy, inner = autograd.layer(cell, output, each_hx[k], each_cx[k], weights, ragged, steps_second, carry,
                                               options.recompute, options.return_states)
        hys.append(hy)
        cys.append(cy)
        states.append((output, *(() if inner is None else (state.flatten(-2) for state in inner.unbind(-2)))))
    hy = torch.cat(hys)
    cy = None if cys[0] is None else torch.cat(cys, -3)  # type: ignore[arg-type]
    return output.transpose(0, 1) if batch_first else output, hy, cy, states if options.return_states else None


def stack_cast(dtype: torch.dtype, cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None,
               params: Sequence[Tensor | None], *options: Any) -> tuple[Tensor, Tensor, Tensor | None, States | None]:
    """`stack` under torch's autocast, which would give a result of this dtype: cast everything to it and run.

    Args:
        dtype: of the result.
        cell, input, hx, cx, params, options: as in `stack`.

    Returns:
        what `stack` does.
    """
    more: Options = options[-1] if isinstance(options[-1], Options) else PLAIN
    tensors: list[Any] = [None if t is None else t.to(dtype) for t in (input, hx, cx, more.reset_hx, more.reset_cx, *params)]
    input, hx, cx, reset_hx, reset_cx, *params = tensors
    if reset_hx is not None:
        options = (*options[:-1], more._replace(reset_hx=reset_hx, reset_cx=reset_cx))
    with torch.autocast(input.device.type, enabled=False):
        return stack(cell, input, hx, cx, params, *options)


def zero_states(cell: str, input: Tensor, batch: int, layers: list[list[Weights]]) -> tuple[Tensor, Tensor | None]:
    """Initial states of zeros.

    Args:
        cell: as in `stack`.
        input: gives dtype and device.
        batch: B.
        layers: as `group_weights` returns them.

    Returns:
        hx `(L*D, B, P)`, and cx as `stack` takes it.
    """
    _, weight_hh, _, _, weight_hr = layers[0][0]
    P = weight_hh.size(1) * heads_of(cell)
    H = P if weight_hr is None else weight_hr.size(1)
    directions = len(layers) * len(layers[0])
    hx, inner = input.new_zeros(directions, batch, P), INNER.get(cell.partition(":")[0], 0)
    return hx, input.new_zeros(*(inner,) * (inner > 1), directions, batch, H) if inner else None


def _run(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, params: Sequence[Tensor], has_biases: bool,
         num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
         batch_sizes: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    states = [state for state in (hx, cx) if state is not None]
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, PLAIN)
    if select.is_ordinary(input, states, params):
        return stack(cell, input, hx, cx, params, *options)[:3]
    reason = select.reason_for_fallback(input, states, params)
    if reason is None:
        onednn = cell == "lstm" and batch_sizes is None and len(params) % 2 == 0
        dtype = select.autocast_dtype(cell, input, hx, onednn)
        run = stack if dtype is None else partial(stack_cast, dtype)
        return run(cell, input, hx, cx, params, *options)[:3]

    if hx is None:
        batch = input.size(0 if batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
        layers = group_weights(params, has_biases, num_layers, 2 if bidirectional else 1)
        hx, cx = zero_states(cell, input, batch, layers)
    hidden = hx if cell != "lstm" else (hx, cx)
    where = (input, hidden) if batch_sizes is None else (input, batch_sizes, hidden)
    tail = (batch_first,) if batch_sizes is None else ()
    result = getattr(_VF, cell)(*where, params, has_biases, num_layers, float(dropout), train, bidirectional, *tail)
    select.warn_once(f"fusedrnn.functional.{cell}", f"torch.{cell}", reason)
    return result if cell == "lstm" else (*result, None)


def lstm(input: Tensor, hx: tuple[Tensor, Tensor] | None, params: Sequence[Tensor], has_biases: bool = True,
         num_layers: int = 1, dropout: float = 0.0, train: bool = False, bidirectional: bool = False,
         batch_first: bool = False, *, batch_sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory: torch.lstm, which needs every argument and an hx, on the fused engine.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, or with batch_sizes the data (N, I) of a PackedSequence.
        hx: h `(L*D, B, P)` and c `(L*D, B, H)`, or None for zeros. Of a PackedSequence: in its sorted order.
        params: for each layer, for each direction: weight_ih `(4H, I or D*P)`, weight_hh (4H, P), then if has_biases
            bias_ih (4H,), bias_hh (4H,), then with projections weight_hr (P, H). Gates in the order i, f, g, o.
        has_biases: whether params has biases.
        num_layers: L, layers one upon the other.
        dropout: probability with which an element between two layers is zeroed, if train.
        train: whether there is dropout.
        bidirectional: D is 2 then, otherwise 1.
        batch_first: see input.
        batch_sizes: (T,) int64 on the CPU; batch_first does not count then.

    Returns:
        output `(T, B, D*P)`, `(B, T, D*P)` or `(N, D*P)`; hy `(L*D, B, P)`; cy `(L*D, B, H)`.

    Raises:
        ValueError: the number of params fits no such layers.
        RuntimeError: a shape does not fit.

    >>> import torch
    >>> m = torch.nn.LSTM(3, 5)
    >>> output, hy, cy = lstm(torch.randn(7, 2, 3), None, list(m.parameters()))
    >>> output.shape, hy.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    h, c = (None, None) if hx is None else hx
    return _run("lstm", input, h, c, params, has_biases, num_layers, dropout, train, bidirectional,
                batch_first and batch_sizes is None, batch_sizes)


def gru(input: Tensor, hx: Tensor | None, params: Sequence[Tensor], has_biases: bool = True, num_layers: int = 1,
        dropout: float = 0.0, train: bool = False, bidirectional: bool = False, batch_first: bool = False, *,
        batch_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit: torch.gru on the fused engine.

    Args:
        hx: `(L*D, B, H)`, or None for zeros.
        params: as in `lstm`, with 3H rows to a weight, gates in the order r, z, n, and without projections.
        input, has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes: as in `lstm`.

    Returns:
        output `(T, B, D*H)`, `(B, T, D*H)` or `(N, D*H)`; hy `(L*D, B, H)`.

    Raises:
        ValueError, RuntimeError: as in `lstm`.

    >>> import torch
    >>> m = torch.nn.GRU(3, 5)
    >>> output, hy = gru(torch.randn(7, 2, 3), None, list(m.parameters()))
    >>> output.shape, hy.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    return _run("gru", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
                batch_first and batch_sizes is None, batch_sizes)[:2]


def rnn(input: Tensor, hx: Tensor | None, params: Sequence[Tensor], has_biases: bool = True, num_layers: int = 1,
        dropout: float = 0.0, train: bool = False, bidirectional: bool = False, batch_first: bool = False, *,
        nonlinearity: str = "tanh", batch_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Elman's network: torch.rnn_tanh or torch.rnn_relu on the fused engine.

    Args:
        params: as in `gru`, with H rows to a weight.
        nonlinearity: "tanh" or "relu".
        input, hx, has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes: as in `gru`.

    Returns:
        output and hy, as in `gru`.

    Raises:
        ValueError: nonlinearity is neither "tanh" nor "relu", or as in `lstm`.
        RuntimeError: as in `lstm`.

    >>> import torch
    >>> m = torch.nn.RNN(3, 5, nonlinearity="relu")
    >>> output, hy = rnn(torch.randn(7, 2, 3), None, list(m.parameters()), nonlinearity="relu")
    >>> output.shape, hy.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return _run(f"rnn_{nonlinearity}", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
                batch_first and batch_sizes is None, batch_sizes)[:2]


@signature_of(gru)
def rnn_tanh(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`rnn` with nonlinearity "tanh".

    Args:
        input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes: as in `rnn`.

    Returns:
        output and hy, as `rnn`.
    """
    return rnn(*args, nonlinearity="tanh", **kwargs)


@signature_of(gru)
def rnn_relu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`rnn` with nonlinearity "relu".

    Args:
        input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes: as in `rnn`.

    Returns:
        output and hy, as `rnn`.
    """
    return rnn(*args, nonlinearity="relu", **kwargs)
