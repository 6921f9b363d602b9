"""The operator for one step of a cell without derivatives, and when the cells call it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from conftest import CELLS
from fusedrnn import autograd, layer, reference
from fusedrnn.ops import TRAITS
from test_ops import GATES

cell_forward = torch.ops.fusedrnn.cell_forward
cells = pytest.mark.parametrize("cell", CELLS)
kinds = pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])


def arguments(cell, *rows, I=11, H=37, states=True, bias=True, dtype=torch.float32):  # noqa: E741
    def make(*shape):
        return (0.5 * torch.randn(*shape, dtype=torch.float64)).to(dtype)

    gates = GATES[cell] * H
    return dict(
        cell=cell, input=make(*rows, I), hx=make(*rows, H) if states else None,
        cx=make(*rows, H) if states and cell == "lstm" else None, weight_ih=make(gates, I), weight_hh=make(gates, H),
        bias_ih=make(gates) if bias else None, bias_hh=make(gates) if bias else None,
    )  # fmt: skip


def expected(cell, input, hx, cx, *weights):
    """(hy, cy) of the loop in plain torch, in float64."""
    rows, (input, hx, cx, *weights) = input.shape[:-1], (None if t is None else t.double() for t in (input, hx, cx, *weights))
    as_layer = (None if t is None else t.reshape(1, rows.numel(), t.shape[-1]) for t in (input, hx, cx))
    _, hy, cy, _ = reference.layer(cell, *as_layer, [(*weights, None)], None, False)
    return [state.reshape(*rows, hy.shape[-1]) for state in (hy, cy) if state is not None]


def check(given):
    want, (hy, cy) = expected(*given.values()), cell_forward(*given.values())
    got = [hy, cy] if given["cell"] == "lstm" else [hy]
    assert given["cell"] == "lstm" or cy.shape == (0,)
    assert len(got) == len(want)
    eps = torch.finfo(got[0].dtype).eps
    for one, other in zip(got, want):
        assert one.shape == other.shape and one.dtype == given["input"].dtype
        if other.numel():
            allowed = (0.6 if eps > 1e-4 else 64) * eps * other.abs().max().clamp(min=1)
            assert (one.double() - other).abs().max() <= allowed


@pytest.mark.parametrize("rows", [(), (1,), (2,), (3,), (15,), (16,), (33,), (150,), (0,)], ids=str)
@cells
def test_is_the_step_of_the_reference(isa, cell, rows):
    for options in ({}, dict(states=False), dict(bias=False), dict(H=1, I=1), dict(H=64, I=64), dict(H=16, I=70)):
        check(arguments(cell, *rows, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@cells
def test_formats(isa, cell, dtype):
    for rows in ((), (5,), (40,)):
        check(arguments(cell, *rows, dtype=dtype))


@cells
def test_same_bits_on_more_threads(cell):
    for rows in ((), (7,), (64,)):
        given = arguments(cell, *rows, I=300, H=256)
        torch.set_num_threads(1)
        want = cell_forward(*given.values())
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for one, other in zip(cell_forward(*given.values()), want):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_strided():
    given = arguments("lstm", 6)
    want = cell_forward(*given.values())
    for name in ("input", "hx", "cx", "weight_ih", "weight_hh"):
        apart = given[name].t().contiguous().t()
        gaps = torch.cat([given[name], torch.full_like(given[name], float("nan"))], -1)[:, : given[name].shape[1]]
        for strided in (apart, gaps):
            for one, other in zip(cell_forward(*(given | {name: strided}).values()), want):
                assert torch.equal(one, other)


ERRORS = [
    ("cell", "foo", "cell must be one of"),
    ("cell", "lstm_norm", "cell must multiply its state first of all, and not normalise it, got lstm_norm"),
    ("cell", "indrnn", "weight_hh must be"),
    ("input", torch.zeros(2, 6, 11), r"input must be \(B, features\) or \(features\), got \(2, 6, 11\)"),
    ("input", torch.zeros(6, 12), r"weight_ih must be \(148, 12\), got \(148, 11\)"),
    ("input", torch.zeros(6, 0), r"input must have features, got \(6, 0\)"),
    ("input", torch.zeros(6, 11).double(), "input must be Float like weight_hh, got Double"),
    ("input", torch.zeros(11), r"hx must be \(37,\), got \(6, 37\)"),
    ("hx", torch.zeros(5, 37), r"hx must be \(6, 37\), got \(5, 37\)"),
    ("cx", torch.zeros(1, 6, 37), r"cx must be \(6, 37\), got \(1, 6, 37\)"),
    ("weight_hh", torch.zeros(148, 36), "weight_hh must be"),
    ("weight_hh", torch.zeros(148, 37).int(), "weight_hh must be float32, float64, bfloat16 or float16, got Int"),
    ("bias_ih", torch.zeros(147), r"bias_ih must be \(148,\), got \(147,\)"),
    ("bias_hh", torch.zeros(148).half(), "bias_hh must be Float like weight_hh, got Half"),
]


@pytest.mark.parametrize("name, value, text", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(name, value, text):
    with pytest.raises(RuntimeError, match=f"fusedrnn::cell_forward: {text}"):
        cell_forward(*(arguments("lstm", 6) | {name: value}).values())


def test_cell_states_are_for_the_lstm():
    with pytest.raises(RuntimeError, match="cx is for cells of more than one state"):
        cell_forward(*(arguments("gru", 6) | dict(cx=torch.zeros(6, 37))).values())


@cells
def test_opcheck(cell):
    for rows in ((), (3,)):
        for options in ({}, dict(states=False, bias=False)):
            torch.library.opcheck(cell_forward.default, tuple(arguments(cell, *rows, **options).values()))


def test_flops():
    with FlopCounterMode(display=False) as counter:
        cell_forward(*arguments("lstm", 3, I=5, H=7).values())
    assert counter.get_total_flops() == 2 * 3 * 4 * 7 * (5 + 7)


# ---------------------------------------------------------------------------------------------------------------------
# The cells
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The cells of which one step went to the operator."""
    names, real = [], autograd.cell_forward
    monkeypatch.setattr(autograd, "cell_forward", lambda cell, *given: names.append(cell) or real(cell, *given))
    return names


def pair(kind, *args, **kwargs):
    stock = getattr(nn, kind)(*args, **kwargs)
    ours = getattr(fusedrnn, kind)(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def flat(result):
    return result if isinstance(result, tuple) else (result,)


@kinds
def test_cells_take_it_where_nobody_wants_a_derivative(kind, calls):
    for bias in (True, False):
        ours, stock = pair(kind, 9, 21, bias=bias)
        for shape in ((9,), (4, 9), (0, 9)):
            input = torch.randn(shape)
            state = torch.randn(*shape[:-1], 21)
            for hx in (None, (state, state) if kind == "LSTMCell" else state):
                for context in (torch.no_grad(), torch.inference_mode()):
                    with context:
                        got, want = flat(ours(input, hx)), flat(stock(input, hx))
                    assert len(got) == len(want)
                    for one, other in zip(got, want):
                        torch.testing.assert_close(one, other)
                        assert one.is_contiguous() and one._base is None
    assert len(calls) == 2 * 3 * 2 * 2
    for weight in ours.parameters():
        weight.requires_grad_(False)
    assert not flat(ours(torch.randn(4, 9)))[0].requires_grad and len(calls) == 25


@kinds
def test_not_where_a_derivative_is_wanted(kind, calls):
    cell, input = getattr(fusedrnn, kind)(9, 21), torch.randn(4, 9)
    flat(cell(input))[0].sum().backward()
    assert cell.weight_hh.grad is not None
    for weight in cell.parameters():
        weight.requires_grad_(False)
    flat(cell(input.requires_grad_()))[0].sum().backward()
    assert input.grad is not None
    assert torch.func.grad(lambda x: flat(cell(x))[0].sum())(input.detach()).shape == (4, 9)
    with torch.autograd.forward_ad.dual_level(), pytest.warns(UserWarning, match="no forward-mode derivative"):
        dual = torch.autograd.forward_ad.make_dual(input.detach(), torch.ones(4, 9))
        assert torch.autograd.forward_ad.unpack_dual(flat(cell(dual))[0]).tangent is not None
    assert not calls


@kinds
def test_not_for_who_looks_on(kind, calls):
    cell = getattr(fusedrnn, kind)(9, 21)
    with torch.no_grad():
        want = flat(cell(torch.ones(4, 9)))[0]
        assert len(calls) == 1
        torch.testing.assert_close(flat(torch.compile(cell, backend="eager")(torch.ones(4, 9)))[0], want)
        torch.testing.assert_close(torch.vmap(lambda x: flat(cell(x))[0])(torch.ones(4, 9)), want)
        with torch.autocast("cpu"):
            cell(torch.ones(4, 9))
        with FlopCounterMode(display=False):
            cell(torch.ones(4, 9))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert flat(cell(torch.ones(4, 9)))[0].shape == (4, 21)
        assert flat(cell.to("meta")(torch.ones(4, 9, device="meta")))[0].shape == (4, 21)
    assert len(calls) == 1


@kinds
def test_not_where_it_is_no_gain(kind, calls, monkeypatch):
    def taken(rows, I, H, dtype=torch.float32):  # noqa: E741
        calls.clear()
        getattr(fusedrnn, kind)(I, H, dtype=dtype)(torch.randn(rows, I, dtype=dtype))
        return bool(calls)

    wide = {"RNNCell": 1040, "LSTMCell": 520, "GRUCell": 600}[kind]  # weight_ih has more than a million numbers
    with torch.no_grad():
        assert taken(300, 64, 64) and taken(20, wide, wide) and not taken(30, wide, wide)
        assert taken(16, 64, 256, torch.bfloat16) and not taken(17, 64, 256, torch.bfloat16)
        for slow in (True, False):
            monkeypatch.setattr("fusedrnn.layer.HALF_IS_SLOW", slow)
            assert taken(16, 64, 256, torch.float16) and taken(17, 64, 256, torch.float16) == slow
        monkeypatch.setenv("FUSEDRNN_CPU_ISA", "baseline")
        assert taken(16, 64, 256) and not taken(17, 64, 256)


@kinds
def test_is_as_accurate_as_torch(kind):
    """Against float64, over a hundred steps of its own states."""
    ours, stock = pair(kind, 64, 128)
    exact = getattr(nn, kind)(64, 128).double()
    exact.load_state_dict(stock.state_dict())
    inputs, states = torch.randn(100, 8, 64), [None] * 3
    with torch.no_grad():
        for input in inputs:
            states = [cell(input.to(cell.weight_hh.dtype), state) for cell, state in zip((ours, stock, exact), states)]
    got, torchs, want = (torch.cat(flat(state)).double() for state in states)
    assert (got - want).abs().max() <= 2 * (torchs - want).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, rows, taken", [("LSTM", 1, True), ("GRU", 16, True), ("RNN", 16, True), ("LayerNormLSTM", 1, False)])
def test_layers_of_one_step(kind, rows, taken, dtype, monkeypatch):
    """The recurrence's operator takes the input; what comes of it is what a library's product gives, in training too."""
    fed, real = [], layer.recurrence_forward
    monkeypatch.setattr(layer, "recurrence_forward", lambda *given: fed.append(len(given) > 15) or real(*given))
    for options in ({}, dict(bidirectional=True, batch_first=True), dict(save="states")):
        module = getattr(fusedrnn, kind)(9, 40, dtype=dtype, **options)
        input = torch.randn((rows, 1, 9) if options.get("batch_first") else (1, rows, 9), dtype=dtype, requires_grad=True)
        found = []
        for wanted in (True, False):
            fed.clear()
            if not wanted:
                monkeypatch.setattr(layer, "is_for_one_step", lambda *given: False)
            output = module(input)[0]
            found.append((output, *torch.autograd.grad(output.float().sum(), [input, *module.parameters()])))
            assert fed and all(fed) == any(fed) == (taken and wanted)
        monkeypatch.undo()
        monkeypatch.setattr(layer, "recurrence_forward", lambda *given: fed.append(len(given) > 15) or real(*given))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_traits_have_all_cells_of_torch():
    assert {"rnn_tanh", "rnn_relu", "lstm", "gru"} == set(CELLS) <= set(TRAITS)
