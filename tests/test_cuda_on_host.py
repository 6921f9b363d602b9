"""The emulator that runs CUDA kernels on the CPU (tests/cuda_on_host): its self-test, plain and under sanitizers.

Kernels that are right must pass in every order of threads. Each mistake that can be planted into them must be found, by the
mode and in the way that stands in the tables below.
"""

import re

import pytest
from workshop import ADDRESS, ROOT, THREAD, Workshop, cuda_headers, run, run_sanitized

HOSTED, CPP = ROOT / "tests" / "cuda_on_host", ROOT / "tests" / "cpp"
MODES = {
    "plain": "-O2",
    "ucontext": "-O1 -DCUDA_ON_HOST_UCONTEXT",  # the switch of fibers for processors other than x86-64
    "address": ADDRESS,
    "thread": THREAD,
}
IN_ORDER, REVERSE, RANDOM, SKEWED = range(4)
WRONG, ERROR, RACE = 1, 2, 66  # the exit status: of a result that is wrong, of an Error, of ThreadSanitizer

# Something is not waited for. Orders left to chance give wrong numbers; ThreadSanitizer sees it whatever the order.
UNORDERED = ["no_barrier_before", "no_barrier_after", "one_buffer", "no_syncwarp", "copies_not_waited", "copies_not_shared",
             "copies_too_early", "named_missing", "no_barrier_in_gemm", "no_grid_barrier", "no_barrier_before_arrival",
             "no_barrier_after_waiting", "exchange_one_buffer", "target_too_low", "read_before_wait", "write_before_wait",
             "trigger_too_early"]
# What happens to go well on this processor whatever the order of threads: only ThreadSanitizer can know.
UNORDERED_UNSEEN = ["relaxed_release", "relaxed_acquire", "no_fence"]
# Kernels that overlap with the one before, whose mistakes do not show where grids run one after another.
OVERLAPPING = ["read_before_wait", "write_before_wait", "trigger_too_early"]
# What the emulator reports, in any order.
ERRORS = {
    "skipped_barrier": r"sum_and_largest: __syncthreads at self_test_blocks.h:\d+: barrier divergence",
    "shared_overrun": r"sum_and_largest: a thread wrote behind an array of shared memory \[block",
    "shared_too_small": r"shared_take: 512 bytes of shared memory taken, 508 given at the launch",
    "shared_unequal": r"shared_take: this thread wants 51[26] bytes, others took 51[26]",
    "lanes_missing": r"warp_functions: __shfl\w*_sync at self_test_blocks.h:\d+: warp divergence: other lanes wait in __shfl",
    "stray_lane": r"__shfl_sync at self_test_blocks.h:\d+: warp divergence: a lane reads from a lane that is not in the mask",
    "copies_left": r"sum_tiles: a thread exits with cp.async copies that it has not waited for",
    "copy_misaligned": r"cp.async at self_test_blocks.h:\d+: shared address not .* \[block \(0,0,0\) thread \(7,0,0\)\]",
    "copy_outside": r"cp.async at self_test_blocks.h:\d+: destination not within an array of the block's shared memory",
    "named_wrong_count": r"make_and_square: bar.sync at .*barrier divergence|deadlock: 32 threads of block .* make_and_square",
    "row_misaligned": r"load_matrices: ldmatrix at self_test_matrix.h:\d+: row address .* thread \(9,0,0\)\]",
    "half_a_warp": r"load_matrices: .*warp divergence",
    "target_too_high": r"mix: spin_pause at self_test_grids.h:\d+: livelock",
    "not_cooperative": r"mix: spin_pause at self_test_grids.h:\d+: the launch is not cooperative",
    "no_wait": r"chain_step: a thread exits without grid_dependency_wait",
    "wait_in_one_thread": r"chain_step: a thread exits without grid_dependency_wait",
}
# Accesses past the end of an array, and a part of what AddressSanitizer says.
OVERRUNS = {"shared_overrun": "in self_test::sum_and_largest", "global_overrun": "in self_test::sum_tiles"}


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """The self-test in each mode: programs(mode) is the path."""
    headers = cuda_headers()
    if not headers:
        pytest.skip("the headers of the CUDA toolkit are not here (CUDA_HOME, nvcc on PATH, /usr/local/cuda)")
    shop = Workshop(request, tmp_path_factory, "cuda_on_host")
    inputs = sorted(HOSTED.iterdir()) + [CPP / "check.h"]
    for mode, flags in MODES.items():
        shop.compile(mode, HOSTED / "self_test.cpp", f"-std=c++20 {flags}", f"-I{HOSTED} -I{CPP} {headers}", inputs)
    made = {}

    def program(mode):
        if mode not in made:
            made[mode] = shop.link(f"self_test_{mode}", [mode], MODES[mode])
        return made[mode]

    yield program
    shop.close()


@pytest.mark.parametrize(("mode", "seeds"), [("plain", 10), ("ucontext", 2), ("address", 3), ("thread", 2)])
def test_right_kernels_pass(programs, mode, seeds):
    out = run_sanitized(f"{programs(mode)} --seeds {seeds}")
    assert int(re.search(r"(\d+) checks, 0 failures", out)[1]) > 50000


def test_plants_are_all_here(programs):
    plants = run(f"{programs('plain')} --list").split()
    assert sorted(plants) == sorted({*UNORDERED, *UNORDERED_UNSEEN, *ERRORS, *OVERRUNS})


@pytest.mark.parametrize("plant", UNORDERED)
def test_missing_synchronization_gives_wrong_results(programs, plant):
    for order in (RANDOM, SKEWED):
        assert re.search("[1-9][0-9]* failures", run(f"{programs('plain')} --plant {plant} --order {order}", expect=WRONG))


@pytest.mark.parametrize("plant", OVERLAPPING)
def test_dependent_grids_run_ahead(programs, plant):
    run(f"{programs('plain')} --plant {plant} --order {IN_ORDER}")
    assert "instead of" in run(f"{programs('plain')} --plant {plant} --order {REVERSE}", expect=WRONG)


@pytest.mark.parametrize("plant", UNORDERED + UNORDERED_UNSEEN)
def test_missing_synchronization_is_a_race(programs, plant):
    # In order, where most of these kernels compute the right numbers.
    assert "data race" in run_sanitized(f"{programs('thread')} --plant {plant} --order {IN_ORDER}", expect=RACE)


@pytest.mark.parametrize("plant", UNORDERED_UNSEEN)
def test_only_thread_sanitizer_sees(programs, plant):
    run(f"{programs('plain')} --plant {plant}")


@pytest.mark.parametrize("mode", ["plain", "ucontext"])
@pytest.mark.parametrize("plant", ERRORS)
def test_error(programs, mode, plant):
    for order in range(4):
        assert re.search(ERRORS[plant], run(f"{programs(mode)} --plant {plant} --order {order}", expect=ERROR))


@pytest.mark.parametrize("plant", OVERRUNS)
def test_overrun_is_found_by_address_sanitizer(programs, plant):
    out = run_sanitized(f"{programs('address')} --plant {plant}", expect=1)
    assert "heap-buffer-overflow" in out and OVERRUNS[plant] in out
