"""What is measured: shapes with a reason and a source each, suites of them, and the speeds aimed at.

A new suite is one more entry of SUITES; nothing else knows the shapes.
"""

from __future__ import annotations

import dataclasses
import re

CELLS = {"rnn": 1, "gru": 3, "lstm": 4}  # gates of a cell: rows of its weights, in units of H
MODES = ("inference", "training")  # module.eval() under no_grad; forward + backward for the input and every weight


@dataclasses.dataclass(frozen=True)
class Shape:
    """One stack of recurrent layers and its input: T steps, B sequences, I features, H units."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    why: str
    source: str
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False  # B lengths spread evenly over 1..T
    group: str = "padded"  # "padded" and "packed" have targets for their mean; "overhead" is the cost of one call

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def name(self) -> str:
        tail = f"-L{self.layers}" * (self.layers > 1) + "-bi" * self.bidirectional + "-packed" * self.packed
        return f"T{self.T}-B{self.B}-I{self.I}-H{self.H}{tail}"

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence, longest first."""
        if not self.packed or self.B == 1:
            return [self.T] * self.B
        return [round(self.T - (self.T - 1) * b / (self.B - 1)) for b in range(self.B)]

    @property
    def layer_inputs(self) -> list[int]:
        """Features that each layer reads."""
        return [self.I] + [self.directions * self.H] * (self.layers - 1)

    def flops(self, cell: str, mode: str) -> float:
        """Multiplications and additions of the matrix products; the backward pass has twice the forward's."""
        forward = sum(
            2.0 * sum(self.lengths) * self.directions * CELLS[cell] * self.H * (width + self.H)
            for width in self.layer_inputs
        )
        return forward * (3 if mode == "training" else 1)

    def weight_bytes(self, cell: str, mode: str, itemsize: int = 4) -> float:
        """Bytes of recurrent weights that a pass over the sequence reads: all of them, at every step.

        For B = 1 this traffic, not arithmetic, is what bounds the speed. The backward pass reads them once more.
        """
        recurrent = self.layers * self.directions * CELLS[cell] * self.H * self.H * itemsize
        return float(recurrent * self.T * (2 if mode == "training" else 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the tables: a shape, a cell, a mode."""

    shape: Shape
    cell: str
    mode: str
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.cell}/{self.mode}/{self.shape.name}" + f"/{self.dtype}" * (self.dtype != "float32")

    def shortened(self, most: int = 64) -> Case:
        """The case with so few steps and sequences that it is soon computed in float64 beside it."""
        shape = dataclasses.replace(self.shape, T=min(self.shape.T, most), B=min(self.shape.B, most))
        return dataclasses.replace(self, shape=shape)

    @property
    def flops(self) -> float:
        return self.shape.flops(self.cell, self.mode)

    @property
    def weight_bytes(self) -> float:
        return self.shape.weight_bytes(self.cell, self.mode)


DEEPBENCH = "DeepBench, rnn_problems.h"

CPU_SHAPES = (
    Shape(
        *(100, 1, 64, 64),
        why="One stream through a small model: the cost of a step is all there is.",
        source="keyword spotting and control policies; cf. DeepBench's device set",
    ),
    Shape(
        *(100, 1, 256, 256),
        why="One stream whose weights just leave the innermost cache.",
        source="DeepBench's device set has LSTM 256, batch 1",
    ),
    Shape(
        *(28, 100, 28, 128),
        why="Handwritten digits, a row a step: the layer most people meet first.",
        source="the MNIST tutorials for recurrent layers",
    ),
    Shape(
        *(100, 16, 256, 256),
        why="Training at a small batch: between latency and arithmetic.",
        source="DeepBench, LSTM 256, batch 16, shortened to 100 steps",
    ),
    Shape(
        *(50, 64, 512, 512),
        why="Bound by arithmetic: oneDNN runs its LSTM near the GEMM peak here.",
        source="sequence-to-sequence encoders, batch 64, sentences of 50",
    ),
    Shape(
        *(25, 32, 1024, 1024),
        why="Large weights that must come through the cache at every step.",
        source=f"{DEEPBENCH}: LSTM 1024, batch 32, 25 steps",
    ),
    Shape(
        *(25, 1, 1024, 1024),
        why="Answering one request: bound by reading the weights.",
        source=f"{DEEPBENCH}: LSTM 1024, batch 1, 25 steps (server inference)",
    ),
    Shape(
        *(37, 7, 19, 45),
        why="Odd and prime sizes: no vector and no tile divides them.",
        source="made up, against kernels that suit round sizes only",
    ),
    Shape(
        *(60, 32, 128, 256),
        why="A tagger or speech encoder: two layers, both directions.",
        source="BiLSTM encoders",
        layers=2,
        bidirectional=True,
    ),
    Shape(
        *(100, 32, 128, 256),
        why="Sentences of 1 to 100 words, packed.",
        source="text classifiers on PackedSequence",
        packed=True,
        group="packed",
    ),
    Shape(
        *(1, 1, 64, 64),
        why="One call of one step: everything but the arithmetic.",
        source="step-by-step decoding and control",
        group="overhead",
    ),
)

GPU_SHAPES = (
    Shape(
        *(1024, 16, 768, 768),
        why="A language model's layer at the batch that a GPU is left idle by.",
        source="FlashRNN's grid: batch 16, 1024 steps",
    ),
    Shape(
        *(256, 2048, 128, 128),
        why="Many environments, a small memory each: no step fills the chip by its depth.",
        source="reinforcement learning, cf. TorchRL's LSTM benchmark",
    ),
    Shape(
        *(500, 32, 512, 512),
        why="A speech encoder: two layers, both directions.",
        source="BiLSTM acoustic models",
        layers=2,
        bidirectional=True,
    ),
    Shape(
        *(1500, 32, 1024, 1024),
        why="Speech at full length: weights of 8 to 16 MiB, read at every step.",
        source="DeepBench, speech recognition, hidden 1024, batch 32",
    ),
    Shape(
        *(1000, 1, 64, 64),
        why="One stream through a small model: the cost of a step is all there is.",
        source="keyword spotting and control policies",
    ),
    Shape(
        *(500, 32, 512, 512),
        why="Sentences of 1 to 500 steps, packed.",
        source="the speech encoder's layer on PackedSequence",
        packed=True,
        group="packed",
    ),
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Shapes, each measured for every cell and mode in every dtype, on one device."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"


SUITES = {"cpu": Suite(CPU_SHAPES), "gpu": Suite(GPU_SHAPES, ("float32", "bfloat16", "float16"), "cuda")}

# Geometric mean of torch time / fusedrnn time to reach; the packed group has one target for all cells and modes.
TARGETS = {
    ("padded", "rnn", "inference"): 2.5,
    ("padded", "rnn", "training"): 3.5,
    ("padded", "gru", "inference"): 3.0,
    ("padded", "gru", "training"): 4.0,
    ("padded", "lstm", "inference"): 1.7,
    ("padded", "lstm", "training"): 2.0,
    ("packed", None, None): 3.0,
}


def cases(suite: str, only: str | None = None) -> list[Case]:
    """Every case of a suite, or those whose name (``lstm/training/T100-B1-I64-H64``) matches the pattern `only`."""
    chosen = SUITES[suite]
    every = [
        Case(shape, cell, mode, dtype, chosen.device)
        for shape in chosen.shapes for dtype in chosen.dtypes for cell in CELLS for mode in MODES
    ]  # fmt: skip
    return [case for case in every if only is None or re.search(only, case.name)]


def case_named(name: str) -> Case:
    """The case of this name, from whichever suite has it. KeyError if none has."""
    return {case.name: case for suite in SUITES for case in cases(suite)}[name]
