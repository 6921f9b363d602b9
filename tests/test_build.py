"""What is built, with which flags, what goes into an sdist and a wheel, and what a broken installation says."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile
from pathlib import Path

import ninja
import pytest
import torch

import fusedrnn
from fusedrnn import _C, info

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fusedrnn.__file__).resolve().parent
OBJECTS = ROOT / "build" / sysconfig.get_config_var("SOABI") / "_ops/csrc"
ISAS = ("baseline", "avx2", "avx512", "avx512dots")
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru", "lstm_general", "lstm_coupled", "gru_general", "indrnn", "slstm", "lstm_norm", "gru_norm",
         "gru_reset_before"]  # fmt: skip


@pytest.fixture(scope="module")
def setup_py():
    """setup.py as a module; it calls setup() only when it is run."""
    spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources and of what was built from them, with its time stamps: ninja finds nothing to do there."""
    copy = tmp_path_factory.mktemp("checkout") / "fusedrnn"
    unwanted = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", "dist", "lib*")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


def refusal(call, *args):
    """What setup.py says as it stops."""
    with pytest.raises(SystemExit) as raised:
        call(*args)
    return str(raised.value)


# ---- setup.py


@pytest.mark.parametrize(("archs", "flags"), [
    ("8.0", ["arch=compute_80,code=sm_80"]),
    ("8.0;9.0+PTX", ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]),
    ("8.6, 9.0a 12.0", ["arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a", "arch=compute_120,code=sm_120"]),
    ("8.0;", ["arch=compute_80,code=sm_80"]),
])  # fmt: skip
def test_arch_list(setup_py, archs, flags):
    assert setup_py.gencode(archs).split() == ["-gencode=" + flag for flag in flags]


@pytest.mark.parametrize("archs", ["Hopper", "80", "8.0+ptx", "8.x"])
def test_arch_list_refused(setup_py, archs):
    assert f"8.0, 9.0a or 9.0+PTX, got '{archs}'" in refusal(setup_py.gencode, archs)


@pytest.mark.parametrize(("wanted", "torch_cuda", "nvcc", "why_not"), [
    ("", "13.0", "/bin/nvcc", ""),
    ("1", None, "/bin/nvcc", ""),
    ("", None, "/bin/nvcc", "this torch has no CUDA"),
    ("", "13.0", None, "nvcc was not found"),
    ("0", "13.0", "/bin/nvcc", "FUSEDRNN_CUDA=0"),
])  # fmt: skip
def test_whether_cuda_is_built(setup_py, wanted, torch_cuda, nvcc, why_not):
    env = {"FUSEDRNN_CUDA": wanted} if wanted else {}
    assert setup_py.cuda_why_not(env, torch_cuda, nvcc) == why_not


def test_cuda_asked_for_without_nvcc(setup_py):
    message = refusal(setup_py.cuda_why_not, {"FUSEDRNN_CUDA": "1"}, "13.0", None)
    assert "FUSEDRNN_CUDA=1 needs nvcc" in message and "FUSEDRNN_CUDA=0" in message
    assert "must be 0, 1 or unset, got 'yes'" in refusal(
        setup_py.cuda_why_not, {"FUSEDRNN_CUDA": "yes"}, None, None)  # fmt: skip


def test_only_x86_gets_x86_engines(setup_py):
    assert {setup_py.isa_of(source) for source in setup_py.sources("x86_64")[0]} == set(ISAS)
    assert {setup_py.isa_of(source) for source in setup_py.sources("aarch64")[0]} == {"baseline"}


def test_building_needs_torch(setup_py, monkeypatch):
    for version in (None, "2.9.1+cpu", "1.13.0"):
        found = [types.SimpleNamespace(version=version)] if version else []
        monkeypatch.setattr(setup_py.metadata, "distributions", lambda name: iter(found))
        message = refusal(setup_py.NinjaBuild.build_extensions, None)
        assert message == f"fusedrnn: building needs torch 2.10 or newer, found {version or 'none'}"


@pytest.mark.parametrize("cxx", ["no-such-compiler", "true"])
def test_building_needs_gcc(setup_py, cxx):
    assert refusal(setup_py.compiler_name, cxx).startswith(f"fusedrnn: needs g++ 11 or newer, and '{cxx}' is ")


def test_no_flag_of_one_machine():
    text = (ROOT / "setup.py").read_text()
    assert len(text.splitlines()) < 150
    assert not re.search(r"march=native|-std=|-ffast-math[^:]|\bgit\b|urllib|requests", text)


# ---- what was built


def test_record():
    record = _C.build_record()
    assert record["version"] == fusedrnn.__version__
    assert set(_C.cpu_isas()) <= set(record["isas"]) <= set(ISAS)
    assert record["cuda"] == (record["cuda_why_not"] == "")
    assert "TORCH_TARGET_VERSION=0x020a000000000000" in record["flags"]


def test_info():
    facts = info.facts()
    assert facts["instruction set"] == _C.cpu_isa() and facts["cells"] == ", ".join(CELLS)
    assert facts["built CUDA"] == (_C.build_record()["cuda_archs"] or f"no: {_C.build_record()['cuda_why_not']}")


def test_instruction_set_is_forced(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_CPU_ISA", raising=False)
    assert _C.cpu_isa() == _C.cpu_isas()[-1]
    for isa in _C.cpu_isas():
        monkeypatch.setenv("FUSEDRNN_CPU_ISA", isa)
        assert _C.cpu_isa() == isa
        assert info.facts()["instruction set"] == f"{isa} (FUSEDRNN_CPU_ISA)"
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="FUSEDRNN_CPU_ISA must be one of baseline.*got 'sse9'"):
        _C.cpu_isa()
    assert info.facts()["instruction set"].startswith("none: ")


def test_traits_of_the_cells():
    traits = _C.cell_traits()
    assert list(traits) == CELLS
    assert traits["gru"] == {"gates": 3, "pre": 4, "states": 1, "saved": 4, "unit": 0, "norms": 0, "late": 0, "chooses": False,
                             "multiplies": True, "x_pre": [0, 1, 2], "h_pre": [0, 1, 3]}  # fmt: skip
    assert [cell for cell in CELLS if traits[cell]["norms"] or traits[cell]["late"]] == ["lstm_norm", "gru_norm", "gru_reset_before"]
    for cell in traits.values():
        assert len(cell["x_pre"]) == len(cell["h_pre"]) == cell["gates"]


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True, **options).stdout


@pytest.mark.parametrize("kind", ["engine", "frozen"])
@pytest.mark.parametrize("isa", ISAS)
def test_each_engine_keeps_to_its_namespace(isa, kind):
    """A function that two engines both define would be one of the two after the link: AVX-512 code on any processor."""
    engine = OBJECTS / f"cpu/{kind}_{isa}.cpp.o"
    if not engine.exists():
        pytest.skip("not built in this checkout, or not for this processor")
    for line in run("nm", "-C", "--defined-only", engine).splitlines():
        _, kind, name = line.split(" ", 2)
        # A small letter is a local symbol; V is data without code, such as the reference to the exception personality.
        assert kind in "abdnrtsV" or f"fusedrnn::{isa}::" in name, line


def test_code_outside_the_wide_engines_is_baseline():
    objects = [path for path in OBJECTS.rglob("*.o") if "avx" not in path.name]
    if not objects or os.uname().machine != "x86_64":
        pytest.skip("not built in this checkout, or not for this processor")
    for path in objects:
        assert not re.search(r"%[yz]mm", run("objdump", "-d", path)), path


def test_libraries_name_no_folder_and_no_second_openmp():
    for library, wants_torch in ((PACKAGE / "_ops.so", True), (Path(_C.__file__), False)):
        dynamic = run("readelf", "-d", library)
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        assert ("libtorch_cpu.so" in dynamic) == wants_torch
        assert "libpython" not in dynamic and "omp" not in dynamic
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert sum("torch/lib" in path for path in loaded) == 1, loaded


# ---- sdist and wheel


def test_sdist_holds_all_sources(checkout, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        packed = {name.partition("/")[2] for name in content.getnames()}
    folders = ("csrc", "fusedrnn", "tests", "examples", "benchmarks", "docs")
    sources = [path for folder in folders for path in (checkout / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(checkout)) for path in sources if path.suffix not in (".so", ".o")}
    wanted |= {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "requirements.txt", "requirements-torch.txt"}
    wanted |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert not wanted - packed
    assert not [name for name in packed if name.endswith((".so", ".o")) or name.startswith("build/")]


def test_wheel(checkout, tmp_path):
    plan = checkout / OBJECTS.relative_to(ROOT).parents[1] / "build.ninja"
    if not plan.exists() or "no work to do" not in run(f"{ninja.BIN_DIR}/ninja", "-n", "-f", plan, cwd=checkout):
        pytest.skip("not built in this checkout, or sources have changed since: minutes of compiling (make build)")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, checkout)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(tmp_path / "site")
    assert {"fusedrnn/_ops.so", "fusedrnn/_C.pyi", "fusedrnn/py.typed"} <= set(names)
    assert f"fusedrnn/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {name.split("/")[0] for name in names} == {"fusedrnn", f"fusedrnn-{fusedrnn.__version__}.dist-info"}
    code = "import fusedrnn, torch; print(fusedrnn.__file__, fusedrnn.LSTM(3, 5)(torch.zeros(7, 2, 3))[0].shape)"
    site = tmp_path / "site"
    answer = run(sys.executable, "-c", code, cwd=site, env={**os.environ, "PYTHONPATH": str(site)})
    assert str(tmp_path) in answer and "[7, 2, 5]" in answer


# ---- a broken installation


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """(folder, load): a copy of what loads the libraries, and a call that returns what its ImportError says."""
    folder = tmp_path / "broken_fusedrnn"
    folder.mkdir()
    for name in ("_load.py", "_version.py", "_ops.so", Path(_C.__file__).name):
        shutil.copy2(PACKAGE / name, folder)
    monkeypatch.syspath_prepend(tmp_path)
    package = types.ModuleType("broken_fusedrnn")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "broken_fusedrnn", package)

    def load():
        with pytest.raises(ImportError) as raised:
            importlib.import_module("broken_fusedrnn._load").load()
        message = str(raised.value)
        assert message.startswith("fusedrnn ") and " found " in message and "needs" in message and "\n" not in message
        return message

    yield folder, load
    for name in [name for name in sys.modules if name.startswith("broken_fusedrnn.")]:
        del sys.modules[name]


BUILD_IT = "pip install --no-build-isolation -v ."


def test_without_libraries(broken):
    folder, load = broken
    (folder / Path(_C.__file__).name).unlink()
    message = load()
    assert f"found no built library in {folder}" in message and BUILD_IT in message


def test_library_of_another_python(broken):
    folder, load = broken
    (folder / Path(_C.__file__).name).rename(folder / "_C.cpython-39-x86_64-linux-gnu.so")
    message = load()
    assert "built for cpython-39-x86_64-linux-gnu" in message and sysconfig.get_config_var("SOABI") in message
    assert BUILD_IT in message


def test_module_that_is_no_library(broken):
    folder, load = broken
    (folder / Path(_C.__file__).name).unlink()
    (folder / Path(_C.__file__).name).write_text("not a library")
    assert "which does not load" in load()


def test_library_of_another_version(broken):
    folder, load = broken
    (folder / "_version.py").write_text('__version__ = "99.0"\n')
    message = load()
    assert f"found libraries of version {fusedrnn.__version__}" in message and "99.0" in message and BUILD_IT in message


def test_without_operators(broken):
    folder, load = broken
    (folder / "_ops.so").unlink()
    assert "found no _ops.so" in load()


def test_operators_with_a_missing_symbol(broken, tmp_path):
    folder, load = broken
    (tmp_path / "missing.cpp").write_text("int gone_from_torch(); int call() { return gone_from_torch(); }")
    (folder / "_ops.so").unlink()
    run(os.environ.get("CXX", "g++"), "-shared", "-fPIC", tmp_path / "missing.cpp", "-o", folder / "_ops.so")
    message = load()
    assert "undefined symbol" in message and "gone_from_torch" in message and BUILD_IT in message


def test_without_torch(broken, monkeypatch):
    _, load = broken
    with monkeypatch.context() as patch:  # ends before the fixtures do, which use torch
        patch.setitem(sys.modules, "torch", None)
        message = load()
    assert "found no torch" in message and "torch 2.10 or newer" in message and "-m pip install" in message


def test_old_torch(broken, monkeypatch):
    _, load = broken
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.9.1+cpu")
        message = load()
    assert "found torch 2.9.1+cpu" in message and "-m pip install" in message


def test_import_says_it_once(tmp_path):
    """What a person sees at `import fusedrnn` from a checkout that was never built: the message is the last line."""
    shutil.copytree(PACKAGE, tmp_path / "fusedrnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = subprocess.run([sys.executable, "-c", "import fusedrnn"], cwd=tmp_path, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fusedrnn ") and "found no built library" in last and BUILD_IT in last
