"""Write the benchmark part of README.md from the committed rows. Nothing in it is typed by hand.

    python -m benchmarks.report            draw pictures that are out of date, rewrite what stands between BEGIN and END
    python -m benchmarks.report --check    change nothing; exit status 1 if README or a picture is out of date
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

from . import plot, rows
from .machine import ROOT, row_files
from .rows import Pair
from .shapes import CELLS, MODES
from .table import bytes_text, percent_text, seconds_text, target_lines

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOTHING = "No rows are committed yet: `python -m benchmarks.run --suite cpu` measures this machine."


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table, first column to the left, the others to the right."""
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def speedup_text(pair: Pair | None) -> str:
    """``2.13x``; bold with its interval where ours is slower, by noise or not."""
    if pair is None:
        return ""
    if pair.verdict == "RED":
        return "**wrong**"
    if pair.verdict:
        low, high = pair.ours["speedup_low"], pair.ours["speedup_high"]
        return f"**{pair.speedup:.2f}x** ({low:.2f} to {high:.2f})"
    return f"{pair.speedup:.2f}x"


def by_shape(pairs: list[Pair], columns: list[tuple[str, str]], text) -> list[list[str]]:
    """A line for each shape, and in each (cell, mode) column the text of its pair (of None if there is none)."""
    found = {(pair.label, pair.cell, pair.mode): pair for pair in pairs}
    labels = dict.fromkeys(pair.label for pair in pairs)
    return [[label, *(text(found.get((label, *column))) for column in columns)] for label in labels]


def speed_section(pairs: list[Pair]) -> str:
    columns = [(cell, mode) for cell in CELLS for mode in MODES]
    header = ["shape", *(f"{cell.upper()} {mode}" for cell, mode in columns)]
    return markdown(header, by_shape([p for p in pairs if p.group != "overhead"], columns, speedup_text))


def target_section(pairs: list[Pair]) -> str:
    lines = [
        [what.strip(), str(count), f"{mean:.2f}x" if not target or mean >= target else f"**{mean:.2f}x**"]
        + [f"{target:g}x" if target else ""]
        for what, count, mean, target in target_lines(pairs)
    ]
    return markdown(["geometric mean", "cases", "measured", "aimed at"], lines)


def reach_section(pairs: list[Pair]) -> str:
    """How near to the machine's limits: torch, then ours."""
    columns = [(cell, mode) for cell in CELLS for mode in MODES]

    def text(pair: Pair | None) -> str:
        if pair is None or pair.speedup is None:
            return ""
        field = "fraction_of_bandwidth" if pair.ours["fraction_of_bandwidth"] is not None else "fraction_of_gemm_peak"
        return f"{percent_text(pair.theirs[field])} / {percent_text(pair.ours[field])}"

    header = ["torch / fusedrnn", *(f"{cell.upper()} {mode}" for cell, mode in columns)]
    return markdown(header, by_shape([p for p in pairs if p.group != "overhead"], columns, text))


def memory_section(pairs: list[Pair]) -> str:
    def text(pair: Pair | None) -> str:
        if pair is None or pair.ours["peak_bytes"] is None:
            return ""
        sizes = f"{bytes_text(pair.theirs['peak_bytes'])} / {bytes_text(pair.ours['peak_bytes'])}"
        return f"**{sizes}**" if pair.more_memory else sizes

    header = ["MiB, torch / fusedrnn", *(cell.upper() for cell in CELLS)]
    training = [pair for pair in pairs if pair.mode == "training"]
    return markdown(header, by_shape(training, [(cell, "training") for cell in CELLS], text))


def overhead_section(pairs: list[Pair]) -> str:
    lines = [
        [f"{pair.cell.upper()} {pair.mode}", seconds_text(pair.theirs["seconds"]["p50"])]
        + [seconds_text(pair.ours["seconds"]["p50"]), speedup_text(pair)]
        for pair in pairs
        if pair.group == "overhead" and pair.speedup
    ]
    return markdown(["one call, T1 B1 H64", "torch", "fusedrnn", "ratio"], lines) if lines else ""


def machine_section(path: pathlib.Path) -> str:
    """Everything about one row file."""
    every = rows.read(path)
    pairs = [pair for pair in rows.pairs(every) if pair.ours["provider"] == "fusedrnn"]
    if not pairs:
        raise ValueError(f"{path.relative_to(ROOT)} holds no pair of torch and fusedrnn")
    about = pairs[0].ours
    losses = sum(pair.verdict == "LOSS" for pair in pairs)
    even = sum(pair.verdict == "even" for pair in pairs)
    gemm_peak = statistics.median(pair.ours["gemm_peak_gflops"] or 0.0 for pair in pairs)
    picture = plot.picture_of(path)
    versions = about["versions"]
    dtypes = ", ".join(dict.fromkeys(pair.ours["dtype"] for pair in pairs))
    name = about.get("gpu") or f"{about['cpu']}, {about['cores']} cores, {about['isa']}"
    where = f"cuDNN {versions.get('cudnn')}" if about.get("gpu") else f"{about['threads']} threads"
    parts = [
        f"### {name}",
        f"{dtypes}, {where}, torch {versions['torch']}, fusedrnn {versions['fusedrnn']}, "
        f"commit {about['commit'] or 'unknown'}, {about['date']}{', a quick run' if about['quick'] else ''}. "
        f"{len(pairs)} cases: {losses} slower than torch, {even} below 1 within the noise. "
        "Time of torch.nn over time of fusedrnn, medians of interleaved runs; bold where it is below 1 "
        "(95 % interval in brackets):",
        speed_section(pairs),
    ]
    if picture.exists():
        parts.append(f"![Speed-up by shape]({picture.relative_to(ROOT).as_posix()})")
    parts += [
        target_section(pairs),
        f"Fraction of what the machine can do: of the GEMM peak measured beside each case (median {gemm_peak:.0f} GF/s), or, "
        "for one stream (B1), of the rate at which a matrix-vector product reads the same weights:",
        reach_section(pairs),
        overhead_section(pairs),
    ]
    if any(pair.ours["peak_bytes"] is not None for pair in pairs):
        parts += [
            "Peak memory of a training step (torch's allocator; bold where ours is larger):",
            memory_section(pairs),
        ]
    return "\n\n".join(part for part in parts if part)


def block() -> str:
    """The text between the markers."""
    return "\n\n".join(map(machine_section, row_files())) or NOTHING


def rewritten(readme: str, text: str) -> str:
    """`readme` with `text` between the markers. ValueError if they are not there once each, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and after it {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something is out of date")
    check = parser.parse_args(arguments).check
    readme = ROOT / "README.md"
    try:
        old = readme.read_text()
        undrawn = [path for path in row_files() if not plot.is_current(path)]
        for path in [] if check else undrawn:
            plot.draw(path)
        new = rewritten(old, block())
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(new)
        return 0
    stale = [plot.picture_of(path).relative_to(ROOT).as_posix() for path in undrawn] + ["README.md"] * (new != old)
    for name in stale:
        print(f"benchmarks.report: {name} is out of date: run python -m benchmarks.report", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
