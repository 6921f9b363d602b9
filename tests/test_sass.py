"""What benchmarks.sass reads in the CUDA kernels' machine code is what plan and source say, and what is planted is found."""

import json
import shutil

import pytest
from benchmarks import machine_code, roofline, sass, suites
from benchmarks.machine_code import Code, Kernel
from workshop import CSRC, ROOT, edit

ARCHS = ["sm_80", "sm_90"]
# Barriers of a step, as the source says: of a block one; of a grid those of wait, of multiply (a turn) and of say; of a
# cluster wait, multiply and arrive, and one between two tiles; of a step kernel multiply's.
BARRIERS = {"block": 1, "grid": 3, "cluster": 3, "step": 1}
CASES = [
    ("lstm/{}/T1024-B16-I768-H768/float16", "grid"), ("gru/{}/T256-B2048-I128-H128", "block"),
    ("lstm/{}/T500-B32-I80-H256-L2-bi/bfloat16", "cluster"), ("lstm/{}/T500-B32-I80-H1024-L2-bi/tf32", "step"),
]  # fmt: skip


def case_of(name, way):
    return suites.case_named(name.format(sass.PASSES[way][0]), "cuda")


@pytest.fixture(scope="module", autouse=True)
def tools():
    """As tests/test_cuda_build.py: where there is no nvcc, nothing is built."""
    for name in ("nvcc", "nvdisasm"):
        if not machine_code.tool(name):
            pytest.skip(f"there is no {name} on PATH")


@pytest.mark.parametrize("way", sass.PASSES)
@pytest.mark.parametrize("name, regime, arch", [(*case, "sm_90") for case in CASES] + [(*CASES[i], "sm_80") for i in (0, 3)])
def test_counts_are_those_of_plan_and_source(name, regime, arch, way):
    found = sass.predict(case_of(name, way), way, arch)
    if way == "backward" and regime == "step":
        regime = found.plan["regime"]  # whose sums are of one gate
    assert found.plan["regime"] == regime
    kind, number = sass.products(found.kernel, found.plan)
    counts, plan, trips = found.counts, found.plan, sass.trips_of(found.plan)
    assert counts.parts["product", kind] == number
    gates = 1 if way == "backward" else {"lstm": 4, "gru": 3}[found.case.cell]
    a_turn = gates * plan["tiles"] * (2 if kind == "mma" else 16)  # two of 16 x 8 x 16, or 16 x 8 x 4 by 32 lanes
    rounds = trips["items" if regime == "block" else "tiles"]
    assert counts.turn[kind] == a_turn and number == a_turn * trips["depth"] * rounds
    # Of weights 16 bytes of a lane twice for each gate, and of states once for each tile, or twice if they are columns.
    weights, states = 2 * gates, plan["tiles"] * (1 if kind == "mma" else 2)
    loads = counts.turn["ldg"] + counts.turn["lds"]
    assert loads == weights + states
    assert counts.turn["ldg"] == {"block": states, "grid": states, "cluster": 0, "step": loads}[regime]
    tiles = trips["tiles"] if regime in ("grid", "cluster") else 1
    turns = trips["turns"]  # besides the first
    assert counts.of("bar") == BARRIERS[regime] + turns + (tiles - 1) * (turns + 2)
    assert counts.of("shfl") == 0
    # The cell's own: a lane of block.cuh has four places to a tile, the others one at a time.
    assert (counts.parts["cell", "mufu"] > 0) == (way != "backward" or found.case.cell == "lstm")
    assert 0 < roofline.floor_cycles(found.cycles) <= roofline.least_cycles(found.cycles)[0]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", [Kernel("lstm", "float16", False, "grid", 1), Kernel("gru", "float32", True, "block", 2)])
def test_a_kernel_alone_is_that_of_the_library(kernel, arch):
    """By its registers, which lines of the source do not change."""
    budget = json.loads((ROOT / "tests" / "cuda_budget.json").read_text())
    assert machine_code.disassemble(kernel, arch)[1] == budget[kernel.name][arch]


def planted(folder, file, pattern, replacement):
    shutil.copytree(CSRC, folder / "csrc")
    edit(folder / "csrc" / "cuda" / file, pattern, replacement)
    return folder / "csrc"


def test_what_is_planted_is_found(tmp_path):
    """A barrier too many, and products that are made twice."""
    case = case_of(CASES[0][0], "forward")
    before = sass.predict(case, "forward")
    csrc = planted(tmp_path / "barrier", "together.cuh", r"meeting\.say\(s\);", r"prims::block_sync();\n    \g<0>")
    after = sass.predict(case, "forward", csrc=csrc)
    assert after.counts.of("bar") == before.counts.of("bar") + 1 and after.counts.of("mma") == before.counts.of("mma")
    csrc = planted(tmp_path / "product", "arithmetic.cuh", r"prims::mma\(Element\{\}, sum, weights.*;", r"\g<0> \g<0>")
    after = sass.predict(case, "forward", csrc=csrc)
    assert after.counts.turn["mma"] == 2 * before.counts.turn["mma"]
    assert after.counts.of("mma") == 2 * sass.products(after.kernel, after.plan)[1]


def test_rows_say_that_they_were_never_run():
    """Committed predictions are of shapes of the suites, and lie where no report looks for measurements."""
    files = sorted((ROOT / "benchmarks" / "predicted").glob("*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert rows and all(row["predicted"] == "never run" for row in rows)
    assert not list((ROOT / "benchmarks" / "results").glob("**/*predicted*"))


def test_loop_of_no_known_source_is_refused():
    lines = ['\t//## File "/nowhere.cu", line 3', ".L_x_0:", "        /*0000*/   NOP ;",
             "        /*0010*/   @P0 BRA `(.L_x_0) ;", "        /*0020*/   EXIT ;"]  # fmt: skip
    text = "\n".join(lines)
    code = Code(text)
    assert set(code.loops) == {0} and len(code.blocks) == 2
    with pytest.raises(RuntimeError, match="expected one of the loops of LOOPS"):
        code.loop_of_source(0)


def test_program(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert sass.main(["--only", "T1024-B16.*inference", "--parts", "--out", str(out)]) == 0
    assert "predicted and never run" in capsys.readouterr().out
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["predicted"] == "never run" and row["instructions"]["mma"] == 24 and row["most"] in row["step_cycles"]
