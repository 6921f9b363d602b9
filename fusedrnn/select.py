"""Which path a call takes: the fused engine, or torch's own kernels and why.

`is_ordinary` answers for nearly every call in a microsecond; `reason_for_fallback` answers for the rest, with care.
Shapes are no matter of this file: a call whose shapes do not fit goes to torch to be refused in torch's words.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode, TorchFunctionMetadataMode
from torch.nn import Parameter
from torch.onnx import is_in_onnx_export
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import _C, onnx
from ._load import BUILD

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
DEVICES = frozenset({"cpu", "meta", "cuda"})
#: What the environment variable FUSEDRNN_KERNEL may name for tensors on CUDA: a kernel of csrc/cuda, where it can run a layer
#: ("step" else); or "stack", which takes several layers in one launch wherever they fit; or torch's own. If it is unset the first of the
#: former that can, and several layers in one launch where that is a gain.
FUSED_CUDA_KERNELS = ("block", "cluster", "grid", "step")
CUDA_KERNELS = (*FUSED_CUDA_KERNELS, "stack", "torch")
STACKING = frozenset({"cuda"})  # the devices on which several layers may go in one launch
OLDEST_CUDA = (8, 0)  # compute capability, as csrc/cuda/ops.cpp has it
HAS_CUDA, CUDA_WHY_NOT = _C.build_record()["cuda"], _C.build_record()["cuda_why_not"]

MISFIT = "torch has to judge arguments of this form"
# Here the user plainly asked for a graph of torch's own ops: nothing to warn of.
TRACING = "torch.jit.trace records torch's own ops"
EXPORTING = "torch.onnx.export translates torch's own ops"
SILENT = frozenset({TRACING, EXPORTING})


def is_ordinary(input: Any, states: Sequence[Any], weights: Sequence[Any]) -> bool:
    """True: plain tensors of one device and one dtype that an engine has, and no context that changes what a call means.

    False: the functions below have to look. This is the hot path of every call, hence the flat form.

    Args:
        input: what the module was given, or the data of a PackedSequence.
        states: the initial states that were given, none or all.
        weights: the module's, as they are now.

    Returns:
        whether the engine takes the call as it is.
    """
    if (
        _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or is_exporting()
    ):
        return False
    if type(input) is not Tensor and type(input) is not Parameter or input.is_nested:
        return False
    dtype = input.dtype
    if dtype not in DTYPES:
        return False
    if not input.is_cpu:
        taken = HAS_CUDA and input.is_cuda and reason_against_cuda(input.device) is None
        return taken and _all_like(input, states) and _all_like(input, weights)
    for tensor in states:
        if type(tensor) is not Tensor and type(tensor) is not Parameter or tensor.dtype != dtype or not tensor.is_cpu:
            return False
    for tensor in weights:
        if type(tensor) is not Parameter and type(tensor) is not Tensor or tensor.dtype != dtype or not tensor.is_cpu:
            return False
    return True


def _all_like(input: Tensor, tensors: Sequence[Any]) -> bool:
    return all(
        (type(tensor) is Tensor or type(tensor) is Parameter) and tensor.dtype == input.dtype and tensor.device == input.device
        for tensor in tensors
    )


def cuda_kernel() -> str:
    """The kernel that the environment variable FUSEDRNN_KERNEL asks for.

    Returns:
        one of `CUDA_KERNELS`, or "" for the first that can.

    Raises:
        RuntimeError: there is none of that name.
    """
    wanted = os.environ.get("FUSEDRNN_KERNEL", "")
    if wanted and wanted not in CUDA_KERNELS:
        raise RuntimeError(f"fusedrnn: FUSEDRNN_KERNEL must be one of {', '.join(CUDA_KERNELS)}, got '{wanted}'")
    return wanted


@cache
def chip(device: torch.device) -> dict[str, Any] | None:
    """A CUDA device's multiprocessors, shared_bytes (the most that a block may have) and major (of its compute capability), as
    `_C.cuda_plan` takes them; None if there is none to ask."""
    if not torch.cuda.is_available():
        return None
    found: Any = torch.cuda.get_device_properties(device)
    memory = found.shared_memory_per_block_optin
    return {"multiprocessors": found.multi_processor_count, "shared_bytes": memory, "major": found.major}


@cache
def _kernels_of(dtype: str = "float32") -> dict[str, list[str]]:
    """For each cell the kernels of csrc/cuda that there are in this format."""
    return _C.cuda_kernels(dtype)


def layers_at_once(device: torch.device, cell: str, dtype: torch.dtype, layers: int, **sizes: Any) -> tuple[int, bool]:
    """How many layers of a stack without anything between them go in one launch on CUDA.

    Args:
        device: that runs it.
        cell: as the engine names it.
        dtype: of all tensors.
        layers: that are left.
        sizes: T, B, H, and tf32, as in `reasons_against_kernels`.

    Returns:
        their number, 1 if each goes by itself; and whether they go in one launch backward, too.
    """
    wanted, found = cuda_kernel(), chip(device)
    if layers < 2 or found is None or wanted not in ("", "stack") or cell not in _kernels_of():  # with heads or a choice it is not
        return 1, False
    return _planned_stack(cell, str(dtype).removeprefix("torch."), layers=layers, wanted=wanted == "stack", **sizes, **found)


@lru_cache(maxsize=1024)
def _planned_stack(cell: str, dtype: str, **sizes: Any) -> tuple[int, bool]:
    layers, _, backward = _C.cuda_stack(cell, dtype, **sizes)
    return layers, layers > 1 and backward["regime"] == "grid"


ENDLESS = 1 << 20  # steps, more than any number that the planner wants for so many layers


def reason_against_stack(device: torch.device, cell: str, dtype: torch.dtype, layers: int, **sizes: Any) -> str | None:
    """Why `layers_at_once` finds 1 for the layers of a stack.

    Args:
        device, cell, dtype, layers, sizes: as there.

    Returns:
        the reason in words; None if several go in one launch.
    """
    wanted, found = cuda_kernel(), chip(device)
    if layers_at_once(device, cell, dtype, layers, **sizes)[0] > 1:
        return None
    if wanted not in ("", "stack"):
        return f"FUSEDRNN_KERNEL={wanted} asks for another"
    if "grid" not in _kernels_of("float64").get(cell, []):  # which other cells have not
        return "it is compiled for torch's own cells only, without heads"
    if found is None:
        return "there is no GPU to ask whether the weights fit"
    if wanted == "":
        sizes_alone = sizes | {"P": sizes["H"], "D": 1}
        alone = _C.cuda_plan(cell, str(dtype).removeprefix("torch."), **sizes_alone, **found)["cell"]["regime"]
        if alone == "block":
            return "one block can hold all of weight_hh, and a layer by itself has nothing to exchange"
        if alone == "step":
            return "a layer by itself takes a launch a step"
        if layers_at_once(device, cell, dtype, layers, **sizes | {"T": ENDLESS})[0] > 1:
            return f"{sizes['T']} steps are over before the layers above have begun"
    return ("the weights of two layers, of the hidden state and the input, and the sums of a block's share of "
            f"{sizes['B']} sequences do not fit into this GPU, or a block would have more rows than a warp takes")


def reasons_against_kernels(device: torch.device, cell: str, dtype: torch.dtype, **sizes: Any) -> dict[str, str | None]:
    """Why a layer's forward pass on CUDA is not run by the kernels of csrc/cuda.

    Args:
        device: the CUDA device that runs it.
        cell: as the engine names it, such as "rnn_tanh".
        dtype: of all tensors.
        sizes: T, B, H, P (H without projections), D directions, N heads if there are several, and tf32, whether float32 is multiplied
            as TF32.
    Returns:
        for "block", "cluster", "grid" and "step" the reason in words; None for the one that runs it. Before them, "alone" where
        that is the one.
    """
    name = str(dtype).removeprefix("torch.")
    kernels = _kernels_of(name)[cell]
    if kernels == ["alone"]:  # whatever FUSEDRNN_KERNEL asks for
        reason = "the cell has no recurrent product: its units do not need each other, and all steps go in one launch"
        return {"alone": None} | dict.fromkeys(FUSED_CUDA_KERNELS, reason)
    wanted, found = cuda_kernel(), chip(device)

    def planned(kernel: str) -> str:
        if found is None:
            return "step"
        return _C.cuda_plan(cell, name, **sizes, **found, kernel=kernel)["cell"]["regime"]

    chosen = planned(wanted)
    reasons: dict[str, str | None] = {"step": "all steps go in one launch" if chosen != "step" else None}
    for kernel in ("block", "cluster", "grid"):
        if kernel == chosen:
            reasons[kernel] = None
        elif kernel not in kernels:
            reasons[kernel] = ("in float64 it is compiled for torch's own cells only" if kernel in _kernels_of()[cell] else
                               "a step of this cell is two kernels: all of its first sums must be there before the second begins")
        elif wanted not in ("", "stack", kernel):
            reasons[kernel] = f"FUSEDRNN_KERNEL={wanted} asks for another"
        elif sizes["P"] != sizes["H"]:
            reasons[kernel] = "with a projection a step is two products"
        elif found is None:
            reasons[kernel] = "there is no GPU to ask whether the weights fit"
        elif sizes["T"] == 1:
            reasons[kernel] = "there is only one step"
        elif planned(kernel) == kernel:
            reasons[kernel] = {
                "block": f"one block can hold all of {_all_of(sizes)}, and then blocks need not wait for each other",
                "cluster": f"a cluster of blocks can hold all of {_all_of(sizes)}, and then only they wait for each other",
            }[chosen]
        else:
            reasons[kernel] = _no_room(kernel, **found, sizes=sizes)
    return {kernel: reasons[kernel] for kernel in FUSED_CUDA_KERNELS}


def _all_of(sizes: dict[str, Any]) -> str:
    return "weight_hh" if sizes.get("N", 1) == 1 else "a head's weight_hh"


def _no_room(kernel: str, multiprocessors: int, shared_bytes: int, major: int, sizes: dict[str, Any]) -> str:
    """Why this GPU has no room for a layer by one of the kernels that do all steps (csrc/cuda/plan.h)."""
    memory = f"the {shared_bytes >> 10} KiB of shared memory of a block"
    if kernel == "block":
        return f"{_all_of(sizes)} does not fit into {memory}"
    if kernel == "cluster":
        if major < 9:
            return "this GPU has no clusters (compute capability 9.0)"
        return f"an eighth of {_all_of(sizes)} and the states of a block's share of {sizes['B']} sequences do not fit into {memory}"
    heads = sizes.get("N", 1)
    blocks = -(-sizes["H"] // heads // 16) * heads * sizes["D"]
    if blocks > multiprocessors:
        return f"it would take {blocks} blocks, of 16 units each, at once, and there are {multiprocessors} multiprocessors"
    return f"the weights of 16 units and the sums of a block's share of {sizes['B']} sequences do not fit into {memory}"


def reason_against_cuda(device: torch.device) -> str | None:
    """Why no kernel of ours takes tensors on this CUDA device; None if one does.

    Args:
        device: of the tensors.

    Returns:
        words that end "... because <reason>", or None.
    """
    if not HAS_CUDA:
        return f"it was built without CUDA ({CUDA_WHY_NOT}); FUSEDRNN_CUDA=1 {BUILD} where nvcc is mends that"
    if cuda_kernel() == "torch":
        return "FUSEDRNN_KERNEL=torch asks for torch's own"
    return _too_old(device)


@cache
def _too_old(device: torch.device) -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_CUDA:
        return "its kernels need compute capability {}.{} or newer, and {} has {}.{}".format(
            *OLDEST_CUDA, device, *torch.cuda.get_device_capability(device))  # fmt: skip
    return None


def reason_for_fallback(input: Any, states: Sequence[Any], weights: Sequence[Any]) -> str | None:
    """Why the engine cannot take this call, in words that end "... because <reason>"; None if it can.

    Fake and meta tensors go the engine's way: its ops say which shapes they would return.

    Args:
        input, states, weights: as in `is_ordinary`.

    Returns:
        the reason, or None.
    """
    if is_exporting() and is_in_onnx_export() and not onnx.is_recording():
        return EXPORTING
    if not is_compiling():
        reason = _reason_in_context()
        if reason is not None:
            return reason
    tensors = [input, *states, *weights]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            return MISFIT
        kind = type(tensor)
        if kind is Tensor or kind is Parameter or isinstance(tensor, (FakeTensor, FunctionalTensor)):
            continue
        return f"{kind.__name__} is a tensor class with ways of its own"
    return _reason_in_tensors(tensors)


def _reason_in_context() -> str | None:
    if _get_tracing_state() is not None:
        return TRACING
    for mode in _get_current_function_mode_stack():
        # The first only says where new tensors are made; make_fx and torch.export take notes by the others.
        if not isinstance(mode, (DeviceContext, TorchFunctionMetadataMode, PreDispatchTorchFunctionMode)):
            return f"the torch function mode {type(mode).__name__} is active and expects torch's functions"
    return None


def _reason_in_tensors(tensors: Sequence[Tensor]) -> str | None:
    input = tensors[0]
    if any(tensor.layout != torch.strided or tensor.is_nested for tensor in tensors):
        return "a tensor is sparse or nested"
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return MISFIT
    if input.device.type not in DEVICES:
        return f"the engine has no kernel for the device {input.device.type}"
    if input.is_cuda and (reason := reason_against_cuda(input.device)) is not None:
        return reason
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes <= DTYPES:
        return f"the engine has no kernel for {_names(dtypes - DTYPES)}"
    if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(input.device.type)):
        return f"its tensors have different dtypes: {_names(dtypes)}"
    return None


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, dtypes)))


def autocast_dtype(cell: str, input: Tensor, hx: Tensor | None, onednn: bool = False) -> torch.dtype | None:
    """The dtype torch's result has under the autocast now in force; None if that casts nothing here.

    On CUDA that is autocast's lower precision for all. (torch's cuDNN gives float16 there even where bfloat16 is asked for.)
    On the CPU, torch.nn.RNN, RNNCell and the LSTM that oneDNN serves belong to the lower precision. In the others only the
    matrix products do: the state is added in, and its dtype wins where it is the wider one. float64 is never cast.

    Args:
        cell: the engine's name of it.
        input, hx: the call's; hx is None for zeros.
        onednn: this is an LSTM that torch would leave to oneDNN: a layer, padded, without projections.

    Returns:
        the dtype to cast everything to, or None.
    """
    device = input.device.type
    if not _is_any_autocast_enabled() or not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return None
    lower = torch.get_autocast_dtype(device)
    if device == "cuda" or cell.startswith("rnn") or onednn:
        return lower
    return torch.promote_types(lower, input.dtype if hx is None else hx.dtype)


_warned: set[tuple[str, str]] = set()


def warn_once(who: str, instead: str, reason: str) -> None:
    """Say, the first time for this caller and reason, that torch's own kernels ran a call, and why.

    Args:
        who: what was called, "fusedrnn.LSTM".
        instead: what ran, "torch.nn.LSTM".
        reason: as `reason_for_fallback` gives it.
    """
    if reason in SILENT or is_compiling() or (who, reason) in _warned:
        return
    _warned.add((who, reason))
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].startswith(("fusedrnn.", "torch.nn.modules.module")):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{who}: ran on {instead}, not on the fused engine, because {reason}", stacklevel=level)
