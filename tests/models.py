"""Small models with a recurrent layer or cell in the middle."""

import pytest
import torch
from torch import nn

import fusedrnn

KINDS = ["RNN", "LSTM", "GRU"]
kinds = pytest.mark.parametrize("kind", KINDS)
all_kinds = pytest.mark.parametrize("kind", KINDS + ["RNNCell", "LSTMCell", "GRUCell"])


class Model(nn.Module):
    """A recurrent layer or cell between two others."""

    def __init__(self, kind, home=fusedrnn, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(3, 4)
        self.middle = getattr(home, kind)(4, 5, **options)
        self.after = nn.Linear(10 if options.get("bidirectional") else 5, 2)

    def forward(self, input, lengths=None):
        middle = self.middle(self.before(input)) if lengths is None else self.middle(self.before(input), lengths=lengths)
        while isinstance(middle, (tuple, list)):
            middle = middle[0]
        return self.after(middle)


def input_for(kind):
    return torch.randn((2, 3) if "Cell" in kind else (6, 2, 3))
