"""Reads handwritten digits row by row with an LSTM, trained twice: with torch.nn and with fusedrnn, from the same seed.

    python -m examples.digits                      scikit-learn's 1,797 scans of 8x8, nothing to download
    python -m examples.digits --data FOLDER        MNIST's four idx files (plain or .gz) in that folder

The two trainings take turns, epoch by epoch, so that whatever else the machine does slows both. Their losses agree to
rounding; the time per epoch does not.
"""

import argparse
import gzip
import math
import statistics
import struct
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn

PACKAGES = {"torch.nn": nn, "fusedrnn": fusedrnn}
MEASURES = {"loss": "training loss", "accuracy": "test accuracy", "seconds": "seconds per epoch"}


class Refused(Exception):
    """The run cannot be made as asked; the message is one line for the user."""


class RowReader(nn.Module):
    """An image is a sequence of its rows; after the last row, the hidden state is classified.

    Args:
        package: torch.nn or fusedrnn, the one place in this file where the two differ.
        kind: "RNN", "LSTM" or "GRU".
    """

    def __init__(self, package, kind: str, columns: int, hidden: int, layers: int):
        super().__init__()
        self.rnn = getattr(package, kind)(columns, hidden, layers, batch_first=True)
        self.linear = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, 10) of images (B, rows, columns)."""
        output, _ = self.rnn(images)
        return self.linear(output[:, -1])


def train_epoch(model, optimizer, images, labels, order, batch, advance) -> tuple[float, float]:
    """One pass over the images in the given order: (mean loss, seconds)."""
    model.train()
    total, start = 0.0, time.perf_counter()
    for index in order.split(batch):
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(index)
        advance(len(index))
    return total / len(order), time.perf_counter() - start


@torch.no_grad()
def predict(model, images: Tensor) -> Tensor:
    """The digit (N,) each image (N, rows, columns) is taken for."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(1000)])


def load_small():
    """scikit-learn's digits, a fifth of them kept for the test: ((images, labels), (images, labels))."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[train], labels[train]), (images[test], labels[test])


def load_mnist(folder: Path):
    """MNIST from its idx files: ((images, labels), (images, labels)). Refused if they are not there or not whole."""
    if not folder.is_dir():
        raise Refused(f"--data: {folder} is not a folder")
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images", 3).float() / 255
        labels = read_idx(folder, f"{part}-labels", 1).long()
        if len(images) != len(labels) or not len(images):
            raise Refused(f"--data: {folder} has {len(images)} {part} images and {len(labels)} labels")
        if labels.max() > 9:
            raise Refused(f"--data: a label in {part}-labels is {labels.max()}; digits are 0 to 9")
        parts.append((images, labels))
    return parts


def read_idx(folder: Path, stem: str, dims: int) -> Tensor:
    """The array in an idx file: two zeros, 8 (for bytes), the count of dimensions, each in 4 bytes, then the data."""
    names = [f"{stem}{dot}idx{dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise Refused(f"--data: {folder} has no {names[0]} or {names[1]}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"--data: {path} cannot be read: {error}") from error
    head = 4 + 4 * dims
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < head:
        begin = content[:4].hex(" ") or "with nothing"
        raise Refused(f"--data: {path} is no idx file of bytes with {dims} dimensions: it begins {begin}")
    shape = struct.unpack(f">{dims}I", content[4:head])
    if len(content) != head + math.prod(shape):
        raise Refused(f"--data: {path} is cut short or has more at its end: {len(content):,} bytes, "
                        f"where its header says {head + math.prod(shape):,}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[head:].reshape(shape)


def train_both(args, train, test):
    """Trains both models in turns and prints a line an epoch: (models, {measure: {package: [value an epoch]}})."""
    models, optimizers, schedules = {}, {}, {}
    for name, package in PACKAGES.items():
        torch.manual_seed(args.seed)
        models[name] = RowReader(package, args.module, train[0].shape[2], args.hidden, args.layers)
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=0.01)
        schedules[name] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[name], args.epochs)
    history = {measure: {name: [] for name in PACKAGES} for measure in MEASURES}
    print("     " + "".join(f"{title:^24}" for title in MEASURES.values()))
    print("epoch" + "".join(f"{name:>12}" for _ in MEASURES for name in PACKAGES))
    shuffle = torch.Generator().manual_seed(args.seed)
    # The bar is on a terminal only, and gone when the block is left, by Ctrl-C too.
    with tqdm(total=2 * args.epochs * len(train[0]), unit=" images", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(args.epochs):
            order = torch.randperm(len(train[0]), generator=shuffle)
            for name, model in models.items():
                bar.set_description(name, refresh=False)
                loss, seconds = train_epoch(model, optimizers[name], *train, order, args.batch, bar.update)
                schedules[name].step()
                accuracy = (predict(model, test[0]) == test[1]).float().mean().item()
                for measure, value in zip(MEASURES, (loss, accuracy, seconds)):
                    history[measure][name].append(value)
            bar.clear()
            formats = zip(MEASURES, ("12.6f", "12.2%", "12.3f"))
            row = [f"{history[measure][name][-1]:{form}}" for measure, form in formats for name in PACKAGES]
            print(f"{epoch + 1:5}" + "".join(row) + "\n", end="", flush=True)  # in one piece, or Ctrl-C may part it
    return models, history


def draw(path, history, test, predicted):
    """Saves the picture: losses, accuracies and times by epoch, and ten test images with what they were taken for."""
    from matplotlib import pyplot

    red = "#c0392b"
    styles = {"torch.nn": {"color": "#b8b8b8", "linewidth": 6}, "fusedrnn": {"color": red, "linewidth": 1.6}}
    figure = pyplot.figure(figsize=(11, 5.4), layout="constrained")
    curves, digits = figure.subfigures(2, 1, height_ratios=[3, 1])
    for axis, (measure, title) in zip(curves.subplots(1, 3), MEASURES.items()):
        for name, style in styles.items():
            values = history[measure][name]
            epochs = range(1, len(values) + 1)
            if measure == "seconds":  # a line is the median; the machine's own hiccups fall outside the picture
                axis.scatter(epochs, values, s=18, color=style["color"])
                axis.axhline(statistics.median(values), **style)
            else:
                axis.plot(epochs, values, label=name, marker="." if len(values) == 1 else "", **style)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eeeeee")
        if measure == "loss":
            axis.set_yscale("log")
            axis.legend(frameon=False)
        elif measure == "accuracy":
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        else:
            axis.set_ylim(0, 2 * max(map(statistics.median, history[measure].values())))
            axis.set_title(f"{speed_up(history):.2f}x as fast", loc="right", color=red)
    for axis, image, label, digit in zip(digits.subplots(1, 10), *test, predicted["fusedrnn"]):
        axis.imshow(image.numpy(), cmap="gray_r")
        axis.set_axis_off()
        axis.set_title(f"{label}, read {digit}", fontsize=10, color="black" if label == digit else red)
    figure.savefig(path, dpi=130)


def speed_up(history) -> float:
    """How many times faster the median epoch of fusedrnn is."""
    return statistics.median(history["seconds"]["torch.nn"]) / statistics.median(history["seconds"]["fusedrnn"])


def positive(text: str) -> int:
    """For argparse: a whole number above zero."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number above 0 is wanted, got {text!r}")
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(prog="digits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="MNIST's idx files")
    parser.add_argument("--module", choices=["RNN", "GRU", "LSTM"], default="LSTM", type=str.upper)
    parser.add_argument("--epochs", type=positive, help="default 25, or 2 with --data")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--hidden", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("digits.png"), help="default digits.png")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (2 if args.data else 25)
    return args


def run(args):
    """Reads the data, trains both, prints what came of it and saves the picture."""
    if not args.plot.parent.is_dir() or args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise Refused(f"--plot: {args.plot} is not a .png, .svg or .pdf file in a folder that exists")
    train, test = load_mnist(args.data) if args.data else load_small()
    _, rows, columns = train[0].shape
    print(f"{len(train[0]):,} images of {rows}x{columns} to learn from, {len(test[0]):,} to test; {args.module} of "
          f"{args.hidden} units x {args.layers}, batch {args.batch}, {torch.get_num_threads()} threads\n")
    models, history = train_both(args, train, test)
    predicted = {name: predict(model, test[0]) for name, model in models.items()}
    gap = max(abs(a - b) for a, b in zip(*history["loss"].values()))
    print(f"\nThe losses differ by at most {gap:.0e}; fusedrnn's median epoch is {speed_up(history):.2f}x as fast.\n")
    for name, digits in {"truth": test[1], **predicted}.items():
        print(f"{name:9}", *digits[:10].tolist())
    draw(args.plot, history, test, predicted)
    print(f"\nPicture: {args.plot}")


def main(argv=None) -> int:
    try:
        run(parse(argv))
    except Refused as error:
        print(f"digits: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        erase = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the ^C that the terminal wrote behind the bar
        print(f"{erase}digits: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
