"""Write what the committed rows say: README's part, and a page for each machine. Nothing in it is typed by hand.

    python -m benchmarks.report            draw pictures and write texts that are out of date
    python -m benchmarks.report --check    change nothing; exit status 1 if a text or a picture is out of date

README has each machine's main table and pictures between BEGIN and END, and what the example programs printed between
their markers; results/<machine>/README.md has every table of that machine.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

from . import machine, plot, rows
from .machine import ROOT, row_files
from .rows import Pair, mean_speedup, measured_pairs, shape_label
from .shapes import CELLS, MODES
from .suites import SUITES
from .table import OPTION_HEADER, bytes_text, option_lines, overhead_lines, percent_text, seconds_text, target_lines

NOTHING = "No rows are committed yet: `python -m benchmarks.run --suite cpu` measures this machine."
RATIO = (
    "Time of torch.nn over time of fusedrnn, medians of interleaved runs; bold where it is below 1 "
    "(95 % interval in brackets):"
)
RATIO_OF_OPTIONS = (
    "Ratio: time of what one writes in torch for the option (in torch) over time of fusedrnn with it; cost: time of "
    "fusedrnn with the option over its time without, 1 if the option is free; medians of interleaved runs. Inference is without "
    "gradients, but masks are drawn. MiB: peak of a training step by torch's allocator, in torch, with the option and "
    "without:"
)
MAIN = ("cpu", "gpu")  # the suites whose tables stand in README itself


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table, first column to the left, the others to the right."""
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def speedup_text(pair: Pair | None) -> str:
    """``2.13x``; bold with its interval where ours is slower, by noise or not."""
    if pair is None:
        return ""
    if pair.verdict in ("RED", "unable"):
        return {"RED": "**wrong**", "unable": "not measured"}[pair.verdict]
    if pair.verdict:
        low, high = pair.ours["speedup_low"], pair.ours["speedup_high"]
        return f"**{pair.speedup:.2f}x** ({low:.2f} to {high:.2f})"
    return f"{pair.speedup:.2f}x"


def by_shape(pairs: list[Pair], columns: list[tuple[str, str]], text) -> list[list[str]]:
    """A line for each shape, and in each (cell, mode) column the text of its pair (of None if there is none)."""
    found = {(pair.label, pair.cell, pair.mode): pair for pair in pairs}
    labels = dict.fromkeys(pair.label for pair in pairs)
    return [[label, *(text(found.get((label, *column))) for column in columns)] for label in labels]


def columns_of(pairs: list[Pair]) -> list[tuple[str, str]]:
    """The (cell, mode) pairs that were measured, in their usual order."""
    found = {(pair.cell, pair.mode) for pair in pairs}
    return [(cell, mode) for cell in CELLS for mode in MODES if (cell, mode) in found]


def cell_table(first: str, pairs: list[Pair], text) -> str:
    """A line for each shape, a column for each cell and mode."""
    columns = columns_of(pairs)
    return markdown([first, *(f"{cell.upper()} {mode}" for cell, mode in columns)], by_shape(pairs, columns, text))


def speed_section(pairs: list[Pair]) -> str:
    return cell_table("shape", [pair for pair in pairs if pair.group != "overhead"], speedup_text)


def target_section(pairs: list[Pair]) -> str:
    lines = [
        [what.strip(), str(count), f"{mean:.2f}x" if not target or mean >= target else f"**{mean:.2f}x**"]
        + [f"{target:g}x" if target else ""]
        for what, count, mean, target in target_lines(pairs)
    ]
    return markdown(["geometric mean", "cases", "measured", "aimed at"], lines)


def reach_section(pairs: list[Pair]) -> str:
    """How near to the machine's limits: torch, then ours."""

    def text(pair: Pair | None) -> str:
        if pair is None or pair.speedup is None:
            return ""
        return " / ".join(percent_text(row.get("fraction_of_floor")) for row in (pair.theirs, pair.ours))

    return cell_table("torch / fusedrnn", [pair for pair in pairs if pair.group != "overhead"], text)


def memory_section(pairs: list[Pair]) -> str:
    def text(pair: Pair | None) -> str:
        if pair is None or pair.ours["peak_bytes"] is None:
            return ""
        sizes = f"{bytes_text(pair.theirs['peak_bytes'])} / {bytes_text(pair.ours['peak_bytes'])}"
        return f"**{sizes}**" if pair.more_memory else sizes

    return cell_table("MiB, torch / fusedrnn", [pair for pair in pairs if pair.ours["peak_bytes"] is not None], text)


def overhead_section(pairs: list[Pair]) -> str:
    lines = [[*line, speedup_text(pair)] for pair, line in overhead_lines(pairs)]
    return markdown(["one call of one step", "torch", "fusedrnn", "ratio"], lines) if lines else ""


def packed_section(found: list[dict]) -> str:
    """Time of a call by everyone who was measured, and how many times faster than fusedrnn's own call each is."""
    names = list(dict.fromkeys(row["provider"] for row in found))
    cases = {}
    for row in found:
        cases.setdefault(row["case"], {})[row["provider"]] = row
    lines = []
    for rows_of_case in cases.values():
        first = next(iter(rows_of_case.values()))
        seconds = {name: row["seconds"] and row["seconds"]["p50"] for name, row in rows_of_case.items()}
        line = [f"{first['cell'].upper()} {shape_label(first['shape'])}"]
        for name in names:
            time, ours = seconds.get(name), seconds.get("fusedrnn")
            ratio = f" ({ours / time:.2f}x)" if time and ours and name != "fusedrnn" else ""
            line.append(seconds_text(time) + ratio)
        lines.append(line)
    return markdown(["one call (fusedrnn over it)", *names], lines)


def error_section(found: list[dict]) -> str:
    """The largest error of each provider in all cases, in units of the largest value."""
    errors = {}
    for row in found:
        if row.get("error") is not None:
            errors[row["provider"]] = max(errors.get(row["provider"], 0.0), row["error"])
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"Largest error against float64, of the largest value, over all cases: {said}."


def growth_section(pairs: list[Pair]) -> str:
    """How many times longer a call takes when one size grows from the least to the most measured: torch, then ours."""
    columns = columns_of(pairs)
    lines = []
    for size in ("T", "B", "H", "threads"):
        ends = {}
        for column in columns:
            some = [pair for pair in pairs if (pair.cell, pair.mode) == column and pair.speedup]
            points = plot.sweep(some, size) if some else []
            if len(points) > 1:
                ends[column] = points[0], points[-1]
        if not ends:
            continue
        low, high = min(first[0] for first, _ in ends.values()), max(last[0] for _, last in ends.values())
        factors = {"T": high / low, "B": high / low, "H": (high / low) ** 2, "threads": low / high}
        line = [f"{size} from {low} to {high}", f"{factors[size]:g}x"]
        for column in columns:
            if column not in ends:
                line.append("")
                continue
            (_, first), (_, last) = ends[column]
            times = [[row["seconds"]["p50"] for row in (pair.theirs, pair.ours)] for pair in (first, last)]
            growth = [late / early for early, late in zip(*times)]
            line.append(" / ".join(f"{factor:.3g}x" for factor in growth))
        lines.append(line)
    return markdown(["", "work per thread", *(f"{cell.upper()} {mode}" for cell, mode in columns)], lines)


def about_section(pairs: list[Pair]) -> str:
    """What was measured, with what, and how to read it."""
    about = pairs[0].ours
    versions = about["versions"]
    losses, even = (sum(pair.verdict == verdict for pair in pairs) for verdict in ("LOSS", "even"))
    where = f"cuDNN {versions.get('cudnn')}" if about.get("gpu") else f"{about['threads']} threads"
    return (
        f"{', '.join(dict.fromkeys(pair.ours['dtype'] for pair in pairs))}, {where}, torch {versions['torch']}, "
        f"fusedrnn {versions['fusedrnn']}, commit {about['commit'] or 'unknown'}, "
        f"{about['date']}{', a quick run' if about['quick'] else ''}. "
        f"{len(pairs)} cases: {losses} slower than torch, {even} below 1 within the noise. "
        + (RATIO_OF_OPTIONS if pairs[0].option else RATIO)
    )


def picture_line(path: pathlib.Path, page: pathlib.Path) -> str:
    """The picture of a row file, for a page in a folder above it or its own."""
    names = {"cost": "Cost by size", "peak": "Peak memory"}
    name = names.get(plot.KINDS.get(path.stem), "Speed-up by shape")
    picture = plot.picture_of(path)
    return f"![{name}]({picture.relative_to(page).as_posix()})" if picture.exists() else ""


def suite_section(path: pathlib.Path) -> str:
    """Everything about one row file, for the page of its machine."""
    pairs = measured_pairs(path)
    if pairs[0].option:
        table = markdown(OPTION_HEADER, option_lines(rows.read(path)))
        parts = [f"## {path.stem}: {SUITES[path.stem].why}", about_section(pairs), table, picture_line(path, path.parent)]
        return "\n\n".join(part for part in parts if part)
    gemm_peak = statistics.median(pair.ours["gemm_peak_gflops"] or 0.0 for pair in pairs)
    parts = [
        f"## {path.stem}: {SUITES[path.stem].why}",
        about_section(pairs),
        speed_section(pairs),
        picture_line(path, path.parent),
        target_section(pairs),
        "Time of the floor over the time taken. The floor is what the machine cannot do faster: matrix products at the peak "
        f"measured beside each case (median {gemm_peak:.0f} GF/s), the recurrent weights read at every step at the rate at "
        "which a loop reads as many bytes, and the threads' meetings:",
        reach_section(pairs),
        overhead_section(pairs),
    ]
    if plot.KINDS.get(path.stem) == "cost":
        parts.append("How many times longer a call takes when one size grows and the others stay (torch / fusedrnn):")
        parts.append(growth_section(pairs))
    every = rows.read(path)
    if any(row["provider"].startswith("frozen-") for row in every):
        parts += ["The same calls with weights packed once:", packed_section(every), error_section(every)]
    if any(pair.ours["peak_bytes"] is not None for pair in pairs):
        parts += ["Peak memory of a training step (torch's allocator; bold where ours is larger):", memory_section(pairs)]
    return "\n\n".join(part for part in parts if part)


def machine_page(folder: pathlib.Path) -> str:
    """All that was measured on one machine."""
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: (path.stem not in MAIN, list(SUITES).index(path.stem)))
    return "\n\n".join([f"# {machine.title(rows.read(paths[0])[0])}", *map(suite_section, paths)]) + "\n"


def overview(folder: pathlib.Path, paths: list[pathlib.Path]) -> str:
    """A line for each suite of a machine that has no table in README."""
    lines = []
    for path in paths:
        every = measured_pairs(path)
        pairs = [pair for pair in every if pair.speedup]
        slower = [pair for pair in pairs if pair.verdict == "LOSS"]
        worst = min(pairs, key=lambda pair: pair.speedup, default=None)
        count = str(len(pairs)) + (f" of {len(every)}" if len(pairs) < len(every) else "")
        lines.append([
            f"{path.stem}: {SUITES[path.stem].why}", count, f"{mean_speedup(pairs):.2f}x", str(len(slower)),
            f"{worst.speedup:.2f}x ({worst.cell.upper()} {worst.mode}, {worst.label})" if worst else "",
        ])  # fmt: skip
    page = folder.relative_to(ROOT).as_posix()
    table = markdown(["suite", "cases", "geometric mean", "slower than torch", "least"], lines)
    return f"{table}\n\nEvery table of this machine: [{page}]({page}/README.md)."


def machine_section(folder: pathlib.Path) -> str:
    """README's part about one machine: main table, what was aimed at, pictures, and a line for each other suite."""
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    main = [paths[name] for name in MAIN if name in paths]
    parts = [f"### {machine.title(rows.read(next(iter(paths.values())))[0])}"]
    for path in main:
        pairs = measured_pairs(path)
        parts += [about_section(pairs), speed_section(pairs), picture_line(path, ROOT), target_section(pairs)]
    others = [paths[name] for name in SUITES if name in paths and name not in MAIN]
    parts += [picture_line(paths[name], ROOT) for name in plot.KINDS if name in paths]
    parts.append(overview(folder, others) if others else "")
    return "\n\n".join(part for part in parts if part)


def machines() -> list[pathlib.Path]:
    return sorted({path.parent for path in row_files()})


def examples_block() -> str:
    """What the programs under examples/ printed last, from examples/output (written by `python -m examples`)."""
    lines = []
    for path in sorted((ROOT / "examples" / "output").glob("*.txt")):
        *_, result = path.read_text().strip().splitlines()
        picture = path.with_suffix(".svg").relative_to(ROOT)
        shown = f" [picture]({picture.as_posix()})" if (ROOT / picture).exists() else ""
        lines.append([f"[{path.stem}](examples/{path.stem}.py)", result.removeprefix("result: ") + shown])
    return markdown(["program", "what it printed"], lines).replace("---:", "---") if lines else "Not run yet."


def blocks() -> dict[str, str]:
    """README's generated parts by the word in their markers."""
    return {"benchmarks": "\n\n".join(map(machine_section, machines())) or NOTHING, "examples": examples_block()}


def markers(word: str) -> tuple[str, str]:
    return f"<!-- {word}:begin -->", f"<!-- {word}:end -->"


def rewritten(readme: str, found: dict[str, str]) -> str:
    """`readme` with each text between its markers. ValueError if they are not there once each, in order."""
    for word, text in found.items():
        begin, end = markers(word)
        if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
            raise ValueError(f"README.md must hold {begin} and after it {end}, once each")
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return readme


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something is out of date")
    check = parser.parse_args(arguments).check
    readme = ROOT / "README.md"
    stale = []
    try:
        for path in row_files():
            if not plot.is_current(path):
                stale.append(plot.picture_of(path) if check else plot.draw(path))
        texts = {readme: rewritten(readme.read_text(), blocks())}
        texts |= {folder / "README.md": machine_page(folder) for folder in machines()}
        for path, text in texts.items():
            if not path.exists() or path.read_text() != text:
                stale.append(path)
                if not check:
                    path.write_text(text)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    if not check:
        return 0
    for path in stale:
        name = path.relative_to(ROOT).as_posix()
        print(f"benchmarks.report: {name} is out of date: run python -m benchmarks.report", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
