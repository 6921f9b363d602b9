"""fusedrnn.explain names the kernel that a call runs, and it is the one that then runs. A fallback says why, once."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from conftest import fp32_precision
from fusedrnn import explain, layer, select
from same import FALLBACK

KINDS = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
kinds = pytest.mark.parametrize("kind", KINDS)


def input_for(kind, dtype=torch.float32):
    return torch.randn((2, 4) if "Cell" in kind else (3, 2, 4), dtype=dtype)


def runs(text) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("  runs")]
    return line.split(maxsplit=1)[1]


@kinds
def test_fused_under_each_instruction_set(kind, isa):
    module = getattr(fusedrnn, kind)(4, 5)
    text = explain(module, input_for(kind))
    assert runs(text) == f"fused engine, {isa}"
    assert text.startswith(f"fusedrnn.{module}, input ")
    for other in {"avx512", "avx2", "baseline"} - {isa}:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  not   fused engine, {other}:")]
        assert ("FUSEDRNN_CPU_ISA" in line) == (other in fusedrnn._C.cpu_isas())


def meta(kind):
    return getattr(fusedrnn, kind)(4, 5, device="meta"), input_for(kind).to("meta")


CASES = {
    "complex": (lambda kind: (getattr(fusedrnn, kind)(4, 5, dtype=torch.complex64), input_for(kind, torch.complex64)), "complex64"),
    "subclass": (lambda kind: (getattr(fusedrnn, kind)(4, 5), input_for(kind).as_subclass(Named)), "Named"),
}


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("case", CASES)
@kinds
def test_reason_is_explained_and_warned_of_once(kind, case):
    make, word = CASES[case]
    module, input = make(kind)
    text = explain(module, input)
    assert runs(text) == f"torch.nn.{kind}"
    assert all(word in line for line in text.splitlines() if "  not   fused engine" in line)
    with pytest.warns(UserWarning, match=f"fusedrnn.{kind}: .*{FALLBACK}.*{word}"):
        module(input)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(input)


@pytest.mark.filterwarnings("ignore:.*not on the fused engine")
def test_subclass_results_keep_their_class():
    for kind in KINDS:
        result = getattr(fusedrnn, kind)(4, 5)(input_for(kind).as_subclass(Named))
        while isinstance(result, tuple):
            result = result[0]
        assert type(result) is Named


@kinds
def test_warning_points_at_the_caller_or_names_the_layer(kind):
    module = getattr(fusedrnn, kind)(4, 5, dtype=torch.complex64)
    with pytest.warns(UserWarning) as caught:
        module(input_for(kind, torch.complex64))
    said = [w for w in caught if FALLBACK in str(w.message)]
    assert len(said) == 1 and f"fusedrnn.{kind}" in str(said[0].message) and f"torch.nn.{kind}" in str(said[0].message)


@kinds
def test_a_call_that_torch_refuses_gives_no_warning(kind):
    module = getattr(fusedrnn, kind)(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, ValueError)):
            module(torch.randn(2, 2, 2, 2))


@kinds
def test_tracing_is_silent(kind):
    module = getattr(fusedrnn, kind)(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=f".*{FALLBACK}.*")
        traced = torch.jit.trace(module, (input_for(kind),))
    assert "fusedrnn::" not in str(traced.graph), "a traced model must not need fusedrnn"


def test_stock_modules():
    text = explain(nn.LSTM(4, 5), torch.randn(3, 2, 4))
    assert runs(text) == "torch.nn.LSTM" and "fusedrnn.convert" in text


def test_packed():
    text = explain(fusedrnn.GRU(4, 5), pack_padded_sequence(torch.randn(3, 2, 4), [3, 1]))
    assert "packed input (4, 4)" in text and runs(text).startswith("fused engine")


def test_states_count():
    module = fusedrnn.LSTM(4, 5)
    good, bad = torch.zeros(1, 2, 5), torch.zeros(1, 3, 5)
    assert runs(explain(module, torch.randn(3, 2, 4), (good, good))).startswith("fused")
    assert runs(explain(module, torch.randn(3, 2, 4), (good, bad))) == "torch.nn.LSTM"


def test_nothing_is_run():
    module = fusedrnn.LSTM(4, 5, 2, dropout=0.5)
    state = torch.get_rng_state()
    explain(module, torch.randn(0, 2, 4))
    assert torch.equal(state, torch.get_rng_state())


def test_other_modules():
    with pytest.raises(TypeError, match="module must be a recurrent layer or cell, got Linear"):
        explain(nn.Linear(3, 4), torch.randn(2, 3))


@kinds
def test_plain_calls_never_fall_back(kind):
    """Every dtype of the engine, with and without autograd: no warning, hence the engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            module = getattr(fusedrnn, kind)(4, 5, dtype=dtype)
            module(input_for(kind, dtype))
            with torch.no_grad():
                module(input_for(kind, dtype))
            with torch.inference_mode():
                module(input_for(kind, dtype))
        with torch.device("cpu"):
            module(input_for(kind, dtype))


H100 = {"multiprocessors": 132, "shared_bytes": 227 << 10, "major": 9}


# ---- CUDA tensors, without a GPU: fake ones, which have a device and no memory


@pytest.fixture
def fake_cuda(monkeypatch):
    """fake_cuda(kind, built) -> (module, input) on a CUDA device, for a library built with CUDA or without."""

    def make(kind, built, width=5, **options):
        monkeypatch.setattr(select, "HAS_CUDA", built)
        module = getattr(fusedrnn, kind)(4, width, device="meta", **options)
        for name, weight in module._parameters.items():
            module._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="cuda"))
        return module, torch.empty((2, 4) if "Cell" in kind else (3, 2, 4), device="cuda")

    with FakeTensorMode(), torch.no_grad():
        yield make


def first(result):
    return first(result[0]) if isinstance(result, tuple) else result


@kinds
def test_cuda(kind, fake_cuda, monkeypatch):
    module, input = fake_cuda(kind, built=True)
    monkeypatch.setattr(select, "chip", lambda device: H100)
    text = explain(module, input)
    assert runs(text) == f"fused CUDA kernels, {'step' if 'Cell' in kind else 'block'}"
    assert ("block: there is only one step" if "Cell" in kind else "step: all steps go in one launch") in text
    assert "Cell" in kind or "grid: one block can hold all of weight_hh" in text
    assert text.count("the input is on cuda") == 3
    monkeypatch.setattr(select, "chip", lambda device: H100 | {"shared_bytes": 255})
    text = explain(module, input)
    assert "Cell" in kind or "block: weight_hh does not fit into the 0 KiB of shared memory" in text
    assert "Cell" in kind or "grid: the weights of 16 units and the sums of a block's share of 2 sequences do not fit" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = first(module(input))
    assert output.is_cuda and output.shape == (*input.shape[:-1], 5)


@kinds
@pytest.mark.filterwarnings("ignore:.*not on the fused engine", "ignore:PyTorch was compiled without cuDNN")
def test_cuda_that_was_not_built(kind, fake_cuda):
    module, input = fake_cuda(kind, built=False)
    why = fusedrnn._C.build_record()["cuda_why_not"]
    text = explain(module, input)
    assert runs(text) == f"torch.nn.{kind}"
    assert f"it was built without CUDA ({why}); FUSEDRNN_CUDA=1 pip install" in text
    if "GRU" in kind:  # torch cannot say what its GRU on CUDA would return without running it
        return
    with pytest.warns(UserWarning, match=f"fusedrnn.{kind}: .*{FALLBACK}, because it was built without CUDA"):
        module(input)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(input)


@kinds
@pytest.mark.filterwarnings("ignore:.*not on the fused engine")
def test_cuda_kernel_by_name(kind, fake_cuda, monkeypatch):
    module, input = fake_cuda(kind, built=True)
    monkeypatch.setenv("FUSEDRNN_KERNEL", "step")
    text = explain(module, input)
    assert runs(text) == "fused CUDA kernels, step" and "block: FUSEDRNN_KERNEL=step asks for another" in text
    monkeypatch.setattr(select, "chip", lambda device: H100)
    monkeypatch.setenv("FUSEDRNN_KERNEL", "grid")
    text = explain(module, input)
    assert runs(text) == f"fused CUDA kernels, {'step' if 'Cell' in kind else 'grid'}"
    assert "block: FUSEDRNN_KERNEL=grid asks for another" in text
    monkeypatch.setenv("FUSEDRNN_KERNEL", "torch")
    assert runs(explain(module, input)) == f"torch.nn.{kind}" and "FUSEDRNN_KERNEL=torch" in explain(module, input)
    monkeypatch.setenv("FUSEDRNN_KERNEL", "persistent")
    with pytest.raises(RuntimeError, match="FUSEDRNN_KERNEL must be one of block, cluster, grid, step, stack, torch, got 'persistent'"):
        module(input)


@pytest.mark.parametrize("width, chosen, reason", [
    (64, "block", "grid: one block can hold all of weight_hh"),
    (200, "cluster", "grid: a cluster of blocks can hold all of weight_hh"),
    (512, "grid", "cluster: an eighth of weight_hh and the states of a block's share of 2 sequences do not fit"),
    (512, "grid", "block: weight_hh does not fit into the 227 KiB of shared memory of a block"),
    (2128, "step", "grid: it would take 133 blocks, of 16 units each, at once, and there are 132 multiprocessors"),
    (1300, "step", "grid: the weights of 16 units and the sums of a block's share of 2 sequences do not fit into the 227 KiB"),
])  # fmt: skip
def test_cuda_kernel_by_width(width, chosen, reason, fake_cuda, monkeypatch):
    module, input = fake_cuda("LSTM", built=True, width=width)
    monkeypatch.setattr(select, "chip", lambda device: H100)
    with fp32_precision(torch.backends.cudnn.rnn, "ieee"):
        text = explain(module, input)
    assert runs(text) == f"fused CUDA kernels, {chosen}" and reason in text
    monkeypatch.setattr(select, "chip", lambda device: H100 | {"major": 8})
    text = explain(module, input)
    assert runs(text) != "fused CUDA kernels, cluster" and "cluster: this GPU has no clusters" in text


@pytest.mark.parametrize("width, heads, chosen, reason", [
    (512, 8, "block", "grid: one block can hold all of a head's weight_hh"),
    (512, 1, "grid", "block: weight_hh does not fit into the 227 KiB of shared memory of a block"),
    (1024, 2, "grid", "block: a head's weight_hh does not fit into the 227 KiB of shared memory of a block"),
    (2176, 2, "step", "grid: it would take 136 blocks, of 16 units each, at once, and there are 132 multiprocessors"),
])  # fmt: skip
def test_cuda_kernel_by_heads(width, heads, chosen, reason, fake_cuda, monkeypatch):
    module, input = fake_cuda("LSTM", built=True, width=width, num_heads=heads)
    monkeypatch.setattr(select, "chip", lambda device: H100)
    with fp32_precision(torch.backends.cudnn.rnn, "ieee"):
        text = explain(module, input)
    assert runs(text) == f"fused CUDA kernels, {chosen}" and reason in text


@pytest.mark.parametrize("options, steps, chosen, reason", [
    ({}, 300, "stack: layers 0 to 3 in one launch, layer 4 by itself", "grid: several layers go in one launch, and the last by itself"),
    (dict(num_layers=4), 300, "stack: layers 0 to 3 in one launch", "grid: several layers go in one launch"),
    (dict(num_layers=6), 300, "stack: layers 0 to 3 in one launch, layers 4 to 5 in one launch", "step: all steps go in one launch"),
    (dict(bidirectional=True), 300, "grid", "stack: there are two directions, and a layer begins with what the one below ends with"),
    (dict(proj_size=7), 300, "step", "stack: with a projection a step is two products"),
    (dict(num_heads=2), 300, "cluster", "stack: it has no num_heads"),
    (dict(dropout=0.5), 300, "grid", "stack: it has no dropout"),
    ({}, 7, "grid", "stack: 7 steps are over before the layers above have begun"),
    (dict(width=128), 300, "block", "stack: one block can hold all of weight_hh, and a layer by itself has nothing to exchange"),
    (dict(width=2200), 300, "step", "stack: a layer by itself takes a launch a step"),
    (dict(width=1200), 300, "grid", "stack: the weights of two layers, of the hidden state and the input, and the sums of a block's share"),
])  # fmt: skip
def test_cuda_stack(options, steps, chosen, reason, fake_cuda, monkeypatch):
    module, _ = fake_cuda("LSTM", built=True, **(dict(width=512, num_layers=5, dtype=torch.float16) | options))
    input = torch.empty(steps, 16, 4, device="cuda", dtype=torch.float16)
    monkeypatch.setattr(select, "chip", lambda device: H100)
    text = explain(module, input)
    assert runs(text) == f"fused CUDA kernels, {chosen}" and reason in text
    monkeypatch.setenv("FUSEDRNN_KERNEL", "grid")
    assert not runs(explain(module, input)).startswith("fused CUDA kernels, stack")
    if chosen.startswith("stack"):
        assert "stack: FUSEDRNN_KERNEL=grid asks for another" in explain(module, input)
    single, _ = fake_cuda("LSTM", built=True, width=512, dtype=torch.float16)
    assert "stack" not in explain(single, input)


def test_tf32_follows_torch():
    """cuDNN's setting for the layers it would take, cuBLAS's for cells and single steps."""
    allows, cudnn, cublas = layer.allows_tf32, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    with FakeTensorMode():
        steps, step, data = (torch.empty(size, device="cuda") for size in ((3, 2, 4), (1, 2, 4), (5, 4)))
        with fp32_precision(cudnn, "tf32"), fp32_precision(cublas, "ieee"):
            assert allows(steps, None, False) and not allows(step, None, False)
            assert allows(data, torch.ones(5), False) and not allows(data, torch.ones(1), False)
            assert allows(step, None, True), "batch first, these are two steps"
            with torch.backends.cudnn.flags(enabled=False):
                assert not allows(steps, None, False)
        with fp32_precision(cudnn, "ieee"), fp32_precision(cublas, "tf32"):
            assert allows(step, None, False) and not allows(steps, None, False)
    assert not allows(torch.empty(1, 2, 4), None, False)
