"""The correctness gate: a case whose numbers are wrong gets no speed.

The rule is that of the tests (fusedrnn/testing.py): truth is torch.nn in float64, and the error of every tensor that
the timed call computes is at most twice torch.nn's own error in the same dtype plus a few ulp.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import torch

from fusedrnn import masks
from fusedrnn.testing import compare_modules, named_outputs

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
    allowed = workload.provider.allowed
    try:
        if allowed is not None:
            return judge_rounded(workload, stock, allowed)
        # With the masks that bernoulli_ draws, as what is written in torch has them: fusedrnn's own take fewer of the generator's numbers.
        with mock.patch.object(masks, "LEAST", math.inf), workload.around(), torch.set_grad_enabled(workload.case.mode != "inference"):
            rows = compare_modules(workload.module, stock.module, workload.input, workload.hx, uses=workload.uses)
    except Exception as failure:  # also what a peer's library may raise: the others are measured all the same
        lines = [line.strip() for line in str(failure).splitlines()] or [""]
        bad = next((line for line in lines if line.startswith("FAIL")), lines[0])
        return Verdict(False, f"{type(failure).__name__}: {' '.join(bad.split())}")
    worst = max(rows, key=lambda row: row.ours / row.allowed if row.allowed else 0.0)
    relative = lambda error: max((error(row) / row.scale for row in rows if row.scale), default=0.0)  # noqa: E731
    return Verdict(
        True, " ".join(str(worst).split()), relative(lambda row: row.ours), relative(lambda row: row.stock)
    )


def judge_rounded(workload: Workload, stock: Workload, allowed: float) -> Verdict:
    """The same for one who rounds the weights: every tensor's largest error is at most `allowed` of its largest value."""
    is_cell = workload.case.shape.step
    with workload.around():
        ours, theirs = (named_outputs(one.call(), is_cell) for one in (workload, stock))
    truth = named_outputs(Workload(stock.case, stock.provider, torch.float64).call(), is_cell)

    def error(found: dict[str, torch.Tensor], name: str) -> float:
        return ((found[name].double() - truth[name]).abs().max() / truth[name].abs().max()).item()

    worst = max(truth, key=lambda name: error(ours, name))
    of_torch = max(error(theirs, name) for name in truth)
    found = error(ours, worst)
    return Verdict(found <= allowed, f"{worst} error {found:.3e} of the largest value, allowed {allowed:g}", found, of_torch)
