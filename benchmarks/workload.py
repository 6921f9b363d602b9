"""One case in the hands of one provider: module, input, and the call that is timed."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import precision
from .providers import TorchProvider
from .shapes import Case

SEED = 20240229


class Workload:
    """Module and input of a case; `call()` is what the clock and the memory meter see.

    Weights and input depend on the case alone, not on the provider, and are float32 numbers in every dtype.
    Inference is one call of the module under no_grad. Training is the call and the gradients of its output for the
    input and for every weight, as in the middle of a deep model; no optimizer, no loss. Forward and backward are its two
    halves; backward goes through one graph again and again. Of a case with an option the module is what written.py makes.
    """

    def __init__(self, case: Case, provider, dtype: torch.dtype | None = None):
        case = provider.takes(case)
        self.case, self.provider = case, provider
        dtype = dtype or getattr(torch, case.stored)
        torch.manual_seed(SEED)
        weights = TorchProvider().module(case, torch.float32).state_dict()
        self.module = provider.module(case, dtype)
        self.module.load_state_dict(weights)
        self.module = provider.finished(self.module.to(case.device))
        shape = case.shape
        generator = torch.Generator(case.device).manual_seed(SEED)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator, device=case.device).to(dtype)  # noqa: E731
        padded = draw(*(() if shape.step else (shape.T,)), shape.B, shape.I)
        packed = pack_padded_sequence(padded, torch.tensor(shape.lengths)) if shape.packed else None
        self.data = (packed.data if packed else padded).requires_grad_(case.mode != "inference")
        self.input = PackedSequence(self.data, packed.batch_sizes) if packed else self.data
        self.hx = None
        if shape.states:
            rows = () if shape.step else (shape.layers * shape.directions,)
            some = [draw(*rows, shape.B, shape.H) for _ in range(2)]
            self.hx = tuple(some) if case.cell == "lstm" else some[0]
        self.grad_output = draw(*self.data.shape[:-1], shape.directions * shape.H)
        self.uses = ("output", "hy") if case.option == "return_states" else ("output",)  # whose gradients are taken
        if len(self.uses) > 1:
            self.grad_output = (self.grad_output,) * len(self.uses)
        self.leaves = [self.data, *self.module.parameters()]
        self.output: torch.Tensor | None = None  # of mode "backward"

    def call(self):
        """One call of the case's mode, under the provider's settings (`around`). Its results are returned, not kept."""
        if self.case.mode == "inference":
            with torch.no_grad():
                return self.module(self.input) if self.hx is None else self.module(self.input, self.hx)
        if self.case.mode == "forward":
            return self._forward()
        if self.case.mode == "training":
            return torch.autograd.grad(self._forward(), self.leaves, self.grad_output)
        if self.output is None:
            self.output = self._forward()
        return torch.autograd.grad(self.output, self.leaves, self.grad_output, retain_graph=True)

    def _forward(self):
        output, hidden = self.module(self.input) if self.hx is None else self.module(self.input, self.hx)
        if len(self.uses) > 1:
            return output, hidden
        return output.data if self.case.shape.packed else output

    @contextlib.contextmanager
    def around(self):
        """The context that calls are made in: the case's precision and the provider's settings."""
        with precision(self.case.dtype, self.case.device), self.provider.around():
            yield

    def kernel(self) -> str:
        """Which kernel served a call, judged by the operators that torch dispatched during one."""
        with self.around(), _Operators() as seen:
            self.call()
            return self.provider.kernel(self.case, seen.names)


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))
