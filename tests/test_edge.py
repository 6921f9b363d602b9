"""Numbers at the edge: saturation, infinities, NaN, denormals, and very long sequences."""

import pytest
import torch

from conftest import CELLS, make_pair, states_for
from fusedrnn.testing import compare_modules, compare_tensors, named_outputs, run_module

cells = pytest.mark.parametrize("cell", CELLS)
HUGE = {torch.float32: 1e30, torch.float64: 1e300, torch.bfloat16: 1e30, torch.float16: 6e4}
dtypes = pytest.mark.parametrize("dtype", HUGE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])  # a ReLU does not saturate
def test_saturation(cell, dtype, engine):
    """Inputs of 1e30 give no NaN, forward or backward, and torch.nn's numbers."""
    ours, stock = make_pair(cell, 4, 9, dtype=dtype)
    input = HUGE[dtype] * torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=dtype) * torch.ones(3, 2, 4, dtype=dtype)
    got = run_module(ours, input)
    assert all(t is None or t.isfinite().all() for name, t in got.items() if "weight_ih" not in name)
    expected = run_module(stock, input)
    for name in ("output", "hy"):
        row = compare_tensors(name, got[name], expected[name], expected[name].double(), torch.finfo(dtype).eps)
        assert row.passed, row


@dtypes
@cells
def test_infinity_and_nan_pass_as_in_torch(cell, dtype, engine):
    """One bad number in, the same pattern of NaN and infinity out, in values and gradients; other sequences untouched."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        ours, stock = make_pair(cell, 4, 9, dtype=dtype)
        input = torch.randn(4, 3, 4, dtype=dtype)
        input[1, 1, 2] = bad
        results = []
        for module in (ours, stock):
            leaf = input.clone().requires_grad_()
            results.append(run_module(module, leaf, wrt={"input": leaf}))
        for name in ("output", "hy"):
            a, b = results[0][name], results[1][name]
            assert torch.equal(a.isnan(), b.isnan()), (bad, name)
            assert torch.equal(a.isinf(), b.isinf()), (bad, name)
            assert a[:, [0, 2]].isfinite().all()
        assert results[0]["grad input"][:, [0, 2]].isfinite().all()
        if bad != bad:
            assert torch.equal(results[0]["grad input"].isnan(), results[1]["grad input"].isnan())


@cells
def test_nan_in_a_state_or_weight(cell, engine):
    ours, stock = make_pair(cell, 4, 9)
    hx = states_for(stock, 3)
    (hx[0] if cell == "lstm" else hx)[0, 1, 5] = float("nan")
    for module in (ours, stock):
        found = named_outputs(module(torch.ones(3, 3, 4), hx))
        assert found["output"][:, 1].isnan().any() and found["output"][:, [0, 2]].isfinite().all()
    with torch.no_grad():
        ours.weight_hh_l0[3, 2] = float("nan")
        stock.weight_hh_l0[3, 2] = float("nan")
    a, b = (named_outputs(m(torch.ones(3, 3, 4), states_for(m, 3)))["output"] for m in (ours, stock))
    assert a.isnan().any() and torch.equal(a.isnan(), b.isnan())


@dtypes
@cells
def test_denormals(cell, dtype, engine):
    """Numbers below the smallest normal are kept, unless the process flushes them."""
    ours, stock = make_pair(cell, 4, 9, dtype=dtype, bias=False)
    tiny = torch.finfo(dtype).smallest_normal / 4
    input = tiny * torch.tensor([1.0, -1.0, 2.0, 0.5]).to(dtype) * torch.ones(3, 2, 4, dtype=dtype)
    hx = torch.full((1, 2, 9), tiny, dtype=dtype)
    hx = (hx, hx.clone()) if cell == "lstm" else hx
    compare_modules(ours, stock, input, hx)
    got = named_outputs(ours(input, hx))["output"]
    # Of a processor with AVX512_BF16 torch's own bfloat16 are no measure: its products flush them.
    wide = tuple(state.double() for state in hx) if cell == "lstm" else hx.double()
    expected = named_outputs(stock.double()(input.double(), wide))["output"]
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * step)  # compare_modules lets more pass
    assert got.any() or dtype == torch.float16 or cell in ("lstm", "gru")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cells
def test_long_sequence(cell, dtype):
    """T = 4096: no drift beyond torch's."""
    torch.set_num_threads(1)  # oneDNN's LSTM meets at a barrier each step, which takes minutes on a busy machine
    ours, stock = make_pair(cell, 2, 5, dtype=dtype)
    if cell == "rnn_relu":
        with torch.no_grad():
            for parameter in (*ours.parameters(), *stock.parameters()):
                parameter.mul_(0.5)  # a ReLU network of the usual size explodes
    compare_modules(ours, stock, torch.randn(4096, 1, 2, dtype=dtype))
