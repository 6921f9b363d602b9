"""Read the machine code of the CUDA kernels: what a warp does in a step, by instruction and by part of the source.

A kernel is compiled alone, with the lines of the source (which changes no instruction), and taken apart by nvdisasm. What
belongs to a step is counted: of kernels that do all steps the body of that loop, of the others all of it. A loop within is
known by its line of source and counts as often as the plan says; the compiler's unrolled copies share its turns. Not
counted is what no usual step does (RARE: projections, the last step of a row, and what stands behind `plain`), what a
loop's last turn leaves out (AHEAD), and what is kept for backward (SAVES) by a call that keeps nothing. Where the lanes of
a warp go both ways, both are counted, and so is an instruction whose predicate is false.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import math
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig

from .machine import ROOT

ARITHMETIC = {"float32": "Float32", "tf32": "Tf32", "float64": "Float64", "bfloat16": "BFloat16", "float16": "Float16"}
MEETINGS = {"cluster": "ByCluster", "grid": "ByGrid"}
# Classes of instructions, by the name's part before the first dot; what is in none is a whole number's: addresses, tests.
CLASSES = {
    "mma": "HMMA DMMA",
    "fma": "FFMA DFMA",
    "float": "FADD FMUL FSEL FSET FSETP FMNMX FCHK DADD DMUL DSETP HADD2 HMUL2 HFMA2 F2F F2FP I2F I2FP F2I F2I2F FRND",
    "mufu": "MUFU",
    "lds": "LDS LDSM",
    "sts": "STS",
    "ldg": "LDG LD",
    "stg": "STG ST",
    "bar": "BAR UCGABAR_ARV UCGABAR_WAIT",
    "fence": "MEMBAR ERRBAR CCTL DEPBAR CGAERRBAR ACQBULK",
    "ldc": "LDC ULDC LDCU",
    "shfl": "SHFL",
    "move": "MOV UMOV R2UR R2P P2R S2R S2UR CS2R PRMT",
    "flow": "BRA BSSY BSYNC EXIT RET CALL WARPSYNC YIELD NOP BREAK BMOV ELECT",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}
CLASS_NAMES = (*CLASSES, "integer")
# Parts of a step, by the function of the source in which the innermost frame with a name here lies.
PARTS = {
    "product": "multiply_add add_products load_weights load_block load_states load multiply add share own leave mma",
    "sums": "total",
    "fetch": "fetch fetch_constants hidden_before grad_output",
    "place": "packed_state_at state_at output_at in_row in_state lane_of",
    "exchange": "wait wait_for_own say pass wait_until store_release cluster_arrive cluster_wait in_block operator",
    "walk": "step_at first_of_next rows rows_of go_on step_of_walk goes_up",
    "finish": "finish finish_pre leave_h leave_hidden_before",
    "cell": "forward backward sigmoid tanh relu relu_grad",
}
PART_OF = {name: part for part, names in PARTS.items() for name in names.split()}
PART_NAMES = (*PARTS, "rest")

# The loops of a step: a line of the source that the loop has, its name among the trips, and what marks one of its turns.
LOOPS = (
    (r"for \(int64_t i = threadIdx\.x; i < pieces;", "pieces", None),  # before the first step
    (r"for \(int s = args\.rows\.begin;", "step", None),
    (r"for \(int item = ", "items", None),
    (r"while \(tile < place\.end_tile\)|\+\+tile == place\.end_tile", "tiles", None),
    (r"for \(int left = turns", "depth", {"mma", "fma"}),
    (r"for \(int now = 1; now \* slots", "turns", None),
    (r"for \(int i = threadIdx\.x;", "places", None),
    (r"for \(int other = 1; other < slots;", "slots", {"lds"}),
    (r"sum\[gate\] \+= parts\[", "slots", {"lds"}),
    (r"for \(int block = threadIdx\.x;", "words", None),
    (r"for \(;;\)|for \(uint32_t tries|int32_t\(found - value\)", "polls", None),
    (r"for \(unsigned block = 0;", "neighbours", {"stg"}),
    (r"\*prims::in_block\(", "neighbours", {"stg"}),
)
RARE = re.compile(
    r"unprojected|\(projected|projected\(\)|weight_hr|if \(last\)|leave_h\(|grad_cx|grad_hx"
    r"|steps\.(reset|lengths)|runs\(p\.steps|\bmade\b|zoneout_at|zoneout\(|\bpast\[|\(p\.hidden_mask\)"
)
AHEAD = (re.compile(r"if \(i \+ threads < places\)"), "places")  # a thread's next place, and the loop
SAVES = re.compile(r"saved_row|states_row|\bp\.saved|\bp\.states\b")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A pass of a layer by one of the kernels, as tests/cuda_budget.json names it."""

    cell: str  # the engine's name, such as "rnn_tanh"
    dtype: str  # a case's
    backward: bool
    regime: str
    tiles: int

    @property
    def step(self) -> str:
        cell = "".join(word.capitalize() for word in self.cell.split("_"))
        return f"{'Backward' if self.backward else 'Forward'}Cell<{cell}Cell, {ARITHMETIC[self.dtype]}>"

    @property
    def name(self) -> str:
        if self.regime in MEETINGS:
            return f"together_kernel<{self.step}, {self.tiles}, {MEETINGS[self.regime]}>"
        return f"{self.regime}_kernel<{self.step}, {self.tiles}>"

    @property
    def source(self) -> str:
        """A file that has this kernel and no other."""
        argument = self.step if self.regime == "step" else f"ManySteps<{self.step}>"
        return (f'#include "cuda/engine.cuh"\nusing namespace fusedrnn;\n'
                f"template __global__ void fusedrnn::{self.name}(const __grid_constant__ {argument});\n")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str  # LDS.128
    operands: str
    predicate: str  # "" or "@!P0"
    frames: tuple[tuple[str, int], ...]  # (file, line), the innermost function's first

    @property
    def kind(self) -> str:
        return CLASS_OF.get(self.name.partition(".")[0], "integer")

    @property
    def target(self) -> str | None:
        """The label that a branch goes to. Before sm_90 a far one is written as a call, of a label and not of a function."""
        found = re.search(r"`\((\.L_x_\d+)\)", self.operands)
        return found[1] if found and self.name.startswith(("BRA", "CALL")) else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.name.split(".")[0] not in ("BRA", "EXIT", "RET") and not self.target:
            return True
        return bool(self.predicate or (self.target and not self.operands.startswith("`")))

    @property
    def calls_slow_path(self) -> bool:
        """Before sm_90 a warp that waits for its lanes calls a function, too."""
        return self.name.startswith("CALL") and not self.target and "warpsync" not in self.operands

    @property
    def bytes(self) -> int:
        """Of a warp, to or from memory."""
        width = re.search(r"\.[US]?(8|16|64|128)\b", self.name)
        return 32 * (int(width[1]) // 8 if width else 4)


def tool(name: str) -> str | None:
    """The path of one of CUDA's programs: on PATH, in CUDA_HOME, or in NVIDIA's packages for this Python."""
    homes = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    homes += map(str, sorted(pathlib.Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")))
    return shutil.which(name, path=os.pathsep.join(homes))


@functools.cache
def flags() -> str:
    """setup.py's, of device code: an error where a register spills."""
    spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return f"-O3 {setup.SPILLS}"


def digest(csrc: pathlib.Path) -> str:
    """A short fingerprint of all that the kernels are made of."""
    found = hashlib.sha256()
    for path in sorted([*(csrc / "cells").iterdir(), *(csrc / "cuda").iterdir(), csrc / "params.h", csrc / "arena.h"]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def disassemble(kernel: Kernel, arch: str = "sm_90", csrc: pathlib.Path = ROOT / "csrc") -> tuple[str, int]:
    """(nvdisasm's text, registers of a thread) of a kernel, compiled for `arch` from the sources in `csrc`.

    Raises:
        RuntimeError: nvcc or nvdisasm is not here, or refuses, in its words.
    """
    nvcc, nvdisasm = (tool(name) for name in ("nvcc", "nvdisasm"))
    if not nvcc or not nvdisasm:
        raise RuntimeError(f"benchmarks.sass: needs nvcc and nvdisasm, found {nvcc} and {nvdisasm}")
    key = hashlib.sha256(f"{kernel} {arch} {csrc} {digest(csrc)} {flags()}".encode()).hexdigest()[:16]
    made = ROOT / "build" / "sass" / f"{key}.sass"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        source, cubin = made.with_suffix(".cu"), made.with_suffix(".cubin")
        source.write_text(kernel.source)
        options = [*flags().split(), "-lineinfo", "-cubin", f"-arch={arch}", f"-I{csrc}"]
        said = _run([nvcc, *options, str(source), "-o", str(cubin)])
        registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
        made.write_text(f"// {registers} registers\n{_run([nvdisasm, '-gi', '-c', str(cubin)])}")
        cubin.unlink()
    text = made.read_text()
    return text, int(text.split()[1])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout[-2000:]}")
    return done.stdout


# ---- Source ----


@functools.cache
def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


@functools.cache
def _functions(path: str) -> list[str]:
    """For each line of a source of ours the function that it is in; "" outside, and for all lines of others' sources."""
    found, name = [], ""
    for line in _lines(path):
        line = line.replace("__launch_bounds__(", "")
        head = re.search(r"\b(?:FUSEDRNN_(?:DEVICE|ANYWHERE|CELL)|__global__)\b.*?\b(\w+)\((?!\()", line)
        if head and not line.lstrip().startswith("#"):
            name = "kernel" if "__global__" in line else "operator" if "operator()" in line else head[1]
        found.append(name)
    return found


def text_of(frame: tuple[str, int]) -> str:
    """The line of the source."""
    lines = _lines(frame[0])
    return lines[frame[1] - 1] if 0 < frame[1] <= len(lines) else ""


def _function_names(frames: tuple[tuple[str, int], ...]) -> list[str]:
    found = [(_functions(path), line) for path, line in frames]
    return [functions[line - 1] for functions, line in found if 0 < line <= len(functions)]


def part_of(frames: tuple[tuple[str, int], ...]) -> str:
    """Which of PART_NAMES an instruction belongs to."""
    return next((PART_OF[name] for name in _function_names(frames) if name in PART_OF), "rest")


def _matches(pattern: re.Pattern[str], frames: tuple[tuple[str, int], ...]) -> bool:
    return any(pattern.search(text_of(frame)) for frame in frames)


# ---- Code ----


class Code:
    """Basic blocks of a kernel, and its loops.

    Attributes:
        blocks: of instructions, in the order of the code
        successors: of each block, without those that only a warp takes whose lanes are apart
        cold: blocks that call a slow path
        loops: {block that it begins with: blocks}
        latches: {block that a loop begins with: blocks that go back there}
    """

    def __init__(self, text: str):
        instructions, labels = self._read(text)
        begins = {0, *labels.values()} | {i + 1 for i, one in enumerate(instructions) if one.target or not one.goes_on}
        starts = sorted(i for i in begins if i < len(instructions))
        number = {start: n for n, start in enumerate(starts)}
        self.blocks = [instructions[a:b] for a, b in zip(starts, [*starts[1:], len(instructions)])]
        self.successors: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last, follows = block[-1], []
            if last.name.startswith(("BRX", "JMX")):
                raise RuntimeError("benchmarks.sass: expected branches to labels, got one through a register")
            if last.goes_on and n + 1 < len(self.blocks):
                follows.append(n + 1)
            if last.target and not last.name.startswith("BRA.DIV"):
                follows.append(number[labels[last.target]])
            self.successors.append(follows)
        self.cold = {n for n, block in enumerate(self.blocks) if any(one.calls_slow_path for one in block)}
        self.loops: dict[int, set[int]] = {}
        self.latches: dict[int, set[int]] = {}
        self._find_loops()

    @staticmethod
    def _read(text: str) -> tuple[list[Instruction], dict[str, int]]:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        frames: list[tuple[str, int]] = []
        in_frames = False
        for line in text.splitlines():
            if found := re.search(r'//## File "([^"]+)", line (\d+)', line):
                frames = [*frames, (found[1], int(found[2]))] if in_frames else [(found[1], int(found[2]))]
                in_frames = True
                continue
            in_frames = False
            if found := re.match(r"(\.L_x_\d+):", line):
                labels[found[1]] = len(instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", line):
                instructions.append(Instruction(found[2], found[3], found[1] or "", tuple(frames)))
        return instructions, labels

    def reach(self, start: int, within: set[int]) -> set[int]:
        """Blocks to which a way leads from `start` by blocks of `within`."""
        found, left = {start}, [start]
        while left:
            for n in self.successors[left.pop()]:
                if n in within and n not in found:
                    found.add(n)
                    left.append(n)
        return found

    def behind_exit(self, head: int, loop: set[int]) -> set[int]:
        """Blocks of a loop behind the first one in its middle that can leave it."""
        middle = [n for n in loop - self.latches[head] - {head} if set(self.successors[n]) - loop - self.cold]
        return max((loop - self.reach(head, loop - {n}) - {n} for n in middle), key=len, default=set())

    def _find_loops(self) -> None:
        every = self.reach(0, set(range(len(self.blocks))))
        before: dict[int, list[int]] = {n: [] for n in every}
        for n in every:
            for m in self.successors[n]:
                before[m].append(n)
        dominators = {n: set(every) for n in every} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for n in sorted(every - {0}):
                now = {n} | set.intersection(*(dominators[m] for m in before[n]))
                if now != dominators[n]:
                    dominators[n], changed = now, True
        for latch in sorted(every):
            for head in self.successors[latch]:
                if head not in dominators[latch]:
                    continue
                body, left = {head, latch}, [latch]
                while left:
                    n = left.pop()
                    for m in before[n] if n != head else ():
                        if m not in body:
                            body.add(m)
                            left.append(m)
                self.loops.setdefault(head, set()).update(body)
                self.latches.setdefault(head, set()).add(latch)

    def loop_of_source(self, head: int) -> tuple[str, set[str] | None]:
        """(name, mark) in LOOPS of the loop that begins with a block. RuntimeError if it is none of them."""
        inner = set().union(*(body for other, body in self.loops.items() if body < self.loops[head]))
        own = [one for n in sorted(self.latches[head]) for one in reversed(self.blocks[n])]
        own += [one for n in sorted(self.loops[head] - inner) for one in self.blocks[n]]
        for one in own:
            for frame in one.frames:
                for pattern, name, mark in LOOPS:
                    if re.search(pattern, text_of(frame)):
                        return name, mark
        raise RuntimeError(f"benchmarks.sass: expected one of the loops of LOOPS, got one at {own[0].frames}")


@dataclasses.dataclass
class Counts:
    """Of a warp in a step; a number of instructions is whole unless a loop's copies share its turns unevenly.

    Attributes:
        parts: instructions by (one of PART_NAMES, one of CLASS_NAMES)
        bytes: to and from memory, by the same; of each lane, though several may ask for the same
        turn: instructions of one turn of the product's loop, by class
        ahead: for how many turns what is multiplied is asked for at once, before the loop or within it
    """

    parts: collections.Counter
    bytes: collections.Counter
    turn: collections.Counter
    ahead: float

    def of(self, kind: str) -> float:
        """Instructions of one of CLASS_NAMES."""
        return sum(number for (_, other), number in self.parts.items() if other == kind)

    def part(self, part: str) -> float:
        """Instructions of one of PART_NAMES."""
        return sum(number for (other, _), number in self.parts.items() if other == part)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def count(code: Code, trips: dict[str, int], saves: bool, together: int = 1) -> Counts:
    """Counts a step's instructions.

    Args:
        code: a kernel's.
        trips: how often each of LOOPS goes round within a step; without "step" the kernel does one only.
        saves: whether the call keeps what backward needs, or is backward.
        together: turns of the product's loop that the source writes as one, and may leave in their middle.
    """
    every = set(range(len(code.blocks)))
    root = 0
    if "step" in trips:
        (root,) = (head for head in code.loops if code.loop_of_source(head)[0] == "step")
        every = code.loops[root]
    body = code.reach(root, every - code.cold)
    loops = {head: code.loops[head] & body for head in code.loops if head in body and head != root}
    named = {head: code.loop_of_source(head) for head in loops}
    times = dict.fromkeys(body, 1.0)
    turn: collections.Counter = collections.Counter()
    ahead = 1.0

    for name, mark in {name: mark for name, mark in named.values()}.items():
        heads = [head for head in loops if named[head][0] == name]
        inmost = {head: loops[head] for head in heads if not any(loops[other] < loops[head] for other in heads)}
        marks = {n: sum(_marks(one, name, mark or set()) for one in code.blocks[n]) for n in body}
        sizes = {head: sum(marks[n] for n in blocks) for head, blocks in inmost.items()}
        straight = {n: marks[n] for n in body if marks[n] and not any(n in loops[head] for head in heads)}
        unit = (math.gcd(*sizes.values(), *straight.values()) or 1) / (together if name == "depth" else 1)
        turns = _share(trips[name], {size for size in sizes.values() if size}, set(straight.values()), unit)
        for head, blocks in inmost.items():
            for n in blocks:
                times[n] *= turns[sizes[head]] if sizes[head] else trips[name]
        for n, size in straight.items():
            times[n] *= turns[size]
        if name == "tiles":  # left in its middle: what follows there comes one time less
            for head in heads:
                for n in code.behind_exit(head, loops[head]):
                    times[n] *= 1 - 1 / trips[name]
        if name == "depth":
            widest = max(inmost, key=sizes.__getitem__)
            copies = sizes[widest] / unit
            for one in itertools.chain.from_iterable(code.blocks[n] for n in sorted(inmost[widest])):
                turn[one.kind] += 1 / copies
            before = body - set().union(*(loops[head] for head in heads)) - set(straight)
            asked = sum(one.kind == "ldg" and part_of(one.frames) == "product" for n in before for one in code.blocks[n])
            ahead = asked / turn["ldg"] if asked and turn["ldg"] else copies

    found = Counts(collections.Counter(), collections.Counter(), turn, ahead)
    for n in body:
        for one in code.blocks[n]:
            # A cluster of one block would wait by BAR.
            alone = one.name.startswith("BAR.") and "cluster_wait" in _function_names(one.frames)
            if alone or _matches(RARE, one.frames) or (not saves and _matches(SAVES, one.frames)):
                continue
            often = times[n] * (1 - 1 / trips[AHEAD[1]] if _matches(AHEAD[0], one.frames) else 1)
            found.parts[part_of(one.frames), one.kind] += often
            if one.kind in ("lds", "sts", "ldg", "stg"):
                found.bytes[part_of(one.frames), one.kind] += often * one.bytes
    return found


def _marks(one: Instruction, name: str, mark: set[str]) -> bool:
    """Whether an instruction is one of those by which the turns of a loop are told."""
    if one.kind not in mark:
        return False
    part = {"depth": "product", "slots": "sums", "neighbours": "exchange"}[name]
    lines = [re.compile(pattern) for pattern, other, _ in LOOPS if other == name]  # of the product the loop is a caller's
    return part_of(one.frames) == part and (name == "depth" or any(_matches(line, one.frames) for line in lines))


def _share(trips: int, loops: set[int], straight: set[int], unit: float) -> dict[int, float]:
    """{marks of a copy of a loop's body: how often it runs}: the largest first, as compilers do; outside of loops once.

    Where nothing smaller is there for what is left, the last time is a part of it.

    Args:
        trips: turns.
        loops, straight: the copies, in loops and outside.
        unit: marks of a turn.
    """
    left, found = float(trips), {}
    sizes = sorted(loops | straight, reverse=True)
    for size in sizes:
        times = left * unit / size
        whole = times if size == sizes[-1] else float(int(times))
        found[size] = whole if size in loops else min(1.0, whole)
        left -= found[size] * size / unit
    return found
