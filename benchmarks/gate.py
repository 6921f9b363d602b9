"""The correctness gate: a case whose numbers are wrong gets no speed.

The rule is that of the tests (fusedrnn/testing.py): truth is torch.nn in float64, and the error of every tensor that
the timed call computes is at most twice torch.nn's own error in the same dtype plus a few ulp.
"""

from __future__ import annotations

import dataclasses

import torch

from fusedrnn.testing import compare_modules

from .providers import TorchProvider
from .workload import Workload


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a case passed, and the tensor that came nearest to what is allowed."""

    passed: bool
    worst: str  # one line: tensor, errors, what is allowed
    error: float | None = None  # largest error / largest value, over all tensors
    torch_error: float | None = None


def judge(workload: Workload, stock: Workload) -> Verdict:
    """Compare what `workload` computes with float64 truth; `stock` is the same case on torch.nn.

    Compares output, hy and cy, and but for inference the gradients of the output for the input and every weight.
    torch.nn itself passes: it is what the others are held against.
    """
    if type(workload.provider) is TorchProvider:
        return Verdict(True, "torch.nn itself")
    try:
        with workload.around(), torch.set_grad_enabled(workload.case.mode != "inference"):
            rows = compare_modules(workload.module, stock.module, workload.input, uses=("output",))
    except Exception as failure:  # also what a peer's library may raise: the others are measured all the same
        lines = [line.strip() for line in str(failure).splitlines()] or [""]
        bad = next((line for line in lines if line.startswith("FAIL")), lines[0])
        return Verdict(False, f"{type(failure).__name__}: {' '.join(bad.split())}")
    worst = max(rows, key=lambda row: row.ours / row.allowed if row.allowed else 0.0)
    relative = lambda error: max((error(row) / row.scale for row in rows if row.scale), default=0.0)  # noqa: E731
    return Verdict(
        True, " ".join(str(worst).split()), relative(lambda row: row.ours), relative(lambda row: row.stock)
    )
