"""The ways of passing a state from block to block (benchmarks/exchange.cuh), run on the CPU by the emulator of tests/cuda_on_host.

exchange_test's head says what it proves. It runs as it is and under the sanitizers, and mistakes planted in copies of the
header must be found.
"""

import ctypes
import re
import shutil

import pytest
from benchmarks import exchange
from workshop import ADDRESS, CSRC, ROOT, THREAD, Workshop, cuda_headers, edit, run, run_sanitized

HOSTED = ROOT / "tests" / "cuda_on_host"
MODES = {"plain": "-O2", "address": ADDRESS, "thread": THREAD}
WRONG, STUCK, RACE = "a wrong state", "livelock|deadlock", "data race"
# name: pattern in exchange.cuh, replacement in which MADE is whether to make the mistake, what is printed in a mode
PLANTS = {
    "counter_no_wait": (r"uint32_t\(place\.blocks \* s\)\);", "MADE ? 0u : uint32_t(place.blocks * s));", {"plain": WRONG, "thread": RACE}),
    "counter_early": (r"prims::block_sync\(\);(\s+if \(threadIdx\.x == 0\) add_release)", r"if (!MADE) prims::block_sync();\1",
                      {"plain": WRONG, "thread": RACE}),
    "words_no_wait": (r"exchange\.wait\(s\);", "exchange.wait(MADE ? s - 1 : s);", {"plain": WRONG, "thread": RACE}),
    "one_slot": (r"return state \+ s % 2 \*", "return state + (MADE ? 0 : s % 2) *", {"plain": WRONG, "thread": RACE}),
    "tagged_any": (r"return found >> 32 == uint64_t\(s\);", "return MADE || found >> 32 == uint64_t(s);", {"plain": WRONG}),
    "tagged_one_slot": (r"return state \+ s % kSlots \*(.*?)\}", r"return state + (MADE ? 0 : s % kSlots) *\1}", {"plain": f"{WRONG}|{STUCK}"}),
    "sentinel_not_emptied": (r"if \(s > 1\) \{", "if (s > 1 && !MADE) {", {"plain": WRONG}),
    "sentinel_emptied_too_much": (r"slot\(s \+ 1\)", "slot(MADE ? s + 2 : s + 1)", {"plain": f"{WRONG}|{STUCK}"}),
    "cluster_no_start": (r"cluster_sync\(\);  // all blocks", r"if (!MADE) \g<0>", {"plain": f"has not begun|{WRONG}", "thread": f"{RACE}|has not begun"}),
    "cluster_one_copy": (r"s % 2 \* size \+ mine", "(MADE ? 0 : s % 2) * size + mine", {"plain": WRONG}),
    "cluster_to_itself": (r"prims::in_block\(state, unsigned\(block\)\)", "prims::in_block(state, unsigned(MADE ? mine : block))", {"plain": WRONG}),
    "late": (r"prims::block_sync\(\);  // nobody", r"if (!MADE) \g<0>", {"thread": RACE}),
}  # fmt: skip


@pytest.fixture(scope="module")
def program(request, tmp_path_factory):
    """exchange_test: program("plain") is the path; of "plants" and a mode that of one that can make mistakes."""
    if not (headers := cuda_headers()):
        pytest.skip("the headers of the CUDA toolkit are not here (CUDA_HOME, nvcc on PATH, /usr/local/cuda)")
    shop = Workshop(request, tmp_path_factory, "exchange")
    tree = shop.folder / "tree"
    for folder in ("benchmarks", "tests"):
        (tree / folder).mkdir(parents=True)
    shutil.copytree(HOSTED, tree / "tests" / "cuda_on_host")
    shutil.copy(ROOT / "benchmarks" / "exchange.cuh", tree / "benchmarks")
    for number, (pattern, replacement, _) in enumerate(PLANTS.values()):
        edit(tree / "benchmarks" / "exchange.cuh", f"(?s){pattern}", replacement.replace("MADE", f"fusedrnn_test_plant({number})"))
    edit(tree / "benchmarks" / "exchange.cuh", r"(#pragma once\n)", '\\1extern "C" bool fusedrnn_test_plant(int mistake);\n')
    for mode, flags in MODES.items():
        for name, root in (("right", ROOT), ("plants", tree)):
            inputs = [root / "benchmarks" / "exchange.cuh", *sorted(HOSTED.iterdir()), *sorted((CSRC / "cuda").glob("*.*h"))]
            source = root / "tests" / "cuda_on_host" / "exchange_test.cpp"
            shop.compile(f"{name}_{mode}", source, f"-std=c++20 -DFUSEDRNN_ON_HOST {flags}", f"-I{HOSTED} -I{CSRC} {headers}", inputs)
    made = {}

    def linked(mode, name="right"):
        if (mode, name) not in made:
            made[mode, name] = shop.link(f"exchange_{name}_{mode}", [f"{name}_{mode}"], MODES[mode])
        return made[mode, name]

    yield linked
    shop.close()


@pytest.mark.parametrize("mode", MODES)
def test_every_way_in_every_order(program, mode):
    """100,000 steps of each way among them, but under the sanitizers."""
    out = run_sanitized(str(program(mode)))
    assert re.search(r"85 runs, 0 failures", out)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (*_, found) in PLANTS.items() for mode in found])
def test_finds(program, name, mode):
    out = run_sanitized(f"{program(mode, 'plants')} --plant {list(PLANTS).index(name)}; test $? -ne 0")
    assert re.search(PLANTS[name][2][mode], out), out[-4000:]


def test_program_says_what_it_needs(capsys):
    import torch

    if torch.cuda.is_available():
        assert exchange.main([]) == 0
        return
    assert exchange.main([]) == 1
    assert "needs a GPU that torch sees" in capsys.readouterr().err


def test_kernels_compile():
    """And load, and say why they do not run, where there is no GPU."""
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc on PATH")
    library = ctypes.CDLL(str(exchange.compiled("90")))
    found = exchange.measure(library, "words", 2, 512)
    assert isinstance(found, float) or re.search("driver|device", found), found
    assert exchange.measure(library, "cluster", 16, 512) == "more than 8 blocks"
