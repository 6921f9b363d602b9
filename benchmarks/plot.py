"""Draw the committed rows: speed-up over torch by shape, one SVG a suite, next to the rows.

    python -m benchmarks.plot                 every results/<machine>/<suite>.jsonl
    python -m benchmarks.plot FILE [...]      these row files

A picture carries the fingerprint of its rows, so that `benchmarks.report --check` sees one that is out of date.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from . import machine, rows
from .shapes import CELLS, MODES

COLOURS = {"rnn": "#4c78a8", "gru": "#f58518", "lstm": "#54a24b"}
LOSS = "#c1272d"
BAR = 0.27


def picture_of(path: pathlib.Path) -> pathlib.Path:
    """Where the picture of a row file lies."""
    return path.with_name(f"{path.stem}-speedup.svg")


def is_current(path: pathlib.Path) -> bool:
    """True if the picture of a row file was drawn from the rows that are in it now."""
    picture = picture_of(path)
    return picture.exists() and f"rows {rows.digest(path)}" in picture.read_text()


def draw(path: pathlib.Path) -> pathlib.Path:
    """Draw one row file and return the picture's path."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "fusedrnn", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    pairs = [pair for pair in rows.pairs(rows.read(path)) if pair.speedup]
    if not pairs:
        raise ValueError(f"{path} holds no measured pair")
    labels = list(dict.fromkeys(pair.label for pair in pairs))
    figure, axes = pyplot.subplots(
        1, len(MODES), sharey=True, figsize=(10, 0.9 + 0.42 * len(labels)), layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], MODES):
        _panel(axis, mode, labels, [pair for pair in pairs if pair.mode == mode])
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    about = pairs[0].ours
    name = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads, {about['isa']}"
    figure.suptitle(f"Speed over torch.nn, {name} (line: torch)")
    picture = picture_of(path)
    figure.savefig(picture, metadata={"Date": None, "Description": f"rows {rows.digest(path)}"})
    pyplot.close(figure)
    return picture


def _panel(axis, mode: str, labels: list[str], pairs: list[rows.Pair]) -> None:
    """Bars of one mode on a logarithmic axis; whiskers are the 95 % interval, losses have a red edge."""
    for offset, cell in enumerate(CELLS):
        some = [pair for pair in pairs if pair.cell == cell]
        if not some:
            continue
        axis.barh(
            [labels.index(pair.label) + (offset - 1) * BAR for pair in some],
            [pair.speedup - 1 for pair in some],
            BAR,
            left=1,  # bars start at torch's speed, to the left for a loss
            xerr=[
                [max(0.0, pair.speedup - pair.ours["speedup_low"]) for pair in some],
                [max(0.0, pair.ours["speedup_high"] - pair.speedup) for pair in some],
            ],
            color=COLOURS[cell],
            edgecolor=[LOSS if pair.verdict == "LOSS" else "none" for pair in some],
            error_kw={"elinewidth": 0.7, "ecolor": "#444444"},
            label=cell.upper(),
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="x", linewidth=0.3)
    axis.set_title(mode)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    files = parser.parse_args(arguments).files or machine.row_files()
    if not files:
        print(f"benchmarks.plot: no rows under benchmarks/results", file=sys.stderr)
        return 1
    try:
        for path in files:
            print(draw(path))
    except (OSError, ValueError) as error:
        print(f"benchmarks.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
