"""What layers that normalise do before the engine runs: their weights in its form, and the products of their input, normalised.

Of layer normalisation, what has nothing to do with the state is one product and one `layer_norm` of all rows of a sequence, in
plain torch; what is inside a step is the engine's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .autograd import input_product
from .reference import Weights, without_padding


def group_normed(cell: str, params: Sequence[Tensor | None], has_biases: bool, num_layers: int,
                 num_directions: int) -> tuple[list[list[Weights]], list[list[Tensor]]]:
    """Cut the flat list of a layer's weights into layers of directions.

    Args:
        cell: "lstm_norm" or "gru_norm".
        params: for each direction weight_ih, weight_hh, bias_ih and bias_hh if has_biases, the gains norm_ih and norm_hh `(G*H,)`,
            and of the LSTM norm_c (2, H), gain and shift of c.
        has_biases, num_layers, num_directions: as in `fusedrnn.functional.group_weights`.

    Returns:
        for each layer, for each direction, the engine's weights, with all that shifts the input's half in the place of bias_ih; and
        likewise norm_ih.
    """
    size = len(params) // (num_layers * num_directions)
    grouped: list[Weights] = []
    gains: list[Tensor] = []
    for at in range(0, len(params), size):
        some: list[Any] = list(params[at: at + size])
        weight_ih, weight_hh = some[:2]
        norm_ih, norm_hh, *rest = some[4 if has_biases else 2:]
        units = weight_hh.shape[1]
        shift, shift_n = None, weight_hh.new_zeros(units)
        if has_biases:
            shift = some[2] + some[3]
            if cell == "gru_norm":  # whose r multiplies what n's product is shifted by
                shift_n = some[3][2 * units:]
                shift = torch.cat([shift[: 2 * units], some[2][2 * units:]])
        rest = rest or [shift_n.unsqueeze(0)]
        grouped.append((weight_ih, weight_hh, shift, None, torch.cat([norm_hh.unflatten(0, (-1, units)), *rest])))
        gains.append(norm_ih)
    starts = range(0, len(grouped), num_directions)
    return [grouped[at: at + num_directions] for at in starts], [gains[at: at + num_directions] for at in starts]


def normed_gates(input: Tensor, weights: list[Weights], gains: list[Tensor], ragged: Tensor | None,
                 batch_first: bool) -> tuple[Tensor, list[Weights]]:
    """The input's half of all gates of a layer.

    Args:
        input, ragged, batch_first: as in `fusedrnn.autograd.layer`.
        weights, gains: of the layer, as `group_normed` returns them.

    Returns:
        what `fusedrnn.autograd.layer` takes in their place: the gates of all directions side by side, and the weights without
        weight_ih.
    """
    if ragged is not None and input.dim() == 3:
        input = without_padding(input, ragged.to(input.device), batch_first)
    gates = [layer_norm(input_product(input, group[0]), gain.shape, gain, group[2]) for group, gain in zip(weights, gains)]
    left: list[Weights] = [(group[1].new_empty(0, 0), group[1], None, None, group[4]) for group in weights]
    return gates[0] if len(gates) == 1 else torch.cat(gates, -1), left
