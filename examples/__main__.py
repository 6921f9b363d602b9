"""Runs every example of this folder as its own docstring says, keeps what each printed, and sums up.

    python -m examples                 all of them, one after the other
    python -m examples --only digits   one of them; may be given several times

What an example prints goes to examples/output/NAME.txt below the command that printed it, its picture to NAME.svg. An
example is a module here that has `parse` and `run`. Exit status: 0 if all of them ended well, 1 if not.
"""

import argparse
import importlib
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import examples

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "examples" / "output"


def find() -> dict[str, list[str]]:
    """{name: the words beside its defaults} of each example: where to leave the picture, if it draws one."""
    found = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(examples.__path__) if module.name != "__main__"):
        module = importlib.import_module(f"examples.{name}")
        if hasattr(module, "run") and hasattr(module, "parse"):
            draws = hasattr(module.parse().parse_args([]), "plot")
            found[name] = ["--plot", os.path.relpath(OUTPUT / f"{name}.svg", ROOT)] if draws else []
    return found


def run_one(name: str, words: list[str]) -> tuple[int, float, str]:
    """Runs an example, its output passed on line by line: (exit status, seconds, its last line)."""
    command = ["-m", f"examples.{name}", *words]
    lines = [" ".join(["python", *command]) + "\n"]
    print(f"$ {lines[0]}", end="", flush=True)
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # or its lines would come all at once, at the end
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    seconds = time.perf_counter() - start
    (OUTPUT / f"{name}.txt").write_text("".join(lines))
    print(flush=True)
    return child.returncode, seconds, lines[-1].strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("examples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = find()
    parser.add_argument("--only", choices=known, action="append", metavar="NAME", help=", ".join(known))
    args = parser.parse_args(argv)
    OUTPUT.mkdir(exist_ok=True)
    try:
        results = {name: run_one(name, known[name]) for name in args.only or known}
    except KeyboardInterrupt:  # the example has been stopped by the same key, and has said so
        return 130
    width = max(map(len, results))
    for name, (status, seconds, last) in results.items():
        print(f"{name:{width}} {seconds:6.1f} s  {f'FAILED with exit status {status}' if status else last}")
    return 1 if any(status for status, *_ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
