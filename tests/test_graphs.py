"""Those who record calls instead of making them: fake tensors, torch.jit, torch.fx, torch.export, torch.compile."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
from conftest import states_for
from same import compare

KINDS = ["RNN", "LSTM", "GRU"]
kinds = pytest.mark.parametrize("kind", KINDS)
all_kinds = pytest.mark.parametrize("kind", KINDS + ["RNNCell", "LSTMCell", "GRUCell"])


class Model(nn.Module):
    """A recurrent layer or cell between two others."""

    def __init__(self, kind, home=fusedrnn, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(3, 4)
        self.middle = getattr(home, kind)(4, 5, **options)
        self.after = nn.Linear(5, 2)

    def forward(self, input):
        result = self.middle(self.before(input))
        while isinstance(result, (tuple, list)):
            result = result[0]
        return self.after(result)


def input_for(kind):
    return torch.randn((2, 3) if "Cell" in kind else (6, 2, 3))


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


@pytest.mark.filterwarnings("ignore")
@kinds
def test_export_needs_no_fusedrnn(kind):
    model, input = Model(kind).eval(), input_for(kind)
    program = torch.export.export(model, (input,))
    assert "fusedrnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(input), model(input))


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@all_kinds
def test_compile_without_a_break(kind, backend):
    """One graph, forward and backward, and new weights are seen by the compiled model."""
    model, input = Model(kind), input_for(kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output = call(input)
        output.square().sum().backward()
        results.append((output, [p.grad.clone() for p in model.parameters()]))
    compare(results[1], results[0])
    with torch.no_grad():
        model.middle.get_parameter("weight_ih" + ("" if "Cell" in kind else "_l0")).zero_()
    torch.testing.assert_close(compiled(input), model(input))
    torch._dynamo.reset()


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
