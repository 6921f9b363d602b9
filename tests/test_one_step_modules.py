"""One step of cells and of layers: when they call the operators for it, and what comes of it (the operators: tests/test_one_step.py)."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from conftest import CELLS
from fusedrnn import autograd, layer, one_step
from fusedrnn.ops import TRAITS

kinds = pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])


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
