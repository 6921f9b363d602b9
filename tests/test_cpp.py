"""The C++ below the operators, tested without torch: builds the programs of tests/cpp with g++ and runs them.

Each program's head says what it proves. They run as the library is compiled, under AddressSanitizer and UBSan, and under
ThreadSanitizer. Where the processor lacks an instruction set, that engine is compiled without it: the compiler splits its
vectors, and the logic of its blocks, tails and tiles runs all the same. Every check is checked: mistakes planted in copies
of the sources must be found.
"""

import platform
import re
from pathlib import Path

import pytest
from workshop import CSRC, ROOT, THREAD, UNDEFINED, EngineWorkshop, edit, run, run_sanitized, setup

CPP = ROOT / "tests" / "cpp"


def isas_of(engine):
    """The instruction sets that csrc/cpu/<engine>_*.cpp are compiled for on a machine of this kind."""
    everywhere = platform.machine() in ("x86_64", "AMD64")
    return [isa for isa in (setup.ISA_FLAGS if everywhere else ["baseline"]) if (CSRC / "cpu" / f"{engine}_{isa}.cpp").exists()]


ISAS = isas_of("engine")
DTYPES = {"f32": "kFloat32", "f64": "kFloat64", "bf16": "kBFloat16", "f16": "kFloat16"}
# On the engine, whose every access is checked by calls (inlined checks take the compiler many minutes), only those of
# UBSan's checks that the other two do not imply.
ADDRESS = (UNDEFINED + " -fno-sanitize=null,alignment,object-size,pointer-overflow,vptr"
           " --param asan-instrumentation-with-call-threshold=0")
# Compiling an engine takes a processor 10 seconds a format. All of them run as the library is compiled for this machine;
# elsewhere only some, since the formats share their logic but for the loads and stores that vec_test covers.
EMULATED_DTYPES = ["f32", "f16"]
ADDRESS_DTYPES = {"baseline": ["f16"], "avx2": ["bf16"], "avx512": ["f64"]}
THREAD_DTYPES = ["f32"]
RELEASE, ACQUIRE = 100, 101  # numbers of the barrier's memory orders among what --skip-barrier leaves out


def native(isa):
    """Whether this processor runs code compiled for `isa`."""
    needed = set(re.findall(r"-m(\w+)(?= |$)", setup.ISA_FLAGS[isa]))
    cpuinfo = Path("/proc/cpuinfo").read_text() if needed else ""
    return needed <= set(" ".join(re.findall(r"^flags\s*:(.*)", cpuinfo, re.M)).replace("_", "").split())


def machine_flags(isa):
    """The compiler's flags for `isa`, or for the best that this processor has if it has not that."""
    return setup.ISA_FLAGS[isa if native(isa) else [isa for isa in ISAS if native(isa)][-1]]


def defines(isa):
    """What csrc/cpu/engine_<isa>.cpp defines in front of the engine: namespace, vector width, registers."""
    found = dict(re.findall(r"#define (FUSEDRNN_\w+) (\w+)", (CSRC / "cpu" / f"engine_{isa}.cpp").read_text()))
    assert set(found) == {"FUSEDRNN_ISA", "FUSEDRNN_VECTOR_BYTES", "FUSEDRNN_VECTOR_REGISTERS"}
    return found


def define_flags(isa, ours=False):
    macros = defines(isa) | ({"ENGINE": defines(isa)["FUSEDRNN_ISA"]} if ours else {})
    return " ".join(f"-D{name}={value}" for name, value in macros.items() if not (ours and name == "FUSEDRNN_ISA"))


@pytest.fixture(scope="module")
def workshop(request, tmp_path_factory):
    shop = EngineWorkshop(request, tmp_path_factory, "cpp", "cpu", [CPP])
    # In the order of the tests, what takes long first.
    shop.compile("cells_test", "cells_test.cpp", UNDEFINED)
    for isa in ISAS:
        shop.compile(f"vec_{isa}", "vec_test.cpp", f"-O3 {setup.MATH} {define_flags(isa)} {machine_flags(isa)}")
        shop.compile(f"vec_{isa}_address", "vec_test.cpp", f"{UNDEFINED} {setup.MATH} {define_flags(isa)} {machine_flags(isa)}")
    for name, (file, pattern, replacement) in VEC_PLANTS.items():
        edit(shop.copy(f"plant_{name}") / "cpu" / file, pattern, replacement)
        shop.compile(f"vec_plant_{name}", "vec_test.cpp", f"-O1 {setup.MATH} {define_flags('baseline')}", f"plant_{name}")
    shop.compile("engine_test", "engine_test.cpp", "-O2")
    shop.compile("threads", "threads.cpp", "-O2")
    shop.compile("capability", "cpu/capability.cpp", "-O2")
    for isa in ISAS:
        shop.compile(f"probe_{isa}", "engine_probe.cpp", f"-fopenmp {define_flags(isa, ours=True)}")
        if native(isa):
            shop.take(f"engine_{isa}", f"cpu/engine_{isa}.cpp", f"-O3 {setup.MATH} {setup.ISA_FLAGS[isa]}")
        else:
            keep_dtypes(shop.copy(f"emulated_{isa}"), EMULATED_DTYPES)
            shop.compile(f"engine_{isa}", f"cpu/engine_{isa}.cpp", f"-O1 {setup.MATH} {machine_flags(isa)}", f"emulated_{isa}")
    for isa in ISAS:
        keep_dtypes(shop.copy(f"address_{isa}"), ADDRESS_DTYPES[isa])
        shop.compile(f"engine_{isa}_address", f"cpu/engine_{isa}.cpp", f"{ADDRESS} {setup.MATH} {machine_flags(isa)}",
                     f"address_{isa}")
    tree = shop.copy("thread")
    keep_dtypes(tree, THREAD_DTYPES)
    shop.barriers = loosen_barriers(tree)
    shop.compile("probe_thread", "engine_probe.cpp", f"-fopenmp {define_flags('baseline', ours=True)}", "thread")
    shop.compile("engine_thread", "cpu/engine_baseline.cpp", f"{THREAD} {setup.MATH}", "thread")
    yield shop
    shop.close()


def keep_dtypes(tree, dtypes):
    """Leaves only some formats in a copy of the engine."""
    for name in set(DTYPES) - set(dtypes):
        edit(tree / "cpu" / "engine.inl", rf"\n *case Dtype::{DTYPES[name]}:\n *return [^\n]*", "")


def loosen_barriers(tree):
    """Lets a test leave out each of the engine's barriers, numbered from 0, and its memory orders; returns how many barriers
    there are. Work is divided finely, so that small shapes, quick enough for ThreadSanitizer, have teams of many threads."""
    cpu, number = tree / "cpu", iter(range(100))
    for file in ("forward.h", "backward.h"):
        edit(cpu / file, r"\b(\w+\.wait\(\w+\));", lambda found: f"if (fusedrnn_test_barrier({next(number)})) {found[1]};")
    for call, order, one in (("__atomic_store_n", "RELEASE", RELEASE), ("__atomic_load_n", "ACQUIRE", ACQUIRE)):
        edit(cpu / "team.h", rf"({call}\([^;]*), __ATOMIC_{order}\)",
             rf"(fusedrnn_test_barrier({one}) ? \1, __ATOMIC_{order}) : \1, __ATOMIC_RELAXED))")
    for constant, value in (("kMemberFlops", 1), ("kSliceRows", 8)):
        edit(cpu / "team.h", rf"(constexpr int64_t {constant} = )\d+;", rf"\g<1>{value};")
    edit(cpu / "team.h", r"(#pragma once\n)", '\\1extern "C" bool fusedrnn_test_barrier(int barrier);\n')
    return next(number)


# Mistakes in csrc/cpu/vec.h that vec_test must find.
VEC_PLANTS = {
    "tail": ("vec.h", r"i < n; \+\+i\) p\[i\] = part", "i <= n && i < Vec<F>::kLanes; ++i) p[i] = part"),
    "rounding": ("vec.h", r"bits \+ 0x7fffu", "bits + 0x8000u"),
    "logarithm": ("vec.h", r"kLn2Low = -2\.12194440e-4f", "kLn2Low = -2.1220e-4f"),
    "range": ("vec.h", r"kTanhRange = 10\.0f", "kTanhRange = 8.0f"),
}


def test_cells(workshop):
    program = workshop.link("cells_test", ["cells_test"], UNDEFINED)
    print(run_sanitized(program))
    wrong = 0
    while "failures" in run(f"{program} --plant {wrong}; test $? -eq 1 || echo none left", 0).splitlines()[-1]:
        wrong += 1
    assert wrong >= 15, "each derivative of each cell, made wrong, must be found so"


@pytest.mark.parametrize("isa", ISAS)
def test_vec(workshop, isa):
    print(run(workshop.link(f"vec_{isa}", [f"vec_{isa}"])))


@pytest.mark.parametrize("isa", ISAS)
def test_vec_with_address_sanitizer(workshop, isa):
    print(run_sanitized(f"{workshop.link(f'vec_{isa}_address', [f'vec_{isa}_address'], UNDEFINED)} 20000"))


@pytest.mark.parametrize("plant", VEC_PLANTS)
def test_vec_finds(workshop, plant):
    program = workshop.link(f"vec_plant_{plant}", [f"vec_plant_{plant}"])
    assert re.search("[1-9][0-9]* failures|crashed in", run(f"{program} 20000; test $? -ne 0"))


def link_engine(workshop, isa):
    return workshop.link(f"engine_test_{isa}", ["engine_test", "threads", "capability", f"probe_{isa}", f"engine_{isa}"])


@pytest.mark.parametrize("isa", ISAS)
def test_engine(workshop, isa):
    dtypes = DTYPES if native(isa) else EMULATED_DTYPES
    print(run(f"{link_engine(workshop, isa)} --every 2 --lot {ISAS.index(isa)} --dtypes {','.join(dtypes)}"))


@pytest.mark.parametrize("result", ["output", "hy", "cy", "saved", "states", "grad_pre", "grad_hx", "grad_cx", "grad_proj",
                                    "grad_weight_ih", "grad_weight_hh", "grad_bias_ih", "grad_bias_hh", "grad_weight_hr",
                                    "grad_reset_hx", "grad_reset_cx"])
def test_engine_test_finds(workshop, result):
    out = run(f"{link_engine(workshop, 'baseline')} --every 40 --spoil {result}", expect=1)
    assert f": {result}[" in out


@pytest.mark.parametrize("isa", ISAS)
def test_engine_with_address_sanitizer(workshop, isa):
    program = workshop.link(f"engine_test_{isa}_address", ["engine_test", "threads", "capability", f"probe_{isa}",
                                                           f"engine_{isa}_address"], ADDRESS)
    print(run_sanitized(f"{program} --every 2 --dtypes {','.join(ADDRESS_DTYPES[isa])} --lot {ISAS.index(isa)}"))


def link_with_threads(workshop):
    objects = ["engine_test", "threads", "capability", "probe_thread", "engine_thread"]
    return f"{workshop.link('engine_test_thread', objects, THREAD)} --dtypes {','.join(THREAD_DTYPES)} --delays"


def test_engine_with_thread_sanitizer(workshop):
    out = run_sanitized(f"{link_with_threads(workshop)} --most-macs 300000")
    print(out)
    assert int(re.search(r"(\d+) waits", out)[1]) > 1000


def test_thread_sanitizer_finds_every_missing_barrier(workshop):
    program = link_with_threads(workshop)
    assert workshop.barriers >= 4
    for barrier in [*range(workshop.barriers), RELEASE, ACQUIRE]:
        out = run_sanitized(f"{program} --most-macs 100000 --skip-barrier {barrier}", expect=66)
        assert "data race" in out, f"barrier {barrier}"
