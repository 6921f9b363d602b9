"""Compare two row files, before and after: what became faster, what slower, and is it more than noise?

    python -m benchmarks.compare before.jsonl after.jsonl

Judged by the speed-up over torch, not by the time: both runs timed torch beside ours, so a busier or warmer machine
cancels out. A case is slower if its 95 % interval lies below the other's by more than TOLERANCE; it needs more memory
if its allocator peak grew by more than MEMORY_TOLERANCE; and a result may not turn wrong.

Exit status: 0; 1 if a case became slower, larger or wrong; 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys

from . import rows, timing
from .table import bytes_text, grid, seconds_text

TOLERANCE = 0.03  # two runs of the same code, minutes apart, differ by this much beyond their own intervals
MEMORY_TOLERANCE = 0.01


def change(before: rows.Pair, after: rows.Pair) -> tuple[float | None, list[str]]:
    """(speed after / before or None, what is worse or better: "slower", "faster", "larger", "WRONG")."""
    if after.verdict == "RED":
        return None, ["WRONG"] if before.verdict != "RED" else []
    if before.speedup is None or after.speedup is None:
        return None, []
    notes = []
    if after.ours["speedup_high"] < before.ours["speedup_low"] * (1 - TOLERANCE):
        notes.append("slower")
    if after.ours["speedup_low"] > before.ours["speedup_high"] * (1 + TOLERANCE):
        notes.append("faster")
    old, new = before.ours["peak_bytes"], after.ours["peak_bytes"]
    if old is not None and new is not None and new > old * (1 + MEMORY_TOLERANCE):
        notes.append(f"larger: {bytes_text(old)} to {bytes_text(new)} MiB")
    return after.speedup / before.speedup, notes


def is_worse(note: str) -> bool:
    return note in ("slower", "WRONG") or note.startswith("larger")


def differences(before: list[dict], after: list[dict]) -> list[str]:
    """Facts other than fusedrnn that differ between the two runs."""
    old, new = before[0], after[0]
    found = [f"{key}: {old[key]} and {new[key]}" for key in ("machine", "threads") if old[key] != new[key]]
    old, new = (run[0]["versions"]["torch"] for run in (before, after))
    return found + [f"torch: {old} and {new}"] * (old != new)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
    options = parser.parse_args(arguments)
    try:
        both = [rows.read(options.before), rows.read(options.after)]
    except (OSError, ValueError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    before, after = ({pair.key: pair for pair in rows.pairs(run)} for run in both)
    common = [key for key in before if key in after]
    if not common:
        print("benchmarks.compare: the two files have no case in common", file=sys.stderr)
        return 2
    for fact in differences(*both):
        print(f"note: the runs differ in {fact}")

    lines, worse, ratios = [], 0, []
    for key in common:
        ratio, notes = change(before[key], after[key])
        worse += any(map(is_worse, notes))
        ratios += [ratio] if ratio else []
        line = [before[key].ours["case"]]
        for pair in (before[key], after[key]):
            seconds = pair.ours["seconds"]
            line += [seconds_text(seconds and seconds["p50"]), f"{pair.speedup:.2f}x" if pair.speedup else "-"]
        lines.append([*line, f"{ratio:.2f}" if ratio else "-", ", ".join(notes)])
    print(grid(["case", "before", "of torch", "after", "of torch", "after/before", ""], lines))
    print(f"\n{len(common)} cases, geometric mean {timing.geometric_mean(ratios):.3f}, {worse} worse beyond the noise")
    for name, some, other in (("before", before, after), ("after", after, before)):
        alone = [key[0] for key in some if key not in other]
        if alone:
            print(f"only in {name}: {', '.join(alone)}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
