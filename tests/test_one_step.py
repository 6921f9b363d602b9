"""The operators for one step of a cell or a layer, forward and backward."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import CELLS
from fusedrnn import reference
from fusedrnn.ops import TRAITS
from test_ops import GATES

cell_forward, cell_backward = torch.ops.fusedrnn.cell_forward, torch.ops.fusedrnn.cell_backward
cells = pytest.mark.parametrize("cell", CELLS)


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
