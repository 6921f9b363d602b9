"""Learns to write text a character at a time, by default like the source of the Python that runs it.

    python -m examples.characters                      the standard library's *.py
    python -m examples.characters --data FILE --cell LSTM --hidden 512 --temperature 0.5

First a plain RNN written out in numpy takes the same steps from the same weights as the modules: all losses must agree.
Then a larger model reads the text as many streams at once. The state after a piece is carried to the next one, gradients
are not. It writes as it learns; its score is the bits it needs for a character of text that it has never seen.
"""

import argparse
import math
import sys
from pathlib import Path
from textwrap import indent

import numpy as np
import torch
from torch import Tensor

from . import common
from .writer import CLIP, Writer, read, streams

SHOWN, UNITS, PIECE, RATE = (1, 10, 100, 200, 300), 100, 25, 0.01  # of the comparison with numpy
TOLERANCE = 1e-10  # of each of its losses, in float64; 300 steps multiply rounding little at this rate


class ByHand:
    """Writer's RNN for one stream with its loss, its gradients and Adagrad, in numpy."""

    def __init__(self, model: Writer):
        self.weights = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
        self.squares = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.state = np.zeros(model.rnn.hidden_size)

    def learn(self, piece: np.ndarray) -> float:
        """As Writer.learn, for a piece (T,); it keeps the state itself."""
        w_ih, w_hh, b_ih, b_hh, w, b = self.weights.values()
        h, p, steps = [self.state], [], len(piece) - 1
        for letter in piece[:-1]:
            h.append(np.tanh(w_ih[:, letter] + b_ih + w_hh @ h[-1] + b_hh))
            score = np.exp(w @ h[-1] + b)
            p.append(score / score.sum())
        grads = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        d_ih, d_hh, d_b_ih, d_b_hh, d_w, d_b = grads.values()
        later = 0.0  # the gradient of h[t + 1] by way of the steps behind it
        for t in reversed(range(steps)):
            d_score = p[t] / steps
            d_score[piece[t + 1]] -= 1 / steps
            d_sum = (w.T @ d_score + later) * (1 - h[t + 1] ** 2)
            later = w_hh.T @ d_sum
            d_ih[:, piece[t]] += d_sum
            for total, term in ((d_hh, np.outer(d_sum, h[t])), (d_b_ih, d_sum), (d_b_hh, d_sum),
                                (d_w, np.outer(d_score, h[t + 1])), (d_b, d_score)):  # fmt: skip
                total += term
        for name, grad in grads.items():
            grad = grad.clip(-CLIP, CLIP)
            self.squares[name] += grad**2
            self.weights[name] -= RATE * grad / (np.sqrt(self.squares[name]) + 1e-10)
        self.state = h[-1]
        return -float(np.mean([np.log(p[t][piece[t + 1]]) for t in range(steps)]))


def compare_by_hand(args, text: Tensor, characters: int) -> float:
    """Trains numpy's and the modules' RNN in turns, step by step: how far their losses are apart at most."""
    models = common.build(args, lambda package: Writer(package, "RNN", characters, UNITS).double())
    by_hand, states = ByHand(next(iter(models.values()))), {}
    optimizers = {name: torch.optim.Adagrad(model.parameters(), RATE) for name, model in models.items()}
    race = common.Race({"numpy": by_hand, **models}, SHOWN[-1], 1)
    losses = {name: [] for name in race.models}
    print(f"a plain RNN of {UNITS} units, one stream, pieces of {PIECE} characters, float64; mean loss since the row above\n"
          "  step" + "".join(f"{name:>18}" for name in losses))
    for step, name, model in race:
        piece = text[(step - 1) * PIECE : step * PIECE + 1]
        if model is by_hand:
            loss = by_hand.learn(piece.numpy())
        else:
            loss, states[name] = model.learn(optimizers[name], piece[:, None], states.get(name))
        losses[name].append(loss)
        race.stop()
        race.step()
        if step in SHOWN and name == list(losses)[-1]:
            since = (0, *SHOWN)[SHOWN.index(step)]
            race.print(f"{step:6}" + "".join(f"{np.mean(values[since:]):18.13f}" for values in losses.values()))
    apart = max(max(row) - min(row) for row in zip(*losses.values()))
    assert apart < TOLERANCE, apart
    print(f"no step's losses differ by more than {apart:.0e}{race.speed_up('a step')}\n")
    return apart


def parse() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, hidden=128, batch=16, piece=50, epochs=8, steps=120)
    parser.add_argument("--cell", choices=["RNN", "LSTM", "GRU"], default="GRU", type=str.upper, help="default GRU")
    parser.add_argument("--data", type=Path, metavar="FILE", help="a text in UTF-8")
    parser.add_argument("--temperature", type=float, default=0.5, help="default 0.5")
    return parser


def run(args) -> str:
    text = read(args.data, args.seed)
    alphabet = "".join(sorted({"\n", *text}))
    number = {letter: i for i, letter in enumerate(alphabet)}
    numbers = torch.tensor([number[letter] for letter in text])
    held = len(text) // 10
    wanted = 10 * max(PIECE * SHOWN[-1], args.batch * (args.piece + 1))
    if len(text) < wanted or not args.temperature > 0:
        raise common.Refused(f"a text of {wanted:,} characters and a temperature above 0 are wanted, "
                             f"got {len(text):,} and {args.temperature}")
    apart = compare_by_hand(args, numbers, len(alphabet))
    print(f"{len(text) - held:,} characters to learn from, {held:,} to test, {len(alphabet)} different ones; {args.cell} of "
          f"{args.hidden} units, {args.batch} streams, pieces of {args.piece}, {args.steps} an epoch; bits a character")
    learn, test = (streams(part, args.batch) for part in (numbers[:-held], numbers[-held:]))
    models = common.build(args, lambda package: Writer(package, args.cell, len(alphabet), args.hidden))
    optimizers = {name: torch.optim.Adam(model.parameters(), 0.01) for name, model in models.items()}
    race, states, scores = common.Race(models, args.epochs, args.steps), {}, {}
    for epoch, name, model in race:
        losses = []
        for step in range((epoch - 1) * args.steps, epoch * args.steps):
            first = step % ((len(learn) - 1) // args.piece) * args.piece  # 0: the streams begin, no state is carried
            piece = learn[first : first + args.piece + 1]
            loss, states[name] = model.learn(optimizers[name], piece, states[name] if first else None)
            losses.append(loss / math.log(2))
            race.step()
        race.stop()
        scores[name] = model.bits(test)
        race.print(f"epoch {epoch}, {name}: learning {np.mean(losses):.4f}, unseen text {scores[name]:.4f}")
        if name == list(models)[-1]:
            sample = model.write(alphabet, 240, args.temperature, args.seed + epoch).strip()
            race.print(indent(sample, "    | ", lambda line: True) + "\n")
    score = ", ".join(f"{score:.3f} with {name}" for name, score in scores.items())
    return (f"{args.cell} needs for a character of unseen text, in bits: {score}; by hand in numpy, losses of "
            f"{SHOWN[-1]} steps differ by at most {apart:.0e}{race.speed_up(f'an epoch of {args.steps} steps')}")


if __name__ == "__main__":
    sys.exit(common.main(parse, run))
