"""One case in the hands of one provider: module, input, and the call that is timed."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from .providers import TorchProvider
from .shapes import Case

SEED = 20240229


class Workload:
    """Module and input of a case; `call()` is what the clock and the memory meter see.

    Weights and input depend on the case alone, not on the provider, and are float32 numbers in every dtype.
    Inference is one call of the module under no_grad. Training is the call and the gradients of its output for the
    input and for every weight, as in the middle of a deep model; no optimizer, no loss.
    """

    def __init__(self, case: Case, provider, dtype: torch.dtype | None = None):
        self.case, self.provider = case, provider
        dtype = dtype or getattr(torch, case.dtype)
        torch.manual_seed(SEED)
        weights = TorchProvider().module(case, torch.float32).state_dict()
        self.module = provider.module(case, dtype)
        self.module.load_state_dict(weights)
        self.module.to(case.device)
        shape = case.shape
        generator = torch.Generator(case.device).manual_seed(SEED)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator, device=case.device).to(dtype)  # noqa: E731
        padded = draw(shape.T, shape.B, shape.I)
        packed = pack_padded_sequence(padded, torch.tensor(shape.lengths)) if shape.packed else None
        self.data = (packed.data if packed else padded).requires_grad_(case.mode == "training")
        self.input = PackedSequence(self.data, packed.batch_sizes) if packed else self.data
        self.grad_output = draw(*self.data.shape[:-1], shape.directions * shape.H)
        self.leaves = [self.data, *self.module.parameters()]

    def call(self):
        """One inference, or one training step. Returns the results, so that whoever calls frees them."""
        if self.case.mode == "inference":
            with torch.no_grad():
                return self.module(self.input)
        output, _ = self.module(self.input)
        output = output.data if self.case.shape.packed else output
        return torch.autograd.grad(output, self.leaves, self.grad_output)

    def kernel(self) -> str:
        """Which kernel served a call, judged by the operators that torch dispatched during one."""
        with _Operators() as seen:
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
