"""What every test shares: devices, instruction sets, seeds, and the promise that the fused engine is what is tested."""

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import select

DEVICES = ["cpu"]
ISAS = fusedrnn._C.cpu_isas()  # what this processor and this build have
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


def pytest_configure(config):
    # A call that falls back to torch.nn would be compared with itself and prove nothing.
    config.addinivalue_line("filterwarnings", "error:.*not on the fused engine.*")
    # torch says once a process that oneDNN has no projections; it is of no concern here.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def pytest_report_header(config):
    return f"fusedrnn: every test of the engine runs under {', '.join(ISAS)}"


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs the test under each instruction set; the engine reads the variable at every call."""
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", request.param)
    return request.param


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
