"""Masks at random, of torch's own generator: what zoneout, recurrent dropout and DropConnect draw."""

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling


def draw(mask: Tensor, rate: float) -> Tensor:
    """Fill a tensor with ones and zeros, as bernoulli_ does.

    Args:
        mask: the tensor.
        rate: the probability of a one, from 0 to below 1; on a CPU rounded to 32 bits.

    Returns:
        the tensor.
    """
    if not _is_plain(mask):
        return mask.bernoulli_(rate)
    count = mask.numel()
    bits = mask.new_empty(-(-count // 2), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int32)[:count]
    return mask.copy_(bits.view(mask.shape) < min(round(rate * (1 << 32)) - (1 << 31), (1 << 31) - 1))


def dropout(tensor: Tensor, rate: float) -> Tensor:
    """Zero numbers of a tensor at random and divide the others by how many are left, as torch.dropout does in training.

    Args:
        tensor: of any shape.
        rate: the probability with which a number of it is zeroed.

    Returns:
        the result.
    """
    if not _is_plain(tensor):
        return torch.dropout(tensor, rate, True)
    with torch.no_grad():
        mask = draw(torch.empty_like(tensor), 1 - rate).div_(1 - rate)
    return tensor * mask


LEAST = 1024  # numbers


def _is_plain(tensor: Tensor) -> bool:
    """Whether there are so many numbers, on a CPU, that it is quicker to draw bits: 2 ns a number on one core, and bernoulli_ takes 6."""
    if is_compiling() or _are_functorch_transforms_active() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.is_cpu and tensor.numel() >= LEAST
