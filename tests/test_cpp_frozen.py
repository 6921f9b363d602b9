"""Inference on packed weights below its operator, as tests/test_cpp.py has it for the engine: built as in the library, under
AddressSanitizer and UBSan, and under ThreadSanitizer, which must find every barrier that is left out."""

import re

import pytest
from test_cpp import ADDRESS, CPP, isas_of, machine_flags, native
from workshop import THREAD, EngineWorkshop, edit, run, run_sanitized, setup

TEST, THREADS = "frozen_test.cpp", "threads.cpp"
ISAS = isas_of("frozen")


@pytest.fixture(scope="module")
def workshop(request, tmp_path_factory):
    shop = EngineWorkshop(request, tmp_path_factory, "cpp_frozen", "cpu", [CPP])
    shop.compile("threads", THREADS, "-O2")
    for isa in ISAS:
        source, level = f"cpu/frozen_{isa}.cpp", "-O3" if native(isa) else "-O1"
        rounds = "-DPAIRS_OF_BFLOAT16" if "bf16" in machine_flags(isa) else ""
        shop.compile(f"test_{isa}", TEST, f"-O2 -DENGINE={isa} {rounds}")
        shop.compile(f"frozen_{isa}", source, f"{level} {setup.MATH} {machine_flags(isa)}")
    shop.compile("frozen_address", "cpu/frozen_baseline.cpp", f"{ADDRESS} {setup.MATH} {machine_flags('baseline')}")
    tree, number = shop.copy("thread"), iter(range(100))
    edit(tree / "cpu" / "frozen.h", r"((?:barrier|Barrier\{[^}]*\})\.wait\(\w+\));",
         lambda found: f"if (fusedrnn_test_barrier({next(number)})) {found[1]};")
    edit(tree / "cpu" / "frozen.h", r"kCallBytes = [^,]*, kStepBytes = [^;]*;", "kCallBytes = 1, kStepBytes = 1;")
    edit(tree / "cpu" / "team.h", r"(#pragma once\n)", '\\1extern "C" bool fusedrnn_test_barrier(int barrier);\n')
    shop.barriers = next(number)
    shop.compile("frozen_thread", "cpu/frozen_baseline.cpp", f"{THREAD} {setup.MATH}", "thread")
    yield shop
    shop.close()


@pytest.mark.parametrize("isa", ISAS)
def test_frozen(workshop, isa):
    print(run(workshop.link(f"frozen_test_{isa}", [f"test_{isa}", "threads", f"frozen_{isa}"])))


def test_it_finds_a_wrong_number(workshop):
    program = workshop.link("frozen_test_spoiled", ["test_baseline", "threads", "frozen_baseline"])
    assert ": output[" in run(f"{program} --cases 3 --spoil", expect=1)


def test_frozen_with_address_sanitizer(workshop):
    program = workshop.link("frozen_test_address", ["test_baseline", "threads", "frozen_address"], ADDRESS)
    print(run_sanitized(f"{program} --cases 25"))


def test_frozen_with_thread_sanitizer(workshop):
    program = workshop.link("frozen_test_thread", ["test_baseline", "threads", "frozen_thread"], THREAD)
    out = run_sanitized(f"{program} --cases 12 --delays")
    assert int(re.search(r"(\d+) cases of several threads", out)[1]) > 40
    assert workshop.barriers == 3
    for barrier in range(workshop.barriers):
        assert "data race" in run_sanitized(f"{program} --cases 12 --delays --skip-barrier {barrier}", expect=66)
