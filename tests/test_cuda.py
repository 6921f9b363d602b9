"""What only a GPU can show: the same numbers as the CPU's engine, streams, graphs, several devices, determinism at size.

The tests of the operators and of accuracy run on a GPU too (`engine` in conftest.py); these are the ones that need no other.
"""

import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from conftest import CELLS, HAS_GPU, compare_all_equal, fp32_precision, make_pair, states_for
from fusedrnn.testing import compare_modules, run_module

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU and a build with CUDA")
cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
LAYOUTS = {
    "plain": {}, "both": {"bidirectional": True}, "stacked": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True}, "packed": {"bidirectional": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def ieee():
    """float32 products unrounded, unless a test asks for TF32."""
    with fp32_precision(torch.backends.cudnn.rnn, "ieee"):
        yield


def layer_and_input(cell, layout="plain", dtype=torch.float32, T=11, B=37, I=19, H=130):
    ours, stock = make_pair(cell, I, H, **LAYOUTS[layout], dtype=dtype, device="cuda")
    input = torch.randn(*((B, T, I) if layout == "batch first" else (T, B, I)), dtype=dtype, device="cuda")
    if layout == "packed":
        input = pack_padded_sequence(input, torch.randint(1, T + 1, (B,)), enforce_sorted=False)
    return ours, stock, input


@pytest.fixture(params=[("block", 45), ("cluster", 100), ("grid", 130), ("step", 130)], ids=lambda param: param[0])
def H(request, monkeypatch):
    """Units of a layer, which the kernel that is asked for can run."""
    kernel, units = request.param
    monkeypatch.setenv("FUSEDRNN_KERNEL", kernel)
    return units


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
@cells
def test_accuracy(cell, dtype, layout, H):
    ours, stock, input = layer_and_input(cell, layout, dtype, H=H)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch.nn's: for bfloat16 it does not flatten its weights, and then says at every call that they are not flat.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        compare_modules(ours, stock, input, states_for(ours, 37, device="cuda"))


@cells
def test_tf32(cell):
    """Rounded like torch's own; and float32 where torch is told not to round. Large, since cuDNN's kernel for few units rounds less."""
    ours, stock, input = layer_and_input(cell, H=512)
    exact = run_module(ours, input)
    with fp32_precision(torch.backends.cudnn.rnn, "tf32"):
        compare_modules(ours, stock, input)
        assert not torch.equal(run_module(ours, input)["output"], exact["output"])


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("layout", ["both", "packed"])
@pytest.mark.parametrize("kernel, H", [("block", 64), ("cluster", 64), ("cluster", 200), ("grid", 64), ("grid", 300)])
@cells
def test_kernels_agree(cell, kernel, H, layout, tf32, monkeypatch):
    """Over more steps than one launch lists."""
    ours, _, input = layer_and_input(cell, layout, T=300, H=H)
    found = {}
    with fp32_precision(torch.backends.cudnn.rnn, "tf32" if tf32 else "ieee"):
        for asked in (kernel, "step"):
            monkeypatch.setenv("FUSEDRNN_KERNEL", asked)
            found[asked] = run_module(ours, input)
    tolerance = 2e-2 if tf32 else 1e-4
    for name, expected in found["step"].items():
        torch.testing.assert_close(found[kernel][name], expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers, H", [(2, 300), (4, 64), (11, 30)])
@dtypes
@cells
def test_layers_in_one_launch(cell, dtype, layers, H, packed, monkeypatch):
    """As accurate as torch's own, and the same bits every time, over more steps than one launch lists."""
    monkeypatch.setenv("FUSEDRNN_KERNEL", "stack")
    ours, stock = make_pair(cell, 19, H, layers, dtype=dtype, device="cuda")
    input = torch.randn(300, 21, 19, dtype=dtype, device="cuda")
    if packed:
        input = pack_padded_sequence(input, torch.randint(1, 301, (21,)), enforce_sorted=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        compare_modules(ours, stock, input, states_for(ours, 21, device="cuda"))
    first = run_module(ours, input)
    for _ in range(20):
        compare_all_equal(run_module(ours, input), first)


@pytest.mark.parametrize("asked", ["cluster", "grid"])
@cells
def test_exchange_of_many_steps(cell, asked, monkeypatch):
    """100,000 exchanges between eight blocks end, and leave what a launch a step does."""
    ours, _, input = layer_and_input(cell, T=100_000, B=3, H=128)
    outputs = []
    with torch.no_grad():
        for kernel in (asked, "step"):
            monkeypatch.setenv("FUSEDRNN_KERNEL", kernel)
            outputs.append(ours(input)[0][-100:])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@cells
def test_same_numbers_as_on_the_cpu(cell, H):
    ours, _, input = layer_and_input(cell, "stacked", torch.float64, H=H)
    on_gpu = run_module(ours, input)
    on_cpu = run_module(ours.cpu(), input.cpu())
    for name in on_cpu:
        torch.testing.assert_close(on_gpu[name].cpu(), on_cpu[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("layout", ["stacked", "packed"])
@dtypes
@cells
def test_twenty_runs_same_bits(cell, dtype, layout, H):
    ours, _, input = layer_and_input(cell, layout, dtype, T=40, B=64, H=H)
    first = run_module(ours, input)
    for _ in range(20):
        compare_all_equal(run_module(ours, input), first)


@cells
def test_side_stream(cell, H):
    ours, _, input = layer_and_input(cell, T=100, H=H)
    expected = run_module(ours, input)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = input + 0 * torch.randn(4096, 4096, device="cuda").mm(torch.randn(4096, 4096, device="cuda")).sum()
        found = run_module(ours, late)
    torch.cuda.current_stream().wait_stream(stream)
    compare_all_equal(found, expected)


@cells
def test_graph_capture_of_a_training_step(cell, H):
    ours, _, input = layer_and_input(cell, "both", T=20, H=H)
    leaf = input.clone().requires_grad_()
    wanted = [leaf, *ours.parameters()]

    def step():
        return torch.autograd.grad(ours(leaf)[0].sum(), wanted)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@cells
def test_another_device_than_the_current_one(cell):
    ours, _, input = layer_and_input(cell)
    expected = run_module(ours, input)
    found = run_module(ours.to("cuda:1"), input.to("cuda:1"))
    compare_all_equal({name: tensor.to("cuda:0") for name, tensor in found.items()}, expected)


def test_states_on_another_device_are_refused_as_by_torch():
    lstm = fusedrnn.LSTM(4, 5, device="cuda")
    with pytest.raises(RuntimeError, match="not at the same device"):
        lstm(torch.randn(3, 2, 4, device="cuda"), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)))


@cells
def test_second_derivatives(cell):
    """Which cuDNN refuses: a gradient penalty, against the CPU's engine."""
    ours, _, input = layer_and_input(cell, dtype=torch.float64, T=4, B=3, H=7)
    results = []
    for device in ("cuda", "cpu"):
        module, x = ours.to(device), input.to(device).detach().requires_grad_()
        (slope,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        results.append([grad.cpu() for grad in torch.autograd.grad(slope.square().sum(), list(module.parameters()))])
    torch.testing.assert_close(*results)


@cells
def test_backward_in_eval_mode(cell):
    ours, _, input = layer_and_input(cell)
    ours.eval()
    ours(input.requires_grad_())[0].sum().backward()
    assert input.grad.abs().sum() > 0


@cells
def test_each_sample(cell):
    """torch.func.vmap of grad, against one sample after the other."""
    ours, _, input = layer_and_input(cell, dtype=torch.float64, T=4, B=6, H=7)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    loss = torch.func.grad(lambda w, x: torch.func.functional_call(ours, w, (x,))[0].square().sum())
    samples = input.transpose(0, 1).unsqueeze(2)
    found = torch.func.vmap(loss, in_dims=(None, 0))(weights, samples)
    each = [loss(weights, sample) for sample in samples]
    torch.testing.assert_close(found, {name: torch.stack([grads[name] for grads in each]) for name in weights})


@cells
def test_lengths(cell):
    ours, _, input = layer_and_input(cell, "batch first")
    lengths = torch.randint(1, 12, (37,), device="cuda")
    found = ours(input, lengths=lengths)
    torch.testing.assert_close(found, ours.cpu()(input.cpu(), lengths=lengths.cpu()), check_device=False)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@cells
def test_compile(cell, mode):
    ours, _, input = layer_and_input(cell)
    compiled = torch.compile(lambda x: ours(x)[0].square().mean(), fullgraph=True, mode=mode)
    results = []
    for call in (lambda x: ours(x)[0].square().mean(), *[compiled] * 3):
        ours.zero_grad()
        loss = call(input)
        loss.backward()
        results.append((loss.detach().clone(), [p.grad.clone() for p in ours.parameters()]))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@cells
def test_autocast_with_a_scaler(cell, dtype):
    ours, _, input = layer_and_input(cell)
    optimizer, scaler = torch.optim.SGD(ours.parameters(), 0.1), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            output, _ = ours(input)
        assert output.dtype == dtype
        loss = output.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
