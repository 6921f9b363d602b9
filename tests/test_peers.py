"""The peers that fusedrnn is measured beside: what they refuse, and that their modules compute what torch.nn computes.

FlashRNN and Haste are not needed: where they are not installed, stand-ins with their documented layouts take their place.
These check the adapters' order of gates and biases; only a GPU shows what the libraries' kernels compute.
"""

import dataclasses
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import gate, peers, providers, shapes
from benchmarks.workload import Workload

TINY = shapes.Shape(4, 3, 5, 8, why=".", source="-")


def case_of(cell="lstm", mode="inference", dtype="float32", device="cpu", **shape):
    return shapes.Case(dataclasses.replace(TINY, **shape), cell, mode, dtype, device)


def judged(case, provider) -> Workload:
    """The case's workload on a peer, once its numbers have passed the gate."""
    workload = Workload(case, provider)
    verdict = gate.judge(workload, Workload(case, providers.TorchProvider()))
    assert verdict.passed, verdict.worst
    return workload


# ---------------------------------------------------------------------------------------------------------------------
# What all share
# ---------------------------------------------------------------------------------------------------------------------


def test_the_file_imports_no_peer():
    code = "import sys, benchmarks.peers; print([name for name in ('flashrnn', 'haste_pytorch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("cell", shapes.CELLS)
@pytest.mark.parametrize("mode", shapes.USUAL_MODES)
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
def test_modules_have_the_parameters_of_torch(cell, mode, layers, bidirectional):
    case = case_of(cell, mode, layers=layers, bidirectional=bidirectional)
    stock = providers.TorchProvider().module(case, torch.float32)
    module = peers.TorchCompile().module(case, torch.float64)
    assert [*module.state_dict()] == [*stock.state_dict()]
    assert all(weight.dtype == torch.float64 for weight in module.parameters())
    module.load_state_dict(stock.state_dict())
    assert module.training == (mode == "training")


@pytest.mark.parametrize("name, peer", peers.PEERS.items())
def test_every_peer_has_its_name_and_takes_no_packed_sequence(name, peer):
    assert peer().name == name
    assert peer().refuses(case_of(packed=True, device="cuda")) == f"{name} takes no PackedSequence"


@pytest.mark.parametrize("peer", [peers.FlashRNN, peers.Haste])
def test_a_library_refuses_what_it_has_not_got(peer, monkeypatch):
    monkeypatch.setattr(peers, "import_failure", lambda name: None)
    monkeypatch.setattr(peers, "has_nvcc", lambda: True)
    refuses, name = peer().refuses, peer.name
    assert refuses(case_of(dtype="tf32", device="cuda")) is None
    assert refuses(case_of(device="cpu")) == f"{name} needs CUDA"
    assert refuses(case_of(dtype="tf32", device="cuda", layers=2)) == f"{name} has one layer a call, not 2"
    assert refuses(case_of(dtype="tf32", device="cuda", bidirectional=True)) == f"{name} has one direction"
    unknown = {"flashrnn": "float64", "haste": "bfloat16"}[name]
    assert refuses(case_of(device="cuda", dtype=unknown)) == f"{name} has no kernel for {unknown}"
    exact = refuses(case_of(device="cuda"))
    assert exact == {"flashrnn": "flashrnn multiplies float32 as TF32", "haste": None}[name]
    assert refuses(case_of("rnn", dtype="tf32", device="cuda")) == {"flashrnn": None, "haste": "haste has no rnn"}[name]


def test_flashrnn_refuses_without_nvcc(monkeypatch):
    monkeypatch.setattr(peers, "has_nvcc", lambda: False)
    assert "nvcc" in peers.FlashRNN().refuses(case_of(dtype="tf32", device="cuda"))


def test_a_package_that_is_missing_or_broken_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "flashrnn.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashrnn", raising=False)
    reason = peers.FlashRNN("vanilla").refuses(case_of())
    assert reason == "flashrnn cannot be imported: No module named 'no_such_dependency'"
    monkeypatch.setitem(sys.modules, "haste_pytorch", None)  # as where it is not installed
    assert peers.Haste().refuses(case_of(device="cuda")).startswith("haste_pytorch cannot be imported: ")


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inductor_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr(peers, "BLOCK", 2)
        yield


# Slow: each compiles a block forward, and backward for training; two layers in two directions are to share theirs.
@pytest.mark.parametrize("cell", shapes.CELLS)
@pytest.mark.parametrize("mode", shapes.USUAL_MODES)
def test_torch_compile_computes_what_torch_computes(cell, mode, inductor_cache):
    leaves_a_step = (cell, mode) == ("rnn", "inference")  # after one block; a shape more to compile
    case = case_of(cell, mode, T=3 if leaves_a_step else 4, layers=2, bidirectional=True)
    peer = peers.TorchCompile()
    if reason := peer.refuses(case):
        pytest.skip(reason)
    workload = judged(case, peer)
    with torch._dynamo.config.patch(error_on_recompile=True):  # all is compiled now: the clock sees none of it
        assert workload.kernel() == "inductor/2-steps"
        workload.call()


def test_torch_compile_refuses_to_go_back_twice():
    assert peers.TorchCompile().refuses(case_of(mode="backward")) == "torch.compile frees in backward what a second one would need"


def test_torch_compile_refuses_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peers.TorchCompile().refuses(case_of()) == "torch.compile needs a C++ compiler, and there is no no-such-compiler"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.TorchCompile().refuses(case_of(device="cuda")) == "torch.compile needs triton, which is not installed"


# ---------------------------------------------------------------------------------------------------------------------
# FlashRNN
# ---------------------------------------------------------------------------------------------------------------------


def flashrnn_stand_in(gates, recurrent, bias, states=None, function="lstm", backend="cuda_fused", dtype="bfloat16"):
    """flashrnn() as its package documents it.

    (B, T, G, N, D), (G, N, D, D), (G, N, D) -> (S, B, T, N, D), (S, B, 1, N, D), N heads, S states.
    """
    B, T, _, N, D = gates.shape
    assert states is None and N == 1 and dtype == str(gates.dtype).removeprefix("torch.")
    every, h, c = [], gates.new_zeros(B, D), gates.new_zeros(B, D)
    R, b = recurrent[:, 0], bias[:, 0]
    for x in gates[:, :, :, 0].unbind(1):
        y = torch.einsum("bp,gdp->gbd", h, R)
        x = x.transpose(0, 1)
        if function == "gru":  # recurrent n, r, z; input r, z, n; biases of n, r, z and the input's n
            r, z = torch.sigmoid(x[0] + y[1] + b[1]), torch.sigmoid(x[1] + y[2] + b[2])
            h = z * h + (1 - z) * torch.tanh(x[2] + b[3] + r * (y[0] + b[0]))
        elif function == "elman":
            h = torch.tanh(x[0] + y[0] + b[0])
        else:
            i, f, z, o = x + y + b[:, None]
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
            h = torch.sigmoid(o) * torch.tanh(c)
        every.append(torch.stack((h, c) if function == "lstm" else (h,)))
    states = torch.stack(every, 2)[:, :, :, None]
    return states, states[:, :, -1:]


@pytest.fixture(params=["stand-in", "flashrnn"])
def flashrnn(request, monkeypatch):
    if request.param == "flashrnn":
        return pytest.importorskip("flashrnn")
    package = types.SimpleNamespace(flashrnn=flashrnn_stand_in)
    monkeypatch.setitem(sys.modules, "flashrnn", package)
    return package


@pytest.mark.parametrize("cell", shapes.CELLS)
@pytest.mark.parametrize("mode", shapes.USUAL_MODES)
def test_flashrnn_is_given_the_weights_in_its_order(cell, mode, flashrnn):
    peer, case = peers.FlashRNN("vanilla"), case_of(cell, mode, "float64")
    assert peer.refuses(case) is None
    assert judged(case, peer).kernel() == "flashrnn/vanilla"


@pytest.mark.parametrize("backend, order", [("cuda_fused", (1, 0, 3, 4, 2)), ("cuda", (1, 0, 3, 2, 4))])
def test_a_flashrnn_kernel_finds_the_gates_as_it_reads_them(backend, order, monkeypatch):
    seen = []

    def stand_in(gates, *arguments, **options):
        seen.append((options["backend"], gates.permute(order).is_contiguous()))
        return flashrnn_stand_in(gates, *arguments, **options)

    monkeypatch.setitem(sys.modules, "flashrnn", types.SimpleNamespace(flashrnn=stand_in))
    judged(case_of("lstm", "training"), peers.FlashRNN(backend))
    assert set(seen) == {(backend, True)}


@pytest.mark.parametrize("error, backend", [(None, "cuda_fused"), (ValueError, "cuda"), (RuntimeError, "cuda")])
def test_flashrnn_takes_its_other_kernel_where_the_fused_one_cannot_be_built(error, backend, monkeypatch):
    def build(*arguments, **options):
        if error:
            raise error("no tiling")

    monkeypatch.setitem(sys.modules, "flashrnn", types.SimpleNamespace(flashrnn=build))
    monkeypatch.setattr(peers.torch, "zeros", lambda *sizes, **options: None)  # on a GPU that need not be there
    peers._fused_or_not.cache_clear()
    try:
        assert peers.FlashRNN().kernel(case_of("lstm", device="cuda"), set()) == f"flashrnn/{backend}"
        assert peers.FlashRNN().kernel(case_of("gru", device="cuda"), set()) == "flashrnn/cuda"
    finally:
        peers._fused_or_not.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Haste
# ---------------------------------------------------------------------------------------------------------------------


class HasteStandIn(torch.nn.Module):
    """haste_pytorch.LSTM and GRU as their package documents them: kernels (I, G*H) and (H, G*H), gates i g f o or z r n."""

    def __init__(self, gates: int, I: int, H: int):  # noqa: E741
        super().__init__()
        sizes = {"kernel": (I, gates * H), "recurrent_kernel": (H, gates * H), "bias": (gates * H,)}
        sizes |= {"recurrent_bias": (gates * H,)} if gates == 3 else {}
        for name, size in sizes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.full(size, torch.nan)))

    def forward(self, input):
        outputs, h = [], input.new_zeros(input.shape[1], self.recurrent_kernel.shape[0])
        c = torch.zeros_like(h)
        for x in input @ self.kernel + self.bias:
            y = h @ self.recurrent_kernel
            if hasattr(self, "recurrent_bias"):
                (z_x, r_x, n_x), (z_y, r_y, n_y) = x.chunk(3, 1), (y + self.recurrent_bias).chunk(3, 1)
                z, r = torch.sigmoid(z_x + z_y), torch.sigmoid(r_x + r_y)
                h = z * h + (1 - z) * torch.tanh(n_x + r * n_y)
            else:
                i, g, f, o = (x + y).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), h[None] if hasattr(self, "recurrent_bias") else (h[None], c[None])


@pytest.fixture(params=["stand-in", "haste_pytorch"])
def haste(request, monkeypatch):
    if request.param == "haste_pytorch":
        return pytest.importorskip("haste_pytorch")  # it has a loop in plain torch for the CPU
    package = types.SimpleNamespace(LSTM=lambda *sizes: HasteStandIn(4, *sizes), GRU=lambda *sizes: HasteStandIn(3, *sizes))
    monkeypatch.setitem(sys.modules, "haste_pytorch", package)
    return package


@pytest.mark.parametrize("cell", peers.HasteModule.ORDER)
@pytest.mark.parametrize("mode", shapes.USUAL_MODES)
def test_haste_is_given_the_weights_in_its_order(cell, mode, haste):
    workload = judged(case_of(cell, mode, "float64"), peers.Haste())
    assert workload.kernel() == f"haste/{cell}"
    assert workload.module.layer[0].training == (mode == "training")
