"""What can be measured: a shape of a stack of layers, and a case, which is a shape with cell, mode, dtype and device.

Which of them are measured is in suites.py.
"""

from __future__ import annotations

import dataclasses

CELLS = {"rnn": 1, "gru": 3, "lstm": 4}  # gates of a cell: rows of its weights, in units of H
# Work of a mode's matrix products in units of the forward pass's, and how often it passes over the sequence.
MODES = {
    "inference": (1, 1),  # module.eval() under no_grad
    "forward": (1, 1),  # the forward half of a training step, which keeps what backward needs
    "backward": (2, 1),  # the other half: gradients for the input and every weight, of a graph kept between calls
    "training": (3, 2),  # both
}
USUAL_MODES = ("inference", "training")


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
    nonlinearity: str = "tanh"  # of the RNN
    cells: tuple[str, ...] = tuple(CELLS)  # those that this shape is about
    threads: int | None = None  # None: as many as the run has
    step: bool = False  # a cell instead of a layer; T is 1
    states: bool = False  # the call is given states, as in a stream that goes on
    group: str = "padded"  # "padded" and "packed" have targets for their mean; "overhead" is the cost of one call

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def name(self) -> str:
        tail = f"-L{self.layers}" * (self.layers > 1) + "-bi" * self.bidirectional + "-packed" * self.packed
        tail += "-cell" * self.step + "-states" * self.states
        tail += f"-{self.nonlinearity}" * (self.nonlinearity != "tanh") + f"-{self.threads}threads" * bool(self.threads)
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
        """Multiplications and additions of the matrix products."""
        forward = sum(
            2.0 * sum(self.lengths) * self.directions * CELLS[cell] * self.H * (width + self.H)
            for width in self.layer_inputs
        )
        return forward * MODES[mode][0]

    def steps(self, mode: str) -> int:
        """Steps that follow on one another: layers wait for each other, directions do not."""
        return self.T * self.layers * MODES[mode][1]

    def recurrent_bytes(self, cell: str, itemsize: int = 4) -> float:
        """Bytes of recurrent weights that one step of one layer reads."""
        return float(self.directions * CELLS[cell] * self.H * self.H * itemsize)


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the tables: a shape, a cell, a mode."""

    shape: Shape
    cell: str
    mode: str
    dtype: str = "float32"  # or another of torch's, or "tf32": float32 that a GPU may round to TF32 before it multiplies
    device: str = "cpu"
    option: str | None = None  # what torch.nn has not, of those in written.py

    @property
    def name(self) -> str:
        begin = f"{self.option}/" if self.option else ""
        return f"{begin}{self.cell}/{self.mode}/{self.shape.name}" + f"/{self.dtype}" * (self.dtype != "float32")

    def shortened(self, most_flops: float) -> Case:
        """The case with so few steps that it is soon computed in float64 beside it: about so many flops, but two steps."""
        return self.cut(max(2, int(self.shape.T * most_flops / self.flops)))

    def cut(self, steps: int | None) -> Case:
        """The case with at most this many steps."""
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, T=min(self.shape.T, steps or self.shape.T)))

    @property
    def flops(self) -> float:
        shape = dataclasses.replace(self.shape, packed=True) if self.option == "lengths" else self.shape
        return shape.flops(self.cell, self.mode)

    @property
    def stored(self) -> str:
        """The dtype of the tensors."""
        return "float32" if self.dtype == "tf32" else self.dtype

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.stored, 2)

    @property
    def recurrent_bytes(self) -> float:
        return self.shape.recurrent_bytes(self.cell, self.itemsize)

    @property
    def steps(self) -> int:
        return self.shape.steps(self.mode)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(found: dict) -> Case:
        shape = found["shape"] | {"cells": tuple(found["shape"]["cells"])}
        return Case(**found | {"shape": Shape(**shape)})
