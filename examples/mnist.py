"""Images of handwritten digits: MNIST's idx files, or the 1,797 small scans that scikit-learn brings along."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .common import Refused

Split = tuple[Tensor, Tensor]  # images (N, rows, columns) from 0 to 1, labels (N,)


def load_small() -> tuple[Split, Split]:
    """scikit-learn's digits of 8x8, a fifth of them kept for the test: (train, test)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[train], labels[train]), (images[test], labels[test])


def load_mnist(folder: Path) -> tuple[Split, Split]:
    """MNIST from its four idx files: (train, test). Refused if they are not there or not whole."""
    if not folder.is_dir():
        raise Refused(f"--data: {folder} is not a folder")
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images", 3).float() / 255
        labels = read_idx(folder, f"{part}-labels", 1).long()
        if len(images) != len(labels) or not len(images):
            raise Refused(f"--data: {folder} has {len(images)} {part} images and {len(labels)} labels")
        if labels.max() > 9:
            raise Refused(f"--data: a label in {part}-labels is {labels.max()}; digits are 0 to 9")
        parts.append((images, labels))
    train, test = parts
    if train[0].shape[1:] != test[0].shape[1:]:
        sizes = " and ".join(f"{images.shape[1]}x{images.shape[2]}" for images, _ in parts)
        raise Refused(f"--data: {folder} has train and t10k images of two sizes, {sizes}")
    return train, test


def read_idx(folder: Path, stem: str, dims: int) -> Tensor:
    """The array in an idx file: two zeros, 8 (for bytes), the count of dimensions, each in 4 bytes, then the data."""
    names = [f"{stem}{dot}idx{dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise Refused(f"--data: {folder} has no {names[0]} or {names[1]}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"--data: {path} cannot be read: {error}") from error
    head = 4 + 4 * dims
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < head:
        begin = content[:4].hex(" ") or "with nothing"
        raise Refused(f"--data: {path} is no idx file of bytes with {dims} dimensions: it begins {begin}")
    shape = struct.unpack(f">{dims}I", content[4:head])
    if len(content) != head + math.prod(shape):
        raise Refused(f"--data: {path} is cut short or has more at its end: {len(content):,} bytes, "
                        f"where its header says {head + math.prod(shape):,}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[head:].reshape(shape)
