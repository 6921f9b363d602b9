"""The cells that torch has not, at the operators: the engine against `fusedrnn.reference`, forward and every gradient.

The layers that run them are in tests/test_more_cells.py.
"""

import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fusedrnn import autograd, ops, reference
from fusedrnn.reference import GATE_FUNCTIONS, NO_CARRY, VALUE_FUNCTIONS, Choice
from test_carry import KINDS, begun, carry_of, compare

cells = pytest.mark.parametrize("cell", sorted(set(reference.CELLS) - {"rnn_tanh", "rnn_relu", "lstm", "gru"}))
close = torch.testing.assert_close


def choose(cell, draws, values=VALUE_FUNCTIONS):
    """The cell with a choice made by lot, if it has one."""
    if cell not in reference.CHOOSES:
        return cell
    return Choice(draws.choice(GATE_FUNCTIONS), draws.choice(values), draws.choice(values), draws.choice([0.0, 0.3])).of(cell)


def arguments(cell, T, B, D, H, unit=True, dtype=torch.float64):
    """(input, hx, cx, weights) that want gradients."""
    traits, I = ops.TRAITS[cell], 3
    G, inner = traits["gates"], traits["states"] - 1

    def make(*shape):
        return (0.4 * torch.randn(*shape, dtype=dtype)).requires_grad_()

    def fifth():
        return make(traits["unit"], H) if unit and traits["unit"] and traits["multiplies"] else None

    def bias():
        return None if traits["norms"] else make(G * H)

    rows = G * H if traits["multiplies"] else traits["unit"]
    weights = [(make(G * H, I), make(rows, H), bias(), bias(), fifth()) for _ in range(D)]
    cx = make(D, B, H) if inner == 1 else make(inner, D, B, H) if inner else None
    if cell == "slstm":
        with torch.no_grad():
            cx[1] = cx[1].abs() + 0.5  # the normaliser
    return make(T, B, I), make(D, B, H), cx, weights


def allowed(cell, kind):
    """Without a mask of h where h is not multiplied."""
    return kind if ops.TRAITS[cell]["multiplies"] else (*kind[:2], 0, kind[3])


@pytest.mark.parametrize("kind", [(0, "", 0, 0), (0, "", 0, 1), *KINDS[::4]], ids=str)
@cells
def test_engine_does_what_the_reference_does(cell, kind, engine):
    draws = random.Random(f"{cell} {kind}")
    for recompute, D, (T, B, H) in ((False, 2, (5, 3, 7)), (True, 1, (9, 2, 5)), (False, 1, (1, 4, 17)), (True, 2, (4, 5, 9))):
        S = ops.TRAITS[cell]["states"]
        carry, lengths = carry_of(cell, allowed(cell, kind), T, B, D, H, S=S)
        if carry.reset is not None and D == 2:
            carry = begun(carry, arguments(cell, T, B, D, H))
        compare(choose(cell, draws), arguments(cell, T, B, D, H, unit=draws.random() < 0.8), lengths, carry, recompute)


@pytest.mark.parametrize("threads", [1, 2, 3])
@cells
def test_larger(cell, threads, isa):
    torch.set_num_threads(threads)
    draws, S = random.Random(cell), ops.TRAITS[cell]["states"]
    carry, lengths = carry_of(cell, allowed(cell, (1, "each", 1, 1)), 40, 60, 1, 70, S=S)
    carry = begun(carry, arguments(cell, 40, 60, 1, 70))
    bounded = choose(cell, draws, ["tanh"])  # relu grows with the steps, and its rounding with it
    compare(bounded, arguments(cell, 40, 60, 1, 70), lengths, carry, recompute=True)
    compare(choose(cell, draws), arguments(cell, 7, 50, 2, 33), None, NO_CARRY, recompute=False)


@pytest.mark.parametrize("kind", [(0, "", 0, 0), (1, "each", 0, 1)], ids=str)
@cells
def test_gates_in_the_place_of_the_input(cell, kind, engine):
    """Without a weight_ih the input is the gates of all directions."""
    for recompute, D in ((False, 1), (True, 1), (False, 2), (True, 2)):
        _, hx, cx, weights = arguments(cell, 6, 3, D, 5)
        gates = torch.randn(6, 3, D * ops.TRAITS[cell]["gates"] * 5, dtype=torch.float64, requires_grad=True)
        weights = [(torch.empty(0, 0, dtype=torch.float64), group[1], None, None, group[4]) for group in weights]
        carry, lengths = carry_of(cell, kind, 6, 3, D, 5, S=ops.TRAITS[cell]["states"])
        compare(cell, (gates, hx, cx, weights), lengths, carry, recompute)


@cells
def test_packed(cell, engine):
    sizes = torch.tensor([4, 4, 3, 1, 1])
    _, hx, cx, weights = arguments(cell, 5, 4, 2, 6)
    data = torch.randn(int(sizes.sum()), 3, dtype=torch.float64, requires_grad=True)
    compare(choose(cell, random.Random(cell)), (data, hx, cx, weights), sizes, NO_CARRY, recompute=False)


@cells
def test_every_choice(cell):
    """Each function in each place, and with and without a limit."""
    given = arguments(cell, 6, 3, 1, 5)
    if cell not in reference.CHOOSES:
        with pytest.raises(RuntimeError, match="has no choice"):
            autograd.layer(Choice().of(cell), *given)
        return
    results = {}
    for gate in GATE_FUNCTIONS:
        for candidate in VALUE_FUNCTIONS:
            for output in VALUE_FUNCTIONS:
                for clip in (0.0, 0.1):
                    choice = Choice(gate, candidate, output, clip)
                    compare(choice.of(cell), given, None, NO_CARRY, recompute=False)
                    results[choice] = autograd.layer(choice.of(cell), *given)[0]
    different = {tuple(result.flatten().tolist()) for result in results.values()}
    used = {"lstm_general": 54, "lstm_coupled": 54, "gru_general": 9, "indrnn": 3, "gru_reset_before": 9}
    assert len(different) == used[cell], "choices that a cell has, and no others, make a difference"


@cells
def test_derivatives(cell):
    given = arguments(cell, 3, 2, 2, 3)
    leaves = [t for t in (*given[:3], *(t for group in given[3] for t in group)) if t is not None]

    def run(*tensors):
        rest = iter(tensors)
        take = [None if t is None else next(rest) for t in given[:3]]
        weights = [tuple(None if t is None else next(rest) for t in group) for group in given[3]]
        return [t for t in autograd.layer(cell, *take, weights)[:3] if t is not None]

    assert gradcheck(run, leaves, fast_mode=True) and gradgradcheck(run, leaves, fast_mode=True)


@cells
def test_narrow_formats(cell):
    """Against float64 on the same rounded numbers."""
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        given = arguments(cell, 6, 4, 2, 19, dtype=dtype)
        wide = [None if t is None else t.double() for t in given[:3]], [
            tuple(None if t is None else t.double() for t in group) for group in given[3]]  # fmt: skip
        found, exact = autograd.layer(cell, *given), autograd.layer(cell, *wide[0], wide[1])
        for got, want in zip(found, exact, strict=True):
            if got is not None:
                close(got.double(), want, rtol=tolerance, atol=tolerance)


@cells
def test_same_bits_with_any_number_of_threads(cell, isa):
    chosen, given = choose(cell, random.Random(1)), arguments(cell, 9, 37, 2, 66, dtype=torch.float32)
    leaves = [t for t in (*given[:3], *(t for group in given[3] for t in group)) if t is not None]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs = [t for t in autograd.layer(chosen, *given)[:3] if t is not None]
        results.append([*outputs, *torch.autograd.grad(sum((t * t).sum() for t in outputs), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_stabiliser_holds():
    """Pre-activations whose exponentials overflow, from the first step on."""
    input, _, _, weights = arguments("slstm", 6, 2, 1, 4, dtype=torch.float32)
    output, _, cy, _ = autograd.layer("slstm", input * 1e4, None, None, weights)
    output.sum().backward()
    assert output.isfinite().all() and (output.abs() <= 1).all() and cy.isfinite().all()
    assert all(t.grad.isfinite().all() for t in weights[0] if t is not None)


ERRORS = [
    ("lstm_general:tanh,tanh,tanh,0", "function of gates must be sigmoid, hard_sigmoid or hard_sigmoid_of_fifths, got 'tanh'"),
    ("lstm_general:sigmoid,sigmoid,tanh,0", "candidate and output must be tanh, relu or identity, got 'sigmoid'"),
    ("lstm_general:sigmoid,tanh,tanh,-1", "limit must be a number not below 0, got '-1'"),
    ("lstm_general:sigmoid,tanh", "must be 'gate,candidate,output,clip', got 'sigmoid,tanh'"),
]  # fmt: skip


@pytest.mark.parametrize("cell, message", ERRORS)
def test_errors(cell, message):
    with pytest.raises(RuntimeError, match=message):
        autograd.layer(cell, *arguments("lstm_general", 2, 2, 1, 3))


def test_errors_of_shapes():
    for cell, good in (("lstm_general", (3, 5)), ("lstm_coupled", (2, 5)), ("indrnn", (1, 5)), ("lstm_norm", (6, 5)),
                       ("gru_norm", (4, 5))):  # fmt: skip
        input, hx, cx, (group,) = arguments(cell, 2, 2, 1, 5)
        at = 1 if cell == "indrnn" else 4
        bad = [*group]
        bad[at] = torch.zeros(good[0] + 1, 5, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"must be \("):
            autograd.layer(cell, input, hx, cx, [bad])
    input, hx, cx, (group,) = arguments("slstm", 2, 2, 1, 5)
    with pytest.raises(RuntimeError, match="only the lstm takes projections"):
        autograd.layer("slstm", input, hx, cx, [(*group[:4], torch.zeros(5, 5, dtype=torch.float64))])
