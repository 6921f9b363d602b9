"""Learns to write text a character at a time, by default like the source of the Python that runs it.

    python -m examples.characters                      the standard library's *.py
    python -m examples.characters --data FILE          another text
    python -m examples.characters --cell LSTM --hidden 512 --temperature 0.5

First a plain RNN written out in numpy, forward, backward through time and Adagrad, takes the same steps from the same
weights as the modules: the losses must agree. Then a larger model reads the text as many streams at once; each stream's
state is carried from one piece to the next, its gradient is not. What the model writes is printed as it learns, and its
score is the bits it needs for a character of text that it has never seen.
"""

import argparse
import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import common

LENGTH, HELD = 1_500_000, 0.1  # characters that are read at most, and the part of them that is kept for the test
STEPS_BY_HAND, HIDDEN_BY_HAND, PIECE_BY_HAND, RATE_BY_HAND, CLIP = 100, 100, 25, 0.1, 5.0
TOLERANCE = 1e-8  # of a loss in float64, after STEPS_BY_HAND steps


class Writer(nn.Module):
    """Scores of the next character by the characters so far."""

    def __init__(self, package, cell: str, characters: int, hidden: int):
        super().__init__()
        self.characters = characters
        self.rnn = getattr(package, cell)(characters, hidden)
        self.linear = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state=None):
        """(scores (T, B, characters), state after them) of text (T, B)."""
        one_hot = nn.functional.one_hot(text, self.characters).to(self.linear.weight.dtype)
        output, state = self.rnn(one_hot, state)
        return self.linear(output), state


class ByHand:
    """Writer's RNN for one stream, with its loss, its gradients and its optimizer, in numpy."""

    def __init__(self, model: Writer):
        self.weights = {name.split(".")[1]: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
        self.squares = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.h = np.zeros(HIDDEN_BY_HAND)

    def step(self, text, targets) -> float:
        """Reads a piece, moves the weights, keeps the state for the next piece; the mean loss of a character."""
        w, h, p, loss = self.weights, [self.h], [], 0.0
        for x, target in zip(text, targets):
            h.append(np.tanh(w["weight_ih_l0"][:, x] + w["bias_ih_l0"] + w["weight_hh_l0"] @ h[-1] + w["bias_hh_l0"]))
            scores = w["weight"] @ h[-1] + w["bias"]
            p.append(np.exp(scores - scores.max()))
            p[-1] /= p[-1].sum()
            loss -= np.log(p[-1][target]) / len(text)
        grads, from_later = {name: np.zeros_like(weight) for name, weight in w.items()}, 0.0
        for t in reversed(range(len(text))):
            of_scores = (p[t] - np.eye(len(p[t]))[targets[t]]) / len(text)
            grads["weight"] += np.outer(of_scores, h[t + 1])
            grads["bias"] += of_scores
            of_sum = (w["weight"].T @ of_scores + from_later) * (1 - h[t + 1] ** 2)
            grads["weight_ih_l0"][:, text[t]] += of_sum
            grads["weight_hh_l0"] += np.outer(of_sum, h[t])
            for bias in ("bias_ih_l0", "bias_hh_l0"):
                grads[bias] += of_sum
            from_later = w["weight_hh_l0"].T @ of_sum
        for name, grad in grads.items():
            grad = grad.clip(-CLIP, CLIP)
            self.squares[name] += grad * grad
            w[name] -= RATE_BY_HAND * grad / (np.sqrt(self.squares[name]) + 1e-10)
        self.h = h[-1]
        return loss


def compare_by_hand(args, text: Tensor, characters: int) -> float:
    """Trains by hand and with the modules, in float64; how far the losses of a step are apart at most."""
    models = common.build(args, lambda package: Writer(package, "RNN", characters, HIDDEN_BY_HAND).double())
    by_hand = ByHand(next(iter(models.values())))
    optimizers = {name: torch.optim.Adagrad(model.parameters(), RATE_BY_HAND) for name, model in models.items()}
    states, seconds, apart = dict.fromkeys(models), dict.fromkeys(["by hand", *models], 0.0), 0.0
    print(f"The loss of a plain RNN of {HIDDEN_BY_HAND} units, one stream, pieces of {PIECE_BY_HAND}:\n"
          "  step" + "".join(f"{name:>14}" for name in seconds))
    for step in range(STEPS_BY_HAND):
        piece = text[step * PIECE_BY_HAND : (step + 1) * PIECE_BY_HAND + 1]
        losses, start = {}, time.perf_counter()
        losses["by hand"] = by_hand.step(piece[:-1].numpy(), piece[1:].numpy())
        seconds["by hand"] += time.perf_counter() - start
        for name, model in models.items():
            start = time.perf_counter()
            scores, state = model(piece[:-1, None], states[name])
            loss = nn.functional.cross_entropy(scores[:, 0], piece[1:])
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), CLIP)
            optimizers[name].step()
            states[name], losses[name] = state.detach(), loss.item()
            seconds[name] += time.perf_counter() - start
        apart = max(apart, max(losses.values()) - min(losses.values()))
        assert apart < TOLERANCE, (step, losses)
        if step + 1 in (1, 10, 30, STEPS_BY_HAND):
            print(f"{step + 1:6}" + "".join(f"{loss:14.10f}" for loss in losses.values()))
    print("a step" + "".join(f"{common.duration(total / STEPS_BY_HAND):>14}" for total in seconds.values()))
    return apart


def read(args) -> str:
    """The text of --data, or of the standard library's files in an order drawn by the seed."""
    try:
        if args.data:
            text = args.data.read_text(encoding="utf-8")
        else:
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            random.Random(args.seed).shuffle(files)
            text = "".join(path.read_text(encoding="utf-8") for path in files)
            text = text.encode("ascii", "ignore").decode()
    except (OSError, UnicodeDecodeError) as error:
        raise common.Refused(f"--data: {args.data} cannot be read: {error}") from error
    return text[:LENGTH]


def streams(text: Tensor, batch: int) -> Tensor:
    """(N, batch): a column is a part of the text."""
    return text[: len(text) // batch * batch].view(batch, -1).t().contiguous()


@torch.no_grad()
def bits(model: Writer, text: Tensor) -> float:
    """Bits a character of text (N, B), whose first row is only read."""
    total, state = 0.0, None
    for rows, targets in zip(text[:-1].split(200), text[1:].split(200)):
        scores, state = model(rows, state)
        total += nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / text[1:].numel() / math.log(2)


@torch.no_grad()
def write(args, model: Writer, alphabet: list[str], length: int) -> str:
    """What the model goes on to write after a new line."""
    draw = torch.Generator().manual_seed(args.seed)
    letter, state, text = torch.tensor([[alphabet.index("\n")]]), None, ""
    for _ in range(length):
        scores, state = model(letter, state)
        letter = torch.multinomial(torch.softmax(scores[0] / args.temperature, 1), 1, generator=draw)
        text += alphabet[letter]
    return text
