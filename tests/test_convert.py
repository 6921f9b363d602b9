"""fusedrnn.convert: stock layers of a model become fused ones and back, in place, with the Parameters they had."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusedrnn
from fusedrnn import convert
from same import compare, compare_modules

KINDS = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.encoder = nn.LSTM(4, 5, 2, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2)
        self.layers = nn.ModuleList([nn.GRU(4, 4, batch_first=True), nn.RNN(4, 4, nonlinearity="relu", batch_first=True)])
        self.cells = nn.ModuleDict({"a": nn.LSTMCell(4, 4), "b": nn.RNNCell(4, 4, nonlinearity="relu"), "c": nn.GRUCell(4, 4)})
        self.again = self.layers[0]

    def forward(self, words):
        x, _ = self.encoder(self.embed(words))
        for layer in self.layers:
            x, _ = layer(x)
        h, c = self.cells["a"](x[:, -1])
        return self.cells["c"](self.cells["b"](h), c)


def recurrent(model):
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]


def test_a_model_there_and_back():
    torch.manual_seed(0)
    model = Tagger().eval()
    words = torch.randint(11, (3, 6))
    expected = model(words)
    text, state, parameters = repr(model), copy.deepcopy(model.state_dict()), list(model.parameters())
    modules = list(model.modules())

    assert convert(model) is model
    assert all(type(m).__module__.startswith("fusedrnn") for m in recurrent(model))
    assert list(model.modules()) == modules and model.again is model.layers[0]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    compare(model.state_dict(), state)
    assert repr(model) == text and not model.training
    compare(model(words), expected)

    assert convert(model, to="torch") is model
    assert all(type(m) is getattr(nn, type(m).__name__) for m in recurrent(model))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(words), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_becomes_what_the_constructor_makes(kind):
    torch.manual_seed(1)
    converted = convert(getattr(nn, kind)(4, 5, bias=False))
    torch.manual_seed(1)
    made = getattr(fusedrnn, kind)(4, 5, bias=False)
    assert type(converted) is type(made)
    compare_modules(converted, made, kind)
    twin = copy.deepcopy(converted)
    assert type(twin) is type(made)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    compare_modules(torch.load(file, weights_only=False), made, kind)
    back = convert(converted, to="torch")
    torch.manual_seed(1)
    compare_modules(back, getattr(nn, kind)(4, 5, bias=False), kind)
    copy.deepcopy(back), back.double()


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once(kind):
    module = convert(getattr(nn, kind)(4, 5))
    cls = type(module)
    assert type(convert(module)) is cls
    assert type(convert(convert(module, to="torch"), to="torch")) is getattr(nn, kind)


def test_optimizer_made_before_goes_on():
    model = nn.Sequential(nn.GRU(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    before = model[0].weight_hh_l0.detach().clone()
    model(torch.randn(2, 2, 3))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight_hh_l0)


def test_weights_replaced_after_conversion_are_seen():
    model = convert(nn.LSTM(3, 4))
    before = model(torch.ones(2, 2, 3))[0]
    model.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
    assert not torch.equal(before, model(torch.ones(2, 2, 3))[0])
    convert(model, to="torch")
    zeroed = model(torch.ones(2, 2, 3))[0]
    model.weight_ih_l0 = nn.Parameter(torch.ones(16, 3))
    assert not torch.equal(zeroed, model(torch.ones(2, 2, 3))[0])


def test_hooks_and_attributes_stay():
    model = nn.LSTM(3, 4)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.note = "kept"
    model.requires_grad_(False)
    convert(model)(torch.randn(2, 2, 3))
    assert calls == [1] and model.note == "kept" and not model.weight_hh_l0.requires_grad


def test_subclasses_stay_as_they_are():
    class Mine(nn.LSTM):
        pass

    model = nn.ModuleList([Mine(3, 4), nn.LSTM(3, 4)])
    convert(model)
    assert type(model[0]) is Mine and isinstance(model[1], fusedrnn.LSTM)


def test_parametrized_layers():
    model = nn.Sequential(parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"))
    input = torch.randn(2, 2, 3)
    expected = model(input)
    convert(model)
    assert isinstance(model[0], fusedrnn.GRU)
    compare(model(input), expected)
    convert(model, to="torch")
    assert isinstance(model[0], nn.GRU)
    compare(model(input), expected)


def test_wrong_target():
    with pytest.raises(ValueError, match="to must be 'fused' or 'torch', got 'cuda'"):
        convert(nn.LSTM(3, 4), to="cuda")


def test_a_model_without_recurrent_layers():
    model = nn.Linear(3, 4)
    assert convert(model) is model and type(model) is nn.Linear
