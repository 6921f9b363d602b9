"""`python -m fusedrnn.info`: what is installed, what was built, and what this machine will run."""

import os
import platform
import sys

import torch

from . import _C, __version__
from ._load import FOLDER


def facts() -> dict[str, str]:
    """Every line of the report.

    Returns:
        {name: text}, in order.
    """
    record = _C.build_record()
    try:
        selected = _C.cpu_isa()
    except RuntimeError as error:  # FUSEDRNN_CPU_ISA names a set that is not there: the report is how one finds out
        selected = f"none: {error}"
    forced = " (FUSEDRNN_CPU_ISA)" if os.environ.get("FUSEDRNN_CPU_ISA") else ""
    return {
        "fusedrnn": f"{__version__} in {FOLDER}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads())",
        "instruction set": f"{selected}{forced}",
        "available": ", ".join(_C.cpu_isas()),
        "GPU": _gpu(),
        "cells": ", ".join(_C.cell_traits()),
        "built with": f"{record['compiler']}, torch {record['torch']}",
        "built for": ", ".join(record["isas"]),
        "built CUDA": record["cuda_archs"] if record["cuda"] else f"no: {record['cuda_why_not']}",
        "flags": record["flags"],
        **{f"flags, {isa}": flags for isa, flags in record["isas"].items() if flags},
    }


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def main() -> None:
    """Print the report."""
    for name, text in facts().items():
        print(f"{name + ':':17} {text}")


if __name__ == "__main__":
    main()
