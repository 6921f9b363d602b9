"""Reads handwritten digits row by row, with torch.nn and with fusedrnn from the same seed.

    python -m examples.digits                      scikit-learn's 1,797 scans of 8x8, nothing to download
    python -m examples.digits --data FOLDER        MNIST's four idx files (plain or .gz) in that folder
    python -m examples.digits --cell RNN           two layers of 128 tanh units, batches of 100, in place of an LSTM of 64

The two trainings take turns, epoch by epoch. Their losses agree to rounding; the time per epoch does not.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from . import common
from .mnist import load_mnist, load_small

MEASURES = {"loss": "training loss", "accuracy": "test accuracy", "seconds": "seconds per epoch"}
DEFAULTS = {  # sizes by which tutorials know them, and the rate at which they learn
    "RNN": {"hidden": 128, "layers": 2, "batch": 100, "rate": 0.002},
    "LSTM": {"hidden": 64, "layers": 1, "batch": 64, "rate": 0.01},
    "GRU": {"hidden": 64, "layers": 1, "batch": 64, "rate": 0.01},
}


class RowReader(nn.Module):
    """An image is a sequence of its rows; after the last row, what the top layer holds is classified.

    Args:
        package: torch.nn or fusedrnn, the one place where the two differ.
        read: "output" for the last step's output, "hidden" for h_n[-1]: two ways to the same numbers.
    """

    def __init__(self, package, cell: str, columns: int, hidden: int, layers: int, read: str):
        super().__init__()
        self.rnn = getattr(package, cell)(columns, hidden, layers, batch_first=True)
        self.linear = nn.Linear(hidden, 10)
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, 10) of images (B, rows, columns)."""
        output, last = self.rnn(images)
        h_n = last[0] if isinstance(last, tuple) else last  # an LSTM's last is (h_n, c_n)
        return self.linear(output[:, -1] if self.read == "output" else h_n[-1])


@torch.no_grad()
def predict(model: RowReader, images: Tensor) -> Tensor:
    """The digit (N,) each image (N, rows, columns) is taken for."""
    return torch.cat([model(part).argmax(1) for part in images.split(1000)])


def train(args, models: dict[str, nn.Module], learn, test) -> tuple[dict, common.Race]:
    """Trains the models in turns and prints a line an epoch: ({measure: {package: [value an epoch]}}, the race)."""
    images, labels = learn
    optimizers = {name: torch.optim.Adam(model.parameters(), args.rate) for name, model in models.items()}
    schedules = {name: torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[name], args.epochs) for name in models}
    race = common.Race(models, args.epochs, -(-len(images) // args.batch))
    history = {"loss": {name: [] for name in models}, "accuracy": {name: [] for name in models}, "seconds": race.seconds}
    width, forms = 24 // len(models), (".6f", ".2%", ".3f")
    print("     " + "".join(f"{title:>24}" for title in MEASURES.values()))
    print("epoch" + "".join(f"{name:>{width}}" for _ in MEASURES for name in models))
    for epoch, name, model in race:
        total, order = 0.0, torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
        for index in order.split(args.batch):
            loss = nn.functional.cross_entropy(model(images[index]), labels[index])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            total += loss.item() * len(index)
            race.step()
        race.stop()
        schedules[name].step()
        history["loss"][name].append(total / len(images))
        history["accuracy"][name].append((predict(model, test[0]) == test[1]).float().mean().item())
        if name == list(models)[-1]:
            row = [f"{of[name][-1]:{width}{form}}" for of, form in zip(history.values(), forms) for name in models]
            race.print(f"{epoch:5}" + "".join(row))
    return history, race


def draw(args, history, race, test, digits: Tensor) -> None:
    """The picture: losses, accuracies and times by epoch, and ten test images with what they were taken for."""
    with common.drawing(args.plot, [[*MEASURES], ["digits"] * 3], height_ratios=[3, 1], figsize=(11, 5.4)) as axes:
        for measure, title in MEASURES.items():
            axis, epochs = axes[measure], range(1, args.epochs + 1)
            for name, values in history[measure].items():
                style = {"color": common.COLOURS[name], "linewidth": 6 if name == "torch" else 1.6}
                if measure == "seconds":  # a line is the median; the machine's own hiccups fall outside the picture
                    axis.scatter(epochs, values, s=18, color=style["color"])
                    axis.axhline(statistics.median(values), **style)
                else:
                    axis.plot(epochs, values, label=name, marker="." if len(values) == 1 else "", **style)
            axis.set_xlabel("epoch")
            axis.set_title(title, loc="left", fontweight="bold")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(axis="y", color="#eeeeee")
        axes["loss"].semilogy()
        axes["loss"].legend(frameon=False)
        axes["accuracy"].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes["seconds"].set_ylim(0, 2 * max(map(statistics.median, race.seconds.values())))
        if race.ratio():
            axes["seconds"].set_title(f"{race.ratio():.2f}x as fast", loc="right", color=common.COLOURS["fusedrnn"])
        axis, labels = axes["digits"], test[1][:10]
        strip = torch.cat([nn.functional.pad(image, (1, 1, 1, 1)) for image in test[0][:10]], 1)
        axis.imshow(strip.numpy(), cmap="gray_r", extent=(0, len(labels), 0, 1))
        axis.set_axis_off()
        for i, (label, digit) in enumerate(zip(labels, digits)):
            colour = "black" if label == digit else common.COLOURS["fusedrnn"]
            axis.text(i + 0.5, 1, f"{label}, read {digit}", ha="center", color=colour)


def parse() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, plot="digits.png")
    parser.add_argument("--cell", choices=[*DEFAULTS], default="LSTM", type=str.upper)
    parser.add_argument("--read", choices=["output", "hidden"], default="output", help="last output (default) or h_n[-1]")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="MNIST's idx files")
    parser.add_argument("--epochs", type=common.positive, help="default 25, or 2 with --data")
    for name in ("hidden", "layers", "batch"):
        parser.add_argument(f"--{name}", type=common.positive, help="default: what tutorials give the cell")
    return parser


def run(args) -> str:
    learn, test = load_mnist(args.data) if args.data else load_small()
    for name, value in {"epochs": 2 if args.data else 25, **DEFAULTS[args.cell]}.items():
        setattr(args, name, getattr(args, name, None) or value)
    _, rows, columns = learn[0].shape
    sizes = columns, args.hidden, args.layers
    print(f"{len(learn[0]):,} images of {rows}x{columns} to learn from, {len(test[0]):,} to test; "
          f"{args.cell} of {args.hidden} units x {args.layers}, batch {args.batch}, threads: {args.threads}\n")
    models = common.build(args, lambda package: RowReader(package, args.cell, *sizes, args.read))
    history, race = train(args, models, learn, test)
    predicted = {name: predict(model, test[0][:10]) for name, model in models.items()}
    print()
    for name, digits in {"truth": test[1][:10], **predicted}.items():
        print(f"{name:9}", *digits.tolist())
    draw(args, history, race, test, digits)
    scores = ", ".join(f"{history['accuracy'][name][-1]:.2%} with {name}" for name in models)
    gap = max(max(losses) - min(losses) for losses in zip(*history["loss"].values()))
    agree = f"; losses differ by at most {gap:.0e}" * (len(models) == 2)
    return f"{args.cell} reads unseen digits right: {scores}{agree}{race.speed_up()}"


if __name__ == "__main__":
    sys.exit(common.main(parse, run))
