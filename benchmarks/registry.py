"""All providers by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from .peers import PEERS
from .providers import (
    CUDA_KERNELS, WITHOUT, DynamicProvider, FrozenProvider, FusedProvider, Provider, TorchProvider, WithoutOption,
)  # fmt: skip

PROVIDERS: dict[str, Callable[[], Provider]] = {
    "torch": TorchProvider,
    "fusedrnn": FusedProvider,
    WITHOUT: WithoutOption,
    # torch without cuDNN and oneDNN
    "torch-plain": lambda: TorchProvider("torch-plain", plain=True),
    # torch once more: `--providers torch,torch-again` shows how far apart two equal things measure.
    "torch-again": lambda: TorchProvider("torch-again"),
    # each kernel of ours by force
    **{f"fusedrnn-{isa}": lambda isa=isa: FusedProvider(f"fusedrnn-{isa}", isa) for isa in ("baseline", "avx2", "avx512")},
    **{f"fusedrnn-{name}": lambda name=name: FusedProvider(f"fusedrnn-{name}", cuda=name) for name in CUDA_KERNELS},
    # weights in another form, for inference: fusedrnn.freeze's with the bounds of tests/test_freeze.py, and torch's own
    "frozen-float32": lambda: FrozenProvider("float32"),
    "frozen-bfloat16": lambda: FrozenProvider("bfloat16", 0.01),
    "frozen-int8": lambda: FrozenProvider("int8", 0.02),
    "torch-dynamic": DynamicProvider,
    **PEERS,
}


def provider_named(name: str) -> Provider:
    """A provider by name. ValueError with the names there are."""
    if name not in PROVIDERS:
        raise ValueError(f"no provider is called {name!r}; there are {', '.join(PROVIDERS)}")
    return PROVIDERS[name]()
