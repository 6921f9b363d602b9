"""A model that writes text a character at a time, and the text that it reads."""

import math
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from .common import Refused

LENGTH = 600_000  # characters of a text that are read
CLIP = 5.0  # no element of a gradient is larger


def read(path: Path | None, seed: int) -> str:
    """The text in a file, or the running Python's standard library, its files in an order drawn by the seed."""
    if not path:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        random.Random(seed).shuffle(files)
        return "".join(file.read_bytes().decode("ascii", "ignore") for file in files)[:LENGTH]
    try:
        return path.read_text(encoding="utf-8")[:LENGTH]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--data: {path} cannot be read: {error}") from error


def streams(text: Tensor, batch: int) -> Tensor:
    """(N, batch): each column is a part of the text."""
    return text[: len(text) // batch * batch].view(batch, -1).t().contiguous()


class Writer(nn.Module):
    """Scores of the next character by those so far."""

    def __init__(self, package, cell: str, characters: int, hidden: int):
        super().__init__()
        self.rnn = getattr(package, cell)(characters, hidden)
        self.linear = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state=None):
        """(scores (T, B, characters), state after them) of text (T, B)."""
        one_hot = nn.functional.one_hot(text, self.rnn.input_size).to(self.linear.weight.dtype)
        output, state = self.rnn(one_hot, state)
        return self.linear(output), state

    def learn(self, optimizer, piece: Tensor, state) -> tuple[float, Tensor | tuple]:
        """Reads all but the last row of the piece, guesses all but the first: (mean loss, state to carry on with)."""
        scores, state = self(piece[:-1], state)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), piece[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(self.parameters(), CLIP)
        optimizer.step()
        return loss.item(), tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()

    @torch.no_grad()
    def bits(self, text: Tensor) -> float:
        """Bits a character of text (N, B), whose first row is only read."""
        total, state = 0.0, None
        for letters, targets in zip(text[:-1].split(200), text[1:].split(200)):
            scores, state = self(letters, state)
            total += nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum").item()
        return total / text[1:].numel() / math.log(2)

    @torch.no_grad()
    def write(self, alphabet: str, length: int, temperature: float, seed: int) -> str:
        """What the model goes on to write after a new line; the lower the temperature, the less it dares."""
        random = torch.Generator().manual_seed(seed)
        letter, state, text = torch.tensor([[alphabet.index("\n")]]), None, ""
        for _ in range(length):
            scores, state = self(letter, state)
            letter = torch.multinomial((scores[0] / temperature).softmax(1), 1, generator=random)
            text += alphabet[letter]
        return text
