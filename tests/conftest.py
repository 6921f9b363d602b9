"""What every test shares: the engines, seeds, and the promise that the fused engine is what is tested."""

import contextlib
import shutil
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import select
from workshop import ROOT, CudaLibrary, Workshop, cuda_headers, setup

ISAS = fusedrnn._C.cpu_isas()  # what this processor and this build have
# Everything that runs the operators: the CPU's engine in each instruction set, the CUDA kernels compiled for the CPU if the
# toolkit's headers are here (torch.ops.fusedrnn_on_host), and the CUDA kernels on a GPU if there is one.
ON_HOST, ON_GPU = "cuda_on_host", "cuda"
HAS_GPU = fusedrnn._C.build_record()["cuda"] and torch.cuda.is_available()
ENGINES = ISAS + [ON_HOST] * bool(cuda_headers()) + [ON_GPU] * HAS_GPU
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


def pytest_configure(config):
    # A call that falls back to torch.nn would be compared with itself and prove nothing.
    config.addinivalue_line("filterwarnings", "error:.*not on the fused engine.*")
    config.addinivalue_line("filterwarnings", "ignore:Warning only once for all operators,  other operators may also be overridden")
    # torch says once a process that oneDNN has no projections; it is of no concern here.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")


CUDA_LIBRARY = pytest.StashKey[CudaLibrary]()


def pytest_collection_finish(session):
    wanted = any("cuda_library" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and shutil.which("nvcc"):
        cache = getattr(session.config, "cache", None)
        folder = cache.mkdir("fusedrnn_cuda_build") if cache else Path(tempfile.mkdtemp())
        session.config.stash[CUDA_LIBRARY] = CudaLibrary(folder)


def pytest_unconfigure(config):
    if CUDA_LIBRARY in config.stash:
        config.stash[CUDA_LIBRARY].close()


@pytest.fixture(scope="session")
def cuda_library(request):
    """What nvcc makes of the sources, of which it began to make it before the first test."""
    if CUDA_LIBRARY not in request.config.stash:
        pytest.skip("there is no nvcc on PATH")
    return request.config.stash[CUDA_LIBRARY]


def pytest_report_header(config):
    return f"fusedrnn: every test of the engine runs under {', '.join(ENGINES)}"


@pytest.fixture(scope="session")
def hosted_objects(request, tmp_path_factory):
    """A workshop that compiles the CUDA kernels for the CPU, an object for each cell, and "ops", the operators that run them."""
    shop = Workshop(request, tmp_path_factory, "kernels_on_host")
    hosted, csrc, torch_folder = ROOT / "tests" / "cuda_on_host", ROOT / "csrc", Path(torch.__file__).parent
    includes = f"-I{hosted} -I{csrc} -isystem {torch_folder}/include {cuda_headers()}"
    flags = f"-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -DFUSEDRNN_ON_HOST {setup.STABLE_ABI} -x c++"
    inputs = sorted(path for folder in (hosted, csrc) for path in folder.rglob("*.*"))
    for source in [*sorted((csrc / "cuda").glob("*.cu")), hosted / "ops.cpp"]:
        shop.compile(source.stem, source, flags, includes, inputs)
    yield shop
    shop.close()


@pytest.fixture(scope="session")
def hosted_kernels(hosted_objects):
    """torch.ops.fusedrnn_on_host, built."""
    library = hosted_objects.link("on_host.so", list(hosted_objects.futures),
                                  f"-shared -Wl,--no-as-needed -L{Path(torch.__file__).parent}/lib -ltorch_cpu -lc10")
    torch.ops.load_library(library)
    return torch.ops.fusedrnn_on_host


@pytest.fixture
def nothing_compiled():
    """torch.compile without what it remembers of other tests, whose recompilations it counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs the test under each instruction set of the CPU; the engine reads the variable at every call."""
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", request.param)
    return request.param


@contextlib.contextmanager
def fp32_precision(setting, value):
    """A setting such as torch.backends.cudnn.rnn says "ieee" or "tf32" for a while."""
    before, setting.fp32_precision = setting.fp32_precision, value
    try:
        yield
    finally:
        setting.fp32_precision = before


def host(hosted, monkeypatch, *operators):
    """Sends these operators' tensors on the CPU to the hosted kernels, and gives them nothing that only the CPU's engine can do. Returns what
    is to be destroyed for the end of it."""
    override = torch.library.Library("fusedrnn", "IMPL")
    for name in operators:
        override.impl(name, getattr(hosted, name).default, "CPU", allow_override=True)
    monkeypatch.setattr("fusedrnn.layer.SKIPS_PADDING", ())
    monkeypatch.setattr("fusedrnn.layer.OVERWRITING", ())
    for module in ("layer", "autograd"):
        monkeypatch.setattr(f"fusedrnn.{module}.is_for_one_step", lambda *given: False)
    monkeypatch.setattr("fusedrnn.layer.FED_LEAST", 1 << 60)  # these kernels are given gates, in every format
    return override


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Runs the test on each engine. The order of the threads of hosted kernels and their chip differ from test to test."""
    if request.param == ON_GPU:
        with fp32_precision(torch.backends.cudnn.rnn, "ieee"):  # TF32 is tests/test_cuda.py's
            torch.set_default_device("cuda")
            yield request.param
            torch.set_default_device(None)
    elif request.param == ON_HOST:
        hosted = request.getfixturevalue("hosted_kernels")
        lot = zlib.crc32(request.node.nodeid.encode())
        hosted.configure(lot % 4, lot, (1, 4, 31)[lot // 4 % 3], (8, 9)[lot // 12 % 2], lot % 5 == 4, lot % 5 in (2, 4), lot % 5 > 0)
        override = host(hosted, monkeypatch, "recurrence_forward", "recurrence_backward")
        yield request.param
        override._destroy()
    else:
        monkeypatch.setenv("FUSEDRNN_CPU_ISA", request.param)
        yield request.param


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """Same seed for every test; thread count, default dtype and the record of warnings as they were.

    One thread, unless a test asks for more: the shapes are small, and torch.nn on two threads of a busy machine takes
    twenty times as long. test_threads.py, test_fuzz.py and parts of test_ops.py ask for more.
    """
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    monkeypatch.setattr(select, "_warned", set())
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def kind_of(cell: str) -> str:
    """ "rnn_relu" -> "RNN"."""
    return cell.split("_")[0].upper()


def make_pair(cell: str, *sizes, **options):
    """(ours, stock) layers of `cell` with the same weights."""
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.split("_")[1]
    stock = getattr(nn, kind_of(cell))(*sizes, **options)
    ours = getattr(fusedrnn, kind_of(cell))(*sizes, **options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def states_for(module, B, dtype=None, **options):
    """A random hx for `module`, as it takes it."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    dtype = dtype or module.weight_ih_l0.dtype
    h = torch.randn(rows, B, module.proj_size or module.hidden_size, dtype=dtype, **options)
    if module.mode != "LSTM":
        return h
    return h, torch.randn(rows, B, module.hidden_size, dtype=dtype, **options)


def compare_all_equal(one, other):
    """The same tensors by the same names, bit for bit, absent ones included."""
    assert list(one) == list(other)
    for name in one:
        assert (one[name] is None) == (other[name] is None), name
        assert one[name] is None or torch.equal(one[name], other[name]), name
