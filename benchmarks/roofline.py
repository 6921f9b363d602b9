"""What a GPU that is not here could do, by its maker's figures and others' measurements, and the floor of a step by them.

A step takes no less than the scarcest of what it needs, plus what passing the state on takes: nothing of the next product
can begin before. These are predictions, to be checked on a GPU; what a machine was seen to do stands in limits.py.
"""

from __future__ import annotations

import dataclasses

from . import limits
from .shapes import Case


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU on paper. Rates are for one multiprocessor and clock, unless they say otherwise."""

    name: str
    multiprocessors: int
    block_bytes: int  # shared memory that a block may have
    major: int  # of the compute capability
    clock: float  # Hz, of what the matrix units do
    memory_bytes_per_second: float
    l2_bytes: float  # a clock, of the whole chip
    l2_cycles: float  # from a load to its value
    neighbour_cycles: float  # the same, of another block's shared memory in a cluster
    mma_cycles: float  # from a product of the matrix units to the one that adds to it
    matrix_flops: dict[str, float]  # by format; the others go through the ordinary units
    ordinary_flops: dict[str, float]
    # The same on all chips of compute capability 8.0 and 9.0 (CUDA C programming guide; Luo et al.).
    schedulers: int = 4  # an instruction a clock each
    shared_bytes: float = 128.0
    special: float = 16.0  # MUFU, lanes
    fma_cycles: float = 4.0  # from a sum of the ordinary units to the one that adds to it
    l1_cycles: float = 40.7
    shared_cycles: float = 29.0

    def plans(self) -> dict[str, int]:
        """As `_C.cuda_plan` takes it."""
        return {"multiprocessors": self.multiprocessors, "shared_bytes": self.block_bytes, "major": self.major}

    def flops(self, dtype: str) -> float:
        """Of products and sums in a case's format."""
        return self.matrix_flops.get(dtype) or self.ordinary_flops[dtype]


# H100: NVIDIA H100 Tensor Core GPU Architecture, table 3 (132 multiprocessors, 1830 MHz with matrix units, 3.35 TB/s, 989.4
# TFLOPS in 16 bits, 494.7 in TF32; 66.9 in float32 and 33.5 in float64 at 1980 MHz). A100: NVIDIA A100 Tensor Core GPU
# Architecture, table 1. Latencies and L2's rate: Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture,
# arXiv:2402.13499, tables IV, V and VII, of an A100 PCIe and an H800 PCIe; an H100 may differ.
CHIPS = {
    "sm_90": Chip("H100 SXM", 132, 227 << 10, 9, 1.83e9, 3.35e12, 3942.4, 263.0, 180.0, 24.1,
                  {"float16": 4096.0, "bfloat16": 4096.0, "tf32": 2048.0}, {"float32": 256.0, "float64": 128.0}),
    "sm_80": Chip("A100 SXM 40 GB", 108, 163 << 10, 8, 1.41e9, 1.555e12, 2007.9, 261.5, float("nan"), 24.6,
                  {"float16": 2048.0, "bfloat16": 2048.0, "tf32": 1024.0}, {"float32": 128.0, "float64": 64.0}),
}  # fmt: skip

# Assumptions, from how the kernels are written and what nvcc makes of it. Which ways there and back lie one after another
# between the last state of a step and the first load of the next: by grid the fence of store_release, the word until a poll
# sees it, and the load that acquires; by cluster the fence of cluster_arrive, which is the whole chip's (MEMBAR.ALL.GPU),
# and the barrier. And where the states of a step are loaded from.
EXCHANGE = {"grid": ("l2_cycles",) * 3, "cluster": ("l2_cycles", "neighbour_cycles"), "block": (), "step": ()}
STATES = {"grid": "l2_cycles", "cluster": "shared_cycles", "block": "l1_cycles", "step": "l2_cycles"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a block does in a step. Of a warp: the busiest one's."""

    regime: str
    blocks: int  # of all directions
    warps: int  # of a block
    instructions: float  # of a warp
    special: float  # MUFU of a warp
    shared_bytes: float  # of a warp, to and from shared memory
    memory_bytes: float  # of the block, to and from the second-level cache
    flops: float  # of a warp, of its products, those with padding included
    chain: float  # products that add to the same sum, one after another; with the matrix units 16 or 8 deep each
    loads: float  # of states, one after another


def step_cycles(chip: Chip, dtype: str, work: Work) -> dict[str, float]:
    """Clocks that a step takes at least, by what it needs.

    Args:
        chip, dtype: where, and a case's format.
        work: of a block; blocks beyond one to a multiprocessor come in turns.

    Returns:
        issue, shared, math, special, l2 and chain, of which a step takes the largest, and exchange, which comes on top.
        Launching a grid a step (regime "step") is not in it, nor the latency of what is neither product nor load of states.
    """
    turns = -(-work.blocks // chip.multiprocessors)
    whole = turns * work.warps
    product = work.chain * (chip.mma_cycles if dtype in chip.matrix_flops else chip.fma_cycles)
    return {
        "issue": work.instructions * max(whole / chip.schedulers, turns),
        "shared": work.shared_bytes * whole / chip.shared_bytes,
        "math": work.flops * whole / chip.flops(dtype),
        "special": 32 * work.special * whole / chip.special,
        "l2": work.memory_bytes * work.blocks / chip.l2_bytes,
        "chain": max(product, work.loads * getattr(chip, STATES[work.regime])),
        "exchange": sum(getattr(chip, trip) for trip in EXCHANGE[work.regime]),
    }


def floor_cycles(cycles: dict[str, float]) -> float:
    """Clocks of a step, of what `step_cycles` found, however few its instructions were."""
    return max(cycles[name] for name in cycles if name not in ("issue", "exchange")) + cycles["exchange"]


def least_cycles(cycles: dict[str, float]) -> tuple[float, str]:
    """(clocks that the code as it is takes for a step at least, what takes most of them)."""
    return max(floor_cycles(cycles), cycles["issue"] + cycles["exchange"]), max(cycles, key=cycles.__getitem__)


def call_floor(chip: Chip, case: Case) -> float:
    """Seconds that a call takes at least for its arithmetic and its tensors: `limits.roof` on paper."""
    return limits.roof(case, chip.flops(case.dtype) * chip.multiprocessors * chip.clock, chip.memory_bytes_per_second)
