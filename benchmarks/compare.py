"""Compare two row files, or two commits, before and after: what became faster, what slower, and is it more than noise?

    python -m benchmarks.compare before.jsonl after.jsonl
    python -m benchmarks.compare HEAD~1 HEAD --run '--suite cpu --quick --only lstm'

A commit is checked out beside this tree, built, and measured with this tree's benchmarks.

Judged by the speed-up over torch, not by the time: both runs timed torch beside ours, so a busier or warmer machine
cancels out. A case is slower if its 95 % interval lies below the other's by more than TOLERANCE; it needs more memory
if its allocator peak grew by more than MEMORY_TOLERANCE; and a result may not turn wrong.

Exit status: 0; 1 if a case became slower, larger or wrong; 2 if the two cannot be compared.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys
import tempfile

from . import rows, timing
from .machine import ROOT
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


def rows_of(what: str, words: list[str]) -> list[dict]:
    """The rows in a file, or of a commit measured now."""
    return rows.read(what) if what.endswith(".jsonl") or pathlib.Path(what).exists() else measured_at(what, words)


def measured_at(commit: str, words: list[str]) -> list[dict]:
    """The rows of `benchmarks.run words` with the fusedrnn of a commit. ValueError if it is none, or does not build or run."""
    with tempfile.TemporaryDirectory(prefix="fusedrnn-") as folder:
        tree, place = pathlib.Path(folder, "tree"), pathlib.Path(folder, "place")
        place.mkdir()
        steps = [
            (["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), commit], ROOT),
            ([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree),
            ([sys.executable, "-m", "benchmarks.run", *words, "--out", str(place / "rows.jsonl")], place),
        ]
        (place / "benchmarks").symlink_to(ROOT / "benchmarks")
        (place / "fusedrnn").symlink_to(tree / "fusedrnn")
        try:
            for command, where in steps:
                print(f"{commit}: {shlex.join(command[1:4])}", file=sys.stderr, flush=True)
                done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode and not (place / "rows.jsonl").exists():  # a run with a wrong result has rows all the same
                    raise ValueError(f"{commit}: {shlex.join(command)} failed: {done.stdout.strip()[-500:]}")
            return rows.read(place / "rows.jsonl")
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a row file or a commit")
    parser.add_argument("after")
    parser.add_argument("--run", default="--suite cpu --quick", help="what to measure of commits (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        both = [rows_of(what, shlex.split(options.run)) for what in (options.before, options.after)]
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
