"""Draw the committed rows, one SVG a suite, next to the rows.

    python -m benchmarks.plot                 every results/<machine>/<suite>.jsonl
    python -m benchmarks.plot FILE [...]      these row files

Speed-up over torch by shape; for suite scaling how the cost grows with each size, beside the floor; for suite memory
the peak of a training step. A picture carries the fingerprint of its rows, so that `benchmarks.report --check` sees one
that is out of date.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from . import machine, rows
from .rows import Pair
from .shapes import CELLS, USUAL_MODES
from .suites import SCALING_BASE

COLOURS = {"rnn": "#4c78a8", "gru": "#f58518", "lstm": "#54a24b"}
LOSS = "#c1272d"
BAR = 0.27
KINDS = {"scaling": "cost", "memory": "peak"}


def picture_of(path: pathlib.Path) -> pathlib.Path:
    """Where the picture of a row file lies."""
    return path.with_name(f"{path.stem}-{KINDS.get(path.stem, 'speedup')}.svg")


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

    pairs = [pair for pair in rows.measured_pairs(path) if pair.speedup]
    if not pairs:
        raise ValueError(f"{path} has no speed to draw")
    drawer = {"cost": draw_cost, "peak": draw_peak}.get(KINDS.get(path.stem), draw_speedup)
    figure, title = drawer(pyplot, pairs)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(f"{title}, {machine.title(pairs[0].ours)}")
    picture = picture_of(path)
    figure.savefig(picture, metadata={"Date": None, "Description": f"rows {rows.digest(path)}"})
    pyplot.close(figure)
    return picture


def draw_speedup(pyplot, pairs: list[Pair]):
    """A panel for each mode with a bar for each shape and cell: (figure, title)."""
    labels = list(dict.fromkeys(pair.label for pair in pairs))
    modes = list(dict.fromkeys(pair.mode for pair in pairs))
    figure, axes = pyplot.subplots(
        1, len(modes), sharey=True, figsize=(10, 0.9 + 0.42 * len(labels)), layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], modes):
        _speedup_panel(axis, mode, labels, [pair for pair in pairs if pair.mode == mode])
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    return figure, "Speed over torch.nn (line: torch)"


def _speedup_panel(axis, mode: str, labels: list[str], pairs: list[Pair]) -> None:
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


def sweep(pairs: list[Pair], size: str) -> list[tuple[int, Pair]]:
    """(value of one size, pair) where every other size has its base value, by value; size: T, B, H or threads."""
    base = dict(zip("TBH", SCALING_BASE)) | {"threads": max(pair.ours["threads"] for pair in pairs)}
    sizes = [{letter: pair.ours["shape"][letter] for letter in "TBH"} | {"threads": pair.ours["threads"]} for pair in pairs]
    fits = [all(found[name] == base[name] for name in base if name != size) for found in sizes]
    return sorted(((found[size], pair) for found, pair, fit in zip(sizes, pairs, fits) if fit), key=lambda point: point[0])


def draw_cost(pyplot, pairs: list[Pair]):
    """Time against T and threads, time per step against B and H; a line for each cell, torch's and the floor beside it."""
    sizes = {"T": "steps", "B": "batch", "H": "units", "threads": "threads"}
    figure, axes = pyplot.subplots(len(USUAL_MODES), len(sizes), figsize=(12, 6), layout="constrained", squeeze=False)
    for line, mode in zip(axes, USUAL_MODES):
        for axis, (size, word) in zip(line, sizes.items()):
            _cost_panel(axis, size, [pair for pair in pairs if pair.mode == mode])
            axis.set_xlabel(f"{word} ({size})" if size != word else word)
        line[0].set_ylabel(f"{mode}, us")
    T, B, H = SCALING_BASE
    return figure, f"Cost by size, from T{T} B{B} H{H} (grey: torch.nn, dotted: floor)"


def _cost_panel(axis, size: str, pairs: list[Pair]) -> None:
    for cell, colour in COLOURS.items():
        points = sweep([pair for pair in pairs if pair.cell == cell], size)
        values = [value for value, _ in points]
        unit = [1e6 / (pair.ours["shape"]["T"] if size in "BH" else 1) for _, pair in points]
        times = lambda pick: [pick(pair) * factor for (_, pair), factor in zip(points, unit)]  # noqa: E731
        axis.plot(values, times(lambda pair: pair.theirs["seconds"]["p50"]), color=colour, alpha=0.35, linewidth=3)
        axis.plot(values, times(lambda pair: pair.ours["seconds"]["p50"]), color=colour, marker=".", label=cell.upper())
        if all(pair.ours["floor_seconds"] for _, pair in points):
            axis.plot(values, times(lambda pair: pair.ours["floor_seconds"]), color=colour, linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({value for value, _ in sweep(pairs, size)})
    axis.set_xticks(ticks[:: 1 + len(ticks) // 6], [str(tick) for tick in ticks[:: 1 + len(ticks) // 6]])
    axis.minorticks_off()
    axis.grid(linewidth=0.3)
    axis.set_title("time a step" if size in "BH" else "time a call")


def draw_peak(pyplot, pairs: list[Pair]):
    """MiB at the peak of a training step, a panel for each cell: torch's bar behind ours."""
    some = [pair for pair in pairs if pair.ours["peak_bytes"] is not None]
    if not some:
        raise ValueError("no row says how much memory a training step takes")
    labels = list(dict.fromkeys(pair.label for pair in some))
    size = (10, 1.2 + 0.32 * len(labels))
    figure, axes = pyplot.subplots(1, len(CELLS), sharey=True, figsize=size, layout="constrained")
    for axis, cell in zip(axes, CELLS):
        of_cell = [pair for pair in some if pair.cell == cell]
        places = [labels.index(pair.label) for pair in of_cell]
        mib = lambda row: row["peak_bytes"] / 2**20  # noqa: E731
        axis.barh(places, [mib(pair.theirs) for pair in of_cell], 0.8, color="#d0d0d0", label="torch.nn")
        axis.barh(places, [mib(pair.ours) for pair in of_cell], 0.4, color="#4c78a8", label="fusedrnn")
        axis.set_title(cell.upper())
        axis.set_xlabel("MiB")
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    return figure, "Peak memory of a training step"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    files = parser.parse_args(arguments).files or machine.row_files()
    if not files:
        print("benchmarks.plot: no rows under benchmarks/results", file=sys.stderr)
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
