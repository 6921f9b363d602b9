"""Who is measured. A provider makes a module for a case and tells which kernel served a call.

PROVIDERS holds them by name; every provider gets the same weights and the same input. Anything with these three
members can be one: `name`, `module(case, dtype)` and `kernel(case, operators)`.
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


def cudnn_algorithm(case: Case, multiprocessors: int = 132) -> str:
    """Which of cuDNN's algorithms torch asks for, on compute capability 8.0 or newer: persist-small, persist or standard.

    Source: get_algo and its conditions in aten/src/ATen/native/cudnn/RNN.cpp. Where forward and backward differ, a training step
    has both, as "forward+backward".
    """
    shape, plain = case.shape, case.cell == "rnn"

    def algorithm(forward: bool) -> str:
        if shape.packed:
            return "standard"
        largest = (384 if forward else 256) if plain else (192 if forward else 128)
        if case.dtype != "float64" and shape.H <= largest:
            return "persist-small"
        one = shape.layers == shape.directions == 1 and shape.H <= 1024 and shape.H % 128 == shape.I % 128 == 0
        if case.dtype == "float16" and one and case.cell != "gru" and multiprocessors >= 98:
            if shape.B % 8 == 0 and shape.B <= 128 and (not plain or shape.B < 96 or shape.H < 896):
                return "persist"
        return "standard"

    found = [algorithm(True)] + [algorithm(False)] * (case.mode == "training")
    return "+".join(dict.fromkeys(found))


class TorchProvider:
    """torch.nn: oneDNN for a padded LSTM on a CPU, a loop of small operators for all else."""

    def __init__(self, name: str = "torch"):
        self.name = name

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return build(torch.nn, case, dtype)

    def kernel(self, case: Case, operators: set[str]) -> str:
        if any("_cudnn_rnn" in name for name in operators):
            return f"cudnn/{cudnn_algorithm(case)}"
        return "onednn" if any("mkldnn_rnn" in name for name in operators) else "aten"


class FusedProvider:
    """fusedrnn, whichever of its kernels it chooses; "torch" if a call left the fused path."""

    name = "fusedrnn"

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        import fusedrnn

        return build(fusedrnn, case, dtype)

    def kernel(self, case: Case, operators: set[str]) -> str:
        from fusedrnn import _C, select

        fused = any(name.startswith("fusedrnn.") for name in operators)
        engine = f"cuda-{select.cuda_kernel()}" if case.device == "cuda" else _C.cpu_isa()
        return f"fused/{engine}" if fused else "torch"


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
