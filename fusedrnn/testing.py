"""Hold a fusedrnn module against torch.nn: outputs and every gradient, by one rule.

Truth is torch.nn in float64. A tensor passes if its largest error is at most twice the largest error that torch.nn itself
makes in the same dtype, plus a few units in the last place (ulp) of the tensor's largest value. Both errors are printed
when it fails. Three details make the rule fair to both sides:

- torch's error is 0 by luck in a tensor of few numbers, or where a ReLU sits at its kink. Before a tensor is refused,
  torch's error is measured again on neighbours: inputs and weights that differ by one rounding, each with its own truth.
- float64 has no better truth here. torch's error is taken as its float32 error scaled by the ratio of the ulps, and once
  more of it is allowed, for the truth's own.
- numbers below float32's smallest normal may be flushed to zero, or keep so few bits that the error seen there is chance.
  An ulp is therefore never taken for smaller than that number, or than its share of it in float64, whose errors are
  float32's, scaled.

Random cases are in `fusedrnn.fuzz`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Measured", "compare_modules", "compare_runs", "compare_tensors", "run_module"]

FACTOR = 2.0
ULPS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
NEIGHBOURS = 96

Tensors = dict[str, Tensor | None]
Input = Tensor | PackedSequence
States = Tensor | tuple[Tensor, Tensor] | None
Perturb = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Measured:
    """How far one tensor of ours, and of torch.nn, is from truth.

    Attributes:
        name: of the tensor.
        ours, stock: largest absolute errors.
        allowed: the most that `ours` may be.
        scale: largest absolute value of the truth.
    """

    name: str
    ours: float
    stock: float
    allowed: float
    scale: float

    @property
    def passed(self) -> bool:
        """Whether our error is allowed."""
        return self.ours <= self.allowed

    def __str__(self) -> str:
        return (
            f"{'ok  ' if self.passed else 'FAIL'} {self.name:<28} error {self.ours:.3e}  torch {self.stock:.3e}  "
            f"allowed {self.allowed:.3e}  largest value {self.scale:.3e}"
        )


def compare_tensors(name: str, ours: Tensor, stock: Tensor, truth: Tensor, stock_error: float = 0.0) -> Measured:
    """Measure `ours` and `stock` (same dtype) against `truth` (float64, same shape).

    Args:
        name: for messages.
        ours, stock, truth: the three tensors.
        stock_error: torch's error if it is already known to be larger than `stock` shows.

    Returns:
        the measure; `Measured.passed` says what came of it.

    Raises:
        AssertionError: shape or dtype is not that of `stock`, or NaN or infinity stands where `stock` has none.

    >>> import torch
    >>> from fusedrnn.testing import compare_tensors
    >>> truth = torch.rand(8, dtype=torch.float64)
    >>> compare_tensors("x", truth.float(), truth.float(), truth).passed
    True
    """
    assert ours.shape == stock.shape, f"{name}: shape {tuple(ours.shape)}, torch.nn has {tuple(stock.shape)}"
    assert ours.dtype == stock.dtype, f"{name}: dtype {ours.dtype}, torch.nn has {stock.dtype}"
    assert torch.equal(_special(ours), _special(stock)), f"{name}: NaN or infinity in other places than in torch.nn"
    info = torch.finfo(stock.dtype)
    scale = _largest(truth, torch.zeros_like(truth), stock)
    stock_error = max(stock_error, _largest(stock, truth, stock))
    factor = FACTOR + (stock.dtype == torch.float64)
    single = torch.finfo(torch.float32)
    least_scale = max(info.smallest_normal, single.smallest_normal / max(info.eps, single.eps))
    allowed = factor * stock_error + ULPS[stock.dtype] * info.eps * max(scale, least_scale)
    return Measured(name, _largest(ours, truth, stock), stock_error, allowed, scale)


def compare_modules(ours: nn.Module, stock: nn.Module, input: Input, hx: States = None, *, uses: Sequence[str] | None = None,
                    cotangent: str = "normal", seed: int = 0) -> list[Measured]:
    """Compare two modules that hold the same weights: outputs and the gradients of input, hx and parameters.

    Args:
        ours, stock: modules of one dtype, with equal parameters. stock is run again in float64 for truth.
        input: whatever the modules take: (T, B, I), (B, T, I), (T, I), a PackedSequence; (B, I) or (I,) for a cell.
        hx: tensor, (hx, cx) or None.
        uses, cotangent: see `run_module`.
        seed: for dropout and for the numbers of the loss.

    Returns:
        one row a tensor.

    Raises:
        AssertionError: a tensor does not pass; the text has all rows.

    >>> import torch, fusedrnn
    >>> from fusedrnn.testing import compare_modules
    >>> stock, ours = torch.nn.LSTM(3, 5), fusedrnn.LSTM(3, 5)
    >>> _ = ours.load_state_dict(stock.state_dict())
    >>> rows = compare_modules(ours, stock, torch.randn(7, 2, 3))
    >>> rows[0].name
    'output'
    """

    def run(module: nn.Module, dtype: torch.dtype | None = None, perturb: Perturb | None = None) -> Tensors:
        leaves = make_leaves(input, hx, dtype, perturb)
        torch.manual_seed(seed)
        run_input, run_hx = assemble(input, hx, leaves)
        return run_module(module, run_input, run_hx, uses=uses, cotangent=cotangent, seed=seed, wrt=leaves)

    return compare_runs(run, ours, stock)


def compare_runs(run: Callable[..., Tensors], ours: nn.Module, stock: nn.Module) -> list[Measured]:
    """Apply the rule of this file to whatever can be run on two modules.

    torch.nn runs on one thread: on a busy machine its small steps wait longer for threads than they compute.

    Args:
        run: `run(module, dtype=None, perturb=None)` makes one call with fresh leaves, cast to `dtype` if given, and passed
            through `perturb(tensor)` before that; it returns tensors by name.
        ours, stock: the modules.

    Returns:
        one row a tensor.

    Raises:
        AssertionError: a tensor does not pass; the text has all rows.
    """
    got = run(ours)
    with one_thread():
        return _judge(run, got, stock)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _judge(run: Callable[..., Any], got: Any, stock: nn.Module) -> list[Measured]:
    expected = run(stock)
    assert list(got) == list(expected), f"tensors {list(got)}, torch.nn has {list(expected)}"
    for name in got:
        if expected[name] is None:  # no path from the loss to it, which the kernel of a whole sequence may say by zeros
            assert got[name] is None or not got[name].any(), f"{name}: not zero, but undefined in torch.nn"
        else:
            assert got[name] is not None, f"{name}: undefined, which it is not in torch.nn"
    names = [name for name in expected if expected[name] is not None]
    truth = run(copy.deepcopy(stock).double(), torch.float64)
    double = any(expected[name].dtype == torch.float64 for name in names)
    errors = dict.fromkeys(names, 0.0)

    def measure() -> list[Measured]:
        return [compare_tensors(name, got[name], expected[name], truth[name], errors[name]) for name in names]

    def learn(perturb: Perturb) -> None:
        """Raise `errors` to what torch.nn shows on inputs and weights passed through `perturb`."""
        module = perturbed(copy.deepcopy(stock), perturb)
        if hasattr(module, "flatten_parameters"):
            # or cuDNN copies the weights of a copy at every call, and warns of it
            module.flatten_parameters()  # type: ignore[operator]
        near_truth = truth if perturb is _same else run(copy.deepcopy(module).double(), torch.float64, perturb)
        near = run(module.float(), torch.float32, perturb) if double else run(module, None, perturb)
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if double else 1.0
        for name in names:
            errors[name] = max(errors[name], ratio * _largest(near[name], near_truth[name], near[name]))

    if double:
        learn(_same)
    rows = measure()
    for k in range(NEIGHBOURS):
        if all(row.passed for row in rows):
            return rows
        learn(_Rounding(k))
        rows = measure()
    if not all(row.passed for row in rows):
        raise AssertionError(f"error more than {FACTOR:g} times torch.nn's and a few ulp:\n" + "\n".join(map(str, rows)))
    return rows


def run_module(module: nn.Module, input: Input, hx: States = None, *, uses: Sequence[str] | None = None,
               cotangent: str = "normal", seed: int = 0, wrt: dict[str, Tensor] | None = None) -> Tensors:
    """Run `module(input, hx)` and its backward.

    Args:
        module: a layer or cell.
        input, hx: as it takes them.
        uses: which outputs the loss uses, a subset of ("output", "hy", "cy"); None: all; (): no backward.
        cotangent: what comes back into an output: "normal", "expanded" (one number, stride 0), "transposed" memory.
        seed: of the numbers of the loss.
        wrt: tensors by name to differentiate for, beside the module's parameters that require a gradient.

    Returns:
        tensors by name: "output", "hy", "cy" (a cell: "hy", "cy") and "grad NAME"; a gradient that torch leaves
            undefined is None.
    """
    result = module(input) if hx is None else module(input, hx)
    found: dict[str, Any] = named_outputs(result, is_cell=not hasattr(module, "num_layers"))
    wanted = dict(wrt or {}) | dict(module.named_parameters())
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    used = [name for name in found if (uses is None or name in uses) and found[name].requires_grad]
    if used and wanted:
        generator = torch.Generator().manual_seed(seed)
        weights = [_cotangent(found[name], generator, cotangent) for name in used]
        grads = torch.autograd.grad([found[name] for name in used], list(wanted.values()), weights, allow_unused=True)
        found |= {f"grad {name}": grad for name, grad in zip(wanted, grads)}
    return found


def named_outputs(result: Any, is_cell: bool = False) -> dict[str, Tensor]:
    """The tensors that a module returned, by name.

    Args:
        result: what it returned.
        is_cell: whether it is a cell, which has no "output".

    Returns:
        "output", "hy", "cy", those there are; a packed output by its data.
    """
    if is_cell:
        return {"hy": result} if isinstance(result, Tensor) else {"hy": result[0], "cy": result[1]}
    output, hidden = result
    found = {"output": output.data if isinstance(output, PackedSequence) else output}
    return found | ({"hy": hidden} if isinstance(hidden, Tensor) else {"hy": hidden[0], "cy": hidden[1]})


def make_leaves(input: Input, hx: States, dtype: torch.dtype | None = None,
                perturb: Perturb | None = None) -> dict[str, Tensor]:
    """Fresh leaves with the strides of the tensors given.

    Args:
        input, hx: as a module takes them.
        dtype: of the leaves, if not None.
        perturb: what every tensor passes through before that, if not None.

    Returns:
        "input", "hx", "cx", those there are.
    """
    tensors = {"input": input.data if isinstance(input, PackedSequence) else input}
    if hx is not None:
        tensors |= {"hx": hx} if isinstance(hx, Tensor) else {"hx": hx[0], "cx": hx[1]}
    tensors = {name: (perturb or _same)(tensor.detach()) for name, tensor in tensors.items()}
    return {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in tensors.items()}


def assemble(input: Input, hx: States, leaves: dict[str, Tensor]) -> tuple[Any, Any]:
    """Make a module's arguments of leaves.

    Args:
        input, hx: what they shall look like.
        leaves: as `make_leaves` returns them.

    Returns:
        (input, hx).
    """
    data = leaves["input"]
    if isinstance(input, PackedSequence):
        data = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    if hx is None:
        return data, None
    return data, leaves["hx"] if isinstance(hx, Tensor) else (leaves["hx"], leaves["cx"])


def perturbed(module: nn.Module, perturb: Perturb) -> nn.Module:
    """Pass every parameter through a function, in place.

    Args:
        module: any.
        perturb: takes and returns a tensor.

    Returns:
        module itself.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(perturb(parameter.detach()))
    return module


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Rounding:
    """Moves each number by at most one rounding of its dtype; the k-th neighbour is the same at every run."""

    def __init__(self, k: int):
        self.k = k

    def __call__(self, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.k)
        # A float64 call learns torch's error from float32, so its neighbours are float32's.
        eps = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
        steps = torch.randint(-1, 2, tensor.shape, generator=generator, device="cpu")
        return (tensor.double() * (1 + eps * steps.to(tensor.device))).to(tensor.dtype)


def _special(tensor: Tensor) -> Tensor:
    """0 where finite, else which of NaN, inf, -inf."""
    return tensor.isnan() * 3 + tensor.isposinf() * 1 + tensor.isneginf() * 2


def _largest(tensor: Tensor, truth: Tensor, like: Tensor) -> float:
    """Largest |tensor - truth| where `like` and `truth` are finite."""
    finite = like.isfinite() & truth.isfinite()
    return (tensor.detach().double() - truth.detach().double())[finite].abs().max().item() if finite.any() else 0.0


def _cotangent(like: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    # Multiples of 1/64 below 2, so that float64, float32, bfloat16 and float16 all hold the same numbers.
    if kind == "expanded":
        return torch.full((), 0.75, dtype=like.dtype, device=like.device).expand(like.shape)
    backwards = list(range(like.dim()))[::-1]
    shape = like.shape[::-1] if kind == "transposed" else like.shape
    values = torch.randint(-127, 128, shape, generator=generator, device="cpu") / 64
    return (values.permute(backwards) if kind == "transposed" else values).to(like.device, like.dtype)
