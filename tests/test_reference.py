"""fusedrnn/reference.py, the readable truth, against torch.nn in float64, and its steps against torch's cells."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from conftest import CELLS, kind_of, make_pair, states_for
from fusedrnn import autograd, reference
from fusedrnn.testing import named_outputs
from same import compare

cells = pytest.mark.parametrize("cell", CELLS)
OPTIONS = [dict(), dict(bidirectional=True), dict(bias=False), dict(batch_first=True)]
OPTIONS += [dict(proj_size=3), dict(proj_size=2, bidirectional=True)]
CELLS_AND_OPTIONS = [(cell, o) for cell in CELLS for o in OPTIONS if cell == "lstm" or "proj_size" not in o]


def weights_of(module):
    """The weights of layer 0 as reference.layer takes them."""
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [tuple(getattr(module, f"{name}_l0{suffix}", None) for name in names) for suffix in suffixes]


@pytest.mark.parametrize("layer", [reference.layer, autograd.layer], ids=["reference", "engine"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cell, options", CELLS_AND_OPTIONS, ids=str)
def test_layer(cell, options, given, layer):
    """Both faces of a layer, reference and engine, have one signature and one result."""
    _, stock = make_pair(cell, 3, 5, dtype=torch.float64, **options)
    input = torch.randn(4, 4, 3, dtype=torch.float64)
    hx = states_for(stock, 4)
    h, c = hx if cell == "lstm" else (hx, None)
    output, hy, cy, _ = layer(cell, input, h if given else None, c if given else None, weights_of(stock),
                           batch_first=stock.batch_first)  # fmt: skip
    expected = named_outputs(stock(input, hx if given else None))
    torch.testing.assert_close(output.transpose(0, 1) if stock.batch_first else output, expected["output"])
    torch.testing.assert_close(hy, expected["hy"])
    assert output.shape[:2] == (4, 4) and (output.stride(0) >= output.stride(1) or layer is reference.layer)
    if cell == "lstm":
        torch.testing.assert_close(cy, expected["cy"])
    else:
        assert cy is None


@pytest.mark.parametrize("layer", [reference.layer, autograd.layer], ids=["reference", "engine"])
@pytest.mark.parametrize("lengths", [[4, 4, 2, 1], [3], [5, 1]], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@cells
def test_packed_layer(cell, bidirectional, lengths, layer):
    _, stock = make_pair(cell, 3, 5, dtype=torch.float64, bidirectional=bidirectional)
    packed = pack_padded_sequence(torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64), lengths)
    hx = states_for(stock, len(lengths))
    h, c = hx if cell == "lstm" else (hx, None)
    output, hy, cy, _ = layer(cell, packed.data, h, c, weights_of(stock), packed.batch_sizes)
    expected = named_outputs(stock(packed, hx))
    torch.testing.assert_close(output, expected["output"])
    torch.testing.assert_close(hy, expected["hy"])
    if cell == "lstm":
        torch.testing.assert_close(cy, expected["cy"])


@cells
def test_gradients(cell):
    _, stock = make_pair(cell, 3, 5, dtype=torch.float64, bidirectional=True)
    input = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    wrt = [input, *stock.parameters()]
    output, hy, cy, _ = reference.layer(cell, input, None, None, weights_of(stock))
    expected = named_outputs(stock(input))
    ours = torch.autograd.grad(output.square().sum() + hy.sum(), wrt)
    theirs = torch.autograd.grad(expected["output"].square().sum() + expected["hy"].sum(), wrt)
    compare(list(ours), list(theirs))


@cells
def test_step(cell):
    """`CELLS[cell](gates_x, gates_h, states)` is one step of torch's cell."""
    extra = {"nonlinearity": cell.split("_")[1]} if cell.startswith("rnn") else {}
    stock = getattr(torch.nn, kind_of(cell) + "Cell")(3, 5, **extra, dtype=torch.float64)
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    states = (h, torch.randn(2, 5, dtype=torch.float64)) if cell == "lstm" else (h,)
    gates_x = torch.nn.functional.linear(x, stock.weight_ih, stock.bias_ih)
    gates_h = torch.nn.functional.linear(h, stock.weight_hh, stock.bias_hh)
    new = reference.CELLS[cell](gates_x, gates_h, states)
    expected = stock(x, states if cell == "lstm" else h)
    for a, b in zip(new, expected if cell == "lstm" else (expected,), strict=True):
        torch.testing.assert_close(a, b)


def test_every_cell_of_the_engine_has_a_reference():
    import fusedrnn

    assert set(reference.CELLS) == set(fusedrnn._C.cell_traits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_any_dtype(cell, dtype):
    _, stock = make_pair(cell, 3, 5, dtype=dtype)
    output, hy, _, _ = reference.layer(cell, torch.randn(2, 2, 3, dtype=dtype), None, None, weights_of(stock))
    assert output.dtype == hy.dtype == dtype and not output.isnan().any()
