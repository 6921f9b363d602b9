"""Who is measured. A provider makes a module for a case and tells which kernel served a call.

Every provider gets the same weights and the same input. Here are torch and fusedrnn; others are in peers.py, and
registry.py has all by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings

import torch

from . import written
from .shapes import Case

CUDA_KERNELS = ("block", "cluster", "grid", "step")  # fusedrnn.select's, which may not be built yet where this is read
WITHOUT = "fusedrnn-without"  # the option of a case
CLASS_NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


class Provider:
    """What the benchmark needs to know of one who is measured."""

    name: str
    #: What the gate lets pass of those who round the weights: an error in units of the largest value. None: the tests' rule.
    allowed: float | None = None
    has_options = False  # whether its modules are what a case with an option asks for

    def refuses(self, case: Case) -> str | None:
        """Why this case cannot be run, in a few words; None if it can."""
        return None

    def takes(self, case: Case) -> Case:
        """The case as this provider runs it."""
        return case

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        """A module with the parameters of torch.nn's, under the same names, called like it; made on the CPU."""
        raise NotImplementedError

    def finished(self, module: torch.nn.Module) -> torch.nn.Module:
        """What is called, made of `module` when that has its weights."""
        return module

    def kernel(self, case: Case, operators: set[str]) -> str:
        """What served a call, told by the names of the operators that torch dispatched during one."""
        raise NotImplementedError

    def around(self) -> contextlib.AbstractContextManager:
        """The settings that every call is made under."""
        return contextlib.nullcontext()


def reason_against(provider: Provider, case: Case) -> str | None:
    """Why `provider` cannot run the case, in a few words; None if it can."""
    if provider.takes(case).option and not provider.has_options:
        return f"has no {case.option}"
    return provider.refuses(case)


def build(namespace, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    """A layer stack of `namespace` (torch.nn or something with the same classes) as the case asks for it."""
    shape = case.shape
    name = CLASS_NAMES[case.cell] + "Cell" * shape.step
    if case.option in written.FORMS and namespace is not torch.nn:
        name = written.FORMS[case.option][1] or name
    layer = getattr(namespace, name)
    options = {} if shape.step else {"num_layers": shape.layers, "bidirectional": shape.bidirectional}
    if case.cell == "rnn":
        options["nonlinearity"] = shape.nonlinearity
    train = case.mode != "inference"
    if case.option is None:
        return layer(shape.I, shape.H, dtype=dtype, **options).train(train)
    train = train or written.OPTIONS[case.option].masks
    if namespace is torch.nn:
        return written.written(layer(shape.I, shape.H, dtype=dtype, **options).train(train), case).train(train)
    return written.asked(layer(shape.I, shape.H, dtype=dtype, **options, **written.settings(case)).train(train), case).train(train)


def cudnn_algorithm(case: Case, multiprocessors: int = 132) -> str:
    """Which of cuDNN's algorithms torch asks for, on compute capability 8.0 or newer: persist-small, persist or standard.

    Source: get_algo and its conditions in aten/src/ATen/native/cudnn/RNN.cpp. Where forward and backward differ, a training
    step has both, as "forward+backward".
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

    found = [algorithm(forward) for forward in (True, False) if case.mode != ("backward" if forward else "forward")]
    found = found[:1] if case.mode == "inference" else found
    return "+".join(dict.fromkeys(found))


class TorchProvider(Provider):
    """torch.nn: oneDNN for a padded LSTM on a CPU, a loop of small operators for all else; cuDNN on a GPU.

    Args:
        plain: without those libraries: torch's own operators alone.
    """

    has_options = True

    def __init__(self, name: str = "torch", plain: bool = False):
        self.name, self.plain = name, plain

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return build(torch.nn, case, dtype)

    def kernel(self, case: Case, operators: set[str]) -> str:
        if any("_cudnn_rnn" in name for name in operators):
            return f"cudnn/{cudnn_algorithm(case)}"
        return "onednn" if any("mkldnn_rnn" in name for name in operators) else "aten"

    @contextlib.contextmanager
    def around(self):
        with contextlib.ExitStack() as stack:
            if self.plain:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")  # said of every setting restored
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


class FusedProvider(Provider):
    """fusedrnn, whichever of its kernels it chooses; it refuses what it would leave to torch.

    Args:
        isa: the CPU's instruction set to use instead of the best.
        cuda: the value of FUSEDRNN_KERNEL instead of its default.
    """

    has_options = True

    def __init__(self, name: str = "fusedrnn", isa: str | None = None, cuda: str | None = None):
        self.name = name
        self.device = "cpu" if isa else "cuda" if cuda else None
        self.settings = {"FUSEDRNN_CPU_ISA": isa, "FUSEDRNN_KERNEL": cuda}

    def refuses(self, case: Case) -> str | None:
        from fusedrnn import _C, select

        isa = self.settings["FUSEDRNN_CPU_ISA"]
        if self.device not in (None, case.device):
            return f"a kernel for {self.device}"
        if case.device == "cuda":
            with self.around():
                return select.reason_against_cuda(torch.device("cuda"))
        return f"this processor has no {isa}" if isa and isa not in _C.cpu_isas() else None

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        import fusedrnn

        return build(fusedrnn, case, dtype)

    def kernel(self, case: Case, operators: set[str]) -> str:
        from fusedrnn import _C, select

        if not any(name.startswith("fusedrnn.") for name in operators):
            return "torch"
        if case.device == "cpu":
            return f"fused/{_C.cpu_isa()}"
        shape, cell = case.shape, f"rnn_{case.shape.nonlinearity}" if case.cell == "rnn" else case.cell
        sizes = {"T": shape.T, "B": shape.B, "H": shape.H, "P": shape.H, "D": shape.directions, "tf32": case.dtype == "tf32"}
        reasons = select.reasons_against_kernels(torch.device("cuda"), cell, getattr(torch, case.stored), **sizes)
        return f"fused/cuda-{next(kernel for kernel, reason in reasons.items() if reason is None)}"

    @contextlib.contextmanager
    def around(self):
        before = {name: os.environ.get(name) for name in self.settings}
        set_environment({name: value for name, value in self.settings.items() if value})
        try:
            yield
        finally:
            set_environment(before)


class PackedProvider(Provider):
    """What holds weights in a form for inference on a CPU alone."""

    def refuses(self, case: Case) -> str | None:
        if case.device != "cpu" or case.dtype != "float32":
            return "for float32 on a CPU"
        return None if case.mode == "inference" and not case.shape.packed else "for inference on padded sequences"


class FrozenProvider(PackedProvider):
    """fusedrnn.freeze.

    Args:
        weights: their dtype's name.
        allowed: as in `Provider`.
    """

    def __init__(self, weights: str, allowed: float | None = None):
        self.name, self.weights, self.allowed = f"frozen-{weights}", weights, allowed

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return build(torch.nn, case, dtype)

    def finished(self, module: torch.nn.Module) -> torch.nn.Module:
        import fusedrnn

        return fusedrnn.freeze(module, getattr(torch, self.weights))

    def kernel(self, case: Case, operators: set[str]) -> str:
        from fusedrnn import _C

        assert "fusedrnn.frozen_forward.default" in operators
        return f"frozen/{self.weights}/{_C.cpu_isa()}"


class DynamicProvider(PackedProvider):
    """torch.ao.quantization.quantize_dynamic: weights of 8 bits, and what they multiply rounded to 8 bits at every step."""

    name, allowed = "torch-dynamic", 0.1

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return build(torch.nn, case, dtype)

    def finished(self, module: torch.nn.Module) -> torch.nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this is on its way out
            model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module), {type(module)}, dtype=torch.qint8)
        return model[0]

    def kernel(self, case: Case, operators: set[str]) -> str:
        assert any("quantized" in name for name in operators), operators
        return f"dynamic/{torch.backends.quantized.engine}"


class WithoutOption(FusedProvider):
    """fusedrnn's layer without the case's option: what the option costs is counted from there."""

    def __init__(self):
        super().__init__(WITHOUT)

    def takes(self, case: Case) -> Case:
        return dataclasses.replace(case, option=None)


def set_environment(settings: dict[str, str | None]) -> None:
    """Sets environment variables; None takes one away."""
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
