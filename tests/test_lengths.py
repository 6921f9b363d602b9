"""`lengths=` on padded input: the numbers of the packed call, without packing."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from conftest import CELLS, make_pair, states_for
from fusedrnn import reference
from fusedrnn.testing import named_outputs

cells = pytest.mark.parametrize("cell", CELLS)
LAYOUTS = [dict(), dict(bidirectional=True), dict(batch_first=True, bias=False), dict(num_layers=2, bidirectional=True, batch_first=True),
           dict(proj_size=2, bidirectional=True)]  # fmt: skip
cells_and_layouts = pytest.mark.parametrize(
    "cell, options", [(cell, o) for cell in CELLS for o in LAYOUTS if cell == "lstm" or "proj_size" not in o], ids=str)
LENGTHS = [[5, 5, 5, 5], [5, 1, 3, 3], [1, 2, 3, 4], [2, 1, 1, 2]]
close = torch.testing.assert_close


def packed_call(module, input, hx, lengths):
    """What lengths stand for, in torch's own words."""
    packed = pack_padded_sequence(input, lengths, module.batch_first, enforce_sorted=False)
    output, hidden = module(packed, hx)
    return pad_packed_sequence(output, module.batch_first, total_length=input.shape[1 if module.batch_first else 0])[0], hidden


def gradients(module, results, leaves):
    """Of a loss in which every number has a weight of its own."""
    found = named_outputs(results)
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in found.values())
    return torch.autograd.grad(loss, [*leaves, *module.parameters()])


def leaves_of(module, T, B):
    shape = (B, T, 3) if module.batch_first else (T, B, 3)
    input, hx = torch.randn(shape, dtype=module.weight_ih_l0.dtype, requires_grad=True), states_for(module, B, requires_grad=True)
    return input, hx, [input, *(hx if isinstance(hx, tuple) else [hx])]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@cells_and_layouts
def test_same_as_packed(cell, options, lengths, engine):
    ours, stock = make_pair(cell, 3, 7, dtype=torch.float64, **options)
    input, hx, leaves = leaves_of(ours, 5, 4)
    lengths = torch.tensor(lengths)
    found, expected = ours(input, hx, lengths=lengths), packed_call(stock, input, hx, lengths)
    close(found, expected)
    close(gradients(ours, found, leaves), gradients(stock, expected, leaves))
    close(ours(input, lengths=lengths), packed_call(stock, input, None, lengths))


@pytest.mark.parametrize("threads", [1, 2])
@cells_and_layouts
def test_larger(cell, options, threads):
    """Several tiles of rows and units, and the same bits at every repetition."""
    torch.set_num_threads(threads)
    ours, _ = make_pair(cell, 3, 40, **options)
    input, hx, leaves = leaves_of(ours, 30, 50)
    lengths = torch.randint(1, 31, (50,))
    found, expected = ours(input, hx, lengths=lengths), packed_call(ours, input, hx, lengths)
    close(found, expected)
    again = ours(input, hx, lengths=lengths)
    grads, twice, packed = gradients(ours, found, leaves), gradients(ours, again, leaves), gradients(ours, expected, leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, twice)), "a repetition has the same bits"
    close(grads, packed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_formats(dtype):
    ours, _ = make_pair("gru", 3, 20, dtype=dtype, bidirectional=True)
    input, hx, _ = leaves_of(ours, 6, 5)
    lengths = torch.tensor([6, 1, 4, 2, 6])
    output, hy = ours(input, hx, lengths=lengths)
    expected, expected_hy = packed_call(ours, input, hx, lengths)
    close((output, hy), (expected, expected_hy))
    assert output.dtype == dtype


@cells
def test_sequences_of_no_steps(cell, engine):
    """Which torch cannot pack: they end in the state that they began with, and put out zeros."""
    ours, _ = make_pair(cell, 3, 7, dtype=torch.float64, bidirectional=True)
    input, hx, leaves = leaves_of(ours, 5, 4)
    weights = [tuple(getattr(ours, f"{name}_l0{end}", None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"))
               for end in ("", "_reverse")]  # fmt: skip
    h, c = hx if cell == "lstm" else (hx, None)
    for lengths in ([0, 5, 0, 2], [0, 0, 0, 0]):
        lengths = torch.tensor(lengths)
        output, hidden = ours(input, hx, lengths=lengths)
        expected, hy, cy, _ = reference.layer(cell, input, h, c, weights, lengths)
        expected = (expected, (hy, cy) if cell == "lstm" else hy)
        close((output, hidden), expected)
        close(gradients(ours, (output, hidden), leaves), gradients(ours, expected, leaves))
        assert torch.equal(named_outputs((output, hidden))["hy"][:, 0], h[:, 0])


@cells
def test_what_lies_behind_the_end_does_not_matter(cell, engine):
    ours, _ = make_pair(cell, 3, 40, bidirectional=True, num_layers=2, batch_first=True)
    input, lengths = torch.randn(40, 60, 3), torch.randint(1, 60, (40,))
    behind = torch.arange(60) >= lengths.unsqueeze(1)
    results = []
    for filler in (0.0, float("nan")):
        x = input.masked_fill(behind.unsqueeze(2), filler).requires_grad_()
        output, _ = ours(x, lengths=lengths)
        output.sum().backward()
        results.append([output, x.grad, *(p.grad for p in ours.parameters())])
        ours.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not results[1][0][behind].any() and not results[1][1][behind].any()


@cells
def test_second_derivatives_see_nothing_behind_the_end(cell):
    ours, _ = make_pair(cell, 3, 4, dtype=torch.float64)
    input, lengths = torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor([2, 5])
    input[2:, 0] = float("nan")
    input.requires_grad_()
    (slope,) = torch.autograd.grad(ours(input, lengths=lengths)[0].sin().sum(), input, create_graph=True)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(slope.square().sum(), list(ours.parameters())))


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True, num_layers=2)], ids=str)
@cells
def test_gradcheck_and_gradgradcheck(cell, options):
    ours, _ = make_pair(cell, 2, 3, dtype=torch.float64, **options)
    names, lengths = [name for name, _ in ours.named_parameters()], torch.tensor([1, 3, 0])
    states = 2 if cell == "lstm" else 1

    def run(input, *rest):
        hx = rest[:states] if states == 2 else rest[0]
        result = functional_call(ours, dict(zip(names, rest[states:])), (input, hx), {"lengths": lengths})
        return tuple(named_outputs(result).values())

    hx = states_for(ours, 3)
    tensors = [torch.randn(3, 3, 2, dtype=torch.float64), *(hx if states == 2 else [hx]), *ours.parameters()]
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    assert gradcheck(run, tensors, fast_mode="num_layers" in options) and gradgradcheck(run, tensors, fast_mode=True)


@cells
def test_many_at_once(cell):
    """torch.vmap over inputs and lengths, and the gradients of each sample."""
    ours, _ = make_pair(cell, 3, 4, dtype=torch.float64, bidirectional=True)
    inputs, lengths = torch.randn(3, 5, 2, 3, dtype=torch.float64), torch.tensor([[5, 2], [1, 1], [3, 4]])
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(w, x, n):
        return functional_call(ours, w, (x,), {"lengths": n})[0].square().sum()

    close(vmap(lambda x, n: ours(x, lengths=n)[0])(inputs, lengths), torch.stack([ours(x, lengths=n)[0] for x, n in zip(inputs, lengths)]))
    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(weights, inputs, lengths)
    each = [grad(loss, argnums=(0, 1))(weights, x, n) for x, n in zip(inputs, lengths)]
    close(found[1], torch.stack([g[1] for g in each]))
    close(found[0], {name: torch.stack([g[0][name] for g in each]) for name in weights})


@pytest.mark.filterwarnings("ignore:.*not on the fused engine")
def test_what_the_engine_does_not_take_is_packed():
    ours, stock = make_pair("gru", 3, 4, dtype=torch.complex64, batch_first=True)
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    input, lengths = torch.randn(3, 5, 3, dtype=torch.complex64), torch.tensor([2, 5, 1])
    close(ours(input, lengths=lengths), packed_call(stock, input, None, lengths))
    assert calls == [1], "hooks run once"


def test_meta():
    output, _ = fusedrnn.GRU(3, 4, device="meta")(torch.empty(5, 2, 3, device="meta"), lengths=torch.tensor([5, 2], device="meta"))
    assert output.is_meta and output.shape == (5, 2, 4)


def test_kinds_of_integers():
    ours, _ = make_pair("lstm", 3, 4)
    input, expected = torch.randn(5, 2, 3), None
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        output = ours(input, lengths=torch.tensor([2, 5], dtype=dtype))[0]
        expected = output if expected is None else expected
        assert torch.equal(output, expected)


@pytest.mark.parametrize("lengths, error, text", [
    (torch.tensor([1, 2, 3]), ValueError, r"fusedrnn.LSTM: lengths must be of shape \(2,\), got \(3,\)"),
    (torch.tensor([[1, 2]]), ValueError, r"lengths must be of shape \(2,\), got \(1, 2\)"),
    (torch.tensor([1.0, 2.0]), TypeError, "lengths must be a tensor of integers, got torch.float32"),
    (torch.tensor([True, False]), TypeError, "lengths must be a tensor of integers, got torch.bool"),
    ([1, 2], TypeError, "lengths must be a tensor of integers, got list"),
    (torch.tensor([1, 6]), RuntimeError, "lengths must be from 0 to 5, got 6 at 1"),
    (torch.tensor([-1, 5]), RuntimeError, "lengths must be from 0 to 5, got -1 at 0"),
])  # fmt: skip
def test_errors(lengths, error, text):
    ours, _ = make_pair("lstm", 3, 4)
    with pytest.raises(error, match=text):
        ours(torch.randn(5, 2, 3), lengths=lengths)


def test_errors_of_input():
    ours, lengths = fusedrnn.GRU(3, 4), torch.tensor([2, 1])
    with pytest.raises(ValueError, match="fusedrnn.GRU: lengths are for padded input of 3 dimensions, got 2 dimensions"):
        ours(torch.randn(2, 3), lengths=lengths)
    with pytest.raises(ValueError, match="got a PackedSequence"):
        ours(pack_padded_sequence(torch.randn(2, 2, 3), lengths), lengths=lengths)
    with pytest.raises(RuntimeError, match="input.size.-1. must be equal to input_size. Expected 3, got 4"):
        ours(torch.randn(5, 2, 4), lengths=torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        ours(torch.randn(0, 2, 3), lengths=torch.tensor([0, 0]))


def test_fx_records_lengths():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.RNN(3, 4)

        def forward(self, input, lengths):
            return self.rnn(input, lengths=lengths)[0]

    model, input, lengths = Model(), torch.randn(5, 2, 3), torch.tensor([2, 5])
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes].count("call_module") == 1
    close(graph(input, lengths), model(input, lengths))
