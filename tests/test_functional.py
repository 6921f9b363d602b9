"""fusedrnn.functional against torch.lstm, torch.gru, torch.rnn_tanh and torch.rnn_relu: same arguments, same results."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from conftest import CELLS, make_pair, states_for
from fusedrnn import functional
from same import FALLBACK, compare

OPTIONS = [
    dict(),
    dict(num_layers=2),
    dict(bidirectional=True, bias=False),
    dict(batch_first=True, num_layers=2, bidirectional=True),
    dict(proj_size=2),
    dict(proj_size=2, num_layers=2, bias=False, bidirectional=True, batch_first=True),
]
CELLS_AND_OPTIONS = [(cell, o) for cell in CELLS for o in OPTIONS if cell == "lstm" or "proj_size" not in o]
cells = pytest.mark.parametrize("cell", CELLS)


def setup(cell, **options):
    """(module, input, hx, flat arguments after params) for a layer of torch.nn."""
    _, stock = make_pair(cell, 3, 5, **options)
    hx = states_for(stock, 4)
    tail = (stock.bias, stock.num_layers, stock.dropout, stock.training, stock.bidirectional)
    return stock, torch.randn(4, 4, 3), hx, tail


@pytest.mark.parametrize("cell, options", CELLS_AND_OPTIONS, ids=str)
def test_padded(cell, options):
    stock, input, hx, tail = setup(cell, **options)
    params = stock._flat_weights
    expected = getattr(torch, cell)(input, hx, params, *tail, stock.batch_first)
    compare(getattr(functional, cell)(input, hx, params, *tail, stock.batch_first), expected)
    zeros = tuple(map(torch.zeros_like, hx)) if cell == "lstm" else torch.zeros_like(hx)
    compare(
        getattr(functional, cell)(input, None, params, *tail, batch_first=stock.batch_first),
        getattr(torch, cell)(input, zeros, params, *tail, stock.batch_first),
    )


@pytest.mark.parametrize("cell, options", CELLS_AND_OPTIONS, ids=str)
def test_packed(cell, options):
    stock, input, hx, tail = setup(cell, **options)
    data, batch_sizes, _, _ = pack_padded_sequence(input, [4, 3, 3, 1])
    expected = getattr(torch, cell)(data, batch_sizes, hx, stock._flat_weights, *tail)
    compare(getattr(functional, cell)(data, hx, stock._flat_weights, *tail, batch_sizes=batch_sizes), expected)
    zeros = tuple(map(torch.zeros_like, hx)) if cell == "lstm" else torch.zeros_like(hx)
    compare(
        getattr(functional, cell)(data, None, stock._flat_weights, *tail, batch_sizes=batch_sizes),
        getattr(torch, cell)(data, batch_sizes, zeros, stock._flat_weights, *tail),
    )


@pytest.mark.parametrize("train", [True, False])
@cells
def test_dropout(cell, train):
    stock, input, hx, _ = setup(cell, num_layers=3)
    results = []
    for function in (getattr(functional, cell), getattr(torch, cell)):
        torch.manual_seed(1)
        results.append((function(input, hx, stock._flat_weights, True, 3, 0.5, train, False, False), torch.get_rng_state()))
    compare(*results)


@cells
def test_gradients(cell):
    stock, input, hx, tail = setup(cell, num_layers=2, bidirectional=True)
    input.requires_grad_()
    results = []
    for function in (getattr(functional, cell), getattr(torch, cell)):
        outputs = function(input, hx, stock._flat_weights, *tail, False)
        results.append(list(torch.autograd.grad(sum(t.square().sum() for t in outputs), [input, *stock.parameters()])))
    compare(*results)


def test_rnn_takes_the_nonlinearity():
    for cell in ("rnn_tanh", "rnn_relu"):
        stock, input, hx, tail = setup(cell)
        compare(
            functional.rnn(input, hx, stock._flat_weights, *tail, nonlinearity=cell.split("_")[1]),
            getattr(functional, cell)(input, hx, stock._flat_weights, *tail),
        )
    with pytest.raises(ValueError, match="Unknown nonlinearity 'x'"):
        functional.rnn(input, hx, stock._flat_weights, nonlinearity="x")


def test_defaults_are_one_plain_layer():
    stock, input, _, _ = setup("gru")
    output, hy = functional.gru(input, None, list(stock.parameters()))
    compare((output, hy), stock(input))


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
@cells
def test_wrong_number_of_weights(cell, count):
    stock, input, _, _ = setup(cell, num_layers=2)
    with pytest.raises(ValueError, match=f"params must hold 4 .* got {count}"):
        getattr(functional, cell)(input, None, list(stock.parameters())[:count])


@cells
def test_wrong_shapes_raise(cell):
    stock, input, hx, _ = setup(cell)
    params = list(stock.parameters())
    function = getattr(functional, cell)
    for bad_input in (input[..., :2], input[0, 0], input[:0]):
        with pytest.raises((RuntimeError, IndexError)):
            function(bad_input, hx, params)
    wide = tuple(torch.cat([h, h], 1) for h in hx) if cell == "lstm" else torch.cat([hx, hx], 1)
    with pytest.raises(RuntimeError, match="hx"):
        function(input, wide, params)
    with pytest.raises(RuntimeError):
        function(input, hx, [params[0], params[1][:, :-1], *params[2:]])


def test_fallback_names_its_reason():
    stock, input, hx, tail = setup("gru")
    parameters = [p.detach().to(torch.complex64) for p in stock.parameters()]
    with pytest.warns(UserWarning, match=f"fusedrnn.functional.gru.*{FALLBACK}.*complex64"):
        got = functional.gru(input.to(torch.complex64), hx.to(torch.complex64), parameters)
    expected = torch.gru(input.to(torch.complex64), hx.to(torch.complex64), parameters, *tail, False)
    compare(got, expected)
