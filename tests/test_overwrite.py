"""Gradients of gates in the place of what was saved: the operator, and that nobody but a layer's own backward loses it."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from benchmarks.memory import allocator_peak
from fusedrnn import layer
from fusedrnn.ops import OVERWRITE
from test_ops import CELLS_AND_LAYOUTS, LAYOUTS, backward, backward_arguments

in_place = torch.ops.fusedrnn.recurrence_backward_
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


def same_bits(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cell, layout", [(cell, layout) for cell, layout in CELLS_AND_LAYOUTS if cell in ("lstm", "gru")])
def test_is_the_same(isa, cell, layout):
    for size in (dict(), dict(T=2, B=33, H=40)) if "packed" not in layout else (dict(),):
        given = backward_arguments(cell, **(LAYOUTS[layout] | size | (dict(P=7) if "projected" in layout else {})))
        grad_pre, *want = backward(*given.values())
        empty, *got = in_place(*given.values())
        assert empty.shape == (0,)
        same_bits([given["saved"], *got[:-1], *got[-1]], [grad_pre, *want[:-1], *want[-1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_formats(isa, dtype):
    given = backward_arguments("lstm", D=2, B=3, H=19, dtype=dtype)
    grad_pre, *want = backward(*given.values())
    _, *got = in_place(*given.values())
    same_bits([given["saved"], *got[:-1], *got[-1]], [grad_pre, *want[:-1], *want[-1]])


def test_lengths(isa):
    given = backward_arguments("gru", T=5, B=4, D=2)
    given["batch_sizes"] = torch.tensor([3, 5, 0, 1])
    given["saved"] = given["saved"].nan_to_num()
    grad_pre, *want = backward(*given.values())
    _, *got = in_place(*given.values())
    same_bits([given["saved"], *got[:-1], *got[-1]], [grad_pre, *want[:-1], *want[-1]])


def test_schema_and_opcheck():
    schema = in_place.default._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert changed == ["saved"] and not any(result.alias_info for result in schema.returns)
    for layout in ("plain", "packed both", "projected", "carry"):  # torch cannot trace what writes to an argument and gives a list
        given = tuple(backward_arguments("lstm", **LAYOUTS[layout]).values())
        torch.library.opcheck(in_place.default, given, test_utils=("test_schema", "test_faketensor"))


def test_refuses_what_it_cannot_do():
    given = backward_arguments("rnn_tanh")
    with pytest.raises(RuntimeError, match="cell must save what its gradients may take the place of, got rnn_tanh"):
        in_place(*given.values())
    given = backward_arguments("lstm", B=3)
    given["saved"] = given["saved"].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(RuntimeError, match="recurrence_backward_: saved must be contiguous, to be written to"):
        in_place(*given.values())


def test_cells():
    assert OVERWRITE == {"lstm", "gru", "gru_general"}


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """For each backward pass whether it was in place, however small."""
    monkeypatch.setattr(layer, "OVERWRITE_LEAST", 0)
    found = []
    for name in ("recurrence_backward", "recurrence_backward_"):
        real = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *given, real=real, name=name: found.append(name.endswith("_")) or real(*given))
    return found


def make(kind="LSTM", **options):
    torch.manual_seed(0)
    return getattr(fusedrnn, kind)(4, 6, **options), torch.randn(5, 3, 4, requires_grad=True)


def gradients(module, input, run=None, **options):
    for tensor in (input, *module.parameters()):
        tensor.grad = None
    output = (run or module)(input)[0]
    (output * torch.linspace(-1, 1, 5 * 3 * output.shape[-1]).view_as(output)).sum().backward(**options)
    return [tensor.grad for tensor in (input, *module.parameters())]


@pytest.mark.parametrize("kind, options", [
    ("LSTM", {}), ("GRU", {}), ("LSTM", dict(bidirectional=True, num_layers=2)), ("LSTM", dict(proj_size=3)),
    ("LSTM", dict(num_heads=2)), ("GRU", dict(save="states")), ("LSTM", dict(save="states", bidirectional=True)),
    ("LSTM", dict(zoneout=0.1)), ("GRU", dict(num_layers=2)),
])  # fmt: skip
def test_layers(kind, options, calls, monkeypatch):
    module, input = make(kind, **options)
    module.eval()
    got = gradients(module, input)
    assert calls and all(calls)
    calls.clear()
    monkeypatch.setattr(layer, "OVERWRITING", ())
    same_bits(got, gradients(module, input))
    assert calls and not any(calls)


@pytest.mark.parametrize("kind", ["RNN", "LayerNormLSTM", "LayerNormGRU", "SLSTM", "IndRNN"])
def test_other_cells(kind, calls):
    gradients(*make(kind))
    assert calls == [False]


@cells
def test_a_graph_that_is_retained(cell, calls):
    module, input = make(cell.upper())
    output = module(input)[0]
    found = [torch.autograd.grad(output.sum(), [input, *module.parameters()], retain_graph=k < 2) for k in range(3)]
    same_bits(found[0], found[1])
    same_bits(found[0], found[2])
    assert calls == [False, False, True]


@cells
def test_who_else_has_it(cell, calls):
    """Hooks that keep what was saved, or a view of it."""
    module, input = make(cell.upper())
    want = gradients(module, input)
    for keep, alone in ((lambda t: t, False), (lambda t: t.detach(), False), (lambda t: t[:1], False), (lambda t: t.clone(), True)):
        kept, copies = [], []

        def pack(tensor, keep=keep, kept=kept, copies=copies):
            kept.append(keep(tensor))
            copies.append(kept[-1].clone())
            return tensor

        calls.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            got = gradients(module, input)
        same_bits(got, want)
        same_bits(kept, copies)
        assert calls == [alone]


def test_where_owners_cannot_be_counted(calls, monkeypatch):
    monkeypatch.setattr(layer, "COUNTS_OWNERS", False)
    gradients(*make())
    assert calls == [False]


@cells
def test_after_a_compilation(cell, calls):
    """One whose backward pass failed leaves Python calling functions in another way, for as long as the process runs."""

    def edited(input):
        output = module(input * 1)[0]
        output.mul_(2)
        return output.sum()

    module, input = make(cell.upper())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(edited, backend="aot_eager")(input).backward()
    calls.clear()
    gradients(module, input)
    assert calls == [True]


def shared(tensor):
    return tensor.clone().share_memory_()


@pytest.mark.parametrize("pack, unpack", [
    (lambda t: t.detach().numpy().copy(), torch.from_numpy),
    (lambda t: t.detach().numpy().copy(), lambda array: torch.from_dlpack(array)),
    (lambda t: shared(t.detach()), lambda t: t[...]),
])  # fmt: skip
@cells
def test_memory_of_others(cell, pack, unpack, calls):
    """Whoever keeps it outside of torch, and gives a new tensor on it at each unpacking."""
    module, input = make(cell.upper())
    want = gradients(module, input)
    calls.clear()
    with saved_tensors_hooks(pack, unpack):
        output = module(input)[0]
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    for retain in (True, True, False):
        same_bits(torch.autograd.grad(output, [input, *module.parameters()], weight, retain_graph=retain), want)
    assert calls == [False] * 3


@cells
def test_unpacked_in_another_order(cell, calls):
    """A new tensor, of which nobody else knows, but whose numbers do not lie as the operator's."""
    module, input = make(cell.upper())
    want = gradients(module, input)
    calls.clear()

    def turned(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor

    with saved_tensors_hooks(turned, torch.clone):
        for one, other in zip(gradients(module, input), want):
            torch.testing.assert_close(one, other)
    assert calls == [False]


def test_not_for_who_looks_on(calls):
    with FlopCounterMode(display=False):
        gradients(*make())
    assert calls == [False]


@cells
def test_offloading_and_checkpoints(cell, calls):
    module, input = make(cell.upper())
    want = gradients(module, input)
    with save_on_cpu():
        same_bits(gradients(module, input), want)
    for reentrant in (False, True):
        same_bits(gradients(module, input, lambda x: checkpoint(module, x, use_reentrant=reentrant)), want)
    assert len(calls) == 4


@cells
def test_second_derivatives(cell, calls):
    module, input = make(cell.upper())
    module, input = module.double(), input.detach().double().requires_grad_()
    output = module(input)[0]
    (grad,) = torch.autograd.grad(output.pow(2).sum(), input, create_graph=True)
    (again,) = torch.autograd.grad(output.pow(2).sum(), input, retain_graph=True)
    assert torch.equal(grad, again)
    grad.pow(2).sum().backward()
    assert calls[:2] == [False, False]
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], input)


def test_takes_less_memory(monkeypatch):
    """The gates' four numbers a row and unit are there once at the peak of a training step, and not twice."""
    T, B, H = 512, 16, 64
    module, input, grad = fusedrnn.LSTM(H, H), torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)

    def step():
        return torch.autograd.grad(module(input)[0], [input, *module.parameters()], grad)

    step()
    peak = allocator_peak(step)
    monkeypatch.setattr(layer, "OVERWRITING", ())
    assert allocator_peak(step) - peak > 3.5 * T * B * H * 4
