"""The clock: two or more calls timed in turn, in one process, and what their times say.

The runs alternate A B, B A, A B, ... so that a slow spell of the machine, heat and clock speed meet all alike.

On a CPU a sample is the mean time of a call over a block of calls that lasts at least BLOCK_SECONDS: within a block of
several a call finds its own weights in the cache, as in a program that uses one module; a longer call follows the other
provider's. On a GPU a sample is one call of an idle GPU, from before its first kernel to after its last by the GPU's
own clock, after the second-level cache has been overwritten: what a layer finds there in a model is the work of other
layers. What the host needs to launch kernels is part of it; launch_times tells it apart.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

BLOCK_SECONDS = 2e-3  # 1000 times what reading the clock takes
WARM_SECONDS = 0.2  # a call as long as this warms itself up
PATIENCE = 5  # times the seconds wished for, until long calls get fewer rounds than wished for
FEWEST = 3
FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU there is
RESAMPLES, ENOUGH = 2000, 6
LEVEL = 0.95


class CpuClock:
    """Seconds a call, by blocks of calls."""

    def repeats(self, call: Callable) -> int:
        """Calls in a block; finding out warms the call up as well."""
        once = self.sample(call, 1)
        if once < WARM_SECONDS:
            once = min(once, self.sample(call, 1))
        if once < BLOCK_SECONDS:
            once = self.sample(call, max(1, min(200, int(BLOCK_SECONDS / once))))
        return max(1, math.ceil(BLOCK_SECONDS / once))

    def sample(self, call: Callable, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """Seconds of one call between two events on the current stream, with a cold second-level cache."""

    def __init__(self):
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def repeats(self, call: Callable) -> int:
        for _ in range(3):  # libraries choose their algorithms, torch's allocator its blocks
            call()
        return 1

    def sample(self, call: Callable, repeats: int = 1) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flushed.zero_()
        torch.cuda.synchronize()  # or the host would get ahead, by as much as the flush takes
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def interleave(
    calls: Sequence[Callable],
    seconds: float,
    least: int,
    most: int = 400,
    around: Sequence[Callable] | None = None,
    clock: CpuClock | CudaClock | None = None,
) -> list[list[float]]:
    """Time `calls` in alternating order for about `seconds` in all, `least` to `most` rounds.

    Calls so long that `least` rounds would take PATIENCE times `seconds` get fewer, but FEWEST.

    Args:
        around: for each call, what makes the context it is made in, off the clock.
    Returns:
        a list for each call with one sample (seconds a call) for each round; equal indices were taken side by side.
    """
    clock, around = clock or CpuClock(), around or [contextlib.nullcontext] * len(calls)
    repeats = []
    for call, context in zip(calls, around):
        with context():
            repeats.append(clock.repeats(call))
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        for turn in range(most):
            spent = time.perf_counter() - begin
            if (turn >= least and spent > seconds) or (turn >= FEWEST and spent > PATIENCE * seconds):
                break
            order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
            for i in order:
                with around[i]():
                    samples[i].append(clock.sample(calls[i], repeats[i]))
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return samples


def launch_times(call: Callable, rounds: int = 20, captures: bool = True) -> dict[str, float | None]:
    """What the host adds on a GPU: a call waited for, and the same call replayed as a CUDA graph, no host in between.

    Returns: {"eager_seconds": median time from call to result, "graph_seconds": the same of a replay, None if the call
        cannot be captured, or not `captures`}; both with warm caches.
    """

    def median(action: Callable) -> float:
        times = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            action()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    found = {"eager_seconds": median(call), "graph_seconds": None}
    if not captures:
        return found
    usual = torch.cuda.current_stream()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(usual)
    try:
        with torch.cuda.stream(side):
            call()
        usual.wait_stream(side)
        with torch.cuda.graph(graph):
            kept = call()
        found["graph_seconds"] = median(graph.replay)
        del kept
    except RuntimeError:  # a call that waits for the GPU, or copies lengths to it, has no graph
        torch.cuda.set_stream(usual)  # a capture that fails at its end leaves its own
        torch.cuda.synchronize()
    return found


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()


def ratio_interval(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """median(numerator) / median(denominator) and its 95 % bootstrap interval: (ratio, low, high).

    Rounds are resampled in pairs, for the two samples of a round were taken under the same conditions. Fewer than
    ENOUGH rounds cannot say so much: then the interval is from the least to the largest ratio of a round.
    """
    if len(numerator) < ENOUGH:
        ratios = sorted(a / b for a, b in zip(numerator, denominator))
        return statistics.median(numerator) / statistics.median(denominator), ratios[0], ratios[-1]
    pairs = torch.tensor([numerator, denominator], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(pairs.shape[1], (RESAMPLES, pairs.shape[1]), generator=generator)
    medians = pairs[:, chosen].quantile(0.5, dim=-1)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (medians[0] / medians[1]).quantile(tails).tolist()
    return statistics.median(numerator) / statistics.median(denominator), low, high


def geometric_mean(values: list[float]) -> float:
    """Geometric mean; NaN of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan
