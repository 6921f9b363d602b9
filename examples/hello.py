"""The first task of many courses: an RNN that reads "hello", a letter a step, learns to answer "ohlol".

    python -m examples.hello

First an RNNCell called in a loop over time and the RNN module, with the same weights: they must give the same numbers.
Then the task, three ways: the cell in a loop, the module, and the module behind an Embedding.
Each learns until it spells the word; the table shows what it spells on the way.
"""

import argparse
import sys

import torch
from torch import Tensor, nn

from . import common

LETTERS, QUESTION, ANSWER = "ehlo", "hello", "ohlol"
HIDDEN = 8
TOLERANCE = 1e-6


def indices(word: str) -> Tensor:
    """"hello" -> [1, 0, 2, 2, 3]."""
    return torch.tensor([LETTERS.index(letter) for letter in word])


class ByCell(nn.Module):
    """One-hot letters into a cell, the loop over time written out; a Linear scores the letters by the hidden state."""

    def __init__(self, package):
        super().__init__()
        self.cell = package.RNNCell(len(LETTERS), HIDDEN)
        self.linear = nn.Linear(HIDDEN, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        """Scores (T, 4) of the answer's letters."""
        hidden, scores = None, []
        for x in nn.functional.one_hot(letters, len(LETTERS)).float():
            hidden = self.cell(x, hidden)
            scores.append(self.linear(hidden))
        return torch.stack(scores)


class ByModule(nn.Module):
    """The same with the module, whose loop it is now."""

    def __init__(self, package):
        super().__init__()
        self.rnn = package.RNN(len(LETTERS), HIDDEN)
        self.linear = nn.Linear(HIDDEN, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        output, _ = self.rnn(nn.functional.one_hot(letters, len(LETTERS)).float())
        return self.linear(output)


class ByEmbedding(nn.Module):
    """Vectors that are learnt too in the place of one-hot letters, and two layers."""

    def __init__(self, package):
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 10)
        self.rnn = package.RNN(10, HIDDEN, 2)
        self.linear = nn.Linear(HIDDEN, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        output, _ = self.rnn(self.embedding(letters))
        return self.linear(output)


WAYS = {"cell": ByCell, "module": ByModule, "embedding": ByEmbedding}


def parse() -> argparse.ArgumentParser:
    return common.parser(__doc__, epochs=100)


def compare(args) -> float:
    """How far the loop over a cell and the module are apart at most, within each package and between them."""
    x = torch.randn(50, 7, 16, generator=torch.Generator().manual_seed(args.seed))  # 50 steps, 7 sequences
    results = []
    for package, module in common.build(args, lambda package: (package, package.RNN(16, 32))).values():
        cell = package.RNNCell(16, 32)
        cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in module.state_dict().items()})
        hidden, loop = None, []
        for step in x:
            hidden = cell(step, hidden)
            loop.append(hidden)
        results += [torch.stack(loop), module(x)[0]]
    apart = max((result - results[0]).abs().max().item() for result in results)
    assert apart < TOLERANCE, apart
    return apart


def learn(args, way: type[nn.Module]) -> tuple[dict[str, int], common.Race]:
    """Trains until all spell ANSWER, printing each new spelling: ({package: epochs it took}, the race)."""
    letters, answer = indices(QUESTION), indices(ANSWER)
    models = common.build(args, way)
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=0.01) for name, model in models.items()}
    spelt, before, took = {}, {}, {}
    race = common.Race(models, args.epochs, 1)
    for epoch, name, model in race:
        scores = model(letters)
        loss = nn.functional.cross_entropy(scores, answer)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        race.stop()
        race.step()
        spelt[name] = "".join(LETTERS[i] for i in scores.argmax(1)), loss.item()
        if spelt[name][0] == ANSWER:
            took.setdefault(name, epoch)
        if name == list(models)[-1]:
            words = {name: word for name, (word, _) in spelt.items()}
            if words != before:
                race.print(f"{epoch:7}" + "".join(f"    {word}  {loss:<10.6f}" for word, loss in spelt.values()).rstrip())
            before = words
            if len(took) == len(models):
                break
    return took, race


def run(args) -> str:
    apart = compare(args)
    print(f"A cell in a loop and the module, {' and '.join(common.packages(args))}: they differ by at most {apart:.0e}.")
    epochs, ratios = {}, []
    for title, way in WAYS.items():
        print(f"\n{title}: {way.__doc__}\n  epoch" + "".join(f"    {name:>15}" for name in common.packages(args)))
        took, race = learn(args, way)
        for name in race.models:
            epochs.setdefault(name, []).append(str(took.get(name, f"over {args.epochs}")))
        ratios += [f"{race.ratio():.2f}x"] if race.ratio() else []
        print(race.speed_up().removeprefix("; "))
    counts = " and ".join(f"{', '.join(numbers)} epochs with {name}" for name, numbers in epochs.items())
    speed = f"; fusedrnn's epochs are {', '.join(ratios)} as fast" if ratios else race.speed_up("an epoch of the last")
    return f'{", ".join(WAYS)} spell "{ANSWER}" after {counts}; cell and module differ by at most {apart:.0e}{speed}'


if __name__ == "__main__":
    sys.exit(common.main(parse, run))
