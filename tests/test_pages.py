"""Products of the input: large pages under large results (csrc/pages.h), where they are the same, and who has no plain memory is left
alone; and oneDNN where MKL is slow."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_pair
from fusedrnn import _C, layer
from fusedrnn.testing import compare_modules, run_module

layouts = pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}])
cells = pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])


@pytest.fixture
def all_are_large(monkeypatch):
    """Every product asks for large pages; returns how often that was."""
    asked = []
    monkeypatch.setattr(layer, "LARGE", 1)
    monkeypatch.setattr(layer._C, "want_large_pages", lambda data, count: asked.append(count))
    return asked


@layouts
@cells
def test_same_bits(cell, options, request):
    module, _ = make_pair(cell, 5, 7, **options)
    input = torch.randn(6, 4, 5, requires_grad=True)
    expected = run_module(module, input, wrt={"input": input})
    asked = request.getfixturevalue("all_are_large")
    found = run_module(module, input, wrt={"input": input})
    assert len(asked) >= 2, "the product of the input, and its gradient"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def test_a_view_that_is_not_dense(all_are_large):
    module, stock = make_pair("GRU", 5, 7)
    input = torch.randn(4, 6, 10)[..., ::2].transpose(0, 1)
    torch.testing.assert_close(module(input)[0], stock(input)[0])
    assert all_are_large


def test_nobody_asks_for_memory_that_is_not_there(all_are_large):
    module, stock = make_pair("LSTM", 5, 7)
    input = torch.randn(6, 4, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.empty(6, 4, 5))[0].shape == (6, 4, 7)
    weights = dict(stock.named_parameters())
    loss = lambda layer: lambda values: torch.func.functional_call(layer, values, (input,))[0].square().sum()  # noqa: E731
    found, expected = torch.func.grad(loss(module))(weights), torch.func.grad(loss(stock))(weights)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input)[0], module(input)[0])
    assert module.to("meta")(input.to("meta"))[0].is_meta


@pytest.mark.parametrize("count", [0, 1, 4096, (4 << 20) - 1, 4 << 20, 40_000_000])
def test_any_size(count):
    """Memory that large pages were asked for holds what is written, from its first byte to its last."""
    memory = torch.empty(count, dtype=torch.uint8)
    _C.want_large_pages(memory.data_ptr(), count)
    assert int(memory.fill_(1).sum(dtype=torch.int64)) == count


def test_large_layer():
    """One whose results are large in fact."""
    module, stock = make_pair("GRU", 64, 128)
    input = torch.randn(64, 256, 64)
    found, expected = run_module(module, input), run_module(stock, input)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3 * expected[name].detach().abs().max().item(), msg=name)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}], ids=str)
@cells
def test_whoever_multiplies(cell, options, slow, monkeypatch):
    """Products of the input and its gradient, large enough for oneDNN: taken where MKL is slow, and then as accurate."""
    taken, pointwise = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(layer, "MKL_IS_SLOW", slow)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: taken.append(args) or pointwise(*args))
    module, stock = make_pair(cell, 96, 64, **options)
    input = torch.randn(30, 40, 96)
    compare_modules(module, stock, input)
    assert bool(taken) == slow
    with FlopCounterMode(display=False) as flops:
        run_module(module, input)
    assert flops.get_total_flops() >= 2 * input.numel() * len(module.weight_ih_l0)
