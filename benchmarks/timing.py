"""The clock: two or more calls timed in turn, in one process, and what their times say.

The runs alternate A B, B A, A B, ... so that a slow spell of the machine, heat and clock speed meet all alike. A
sample is the mean time of a call over a block of calls that lasts at least BLOCK_SECONDS: within a block a call
finds its own weights in the cache, as in a program that uses one module.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable

import torch

BLOCK_SECONDS = 2e-3  # 1000 times what reading the clock takes
WARM_SECONDS = 0.2  # a call as long as this warms itself up
RESAMPLES = 2000
LEVEL = 0.95


def interleave(calls: list[Callable], seconds: float, least: int, most: int = 400, device: str = "cpu") -> list[list[float]]:
    """Time `calls` in alternating order for about `seconds` in all, `least` to `most` rounds.

    Args:
        device: on "cuda" a block is timed by the GPU's own clock, from before its first kernel to after its last.
    Returns:
        a list for each call with one sample (seconds a call) for each round; equal indices were taken side by side.
    """
    block = _block_on_cuda if device == "cuda" else _block
    repeats = [_repeats(call, block) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for turn in range(most):
            if turn >= least and time.perf_counter() > end:
                break
            order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
            for i in order:
                samples[i].append(block(calls[i], repeats[i]))
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return samples


def _block(call: Callable, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _block_on_cuda(call: Callable, repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _repeats(call: Callable, block: Callable = _block) -> int:
    """Calls in a block; finding out warms the call up as well."""
    once = block(call, 1)
    if once < WARM_SECONDS:
        once = min(once, block(call, 1))
    if once < BLOCK_SECONDS:
        once = block(call, max(1, min(200, int(BLOCK_SECONDS / once))))
    return max(1, math.ceil(BLOCK_SECONDS / once))


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()


def ratio_interval(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """median(numerator) / median(denominator) and its 95 % bootstrap interval: (ratio, low, high).

    Rounds are resampled in pairs, for the two samples of a round were taken under the same conditions.
    """
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
