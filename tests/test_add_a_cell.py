"""The README's walk through a new cell, taken step by step in a copy of the sources.

What it says to write is written, and then: the cell's derivatives are proven and planted mistakes in them found, the CPU's
engine runs it against the plain loops, in float32 and with several threads, the formula in C++ gives what the reference in
Python gives, and the layer runs on that reference.
"""

import random
import re
import shutil
import types

import pytest
import torch
from test_cpp import define_flags, keep_dtypes
from workshop import CSRC, ROOT, EngineWorkshop, edit, run

from documents import all_blocks, apply_diff
from fusedrnn import functional

CPP = ROOT / "tests" / "cpp"
NEW = {block.names: block.body for block in all_blocks() if block.is_new}
DIFFS = [block.text for block in all_blocks() if block.kind == "diff"]
LIST = r"\n  fn\(\d+, (\w+)\{\}\);"
# Reads pre-activations and a state, writes the new state.
STEP = """#include <cstdio>
#include "cells/cells.h"
int main() {
  double pre[2], state[1], next[1], saved[2];
  while (std::scanf("%lf %lf %lf", pre, pre + 1, state) == 3) {
    fusedrnn::UgrnnCell::forward(pre, state, next, saved);
    std::printf("%.17g\\n", next[0]);
  }
}
"""


@pytest.fixture(scope="module")
def walk(request, tmp_path_factory):
    """The workshop with the copy, tree "walked", beside which the reference lies; "alone" has no cell but the new one."""
    shop = EngineWorkshop(request, tmp_path_factory, "add_a_cell", "cpu", [CPP])
    root = shop.folder / "sources"
    root.mkdir()
    tree = shop.copy("walked")
    (tree / "cuda").mkdir()
    (root / "csrc").symlink_to(tree)
    (root / "fusedrnn").mkdir()
    shutil.copy(ROOT / "fusedrnn" / "reference.py", root / "fusedrnn")
    for name, text in NEW.items():
        (root / name).write_text(text)
    for diff in DIFFS:
        apply_diff(diff, root)
    shutil.copytree(tree, shop.folder / "alone")
    alone = shop.trees["alone"] = shop.folder / "alone"
    edit(alone / "cells" / "cells.h", f"({LIST})+", "\n  fn(0, UgrnnCell{});")
    keep_dtypes(alone, ["f32"])
    (tree / "cells" / "step.cpp").write_text(STEP)
    shop.root = root
    shop.compile("engine", "cpu/engine_baseline.cpp", "-O1 -fopenmp", "alone")
    shop.compile("cells_test", "cells_test.cpp", "-g1", "walked")
    shop.compile("engine_test", "engine_test.cpp", "-O1", "alone")
    shop.compile("engine_probe", "engine_probe.cpp", f"-fopenmp {define_flags('baseline', ours=True)}", "alone")
    shop.compile("threads", "threads.cpp", "-O1", "alone")
    shop.compile("capability", "cpu/capability.cpp", "-O1", "alone")
    shop.compile("step", "cells/step.cpp", "", "walked")
    yield shop
    shop.close()


@pytest.fixture(scope="module")
def reference(walk):
    """The reference with the new cell in it."""
    module = types.ModuleType("walked_reference")
    exec((walk.root / "fusedrnn" / "reference.py").read_text(), vars(module))
    return module


def test_the_walk_is_whole(walk):
    """Each file that it makes is used here, and it does for its cell what stands in the sources for another."""
    assert set(NEW) == {"csrc/cells/ugrnn.h", "csrc/cuda/ugrnn.cu", "ugrnn.py"} and len(DIFFS) == 2
    assert NEW["csrc/cuda/ugrnn.cu"] == (CSRC / "cuda" / "gru.cu").read_text().replace("GruCell", "UgrnnCell")
    before, after = (re.findall(LIST, (tree / "cells" / "cells.h").read_text()) for tree in (CSRC, walk.trees["walked"]))
    assert after == [*before, "UgrnnCell"]


def test_derivatives(walk):
    program = walk.link("cells_test", ["cells_test"])
    assert run(program).endswith(" 0 failures\n")
    wrong = 0
    while run(f"{program} --plant {wrong}; test $? -ne 2 || echo past the last").splitlines()[-1] != "past the last":
        wrong += 1
    for plant in range(wrong - 3, wrong):  # two pre-activations and a state
        assert "cell ugrnn: derivative" in run(f"{program} --plant {plant}", expect=1)


def test_engine(walk):
    program = walk.link("engine_test", ["engine", "engine_test", "engine_probe", "threads", "capability"])
    out = run(f"{program} --dtypes f32")
    assert out.endswith(" 0 failures\n") and int(re.search(r"(\d+) checks", out)[1]) > 100000
    assert ": grad_pre[" in run(f"{program} --dtypes f32 --every 40 --spoil grad_pre", expect=1)


def test_reference_is_the_same_formula(walk, reference):
    draws = random.Random(0)
    rows = torch.tensor([[draws.uniform(-4, 4) for _ in range(3)] for _ in range(100)], dtype=torch.float64)
    numbers = " ".join(f"{x:.17g}" for x in rows.flatten().tolist())
    found = [float(x) for x in run(f"echo {numbers} | {walk.link('step', ['step'])}").split()]
    half = rows[:, :2] / 2  # the halves of a gate that the engine adds up
    (expected,) = reference.CELLS["ugrnn"](half, half, (rows[:, 2:],))
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected[:, 0], rtol=1e-14, atol=1e-14)


def test_layer(walk, reference, monkeypatch):
    """On the reference, since the operators here were built without the cell."""
    namespace = {}
    exec((walk.root / "ugrnn.py").read_text(), namespace)
    layer = namespace["UGRNN"](3, 5)
    with pytest.raises(RuntimeError, match="ugrnn"):
        layer(torch.randn(7, 2, 3))
    monkeypatch.setattr(functional, "autograd", types.SimpleNamespace(layer=reference.layer))
    input, hx = torch.randn(7, 2, 3), torch.randn(1, 2, 5)
    output, hy = layer(input, hx)
    h, (weight_ih, weight_hh, bias_ih, bias_hh) = hx[0], layer.weights
    for x, found in zip(input, output, strict=True):
        z, n = (x @ weight_ih.t() + bias_ih + h @ weight_hh.t() + bias_hh).split(5, 1)
        h = (1 - z.sigmoid()) * n.tanh() + z.sigmoid() * h
        torch.testing.assert_close(found, h)
    torch.testing.assert_close(hy[0], h)
    output.sum().backward()
    assert all(weight.grad.any() for weight in layer.weights)
