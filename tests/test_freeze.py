"""fusedrnn.freeze: values against float64 and torch.nn, layouts, states carried, what is refused, and how it is kept."""

import copy
import io
import os
import pickle
import struct
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from conftest import CELLS, ISAS, kind_of, states_for
from fusedrnn.freeze import HEADER
from fusedrnn.testing import compare_tensors

frozen_forward = torch.ops.fusedrnn.frozen_forward
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "int8"])
cells = pytest.mark.parametrize("cell", CELLS)
LAYOUTS = {
    "plain": dict(),
    "stack": dict(num_layers=3, bidirectional=True),
    "batch first": dict(batch_first=True, bias=False),
    "projected": dict(num_layers=2, bidirectional=True, proj_size=5),
}
CELLS_AND_LAYOUTS = [(cell, name) for cell in CELLS for name in LAYOUTS if cell == "lstm" or name != "projected"]
# The largest error of a call, in units of the largest value: torch's own initialisation, 100 steps.
BOUNDS = {torch.bfloat16: 0.01, torch.int8: 0.02}


@pytest.fixture(params=[*ISAS, "best"])
def isa(request, monkeypatch):
    """Every instruction set, and what is taken if none is asked for: the best, with products of pairs if the processor has them."""
    if request.param == "best":
        monkeypatch.delenv("FUSEDRNN_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("FUSEDRNN_CPU_ISA", request.param)
    return request.param


def make(cell, *sizes, **options):
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.split("_")[1]
    return getattr(nn, kind_of(cell))(*sizes, **options)


def make_cell(cell, *sizes, **options):
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.split("_")[1]
    return getattr(nn, kind_of(cell) + "Cell")(*sizes, **options)


def named(result):
    """The tensors of a layer's or cell's result, by name."""
    if isinstance(result, torch.Tensor):
        return {"hy": result}
    if isinstance(result[1], torch.Tensor) and result[0].shape == result[1].shape and result[0].dim() < 3:
        return {"hy": result[0], "cy": result[1]}
    states = result[1] if isinstance(result[1], tuple) else (result[1],)
    return {"output": result[0], **dict(zip(("hy", "cy"), states))}


def cast(hx, dtype):
    return None if hx is None else tuple(h.to(dtype) for h in hx) if isinstance(hx, tuple) else hx.to(dtype)


def rounded(module, dtype):
    """The module with the weights that freeze keeps of it, in float64."""
    kept = copy.deepcopy(module).double()
    with torch.no_grad():
        for name, weight in kept.named_parameters():
            if dtype == torch.bfloat16 and weight.dim() == 2:
                weight.copy_(weight.to(torch.bfloat16))
            elif dtype == torch.int8 and weight.dim() == 2:
                scale = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / scale.where(scale > 0, 1)).round() * scale)
    return kept


def check(module, dtype, input, hx=None):
    """A frozen call against float64 on the weights that it keeps: twice torch's own error of such a call in float32, and for
    int8 the 16 bits of what is multiplied, and for products of pairs the 8 bits of the input (tests/cpp/frozen_test.cpp rounds likewise,
    and allows a thousandth)."""
    with torch.no_grad():
        got, stock = named(fusedrnn.freeze(module, dtype)(input, hx)), named(module(input, hx))
        truth = named(rounded(module, dtype)(input.double(), cast(hx, torch.float64)))
        exact = named(copy.deepcopy(module).double()(input.double(), cast(hx, torch.float64)))
    assert list(got) == list(stock)
    for name in got:
        error = (stock[name].double() - exact[name]).abs().max().item() if stock[name].numel() else 0.0
        like = truth[name].float()
        row = compare_tensors(name, got[name], like, truth[name], error)
        may_pair = "FUSEDRNN_CPU_ISA" not in os.environ
        more = {torch.int8: 3e-4, torch.bfloat16: 2e-2 * may_pair, torch.float32: 0}[dtype]
        allowed = row.allowed + more * max(row.scale, 1.0)
        assert row.ours <= allowed, (str(row), allowed)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("cell, layout", CELLS_AND_LAYOUTS)
def test_layers(isa, cell, layout, dtype):
    options = LAYOUTS[layout]
    for I, H, T, B in ((3, 7, 5, 1), (33, 16, 4, 3), (19, 45, 1, 1), (70, 37, 40, 7)):
        module = make(cell, I, H, **options)
        input = torch.randn(*((B, T) if module.batch_first else (T, B)), I)
        check(module, dtype, input)
        check(module, dtype, input, states_for(module, B))


@dtypes
@cells
def test_cells(isa, cell, dtype):
    for I, H, B in ((3, 7, 1), (33, 16, 9), (70, 130, 2)):
        for bias in (True, False):
            module = make_cell(cell, I, H, bias=bias)
            h, c = torch.randn(B, H), torch.randn(B, H)
            check(module, dtype, torch.randn(B, I))
            check(module, dtype, torch.randn(B, I), (h, c) if cell == "lstm" else h)


@dtypes
def test_deep_products(isa, dtype):
    """More inputs than a pass has, more rows than a tile and a chunk have."""
    check(make("lstm", 1100, 20), dtype, torch.randn(3, 11, 1100))
    check(make("gru", 20, 530), dtype, torch.randn(2, 40, 20))


@dtypes
@cells
def test_unbatched(cell, dtype):
    module = make(cell, 4, 6, 2)
    frozen, input, hx = fusedrnn.freeze(module, dtype), torch.randn(5, 4), states_for(module, 1)
    one = frozen(input.unsqueeze(1), hx)
    two = frozen(input, tuple(h.squeeze(1) for h in hx) if cell == "lstm" else hx.squeeze(1))
    for name, tensor in named(two).items():
        assert torch.equal(tensor, named(one)[name].squeeze(1))
    single = make_cell(cell, 4, 6)
    frozen = fusedrnn.freeze(single, dtype)
    for name, tensor in named(frozen(input[0])).items():
        assert torch.equal(tensor, named(frozen(input[:1]))[name][0])


@dtypes
@cells
def test_states_carried_over_calls_equal_one_long_call(isa, cell, dtype):
    frozen = fusedrnn.freeze(make(cell, 40, 33, 2), dtype)
    input, hx, outputs = torch.randn(37, 2, 40), None, []
    for part in input.split([1, 1, 30, 5]):
        output, hx = frozen(part, hx)
        outputs.append(output)
    whole, hy = frozen(input)
    for a, b in zip([torch.cat(outputs), *(hx if cell == "lstm" else [hx])], [whole, *(hy if cell == "lstm" else [hy])]):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6 if isa == "best" else 1e-6)  # 17 bits of the state, where products are of pairs


@dtypes
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_long_call_is_as_near_to_float32_as_promised(cell, dtype):
    """Weights as torch initialises them, 100 steps."""
    for H in (64, 256):
        module = make(cell, H, H)
        input = torch.randn(100, 1, H)
        with torch.no_grad():
            got, stock = fusedrnn.freeze(module, dtype)(input)[0], module(input)[0]
            truth = copy.deepcopy(module).double()(input.double())[0]
        if dtype == torch.float32:
            assert compare_tensors("output", got, stock, truth).passed
        else:
            error = ((got - stock).abs().max() / stock.abs().max()).item()
            print(f"{cell} H{H} {dtype}: largest error {error:.2e} of the largest value")
            assert error < BOUNDS[dtype]


@dtypes
def test_bfloat16_inputs(isa, dtype):
    """The numbers of a call in float32, rounded."""
    frozen = fusedrnn.freeze(make("lstm", 19, 21, 2, bidirectional=True), dtype)
    input, hx = torch.randn(6, 3, 19).bfloat16(), cast((torch.randn(4, 3, 21), torch.randn(4, 3, 21)), torch.bfloat16)
    low, full = named(frozen(input, hx)), named(frozen(input.float(), cast(hx, torch.float32)))
    for name in full:
        assert low[name].dtype == torch.bfloat16 and torch.equal(low[name], full[name].bfloat16())


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38, 1e-38])
def test_extreme_numbers(isa, dtype, bad):
    module = make("lstm", 8, 20)
    input = torch.randn(3, 2, 8)
    input[1, 0, 3] = bad
    with torch.no_grad():
        got, stock = fusedrnn.freeze(module, dtype)(input)[0], module(input)[0]
    assert torch.equal(got[0].isnan(), stock[0].isnan()) and not got[:, 1].isnan().any(), "only the row that has it"
    if dtype == torch.int8 and bad == float("inf"):
        assert got[1:, 0].isnan().all(), "an infinity is not to be had in 16 bits"
    else:
        assert torch.equal(got.isnan(), stock.isnan())


def test_weights_that_are_not_finite():
    module = make("rnn_relu", 4, 5)
    with torch.no_grad():
        module.weight_ih_l0[0, 0] = float("inf")
    input = torch.ones(1, 1, 4)
    for dtype in DTYPES[:2]:
        assert torch.equal(fusedrnn.freeze(module, dtype)(input)[0].isinf(), module(input)[0].isinf())
    with pytest.raises(ValueError, match="weights must be finite to become int8"):
        fusedrnn.freeze(module, torch.int8)


@dtypes
def test_zero_weights(dtype):
    module = make("gru", 4, 5)
    nn.init.zeros_(module.weight_ih_l0)
    check(module, dtype, torch.randn(2, 3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("cell, options", [("lstm", {}), ("gru", dict(num_layers=2, bidirectional=True)),
                                           ("lstm", dict(num_layers=2, proj_size=200, bidirectional=True))])
def test_threads_change_nothing(isa, cell, options, dtype):
    module = make(cell, 256, 400, **options)
    frozen, input, results = fusedrnn.freeze(module, dtype), torch.randn(9, 2, 256), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(named(frozen(input, states_for_one(module))))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def states_for_one(module):
    torch.manual_seed(1)
    return states_for(module, 2)


def test_callers_do_not_disturb_each_other():
    torch.set_num_threads(2)
    frozen = fusedrnn.freeze(make("lstm", 128, 256), torch.bfloat16)
    inputs = [torch.randn(5, 1, 128) for _ in range(4)]
    expected = [frozen(input)[0] for input in inputs]
    wrong = []

    def caller(k):
        for _ in range(20):
            if not torch.equal(frozen(inputs[k])[0], expected[k]):
                wrong.append(k)

    callers = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(9, 6), fusedrnn.LSTM(6, 7, batch_first=True), nn.Linear(7, 3)
        self.also, self.norm = [self.lstm], weight_norm(nn.GRUCell(7, 4), "weight_hh")

    def forward(self, words):
        self.lstm.flatten_parameters()
        output, _ = self.also[0](self.embed(words))
        return self.head(output), self.norm(output[:, -1])


@dtypes
def test_a_model(dtype):
    model, words = Tagger(), torch.randint(9, (2, 5))
    before = copy.deepcopy(model.state_dict())
    frozen = fusedrnn.freeze(model, dtype)
    assert type(model.lstm) is fusedrnn.LSTM and frozen.also[0] is frozen.lstm
    assert str(frozen.lstm) == f"FrozenLSTM(6, 7, batch_first=True, dtype={dtype})"
    assert str(frozen.norm) == f"FrozenGRUCell(7, 4, dtype={dtype})"
    assert not list(frozen.lstm.parameters()) and set(frozen.lstm.state_dict()) == {"packed"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for got, stock in zip(frozen(words), model(words)):
            torch.testing.assert_close(got, stock, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    got = frozen.head(frozen.lstm(torch.randn(1, 2, 6))[0])
    assert got.requires_grad, "what follows a frozen layer may be trained"


@dtypes
def test_ways_to_keep_it(dtype):
    frozen, other = (fusedrnn.freeze(make("lstm", 5, 6, 2), dtype) for _ in range(2))
    input = torch.randn(3, 1, 5)
    expected = frozen(input)[0]
    assert not torch.equal(other(input)[0], expected)
    other.load_state_dict(frozen.state_dict())
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    kept = [other, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(file, weights_only=False)]
    assert all(torch.equal(each(input)[0], expected) for each in kept)


def test_casts_leave_the_weights():
    frozen = fusedrnn.freeze(make("gru", 5, 6), torch.int8)
    before = frozen.packed.clone()
    assert torch.equal(frozen.half().double().train().packed, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes(dtype):
    module = make("lstm", 5, 6).to(dtype)
    input = torch.randn(3, 1, 5)
    torch.testing.assert_close(fusedrnn.freeze(module)(input)[0], copy.deepcopy(module).float()(input)[0])


def test_dropout_is_for_training():
    module = make("lstm", 5, 6, 2, dropout=0.5)
    input = torch.randn(3, 1, 5)
    torch.testing.assert_close(fusedrnn.freeze(module)(input)[0], module.eval()(input)[0])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_freeze_refuses():
    with pytest.raises(ValueError, match="dtype must be torch.float32, torch.bfloat16 or torch.int8, got torch.float16"):
        fusedrnn.freeze(nn.LSTM(3, 5), torch.float16)
    with pytest.raises(ValueError, match="must be or have a recurrent layer or cell of torch.nn or fusedrnn, got Linear"):
        fusedrnn.freeze(nn.Linear(3, 5))
    hooked = nn.LSTM(3, 5)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="LSTM must have no forward hooks"):
        fusedrnn.freeze(hooked)
    with pytest.raises(ValueError, match="LSTM must have no zoneout, got zoneout=0.1"):
        fusedrnn.freeze(fusedrnn.LSTM(3, 5, zoneout=0.1))
    with pytest.raises(ValueError, match="weights must be on the CPU, got meta"):
        fusedrnn.freeze(nn.LSTM(3, 5, device="meta"))
    cell = nn.RNNCell(3, 5)
    cell.nonlinearity = "sine"
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'sine'"):
        fusedrnn.freeze(cell)


@dtypes
def test_calls_that_are_refused(dtype):
    frozen, input, h = fusedrnn.freeze(nn.LSTM(3, 5), dtype), torch.randn(4, 2, 3), torch.zeros(1, 2, 5)
    with pytest.raises(TypeError, match="input of FrozenLSTM must be a tensor, got a PackedSequence"):
        frozen(pack_padded_sequence(input, [4, 2]))
    with pytest.raises(TypeError, match="FrozenLSTM takes no lengths"):
        frozen(input, lengths=torch.tensor([4, 2]))
    leaf, state = input.clone().requires_grad_(), h.clone().requires_grad_()
    for arguments in ((leaf,), (input, (state, h)), (input, (h, state))):
        with pytest.raises(RuntimeError, match="FrozenLSTM has no gradients"):
            frozen(*arguments)
        with torch.no_grad():
            frozen(*arguments)
    for wrong, words in {
        (input.double(),): "input must be float32 or bfloat16, got Double",
        (input[..., :2],): r"input must have 3 features, got \(4, 2, 2\)",
        (input[0, 0],): r"input must have 2 or 3 dimensions, got \(3,\)",
        (input[:0],): "sequence length to be larger than 0",
        (input, (h[:, :1], h)): r"hx must be \(1, 2, 5\), got \(1, 1, 5\)",
        (input, (h, h[..., :4])): r"cx must be \(1, 2, 5\), got \(1, 2, 4\)",
        (input, (h.double(), h)): "hx must be Float on the CPU like input, got Double",
        (input, h): "cx is for the lstm alone, which takes it with hx",
    }.items():
        with pytest.raises(RuntimeError, match=words):
            frozen(*wrong)


def test_damaged_weights_are_refused():
    frozen = fusedrnn.freeze(nn.GRU(3, 5), torch.int8)
    whole, newer = frozen.packed.clone(), frozen.packed.clone()
    newer[8:12] = torch.tensor(list(struct.pack("<i", 3)))
    for damage, words in (
        (whole[:100], "must begin with a header of 128 bytes, got 100"),
        (whole[:-1], r"packed must have \d+ bytes, got \d+"),
        (newer, "version 2, got 3; freeze"),
        (torch.zeros_like(whole), "packed must come from fusedrnn.freeze"),
        (fusedrnn.freeze(nn.RNN(3, 5)).packed, r"packed must hold 1 layers of gru.*got 1 of rnn_tanh"),
        (fusedrnn.freeze(nn.GRU(3, 6)).packed, r"hidden_size 5.*got 1 of gru, 1, 6"),
        (whole.float(), "packed must be a dense one-dimensional uint8 tensor"),
    ):
        frozen.packed = damage
        with pytest.raises(RuntimeError, match=words):
            frozen(torch.randn(1, 1, 3))
    assert HEADER == 128


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def arguments(cell, one_step=False, **options):
    module = make_cell(cell, 3, 5) if one_step else make(cell, 3, 5, **options)
    frozen = fusedrnn.freeze(module)
    input = torch.randn(2, 3) if one_step else torch.randn(2, 4, 3)
    hx = (torch.randn(2, 5), torch.randn(2, 5)) if one_step else states_for(module, 2 if options.get("batch_first") else 4)
    h, c = hx if cell == "lstm" else (hx[0] if one_step else hx, None)
    return frozen.packed, input, h, c, *frozen._arguments, options.get("batch_first", False), one_step


OF_THE_OPERATOR = [(cell, LAYOUTS[layout]) for cell, layout in CELLS_AND_LAYOUTS if layout != "projected"]
OF_THE_OPERATOR += [(cell, dict(one_step=True)) for cell in CELLS] + [("lstm", dict(num_layers=2, proj_size=2))]


@pytest.mark.parametrize("cell, options", OF_THE_OPERATOR)
def test_opcheck(cell, options):
    torch.library.opcheck(frozen_forward, arguments(cell, **options))


@dtypes
def test_compile_and_export(dtype):
    frozen, input = fusedrnn.freeze(nn.GRU(3, 5, 2), dtype), torch.randn(4, 2, 3)
    expected = frozen(input)
    compiled = torch.compile(frozen, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(compiled(input), expected))
    program = torch.export.export(frozen, (input,)).module()
    assert all(torch.equal(a, b) for a, b in zip(program(input), expected))


def test_strides(isa):
    """Rows may lie anywhere; what is not dense within a row is copied."""
    frozen = fusedrnn.freeze(nn.LSTM(6, 5))
    input, wide = torch.randn(4, 3, 6), torch.randn(4, 3, 12)
    wide[..., ::2] = input
    h = torch.randn(3, 1, 5).transpose(0, 1)
    for same in (wide[..., ::2], input.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(frozen(same, (h, h))[0], frozen(input, (h.contiguous(), h.contiguous()))[0])


def test_explain():
    frozen = fusedrnn.freeze(nn.LSTM(3, 5), torch.int8)
    text = fusedrnn.explain(frozen, torch.randn(4, 2, 3))
    assert text.startswith("fusedrnn.FrozenLSTM(3, 5, dtype=torch.int8), input (4, 2, 3) float32 on cpu")
    assert f"runs  frozen engine, int8 weights, {fusedrnn._C.cpu_isa()}" in text
    text = fusedrnn.explain(frozen, torch.randn(4, 2, 3).double())
    assert "runs  nothing: the call is refused" in text and "must be float32 or bfloat16" in text
