"""fusedrnn.patch: torch.nn's names are ours for a while, and everything is as before after it."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from types import ModuleType

import pytest
import torch
import torch._dynamo.variables.builder as dynamo
from torch import nn

import fusedrnn
from documents import ROOT
from fusedrnn import patch
from same import compare, compare_modules

STOCK = {name: getattr(nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
FUSED = {name: getattr(fusedrnn, name) for name in STOCK}
HOMES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
all_kinds = pytest.mark.parametrize("kind", STOCK)


def everything():
    """All that patch touches."""
    names = {(home, name): getattr(home, name) for home in HOMES for name in vars(home) if not name.startswith("__")}
    return names | {"finders": list(sys.meta_path), "dynamo": dynamo.torch, "allow_rnn": torch._dynamo.config.allow_rnn}


def same_things(one, other):
    return one.keys() == other.keys() and all(one[key] is other[key] or one[key] == other[key] for key in one)


@pytest.fixture(autouse=True)
def as_before():
    before = everything()
    yield
    assert same_things(everything(), before)


def is_patched():
    found = [[getattr(home, name) is classes[name] for home in HOMES for name in STOCK] for classes in (FUSED, STOCK)]
    assert all(found[0]) != all(found[1]), "neither one nor the other"
    return all(found[0])


def input_for(kind):
    return torch.randn((2, 3) if "Cell" in kind else (6, 2, 3))


# ---- to and fro


def test_call_and_undo():
    done = patch()
    assert is_patched()
    done.undo()
    assert not is_patched()
    again = patch()
    done.undo()
    assert is_patched(), "a second undo does nothing"
    again.undo()


def test_context_manager():
    with patch() as done:
        assert is_patched()
    assert not is_patched()
    done.undo()
    with pytest.raises(RuntimeError, match="this patch is undone"), done:
        pass


def test_exceptions_go_through():
    with pytest.raises(KeyError, match="mine"), patch():
        raise KeyError("mine")
    assert not is_patched()


def test_undo_inside_the_context():
    with patch() as done:
        done.undo()
        assert not is_patched()


def test_nesting():
    with patch():
        with patch():
            assert is_patched()
        assert is_patched()
    assert not is_patched()


def test_inner_undo_restores_what_it_found(monkeypatch):
    class Other(STOCK["LSTM"]):
        pass

    with patch():
        with monkeypatch.context() as change:
            change.setattr(torch.nn, "LSTM", Other)
            with patch():
                assert torch.nn.LSTM is fusedrnn.LSTM
            assert torch.nn.LSTM is Other


def test_wrong_order():
    outer, inner = patch(), patch()
    with pytest.raises(RuntimeError, match="must be undone first: expected patch 2, got patch 1"):
        outer.undo()
    assert is_patched(), "a refused undo changes nothing"
    inner.undo()
    assert is_patched()
    outer.undo()


def test_someone_else_took_the_place(monkeypatch):
    done = patch()
    with monkeypatch.context() as change:
        change.setattr(torch.nn.modules, "GRU", STOCK["GRU"])
        with pytest.raises(RuntimeError, match=r"torch\.nn\.modules\.GRU was replaced since: expected .*fusedrnn.*, got .*torch"):
            done.undo()
        assert torch.nn.LSTM is fusedrnn.LSTM, "a refused undo changes nothing"
    done.undo()


def test_modules_that_took_the_names_before():
    client, other = ModuleType("client"), ModuleType("other")
    source = "from torch.nn import LSTM, GRUCell as Memory, Linear, RNNBase\nclass Mine(LSTM): pass\n"
    exec(source, vars(client))
    exec(source, vars(other))
    before = dict(vars(client)), dict(vars(other))
    with patch([client, client, torch.nn]):
        assert client.LSTM is fusedrnn.LSTM and client.Memory is fusedrnn.GRUCell
        changed = {name for name, value in vars(client).items() if value is not before[0][name]}
        assert changed == {"LSTM", "Memory"}
        assert vars(other) == before[1]
        with patch([other]):
            assert other.LSTM is fusedrnn.LSTM
        assert vars(other) == before[1]
    assert vars(client) == before[0]


@pytest.mark.parametrize("wrong", ["torch.nn", [nn.LSTM], [None]])
def test_what_is_no_module(wrong):
    with pytest.raises(TypeError, match="modules must hold imported modules, got"):
        patch(wrong)
    assert not is_patched()


def test_names_imported_meanwhile_are_ours():
    with patch():
        from torch.nn import LSTM
        from torch.nn.modules import GRU
        from torch.nn.modules.rnn import RNNCell
    assert (LSTM, GRU, RNNCell) == (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNNCell)


# ---- layers


@all_kinds
def test_layers(kind):
    """Those made under patch are ours, also after it; those made before are torch's, also under it."""
    input = input_for(kind)
    before = getattr(nn, kind)(3, 5)
    with patch():
        torch.manual_seed(1)
        layer = getattr(nn, kind)(3, 5)
        assert isinstance(layer, getattr(nn, kind)) and type(layer) is FUSED[kind] and layer.stock is STOCK[kind]
        assert type(before) is STOCK[kind] and not isinstance(before, getattr(nn, kind))
        layer.load_state_dict(before.state_dict())
        inside = layer(input), before(input)
        assert type(copy.deepcopy(before)) is STOCK[kind]
    outside = layer(input), before(input)
    compare(inside[0], inside[1])
    compare(outside, inside)


def test_torch_still_judges_what_the_engine_leaves_to_it():
    with patch():
        layer = nn.LSTM(3, 5)
        with pytest.raises(RuntimeError, match="input.size.-1. must be equal to input_size. Expected 3, got 4"):
            layer(torch.randn(6, 2, 4))
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            nn.GRU(3, 5, proj_size=2)


@all_kinds
def test_convert_and_explain(kind):
    before, input = getattr(nn, kind)(3, 5), input_for(kind)
    with patch():
        assert fusedrnn.explain(before, input).startswith("torch.nn.")
        assert type(fusedrnn.convert(before)) is FUSED[kind]
        assert fusedrnn.explain(before, input).startswith("fusedrnn.")
        assert type(fusedrnn.convert(before, to="torch")) is STOCK[kind]


def doubled():
    class Doubled(torch.nn.LSTM):
        def __init__(self, input_size, hidden_size):
            super().__init__(input_size, hidden_size, batch_first=True)
            self.scale = 2

        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return self.scale * output, states

    return Doubled


def test_subclasses():
    Before = doubled()
    before, input = Before(3, 5), torch.randn(2, 6, 3)
    with patch():
        Meanwhile = doubled()
        assert issubclass(Meanwhile, fusedrnn.LSTM)
        assert issubclass(Before, STOCK["LSTM"]) and not issubclass(Before, fusedrnn.LSTM)
        layer = Meanwhile(3, 5)
        layer.load_state_dict(before.state_dict())
        assert isinstance(layer, nn.LSTM)
        compare(layer(input), before(input))
    assert type(copy.deepcopy(layer)) is Meanwhile and not isinstance(layer, nn.LSTM)
    compare(layer(input), before(input))


# ---- models on disk


@all_kinds
def test_pickled_stock_models_load(kind):
    before, input = getattr(nn, kind)(3, 5), input_for(kind)
    file = io.BytesIO()
    torch.save(before, file)
    file.seek(0)
    with patch():
        loaded = torch.load(file, weights_only=False)
        assert type(loaded) is FUSED[kind]
        compare(loaded(input), before(input))
        torch.manual_seed(1)
        made = getattr(nn, kind)(3, 5)
        made.load_state_dict(before.state_dict())
        compare_modules(loaded, made, kind)


@all_kinds
def test_what_can_be_pickled_meanwhile(kind):
    before = getattr(nn, kind)(3, 5)
    with patch():
        layer = pickle.dumps(getattr(nn, kind)(3, 5))
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pickle.dumps(before)
        state = pickle.dumps(before.state_dict())
    assert type(pickle.loads(layer)) is FUSED[kind] and type(pickle.loads(pickle.dumps(before))) is STOCK[kind]
    compare(pickle.loads(state), before.state_dict())


# ---- who records calls


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = getattr(nn, kind)(3, 5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result = self.second(self.first(input))
        return result[0] if isinstance(result, tuple) else result


def compiled(model, input, **options):
    torch._dynamo.reset()
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager", **options)(input)
    output.square().sum().backward()
    return output, [p.grad.clone() for p in model.parameters()]


def eager(model, input):
    model.zero_grad()
    output = model(input)
    output.square().sum().backward()
    return output, [p.grad.clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache")
@all_kinds
def test_compile_in_one_graph(kind):
    input = input_for(kind)
    with patch():
        model = Model(kind)
        inside = compiled(model, input, fullgraph=True)
    expected = eager(model, input)
    compare(inside, expected)
    compare(compiled(model, input, fullgraph=True), expected)


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache")
def test_compile_in_another_thread():
    """The setting allow_rnn, for one, holds only in the thread that sets it."""
    results = []
    with patch():
        model, input = Model("GRU"), input_for("GRU")
        thread = threading.Thread(target=lambda: results.append(compiled(model, input, fullgraph=True)))
        thread.start()
        thread.join()
    compare(results, [eager(model, input)])


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache")
def test_compile_sees_stock_layers_as_ever():
    """It leaves torch's LSTM out of the graph: to record it, as allow_rnn would have it, ends in an error of torch's."""
    model, input = Model("LSTM"), input_for("LSTM")
    with patch():
        compare(compiled(model, input), eager(model, input))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
            compiled(model, input, fullgraph=True)
    torch._dynamo.reset()


def run(script):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_dynamo_is_not_imported_in_vain():
    run("""
import sys, torch, fusedrnn
finders = list(sys.meta_path)
with fusedrnn.patch():
    layer = torch.nn.LSTM(3, 5)
    layer(torch.randn(4, 2, 3))
    with fusedrnn.patch():
        pass
assert not any(name.startswith("torch._dynamo") for name in sys.modules) and sys.meta_path == finders
import torch._dynamo.variables.builder as builder
assert builder.torch is torch
""")


def test_dynamo_imported_meanwhile():
    run("""
import sys, torch, fusedrnn
finders = list(sys.meta_path)
with fusedrnn.patch():
    with fusedrnn.patch():
        layer, x = torch.nn.LSTM(3, 5), torch.randn(4, 2, 3)
        assert "torch._dynamo" not in sys.modules
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
    import torch._dynamo.variables.builder as builder
    assert builder.torch is not torch and not torch._dynamo.config.allow_rnn
assert builder.torch is torch and sys.meta_path == finders
torch.testing.assert_close(compiled(x), layer(x))
""")


@pytest.mark.filterwarnings("ignore")
def test_script_trace_export():
    input = input_for("GRU")
    with patch():
        model = Model("GRU").eval()
        expected = model(input)
        torch.testing.assert_close(torch.jit.trace(model, (input,))(input), expected)
        program = torch.export.export(model, (input,))
        torch.testing.assert_close(program.module()(input), expected)
        scripted = torch.jit.script(nn.Sequential(nn.GRUCell(3, 5)))
        assert scripted(torch.randn(2, 3)).shape == (2, 5)
