"""Heads, at the operators: blocks of weight_hh, of which each multiplies the states of its own units. All heads of both directions are
one call.

The layers that have them are in tests/test_more_cells.py, how a GPU divides them in tests/test_cuda_plan.py.
"""

import itertools
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fusedrnn
from fusedrnn import autograd, ops, reference
from fusedrnn.reference import NO_CARRY, heads_of, named, with_heads
from test_carry import begun, carry_of, compare
from test_cells_of_choice import arguments, choose
from test_more_cells import whole
from test_ops import backward, check_fake, flat, forward

CELLS = sorted(set(reference.CELLS) - {"indrnn"} - reference.NORMALISES)
HEADS = [(1, 1), (2, 2), (3, 1), (4, 2), (5, 2)]  # of each direction
cells = pytest.mark.parametrize("cell", CELLS)


def of_heads(cell, N, T, B, D, units, **options):
    """(input, hx, cx, weights) of N heads of so many units, which want gradients."""
    input, hx, cx, weights = arguments(cell, T, B, D, N * units, **options)
    cut = [(group[0], group[1][:, :units].detach().clone().requires_grad_(), *group[2:]) for group in weights]
    return input, hx, cx, cut


@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_general:sigmoid,tanh,relu,0.3", "gru_reset_before", "slstm"])
def test_names(cell):
    assert with_heads(cell, 1) == cell and heads_of(cell) == 1
    name = with_heads(cell, 12)
    assert heads_of(name) == 12 and named(name) == named(cell) and ops.TRAITS[name] == ops.TRAITS[cell]


@cells
def test_reference_multiplies_by_a_block_diagonal_matrix(cell):
    input, hx, cx, weights = of_heads(cell, 3, 4, 2, 2, 5)
    full = [(group[0], whole(group[1], 3), *group[2:]) for group in weights]
    with torch.no_grad():
        ours = reference.layer(with_heads(cell, 3), input, hx, cx, weights)
        expected = reference.layer(cell, input, hx, cx, full)
    for a, b in zip(ours, expected):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("N, D", HEADS)
@cells
def test_engine_does_what_the_reference_does(cell, N, D, engine):
    """Units that fill a vector or tile and that do not, and everything that can be between two steps."""
    draws, S = random.Random(f"{cell} {N} {D}"), ops.TRAITS[cell]["states"]
    kinds = [("", 0), ("each", 1), ("alike", 0)]
    for (zoneout, mask), (T, B, units) in zip(kinds, draws.sample([(5, 3, 3), (1, 4, 2), (4, 2, 17), (7, 1, 1), (3, 9, 16)], 3)):
        carry, lengths = carry_of(cell, (draws.random() < 0.5, zoneout, mask, draws.random() < 0.5), T, B, D, N * units, S=S)
        given = of_heads(cell, N, T, B, D, units, unit=draws.random() < 0.8)
        if carry.reset is not None and draws.random() < 0.6:
            carry = begun(carry, of_heads(cell, N, T, B, D, units))
        compare(with_heads(choose(cell, draws), N), given, lengths, carry, recompute=draws.random() < 0.5)


@pytest.mark.parametrize("N, D", [(2, 2), (5, 1)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm", "gru_reset_before"])
def test_packed(cell, N, D, engine):
    sizes = torch.tensor([4, 4, 3, 1, 1])
    _, hx, cx, weights = of_heads(cell, N, 5, 4, D, 3)
    data = torch.randn(int(sizes.sum()), 3, dtype=torch.float64, requires_grad=True)
    compare(with_heads(cell, N), (data, hx, cx, weights), sizes, NO_CARRY, recompute=False)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_larger(cell, isa):
    """Blocks of units and slices of the batch, of which a head has several."""
    torch.set_num_threads(2)
    compare(with_heads(cell, 2), of_heads(cell, 2, 9, 60, 1, 70), None, NO_CARRY, recompute=False)
    compare(with_heads(cell, 3), of_heads(cell, 3, 20, 20, 2, 33), None, NO_CARRY, recompute=True)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm", "gru_general"])
def test_products_of_a_matrix_library(cell, states, monkeypatch):
    """The gradients of weights of many rows, on a processor that the library is good for."""
    monkeypatch.setattr(fusedrnn.layer, "MKL_IS_SLOW", False)
    monkeypatch.setattr(fusedrnn.layer, "MANY_ROWS", 10)
    monkeypatch.setattr(fusedrnn.layer, "NARROW", 2)
    taken = []
    real = fusedrnn.layer._grad_weight_hh
    monkeypatch.setattr(fusedrnn.layer, "_grad_weight_hh", lambda *given: taken.append(1) or real(*given))
    for N, D in ((2, 2), (3, 1)):
        input, hx, cx, weights = of_heads(cell, N, 6, 5, D, 4)
        compare(with_heads(cell, N), (input, *((hx, cx) if states else (None, None)), weights), None, NO_CARRY, recompute=False)
    assert len(taken) == 3


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_many_heads(cell, engine):
    """As many as there are units, more than anybody has threads or multiprocessors."""
    compare(with_heads(cell, 70), of_heads(cell, 70, 3, 2, 2, 1), None, NO_CARRY, recompute=False)
    input, hx, cx, weights = of_heads(cell, 70, 3, 2, 2, 1)
    for wide in (torch.bfloat16, torch.float32):
        outputs = autograd.layer(with_heads(cell, 70), *cast((input, hx, cx), wide), [cast(group, wide) for group in weights])
        assert outputs[0].dtype == wide and outputs[0].isfinite().all()


def cast(tensors, dtype):
    return tuple(None if tensor is None else tensor.detach().to(dtype) for tensor in tensors)


@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm", "gru_reset_before"])
def test_a_head_is_a_layer(cell, isa):
    """Bit for bit, whatever runs beside it: forward, and the gradients that are no sum over heads."""
    N, T, B, D, units = 3, 6, 5, 2, 19
    input, hx, cx, weights = of_heads(cell, N, T, B, D, units, dtype=torch.float32)
    G = ops.TRAITS[cell]["gates"]
    gates = [torch.randn(T, B, G * N * units) for _ in range(D)]

    def cut(tensor, n):
        return tensor[..., n * units : (n + 1) * units]

    def rows(weight, n):
        return weight.unflatten(0, (G, N, units))[:, n].flatten(0, 1)

    def run(name, gates, weight_hh, bias_hh, hx, cx):
        output, hy, cy, saved, states = forward(name, gates, weight_hh, bias_hh, None, hx, cx, *[None] * 6, 2, False)
        grads = backward(name, None, weight_hh, None, hx, cx, output, saved, states, *[None] * 6, torch.ones_like(output),
                         None, None, None, True, cx is not None, False, False, False, True, True, False, False)
        return output, hy, cy, grads

    weight_hh, bias_hh = [group[1].detach() for group in weights], [group[3].detach() for group in weights]
    hx, cx = cast((hx, cx), torch.float32)
    output, hy, cy, (grad_pre, grad_hx, grad_cx, _, _, grad_weights) = run(with_heads(cell, N), gates, weight_hh, bias_hh, hx, cx)
    for n in range(N):
        alone = run(cell, [cut(g.unflatten(-1, (G, -1)), n).flatten(-2) for g in gates], [rows(w, n) for w in weight_hh],
                    [rows(b, n) for b in bias_hh], cut(hx, n), None if cx is None else cut(cx, n))
        assert torch.equal(cut(output.unflatten(-1, (D, -1)), n).flatten(-2), alone[0]) and torch.equal(cut(hy, n), alone[1])
        assert cx is None or torch.equal(cut(cy, n), alone[2])
        one = alone[3]
        assert torch.equal(cut(grad_pre, n), one[0]) and torch.equal(cut(grad_hx, n), one[1])
        assert cx is None or torch.equal(cut(grad_cx, n), one[2])
        for d in range(D):
            for at in (1, 2, 3):
                assert torch.equal(rows(grad_weights[5 * d + at], n), one[-1][5 * d + at])


@pytest.mark.parametrize("D, N", [(1, 2), (2, 3), (1, 8)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_no_bit_depends_on_the_number_of_threads(cell, D, N, isa):
    """More strands than threads, fewer, and as many; few rows, and enough for slices of the batch."""
    for T, B, units in ((6, 3, 33), (4, 40, 17)):
        input, hx, cx, weights = of_heads(cell, N, T, B, D, units, dtype=torch.float32)
        leaves = [t for group in weights for t in group if t is not None]
        gates = torch.randn(T, B, D * ops.TRAITS[cell]["gates"] * N * units, requires_grad=True)
        bare = [(torch.empty(0, 0), *group[1:2], None, group[3], group[4]) for group in weights]
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = autograd.layer(with_heads(cell, N), gates, hx, cx, bare)[:2]
            wanted = [gates, hx, *(leaf for leaf in leaves if any(leaf is t for group in bare for t in group))]
            results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), wanted)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def operands(cell, N, D, **options):
    """Arguments of both operators, for a call that saves everything."""
    T, B, units = 3, 2, 5
    input, hx, cx, weights = of_heads(cell, N, T, B, D, units, dtype=torch.float32)
    weight_hh, hx, cx = [group[1].detach() for group in weights], hx.detach(), None if cx is None else cx.detach()
    G = ops.TRAITS[cell]["gates"]
    given = dict(cell=with_heads(cell, N), gates_x=[torch.randn(T, B, G * N * units) for _ in range(D)], weight_hh=weight_hh,
                 bias_hh=[torch.randn(G * N * units) for _ in range(D)], weight_hr=None, hx=hx, cx=cx, ragged=None, reset=None,
                 zoneout=None, hidden_mask=None, reset_hx=None, reset_cx=None, save=2, allow_tf32=False) | options  # fmt: skip
    output, hy, cy, saved, states = forward(*given.values())
    inner = cx is not None
    after = dict(cell=given["cell"], input=torch.randn(T, B, 4), weight_hh=weight_hh, weight_hr=None, hx=hx, cx=cx, output=output,
                 saved=saved, states=states, ragged=None, reset=None, zoneout=None, hidden_mask=None, reset_hx=None, reset_cx=None,
                 grad_output=torch.randn_like(output),
                 grad_hy=torch.randn_like(hy), grad_cy=torch.randn_like(cy) if inner else None, grad_states=None, need_grad_hx=True,
                 need_grad_cx=inner, need_grad_reset_hx=False, need_grad_reset_cx=False, need_grad_weight_ih=True, need_grad_weight_hh=True, need_grad_bias=True,
                 need_grad_weight_hr=False, allow_tf32=False)  # fmt: skip
    return given, after


@pytest.mark.parametrize("cell, N, D", [("lstm", 2, 2), ("gru", 3, 1), ("slstm", 2, 1)])
def test_opcheck(cell, N, D):
    given, after = operands(cell, N, D)
    torch.library.opcheck(forward, tuple(given.values()))
    torch.library.opcheck(backward, tuple(after.values()))
    check_fake(forward, given)
    check_fake(backward, after)
    shapes = [tuple(grad.shape) for grad in backward(*after.values())[-1]]
    G, H = ops.TRAITS[cell]["gates"], 5 * N
    assert shapes == [(G * H, 4), (G * H, 5), (G * H,), (G * H,), (0,)] * D


ERRORS = [
    (dict(cell="lstm:0"), "the heads of a cell must be a positive integer, got '0'"),
    (dict(cell="lstm:-2"), "the heads of a cell must be a positive integer, got '-2'"),
    (dict(cell="lstm:two"), "the heads of a cell must be a positive integer, got 'two'"),
    (dict(cell="lstm:"), "the heads of a cell must be a positive integer, got ''"),
    (dict(cell="lstm:99999999999999999999"), "the heads of a cell must be a positive integer, got '99999999999999999999'"),
    (dict(cell="lstm_norm:2"), "the cell lstm_norm has no heads, got 'lstm_norm:2'"),
    (dict(cell="indrnn:sigmoid,tanh,tanh,0,2"), "the cell indrnn has no heads"),
    (dict(cell="lstm:sigmoid,tanh,tanh,0,2"), "the cell lstm has no choice"),
    (dict(cell="lstm"), r"weight_hh must be \(G\*H, H\) = \(40, 10\), got \(40, 5\)"),
    (dict(cell="lstm:3"), "weight_hh must be of heads that divide its 10 units, got 3"),
    (dict(cell="lstm:5"), r"weight_hh must be \(G\*H, H/N\) = \(40, 2\), got \(40, 5\)"),
    (dict(weight_hr=[torch.zeros(4, 10)]), "only the lstm takes projections .weight_hr., and without heads"),
    (dict(hx=torch.zeros(2, 2, 5)), r"hx must be \(1, 2, 10\), got \(2, 2, 5\)"),
    (dict(gates_x=[torch.zeros(3, 2, 20)]), r"gates_x must be \(3, 2, 40\), got \(3, 2, 20\)"),
    (dict(bias_hh=[torch.zeros(20)]), r"bias_hh must be \(40,\), got \(20,\)"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", ERRORS)
def test_errors(wrong, message):
    with pytest.raises(RuntimeError, match=f"fusedrnn::recurrence_forward: {message}"):
        forward(*{**operands("lstm", 2, 1)[0], **wrong}.values())


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_derivatives(cell):
    input, hx, cx, weights = of_heads(cell, 2, 2, 1, 1, 2)
    leaves = [t for t in (input, hx, cx, *weights[0]) if t is not None]

    def run(*tensors):
        each = iter(tensors)
        some = [None if t is None else next(each) for t in (input, hx, cx, *weights[0])]
        return autograd.layer(with_heads(cell, 2), *some[:3], [tuple(some[3:])])[0]

    assert gradcheck(run, leaves) and gradgradcheck(run, leaves)


@pytest.mark.parametrize("kind, options", [("LSTM", dict(num_heads=4)), ("GRU", dict(num_heads=2, bidirectional=True)),
                                           ("SLSTM", dict(num_heads=3, num_layers=2))])  # fmt: skip
def test_a_layer_is_one_call(kind, options, monkeypatch):
    calls = []
    for name in ("recurrence_forward", "recurrence_backward", "recurrence_backward_"):
        real = getattr(fusedrnn.layer, name)
        monkeypatch.setattr(fusedrnn.layer, name, lambda *given, real=real, name=name: calls.append(name) or real(*given))
    getattr(fusedrnn, kind)(3, 12, **options)(torch.randn(5, 2, 3))[0].sum().backward()
    layers = options.get("num_layers", 1)
    assert [name.rstrip("_") for name in calls] == ["recurrence_forward"] * layers + ["recurrence_backward"] * layers


def test_torch_func_takes_heads():
    """A batch of calls is one with a larger batch."""
    module = fusedrnn.GRU(3, 8, num_heads=2).double()
    input = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    each = torch.func.vmap(lambda x: module(x)[0])(input)
    for one, x in itertools.zip_longest(each, input):
        torch.testing.assert_close(one, module(x)[0], rtol=0, atol=1e-12)
