"""Peak memory of one training step, measured in a process of its own so that the clock's process stays clean.

Two meters, for each is blind to something:

- the allocator: every allocation and release that goes through torch's CPU allocator during the step, added up in
  order by torch.profiler. Exact to the byte and repeatable; it sees all tensors and oneDNN's workspaces, and no plain
  malloc. The peak is counted from the start of the step, when weights and input already exist.
- the resident set: how far the process grows during the step, from the kernel (VmHWM, reset by clear_refs). It sees
  everything, plain malloc too, in whole touched pages. Linux only; noise of some hundred KiB.

    python -m benchmarks.memory lstm/training/T100-B16-I256-H256
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import pathlib
import re
import subprocess
import sys

import torch

from .providers import reason_against
from .registry import provider_named
from .shapes import Case
from .suites import case_named
from .workload import Workload

# Large blocks go back to the kernel when they are freed, so that the resident set shows what one step needs.
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def measure(case: Case, provider) -> dict[str, int | None]:
    """Peak bytes of a warmed training step above what was there before it: {"peak_bytes", "resident_peak_bytes"}."""
    workload = Workload(case, provider)
    with workload.around():
        workload.call()
        tries = 3 if case.flops < 4e9 else 1  # stray pages matter in small steps only
        return {"peak_bytes": allocator_peak(workload.call), "resident_peak_bytes": resident_peak(workload.call, tries)}


def allocator_peak(step) -> int:
    """Largest sum of live bytes that `step` got from torch's allocator; its result counts as live."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    del kept
    # Only the raw events have the order and the sizes; the public tables add them up by operator.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident_peak(step, tries: int = 3) -> int | None:
    """Bytes by which the resident set grows at most during `step`, the least of `tries`; None where Linux is not."""
    grown = []
    try:
        for _ in range(tries):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            kept = step()
            grown.append(_status("VmHWM") - before)
            del kept
    except (OSError, AttributeError, TypeError):
        return None
    return max(0, min(grown))


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


class Meter(contextlib.AbstractContextManager):
    """A process that measures the cases it is asked for; one for a whole run, since importing torch is slow."""

    def __init__(self, providers: list[str], threads: int):
        command = [sys.executable, "-m", "benchmarks.memory", "--threads", str(threads)]
        self.process = subprocess.Popen(
            [*command, "--providers", ",".join(providers), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=pathlib.Path(__file__).parent.parent,  # unresolved: beside whichever fusedrnn is measured (compare.py)
            env=os.environ | MALLOC_SETTINGS,
        )

    def measure(self, case: Case) -> dict[str, dict]:
        """Peaks by provider; {} if the process cannot tell (it died, or the provider failed)."""
        try:
            self.process.stdin.write(json.dumps(case.to_json()) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            return {}
        return json.loads(answer) if answer else {}

    def __exit__(self, *exception):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help='names of training cases; "-" reads cases as JSON from stdin, one a line')
    parser.add_argument("--providers", default="torch,fusedrnn")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    threads = options.threads or torch.get_num_threads()
    providers = [provider_named(name) for name in options.providers.split(",")]
    asked = map(json.loads, sys.stdin) if options.cases == ["-"] else None
    for case in map(Case.from_json, asked) if asked else map(case_named, options.cases):
        torch.set_num_threads(case.shape.threads or threads)
        found = {}
        for provider in providers:
            with contextlib.suppress(Exception):  # one that fails has no peaks, and is judged elsewhere
                found |= {} if reason_against(provider, case) else {provider.name: measure(case, provider)}
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
