"""The library with CUDA in it, built here by nvcc where there is no GPU: it loads on any torch, and its kernels keep to a budget.

What a kernel needs of a multiprocessor decides how many of its blocks run at once. tests/cuda_budget.json says what each may need;
`python tests/test_cuda_build.py` writes it anew from the last build, for a change that is meant.
"""

import json
import re
import subprocess
import sys

import pytest
from workshop import ROOT

BUDGET = ROOT / "tests" / "cuda_budget.json"
ARCHS = ["sm_80", "sm_90"]
REGISTERS = 65536  # of a multiprocessor
SHORT = {
    r"MatrixArithmetic<float, float>": "Tf32", r"MatrixArithmetic<__nv_bfloat16, __nv_bfloat16>": "BFloat16",
    r"MatrixArithmetic<__half, __half>": "Float16", r"FmaArithmetic<float>": "Float32", r"FmaArithmetic<double>": "Float64",
}  # fmt: skip


def needs(folder):
    """{kernel: {arch: registers a thread}} of the build in a folder, from ptxas's reports."""
    found = {}
    for report in sorted(folder.glob("build/*/_ops/csrc/cuda/*.cu.o.txt")):
        text = subprocess.run(["c++filt"], input=report.read_text(), text=True, capture_output=True, check=True).stdout
        for name, arch, used in re.findall(r"Compiling entry function '(.*?)' for '(\w+)'\n(?:.*\n){2,3}?ptxas info\s+: Used (.*)", text):
            assert "smem" not in used, f"{name}: shared memory is given at the launch, as planned (test_cuda_plan.py)"
            name = re.sub(r"^void |\(.*\)$|fusedrnn::|\((?:int|long)\)", "", name)
            for pattern, short in SHORT.items():
                name = name.replace(pattern, short)
            found.setdefault(name.replace(" >", ">"), {})[arch] = int(re.match(r"(\d+) registers", used)[1])
    return found


@pytest.fixture(scope="module")
def built(cuda_library):
    """(folder, what the build printed)."""
    return cuda_library.folder, cuda_library.result()


def test_build_says_what_it_builds(built):
    assert re.search(r"^fusedrnn .*: CPU .*; CUDA 8\.0;9\.0\+PTX; ", built[1], re.M)
    (ninja,) = built[0].glob("build/*/build.ninja")
    assert {"code=sm_80", "code=sm_90", "code=compute_90"} <= set(re.findall(r"code=\w+", ninja.read_text()))


def test_library_loads_where_there_is_no_gpu(built):
    """The operators of CUDA are registered, and those of the CPU run, whether or not this torch has CUDA."""
    script = """if True:
        import torch, fusedrnn
        assert fusedrnn._C.build_record()["cuda"]
        for name in ("recurrence_forward", "recurrence_backward"):
            for key in ("CPU", "CUDA"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedrnn::{name}", key)
        output, _ = fusedrnn.LSTM(3, 5)(torch.randn(4, 2, 3))
        output.sum().backward()
        print("ran", fusedrnn.__file__)
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=built[0], text=True, capture_output=True)
    assert done.returncode == 0 and f"ran {built[0]}" in done.stdout, done.stderr


def test_kernels_keep_to_their_budget(built):
    found, budget = needs(built[0]), json.loads(BUDGET.read_text())
    assert set(found) == set(budget), "kernels came or went: see this file's head"
    over = {name: (found[name], budget[name]) for name in found if any(found[name][a] > budget[name][a] for a in ARCHS)}
    assert not over
    assert all(set(registers) == set(ARCHS) for registers in found.values())


def test_every_block_fits_a_multiprocessor():
    for name, registers in json.loads(BUDGET.read_text()).items():
        assert max(registers.values()) * 256 <= REGISTERS, name  # the most threads of a block, as its launch bounds say


if __name__ == "__main__":
    (last,) = ROOT.glob(".pytest_cache/d/fusedrnn_cuda_build")
    rows = (f'  {json.dumps(name)}: {json.dumps(registers)}' for name, registers in sorted(needs(last).items()))
    BUDGET.write_text("{\n" + ",\n".join(rows) + "\n}\n")
