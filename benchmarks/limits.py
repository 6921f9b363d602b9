"""The speeds a machine can reach, measured beside the cases, and the floor that follows: no case can take less time.

On a CPU a case must do its arithmetic, at most as fast as a large matrix product; read the recurrent weights at every
step, at most as fast as a loop that does nothing else with as many bytes; and let its threads meet once a step. On a GPU
it must do its arithmetic and move its tensors once; a kernel launched at every step pays for that besides, which is
measured (`step_latency`) but no floor, since one kernel can do all steps.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch

from fusedrnn import layer

from .machine import ROOT, cpu_model, precision
from .shapes import Case

SOURCE = pathlib.Path(__file__).with_name("limits.cpp")
SECONDS = 0.1


@functools.cache
def _library() -> ctypes.CDLL | None:
    """limits.cpp, compiled for this very processor; None where there is no compiler."""
    key = hashlib.sha256(SOURCE.read_bytes() + cpu_model().encode()).hexdigest()[:16]
    path = ROOT / "build" / f"limits-{key}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # another process may be at the same
            made = pathlib.Path(folder) / path.name
            command = [os.environ.get("CXX", "g++"), "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            try:
                subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                return None
            made.replace(path)
    library = ctypes.CDLL(str(path))
    library.read_bandwidth.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    library.meeting_seconds.argtypes = [ctypes.c_int, ctypes.c_double]
    library.read_bandwidth.restype = library.meeting_seconds.restype = ctypes.c_double
    return library


@functools.cache
def read_bandwidth(count: int, threads: int) -> float | None:
    """bytes/s at which `threads` threads of this CPU read `count` bytes over and over; None if it cannot be measured."""
    library = _library()
    return library and library.read_bandwidth(count, threads, SECONDS)


@functools.cache
def meeting_seconds(threads: int) -> float | None:
    """Seconds that a meeting of `threads` threads of this CPU takes; None if it cannot be measured."""
    library = _library()
    return library and library.meeting_seconds(threads, SECONDS)


def gemm_peak(seconds: float = 1.5, size: int = 1024, device: str = "cpu", dtype: str = "float32") -> float:
    """flop/s of torch.mm on square matrices, or of oneDNN where that is the faster library: the best half's median, the machine's
    arithmetic in practice.

    Args:
        seconds: how long to measure.
        size: rows and columns.
        device: "cpu" or "cuda".
        dtype: a case's.
    """
    stored = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = (torch.rand(size, size, device=device).to(stored) for _ in range(2))
    out = torch.empty_like(a)
    calls = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and layer.by_onednn(a, b) is not None:
        calls.append(lambda: layer.by_onednn(a, b))
    with precision(dtype, device):
        return 2.0 * size**3 / min(_fast_half(call, seconds / len(calls), device) for call in calls)


@functools.cache
def copy_bandwidth() -> float:
    """bytes/s that a copy within the GPU's memory reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _fast_half(lambda: target.copy_(source), SECONDS, "cuda")


@functools.cache
def launch_latency() -> float:
    """Seconds from a kernel of a CUDA graph to the next that needs its result: what a launch a step costs at least."""
    count, x = 200, torch.zeros(1, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return _fast_half(graph.replay, SECONDS, "cuda") / count


def _fast_half(call, seconds: float, device: str = "cpu") -> float:
    """Median time of the faster half of the calls made within `seconds`, after two unmeasured ones; at least five."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call(), call(), wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call(), wait()
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[: max(1, len(times) // 2)])


def step_latency(device: str, threads: int) -> float | None:
    """Seconds a step costs for having a step before it: a meeting of the threads, or a launch."""
    return launch_latency() if device == "cuda" else meeting_seconds(threads)


def roof(case: Case, flops: float, bandwidth: float) -> float:
    """Seconds that a call takes at least on a GPU that does so many flop/s and moves so many bytes/s."""
    return max(case.flops / flops, _moved_bytes(case) / bandwidth)


def floor_seconds(case: Case, peak: float, threads: int) -> float | None:
    """The least time that a call of this case can take on this machine, given the flop/s of its matrix products.

    A CPU may leave all but one of its threads aside: the floor is the lower of both. None if a speed cannot be measured.
    """
    if case.device == "cuda":
        return roof(case, peak, copy_bandwidth())
    found = []
    for used in {1, threads}:
        rate, meeting = read_bandwidth(int(case.recurrent_bytes), used), meeting_seconds(threads) if used > 1 else 0.0
        if rate is None or meeting is None:
            return None
        work = max(case.flops / peak * threads / used, case.recurrent_bytes * case.steps / rate)
        found.append(work + case.steps * meeting)
    return min(found)


def _moved_bytes(case: Case) -> float:
    """Bytes of input, output and weights; a training step moves all of them and their gradients once more."""
    shape, gates = case.shape, case.recurrent_bytes / (case.itemsize * case.shape.directions * case.shape.H**2)
    rows = sum(shape.lengths)
    weights = sum(gates * shape.directions * shape.H * (width + shape.H) for width in shape.layer_inputs)
    states = rows * sum(width + shape.directions * shape.H for width in shape.layer_inputs)
    return (weights + states) * case.itemsize * {"training": 3, "backward": 2}.get(case.mode, 1)
