"""Who is measured. A provider makes a module for a case and tells which kernel served a call.

PROVIDERS holds them by name; every provider gets the same weights and the same input. Anything with these three
members can be one: `name`, `module(case, dtype)` and `kernel(module, operators)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .shapes import Case

CLASS_NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


def build(namespace, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    """A layer stack of `namespace` (torch.nn or something with the same classes) as the case asks for it."""
    shape = case.shape
    layer = getattr(namespace, CLASS_NAMES[case.cell])
    module = layer(shape.I, shape.H, num_layers=shape.layers, bidirectional=shape.bidirectional, dtype=dtype)
    return module.train(case.mode == "training")


class TorchProvider:
    """torch.nn: oneDNN for a padded LSTM on a CPU, a loop of small operators for all else."""

    def __init__(self, name: str = "torch"):
        self.name = name

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return build(torch.nn, case, dtype)

    def kernel(self, module: torch.nn.Module, operators: set[str]) -> str:
        libraries = {"mkldnn_rnn": "onednn", "_cudnn_rnn": "cudnn"}
        return next((libraries[word] for word in libraries if any(word in name for name in operators)), "aten")


class FusedProvider:
    """fusedrnn, whichever of its kernels it chooses; "torch" if a call left the fused path."""

    name = "fusedrnn"

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        import fusedrnn

        return build(fusedrnn, case, dtype)

    def kernel(self, module: torch.nn.Module, operators: set[str]) -> str:
        from fusedrnn import _C, select

        fused = any(name.startswith("fusedrnn.") for name in operators)
        on_cuda = next(module.parameters()).is_cuda
        return f"fused/{f'cuda-{select.cuda_kernel()}' if on_cuda else _C.cpu_isa()}" if fused else "torch"


PROVIDERS: dict[str, Callable[[], object]] = {
    "torch": TorchProvider,
    "fusedrnn": FusedProvider,
    # torch once more: `--providers torch,torch-again` shows how far apart two equal things measure.
    "torch-again": lambda: TorchProvider("torch-again"),
}


def provider_named(name: str):
    """A provider by name. ValueError with the names there are."""
    if name not in PROVIDERS:
        raise ValueError(f"no provider is called {name!r}; there are {', '.join(PROVIDERS)}")
    return PROVIDERS[name]()
