"""Measure what torch.nn's layers cannot do: fusedrnn with an option, fusedrnn without it, and what one writes in torch.

    python -m benchmarks.options                      all of it; rows to results/<machine>/options.jsonl
    python -m benchmarks.options --quick              under a minute: 25 steps of the first shape; rows only with --out
    python -m benchmarks.options --only zoneout --out rows.jsonl

Suite options of benchmarks.run, whose other arguments it takes. The options and what is written for them: written.py.
"""

from __future__ import annotations

import sys

from . import run
from .suites import OPTION_SHAPES

QUICK = run.Effort(seconds=0.2, least_rounds=2, peak_seconds=0.02, memory_flops=0, minutes=0.9, gate_flops=1e8)
QUICK_STEPS = 25


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    usual = ["--only", f"B{OPTION_SHAPES[0].B}-", "--steps", str(QUICK_STEPS)] if "--quick" in words else []
    return run.main(["--suite", "options", *usual, *words], QUICK)  # what is asked for comes last, and holds


if __name__ == "__main__":
    sys.exit(main())
