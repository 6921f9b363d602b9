"""Layers that torch.nn has not: options that make another cell of LSTM and GRU, heads, IndRNN, SLSTM and those that normalise.

They are held against a loop over steps that is written out here, from the formulas of the classes' docstrings.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap
from torch.nn.functional import linear, logsigmoid
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import functional, modules, onnx, weights

close = torch.testing.assert_close
T, B, I, H = 5, 3, 3, 6
CASES = [
    ("LSTM", dict(peepholes=True)),
    ("LSTM", dict(coupled=True)),
    ("LSTM", dict(coupled=True, peepholes=True, bias=False)),
    ("LSTM", dict(gate_activation="hard_sigmoid", activation="relu")),
    ("LSTM", dict(gate_activation="hard_sigmoid_of_fifths", activation=("tanh", "identity"), cell_clip=0.3)),
    ("LSTM", dict(cell_clip=0.2)),
    ("LSTM", dict(num_heads=2)),
    ("LSTM", dict(peepholes=True, coupled=True, gate_activation="hard_sigmoid", activation=("relu", "tanh"), cell_clip=0.5,
                  num_heads=3)),
    ("GRU", dict(gate_activation="hard_sigmoid")),
    ("GRU", dict(gate_activation="hard_sigmoid_of_fifths", activation="identity")),
    ("GRU", dict(activation="relu", num_heads=2)),
    ("GRU", dict(num_heads=6, bias=False)),
    ("IndRNN", dict()),
    ("IndRNN", dict(nonlinearity="tanh", bias=False)),
    ("IndRNN", dict(nonlinearity="identity")),
    ("SLSTM", dict()),
    ("SLSTM", dict(num_heads=2, bias=False)),
    ("GRU", dict(reset_after=False)),
    ("GRU", dict(reset_after=False, num_heads=2, bias=False)),
    ("GRU", dict(reset_after=False, gate_activation="hard_sigmoid", activation="relu")),
    ("LayerNormLSTM", dict()),
    ("LayerNormLSTM", dict(bias=False)),
    ("LayerNormGRU", dict()),
    ("LayerNormGRU", dict(bias=False)),
]
cases = pytest.mark.parametrize("kind, options", CASES, ids=str)
ONE_OF_EACH = [("LSTM", dict(peepholes=True, num_heads=2)), ("LSTM", dict(coupled=True)), ("GRU", dict(activation="relu")),
               ("GRU", dict(reset_after=False)), ("IndRNN", dict()), ("SLSTM", dict(num_heads=2)), ("LayerNormLSTM", dict()),
               ("LayerNormGRU", dict())]  # fmt: skip
each_class = pytest.mark.parametrize("kind, options", ONE_OF_EACH, ids=str)
NUMBER_OF_STATES = {"LSTM": 2, "GRU": 1, "IndRNN": 1, "SLSTM": 4, "LayerNormLSTM": 2, "LayerNormGRU": 1}


def make(kind, options, **more):
    """The layer, with gains that are not all alike."""
    module = getattr(fusedrnn, kind)(*(more.pop("sizes", (I, H))), **{"dtype": torch.float64, **options, **more})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def states_of(module, kind, batch=B, **options):
    """A random hx as the module takes it; n of an SLSTM is positive."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows, module.hidden_size) if batch is None else (rows, batch, module.hidden_size)
    states = [torch.randn(shape, dtype=module.weight_ih_l0.dtype) * 0.5 for _ in range(NUMBER_OF_STATES[kind])]
    if kind == "SLSTM":
        states[2] = states[2].abs() + 0.5
    states = [state.requires_grad_(**options) for state in states]
    return tuple(states) if len(states) > 1 else states[0]


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


# ---- the loop

GATE = {"sigmoid": torch.sigmoid, "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),  # torch's has a float's sixth as its slope
        "hard_sigmoid_of_fifths": lambda x: (x / 5 + 0.5).clamp(0, 1)}  # fmt: skip
VALUE = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch", "norm_ih", "norm_hh", "norm_c")


def whole(weight, heads):
    """The block-diagonal matrix (G*H, H) of a weight_hh (G*H, H/N)."""
    units = weight.shape[1]
    head = torch.arange(units * heads) // units
    rows = head.repeat(weight.shape[0] // len(head))
    return weight.repeat(1, heads) * (rows[:, None] == head)


def normalised(rows):
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def step(module, kind, x, states, w):
    """The states after a step; w: a direction's weights by `NAMES`, None where there is none."""
    w_ih, w_hh, b_ih, b_hh, w_ch, norm_ih, norm_hh, norm_c = w
    zero = torch.zeros(len(w_ih), dtype=x.dtype)
    b_ih, b_hh = (zero if b is None else b for b in (b_ih, b_hh))
    h = states[0]
    if kind == "IndRNN":
        return [VALUE[module.nonlinearity](linear(x, w_ih, b_ih) + b_hh + w_hh[0] * h)]
    if norm_ih is not None:
        gates_x, gates_h = norm_ih * normalised(x @ w_ih.t()) + b_ih, norm_hh * normalised(h @ w_hh.t()) + b_hh
    if kind == "LayerNormLSTM":
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(norm_c[0] * normalised(c) + norm_c[1]), c]
    if kind == "LayerNormGRU":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
        z = torch.sigmoid(z_x + z_h)
        return [(1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h]
    w_hh = whole(w_hh, module.num_heads)
    gates_x, gates_h = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)
    if kind == "GRU":
        gate, value = GATE[module.gate_activation], VALUE[module.activation]
        (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
        r, z = gate(r_x + r_h), gate(z_x + z_h)
        if not module.reset_after:
            n_h, r = linear(r * h, w_hh.chunk(3)[2], b_hh.chunk(3)[2]), 1
        return [(1 - z) * value(n_x + r * n_h) + z * h]
    if kind == "SLSTM":
        _, c, n, m = states
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        empty = n == 0
        now = torch.where(empty, i, torch.maximum(logsigmoid(f) + m, i))
        forget = torch.where(empty, 0, torch.exp(logsigmoid(f) + m - now))
        c, n = forget * c + torch.exp(i - now) * torch.tanh(g), forget * n + torch.exp(i - now)
        return [torch.sigmoid(o) * c / n, c, n, now]
    gate = GATE[module.gate_activation]
    both = module.activation if isinstance(module.activation, tuple) else (module.activation,) * 2
    c = states[1]
    peep = iter([0] * 3 if w_ch is None else w_ch)
    if module.coupled:
        i, g, o = (gates_x + gates_h).chunk(3, -1)
        i = gate(i + next(peep) * c)
        f = 1 - i
    else:
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        i, f = gate(i + next(peep) * c), gate(f + next(peep) * c)
    c = f * c + i * VALUE[both[0]](g)
    if module.cell_clip:
        c = c.clamp(-module.cell_clip, module.cell_clip)
    return [gate(o + next(peep) * c) * VALUE[both[1]](c), c]


def loop(module, kind, input, hx=None, lengths=None, reset=None, reset_to=None):
    """(output, last states, states of every step by kind and layer), of input (T, B, I)."""
    steps, batch = input.shape[:2]
    count, H, zoneout = NUMBER_OF_STATES[kind], module.hidden_size, module.zoneout
    zoneout = zoneout if isinstance(zoneout, tuple) else (zoneout,) * count
    lengths = torch.full((batch,), steps) if lengths is None else lengths
    reset = torch.zeros(steps, batch, dtype=torch.bool) if reset is None else reset
    directions = ["", "_reverse"] if module.bidirectional else [""]
    initial, begun = (None if given is None else [state.unbind(0) for state in as_tuple(given)] for given in (hx, reset_to))
    last, every = [], []
    for k in range(module.num_layers):
        found = []
        for d, suffix in enumerate(directions):
            w = [getattr(module, f"{name}_l{k}{suffix}", None) for name in NAMES]
            row = k * len(directions) + d
            states, anew = ([torch.zeros(batch, H, dtype=input.dtype) if given is None else given[s][row] for s in range(count)]
                            for given in (initial, begun))
            each = [None] * steps
            for t in reversed(range(steps)) if d else range(steps):
                runs = (t < lengths)[:, None]
                begins = reset[t] if not d else reset[t + 1] & (t + 1 < lengths) if t + 1 < steps else lengths < 0
                before = [torch.where(begins[:, None], *both) for both in zip(anew, states)]
                new = step(module, kind, input[t], before, w)
                if any(zoneout):
                    new = [z * old + (1 - z) * now for z, old, now in zip(zoneout, before, new)]
                states = [torch.where(runs, now, old) for now, old in zip(new, states)]
                each[t] = [torch.where(runs, now, 0) for now in new]
            last.append(states)
            found.append([torch.stack(state) for state in zip(*each)])
        every.append([torch.cat(state, -1) for state in zip(*found)])
        input = every[-1][0]
    return input, tuple(torch.stack(state) for state in zip(*last)), tuple(zip(*every))


def slopes(module, tensors, leaves):
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors)
    return torch.autograd.grad(loss, [*leaves, *module.parameters()])


def close_in_scale(found, expected, tolerance=1e-10):
    """Each within so much of its largest number."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        close(one, other, rtol=0, atol=tolerance * (1 + other.abs().max().item()))


def compare(module, kind, input, hx, lengths=None, reset=None, reset_to=None):
    """Everything that a call gives, and the gradients of all of it."""
    given = dict(lengths=lengths, reset=reset, reset_to=reset_to)
    output, last, every = module(input, hx, **given, return_states=True)
    every = every if NUMBER_OF_STATES[kind] > 1 else (every,)
    expected = loop(module, kind, input.transpose(0, 1) if module.batch_first else input, hx, lengths,
                    reset.t() if reset is not None and module.batch_first else reset, reset_to)
    if module.batch_first:
        expected = expected[0].transpose(0, 1), expected[1], tuple(tuple(s.transpose(0, 1) for s in each) for each in expected[2])
    close((output, as_tuple(last), every), expected)
    leaves = [input, *(state for states in (hx, reset_to) if states is not None for state in as_tuple(states))]

    def flat(output, last, every):
        return [output, *last, *(state for each in every for state in each)]

    close_in_scale(slopes(module, flat(output, as_tuple(last), every), leaves), slopes(module, flat(*expected), leaves))
    plain = module(input, hx, **given)
    close((plain[0], as_tuple(plain[1])), expected[:2])
    with torch.no_grad():
        plain = module(input, hx, **given)
        close((plain[0], as_tuple(plain[1])), expected[:2])


LAYOUTS = [dict(num_layers=2, bidirectional=True), dict(batch_first=True), dict(num_layers=2, save="states")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@cases
def test_the_loop(kind, options, layout):
    module = make(kind, options, **layout)
    shape = (B, T, I) if module.batch_first else (T, B, I)
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = states_of(module, kind, requires_grad=True)
    compare(module, kind, input, hx)
    compare(module, kind, input, None)
    lengths, reset = torch.tensor([5, 1, 3]), torch.rand(shape[:2]) < 0.4
    compare(module, kind, input, hx, lengths, reset)
    compare(module, kind, input, hx, lengths, reset, states_of(module, kind, requires_grad=True))


@cases
def test_larger(kind, options):
    """Several tiles of rows and units, and parts of a sequence whose gates are made again."""
    for save in ("all", "states"):
        module = make(kind, options, sizes=(I, 30), save=save)
        input = torch.randn(17, 40, I, dtype=torch.float64, requires_grad=True)
        hx = states_of(module, kind, 40, requires_grad=True)
        compare(module, kind, input, hx, torch.randint(0, 18, (40,)) if save == "all" else None)


@cases
def test_packed(kind, options):
    module = make(kind, options, num_layers=2, bidirectional=True)
    input = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 5, 3])
    for hx in (states_of(module, kind, requires_grad=True), None):
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, last = module(packed, hx)
        found = (pad_packed_sequence(output)[0], *as_tuple(last))
        expected = loop(module, kind, input, hx, lengths)
        expected = (expected[0], *expected[1])
        close(found, expected)
        leaves = [input, *(() if hx is None else as_tuple(hx))]
        close(slopes(module, found, leaves), slopes(module, expected, leaves))


@cases
def test_unbatched(kind, options):
    module = make(kind, options, num_layers=2)
    input, hx = torch.randn(T, I, dtype=torch.float64), states_of(module, kind, None)
    reset, to = torch.tensor([False, False, True, False, False]), states_of(module, kind, None)
    output, last, every = module(input, hx, reset=reset, reset_to=to, return_states=True)
    batched = [tuple(state[:, None] for state in as_tuple(states)) for states in (hx, to)]
    expected = loop(module, kind, input[:, None], batched[0], reset=reset[:, None], reset_to=batched[1])
    close(output, expected[0][:, 0])
    close(as_tuple(last), tuple(state[:, 0] for state in expected[1]))
    close(every if len(expected[2]) > 1 else (every,), tuple(tuple(s[:, 0] for s in each) for each in expected[2]))


@cases
def test_zoneout(kind, options):
    if kind == "SLSTM":
        return  # which has none
    module = make(kind, options, num_layers=2, bidirectional=True, zoneout=(0.3, 0.6) if kind.endswith("LSTM") else 0.3).eval()
    input = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx, to = (states_of(module, kind, requires_grad=True) for _ in range(2))
    compare(module, kind, input, hx, reset=torch.rand(T, B) < 0.4, reset_to=to)
    module.train()
    assert not torch.equal(module(input)[0], module(input)[0])


@cases
def test_masks(kind, options):
    """Recurrent dropout: one mask a sequence, for each unit of each head; weight dropout: of weight_hh."""
    names = ["weight_dropout"] if kind == "IndRNN" else ["weight_dropout", "recurrent_dropout"]
    for name in names:
        module = make(kind, options, **{name: 0.5})
        input, hx = torch.randn(T, 1, I, dtype=torch.float64), states_of(module, kind, 1)
        output = module(input, hx)[0]
        assert output.isfinite().all() and not torch.equal(output, module(input, hx)[0])
        grad = torch.autograd.grad(output.sum(), module.weight_hh_l0)[0]
        assert 0.05 < (grad == 0).double().mean() <= 1
        module.eval()
        close(module(input, hx)[0], loop(module, kind, input, hx)[0])


def test_exponential_gates_without_their_scale():
    """What SLSTM computes is c_t = sigmoid(f) c + exp(i) tanh(g) over n_t = sigmoid(f) n + exp(i), from zeros."""
    module = make("SLSTM", dict())
    input = torch.randn(T, B, I, dtype=torch.float64)
    output, (_, cy, ny, my) = module(input)
    h = c = n = torch.zeros(B, H, dtype=torch.float64)
    for x, found in zip(input, output):
        gates_x, gates_h = linear(x, module.weight_ih_l0, module.bias_ih_l0), linear(h, module.weight_hh_l0, module.bias_hh_l0)
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        f, i = torch.sigmoid(f), torch.exp(i)
        c, n = f * c + i * torch.tanh(g), f * n + i
        h = torch.sigmoid(o) * c / n
        close(found, h)
    close((cy[0] * my[0].exp(), ny[0] * my[0].exp()), (c, n))
    large = module(1e4 * input)[0]
    assert large.isfinite().all() and large.abs().max() <= 1


# ---- derivatives, precision, threads

ENGINES_OWN = ("hx", "weight_hh", "norm_hh", "norm_c")  # gradients, of a layer that normalises


@cases
def test_gradcheck_and_gradgradcheck(kind, options):
    module = make(kind, options, sizes=(2, 6), bidirectional=True)
    names, values = zip(*module.named_parameters())
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = as_tuple(states_of(module, kind, 2, requires_grad=True))

    def run(input, *rest):
        states, values = rest[: len(hx)], rest[len(hx):]
        output, last = functional_call(module, dict(zip(names, values)), (input, states if len(states) > 1 else states[0]))
        return output, *as_tuple(last)

    assert gradcheck(run, (input, *hx, *values), fast_mode=True)
    assert gradgradcheck(run, (input, *hx, *values), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)], ids=str)
@cases
def test_precision(kind, options, dtype, tolerance):
    module = make(kind, options, dtype=dtype)
    input, hx = torch.randn(T, B, I, dtype=dtype), states_of(module, kind)
    truth = copy.deepcopy(module).double()
    exact = tuple(state.double() for state in as_tuple(hx))
    found = module(input, hx)
    expected = truth(input.double(), exact if len(exact) > 1 else exact[0])
    found, expected = ([each[0], *as_tuple(each[1])] for each in (found, expected))
    assert all(tensor.dtype == dtype for tensor in found)
    close([tensor.double() for tensor in found], expected, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(sum(t.sum() for t in tensors), list(m.parameters()))
             for tensors, m in ((found, module), (expected, truth))]
    for ours, exact in zip(*grads):
        scale = exact.abs().max().item() + 1
        close(ours.double(), exact, rtol=tolerance, atol=tolerance * scale)


@cases
def test_threads(kind, options):
    """The same bits on any number of threads. Not of the products that are a matrix library's: that of the input is made exact
    here, and the input's gradient left out. Nor of what is torch's own norm of the input."""
    module = make(kind, options, sizes=(I, 36), dtype=torch.float32, bidirectional=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((64 * parameter).round() / 64)
    input, hx = torch.randint(-2, 3, (9, 18, I)).float(), states_of(module, kind, 18, requires_grad=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output, last = module(input, hx)
        tensors = [output, *as_tuple(last)]
        grads = slopes(module, tensors, as_tuple(hx))
        names = ["hx"] * NUMBER_OF_STATES[kind] + [name for name, _ in module.named_parameters()]
        engine = [grad for name, grad in zip(names, grads) if not hasattr(module, "norm_ih_l0") or name.startswith(ENGINES_OWN)]
        found.append([*tensors, *engine])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others))


# ---- compilers and transforms


@pytest.mark.usefixtures("nothing_compiled")
@each_class
def test_compiled(kind, options):
    module = make(kind, options, num_layers=2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    input, hx = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), states_of(module, kind, requires_grad=True)
    results = [each(input, hx) for each in (compiled, module)]
    close(*results)
    close(*(slopes(module, [output, *as_tuple(last)], [input, *as_tuple(hx)]) for output, last in results))


@each_class
def test_transforms(kind, options):
    module = make(kind, options)
    parameters = {name: torch.stack([value, 0.5 * value]).detach() for name, value in module.named_parameters()}
    input = torch.randn(2, T, B, I, dtype=torch.float64)

    def run(parameters, input):
        return functional_call(module, parameters, (input,))[0]

    def one(n):
        return {name: value[n] for name, value in parameters.items()}

    close(vmap(run)(parameters, input), torch.stack([run(one(n), input[n]) for n in range(2)]))
    grad = torch.func.grad(lambda parameters, input: run(parameters, input).pow(2).sum())
    found = vmap(grad, (None, 0))(one(0), input)
    close({name: value[1] for name, value in found.items()}, grad(one(0), input[1]))


@each_class
def test_other_kinds_of_tensors_and_calls(kind, options):
    module = make(kind, options, dtype=torch.float32, batch_first=True)
    input = torch.randn(B, T, I)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(input)
    close(output.float(), module(input)[0], rtol=0.1, atol=0.1)
    meta = make(kind, options, device="meta", dtype=torch.float32)
    output, last = meta(torch.empty(T, B, I, device="meta"))
    assert output.shape == (T, B, H) and all(state.shape == (1, B, H) for state in as_tuple(last))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, x):
            return self.rnn(x + 1)[0]

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, *_):
            return False

    graph = Tracer().trace(Model())
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["rnn"]
    assert torch.equal(torch.fx.GraphModule(Model(), graph)(input), module(input + 1)[0])
    exported = torch.export.export(module, (input,))
    close(exported.module()(input), module(input))


# ---- parameters and life


def shapes(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_shapes():
    assert shapes(make("LSTM", dict(peepholes=True, bidirectional=True))) == {
        "weight_ih_l0": (24, 3), "weight_hh_l0": (24, 6), "bias_ih_l0": (24,), "bias_hh_l0": (24,), "weight_ch_l0": (3, 6),
        "weight_ih_l0_reverse": (24, 3), "weight_hh_l0_reverse": (24, 6), "bias_ih_l0_reverse": (24,),
        "bias_hh_l0_reverse": (24,), "weight_ch_l0_reverse": (3, 6)}  # fmt: skip
    assert shapes(make("LSTM", dict(peepholes=True, coupled=True, num_heads=2, num_layers=2, bias=False))) == {
        "weight_ih_l0": (18, 3), "weight_hh_l0": (18, 3), "weight_ch_l0": (2, 6),
        "weight_ih_l1": (18, 6), "weight_hh_l1": (18, 3), "weight_ch_l1": (2, 6)}  # fmt: skip
    assert shapes(make("LSTM", dict(coupled=True, num_layers=2, bidirectional=True)))["weight_ih_l1_reverse"] == (18, 12)
    assert shapes(make("GRU", dict(num_heads=3, bias=False))) == {"weight_ih_l0": (18, 3), "weight_hh_l0": (18, 2)}
    assert shapes(make("GRU", dict(reset_after=False))) == shapes(nn.GRU(I, H))
    assert shapes(make("IndRNN", dict())) == {
        "weight_ih_l0": (6, 3), "weight_hh_l0": (1, 6), "bias_ih_l0": (6,), "bias_hh_l0": (6,)}  # fmt: skip
    assert shapes(make("SLSTM", dict(num_heads=2)))["weight_hh_l0"] == (24, 3)
    assert shapes(make("LayerNormLSTM", dict(bidirectional=True, num_layers=2, bias=False)))["norm_c_l1_reverse"] == (2, 6)
    assert shapes(make("LayerNormGRU", dict())) == {**shapes(nn.GRU(I, H)), "norm_ih_l0": (18,), "norm_hh_l0": (18,)}


def test_first_values():
    coupled = dict(peepholes=True, coupled=True, num_heads=2)
    for kind, options in (("LSTM", coupled), ("GRU", dict(num_heads=2)), ("SLSTM", dict())):
        module = make(kind, options)
        for parameter in module.parameters():
            assert 0.5 / math.sqrt(H) < parameter.abs().max() <= 1 / math.sqrt(H)
    module = fusedrnn.IndRNN(3, 400)
    assert 0 <= module.weight_hh_l0.min() < 0.1 and 0.9 < module.weight_hh_l0.max() <= 1
    assert module.weight_ih_l0.abs().max() <= 0.05
    for kind in ("LSTM", "SLSTM", "LayerNormLSTM"):
        module = make(kind, dict(), forget_bias=1.5)
        forget = slice(H, 2 * H)
        assert (module.bias_ih_l0[forget] == 1.5).all() and (module.bias_hh_l0[forget] == 0).all()
        assert (module.bias_ih_l0[:H] != 1.5).all()
    for kind in ("LayerNormLSTM", "LayerNormGRU"):
        module = getattr(fusedrnn, kind)(I, H, bidirectional=True)
        assert all((gain == 1).all() for name, gain in module.named_parameters() if name.startswith(("norm_ih", "norm_hh")))
    module = fusedrnn.LayerNormLSTM(I, H)
    assert (module.norm_c_l0[0] == 1).all() and (module.norm_c_l0[1] == 0).all()


@cases
def test_life(kind, options):
    """Copies, files, state_dicts, casts, names."""
    module = make(kind, options, num_layers=2, bidirectional=True)
    assert module._flat_weights_names == [name for names in module._all_weights for name in names] == list(shapes(module))
    assert all(one is other for one, other in zip(module._flat_weights, module.parameters()))
    input = torch.randn(T, B, I, dtype=torch.float64)
    expected = module(input)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = make(kind, options, num_layers=2, bidirectional=True)
    fresh.load_state_dict(module.state_dict())
    skipped = nn.utils.skip_init(type(module), I, H, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    skipped.load_state_dict(module.state_dict())
    loaded, cast = torch.load(file, weights_only=False), copy.deepcopy(module).float().double()
    for twin in (copy.deepcopy(module), loaded, fresh, skipped, cast):
        assert repr(twin) == repr(module) and twin.form() == module.form() and shapes(twin) == shapes(module)
        close(twin(input), expected, rtol=1e-5, atol=1e-5)
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    close(module(input), expected)
    before = module.bias_ih_l0.clone() if module.bias else module.weight_ih_l0.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.bias_ih_l0 if module.bias else module.weight_ih_l0)


def test_repr():
    words = "peepholes=True, gate_activation='hard_sigmoid', activation=('tanh', 'relu'), cell_clip=3.0, num_heads=2"
    module = fusedrnn.LSTM(3, 4, peepholes=True, gate_activation="hard_sigmoid", activation=["tanh", "relu"], cell_clip=3.0,
                           num_heads=2)
    assert repr(module) == f"LSTM(3, 4, {words})"
    assert repr(fusedrnn.LayerNormLSTM(3, 4, zoneout=(0.1, 0.2))) == "LayerNormLSTM(3, 4, zoneout=(0.1, 0.2))"
    assert repr(fusedrnn.GRU(3, 4, reset_after=False)) == "GRU(3, 4, reset_after=False)"
    assert repr(fusedrnn.IndRNN(3, 4, 2, "tanh", zoneout=0.1)) == "IndRNN(3, 4, num_layers=2, zoneout=0.1, nonlinearity='tanh')"
    assert repr(fusedrnn.SLSTM(3, 4, num_heads=2, forget_bias=1.0)) == "SLSTM(3, 4, forget_bias=1.0, num_heads=2)"


def test_defaults_are_the_plain_path(monkeypatch):
    """Bit for bit, and by the very same call of the engine."""
    calls = []
    stack = functional.stack
    monkeypatch.setattr(functional, "stack", lambda *args: calls.append((args[0], args[-1])) or stack(*args))
    given = {"LSTM": dict(peepholes=False, coupled=False, gate_activation="sigmoid", activation=("tanh", "tanh"), cell_clip=None,
                          num_heads=1),
             "GRU": dict(gate_activation="sigmoid", activation="tanh", num_heads=1, reset_after=True)}  # fmt: skip
    for kind, options in given.items():
        torch.manual_seed(1)
        module = getattr(fusedrnn, kind)(I, H, 2, **options)
        torch.manual_seed(1)
        stock = getattr(nn, kind)(I, H, 2)
        state = torch.get_rng_state()
        assert all(torch.equal(one, other) for one, other in zip(module.parameters(), stock.parameters()))
        torch.manual_seed(1)
        plain = getattr(fusedrnn, kind)(I, H, 2)
        assert torch.equal(state, torch.get_rng_state())
        input = torch.randn(T, B, I)
        calls.clear()
        results = [as_tuple(each(input)[1]) for each in (module, plain)]
        assert all(torch.equal(one, other) for one, other in zip(*results))
        assert calls == [(kind.lower(), functional.PLAIN)] * 2 and all(call[1] is functional.PLAIN for call in calls)
        assert module.extras() == module.form() == [] and repr(module) == repr(plain)
        assert type(fusedrnn.convert(module, to="torch")) is getattr(nn, kind)


def test_a_converted_layer_has_the_defaults():
    module = fusedrnn.convert(nn.LSTM(I, H))
    assert module.form() == [] and module._cell() == "lstm" and module.num_heads == 1


# ---- what is refused


@pytest.mark.parametrize("kind, options, words", [
    ("LSTM", dict(peepholes=1), "LSTM: peepholes must be True or False, got 1"),
    ("LSTM", dict(coupled="yes"), "LSTM: coupled must be True or False, got 'yes'"),
    ("LSTM", dict(gate_activation="tanh"), "LSTM: gate_activation must be one of 'sigmoid', 'hard_sigmoid', .*, got 'tanh'"),
    ("LSTM", dict(activation="sigmoid"), "LSTM: activation must be one of 'tanh', .*, or two of them, .*, got 'sigmoid'"),
    ("LSTM", dict(activation=("tanh", "no")), r"activation must be one of .*, got \('tanh', 'no'\)"),
    ("GRU", dict(activation=("tanh", "relu")), r"activation must be one of 'tanh', 'relu', 'identity', got \('tanh', 'relu'\)"),
    ("LSTM", dict(cell_clip=0), "cell_clip must be a positive number or None, got 0"),
    ("LSTM", dict(cell_clip=math.inf), "cell_clip must be a positive number or None, got inf"),
    ("LSTM", dict(num_heads=4), "LSTM: num_heads must divide hidden_size, which is 6, got 4"),
    ("SLSTM", dict(num_heads=4), "SLSTM: num_heads must divide hidden_size, which is 6, got 4"),
    ("GRU", dict(num_heads=0), "GRU: num_heads must be a positive integer, got 0"),
    ("GRU", dict(num_heads=True), "GRU: num_heads must be a positive integer, got True"),
    ("LSTM", dict(proj_size=2, peepholes=True, cell_clip=1.0),
     "LSTM: peepholes, cell_clip and projections do not go together, got proj_size=2"),
    ("LSTM", dict(proj_size=2, num_heads=2), "num_heads and projections do not go together"),
    ("LSTM", dict(coupled=True, forget_bias=1.0), "LSTM: forget_bias must be None with coupled gates, .*, got 1.0"),
    ("GRU", dict(reset_after=0), "reset_after must be True or False, got 0"),
    ("IndRNN", dict(nonlinearity="sigmoid"), "IndRNN: nonlinearity must be one of 'tanh', 'relu', 'identity', got 'sigmoid'"),
    ("IndRNN", dict(recurrent_dropout=0.1), "IndRNN: recurrent_dropout is of what weight_hh multiplies, .*; got 0.1"),
    ("IndRNN", dict(zoneout=(0.1, 0.2)), "IndRNN: zoneout must be a probability from 0 to below 1, got"),
    ("SLSTM", dict(zoneout=0.1), "SLSTM: zoneout mixes the states of two steps, .*; got 0.1"),
    ("SLSTM", dict(forget_bias="x"), "SLSTM: forget_bias must be a number or None, got 'x'"),
    ("SLSTM", dict(dropout=2), "dropout should be a number in range"),
    ("LayerNormLSTM", dict(forget_bias="x"), "LayerNormLSTM: forget_bias must be a number or None, got 'x'"),
    ("LayerNormLSTM", dict(zoneout=(0.1, 1)), "zoneout must be a probability .*, or two of them, of h and of c, got"),
    ("LayerNormGRU", dict(zoneout=(0.1, 0.2)), "LayerNormGRU: zoneout must be a probability from 0 to below 1, got"),
    ("LayerNormGRU", dict(save="some"), "LayerNormGRU: save must be 'all' or 'states', got 'some'"),
], ids=str)  # fmt: skip
def test_wrong_options(kind, options, words):
    with pytest.raises(ValueError, match=words):
        make(kind, options)


OF_OTHERS = [("RNN", "num_heads"), ("GRU", "peepholes"), ("IndRNN", "num_heads"), ("SLSTM", "proj_size"),
             ("LayerNormLSTM", "num_heads"), ("LayerNormLSTM", "peepholes"), ("LayerNormGRU", "forget_bias")]  # fmt: skip


@pytest.mark.parametrize("kind, name", OF_OTHERS)
def test_options_of_others(kind, name):
    with pytest.raises((TypeError, ValueError), match=name):
        make(kind, {name: 1})


@each_class
def test_arguments_that_do_not_fit(kind, options):
    module, who = make(kind, options), f"fusedrnn.{kind}: "
    input, hx = torch.randn(T, B, I, dtype=torch.float64), states_of(module, kind)
    every = as_tuple(hx)
    last = every[-1]
    name = "hcnm"[len(every) - 1]

    def given(state):
        return (*every[:-1], state) if len(every) > 1 else state

    for error, words, arguments in (
        (RuntimeError, r"input must be of shape \(T, B, 3\) or \(T, 3\), got \(5, 3, 6\)", (torch.cat([input, input], -1),)),
        (RuntimeError, r"input must be of shape \(T, B, 3\) or \(T, 3\), got \(3,\)", (input[0, 0],)),
        (RuntimeError, r"input must have at least one step, got shape \(0, 3, 3\)", (input[:0],)),
        (TypeError, "input must be a tensor or a PackedSequence, got list", ([1.0],)),
        (RuntimeError, rf"{name} of hx must be of shape \(1, 3, 6\), got \(1, 2, 6\)", (input, given(last[:, :2]))),
        (RuntimeError, r"h of hx must be of shape \(1, 6\), got \(1, 3, 6\)", (input[:, 0], hx)),
        (TypeError, "hx must be .* or None, got", (input, (*every, last))),
        (TypeError, "hx must be .* or None, got", (input, given("x"))),
        (RuntimeError, "its tensors have different dtypes: torch.float32, torch.float64", (input.float(),)),
        (RuntimeError, "the engine has no kernel for torch.complex64", (input.to(torch.complex64),)),
    ):  # fmt: skip
        with pytest.raises(error, match=who + ".*" + words):
            module(*arguments)
    packed = pack_padded_sequence(torch.randn(T, B, 4, dtype=torch.float64), torch.tensor([5, 3, 2]))
    with pytest.raises(RuntimeError, match=who + r"input must be of shape \(N, 3\), got \(10, 4\)"):
        module(packed)
    with pytest.raises(ValueError, match="reset must be a tensor of shape"):
        module(input, reset=torch.zeros(T, B))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@cases
def test_where_torch_cannot_stand_in(kind, options, tmp_path):
    """It is refused, and nothing else computed."""
    module = make(kind, options, dtype=torch.float32)
    input, own = torch.randn(T, B, I), not hasattr(nn, kind)
    at_work = kind if own and not module.form() else ", ".join(module.form())
    with pytest.raises(RuntimeError, match=f"fusedrnn.{kind}: .*because torch.jit.trace records torch's own ops"):
        torch.jit.trace(module, input)
    with pytest.raises(RuntimeError, match=f"fusedrnn.{kind}: torch.jit.script compiles .*, and torch.nn has no {at_work}"):
        torch.jit.script(module)
    with pytest.raises(ValueError, match=f"torch.nn has no {kind}" if own else f"torch.nn.{kind} has no {at_work}"):
        fusedrnn.convert(nn.Sequential(module), to="torch")
    with pytest.raises(ValueError, match=f"there is no frozen form of fusedrnn.{kind}" if own else f"got one with {at_work}"):
        fusedrnn.freeze(nn.Sequential(nn.GRU(I, H), module))
    lacks = [kind] if own else [name for name in module.form() if name in ("cell_clip", "num_heads")]
    if lacks:  # tests/test_export.py has what ONNX has
        with pytest.raises(ValueError, match=f"ONNX has no {lacks[0]}, and '0' (is one|has {lacks[0]}=)"):
            onnx.export(nn.Sequential(module), (input,))
    assert type(fusedrnn.convert(module)) is getattr(fusedrnn, kind)
    if not own and shapes(module) != shapes(getattr(nn, kind)(I, H, bias=module.bias)):
        with pytest.raises(ValueError, match="fusedrnn.weights.to_keras: expected|must be of shape"):
            weights.to_keras(kind.lower(), module.state_dict())
    report = fusedrnn.explain(module, input)
    assert f"fusedrnn.{module}" in report and "runs  fused engine" in report and "it has no" in report
    assert "runs  nothing: the call is refused" in fusedrnn.explain(module, input.double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_leaves_them():
    module = make("LSTM", dict(peepholes=True), dtype=torch.float32)
    with pytest.raises(ValueError, match="torch.nn.LSTM has no peepholes"):
        torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {fusedrnn.LSTM})


def test_patched_names_take_the_options():
    with fusedrnn.patch():
        assert isinstance(nn.LSTM(I, H, peepholes=True), modules.LSTM)
        assert not isinstance(fusedrnn.SLSTM(I, H), nn.LSTM)
    assert not hasattr(nn, "IndRNN")
