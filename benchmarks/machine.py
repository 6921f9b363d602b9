"""What the numbers were measured on and with: machine, versions, commit, and the speeds the machine can reach."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_model() -> str:
    """The processor's own name for itself."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def isa() -> str:
    """The widest instruction set that torch uses here: avx512, avx2, default, ..."""
    return torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")


def machine_name(device: str = "cpu") -> str:
    """A folder name for this kind of machine, e.g. amd-epyc-2c-avx2, or nvidia-h100-80gb-hbm3 if the GPU is measured."""
    if device == "cuda":
        return "-".join(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower()))
    model = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b|\d+-core\b", " ", cpu_model().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", model), f"{cores()}c", isa()])


def row_files() -> list[pathlib.Path]:
    """The committed rows: results/<machine>/<suite>.jsonl."""
    return sorted(RESULTS.glob("*/*.jsonl"))


def commit() -> str | None:
    """The commit that ran, with "-dirty" if tracked sources differ from it; None outside a git checkout."""
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    """Versions of torch, Python and fusedrnn (None if it is not imported)."""
    fused = getattr(sys.modules.get("fusedrnn"), "__version__", None)
    found = {"torch": torch.__version__, "python": platform.python_version(), "fusedrnn": fused}
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def describe(device: str = "cpu") -> dict:
    """The part of a row that is the same for every case of a run."""
    return {
        "machine": machine_name(device),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_model(),
        "cores": cores(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "commit": commit(),
    }


def gemm_peak(seconds: float = 1.5, size: int = 1024, device: str = "cpu", dtype: str = "float32") -> float:
    """flop/s of torch.mm on square matrices: the best half's median, the machine's arithmetic in practice."""
    a, b = (torch.rand(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)

    def multiply():
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2.0 * size**3 / _fast_half(multiply, seconds, least=5)


def matvec_bandwidth(rows: int, columns: int, seconds: float = 0.1) -> float:
    """bytes/s at which torch.mv reads a float32 matrix over and over, from whichever cache holds it.

    The time of a product so small that only the call costs is taken off, so that small matrices show the cache
    and not torch's dispatch.
    """
    tiny = _mv_seconds(4, 4, seconds / 4)
    whole = _mv_seconds(rows, columns, seconds)
    return 4.0 * rows * columns / max(whole - tiny, whole / 10)


def _mv_seconds(rows: int, columns: int, seconds: float) -> float:
    matrix, vector, out = torch.rand(rows, columns), torch.rand(columns), torch.empty(rows)
    return _fast_half(lambda: torch.mv(matrix, vector, out=out), seconds, least=20)


def _fast_half(call, seconds: float, least: int) -> float:
    """Median time of the faster half of the calls made within `seconds`, after two unmeasured ones."""
    call(), call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[: max(1, len(times) // 2)])
