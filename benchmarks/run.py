"""Measure suites: correctness first, then torch.nn and fusedrnn in turn, in one process.

    python -m benchmarks.run --suite cpu              all of it; rows to results/<machine>/cpu.jsonl
    python -m benchmarks.run --suite cpu --quick      under 3 minutes, wider intervals, rows only with --out
    python -m benchmarks.run --suite all              every suite of this device, each to its own file
    python -m benchmarks.run --suite cpu --only 'lstm/training/.*H512'
    python -m benchmarks.run --suite deepbench-train --device cpu --steps 25

Exit status: 0; 1 if a result was wrong (such a case has no speed); 130 if interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import sys

import torch

from . import gate, limits, machine, rows, table, timing
from .memory import Meter
from .progress import Progress
from .providers import WITHOUT, Provider, TorchProvider, reason_against
from .registry import PROVIDERS, provider_named
from .shapes import MODES, Case
from .suites import SUITES, cases, suites_of
from .workload import Workload

BUSY = 0.75  # processes ready to run, for each core, beyond which a run says that it was not alone
LARGE = 5e10  # flops beyond which the gate judges fewer steps: float64 beside them would take longer than the measurement


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a case is measured."""

    seconds: float
    least_rounds: int
    peak_seconds: float  # for the GEMM peak, before and after
    memory_flops: float  # training steps of more work than this have no memory measured
    minutes: float = math.inf  # cases that would not be done by then are left out, and named
    gate_flops: float = LARGE


FULL = Effort(seconds=4.0, least_rounds=15, peak_seconds=0.2, memory_flops=2e11)
QUICK = Effort(seconds=0.5, least_rounds=2, peak_seconds=0.05, memory_flops=1e9, minutes=2.8)


class Run:
    """One run of a suite. The first provider is the baseline, the others are held against it."""

    def __init__(self, suite: str, device: str, providers: list[Provider], effort: Effort, meter: Meter | None = None):
        self.suite, self.device, self.providers, self.effort, self.meter = suite, device, providers, effort, meter
        self.threads = torch.get_num_threads()
        quick = effort.seconds < FULL.seconds
        self.about = machine.describe(device) | {"date": datetime.date.today().isoformat(), "quick": quick}
        busy = (self.about["load_before"] or 0.0) / self.about["cores"]
        if busy > BUSY:
            print(f"benchmarks.run: {busy:.0%} of this machine was in use: ratios will be less sure", file=sys.stderr)
        self.gemm_peak = 0.0  # flop/s, the highest met so far
        self.clock = timing.clock(device)

    def measure(self, case: Case) -> list[dict]:
        """The rows of a case, one for each provider."""
        refusals = {provider.name: reason_against(provider, case) for provider in self.providers}
        refused = [self._row(case, name, gate="unable", gate_worst=why) for name, why in refusals.items() if why]
        able = [provider for provider in self.providers if not refusals[provider.name]]
        torch.set_num_threads(case.shape.threads or self.threads)
        try:
            return self._measure(case, able) + refused
        except (torch.OutOfMemoryError, MemoryError) as error:  # the other cases can be measured all the same
            why = f"out of memory: {str(error).splitlines()[0]}"
            return [self._row(case, provider.name, gate="unable", gate_worst=why) for provider in able] + refused
        finally:
            torch.set_num_threads(self.threads)

    def left_out(self, case: Case) -> list[dict]:
        """The rows of a case that there is no time for."""
        return [self._row(case, provider.name, gate="unable", gate_worst="no time was left") for provider in self.providers]

    def _measure(self, case: Case, providers: list[Provider]) -> list[dict]:
        workloads = [Workload(case, provider) for provider in providers]
        verdicts = [self._judge(case, workload) for workload in workloads]
        measured = [self._judged(case, workload, verdict) for workload, verdict in zip(workloads, verdicts)]
        sound = [i for i, verdict in enumerate(verdicts) if verdict.passed]  # a wrong result has no speed
        if not sound:
            return measured
        before = self._gemm_peak(case)
        samples = timing.interleave(
            [workloads[i].call for i in sound], self.effort.seconds, self.effort.least_rounds,
            around=[workloads[i].around for i in sound], clock=self.clock,
        )  # fmt: skip
        peak = max(before, self._gemm_peak(case))  # beside the case: machines have slow spells
        self.gemm_peak = max(self.gemm_peak, peak)
        baseline = samples[0] if sound[0] == 0 and providers[0] is self.providers[0] else None
        for i, times in zip(sound, samples):
            measured[i] |= self._speed(case, times, peak)
            if measured[i]["against"] and baseline:
                names = ("speedup", "speedup_low", "speedup_high")
                measured[i] |= {k: round(v, 4) for k, v in zip(names, timing.ratio_interval(baseline, times))}
        for plain in (samples[k] for k, i in enumerate(sound) if providers[i].name == WITHOUT):
            for i, times in zip(sound, samples):
                if measured[i]["against"]:
                    names = ("cost", "cost_low", "cost_high")
                    measured[i] |= {k: round(v, 4) for k, v in zip(names, timing.ratio_interval(times, plain))}
        if self.meter and case.mode == "training" and case.flops <= self.effort.memory_flops:
            peaks = self.meter.measure(case)
            for row in measured:
                row |= peaks.get(row["provider"], {})
        if self.device == "cuda":
            for i in sound:
                with workloads[i].around():
                    measured[i] |= timing.launch_times(workloads[i].call, captures=case.mode != "backward")
                    measured[i]["peak_bytes"] = cuda_peak(workloads[i].call) if case.mode == "training" else None
        return measured

    def _judge(self, case: Case, workload: Workload) -> gate.Verdict:
        if type(workload.provider) is TorchProvider:
            return gate.judge(workload, workload)  # the one that others are held against, for which nothing more is made
        case = workload.case
        short = case.shortened(self.effort.gate_flops)
        if short == case:
            return gate.judge(workload, Workload(case, TorchProvider()))
        return gate.judge(Workload(short, workload.provider), Workload(short, TorchProvider()))

    def _gemm_peak(self, case: Case) -> float:
        return limits.gemm_peak(self.effort.peak_seconds, 4096 if self.device == "cuda" else 1024, self.device, case.dtype)

    def _row(self, case: Case, name: str, **known) -> dict:
        """A row of what is known without measuring, and null for the rest."""
        unmeasured = ["kernel", "error", "torch_error", "seconds", "rounds", "gflops", "gemm_peak_gflops"]
        unmeasured += ["fraction_of_gemm_peak", "weight_gbs", "fraction_of_bandwidth", "floor_seconds", "fraction_of_floor"]
        unmeasured += ["step_latency", "eager_seconds", "graph_seconds", "peak_bytes", "resident_peak_bytes"]
        unmeasured += ["speedup", "speedup_low", "speedup_high", "cost", "cost_low", "cost_high"]
        return {
            "suite": self.suite,
            "case": case.name,
            "option": case.option,
            "shape": {k: v for k, v in dataclasses.asdict(case.shape).items() if k not in ("why", "source", "cells")},
            "cell": case.cell,
            "mode": case.mode,
            "dtype": case.dtype,
            "provider": name,
            "against": None if name in (self.providers[0].name, WITHOUT) else self.providers[0].name,
            **dict.fromkeys(unmeasured),
            **self.about,
            "threads": case.shape.threads or self.threads,
            **known,
        }

    def _judged(self, case: Case, workload: Workload, verdict: gate.Verdict) -> dict:
        return self._row(
            case, workload.provider.name,
            gate="green" if verdict.passed else "red",
            gate_worst=verdict.worst,
            kernel=workload.kernel() if verdict.passed else None,
            error=verdict.error,
            torch_error=verdict.torch_error,
        )  # fmt: skip

    def _speed(self, case: Case, times: list[float], gemm_peak: float) -> dict:
        threads = case.shape.threads or self.threads
        seconds = {f"p{q}": timing.quantile(times, q / 100) for q in (20, 50, 80)}
        speed = case.flops / seconds["p50"]
        floor = limits.floor_seconds(case, self.gemm_peak, threads)  # of the best spell met: nothing is to go below it
        found = {
            "seconds": {k: float(f"{v:.5g}") for k, v in seconds.items()},
            "rounds": len(times),
            "gflops": round(speed / 1e9, 3),
            "gemm_peak_gflops": round(gemm_peak / 1e9, 1),
            "fraction_of_gemm_peak": round(speed / gemm_peak, 4),
            "floor_seconds": floor and float(f"{floor:.5g}"),
            "fraction_of_floor": floor and round(floor / seconds["p50"], 4),
            "step_latency": limits.step_latency(self.device, threads),
        }
        reachable = limits.read_bandwidth(int(case.recurrent_bytes), threads) if self.device == "cpu" else None
        if reachable and case.shape.B == 1:  # one stream: reading the weights is the bound
            rate = case.recurrent_bytes * case.steps / seconds["p50"]
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
    rounds = max(timing.FEWEST, min(effort.least_rounds, timing.PATIENCE * effort.seconds / once))
    gated = min(case.flops, LARGE) / case.flops  # float64 truth and a call of each
    return effort.seconds + 2 * effort.peak_seconds + 0.3 + (2 * rounds + 3 + 6 * gated) * once


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if torch sees one and the suite can use it")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes a suite, wider intervals")
    parser.add_argument("--minutes", type=float, help="leave out, and name, the cases that would not be done by then")
    parser.add_argument("--out", type=pathlib.Path, help="file for the rows (a full run has a place of its own)")
    parser.add_argument("--only", metavar="PATTERN", help="regular expression on names like lstm/training/T100-B1-...")
    parser.add_argument("--modes", help=f"comma-separated, of {', '.join(MODES)}; default: the suite's own")
    parser.add_argument("--steps", type=int, help="cut sequences to this many steps")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    names = ", ".join(PROVIDERS)
    parser.add_argument("--providers", help=f"baseline first; default: the suite's own; there are {names}")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--list", action="store_true", help="print the suites or the suite's shapes with reasons, and stop")
    options = parser.parse_args(arguments)
    try:
        re.compile(options.only or "")
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression: {error}")
    for name in ("threads", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    for name, known in (("providers", PROVIDERS), ("modes", MODES)):
        words = getattr(options, name)
        unknown = [word for word in words.split(",") if word not in known] if words is not None else []
        if unknown:
            parser.error(f"no {name.rstrip('s')} is called {unknown[0]!r}; there are {', '.join(known)}")
    options.modes = tuple(options.modes.split(",")) if options.modes else None
    usable = SUITES[options.suite].devices if options.suite != "all" else ("cuda", "cpu")
    on_gpu = usable == ("cuda",) or ("cuda" in usable and torch.cuda.is_available())
    options.device = options.device or ("cuda" if on_gpu else "cpu")
    if options.device not in usable:
        parser.error(f"suite {options.suite} is not measured on {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available() and not options.list:
        parser.error(f"suite {options.suite} needs a GPU that torch sees")
    if options.suite == "all" and options.out:
        parser.error("--suite all writes a file for each suite: --out names only one")
    options.suites = suites_of(options.device) if options.suite == "all" else [options.suite]
    if not any(chosen_cases(options, suite) for suite in options.suites):
        parser.error(f"--only {options.only!r} matches no case of suite {options.suite}")
    return options


def chosen_cases(options: argparse.Namespace, suite: str) -> list[Case]:
    threads = options.threads or torch.get_num_threads()
    return cases(suite, options.only, device=options.device, modes=options.modes, steps=options.steps, threads=threads)


def providers_of(options: argparse.Namespace, suite: str) -> str:
    return options.providers or SUITES[suite].providers


def rows_file(options: argparse.Namespace, suite: str) -> pathlib.Path | None:
    """Where the rows go: --out, or for a whole suite as it stands the place of committed rows."""
    changed = [options.quick, options.only, options.modes, options.steps, options.minutes, options.threads, options.no_memory]
    if options.out or any(changed) or providers_of(options, suite) != SUITES[suite].providers:
        return options.out
    return machine.RESULTS / machine.machine_name(options.device) / f"{suite}.jsonl"


def print_shapes(suites: list[str]) -> None:
    for suite in suites:
        print(f"{suite}: {SUITES[suite].why}")
        for shape in SUITES[suite].shapes:
            print(f"  {shape.name:<32} {' '.join(shape.cells)}: {shape.why}\n  {'':<32} {shape.source}")


def measure_all(run: Run, chosen: list[Case], write) -> tuple[list[dict], list[Case]]:
    """Measure every case, handing each row to `write` as soon as it is there: (rows, cases there was no time for)."""
    progress = Progress(sum(weight(case, run.effort) for case in chosen))
    found, left_out = [], []
    try:
        for case in chosen:
            heavy = weight(case, run.effort)
            late = progress.seconds_until(heavy) > 60 * run.effort.minutes
            if late:
                left_out.append(case)
                progress.forget(heavy)
            else:
                progress.show(case.name)
            for row in run.left_out(case) if late else run.measure(case):
                found.append(row)
                write(row)
            if not late:
                progress.advance(heavy)
    finally:
        progress.clear()
    return found, left_out


def run_suite(options: argparse.Namespace, suite: str, quick: Effort | None = None) -> bool:
    """Measures and prints one suite, with effort `quick` if --quick; True if no result was wrong.

    If stopped, it leaves the rows so far in a .partial file.
    """
    names, chosen, out = providers_of(options, suite).split(","), chosen_cases(options, suite), rows_file(options, suite)
    effort = quick or QUICK if options.quick else FULL
    effort = dataclasses.replace(effort, minutes=options.minutes or effort.minutes)
    partial = out and out.with_name(out.name + ".partial")
    with contextlib.ExitStack() as stack:
        write = lambda row: None  # noqa: E731
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(partial.open("w"))
            write = lambda row: print(json.dumps(row), file=file, flush=True)  # noqa: E731
        training = any(case.mode == "training" and case.device == "cpu" for case in chosen) and not options.no_memory
        meter = stack.enter_context(Meter(names, torch.get_num_threads())) if training else None
        run = Run(suite, options.device, [provider_named(name) for name in names], effort, meter)
        try:
            found, left_out = measure_all(run, chosen, write)
        except KeyboardInterrupt:
            print(f"interrupted{f'; the rows so far are in {partial}' if out else ''}", file=sys.stderr)
            raise
    if out:
        os.replace(partial, out)
    measured, about = rows.pairs(found), run.about
    lines = table.option_table(found) if SUITES[suite].options[0] else table.case_table(measured)
    print(f"{suite}: {machine.title(about)}, {about['threads']} threads, torch {about['versions']['torch']}, ", end="")
    print(f"GEMM peak {run.gemm_peak / 1e9:.0f} GF/s\n\n{lines}\n\n{table.summary(measured)}")
    if left_out:
        print(f"\nno time for {len(left_out)} cases: {', '.join(case.name for case in left_out)}")
    print(f"\nrows: {out}\n" if out else "\nrows not written (a full run or --out FILE writes them)\n", flush=True)
    return not any(row["gate"] == "red" for row in found)


def main(arguments: list[str] | None = None, quick: Effort | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print_shapes(options.suites)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        sound = [run_suite(options, suite, quick) for suite in options.suites if chosen_cases(options, suite)]
    except KeyboardInterrupt:
        return 130
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
