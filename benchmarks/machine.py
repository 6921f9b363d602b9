"""What the numbers were measured on and with: machine, clock, versions, commit."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import re
import subprocess
import sys

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
    """The commit of the fusedrnn that runs, with "-dirty" if tracked sources differ; None outside a git checkout."""
    fused = sys.modules.get("fusedrnn")
    tree = pathlib.Path(fused.__file__).resolve().parent.parent if fused else ROOT
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(tree), *words], capture_output=True, text=True, check=True
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


def clock_mhz(device: str = "cpu") -> float | None:
    """The clock right now: of the fastest core, or of the GPU's multiprocessors; None if the system does not tell."""
    if device == "cuda":
        try:
            return float(torch.cuda.clock_rate())
        except (ImportError, ModuleNotFoundError, RuntimeError):  # needs NVIDIA's management library for Python
            return None
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = []
    return max(map(float, found)) if found else None


@contextlib.contextmanager
def precision(dtype: str, device: str):
    """A GPU rounds float32 to TF32 before it multiplies if `dtype` is "tf32", and not otherwise, in layers and in products."""
    settings = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul) if device == "cuda" else ()
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def title(about: dict) -> str:
    """What a row was measured on, in a few words."""
    return about.get("gpu") or f"{about['cpu']}, {about['cores']} cores, {about['isa']}"


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
        "clock_mhz": clock_mhz(device),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "commit": commit(),
    }
