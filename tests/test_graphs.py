"""Those who record calls instead of making them: fake tensors, torch.jit, torch.fx. And those who count and name them."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from conftest import states_for
from fusedrnn import layer
from models import Model, all_kinds, input_for, kinds
from same import compare

@pytest.mark.parametrize("options", [{}, dict(num_layers=2, bidirectional=True, batch_first=True)], ids=str)
@kinds
def test_fake_tensors(kind, options):
    """A module made and called under FakeTensorMode shows the shapes and strides that a real call has."""

    def call(home):
        module = getattr(home, kind)(4, 5, **options)
        input = torch.randn(6, 6, 4)
        result = module(input), module(input, states_for(module, 6)), module(input[0])
        return [[(t.shape, t.stride(), t.dtype) for t in tensors(part)] for part in result]

    real = call(fusedrnn)
    with FakeTensorMode():
        assert call(fusedrnn) == real


def tensors(part):
    if isinstance(part, torch.Tensor):
        return [part]
    return [t for item in part if item is not None for t in tensors(item)]


@pytest.mark.filterwarnings("ignore")
@all_kinds
def test_jit_trace(kind):
    model, input = Model(kind), input_for(kind)
    traced = torch.jit.trace(model, (input,))
    torch.testing.assert_close(traced(input), model(input))
    assert "fusedrnn::" not in str(traced.inlined_graph), "a traced model must not need fusedrnn"


class Scriptable(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.middle = getattr(fusedrnn, kind)(4, 5, 2, bidirectional=True, batch_first=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.middle(input)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@kinds
def test_jit_script(kind):
    """The scripted model holds torch.nn's layer with the same Parameters. (A layer by itself torch scripts neither.)"""
    model, input = Scriptable(kind), torch.randn(3, 6, 4)
    layer, expected = model.middle, model(input)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(input), expected)
    assert scripted.middle.weight_hh_l0.data_ptr() == layer.weight_hh_l0.data_ptr()
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
    assert not torch.allclose(scripted(input), expected)
    torch.testing.assert_close(scripted(input), layer(input)[0])
    assert type(layer) is getattr(fusedrnn, kind)


class Straight(Model):
    """`Model` without a look at the type of a result, which torch.fx cannot record."""

    def forward(self, input):
        result = self.middle(self.before(input))
        return self.after(result if self.plain else result[0])


@all_kinds
def test_fx_records_a_leaf(kind):
    model, input = Straight(kind), input_for(kind)
    model.plain = kind in ("RNNCell", "GRUCell")
    graph = torch.fx.symbolic_trace(model)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert names == ["before", "middle", "after"]
    torch.testing.assert_close(graph(input), model(input))


@kinds
def test_function_modes_see_torchs_call(kind):
    """A torch function mode expects torch's own functions, and gets them, with a warning."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    module, stock = getattr(fusedrnn, kind)(4, 5), getattr(nn, kind)(4, 5)
    stock.load_state_dict(module.state_dict())
    input = torch.randn(3, 2, 4)
    with Watch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = module(input)
    assert {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}[kind] in seen
    compare(result, stock(input))


@pytest.mark.parametrize("options", [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=3)], ids=str)
@pytest.mark.parametrize("given", [False, True])
@kinds
def test_flop_counter(kind, options, given):
    """The counts of torch.nn's own kernels. (Through oneDNN torch counts none.)"""
    if "proj_size" in options and kind != "LSTM":
        options = {}
    counts = []
    for home in (nn, fusedrnn):
        module, input = getattr(home, kind)(4, 5, **options), torch.randn(7, 3, 4, requires_grad=True)
        hx = states_for(module, 3, requires_grad=True) if given else None
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), FlopCounterMode(display=False) as counter:
            output = module(input, hx)[0]
            counts.append(counter.get_total_flops())
            output.sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[0] > 0 and counts[2:] == counts[:2]


def test_flop_counter_of_large_and_packed_layers(monkeypatch):
    """Large products are the library's, where it is fast; torch.nn multiplies the zeros that the first step begins with, too."""
    counts = []
    monkeypatch.setattr(layer, "MKL_IS_SLOW", False)
    for home in (nn, fusedrnn):
        module, input = home.GRU(40, 50, 2, bidirectional=True), torch.randn(100, 32, 40, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module(input)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] + 2 * 2 * 2 * 32 * 150 * 50
    with FlopCounterMode(display=False) as counter:
        module(pack_padded_sequence(torch.randn(5, 3, 40), [5, 4, 1]))
    assert counter.get_total_flops() == 2 * 10 * 2 * 150 * (40 + 100 + 2 * 50)


def test_profiler_names_the_operators():
    with torch.profiler.profile() as profile:
        fusedrnn.LSTM(4, 16)(torch.randn(30, 16, 4))[0].sum().backward()
    assert {"fusedrnn::recurrence_forward", "fusedrnn::recurrence_backward_"} <= {event.key for event in profile.key_averages()}
