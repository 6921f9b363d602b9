"""Say which kernel a call would run, and for every other kernel why not."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _C, select
from .base import FusedLayer, Pair
from .cells import FusedCell
from .convert import FUSED_OF_STOCK
from .freeze import Frozen
from .layer import allows_tf32
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
    stack = _stack_of(module, input) if against and isinstance(module, FusedLayer) and module.num_layers > 1 else None
    if stack is not None:
        kernels[f"fused CUDA kernels, {stack.name}"] = stack.against
    for kernel in against or select.FUSED_CUDA_KERNELS:  # those that the cell could have
        kernels[f"fused CUDA kernels, {kernel}"] = (reason or against[kernel] or (stack and stack.instead)) if on_cuda else elsewhere
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


class _Stack(NamedTuple):
    """What `explain` says of a module whose layers may go in one launch."""

    name: str
    against: str | None
    instead: str | None
    """Why the kernel of a layer by itself does not run."""


def _stack_of(module: FusedLayer, input: Tensor | PackedSequence) -> _Stack:
    """Which layers of the module go in one launch, and if none why."""
    sizes, cell = _sizes_of(module, input), module._cell()
    data = input.data if isinstance(input, PackedSequence) else input
    own = {name: sizes[name] for name in ("T", "B", "H", "tf32")}
    options = [*module.extras(), *["dropout"] * bool(module.dropout and module.training), *["save"] * (module.save != "all")]
    against: str | None
    if options:
        against = f"it has no {', '.join(options)}"
    elif sizes["D"] > 1:
        against = "there are two directions, and a layer begins with what the one below ends with"
    elif sizes["P"] != sizes["H"]:
        against = "with a projection a step is two products"
    else:
        against = select.reason_against_stack(data.device, cell, data.dtype, module.num_layers, **own)
    if against is not None:
        return _Stack("stack", against, None)
    parts, first = [], 0
    while first < module.num_layers:
        count, _ = select.layers_at_once(data.device, cell, data.dtype, module.num_layers - first, **own)
        parts.append(f"layers {first} to {first + count - 1} in one launch" if count > 1 else f"layer {first} by itself")
        first += count
    alone = ", and the last by itself" if count == 1 else ""
    return _Stack(f"stack: {', '.join(parts)}", None, f"several layers go in one launch{alone}")


def _sizes_of(module: FusedLayer, input: Tensor | PackedSequence) -> dict[str, Any]:
    """The sizes of a call, as `fusedrnn.select.reasons_against_kernels` takes them."""
    data, H = input.data if isinstance(input, PackedSequence) else input, module.hidden_size
    if isinstance(input, PackedSequence):
        T, B = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        T, B = (data.shape[0], 1) if data.dim() == 2 else reversed(data.shape[:2]) if module.batch_first else data.shape[:2]
    batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
    tf32 = data.dtype == torch.float32 and allows_tf32(data, batch_sizes, module.batch_first)
    return {"T": T, "B": B, "H": H, "P": module.proj_size or H, "D": 2 if module.bidirectional else 1, "N": module.num_heads,
            "tf32": tf32}  # fmt: skip


def _reasons_against_kernels(module: FusedLayer | FusedCell, input: Tensor | PackedSequence) -> dict[str, str | None]:
    """Why each of our kernels does not run the call on CUDA; None for the one that does."""
    data, H = input.data if isinstance(input, PackedSequence) else input, module.hidden_size
    if isinstance(module, FusedCell):
        sizes = {"T": 1, "B": len(data) if data.dim() == 2 else 1, "H": H, "P": H, "D": 1, "N": 1, "tf32": False}  # of no matter: T is 1
        return select.reasons_against_kernels(data.device, module._cell(), data.dtype, **sizes)  # type: ignore[arg-type]
    cell = module._cell().partition(":")[0]
    return select.reasons_against_kernels(data.device, cell, data.dtype, **_sizes_of(module, input))


def _reason_against(isa: str) -> str | None:
    """Why the engine does not run in this instruction set; None for the one it runs in."""
    if isa == _C.cpu_isa():
        return None
    if isa not in _C.cpu_isas():
        return "this processor, or this build, has it not"
    return f"{_C.cpu_isa()} is preferred; the environment variable FUSEDRNN_CPU_ISA={isa} forces it"
