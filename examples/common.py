"""What every example needs and none is about: the two packages, the words on the command line, the clock, the way out."""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import fusedrnn

PACKAGES = {"torch": torch.nn, "fusedrnn": fusedrnn}
COLOURS = {"torch": "#b8b8b8", "fusedrnn": "#c0392b"}
NO_PICTURE = Path("none")


class Refused(Exception):
    """The run cannot be made as asked; the message is one line for the user."""


def parser(doc: str, plot: str | None = None, **defaults: int) -> argparse.ArgumentParser:
    """The words all examples know, and a whole number above zero for each of `defaults`.

    Args:
        doc: the example's own docstring, its help text.
        plot: default name of the picture, for an example that draws one.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--module", choices=[*PACKAGES, "both"], default="both", help="default: both, in turns")
    found.add_argument("--seed", type=seed, default=0, help="default 0")
    found.add_argument("--threads", type=positive, default=1, help="default 1: small steps gain little from more")
    if plot:
        hint = f'default {plot}; "none" for none'
        found.add_argument("--plot", type=picture, metavar="FILE", default=Path(plot), help=hint)
    for name, value in defaults.items():
        found.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    return found


def positive(text: str) -> int:
    """For argparse: a whole number above zero."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number above 0 is wanted, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """For argparse: a seed that torch's generators and numpy's take alike."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**63 - 1 is wanted, got {text!r}")
    return int(text)


def picture(text: str) -> Path:
    """For argparse: a file that matplotlib can write, or "none"."""
    path = Path(text)
    if path != NO_PICTURE and (path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir()):
        raise argparse.ArgumentTypeError(f"{text} is not a .png, .svg or .pdf file in a folder that exists")
    return path


def packages(args) -> list[str]:
    """The names of those that --module asks for, in the order of their turns."""
    return list(PACKAGES) if args.module == "both" else [args.module]


def build(args, make: Callable) -> dict[str, torch.nn.Module]:
    """{package: make(its namespace)} for each package that --module asks for, all from the same seed."""
    models = {}
    for name in packages(args):
        torch.manual_seed(args.seed)
        models[name] = make(PACKAGES[name])
    return models


class Race:
    """Trains the models in turns, so that whatever else the machine does slows all alike; measures each turn.

    for epoch, name, model in race: ...    `race.step()` in between moves the progress bar, which is on terminals only,
                                           and on none if `quiet`; `race.stop()` ends the time of the turn before the
                                           turn itself ends.
    """

    def __init__(self, models: dict[str, torch.nn.Module], epochs: int, steps: int, quiet: bool = False):
        self.models, self.epochs, self.steps, self.quiet = models, epochs, steps, quiet
        self.seconds: dict[str, list[float]] = {name: [] for name in models}
        self.turn: tuple[str, float] | None = None  # whose time is running, and since when

    def __iter__(self):
        total = len(self.models) * self.epochs * self.steps
        with tqdm(total=total, leave=False, disable=self.quiet or None) as self.bar:  # gone when left, by Ctrl-C too
            for epoch in range(1, self.epochs + 1):
                for name, model in self.models.items():
                    self.bar.set_description(name, refresh=False)
                    self.turn = name, time.perf_counter()
                    yield epoch, name, model
                    self.stop()

    def step(self) -> None:
        """Counts one of the `steps` of an epoch as done."""
        self.bar.update()

    def stop(self) -> None:
        """What follows in this turn, such as a test or a line to print, is not timed."""
        if self.turn:
            name, start = self.turn
            self.seconds[name].append(time.perf_counter() - start)
            self.turn = None

    def print(self, line: str) -> None:
        """Prints a line above the bar, in one piece."""
        self.bar.clear()
        print(f"{line}\n", end="", flush=True)

    def ratio(self) -> float | None:
        """How many times faster fusedrnn's median turn is than torch's; None unless these two ran and nothing else."""
        if set(self.models) != set(PACKAGES):
            return None
        theirs, ours = (statistics.median(self.seconds[name]) for name in PACKAGES)
        return theirs / ours

    def speed_up(self, turn: str = "an epoch") -> str:
        """How long a median turn is with each package, and the ratio, as words."""
        times = ", ".join(f"{duration(statistics.median(self.seconds[name]))} with {name}" for name in self.models)
        ratio = f", {self.ratio():.2f}x as fast" if self.ratio() else ""
        return f"; {turn} takes {times}{ratio}"


def duration(seconds: float) -> str:
    """Three digits and their unit: "1.23 s", "456 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


@contextlib.contextmanager
def drawing(path: Path, columns: int | list = 1, **options):
    """Matplotlib's axes; saved to `path` at the end, unless that is "none".

    Args:
        columns: how many side by side; or a mosaic, [["a", "b"], ["c", "c"]], for axes by these names.
        options: of pyplot.subplots or pyplot.subplot_mosaic.
    """
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fusedrnn"}):  # the same picture is the same file
        subplots = pyplot.subplots if isinstance(columns, int) else pyplot.subplot_mosaic
        shape = (1, columns) if isinstance(columns, int) else (columns,)
        figure, axes = subplots(*shape, layout="constrained", **options)
        try:
            for axis in figure.axes:
                axis.spines[["top", "right"]].set_visible(False)
            yield axes
            if path != NO_PICTURE:
                figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
                print(f"picture: {path}")
        finally:
            pyplot.close(figure)


def main(parse: Callable[[], argparse.ArgumentParser], run: Callable, argv: list[str] | None = None) -> int:
    """Runs an example: exit status 0; 2 with one line if it cannot be made as asked; 130 if stopped by Ctrl-C.

    Args:
        run: takes the parsed words; prints as it goes and returns one line that says what came of it, printed last.
    """
    name = sys.modules[run.__module__].__spec__.name.removeprefix("examples.")
    words = parse()
    words.prog = name
    args = words.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        print(f"result: {run(args)}")
    except Refused as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        erase = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the ^C that the terminal wrote behind the bar
        print(f"{erase}{name}: stopped", file=sys.stderr)
        return 130
    return 0
