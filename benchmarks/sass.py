"""What the machine code of the CUDA kernels predicts of a step, where there is no GPU to measure it: counts, and a floor.

    python -m benchmarks.sass                         prints a table of the shapes that the GPU's suite aims at
    python -m benchmarks.sass --only lstm --parts     some of them, and which part of the source the instructions are of
    python -m benchmarks.sass --arch sm_80            for an A100
    python -m benchmarks.sass --out FILE              and writes a row of JSON for each

Needs nvcc, and nvdisasm (NVIDIA's package nvidia-cuda-nvdisasm). What is counted machine_code.py says, and roofline.py what
a step takes at least by it. No row of this program was ever run: `predicted` stands in each, and none belongs among measured
ones (benchmarks/results).

  floor   the scarcest of what the step needs, and the exchange on top: what fewer instructions would not mend
  least   with the instructions as they are
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import sys

from . import machine, machine_code, roofline
from .machine_code import CLASS_NAMES, PART_NAMES, Code, Counts, Kernel
from .shapes import CELLS, Case
from .suites import case_named
from .table import grid

# Cases of the GPU's suite, one for each way a kernel can be bound; two besides by cluster, and by a grid a step.
NAMES = (
    "lstm/{}/T1024-B16-I768-H768/float16", "gru/{}/T256-B2048-I128-H128", "gru/{}/T1500-B32-I1024-H1024/bfloat16",
    "lstm/{}/T500-B32-I512-H512-L2-bi/bfloat16", "lstm/{}/T1000-B1-I64-H64", "lstm/{}/T500-B32-I80-H256-L2-bi/bfloat16",
    "lstm/{}/T1024-B256-I768-H768/float16", "lstm/{}/T500-B32-I80-H1024-L2-bi/tf32",
)  # fmt: skip
MATRIX = ("float16", "bfloat16", "tf32")  # which go through the matrix units
# Whether it is backward, and in which mode of a case.
PASSES = {"inference": ("inference", False), "forward": ("training", False), "backward": ("training", True)}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A pass of a case: what a step of it is made of, and what it takes at least.

    Attributes:
        case: of a suite
        way: of PASSES
        chip: on paper
        kernel, plan: that run it there
        registers: of a thread
        counts: of a warp in a step
        work: of a block
        cycles: `roofline.step_cycles`
    """

    case: Case
    way: str
    chip: roofline.Chip
    kernel: Kernel
    plan: dict
    registers: int
    counts: Counts
    work: roofline.Work
    cycles: dict[str, float]

    @property
    def steps(self) -> int:
        """That follow on one another; layers wait for each other."""
        return self.case.shape.T * self.case.shape.layers

    def row(self) -> dict:
        """For a file of predictions."""
        floor, (least, most) = roofline.floor_cycles(self.cycles), roofline.least_cycles(self.cycles)
        microseconds = 1e6 / self.chip.clock
        return {
            "predicted": "never run",
            "case": self.case.name, "pass": self.way, "chip": self.chip.name,
            "kernel": self.kernel.name, "regime": self.plan["regime"], "blocks": self.work.blocks,
            "warps": self.work.warps, "registers": self.registers,
            "instructions": {name: _short(self.counts.of(name)) for name in CLASS_NAMES if self.counts.of(name)},
            "parts": {name: _short(self.counts.part(name)) for name in PART_NAMES if self.counts.part(name)},
            "turn_of_product": {name: _short(number) for name, number in self.counts.turn.items()},
            "total": _short(self.counts.total),
            "shared_bytes": _short(self.work.shared_bytes * self.work.warps), "memory_bytes": _short(self.work.memory_bytes),
            "step_cycles": {name: _short(number) for name, number in self.cycles.items()},
            "floor_us": _short(floor * microseconds, 4), "least_us": _short(least * microseconds, 4), "most": most,
            "fraction_of_floor_at_most": _short(floor / least, 3),
            "recurrence_least_ms": _short(self.steps * least * microseconds / 1e3, 4),
            "call_floor_ms": _short(roofline.call_floor(self.chip, self.case) * 1e3, 4),
            "source": machine_code.digest(machine.ROOT / "csrc"),
        }  # fmt: skip


def _short(number: float, digits: int = 6) -> float:
    return float(f"{number:.{digits}g}")


def engine_cell(case: Case) -> str:
    """The engine's name of a case's cell."""
    return f"rnn_{case.shape.nonlinearity}" if case.cell == "rnn" else case.cell


def trips_of(plan: dict) -> dict[str, int]:
    """How often the loops of machine_code.LOOPS go round within a step, of the warp that has most to do."""
    depth = -(-plan["depth_blocks"] // plan["split"])
    places = -(-16 * plan["block_rows"] // plan["threads"])
    found = {"depth": depth, "places": places, "slots": plan["slots"] - 1, "turns": -(-plan["split"] // plan["slots"]) - 1}
    found |= {"tiles": -(-plan["unit_tiles"] // plan["sharers"])}
    if plan["regime"] == "step":
        return found
    found |= {"step": 1, "neighbours": plan["sharers"], "polls": 1}
    items = -(-plan["unit_tiles"] * plan["groups"] // (plan["threads"] // 32))
    return found | {"items": items, "words": -(-plan["sharers"] // plan["threads"])}


def gates_of(kernel: Kernel) -> int:
    """Gates of a unit in a sum."""
    return 1 if kernel.backward else CELLS[kernel.cell.partition("_")[0]]


def depth_of(case: Case) -> int:
    """Numbers of a depth block, as csrc/cuda/plan.h has them."""
    return {"tf32": 16, "float32": 4, "float64": 2}.get(case.dtype, 32)


def products(kernel: Kernel, plan: dict) -> tuple[str, int]:
    """(class of the instructions that multiply, how many of them a warp's step has) as plan and source say it."""
    trips = trips_of(plan)
    rounds = trips["items"] if plan["regime"] == "block" else trips["tiles"]
    matrix = kernel.dtype in MATRIX
    # Two of the matrix units' for a block of the depth, or one for each of the 16 bytes' numbers and each of the four sums.
    each = 2 if matrix else 4 * (2 if kernel.dtype == "float64" else 4)
    return "mma" if matrix else "fma", gates_of(kernel) * kernel.tiles * each * trips["depth"] * rounds


def turns_together(kernel: Kernel) -> int:
    """Blocks of the depth that a turn of the product's loop takes, as csrc/cuda/product.cuh has them."""
    gates, matrix = gates_of(kernel), kernel.dtype in MATRIX
    states = (16 if matrix else 32) * kernel.tiles  # bytes of a lane
    if kernel.regime == "block":
        return 1
    if kernel.regime == "step":
        sums = (8 if kernel.dtype == "float64" else 4) * 4 * gates * kernel.tiles
        return 2 if 2 * (32 * gates + states) + sums <= 640 else 1
    return min(max((256 if gates == 1 else 128) // states, 2), 8 if gates == 1 else 4)


def predict(case: Case, way: str, arch: str = "sm_90", csrc: pathlib.Path = machine.ROOT / "csrc") -> Prediction:
    """What the machine code says of a pass of a case. RuntimeError if there is no nvcc or nvdisasm here, or they refuse.

    Args:
        case: on a GPU, padded.
        way: of PASSES.
        arch: sm_80 or sm_90.
        csrc: where the kernels' sources are.
    """
    from fusedrnn import _C

    chip, shape, backward = roofline.CHIPS[arch], case.shape, PASSES[way][1]
    sizes = {"T": shape.T, "B": shape.B, "H": shape.H, "P": shape.H, "D": shape.directions}
    plans = _C.cuda_plan(engine_cell(case), case.stored, **sizes, **chip.plans(), tf32=case.dtype == "tf32")
    plan = plans["dh" if backward else "cell"]
    kernel = Kernel(engine_cell(case), case.dtype, backward, plan["regime"], plan["tiles"])
    text, registers = machine_code.disassemble(kernel, arch, csrc)
    trips = trips_of(plan)
    counts = machine_code.count(Code(text), trips, way != "inference", turns_together(kernel))
    kind, number = products(kernel, plan)
    turns = trips["depth"] * (trips["items"] if plan["regime"] == "block" else trips["tiles"])
    warps = plan["threads"] // 32
    bytes = counts.bytes.items()
    shared = sum(number for (_, kind), number in bytes if kind in ("lds", "sts"))
    memory = sum(number for (part, kind), number in bytes if kind in ("ldg", "stg") and part != "product")
    # What is multiplied is asked for by several lanes and warps, and comes once. A cluster has it in shared memory.
    rows = plan["block_rows"] * (plan["regime"] != "cluster") + 16 * gates_of(kernel) * (plan["regime"] == "step")
    work = roofline.Work(
        plan["regime"], plan["blocks"] * shape.directions, warps, counts.total, counts.of("mufu"), shared,
        memory * warps + rows * plan["depth_blocks"] * depth_of(case) * case.itemsize,
        flops=number * (64 if kind == "fma" else 2048 if case.dtype == "tf32" else 4096),
        chain=number / (kernel.tiles * gates_of(kernel) * (4 if kind == "fma" else 1)),
        loads=-(-turns // counts.ahead),
    )  # fmt: skip
    return Prediction(case, way, chip, kernel, plan, registers, counts, work, roofline.step_cycles(chip, case.dtype, work))


def table(found: list[Prediction]) -> str:
    """A line for each pass: instructions of a warp in a step, then clocks of a step."""
    shown = [name for name in CLASS_NAMES if any(one.counts.of(name) for one in found)]
    header = ["pass", "kernel", "blocks", "warps", "regs", *shown, "total"]
    lines = [[f"{one.case.name} {one.way}", one.plan["regime"], *map(str, (one.work.blocks, one.work.warps, one.registers)),
              *(f"{one.counts.of(name):.0f}" for name in shown), f"{one.counts.total:.0f}"] for one in found]  # fmt: skip
    times = []
    for one in found:
        floor, (least, most) = roofline.floor_cycles(one.cycles), roofline.least_cycles(one.cycles)
        seconds = least / one.chip.clock
        clocks = [f"{number:.0f}" for number in (*one.cycles.values(), floor, least)]
        texts = [f"{1e6 * seconds:.3g}", f"{1e3 * one.steps * seconds:.3g}"]
        times.append([f"{one.case.name} {one.way}", *clocks, most, *texts])
    return (f"instructions of a warp in a step\n\n{grid(header, lines, left=2)}\n\n"
            f"clocks of a step on the {found[0].chip.name}, predicted and never run\n\n"
            f"{grid(['pass', *found[0].cycles, 'floor', 'least', 'most', 'us', 'ms of all'], times)}")  # fmt: skip


def part_table(found: list[Prediction]) -> str:
    """A line for each pass and part of the source: instructions of a warp in a step."""
    lines = []
    for one in found:
        for part in PART_NAMES:
            numbers = [one.counts.parts[part, name] for name in CLASS_NAMES]
            if any(numbers):
                texts = [f"{number:.0f}" if number else "" for number in numbers]
                lines.append([f"{one.case.name} {one.way}", part, *texts, f"{sum(numbers):.0f}"])
    return grid(["pass", "part", *CLASS_NAMES, "total"], lines, left=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a pattern of the names of cases and passes")
    parser.add_argument("--arch", choices=roofline.CHIPS, default="sm_90", help="what to compile for")
    parser.add_argument("--parts", action="store_true", help="a table of the parts of the source, too")
    parser.add_argument("--out", type=pathlib.Path, help="file for the rows")
    options = parser.parse_args(arguments)
    passes = [(case_named(name.format(mode), "cuda"), way) for name in NAMES for way, (mode, _) in PASSES.items()]
    wanted = [(case, way) for case, way in passes if re.search(options.only or "", f"{case.name} {way}")]
    if not wanted:
        parser.error(f"no pass is named {options.only!r}")
    try:
        found = [predict(case, way, options.arch) for case, way in wanted]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(found) + (f"\n\n{part_table(found)}" if options.parts else ""))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(one.row()) + "\n" for one in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
