"""Whom else one could use: torch.compile of a plain loop, FlashRNN and Haste, as providers beside those of providers.py.

Neither library is a requirement; a provider imports its own when it is asked for something. Beside `name`, `module` and
`kernel`, each has `refuses(case)`: one line that says why this machine or this library cannot run the case, or None.
Their modules hold torch.nn's parameters under torch.nn's names, so that all get the same weights and are judged by the
same gradients; where a library orders the gates otherwise, the weights are rearranged in the call, differentiably.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from fusedrnn.reference import CELLS as STEPS

from .providers import Provider, build
from .shapes import CELLS, Case

States = tuple[Tensor, ...]  # after the last step, (B, H) each: (h,) or (h, c)


class PeerModule(torch.nn.Module):
    """torch.nn's parameters, and its loop over layers and directions around `direction`, which a peer has to say."""

    def __init__(self, case: Case, dtype: torch.dtype):
        super().__init__()
        self.cell, self.hidden_size = case.cell, case.shape.H
        self.num_layers, self.directions = case.shape.layers, case.shape.directions
        stock = build(torch.nn, case, dtype)
        for name, parameter in stock.named_parameters():
            self.register_parameter(name, parameter)
        self.train(stock.training)

    def direction(
        self, input: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
    ) -> tuple[Tensor, States]:
        """One layer in one direction, first step to last, from states of zeros: (output (T, B, H), last states)."""
        raise NotImplementedError

    def forward(self, input: Tensor):
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: self.directions]:
                names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                weights = [getattr(self, f"{name}_l{layer}{suffix}") for name in names]
                output, states = self.direction(input.flip(0) if suffix else input, *weights)
                outputs.append(output.flip(0) if suffix else output)
                last.append(states)
            input = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        hy, *cy = (torch.stack(state) for state in zip(*last))
        return input, (hy, *cy) if cy else hy


def first_reason(*checks: tuple[bool, str]) -> str | None:
    """The reason of the first check that holds."""
    return next((reason for holds, reason in checks if holds), None)


def import_failure(name: str) -> str | None:
    """Why the package `name` cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library of the package's is missing or does not fit this torch
        return f"{name} cannot be imported: {str(error).splitlines()[0]}"
    return None


def only_one_direction(name: str, case: Case) -> str | None:
    """What a library of single kernels has not got: measured would be this file's loop around it."""
    return first_reason(
        (case.shape.packed, f"{name} takes no PackedSequence"),
        (case.shape.layers > 1, f"{name} has one layer a call, not {case.shape.layers}"),
        (case.shape.bidirectional, f"{name} has one direction"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


BLOCK = 10  # steps


class CompiledBlocks(PeerModule):
    """The step in plain torch, unrolled over blocks of steps, which inductor compiles once and a loop runs through.

    Found by trying, torch 2.13 on a CPU, LSTM of 256, 100 steps, one sequence: blocks of 10 take 5 ms, a training step
    54 ms; a compiled step by itself 29 and 113. torch's scan takes 6 ms and 435, since it keeps a copy of the weights for
    every step, and its gradients are wrong where two stand in one graph (pytorch issue 153679). Blocks of 20 take 35 ms,
    and 44 s to compile: time and compilation fall and rise with the block, and where to stop is a choice.

    The product of the input is one product outside of what is compiled, so that all layers and directions have one shape.
    """

    def __init__(self, case: Case, dtype: torch.dtype):
        super().__init__(case, dtype)
        self.step = f"rnn_{case.shape.nonlinearity}" if case.cell == "rnn" else case.cell
        # Every shape is compiled for itself, and torch refuses to compile a function for more than a few.
        torch.compiler.reset()
        self.block = torch.compile(run_block, fullgraph=True, dynamic=False)

    def direction(self, input, weight_ih, weight_hh, bias_ih, bias_hh):
        gates = linear(input, weight_ih, bias_ih)
        # As the states of later blocks, or the first would be compiled for itself.
        zero = lambda: gates.new_zeros(gates.size(1), self.hidden_size).requires_grad_(gates.requires_grad)  # noqa: E731
        states = [zero() for _ in range(2 if self.cell == "lstm" else 1)]
        outputs = []
        # torch runs nothing compiled under a dispatch mode that is not its own, such as one that lists operators.
        with _disable_current_modes() if is_in_torch_dispatch_mode() else contextlib.nullcontext():
            for block in gates.split(BLOCK):
                output, *states = self.block(self.step, block, states, weight_hh, bias_hh)
                outputs.append(output)
        return torch.cat(outputs), tuple(states)


def run_block(step_name: str, gates: Tensor, states: list[Tensor], weight_hh: Tensor, bias_hh: Tensor) -> tuple[Tensor, ...]:
    """Output (T, B, H) and last states of a few steps, from their gates x W_ih^T + b_ih, (T, B, G*H)."""
    step = STEPS[step_name]
    outputs = []
    for gates_x in gates.unbind(0):
        states = step(gates_x, linear(states[0], weight_hh, bias_hh), states)
        outputs.append(states[0])
    return torch.stack(outputs), *states


class TorchCompile(Provider):
    """torch.compile in its default mode. The first call compiles a block and the rest: about a minute, whatever T."""

    name = "torch-compile"

    def refuses(self, case: Case) -> str | None:
        compiler = os.environ.get("CXX", "g++")  # as inductor chooses it
        no_compiler = case.device == "cpu" and shutil.which(compiler) is None
        no_triton = case.device == "cuda" and importlib.util.find_spec("triton") is None
        return first_reason(
            (case.shape.packed, "torch-compile takes no PackedSequence"),
            (case.mode == "backward", "torch.compile frees in backward what a second one would need"),
            (no_compiler, f"torch.compile needs a C++ compiler, and there is no {compiler}"),
            (no_triton, "torch.compile needs triton, which is not installed"),
        )

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return CompiledBlocks(case, dtype)

    def kernel(self, case: Case, operators: set[str]) -> str:
        return f"inductor/{BLOCK}-steps"


# ---------------------------------------------------------------------------------------------------------------------
# FlashRNN
# ---------------------------------------------------------------------------------------------------------------------


FLASHRNN_NAMES = {"rnn": "elman", "gru": "gru", "lstm": "lstm"}


class FlashRNNModule(PeerModule):
    """flashrnn(Wx, R, b) with one head; its names of the dimensions: Batch, Time, Gates, Heads, D and P units.

    Its LSTM orders the gates as torch.nn does and its GRU is torch.nn's, the reset gate after the product; that one has
    the rows of R in the order n, r, z, and four biases: n, r, z of the recurrent side, n of the input's.
    """

    def __init__(self, case: Case, dtype: torch.dtype, backend: str | None):
        super().__init__(case, dtype)
        self.case, self.backend = case, backend

    def direction(self, input, weight_ih, weight_hh, bias_ih, bias_hh):
        from flashrnn import flashrnn

        backend = self.backend or flashrnn_backend(self.case)
        (T, B, I), G, H = input.shape, CELLS[self.cell], self.hidden_size
        # Either way a view that the library permutes back to the layout its kernel reads, so that it copies nothing.
        if backend == "cuda_fused":  # it reads the gates of a unit side by side
            rows = lambda tensor: tensor.unflatten(0, (G, H)).transpose(0, 1).flatten(0, 1)  # noqa: E731
            gates = linear(input, rows(weight_ih), rows(bias_ih)).view(T, B, 1, H, G).permute(1, 0, 4, 2, 3)
        else:
            gates = linear(input, weight_ih, bias_ih).view(T, B, G, 1, H).transpose(0, 1)
        recurrent, bias = weight_hh.view(G, 1, H, H), bias_hh.view(G, 1, H)
        if self.cell == "gru":
            recurrent, bias = recurrent.roll(1, 0), torch.cat([bias.roll(1, 0), bias.new_zeros(1, 1, H)])
        function, dtype = FLASHRNN_NAMES[self.cell], str(input.dtype).removeprefix("torch.")
        states, last = flashrnn(gates, recurrent, bias, function=function, backend=backend, dtype=dtype)  # (S, B, T, 1, H)
        return states[0, :, :, 0].transpose(0, 1), tuple(last[:, :, 0, 0].unbind(0))


def flashrnn_backend(case: Case) -> str:
    """Which of FlashRNN's CUDA kernels serves a case: "cuda_fused", or "cuda" where that one cannot be built."""
    if case.cell == "gru":  # the library has no fused one and would itself take the other
        return "cuda"
    return _fused_or_not(case.cell, case.shape.B, case.shape.H, case.stored)


@functools.cache
def _fused_or_not(cell: str, B: int, H: int, dtype: str) -> str:
    from flashrnn import flashrnn

    G = CELLS[cell]
    zeros = functools.partial(torch.zeros, dtype=getattr(torch, dtype), device="cuda")
    arguments = zeros(B, 2, G, 1, H), zeros(G, 1, H, H), zeros(G, 1, H)
    try:  # the library builds and tries the kernel, forward and backward, before it runs it
        flashrnn(*arguments, function=FLASHRNN_NAMES[cell], backend="cuda_fused", dtype=dtype)
    except (RuntimeError, ValueError):  # it does not start, or no tiling fits this size on this chip
        return "cuda"
    return "cuda_fused"


class FlashRNN(Provider):
    """NX-AI's FlashRNN (pip install flashrnn), arXiv:2412.07752. The first call has nvcc build the kernel: minutes.

    Args:
        backend: one of the library's, for every case. "vanilla" is its loop in plain torch, which a CPU runs too.
            None: the fused CUDA kernel, or the alternating one where that cannot be built.
    """

    name = "flashrnn"
    dtypes = ("tf32", "bfloat16", "float16")  # of the CUDA kernels

    def __init__(self, backend: str | None = None):
        self.backend = backend

    def refuses(self, case: Case) -> str | None:
        on_cuda = self.backend != "vanilla"
        return (
            only_one_direction(self.name, case)
            or first_reason(
                (case.cell == "rnn" and case.shape.nonlinearity != "tanh", f"flashrnn's RNN has no {case.shape.nonlinearity}"),
                (on_cuda and case.device != "cuda", "flashrnn needs CUDA"),
                (on_cuda and case.dtype == "float32", "flashrnn multiplies float32 as TF32"),
                (on_cuda and case.dtype not in self.dtypes, f"flashrnn has no kernel for {case.dtype}"),
                (on_cuda and not has_nvcc(), "flashrnn builds its kernels with nvcc, which was not found"),
            )
            or import_failure("flashrnn")
        )

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return FlashRNNModule(case, dtype, self.backend)

    def kernel(self, case: Case, operators: set[str]) -> str:
        return f"flashrnn/{self.backend or flashrnn_backend(case)}"


def has_nvcc() -> bool:
    """Whether torch's extensions find an nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Haste
# ---------------------------------------------------------------------------------------------------------------------


class HasteModule(PeerModule):
    """haste_pytorch.LSTM or GRU, called with torch.nn's weights in its own order: columns, gates i g f o and z r n.

    The GRU has two biases and the reset gate after the product, as torch.nn's. The layer's own parameters are replaced
    in the call, and not registered here.
    """

    ORDER = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}  # Haste's gates, counted in torch.nn's order

    def __init__(self, case: Case, dtype: torch.dtype):
        super().__init__(case, dtype)
        import haste_pytorch

        layer = haste_pytorch.LSTM if case.cell == "lstm" else haste_pytorch.GRU
        self.layer = (layer(case.shape.I, case.shape.H).train(self.training),)

    def direction(self, input, weight_ih, weight_hh, bias_ih, bias_hh):
        order = self.ORDER[self.cell]
        columns = lambda tensor: torch.cat([tensor.unflatten(0, (len(order), -1))[i] for i in order]).t()  # noqa: E731
        weights = {"kernel": columns(weight_ih), "recurrent_kernel": columns(weight_hh)}
        if self.cell == "lstm":
            weights |= {"bias": columns(bias_ih + bias_hh)}
        else:
            weights |= {"bias": columns(bias_ih), "recurrent_bias": columns(bias_hh)}
        output, last = torch.func.functional_call(self.layer[0], weights, (input,))
        return output, tuple(state[0] for state in (last if self.cell == "lstm" else (last,)))


class Haste(Provider):
    """LMNT's Haste (pip install haste_pytorch, which nvcc builds), 0.5.0rc0 being the last; no change since 2023."""

    name = "haste"

    def refuses(self, case: Case) -> str | None:
        return (
            only_one_direction(self.name, case)
            or first_reason(
                (case.cell not in HasteModule.ORDER, f"haste has no {case.cell}"),
                (case.stored not in ("float32", "float64"), f"haste has no kernel for {case.dtype}"),
                (case.device != "cuda", "haste needs CUDA"),
            )
            or import_failure("haste_pytorch")
        )

    def module(self, case: Case, dtype: torch.dtype) -> torch.nn.Module:
        return HasteModule(case, dtype)

    def kernel(self, case: Case, operators: set[str]) -> str:
        return f"haste/{case.cell}"


PEERS: dict[str, type[Provider]] = {"torch-compile": TorchCompile, "flashrnn": FlashRNN, "haste": Haste}
