"""Random calls that are made on torch.nn and on fusedrnn and compared in everything that can be seen.

A failed case is repeated by one line: `python -m fusedrnn.fuzz SEED`; `python -m fusedrnn.fuzz 0:9999` looks for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.types import Device

from .testing import Measured, Perturb, States, Tensors, assemble, compare_runs, make_leaves, one_thread, run_module

__all__ = ["Case", "random_case"]

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 64, 65]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded", "expanded middle"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one module, with everything that can differ between two calls. See `random_case`.

    Attributes:
        seed: which case it is; also the seed of its numbers.
        kind: "RNN", "LSTM" or "GRU".
        options: arguments of the constructor.
        T, B: steps and sequences.
        lengths: of a packed input; None if it is padded.
        unbatched: whether B is left out.
        dtype: of all tensors.
        input_layout, hx_layout: how their memory lies, one of `LAYOUTS`; None: no hx is given.
        uses: the outputs in the loss.
        cotangent: what comes back into an output, see `fusedrnn.testing.run_module`.
        frozen: what needs no gradient, of ("input", "hx", "weights").
        mode: "grad", "no_grad" or "inference".
        training: whether the module is in training mode.
        threads: torch.set_num_threads.
        fault: a mistake that torch.nn refuses, or None.
    """

    seed: int
    kind: str
    options: dict[str, Any]
    T: int
    B: int
    lengths: tuple[int, ...] | None
    unbatched: bool
    dtype: torch.dtype
    input_layout: str
    hx_layout: str | None
    uses: tuple[str, ...]
    cotangent: str
    frozen: tuple[str, ...]
    mode: str
    training: bool
    threads: int
    fault: str | None

    def repro(self) -> str:
        """How to run this case again, under the same instruction set.

        Returns:
            one line for the shell.
        """
        isa = os.environ.get("FUSEDRNN_CPU_ISA")
        return f"{f'FUSEDRNN_CPU_ISA={isa} ' if isa else ''}python -m fusedrnn.fuzz {self.seed}"

    def modules(self, device: Device = "cpu") -> tuple[nn.Module, ...]:
        """Make the two modules.

        Args:
            device: where.

        Returns:
            (ours, stock), with the same weights.
        """
        import fusedrnn

        ours = getattr(fusedrnn, self.kind)
        return tuple(self._module(cls, device) for cls in (ours, ours.stock))

    def _module(self, cls: Any, device: Device) -> nn.Module:
        torch.manual_seed(self.seed)
        module = cls(**self.options, device=device, dtype=self.dtype).train(self.training)
        return module.requires_grad_("weights" not in self.frozen)

    def tensors(self, device: Device = "cpu") -> tuple[Tensor, States]:
        """Draw the arguments of the call.

        Args:
            device: where.

        Returns:
            (input, hx) as the modules take them; input is padded even if the case is packed.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, layout: str) -> Tensor:
            return _laid_out(shape, layout, generator, self.dtype).to(device)

        options = self.options
        T, B = 0 if self.fault == "no time" else self.T, self.B
        I = options["input_size"] + (self.fault == "input size")  # noqa: E741
        shape = (T, I) if self.unbatched else (B, T, I) if options["batch_first"] else (T, B, I)
        input = draw(*shape, layout=self.input_layout)
        if self.fault == "input dtype":
            input = input.to(torch.float64 if self.dtype != torch.float64 else torch.float32)
        if self.hx_layout is None:
            return input, None
        rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
        middle = () if self.unbatched else (B + (self.fault == "hx batch"),)
        if self.fault == "hx dim":
            middle = (B, 1) if self.unbatched else ()
        hx = draw(rows, *middle, options.get("proj_size") or options["hidden_size"], layout=self.hx_layout)
        if self.kind != "LSTM":
            return input, hx
        return input, (hx, draw(rows, *middle, options["hidden_size"], layout=self.hx_layout))

    def run(self, module: nn.Module, dtype: torch.dtype | None = None, perturb: Perturb | None = None,
            device: Device = "cpu") -> Tensors:
        """Make the call, as `fusedrnn.testing.compare_runs` wants it.

        Args:
            module: one of the two.
            dtype, perturb: what becomes of the tensors; None: nothing.
            device: where.

        Returns:
            tensors by name.
        """
        input, hx = self.tensors(device)
        leaves = make_leaves(input, hx, dtype, perturb)
        for name, leaf in leaves.items():
            leaf.requires_grad_(("input" if name == "input" else "hx") not in self.frozen)
        run_input, run_hx = assemble(input, hx, leaves)
        if self.lengths is not None:
            in_order = list(self.lengths) == sorted(self.lengths, reverse=True)
            run_input = pack_padded_sequence(
                run_input, torch.tensor(self.lengths), self.options["batch_first"], enforce_sorted=in_order
            )
        torch.manual_seed(self.seed)  # dropout
        guard = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[self.mode]
        with guard():
            return run_module(
                module, run_input, run_hx, uses=self.uses, cotangent=self.cotangent, seed=self.seed, wrt=leaves
            )

    def check(self, device: Device = "cpu") -> list[Measured]:
        """Make the call on both modules and compare everything that can be seen.

        Values and gradients by the rule of `fusedrnn.testing`; shapes, dtypes, strides, which gradients are undefined,
        exception type and text, and the state of the random generator exactly.

        Args:
            device: where.

        Returns:
            a row for each tensor; none where both refuse the call.

        Raises:
            AssertionError: something differs; its last line is `repro`'s.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self._check(device)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self}\nrepeat with: {self.repro()}") from None
        finally:
            torch.set_num_threads(threads)

    def _check(self, device: Device) -> list[Measured]:
        outcomes: list[Any] = []
        ours, stock = self.modules(device)
        for module in (ours, stock):
            try:
                with contextlib.nullcontext() if module is ours else one_thread():
                    tensors, failure = self.run(module, device=device), None
            except Exception as error:  # every exception is an outcome to compare
                tensors, failure = None, error
            outcomes.append((tensors, failure, torch.get_rng_state()))
        (got, failure, random_state), (expected, stock_failure, stock_random_state) = outcomes
        if failure or stock_failure:
            assert (type(failure), str(failure)) == (type(stock_failure), str(stock_failure)), (
                f"{type(failure).__name__}: {failure}\ntorch.nn: {type(stock_failure).__name__}: {stock_failure}"
            )
            return []
        assert torch.equal(random_state, stock_random_state), "random state after the call is not torch.nn's"
        for name in expected.keys() & {"output", "hy", "cy"}:
            assert strides(got[name]) == strides(expected[name]), (
                f"{name}: strides {got[name].stride()}, torch.nn has {expected[name].stride()}"
            )
            assert got[name].requires_grad == expected[name].requires_grad, f"{name}: requires_grad differs"
        return compare_runs(lambda *a: self.run(*a, device=device), ours, stock)  # type: ignore[misc]


def strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions where they mean something.

    Args:
        tensor: any.

    Returns:
        those of more than one element; none of an empty tensor.
    """
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1 and tensor.numel()]


def _laid_out(shape: Sequence[int], layout: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random tensor of `shape` whose memory is "contiguous", "transposed", "sliced", or "expanded" (stride 0)."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    if layout == "transposed":
        return normal(*shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return normal(*(2 * size + 1 for size in shape))[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    if layout == "expanded":
        return normal(1, *shape[1:]).expand(shape)
    if layout == "expanded middle" and len(shape) == 3:
        return normal(shape[0], 1, shape[2]).expand(shape)
    return normal(*shape)


def random_case(seed: int) -> Case:
    """Draw one case: cell, sizes, layers, directions, bias, projection, dtype, strides, lengths, states, loss, mode.

    Args:
        seed: the same case for the same number.

    Returns:
        the case, not run yet.

    >>> from fusedrnn.fuzz import random_case
    >>> case = random_case(7)
    >>> case.kind, case.T, case.seed
    ('LSTM', 1, 7)
    """
    r = random.Random(seed)

    def some(probability: float) -> bool:
        return r.random() < probability

    kind = r.choice(["RNN", "LSTM", "GRU"])
    H = r.choice(SIZES)
    options: dict[str, Any] = dict(
        input_size=r.choice(SIZES),
        hidden_size=H,
        num_layers=r.choice([1, 1, 2, 3]),
        bias=some(0.8),
        batch_first=some(0.5),
        bidirectional=some(0.4),
    )
    if options["num_layers"] > 1 and some(0.4):
        options["dropout"] = r.choice([0.2, 0.5, 1.0])
    if kind == "RNN":
        options["nonlinearity"] = r.choice(["tanh", "relu"])
    if kind == "LSTM" and H > 1 and some(0.3):
        options["proj_size"] = r.randrange(1, H)
    T, B = r.choice([1, 2, 3, 5, 8, 17]), r.choice([1, 2, 3, 4, 5, 7, 16, 33])
    unbatched = some(0.1)
    lengths = None
    if not unbatched and some(0.3):
        lengths = [T] + [r.randint(1, T) for _ in range(B - 1)]
        lengths = tuple(sorted(lengths, reverse=True) if some(0.5) else r.sample(lengths, B))
    hx_layout = None if some(0.4) else r.choice(LAYOUTS)
    outputs = ("output", "hy", "cy") if kind == "LSTM" else ("output", "hy")
    uses = outputs if some(0.4) else tuple(r.sample(outputs, r.randint(0 if some(0.1) else 1, len(outputs))))
    faults = ["input dtype"] + ["hx batch", "hx dim"] * (hx_layout is not None) + ["no time"] * (lengths is None)
    if kind != "LSTM" or lengths is None:  # a packed torch.nn.LSTM without bias reads out of bounds instead of raising
        faults.append("input size")
    return Case(
        seed=seed,
        kind=kind,
        options=options,
        T=T,
        B=0 if lengths is None and some(0.03) else B,
        lengths=lengths,
        unbatched=unbatched,
        dtype=r.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]),
        input_layout=r.choice(LAYOUTS[:1] + LAYOUTS),
        hx_layout=hx_layout,
        uses=uses,
        cotangent=r.choice(["normal", "normal", "expanded", "transposed"]),
        frozen=() if some(0.7) else tuple(r.sample(["input", "hx", "weights"], r.randint(1, 2))),
        mode=r.choice(["grad"] * 6 + ["no_grad", "inference"]),
        training=some(0.8),
        threads=r.choice([1, 2, 2, 3, 4]),
        fault=r.choice(faults) if some(0.06) else None,
    )


def main(arguments: list[str]) -> None:
    """Run the cases whose seeds are given; print every measure of a single one.

    Args:
        arguments: `SEED` or `FIRST:LAST`, each.
    """
    for argument in arguments:
        first, _, last = argument.partition(":")
        for seed in range(int(first), int(last or first) + 1):
            case = random_case(seed)
            rows = case.check()
            print(*(map(str, [case, *rows]) if not last else [f"{case.repro()}  ok"]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
