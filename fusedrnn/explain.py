"""Say which kernel a call would run, and for every other kernel why not."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _C, select
from .cells import FusedCell
from .convert import FUSED_OF_STOCK
from .freeze import Frozen
from .layer import allows_tf32
from .modules import FusedLayer, Pair
from .shared import Unstocked

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")


def explain(module: nn.Module, input: Tensor | PackedSequence, hx: Tensor | Pair | tuple[Tensor, ...] | None = None) -> str:
    """Which kernel `module(input, hx)` runs, and for each other one why it does not. Runs nothing.

    Args:
        module: a layer or cell of fusedrnn, or of torch.nn, or what fusedrnn.freeze made of one.
        input, hx: as for the call.

    Returns:
        a few lines to print: the call, the kernel that runs, and a line for each kernel that does not.

    Raises:
        TypeError: module is no recurrent layer or cell.

    >>> import fusedrnn, torch
    >>> print(explain(fusedrnn.GRU(3, 5), torch.randn(7, 2, 3)))  # doctest: +ELLIPSIS
    fusedrnn.GRU(3, 5), input (7, 2, 3) float32 on cpu
      runs  fused engine, ...
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, Frozen):
        return _report(f"fusedrnn.{module}", input, _frozen_kernels(module, input))
    if isinstance(module, (FusedLayer, FusedCell)):
        package, stock, reason = "fusedrnn", module.stock, module.reason_for_stock(input, hx)  # type: ignore[arg-type]
    elif isinstance(module, tuple(FUSED_OF_STOCK)):
        package, stock = "torch.nn", next(cls for cls in FUSED_OF_STOCK if isinstance(module, cls))
        reason = "the module is torch.nn's own; fusedrnn.convert(model) changes that"
    else:
        raise TypeError(f"fusedrnn.explain: module must be a recurrent layer or cell, got {type(module).__name__}")

    extras = module.extras() if isinstance(module, FusedLayer) else []
    kernels: dict[str, str | None] = {}
    if stock is Unstocked:
        kernels["torch.nn"] = f"it has no {type(module).__name__}"
    elif extras:
        kernels[f"torch.nn.{stock.__name__}"] = f"it has no {', '.join(extras)}"
    else:
        kernels[f"torch.nn.{stock.__name__}"] = None if reason else "the fused engine takes the call"
    elsewhere = f"the input is on {data.device}"
    on_cuda = data.device.type == "cuda"
    against = _reasons_against_kernels(module, input) if on_cuda and not reason else {}  # type: ignore[arg-type]
    for kernel in against or select.FUSED_CUDA_KERNELS:  # those that the cell could have
        kernels[f"fused CUDA kernels, {kernel}"] = (reason or against[kernel]) if on_cuda else elsewhere
    for isa in INSTRUCTION_SETS:
        kernels[f"fused engine, {isa}"] = elsewhere if on_cuda else reason or _reason_against(isa)
    return _report(f"{package}.{module}", input, kernels)


def _report(call: str, input: Tensor | PackedSequence, kernels: dict[str, str | None]) -> str:
    """The lines of `explain`, from each kernel's reason why it does not run; None for the one that does."""
    data = input.data if isinstance(input, PackedSequence) else input
    packed = "packed " if data is not input else ""
    dtype = str(data.dtype).removeprefix("torch.")
    lines = [f"{call}, {packed}input {tuple(data.shape)} {dtype} on {data.device}"]
    chosen = next((name for name, why_not in kernels.items() if why_not is None), "nothing: the call is refused")
    lines.append(f"  runs  {chosen}")
    lines += [f"  not   {name}: {why_not}" for name, why_not in kernels.items() if why_not]
    return "\n".join(lines)


def _frozen_kernels(module: Frozen, input: Tensor | PackedSequence) -> dict[str, str | None]:
    """Why packed weights are not multiplied in each instruction set; None for the one that they are."""
    refused = module.reason_for_refusal(input)
    weights = str(module.dtype).removeprefix("torch.")
    return {f"frozen engine, {weights} weights, {isa}": refused or _reason_against(isa) for isa in INSTRUCTION_SETS}


def _reasons_against_kernels(module: FusedLayer | FusedCell, input: Tensor | PackedSequence) -> dict[str, str | None]:
    """Why each of our kernels does not run the call on CUDA; None for the one that does."""
    data, H = input.data if isinstance(input, PackedSequence) else input, module.hidden_size
    if isinstance(module, FusedCell):
        sizes = {"T": 1, "B": len(data) if data.dim() == 2 else 1, "H": H, "P": H, "D": 1, "N": 1, "tf32": False}  # of no matter: T is 1
        return select.reasons_against_kernels(data.device, module._cell(), data.dtype, **sizes)  # type: ignore[arg-type]
    if isinstance(input, PackedSequence):
        T, B = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        T, B = (data.shape[0], 1) if data.dim() == 2 else reversed(data.shape[:2]) if module.batch_first else data.shape[:2]
    batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
    tf32 = data.dtype == torch.float32 and allows_tf32(data, batch_sizes, module.batch_first)
    sizes = {"T": T, "B": B, "H": H, "P": module.proj_size or H, "D": 2 if module.bidirectional else 1, "N": module.num_heads,
             "tf32": tf32}
    return select.reasons_against_kernels(data.device, module._cell().partition(":")[0], data.dtype, **sizes)


def _reason_against(isa: str) -> str | None:
    """Why the engine does not run in this instruction set; None for the one it runs in."""
    if isa == _C.cpu_isa():
        return None
    if isa not in _C.cpu_isas():
        return "this processor, or this build, has it not"
    return f"{_C.cpu_isa()} is preferred; the environment variable FUSEDRNN_CPU_ISA={isa} forces it"
