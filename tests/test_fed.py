"""The input's product within the recurrence's operator: what weight_ih and bias_ih make of gates_x, and when a layer gives them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from conftest import CELLS, make_pair
from fusedrnn import _C, layer
from fusedrnn.ops import TRAITS
from fusedrnn.testing import compare_modules
from test_ops import GATES, forward, forward_arguments

T, B, I, H = 7, 5, 3, 6
LAYOUTS = {
    "plain": dict(T=T, B=B, H=H),
    "many steps at once": dict(T=130, B=1, H=H),
    "several chunks": dict(T=11, B=13, H=17),
    "a large batch": dict(T=2, B=150, H=H),
    "steps of slices": dict(T=5, B=32, H=H),
    "packed steps of slices": dict(H=H, D=2, batch_sizes=(32, 32, 31, 32 - 9, 17, 3)),
    "both": dict(T=T, B=B, H=H, D=2),
    "packed": dict(H=H, batch_sizes=(9, 8, 8, 3, 1, 1)),
    "packed both": dict(H=H, D=2, batch_sizes=(9, 8, 8, 3, 1, 1)),
    "projected": dict(T=T, B=B, H=H, P=4, D=2),
    "no bias, zeros": dict(T=T, B=B, H=H, bias=False, states=False),
    "carry": dict(T=T, B=B, H=H, D=2, carry=True),
    "packed carry": dict(H=H, D=2, carry=True, batch_sizes=(9, 8, 8, 3, 1, 1)),
}
cells_and_layouts = pytest.mark.parametrize(
    "cell, layout", [(cell, name) for cell in CELLS for name in LAYOUTS if cell == "lstm" or name != "projected"])


def fed_arguments(cell, dtype=torch.float64, features=I, **options):
    """(arguments with gates, the same with the input and its weights) of the operator."""
    given = forward_arguments(cell, dtype=dtype, **options)
    rows, directions = given["gates_x"][0].shape[:-1], len(given["weight_hh"])
    gates = GATES[cell] * options["H"]
    x = torch.randn(*rows, features, dtype=dtype)
    weights = [0.5 * torch.randn(gates, features, dtype=dtype) for _ in range(directions)]
    biases = [torch.randn(gates, dtype=dtype) for _ in range(directions)] if given["bias_hh"] else []
    given["gates_x"] = [linear(x, weight, biases[d] if biases else None) for d, weight in enumerate(weights)]
    return given, given | dict(gates_x=[x] * directions, weight_ih=weights, bias_ih=biases)


@pytest.mark.parametrize("threads", [1, 3])
@cells_and_layouts
def test_is_the_product_before(isa, cell, layout, threads):
    torch.set_num_threads(threads)
    options = dict(LAYOUTS[layout])
    gates, fed = fed_arguments(cell, **options)
    for one, other in zip(forward(*gates.values()), forward(*fed.values())):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lengths", [(4, 7, 0, 2, 7), (0, 0, 0, 0, 1)])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths(isa, cell, lengths):
    gates, fed = fed_arguments(cell, T=T, B=B, H=H, D=2)
    for arguments in (gates, fed):
        arguments["batch_sizes"] = torch.tensor(lengths)
    for one, other in zip(forward(*gates.values()), forward(*fed.values())):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_formats(isa, cell, dtype):
    """Gates are not rounded to the format in between: a result is off by little more than its own rounding."""
    _, fed = fed_arguments(cell, dtype, features=40, T=T, B=B, H=33)
    exact = {name: [each.double() for each in value] if isinstance(value, list) else
             value.double() if torch.is_tensor(value) else value for name, value in fed.items()}  # fmt: skip
    allowed = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 0.6)
    for got, want in zip(forward(*fed.values()), forward(*exact.values())):
        assert not want.numel() or (got.double() - want).abs().max() <= allowed * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("strided", ["batch first", "rows with gaps", "features apart"])
def test_layout_of_the_input(isa, strided):
    _, fed = fed_arguments("lstm", T=T, B=B, H=H, D=2)
    want = forward(*fed.values())
    x = fed["gates_x"][0]
    if strided == "batch first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif strided == "rows with gaps":
        x = torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., :I]
    else:
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    assert not x.is_contiguous()
    fed["gates_x"] = [x, x]
    for one, other in zip(want, forward(*fed.values())):
        assert torch.equal(one, other)


@cells_and_layouts
def test_same_bits_on_more_threads(cell, layout):
    if layout == "packed steps of slices":
        pytest.skip("the last step has 3 rows for one thread, 2 and 1 for two: sums of so few are split among more chains")
    _, fed = fed_arguments(cell, torch.float32, features=70, **(LAYOUTS[layout] | dict(H=32)))
    want = forward(*fed.values())
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for one, other in zip(want, forward(*fed.values())):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_reads_nothing_it_should_not():
    """What is behind the sequences of a padded batch is never looked at."""
    _, fed = fed_arguments("gru", T=T, B=B, H=H, D=2)
    lengths = torch.tensor([3, 7, 1, 6, 2])
    fed["batch_sizes"] = lengths
    want = forward(*fed.values())
    x = fed["gates_x"][0].clone()
    x[torch.arange(T)[:, None] >= lengths] = float("nan")
    fed["gates_x"] = [x, x]
    for one, other in zip(want, forward(*fed.values())):
        assert torch.equal(one, other)


def test_opcheck():
    for layout in ("plain", "packed both", "no bias, zeros"):
        _, fed = fed_arguments("lstm", **LAYOUTS[layout])
        torch.library.opcheck(forward.default, tuple(fed.values()), test_utils=("test_schema", "test_faketensor"))


ERRORS = {
    "weight_ih must hold 2 tensors or none, got 1": dict(weight_ih=lambda given: given[:1]),
    "bias_ih must hold 2 tensors or none, got 1": dict(bias_ih=lambda given: given[:1]),
    "bias_ih needs weight_ih, got 2 tensors without it": dict(weight_ih=lambda given: []),
    r"weight_ih must be \(24, 3\), got \(24, 4\)": dict(weight_ih=lambda given: [torch.zeros(24, 4).double()] * 2),
    r"bias_ih must be \(24,\), got \(23,\)": dict(bias_ih=lambda given: [torch.zeros(23).double()] * 2),
    "weight_ih must be Double like weight_hh, got Float": dict(weight_ih=lambda given: [each.float() for each in given]),
    r"gates_x must have features to be multiplied with weight_ih, got \(7, 5, 0\)": dict(
        gates_x=lambda given: [torch.zeros(7, 5, 0).double()] * 2, weight_ih=lambda given: [torch.zeros(24, 0).double()] * 2),
    r"gates_x must be \(7, 5, 3\), got \(7, 5, 4\)": dict(gates_x=lambda given: [given[0], torch.zeros(7, 5, 4).double()]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_refuses(message):
    _, fed = fed_arguments("lstm", T=T, B=B, H=H, D=2)
    for name, change in ERRORS[message].items():
        fed[name] = change(fed[name])
    with pytest.raises(RuntimeError, match=message):
        forward(*fed.values())


@pytest.mark.parametrize("kind", ["LayerNormLSTM", "LayerNormGRU"])
def test_refuses_cells_that_normalise(kind):
    cell = {"LayerNormLSTM": "lstm_norm", "LayerNormGRU": "gru_norm"}[kind]
    gates = TRAITS[cell]["gates"] * H
    with pytest.raises(RuntimeError, match=f"for cells that neither normalise nor have a late gate, got the cell {cell}"):
        forward(cell, [torch.zeros(T, B, I)], [torch.zeros(gates, H)], None, [torch.zeros(TRAITS[cell]["unit"], H)], *[None] * 8, 0, False,
                [torch.zeros(gates, I)], None)


def test_flops():
    _, fed = fed_arguments("lstm", T=T, B=B, H=H, D=2)
    with FlopCounterMode(display=False) as counter:
        forward(*fed.values())
    assert counter.get_total_flops() == 2 * T * B * 2 * 4 * H * (I + H)


# ---------------------------------------------------------------------------------------------------------------------
# A layer's choice
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def feeds(monkeypatch):
    """Makes layers give the input to the operator wherever that takes it; a list of whether they did, a number a call."""
    monkeypatch.setattr(_C, "cpu_isa", lambda: "some")
    for name, value in dict(FED_LEAST=0, FED_ROWS=0, FED_UNITS=1, HALF_IS_SLOW=True).items():
        monkeypatch.setattr(layer, name, value)
    monkeypatch.setattr(layer, "by_onednn", lambda *args: None)
    calls = []

    def noted(*args):
        calls.append(len(args) > 15)
        return forward.default(*args)

    monkeypatch.setattr(layer, "recurrence_forward", noted)
    return calls


LAYERS = [
    ("LSTM", {}), ("LSTM", dict(proj_size=2)), ("LSTM", dict(num_layers=2, bidirectional=True)), ("LSTM", dict(bias=False, batch_first=True)),
    ("LSTM", dict(peepholes=True, num_heads=2)), ("LSTM", dict(coupled=True)), ("LSTM", dict(zoneout=(0.1, 0.2))),
    ("LSTM", dict(recurrent_dropout=0.3)), ("LSTM", dict(weight_dropout=0.3)), ("LSTM", dict(save="states")),
    ("GRU", {}), ("GRU", dict(num_layers=2, bidirectional=True, batch_first=True)), ("GRU", dict(activation="relu", num_heads=3)),
    ("RNN", {}), ("RNN", dict(nonlinearity="relu", bidirectional=True)), ("IndRNN", {}), ("SLSTM", dict(num_heads=2)),
]  # fmt: skip


@pytest.mark.parametrize("kind, options", LAYERS, ids=str)
def test_layers(isa, feeds, monkeypatch, kind, options):
    """With gradients, and packed too: the same numbers as with the product before, what is computed again in backward included."""
    module = getattr(fusedrnn, kind)(I, H, dtype=torch.float64, **options)
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=torch.float64, requires_grad=True)
    for packs in (False,) if "save" in options else (False, True):
        results = []
        for most in (1 << 20, 0):
            monkeypatch.setattr(layer, "FED_MOST", most)
            feeds.clear()
            torch.manual_seed(3)
            output, _ = module(pack_padded_sequence(x, [7, 5, 5, 2, 1], module.batch_first) if packs else x)
            assert set(feeds) == {most > 0}
            output = output if torch.is_tensor(output) else output.data
            results.append([output, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])])
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_is_as_accurate_as_torch(isa, feeds, cell, dtype):
    ours, stock = make_pair(cell, 300, 80, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(9, 4, 300, dtype=dtype)
    uses = () if cell == "rnn_relu" else None  # one of its units is so near to its kink that its gradient is chance
    assert all(measured.passed for measured in compare_modules(ours, stock, x, uses=uses))
    assert feeds and all(feeds)


@pytest.mark.parametrize("kind", ["LayerNormLSTM", "LayerNormGRU", "reset before"])
def test_not_with_cells_whose_input_waits(feeds, kind):
    module = fusedrnn.GRU(I, H, reset_after=False) if kind == "reset before" else getattr(fusedrnn, kind)(I, H)
    module(torch.randn(T, B, I))
    assert feeds == [False]


def test_not_where_it_is_no_gain(feeds, monkeypatch):
    module, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        for name, most in dict(FED_LEAST=x.numel() * 4 * H, FED_ROWS=T * B, FED_MOST=4 * H * I - 1, FED_WIDEST=I / H / 2,
                               FED_UNITS=H + 1).items():  # fmt: skip
            module(x)
            with monkeypatch.context() as patch:
                patch.setattr(layer, name, most)
                module(x)
        monkeypatch.setattr(_C, "cpu_isa", lambda: "baseline")
        module(x)
        module.bfloat16()(x.bfloat16())
        module.half()(x.half())
        monkeypatch.setattr(layer, "HALF_IS_SLOW", False)
        module(x.half())
    assert feeds == [True, False] * 5 + [False, False, True, False]


@pytest.mark.skipif(_C.cpu_isa() == "baseline", reason="no instruction set that the engine is quick with")
def test_as_it_comes(monkeypatch):
    """A layer of a usual size is given the input, and one that has less of everything is not."""
    calls = []
    monkeypatch.setattr(layer, "recurrence_forward", lambda *args: calls.append(len(args) > 15) or forward.default(*args))
    with torch.no_grad():
        fusedrnn.LSTM(80, 128)(torch.randn(50, 8, 80))
        fusedrnn.LSTM(80, 128)(torch.randn(24, 1, 80))
        fusedrnn.LSTM(8, 16)(torch.randn(50, 8, 8))
        fusedrnn.LSTM(600, 128)(torch.randn(50, 8, 600))
        fusedrnn.GRU(1024, 1024)(torch.randn(9, 4, 1024))
        fusedrnn.SLSTM(128, 128, num_heads=16)(torch.randn(50, 8, 128))
    assert calls == [True, False, False, False, False, False]


@pytest.mark.parametrize("B", [1, 4000])
def test_takes_little_memory(B):
    """Of few rows not for more steps than there are, and of many no copy of the input for each thread."""
    torch.set_num_threads(8)
    _, fed = fed_arguments("lstm", torch.float32, T=2, B=B, H=16, features=1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        forward(*fed.values())
    taken = max(event.cpu_memory_usage for event in profile.events())
    results = 4 * (2 * B * 16 * 6 + 2 * B * 16)
    assert taken < results + 4 * (2 * 64 * 1000 + 2 * B * 64 + 8 * 64 * 1100) + (1 << 20)


def test_not_for_who_looks_on(feeds):
    """Fake tensors and modes see the product as an operator of torch's; a transform sees a layer as one function."""
    module, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert feeds == [False] and counter.get_total_flops() == 2 * T * B * 4 * H * (I + H)
    feeds.clear()
    many = torch.randn(3, T, B, I)
    results = vmap(lambda x: functional_call(module, dict(module.named_parameters()), (x,))[0])(many)
    torch.testing.assert_close(results, torch.stack([module(x)[0] for x in many]))
    feeds.clear()
    with FakeTensorMode() as mode:
        fusedrnn.LSTM(I, H)(mode.from_tensor(x))
    assert feeds == [False]


def test_double_backward(feeds):
    module = fusedrnn.GRU(I, H, dtype=torch.float64)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))
    assert feeds[0]
