"""Time the ways in which blocks of a GPU can pass a state to one another: the floor of a step of a kernel that does all steps.

    python -m benchmarks.exchange                 prints a table
    python -m benchmarks.exchange --out FILE      and writes it as comma-separated values

A line for each number of blocks and of bytes that a block adds to the state at every step; a column for each way of
exchange.cuh, in microseconds a step: everything is received by every block, and nothing is computed but a sum that proves it.
Medians of seven; a wrong state has no time. nvcc compiles the kernels for the GPU that is there.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import pathlib
import shutil
import subprocess
import sys

from .machine import ROOT
from .table import grid

SOURCES = [ROOT / "benchmarks" / name for name in ("exchange.cu", "exchange.cuh")]
HEADERS = [ROOT / "csrc" / "cuda" / name for name in ("exchange.cuh", "prims.cuh", "walk.h")]
WAYS = ("counter", "words", "tagged", "sentinel", "cluster")
CLUSTER = 8  # blocks that every chip with clusters lets be neighbours
THREADS, STEPS = 256, 2000
# (blocks, bytes of each): a cluster, a small layer, LSTM 768 and LSTM 1024 with a batch of 16 in 16-bit numbers, a whole H100.
SIZES = ((2, 512), (8, 256), (8, 1024), (16, 512), (48, 512), (64, 512), (64, 1024), (128, 512), (132, 256))


def compiled(arch: str) -> pathlib.Path:
    """The library for compute capability `arch` ("90"). RuntimeError with nvcc's words if it cannot be made."""
    key = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES + HEADERS)).hexdigest()[:16]
    path = ROOT / "build" / f"exchange-{arch}-{key}.so"
    if path.exists():
        return path
    if not shutil.which("nvcc"):
        raise RuntimeError("nvcc, which compiles the kernels, is not on PATH")
    path.parent.mkdir(exist_ok=True)
    made = path.with_suffix(".tmp")
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{arch}", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, str(SOURCES[0]), "-o", str(made)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr[-2000:]}")
    made.replace(path)
    return path


def measure(library: ctypes.CDLL, way: str, blocks: int, count: int) -> float | str:
    """Seconds a step of `blocks` blocks that add `count` bytes each, or why that cannot be told."""
    if way == "cluster" and blocks > CLUSTER:
        return f"more than {CLUSTER} blocks"
    why = ctypes.create_string_buffer(500)
    library.fusedrnn_exchange.restype = ctypes.c_double
    part = count // 4  # numbers of 32 bits
    seconds = library.fusedrnn_exchange(WAYS.index(way), blocks, THREADS, part, ctypes.c_long(STEPS), why, len(why))
    return seconds if seconds >= 0 else why.value.decode(errors="replace")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="file for the table")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.exchange: needs a GPU that torch sees", file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    try:
        library = ctypes.CDLL(str(compiled(f"{major}{minor}")))
    except RuntimeError as error:
        print(f"benchmarks.exchange: {error}", file=sys.stderr)
        return 1
    lines, reasons = [], {}
    for blocks, count in SIZES:
        found = {way: measure(library, way, blocks, count) for way in WAYS}
        reasons |= {f"{way}, {blocks} blocks: {why}": None for way, why in found.items() if isinstance(why, str)}
        times = ["-" if isinstance(seconds, str) else f"{seconds * 1e6:.3f}" for seconds in found.values()]
        lines.append([str(blocks), str(count), *times])
    header = ["blocks", "bytes each", *WAYS]
    print(f"{torch.cuda.get_device_name()}, microseconds a step\n\n{grid(header, lines, left=0)}")
    print("".join(f"\n  {reason}" for reason in reasons))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(",".join(line) for line in [header, *lines]) + "\n")
    return 0 if all("wrong" not in reason for reason in reasons) else 1


if __name__ == "__main__":
    sys.exit(main())
