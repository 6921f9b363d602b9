"""Measure a suite: correctness first, then torch.nn and fusedrnn in turn, in one process.

    python -m benchmarks.run --suite cpu              all of it; rows to results/<machine>/cpu.jsonl
    python -m benchmarks.run --suite cpu --quick      under 3 minutes, wider intervals, rows only with --out
    python -m benchmarks.run --suite cpu --only 'lstm/training/.*H512'

Exit status: 0; 1 if a result was wrong (such a case has no speed); 130 if interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import re
import sys

import torch

from . import gate, machine, rows, table, timing
from .memory import Meter
from .progress import Progress
from .providers import PROVIDERS, TorchProvider, provider_named
from .shapes import CELLS, SUITES, Case, cases
from .workload import Workload


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a case is measured."""

    seconds: float
    least_rounds: int
    peak_seconds: float  # for the GEMM peak, before and after
    memory_flops: float  # training steps of more work than this have no memory measured


FULL = Effort(seconds=4.0, least_rounds=15, peak_seconds=0.2, memory_flops=math.inf)
QUICK = Effort(seconds=0.5, least_rounds=2, peak_seconds=0.05, memory_flops=4e9)


class Run:
    """One run of a suite. The first provider is the baseline, the others are held against it."""

    def __init__(self, suite: str, providers: list, effort: Effort, meter: Meter | None = None):
        self.suite, self.providers, self.effort, self.meter = suite, providers, effort, meter
        self.device = SUITES[suite].device
        self.about = machine.describe(self.device) | {"date": datetime.date.today().isoformat(), "quick": effort is QUICK}
        self.gemm_peak = 0.0  # flop/s, the highest met so far
        self.bandwidth = functools.cache(machine.matvec_bandwidth)

    def measure(self, case: Case) -> list[dict]:
        """The rows of a case, one for each provider."""
        workloads = [Workload(case, provider) for provider in self.providers]
        verdicts = [self._judge(case, workload) for workload in workloads]
        measured = [self._row(case, workload, verdict) for workload, verdict in zip(workloads, verdicts)]
        if not all(verdict.passed for verdict in verdicts):
            return measured  # a wrong result has no speed, and there is nothing to hold the others against
        before = self._gemm_peak(case)
        samples = timing.interleave([w.call for w in workloads], self.effort.seconds, self.effort.least_rounds, device=self.device)
        peak = max(before, self._gemm_peak(case))  # beside the case: machines have slow spells
        self.gemm_peak = max(self.gemm_peak, peak)
        for row, times in zip(measured, samples):
            row |= self._speed(case, times, peak)
            if row["against"]:
                names = ("speedup", "speedup_low", "speedup_high")
                row |= {k: round(v, 4) for k, v in zip(names, timing.ratio_interval(samples[0], times))}
        if self.meter and case.mode == "training" and case.flops <= self.effort.memory_flops:
            peaks = self.meter.measure(case)
            for row in measured:
                row |= peaks.get(row["provider"], {})
        if self.device == "cuda" and case.mode == "training":
            for row, workload in zip(measured, workloads):
                row["peak_bytes"] = cuda_peak(workload.call)
        return measured

    def _judge(self, case: Case, workload: Workload) -> gate.Verdict:
        if type(workload.provider) is TorchProvider:
            return gate.judge(workload, workload)  # the one that others are held against, for which nothing more is made
        if self.device == "cpu":
            return gate.judge(workload, Workload(case, TorchProvider()))
        short = case.shortened()
        return gate.judge(Workload(short, workload.provider), Workload(short, TorchProvider()))

    def _gemm_peak(self, case: Case) -> float:
        return machine.gemm_peak(self.effort.peak_seconds, *([4096, self.device, case.dtype] if self.device == "cuda" else []))

    def _row(self, case: Case, workload: Workload, verdict: gate.Verdict) -> dict:
        """A row with everything but speed and memory."""
        name = workload.provider.name
        unmeasured = ["seconds", "rounds", "gflops", "gemm_peak_gflops", "fraction_of_gemm_peak", "weight_gbs"]
        unmeasured += ["fraction_of_bandwidth", "peak_bytes", "resident_peak_bytes", "speedup", "speedup_low", "speedup_high"]
        return {
            "suite": self.suite,
            "case": case.name,
            "shape": {k: v for k, v in dataclasses.asdict(case.shape).items() if k not in ("why", "source")},
            "cell": case.cell,
            "mode": case.mode,
            "dtype": case.dtype,
            "provider": name,
            "kernel": workload.kernel() if verdict.passed else None,
            "gate": "green" if verdict.passed else "red",
            "gate_worst": verdict.worst,
            "error": verdict.error,
            "torch_error": verdict.torch_error,
            "against": None if name == self.providers[0].name else self.providers[0].name,
            **dict.fromkeys(unmeasured),
            **self.about,
        }

    def _speed(self, case: Case, times: list[float], gemm_peak: float) -> dict:
        quantiles = {f"p{q}": timing.quantile(times, q / 100) for q in (20, 50, 80)}
        speed = case.flops / quantiles["p50"]
        found = {
            "seconds": {k: float(f"{v:.5g}") for k, v in quantiles.items()},
            "rounds": len(times),
            "gflops": round(speed / 1e9, 3),
            "gemm_peak_gflops": round(gemm_peak / 1e9, 1),
            "fraction_of_gemm_peak": round(speed / gemm_peak, 4),
        }
        if self.device == "cpu" and case.shape.B == 1 and case.shape.T > 1:  # one stream: reading the weights is the bound
            rate = case.weight_bytes / quantiles["p50"]
            reachable = self.bandwidth(CELLS[case.cell] * case.shape.H, case.shape.H)
            found |= {"weight_gbs": round(rate / 1e9, 3), "fraction_of_bandwidth": round(rate / reachable, 4)}
        return found


def cuda_peak(step) -> int:
    """Bytes of torch's CUDA allocator that `step` holds at most, beyond what there was before; its result counts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def weight(case: Case, effort: Effort) -> float:
    """Roughly the seconds a case takes, for the time left."""
    once = case.flops / (2e13 if case.device == "cuda" else 4e10)  # torch and ours together, in the middle
    return effort.seconds + 2 * effort.peak_seconds + 0.3 + (2 * effort.least_rounds + 6) * once


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes, wider intervals")
    parser.add_argument("--out", type=pathlib.Path, help="file for the rows (a full run has a place of its own)")
    parser.add_argument("--only", metavar="PATTERN", help="regular expression on names like lstm/training/T100-B1-...")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    names = ", ".join(PROVIDERS)
    parser.add_argument("--providers", default="torch,fusedrnn", help=f"baseline first; there are {names}")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--list", action="store_true", help="print the shapes with their reasons and stop")
    options = parser.parse_args(arguments)
    try:
        re.compile(options.only or "")
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression: {error}")
    if not cases(options.suite, options.only):
        parser.error(f"--only {options.only!r} matches no case of suite {options.suite}")
    unknown = [name for name in options.providers.split(",") if name not in PROVIDERS]
    if unknown:
        parser.error(f"no provider is called {unknown[0]!r}; there are {names}")
    if SUITES[options.suite].device == "cuda" and not torch.cuda.is_available():
        parser.error(f"suite {options.suite} needs a GPU that torch sees")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.out is None and not (options.quick or options.only or options.providers != "torch,fusedrnn"):
        options.out = machine.RESULTS / machine.machine_name(SUITES[options.suite].device) / f"{options.suite}.jsonl"
    return options


def print_shapes(suite: str) -> None:
    for shape in SUITES[suite].shapes:
        print(f"{shape.name:<32} {shape.why}\n{'':<32} {shape.source}")


def measure_all(run: Run, chosen: list[Case], write) -> list[dict]:
    """Measure every case, handing each row to `write` as soon as it is there."""
    progress = Progress(sum(weight(case, run.effort) for case in chosen))
    found = []
    try:
        for case in chosen:
            progress.show(case.name)
            for row in run.measure(case):
                found.append(row)
                write(row)
            progress.advance(weight(case, run.effort))
    finally:
        progress.clear()
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print_shapes(options.suite)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.providers.split(",")
    chosen = cases(options.suite, options.only)
    partial = None
    with contextlib.ExitStack() as stack:
        write = lambda row: None  # noqa: E731
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            partial = options.out.with_name(options.out.name + ".partial")
            file = stack.enter_context(partial.open("w"))
            write = lambda row: print(json.dumps(row), file=file, flush=True)  # noqa: E731
        training = any(case.mode == "training" and case.device == "cpu" for case in chosen) and not options.no_memory
        meter = stack.enter_context(Meter(names, torch.get_num_threads())) if training else None
        run = Run(options.suite, [provider_named(name) for name in names], QUICK if options.quick else FULL, meter)
        try:
            found = measure_all(run, chosen, write)
        except KeyboardInterrupt:
            print(f"interrupted{f'; the rows so far are in {partial}' if partial else ''}", file=sys.stderr)
            return 130
    if options.out:
        os.replace(partial, options.out)
    measured = rows.pairs(found)
    about = run.about
    print(f"{about['cpu']}, {about['threads']} threads, {about['isa']}, torch {about['versions']['torch']}, ", end="")
    print(f"GEMM peak {run.gemm_peak / 1e9:.0f} GF/s\n\n{table.case_table(measured)}\n\n{table.summary(measured)}")
    print(f"\nrows: {options.out}" if options.out else "\nrows not written (a full run or --out FILE writes them)")
    return 1 if any(row["gate"] == "red" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
