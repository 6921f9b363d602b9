"""As accurate as torch.nn against float64 truth: outputs and every gradient (the rule of fusedrnn.testing)."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from conftest import CELLS, kind_of, make_pair, states_for
from fusedrnn.testing import compare_modules

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# (T, B, I, H): 1, odd, prime, one past a power of two; small and large batch; more units than one register block.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 1, 3),
    (7, 1, 3, 17),
    (7, 16, 31, 31),
    (2, 2, 5, 64),
    (1, 33, 17, 64),
    (7, 33, 4, 65),
    (2, 1, 65, 65),
    (3, 5, 7, 130),
    (2, 67, 3, 8),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@shapes
@dtypes
@cells
def test_one_layer(cell, dtype, shape, engine):
    T, B, I, H = shape
    ours, stock = make_pair(cell, I, H, dtype=dtype)
    compare_modules(ours, stock, torch.randn(T, B, I, dtype=dtype), states_for(stock, B))


OPTIONS = [
    dict(bidirectional=True),
    dict(bias=False),
    dict(num_layers=3),
    dict(batch_first=True),
    dict(num_layers=2, bidirectional=True, batch_first=True, bias=False),
    dict(proj_size=5),
    dict(proj_size=1, bidirectional=True),
    dict(proj_size=16, num_layers=2, bidirectional=True, bias=False),
]
CELLS_AND_OPTIONS = [(cell, o) for cell in CELLS for o in OPTIONS if cell == "lstm" or "proj_size" not in o]


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize(
    "cell, options", CELLS_AND_OPTIONS, ids=lambda o: o if o in CELLS else ",".join(f"{k}={v}" for k, v in o.items())
)
@dtypes
def test_options(cell, dtype, options, given, engine):
    ours, stock = make_pair(cell, 6, 17, dtype=dtype, **options)
    input = torch.randn(5, 4, 6, dtype=dtype)
    B = 5 if options.get("batch_first") else 4
    compare_modules(ours, stock, input, states_for(stock, B) if given else None)


PACKED = {"sorted": [7, 5, 5, 2, 1], "equal": [4, 4, 4], "unsorted": [2, 7, 1, 5, 5], "one": [6], "steps": [5, 4, 3, 2, 1]}


@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@dtypes
@cells
def test_packed(cell, dtype, bidirectional, lengths, engine):
    ours, stock = make_pair(cell, 3, 19, num_layers=2, bidirectional=bidirectional, dtype=dtype)
    padded = torch.randn(max(lengths), len(lengths), 3, dtype=dtype)
    packed = pack_padded_sequence(padded, torch.tensor(lengths, device="cpu"), enforce_sorted=False)
    compare_modules(ours, stock, packed, states_for(stock, len(lengths)))
    compare_modules(ours, stock, packed)


@dtypes
def test_packed_with_projections(dtype, engine):
    ours, stock = make_pair("lstm", 3, 19, num_layers=2, bidirectional=True, proj_size=4, dtype=dtype)
    packed = pack_padded_sequence(torch.randn(6, 5, 3, dtype=dtype), torch.tensor([6, 6, 3, 2, 1], device="cpu"))
    compare_modules(ours, stock, packed, states_for(stock, 5))


LOSSES = [("output",), ("hy",), ("cy",), ("hy", "cy"), ("output", "cy")]
CELLS_AND_LOSSES = [(cell, uses, {}) for cell in CELLS for uses in LOSSES if cell == "lstm" or "cy" not in uses]
CELLS_AND_LOSSES += [("lstm", uses, {"proj_size": 3}) for uses in LOSSES]


@pytest.mark.parametrize("cell, uses, options", CELLS_AND_LOSSES, ids=str)
def test_loss_of_some_outputs(cell, uses, options, engine):
    ours, stock = make_pair(cell, 4, 9, bidirectional=True, **options)
    for cotangent in ("normal", "expanded", "transposed"):
        compare_modules(ours, stock, torch.randn(5, 3, 4), states_for(stock, 3), uses=uses, cotangent=cotangent)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 17), (33, 16, 64), (2, 7, 65)], ids=str)
@dtypes
@cells
def test_cell_modules(cell, dtype, shape, bias, engine):
    B, I, H = shape
    extra = {"nonlinearity": cell.split("_")[1]} if cell.startswith("rnn") else {}
    stock = getattr(torch.nn, kind_of(cell) + "Cell")(I, H, bias, **extra, dtype=dtype)
    ours = getattr(fusedrnn, kind_of(cell) + "Cell")(I, H, bias, **extra, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    h = torch.randn(B, H, dtype=dtype)
    hx = (h, torch.randn(B, H, dtype=dtype)) if cell == "lstm" else h
    input = torch.randn(B, I, dtype=dtype)
    compare_modules(ours, stock, input, hx)
    compare_modules(ours, stock, input)
    compare_modules(ours, stock, input[0], (h[0], hx[1][0]) if cell == "lstm" else h[0])


@dtypes
@cells
def test_large_numbers(cell, dtype, engine):
    """Gates deep in saturation, where a hand-written exp or tanh goes wrong first."""
    ours, stock = make_pair(cell, 4, 11, dtype=dtype)
    scale = 0.5 if cell == "rnn_relu" else 8.0
    with torch.no_grad():
        for a, b in zip(ours.parameters(), stock.parameters()):
            a.mul_(scale)
            b.mul_(scale)
    compare_modules(ours, stock, scale * torch.randn(6, 3, 4, dtype=dtype), states_for(stock, 3))


@dtypes
@cells
def test_small_numbers(cell, dtype, engine):
    """Near 0, tanh(x) = x to the last place: an absolute error of one ulp of 1 would show here."""
    ours, stock = make_pair(cell, 4, 11, dtype=dtype, bias=False)
    tiny = {torch.float16: 2**-6, torch.bfloat16: 2**-20, torch.float32: 2**-20, torch.float64: 2**-50}[dtype]
    hx = states_for(stock, 3)
    hx = tuple(tiny * h for h in hx) if cell == "lstm" else tiny * hx
    compare_modules(ours, stock, tiny * torch.randn(6, 3, 4, dtype=dtype), hx)
