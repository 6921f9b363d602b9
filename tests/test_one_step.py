"""The operators for one step of a cell, forward and backward, and when the cells call them."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from conftest import CELLS
from fusedrnn import autograd, layer, one_step, reference
from fusedrnn.ops import TRAITS
from test_ops import GATES

cell_forward, cell_backward = torch.ops.fusedrnn.cell_forward, torch.ops.fusedrnn.cell_backward
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
    want, (hy, cy, *rest) = expected(*given.values()), cell_forward(*given.values())
    assert [one.shape for one in rest] == [(0,)] * 3
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
    ("cell", "lstm_norm", "cell must multiply its state first of all, not normalise it, and have no more than two, got lstm_norm"),
    ("cell", "indrnn", "weight_hh must be"),
    ("input", torch.zeros(2, 6, 11), r"input must be \(B, features\) or \(features\), or of one step .* got \(2, 6, 11\)"),
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
    given = arguments("lstm", 3, I=5, H=7)
    with FlopCounterMode(display=False) as counter:
        cell_forward(*given.values())
    assert counter.get_total_flops() == 2 * 3 * 4 * 7 * (5 + 7)
    for hx, ih, hh in itertools.product((True, False), repeat=3):
        made = backward_arguments(given, need_hx=hx, need_ih=ih, need_hh=hh)
        with FlopCounterMode(display=False) as counter:
            cell_backward(*made)
        assert counter.get_total_flops() == 2 * 3 * 4 * 7 * (7 * hx + 5 * ih + 7 * hh)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


def backward_arguments(given, grad_hy=True, grad_cy=True, need_hx=True, need_cx=True, need_ih=True, need_hh=True, need_bias=True):
    """Those of cell_backward after a call of cell_forward, with gradients at random."""
    hy, cy, output, saved, states = cell_forward(*given.values(), save=True)
    assert torch.equal(output, hy) and output.data_ptr() != hy.data_ptr() or not hy.numel()
    inner = given["cell"].startswith("lstm")
    grads = [torch.randn_like(state) if there else None for state, there in ((hy, grad_hy), (cy, grad_cy and inner))]
    return [given["cell"], given["input"], given["hx"], given["cx"], given["weight_hh"], output, saved, states, *grads, need_hx, need_cx and inner,
            need_ih, need_hh, need_bias]


def expected_gradients(given, grad_hy, grad_cy):
    """Of hx, cx, weight_ih, weight_hh and the biases, by autograd through the loop in plain torch, in float64; and of the input."""
    names = ("hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "input")
    double = {name: t.double().requires_grad_() if torch.is_tensor(t) else t for name, t in given.items()}
    results = expected(*double.values())
    chosen = [(y, g.double()) for y, g in zip(results, (grad_hy, grad_cy)) if g is not None]
    there = [name for name in names if double[name] is not None]
    grads = torch.autograd.grad([y for y, _ in chosen], [double[name] for name in there], [g for _, g in chosen], allow_unused=True)
    return dict(zip(there, grads))


def check_gradients(given, **options):
    arguments = backward_arguments(given, **options)
    grad_hy, grad_cy, *needs = arguments[8:]
    grad_pre, *got = cell_backward(*arguments)
    want = expected_gradients(given, grad_hy, grad_cy)
    gates = grad_pre[:, : given["weight_ih"].shape[0]].double()
    assert len(gates) == (1 if given["input"].dim() == 1 else len(given["input"]))
    got = dict(zip(("hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"), got))
    got["input"] = (gates @ given["weight_ih"].double()).view(given["input"].shape)
    need = dict(zip(("hx", "cx", "weight_ih", "weight_hh", "bias_ih"), needs))
    need |= {"bias_hh": need["bias_ih"], "input": True}
    eps = torch.finfo(grad_pre.dtype).eps
    for name, one in got.items():
        if not need[name]:
            assert one.shape == (0,)
        elif name in want:
            other = torch.zeros_like(given[name], dtype=torch.float64) if want[name] is None else want[name]
            assert one.shape == other.shape
            if other.numel():
                allowed = (4 if eps > 1e-4 else 64) * eps * other.abs().max().clamp(min=1)
                assert (one.double() - other).abs().max() <= allowed, name


@pytest.mark.parametrize("rows", [(), (1,), (2,), (15,), (33,), (150,), (0,)], ids=str)
@cells
def test_gradients_are_those_of_the_reference(isa, cell, rows):
    for options in ({}, dict(states=False), dict(bias=False), dict(H=1, I=1), dict(H=64, I=64), dict(H=16, I=70)):
        check_gradients(arguments(cell, *rows, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@cells
def test_gradients_in_other_formats(isa, cell, dtype):
    for rows in ((), (5,), (40,)):
        check_gradients(arguments(cell, *rows, dtype=dtype))


@cells
def test_any_of_the_gradients(cell):
    names = ("grad_hy", "grad_cy", "need_hx", "need_cx", "need_ih", "need_hh", "need_bias")
    for chosen in itertools.product((True, False), repeat=len(names)):
        if any(chosen[:2]) and (cell == "lstm" or chosen[0]):
            check_gradients(arguments(cell, 3), **dict(zip(names, chosen)))


def test_strided_gradients():
    given = backward_arguments(arguments("lstm", 6))
    want = cell_backward(*given)
    for place, tensor in enumerate(given):
        if torch.is_tensor(tensor) and tensor.dim() > 1:
            strided = torch.cat([tensor, torch.full_like(tensor, float("nan"))], -1)[..., : tensor.shape[-1]]
            for one, other in zip(cell_backward(*given[:place], strided, *given[place + 1 :]), want):
                assert torch.equal(one, other)


@cells
def test_opcheck_of_backward(cell):
    for rows in ((), (3,), (1, 3), (3, 1)):
        given = arguments(cell, *rows)
        if len(rows) > 1:
            given |= {name: state.view(1, 3, -1) for name, state in given.items() if name in ("hx", "cx") and state is not None}
        torch.library.opcheck(cell_forward.default, (*given.values(), True))
        torch.library.opcheck(cell_backward.default, tuple(backward_arguments(given)))
        torch.library.opcheck(cell_backward.default, tuple(backward_arguments(given, need_hx=False, need_ih=False)))


@pytest.mark.parametrize("cell", ["lstm_general", "lstm_coupled", "gru_general"])
def test_opcheck_of_cells_of_choice(cell):
    """Whose units may have numbers of their own, which have gradients beside those of the gates."""
    H, gates = 6, TRAITS[cell]["gates"]
    given = arguments("gru" if cell.startswith("gru") else "lstm", 3, H=H)
    given |= {"cell": cell} | {name: weight[: gates * H] for name, weight in given.items() if name.startswith(("weight", "bias"))}
    torch.library.opcheck(cell_forward.default, (*given.values(), True))
    torch.library.opcheck(cell_backward.default, tuple(backward_arguments(given)))


BACKWARD_ERRORS = [
    (0, "lstm_norm", "cell must multiply its state first of all, not normalise it, and have no more than two, got lstm_norm"),
    (0, "slstm", "cell must multiply its state first of all, not normalise it, and have no more than two, got slstm"),
    (1, torch.zeros(5, 11), r"input must have 2 dimensions and 6 rows, got \(5, 11\)"),
    (2, torch.zeros(5, 37), r"hx must be \(6, 37\), got \(5, 37\)"),
    (5, torch.zeros(2, 6, 37), r"output must be \(B, features\) or .* got \(2, 6, 37\)"),
    (5, torch.zeros(1, 6, 37), r"hx must be \(1, 6, 37\), got \(6, 37\)"),
    (6, torch.zeros(6, 37), r"saved must be \(6, [0-9]+, 37\), got \(6, 37\)"),
    (7, torch.zeros(0), r"states must be \(6, 1, 37\), got \(0,\)"),
    (8, torch.zeros(6, 36), r"grad_hy must be \(6, 37\), got \(6, 36\)"),
    (9, torch.zeros(6, 37).double(), "grad_cy must be Float like weight_hh, got Double"),
]


@pytest.mark.parametrize("place, value, text", BACKWARD_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_of_backward(place, value, text):
    given = backward_arguments(arguments("lstm", 6))
    with pytest.raises(RuntimeError, match=f"fusedrnn::cell_backward: {text}"):
        cell_backward(*given[:place], value, *given[place + 1 :])


def test_gradients_of_cell_states_are_for_the_lstm():
    given = backward_arguments(arguments("gru", 6))
    for place, value in ((9, torch.zeros(6, 37)), (11, True)):
        with pytest.raises(RuntimeError, match="grad_cy and need_grad_cx are for cells of more than one state"):
            cell_backward(*given[:place], value, *given[place + 1 :])


# ---------------------------------------------------------------------------------------------------------------------
# The cells
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The cells of which one step went to the operator."""
    names, real = [], one_step.cell_forward
    monkeypatch.setattr(one_step, "cell_forward", lambda cell, *given: names.append(cell) or real(cell, *given))
    return names


@contextlib.contextmanager
def as_a_sequence():
    """Where a step is one of many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "one_step", lambda *given: None)
        patch.setattr(autograd, "_is_one_step", lambda *given: False)
        yield


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
def test_cells_take_it_in_training(kind, calls):
    """With the gradients that they have as a sequence of one step, whoever's are wanted, and twice."""
    for bias, shape, given in itertools.product((True, False), ((9,), (4, 9), (0, 9)), (True, False)):
        cell = getattr(fusedrnn, kind)(9, 21, bias=bias)
        input = torch.randn(shape, requires_grad=True)
        states = [torch.randn(*shape[:-1], 21, requires_grad=True) for _ in range(1 + (kind == "LSTMCell"))] if given else []
        hx = None if not given else tuple(states) if kind == "LSTMCell" else states[0]
        variables = [input, *states, *cell.parameters()]
        calls.clear()
        results = flat(cell(input, hx))
        assert len(calls) == 1 and all(result.requires_grad and result._base is None for result in results)
        with as_a_sequence():
            likewise = flat(cell(input, hx))
        assert len(calls) == 1
        grads = [torch.randn_like(result) for result in results]
        for outputs, some in ((slice(None), variables), (slice(1), variables[:1]), (slice(-1, None), variables[-2:]), (slice(None), variables)):
            both = [torch.autograd.grad(of[outputs], some, grads[outputs], retain_graph=True) for of in (results, likewise)]
            for one, other in zip(*both):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@kinds
def test_gradients_of_gradients(kind):
    for rows, given in itertools.product(((), (2,)), (True, False)):
        cell = getattr(fusedrnn, kind)(3, 5, dtype=torch.float64)
        input = torch.randn(*rows, 3, dtype=torch.float64, requires_grad=True)
        states = [torch.randn(*rows, 5, dtype=torch.float64, requires_grad=True) for _ in range((1 + (kind == "LSTMCell")) * given)]

        def run(input, *rest, cell=cell, count=len(states)):
            states, weights = rest[:count], rest[count:]
            hx = None if not states else states if len(states) > 1 else states[0]
            return torch.func.functional_call(cell, dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights)), (input, hx))

        variables = (input, *states, *cell.parameters())
        assert torch.autograd.gradcheck(run, variables, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, variables)


@kinds
def test_not_within_transforms(kind, calls):
    cell, input = getattr(fusedrnn, kind)(9, 21), torch.randn(4, 9)
    assert torch.func.grad(lambda x: flat(cell(x))[0].sum())(input).shape == (4, 9)
    with torch.autograd.forward_ad.dual_level(), pytest.warns(UserWarning, match="no forward-mode derivative"):
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones(4, 9))
        assert torch.autograd.forward_ad.unpack_dual(flat(cell(dual))[0]).tangent is not None
    assert not calls


@kinds
def test_gradients_under_hooks_and_checkpoints(kind, calls):
    cell, input = getattr(fusedrnn, kind)(9, 21), torch.randn(4, 9, requires_grad=True)

    def gradients(call):
        calls.clear()
        output = call(input)
        found = torch.autograd.grad(flat(output)[0].sum(), [input, *cell.parameters()])
        assert calls
        return found

    want = gradients(cell)
    with torch.autograd.graph.save_on_cpu():
        hooked = gradients(cell)
    saved = gradients(lambda x: torch.utils.checkpoint.checkpoint(cell, x, use_reentrant=False))
    for one, two, three in zip(want, hooked, saved):
        assert torch.equal(one, two) and torch.equal(one, three)


@kinds
def test_edits_of_what_it_saved_are_noticed(kind):
    for edited in ("input", "weight_hh"):
        cell, input = getattr(fusedrnn, kind)(9, 21), torch.randn(4, 9)
        loss = flat(cell(input))[0].sum()
        with torch.no_grad():
            {"input": input, "weight_hh": cell.weight_hh}[edited].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell", "RNN", "LSTM", "GRU"])
def test_states_may_be_edited(kind):
    """In place, as they are where an episode ends, with the gradients that copies of them have."""
    module, found = getattr(fusedrnn, kind)(9, 21), []
    inputs = torch.randn(3, *(() if "Cell" in kind else (1,)), 4, 9)
    for in_place in (True, False):
        state, total = None, 0
        for input in inputs:
            result = module(input, state)
            states = list(flat(result if "Cell" in kind else result[1]))
            total = total + sum((each * 3).sum() for each in states)
            if not in_place:
                states = [each.clone() for each in states]
            for each in states:
                each[..., 0, :] = 0
                each += 1
            state = tuple(states) if "LSTM" in kind else states[0]
        found.append(torch.autograd.grad(total + state[0].sum(), list(module.parameters())))
    for one, other in zip(*found):
        assert torch.equal(one, other)


@kinds
def test_not_for_who_looks_on(kind, calls):
    cell = getattr(fusedrnn, kind)(9, 21)
    with torch.no_grad():
        want = flat(cell(torch.ones(4, 9)))[0]
        assert len(calls) == 1
        torch.testing.assert_close(flat(torch.compile(cell, backend="eager")(torch.ones(4, 9)))[0], want)
        torch.testing.assert_close(torch.vmap(lambda x: flat(cell(x))[0])(torch.ones(4, 9)), want)
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

    module = getattr(fusedrnn, kind)(9, 21)
    module(torch.randn(layer.MANY_ROWS, 9))
    assert len(calls) == 1
    module(torch.randn(layer.MANY_ROWS + 1, 9))  # the gradients of its weights may be a library's
    assert len(calls) == 1
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
def test_gradients_are_as_accurate_as_torchs(kind):
    ours, stock = pair(kind, 64, 128)
    exact = getattr(nn, kind)(64, 128).double()
    exact.load_state_dict(stock.state_dict())
    input, state = torch.randn(40, 64), torch.randn(40, 128)
    found = []
    for cell in (ours, stock, exact):
        x, h = (t.to(cell.weight_hh.dtype).requires_grad_() for t in (input, state))
        loss = sum(result.square().sum() for result in flat(cell(x, (h, h) if kind == "LSTMCell" else h)))
        found.append(torch.autograd.grad(loss, [x, h, *cell.parameters()]))
    for got, torchs, want in zip(*found):
        few_ulp = 4 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (torchs - want).abs().max() + few_ulp


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
    """An operator takes the input; what comes of it is what a library's product gives, in training too."""
    fed, real, real_step = [], layer.recurrence_forward, one_step.cell_forward
    monkeypatch.setattr(layer, "recurrence_forward", lambda *given: fed.append(len(given) > 15) or real(*given))
    monkeypatch.setattr(one_step, "cell_forward", lambda *given: fed.append(True) or real_step(*given))
    for options in ({}, dict(bidirectional=True, batch_first=True), dict(save="states")):
        module = getattr(fusedrnn, kind)(9, 40, dtype=dtype, **options)
        input = torch.randn((rows, 1, 9) if options.get("batch_first") else (1, rows, 9), dtype=dtype, requires_grad=True)
        found = []
        for wanted in (True, False):
            fed.clear()
            if not wanted:
                for home in (layer, autograd):
                    monkeypatch.setattr(home, "is_for_one_step", lambda *given: False)
            output = module(input)[0]
            found.append((output, *torch.autograd.grad(output.float().sum(), [input, *module.parameters()])))
            assert fed and all(fed) == any(fed) == (taken and wanted)
        monkeypatch.undo()
        monkeypatch.setattr(layer, "recurrence_forward", lambda *given: fed.append(len(given) > 15) or real(*given))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_traits_have_all_cells_of_torch():
    assert {"rnn_tanh", "rnn_relu", "lstm", "gru"} == set(CELLS) <= set(TRAITS)


LAYERS = [("RNN", {}), ("RNN", dict(nonlinearity="relu", bias=False)), ("LSTM", {}), ("GRU", dict(bias=False)), ("GRU", dict(num_heads=3)),
          ("LSTM", dict(coupled=True)), ("LSTM", dict(num_layers=2)), ("GRU", dict(num_layers=2, batch_first=True))]


@pytest.mark.parametrize("kind, options", LAYERS, ids=str)
def test_layers_give_what_a_longer_call_gives(kind, options, calls):
    """Values, shapes, strides and gradients; output and hy are two tensors, as torch's are."""
    module = getattr(fusedrnn, kind)(9, 21, **options)
    for rows, given in itertools.product((1, 4, 0), (True, False)):
        shape = (rows, 1, 9) if module.batch_first else (1, rows, 9)
        input = torch.randn(shape, requires_grad=True)
        states = [torch.randn(module.num_layers, rows, 21, requires_grad=True) for _ in range((1 + (kind == "LSTM")) * given)]
        hx = None if not given else tuple(states) if kind == "LSTM" else states[0]
        calls.clear()
        output, hidden = module(input, hx)
        assert len(calls) == module.num_layers
        with as_a_sequence():
            other_output, other_hidden = module(input, hx)
        assert len(calls) == module.num_layers
        results, likewise = (output, *flat(hidden)), (other_output, *flat(other_hidden))
        for one, other in zip(results, likewise):
            assert torch.equal(one, other) and one.stride() == other.stride()
        assert output.untyped_storage().data_ptr() != results[1].untyped_storage().data_ptr() or not rows
        variables = [input, *states, *module.parameters()]
        for outputs in (slice(None), slice(1), slice(1, 2), slice(-1, None)):
            if outputs.start and len(results) == 2 and outputs.stop is None:
                continue
            grads = [torch.randn_like(one) for one in results[outputs]]
            both = [torch.autograd.grad(of[outputs], variables, grads, retain_graph=True, allow_unused=True) for of in (results, likewise)]
            for one, other in zip(*both):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            for one, other in zip(results, (lambda o, h: (o, *flat(h)))(*module(input, hx))):
                assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_second_derivatives_of_layers(kind):
    module = getattr(fusedrnn, kind)(3, 5, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def run(input, h, *weights):
        hx = (h, 2 * h) if kind == "LSTM" else h
        output, hidden = torch.func.functional_call(module, dict(zip(names, weights)), (input, hx))
        return output, *flat(hidden)

    variables = (torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True),
                 *module.parameters())
    assert torch.autograd.gradcheck(run, variables, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, variables)


@pytest.mark.parametrize("kind, options", [
    ("LSTM", dict(bidirectional=True)), ("LSTM", dict(proj_size=2)), ("LSTM", dict(peepholes=True)), ("LSTM", dict(save="states")),
    ("GRU", dict(zoneout=0.1)), ("GRU", dict(reset_after=False)), ("SLSTM", {}), ("IndRNN", {}), ("LayerNormGRU", {}),
], ids=str)  # fmt: skip
def test_not_for_layers_of_more(kind, options, calls):
    module = getattr(fusedrnn, kind)(9, 21, **options)
    module(torch.randn(1, 4, 9))
    module(torch.randn(4, 9))  # four steps
    assert not calls


def test_not_for_calls_of_more(calls):
    module = fusedrnn.GRU(9, 21)
    module(torch.randn(1, 4, 9), lengths=torch.ones(4, dtype=torch.int64))
    module(torch.randn(1, 4, 9), return_states=True)
    module(torch.randn(1, 4, 9), reset=torch.zeros(1, 4, dtype=torch.bool))
    module(torch.nn.utils.rnn.pack_sequence([torch.randn(1, 9)]))
    assert fusedrnn.functional.gru(torch.randn(1, 4, 0), None, [torch.randn(63, 0), torch.randn(63, 21)], has_biases=False)[0].shape == (1, 4, 21)
    assert not calls
