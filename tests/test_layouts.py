"""Weights from Keras, ONNX and cuDNN, and to them: a layer computes the same here as there, and they come back to the bit.

Keras wrote tests/data/keras.json, weights, inputs and its own outputs, by tests/data/write_keras.py. Of ONNX there are
models that torch wrote, and nodes made here, which onnxruntime runs. cuDNN's layout is a literal, and on a GPU the buffer
that torch fills.
"""

import functools
import itertools
import json

import pytest
import torch
from torch import nn

import fusedrnn.onnx
from conftest import CELLS, compare_all_equal, kind_of, make_pair
from documents import ROOT
from fusedrnn import weights

KERAS = json.loads((ROOT / "tests" / "data" / "keras.json").read_text())
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
OPTIONS = [dict(num_layers=L, bidirectional=both, bias=bias)
           for L, both, bias in itertools.product((1, 2), (False, True), (False, True))]  # fmt: skip
cells = pytest.mark.parametrize("cell", CELLS)
every_options = pytest.mark.parametrize("options", OPTIONS, ids=str)
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def layer_of(cell, **options):
    return make_pair(cell, 2, 3, **options)[0]


def fails(error, words, function, *args, **kwargs):
    """It raises this error: one line with these words, under the function's name."""
    with pytest.raises(error) as found:
        function(*args, **kwargs)
    said = str(found.value)
    assert said.startswith(f"fusedrnn.weights.{function.__name__}: ") and words in said and "\n" not in said, said


def tensors(layers):
    return [[torch.as_tensor(array) for array in layer] for layer in layers]


def equal(one, other):
    """The same arrays or tensors in all layers."""
    assert [len(layer) for layer in one] == [len(layer) for layer in other]
    for a, b in zip(itertools.chain(*tensors(one)), itertools.chain(*tensors(other))):
        assert a.dtype == b.dtype and torch.equal(a, b)


# ---- build


@cells
@every_options
def test_build(cell, options):
    layer = layer_of(cell, **options, dtype=torch.float64)
    built = weights.build(cell, layer.state_dict(), batch_first=True)
    assert type(built) is getattr(fusedrnn, kind_of(cell)) and built.batch_first and built.mode == layer.mode
    compare_all_equal(built.state_dict(), layer.state_dict())


BUILT = [dict(peepholes=True), dict(peepholes=True, coupled=True), dict(coupled=True, cell_clip=2.0),
         dict(gate_activation="hard_sigmoid", activation=("relu", "identity"))]  # fmt: skip


@pytest.mark.parametrize("form", BUILT, ids=str)
@every_options
def test_build_of_a_form(form, options):
    """Peepholes are seen; the rest is said, as form or by name."""
    layer = fusedrnn.LSTM(2, 3, **form, **options)
    said = {name: value for name, value in form.items() if name != "peepholes"}
    for built in (weights.build("lstm", layer.state_dict(), said), weights.build("lstm", layer.state_dict(), **said)):
        assert repr(built) == repr(layer)
        compare_all_equal(built.state_dict(), layer.state_dict())


def test_build_refuses():
    state = layer_of("lstm", num_layers=2).state_dict()
    fails(ValueError, "weight_ih_l0 must be of shape (9, 2), got (12, 2)", weights.build, "gru", state)
    fails(ValueError, "cell must be one of rnn_tanh, rnn_relu, lstm, gru, got 'peephole'", weights.build, "peephole", state)
    fails(ValueError, "with weight_ih_l0, got nothing", weights.build, "lstm", {})
    fails(ValueError, "with weight_hh_l0, got weight_ih_l0", weights.build, "lstm", {"weight_ih_l0": state["weight_ih_l0"]})
    lacking = {name: weight for name, weight in state.items() if name != "bias_hh_l1"}
    fails(ValueError, "2 layers, alike and without projections, got no bias_hh_l1", weights.build, "lstm", lacking)
    projected = nn.LSTM(2, 3, proj_size=2).state_dict()
    fails(ValueError, "without projections, got also weight_hr_l0", weights.build, "lstm", projected)
    fails(ValueError, "without projections and peepholes, got also weight_hr_l0", weights.to_cudnn, "lstm", projected)
    coupled = fusedrnn.LSTM(2, 3, coupled=True).state_dict()
    fails(ValueError, "weight_ih_l0 must be of shape (12, 2), got (9, 2)", weights.build, "lstm", coupled)
    state = layer_of("lstm").state_dict()
    fails(ValueError, "weight_ih_l0 must be of shape (9, 2), got (12, 2)", weights.build, "lstm", state, coupled=True)


# ---- Keras


@pytest.mark.parametrize("name", [name for name in KERAS if name != "wrote"])
def test_keras_wrote_it(name):
    case = KERAS[name]
    layers = [[torch.tensor(array).numpy() for array in layer] for layer in case["layers"]]
    state = weights.from_keras(case["cell"], *layers, **case["options"])
    output, _ = weights.build(case["cell"], state, case.get("form"), batch_first=True)(torch.tensor(case["input"]))
    close(output, torch.tensor(case["output"]))
    reset_after = {name: value for name, value in case["options"].items() if name == "reset_after"}
    equal(weights.to_keras(case["cell"], state, **reset_after), layers)


def test_keras_resets_before():
    """Another formula is recognised by its bias; without one the caller has to say it."""
    kernel, recurrent, bias = map(torch.tensor, KERAS["gru, resets before"]["layers"][0])
    words = "resets the state before its product, and torch's GRU after it"
    got = f"bias of layer 0 must be of shape (2, 9), got shape (9,) of reset_after=False, which {words}"
    fails(ValueError, got, weights.from_keras, "gru", [kernel, recurrent, bias])
    fails(ValueError, "must be of shape (9,), got (2, 9)", weights.from_keras, "gru", [kernel, recurrent, torch.zeros(2, 9)],
          reset_after=False)


def test_keras_refuses():
    kernel, recurrent, bias = good = [torch.zeros(2, 12), torch.zeros(3, 12), torch.zeros(12)]

    def check(words, cell, *layers, error=ValueError, **options):
        fails(error, words, weights.from_keras, cell, *layers, **options)

    check("kernel of layer 0 must be of shape (2, 12), got (2, 9)", "lstm", [kernel[:, :9], recurrent, bias])
    check("recurrent_kernel of layer 0 must be of shape (3, 9), got (3, 12)", "gru", [kernel[:, :9], recurrent, bias])
    check("bias of layer 0 must be of shape (12,), got (2, 12)", "lstm", [kernel, recurrent, torch.zeros(2, 12)])
    check("kernel of layer 1 must be of shape (3, 12), got (2, 12)", "lstm", good, good)
    words = "kernel of layer 0 backward must be of shape (2, 12), got (3, 12)"
    check(words, "lstm", [*good, recurrent, recurrent, bias], bidirectional=True)
    words = "must have 2 or 3 arrays, kernel, recurrent_kernel and maybe bias for each direction, and all as many, got "
    check(words + "6", "lstm", good + good)
    check(words + "3, 2", "lstm", good, good[:2])
    check(words + "no layer", "lstm")
    check("cell must be one of", "LSTM", good)
    check("must be a list of arrays, kernel, recurrent_kernel", "lstm", *good, error=TypeError)
    check("floating point, got torch.int64 of shape (2, 12)", "lstm", [kernel.long(), recurrent], error=TypeError)
    state = layer_of("gru", dtype=torch.bfloat16).state_dict()
    fails(TypeError, "a dtype that NumPy has, got torch.bfloat16", weights.to_keras, "gru", state)
    refuse_peepholes_and_coupled(weights.to_keras)


def refuse_peepholes_and_coupled(function):
    """Which a library has not."""
    words = "1 layers, alike and without projections and peepholes, got also weight_ch_l0"
    fails(ValueError, words, function, "lstm", fusedrnn.LSTM(2, 3, peepholes=True).state_dict())
    words = "weight_ih_l0 must be of shape (12, 2), got (9, 2)"
    fails(ValueError, words, function, "lstm", fusedrnn.LSTM(2, 3, coupled=True).state_dict())


@pytest.mark.parametrize("cell, options", [("lstm", {}), ("gru", {"reset_after": False})])
def test_keras_biases_are_added(cell, options):
    state = layer_of(cell).state_dict()
    (arrays,) = weights.to_keras(cell, state, **options)
    sum = weights.from_keras(cell, arrays, **options)["bias_ih_l0"]
    assert arrays[2].ndim == 1 and torch.equal(sum, state["bias_ih_l0"] + state["bias_hh_l0"])


# ---- ONNX


def test_onnx_literal():
    """The order of gates as the operators' pages have it: W[iofc], Wb[iofc] and Rb[iofc]; W[zrh], Wb[zrh] and Rb[zrh]."""
    i, o, f, c = 1.0, 2.0, 3.0, 4.0
    iofc = [i, o, f, c]
    W, B = torch.tensor(iofc).view(1, 4, 1), torch.tensor([iofc + [10 * gate for gate in iofc]])
    state = weights.from_onnx("lstm", (W, 5 * W, B))
    found = {name: weight.flatten().tolist() for name, weight in state.items()}
    assert found == {"weight_ih_l0": [i, f, c, o], "weight_hh_l0": [5 * i, 5 * f, 5 * c, 5 * o],
                     "bias_ih_l0": [i, f, c, o], "bias_hh_l0": [10 * i, 10 * f, 10 * c, 10 * o]}  # fmt: skip
    z, r, h = 1.0, 2.0, 3.0
    W, B = torch.tensor([z, r, h]).view(1, 3, 1), torch.tensor([[z, r, h, 10 * z, 10 * r, 10 * h]])
    state = weights.from_onnx("gru", (W, 5 * W, B), linear_before_reset=1)
    found = {name: weight.flatten().tolist() for name, weight in state.items()}
    assert found == {"weight_ih_l0": [r, z, h], "weight_hh_l0": [5 * r, 5 * z, 5 * h],
                     "bias_ih_l0": [r, z, h], "bias_hh_l0": [10 * r, 10 * z, 10 * h]}  # fmt: skip


def test_onnx_literal_of_forms():
    """P[iof]; and with input_forget nothing of f, in whose place ours has i's once more."""
    i, o, f, c = 1.0, 2.0, 3.0, 4.0
    W, P = torch.tensor([i, o, f, c]).view(1, 4, 1), torch.tensor([[i, o, f]])

    def found(*layer, **attributes):
        state = weights.from_onnx("lstm", layer, **attributes)
        return state, {name: weight.tolist() for name, weight in state.items()}

    state, lists = found(W, 5 * W, None, 7 * P)
    assert lists == {"weight_ih_l0": [[i], [f], [c], [o]], "weight_hh_l0": [[5 * i], [5 * f], [5 * c], [5 * o]],
                     "weight_ch_l0": [[7 * i], [7 * f], [7 * o]]}  # fmt: skip
    equal(weights.to_onnx("lstm", state)[0][3:], [7 * P])
    state, lists = found(W, 5 * W, None, 7 * P, input_forget=1)
    assert lists == {"weight_ih_l0": [[i], [c], [o]], "weight_hh_l0": [[5 * i], [5 * c], [5 * o]],
                     "weight_ch_l0": [[7 * i], [7 * o]]}  # fmt: skip
    [(W, _, B, P)] = weights.to_onnx("lstm", state, input_forget=1)
    assert W.tolist() == [[[i], [o], [i], [c]]] and B is None and P.tolist() == [[7 * i, 7 * o, 7 * i]]


def run_onnx(model, input):
    session = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: input.numpy()})[0])


def node_model(kind, arrays, inputs=(), **attributes):
    """A model of one node named "node", whose Y is (T, D, B, H); arrays: W, R, B and maybe P."""
    onnx = pytest.importorskip("onnx")
    names = [name if array is not None else "" for name, array in zip("WRB", arrays)]
    if len(arrays) > 3:
        inputs = ("", "", "", "P")
    attributes = {"hidden_size": arrays[1].shape[2], **attributes}
    node = onnx.helper.make_node(kind, ["X", *names, *inputs], ["Y"], "node", **attributes)
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in zip("WRBP", arrays) if array is not None]
    float32 = onnx.TensorProto.FLOAT
    X, Y = (onnx.helper.make_tensor_value_info(name, float32, [None] * rank) for name, rank in (("X", 3), ("Y", 4)))
    graph = onnx.helper.make_graph([node], "graph", [X], [Y], stored)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=10)


def attributes_for(cell, bidirectional=False):
    given = {"direction": "bidirectional"} if bidirectional else {}
    if cell == "gru":
        given["linear_before_reset"] = 1
    if cell == "rnn_relu":
        given["activations"] = ["Relu"] * (2 if bidirectional else 1)
    return given


def random_onnx(cell, num_layers, bidirectional, bias):
    """W, R and B of layers, drawn at random."""
    D, GH = 2 if bidirectional else 1, GATES[cell] * 3
    return [(torch.randn(D, GH, 3 * D if k else 2).numpy(), torch.randn(D, GH, 3).numpy(),
             torch.randn(D, 2 * GH).numpy() if bias else None) for k in range(num_layers)]  # fmt: skip


@cells
@pytest.mark.parametrize("options", [options for options in OPTIONS if options["num_layers"] == 1], ids=str)
def test_onnx_node(cell, options):
    """onnxruntime computes of a node what our layer does that took its weights."""
    (arrays,) = random_onnx(cell, **options)
    model = node_model(kind_of(cell), arrays, **attributes_for(cell, options["bidirectional"]))
    found, state, form = weights.read_onnx(model)
    assert found == cell and form == {}
    compare_all_equal(state, weights.from_onnx(cell, arrays, linear_before_reset=1))
    input = torch.randn(5, 4, 2)
    output, _ = weights.build(cell, state)(input)
    close(run_onnx(model, input).transpose(1, 2).flatten(2), output)


@cells
def test_onnx_written(cell):
    """And of a node that took the weights of our layer."""
    layer, input = layer_of(cell, bidirectional=True), torch.randn(5, 4, 2)
    (arrays,) = weights.to_onnx(cell, layer.state_dict())
    model = node_model(kind_of(cell), arrays, **attributes_for(cell, bidirectional=True))
    close(run_onnx(model, input).transpose(1, 2).flatten(2), layer(input)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell, dynamo", [*((cell, False) for cell in CELLS), ("lstm", True), ("gru", True)])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_torch_wrote_it(cell, dynamo, options, tmp_path):
    """torch.onnx.export's files of torch.nn's layers, by its two exporters. (The newer one writes an RNN step by step.)"""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    stock, path, input = make_pair(cell, 2, 3, **options)[1].eval(), tmp_path / "model.onnx", torch.randn(5, 4, 2)
    torch.onnx.export(stock, (input,), path, dynamo=dynamo, verbose=False)
    names = [node.name for node in onnx.load(path).graph.node if node.op_type == kind_of(cell)]
    assert len(names) == options["num_layers"]
    found, state, form = weights.read_onnx(str(path), *names)
    assert found == cell and form == {}
    compare_all_equal(state, stock.state_dict())
    close(weights.build(cell, state)(input)[0], stock(input)[0])


@pytest.mark.filterwarnings("ignore")
@cells
def test_onnx_weights_that_are_computed(cell):
    """fusedrnn.onnx.export writes weights in torch's order and operators that reorder them; only an optimizer runs these."""
    pytest.importorskip("onnxscript")
    layer = layer_of(cell, bidirectional=True).eval()
    model = fusedrnn.onnx.export(layer, (torch.randn(2, 1, 2),), verbose=False, optimize=False).model_proto
    (node,) = (node for node in model.graph.node if node.op_type == kind_of(cell))
    assert node.input[1] not in {tensor.name for tensor in model.graph.initializer}
    compare_all_equal(weights.read_onnx(model)[1], layer.state_dict())


# For each node's attributes, with P or without, the form of a layer that computes it.
SIXTH = dict(activation_alpha=[1 / 6], activation_beta=[0.5])
FORMS = [
    ("lstm", {}, True, {}),
    ("lstm", dict(input_forget=1), False, dict(coupled=True)),
    ("lstm", dict(input_forget=1, activations=["hardsigmoid", "Affine", "Relu"], activation_alpha=[1 / 6, 1.0],
                  activation_beta=[0.5, 0.0]), True,
     dict(coupled=True, gate_activation="hard_sigmoid", activation=("identity", "relu"))),
    ("lstm", dict(activations=["HardSigmoid", "Tanh", "Tanh"]), False, dict(gate_activation="hard_sigmoid_of_fifths")),
    ("lstm", dict(activations=["HardSigmoid", "Relu", "Relu"], activation_alpha=[0.2]), True,
     dict(gate_activation="hard_sigmoid_of_fifths", activation="relu")),
    ("lstm", dict(activations=["HardSigmoid", "Tanh", "Tanh"], **SIXTH), True, dict(gate_activation="hard_sigmoid")),
    ("lstm", dict(activations=["Sigmoid", "Tanh", "Affine"], activation_alpha=[1.0], activation_beta=[0.0]), False,
     dict(activation=("tanh", "identity"))),
    ("lstm", dict(activations=["Sigmoid", "Tanh", "Tanh"], activation_alpha=[0.3]), False, {}),
    ("gru", dict(linear_before_reset=0), False, dict(reset_after=False)),
    ("gru", dict(activations=["HardSigmoid", "Relu"], linear_before_reset=0), False,
     dict(gate_activation="hard_sigmoid_of_fifths", activation="relu", reset_after=False)),
    ("gru", dict(activations=["HardSigmoid", "Relu"], linear_before_reset=1), False,
     dict(gate_activation="hard_sigmoid_of_fifths", activation="relu")),
    ("gru", dict(activations=["HardSigmoid", "Affine"], activation_alpha=[1 / 6, 1.0], activation_beta=[0.5, 0.0],
                 linear_before_reset=1), False, dict(gate_activation="hard_sigmoid", activation="identity")),
]  # fmt: skip


def node_of(cell, arrays, attributes):
    """A model of a node of these attributes, which are said as of one direction."""
    D = len(arrays[0])
    attributes = {name: value * D if isinstance(value, list) else value for name, value in attributes.items()}
    direction = {"direction": "bidirectional"} if D == 2 else {}
    return node_model(kind_of(cell), arrays, **direction, **attributes)


@pytest.mark.parametrize("options", [options for options in OPTIONS if options["num_layers"] == 1], ids=str)
@pytest.mark.parametrize("cell, attributes, peepholes, form", FORMS, ids=[f"{row[0]}, {row[1]}, P={row[2]}" for row in FORMS])
def test_onnx_form(cell, attributes, peepholes, form, options):
    """onnxruntime computes of a node what a layer of the form does that was found, and again of the weights that it gives back."""
    (arrays,) = random_onnx(cell, **options)
    if peepholes:
        arrays = (*arrays, torch.randn(len(arrays[0]), 9).numpy())
    model, input = node_of(cell, arrays, attributes), torch.randn(5, 4, 2)
    found, state, found_form = weights.read_onnx(model)
    assert found == cell and found_form == {**({"peepholes": True} if peepholes else {}), **form}
    output, _ = weights.build(cell, state, found_form)(input)
    close(run_onnx(model, input).transpose(1, 2).flatten(2), output)
    forget = {name: value for name, value in attributes.items() if name == "input_forget"}
    linear = attributes.get("linear_before_reset", 0)
    compare_all_equal(state, weights.from_onnx(cell, arrays, linear_before_reset=linear, **forget))
    (back,) = weights.to_onnx(cell, state, **forget)
    close(run_onnx(node_of(cell, back, attributes), input).transpose(1, 2).flatten(2), output)
    if not forget:  # which leaves nothing of f
        equal(*([[array for array in one if array is not None]] for one in (back, arrays)))


REFUSED = [
    ("lstm", {"direction": "reverse"}, "direction of LSTM 'node' must be forward or bidirectional, got reverse"),
    ("lstm", {"activations": ["Sigmoid", "Softsign", "Tanh"]},
     "activation g of LSTM 'node' must be one of Tanh, Relu, Affine, got Softsign"),
    ("lstm", {"activations": ["Tanh"] * 3}, "activation f of LSTM 'node' must be one of Sigmoid, HardSigmoid, got Tanh"),
    ("lstm", {"activations": ["Sigmoid", "Tanh", "Sigmoid"]},
     "activation h of LSTM 'node' must be one of Tanh, Relu, Affine, got Sigmoid"),
    ("rnn_tanh", {"activations": ["Sigmoid"]}, "activation f of RNN 'node' must be one of Tanh, Relu, got Sigmoid"),
    ("rnn_tanh", {"activations": ["Affine"]}, "activation f of RNN 'node' must be one of Tanh, Relu, got Affine"),
    ("gru", {"activations": ["Sigmoid"]}, "activations of GRU 'node' must be 2, got ['Sigmoid']"),
    ("gru", {"activations": ["HardSigmoid", "Tanh"], "activation_alpha": [0.3]},
     "activation f of GRU 'node', HardSigmoid, must have alpha=0.1666667 and beta=0.5 or alpha=0.2 and beta=0.5, got alpha=0.3"),
    ("gru", {"activations": ["HardSigmoid", "Tanh"], "activation_beta": [0.0]}, "and beta=0.5, got alpha=0.2 and beta=0.0"),
    ("gru", {"activations": ["Sigmoid", "Affine"]},
     "activation g of GRU 'node', Affine, must have alpha=1 and beta=0, got alpha=None and beta=None"),
    ("gru", {"activations": ["HardSigmoid", "Tanh"], "activation_alpha": [0.2, 1.0]},
     "of GRU 'node' must be at most a number for each activation that takes one, 1, got activation_alpha=[0.2"),
    ("lstm", {"clip": 3.0}, "must be none, got 3.0, a limit of what activations are given; cell_clip is one of the state"),
    ("gru", {"clip": 3.0}, "clip of GRU 'node' must be none, got 3.0, a limit of what activations are given"),
    ("rnn_tanh", {"layout": 1}, "layout of RNN 'node' must be 0, steps first, got 1"),
    ("lstm", {"inputs": ("", "", "", "P")}, "weights must be constants of the model, got the input 'P'"),
    ("lstm", {"hidden_size": 4}, "R of 'node' must be of shape (1, 16, 4), got (1, 12, 3)"),
    ("gru", {"direction": "bidirectional"}, "R of 'node' must be of shape (2, 9, 3), got (1, 9, 3)"),
]


@pytest.mark.parametrize("cell, changes, words", REFUSED, ids=[words for _, _, words in REFUSED])
def test_onnx_refuses_a_node(cell, changes, words):
    (arrays,) = random_onnx(cell, 1, False, True)
    model = node_model(kind_of(cell), arrays, **{**attributes_for(cell), **changes})
    fails(ValueError, words, weights.read_onnx, model)


def test_onnx_directions_must_agree():
    W, R, _ = random_onnx("lstm", 1, True, False)[0]
    activations = ["Sigmoid", "Tanh", "Tanh", "Sigmoid", "Tanh", "Relu"]
    words = f"activations of LSTM 'node' must be those of one direction twice, got {activations}"
    model = node_model("LSTM", (W, R, None), direction="bidirectional", activations=activations)
    fails(ValueError, words, weights.read_onnx, model)
    activations = ["HardSigmoid", "Tanh", "Tanh"] * 2  # of which the second takes ONNX's default
    more = dict(activation_alpha=[1 / 6], activation_beta=[0.5])
    model = node_model("LSTM", (W, R, None), direction="bidirectional", activations=activations, **more)
    fails(ValueError, "must be those of one direction twice", weights.read_onnx, model)
    model = node_model("LSTM", (W, R, None), direction="bidirectional", activations=activations[:3])
    fails(ValueError, "activations of LSTM 'node' must be 6, got", weights.read_onnx, model)


def test_onnx_explicit_defaults():
    """Attributes that say what holds without them, in any case of letters, change nothing."""
    (arrays,) = random_onnx("lstm", 1, True, True)
    said = dict(direction="bidirectional", activations=["SIGMOID", "tanh", "Tanh"] * 2, input_forget=0, layout=0)
    _, state, form = weights.read_onnx(node_model("LSTM", arrays, **said), "node")
    assert form == {}
    compare_all_equal(state, weights.from_onnx("lstm", arrays))


def test_onnx_shared_weights():
    """One tensor for W and R."""
    (arrays,) = random_onnx("rnn_tanh", 1, False, False)
    model = node_model("RNN", arrays)
    model.graph.node[0].input[1] = "R"
    _, state, _ = weights.read_onnx(model)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(state[name], torch.tensor(arrays[1][0]))


def test_onnx_refuses_a_model():
    onnx = pytest.importorskip("onnx")
    (arrays,) = random_onnx("lstm", 1, False, True)
    model = node_model("LSTM", arrays)
    fails(ValueError, "recurrent nodes, 'node', got 'other'", weights.read_onnx, model, "other")
    del model.graph.initializer[0]
    fails(ValueError, "must be constants of the model, got the input 'W'", weights.read_onnx, model)
    model = node_model("LSTM", arrays)
    model.graph.node.append(onnx.helper.make_node("GRU", ["X", "W", "R"], ["Z"], "second", linear_before_reset=1))
    fails(ValueError, "recurrent nodes, 'node', 'second', got no name", weights.read_onnx, model)
    fails(ValueError, "nodes of one cell, got lstm, gru", weights.read_onnx, model, "node", "second")
    model.graph.node[1].CopyFrom(onnx.helper.make_node("LSTM", ["X", "W", "R"], ["Z"], "second", input_forget=1))
    fails(ValueError, "nodes of one form, got {}, {'coupled': True}", weights.read_onnx, model, "node", "second")
    del model.graph.node[:]
    fails(ValueError, "recurrent nodes, of which there are none, got no name", weights.read_onnx, model)


def test_onnx_refuses():
    W, R, B, P = torch.zeros(2, 12, 2), torch.zeros(2, 12, 3), torch.zeros(2, 24), torch.zeros(2, 13)

    def check(words, cell, *layers, **options):
        fails(ValueError, words, weights.from_onnx, cell, *layers, **options)

    words = "linear_before_reset of a GRU must be said, 1 or 0, which resets the state before its product, and torch's GRU after it"
    check(words, "gru", (W, R))
    check("P of layer 0 must be of shape (2, 9), got (2, 12)", "lstm", (W, R, None, P[:, :12]))
    check("P must be of all layers of an LSTM, or of none, got P of 1 of 2 layers of 'lstm'", "lstm", (W, R, None, P), (W, R, B))
    check("got P of 1 of 1 layers of 'gru'", "gru", (W, R, None, P), linear_before_reset=1)
    check("P must be of all layers of an LSTM, or of none, got P of 1 of 1 layers of 'rnn_tanh'", "rnn_tanh", (W, R, None, P))
    check("W of layer 0 must be of shape (2, 9, 2), got (2, 12, 2)", "gru", (W, R), linear_before_reset=1)
    check("R of layer 0 must be of shape (2, 12, 3), got (1, 12, 3)", "lstm", (W, R[:1]))
    check("B of layer 0 must be of shape (2, 24), got (2, 12)", "lstm", (W, R, B[:, :12]))
    check("W of layer 1 must be of shape (2, 12, 6), got (2, 12, 2)", "lstm", (W, R), (W, R))
    check("W of layer 0 must be of shape (1 or 2, 4*H, I), got (12, 2)", "lstm", (W[0], R[0]))
    check("2 or 3 arrays, W, R and maybe B, and all as many, got 3, 2", "rnn_tanh", (W, R, B), (W, R, None))
    check("2 or 3 or 4 arrays, W, R, maybe B and maybe P, and all as many, got 3, 2", "lstm", (W, R, B), (W, R, None))
    layer = fusedrnn.LSTM(2, 3, coupled=True)
    fails(ValueError, "weight_ih_l0 must be of shape (12, 2), got (9, 2)", weights.to_onnx, "lstm", layer.state_dict())


# ---- cuDNN


def test_cudnn_literal():
    """A bidirectional GRU of 2 inputs and 1 unit, two layers: where each weight begins, and its shape."""
    layout = {
        "weight_ih_l0": (0, (3, 2)), "weight_hh_l0": (6, (3, 1)),
        "weight_ih_l0_reverse": (9, (3, 2)), "weight_hh_l0_reverse": (15, (3, 1)),
        "weight_ih_l1": (18, (3, 2)), "weight_hh_l1": (24, (3, 1)),
        "weight_ih_l1_reverse": (27, (3, 2)), "weight_hh_l1_reverse": (33, (3, 1)),
        "bias_ih_l0": (36, (3,)), "bias_hh_l0": (39, (3,)),
        "bias_ih_l0_reverse": (42, (3,)), "bias_hh_l0_reverse": (45, (3,)),
        "bias_ih_l1": (48, (3,)), "bias_hh_l1": (51, (3,)),
        "bias_ih_l1_reverse": (54, (3,)), "bias_hh_l1_reverse": (57, (3,)),
    }  # fmt: skip
    flat = torch.arange(60.0)
    state = weights.from_cudnn("gru", flat, input_size=2, hidden_size=1, num_layers=2, bidirectional=True)
    assert set(state) == set(layout) and list(state) == list(nn.GRU(2, 1, 2, bidirectional=True).state_dict())
    for name, (begin, shape) in layout.items():
        assert torch.equal(state[name], flat[begin: begin + state[name].numel()].view(shape)), name
    assert torch.equal(weights.to_cudnn("gru", state), flat)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@cells
@every_options
def test_cudnn_buffer_on_cuda(cell, options):
    """What torch has cuDNN lay out."""
    stock = make_pair(cell, 2, 3, **options)[1].cuda()
    stock.flatten_parameters()
    flat = torch.empty(0, device="cuda").set_(stock.weight_ih_l0.untyped_storage())
    ours = weights.to_cudnn(cell, stock.state_dict())
    assert torch.equal(flat[:len(ours)], ours) and not flat[len(ours):].any()


def test_cudnn_refuses():
    sizes = dict(input_size=2, hidden_size=3)
    flat = torch.zeros(84)
    fails(ValueError, "flat must be of shape (84,), got (83,)", weights.from_cudnn, "lstm", flat[1:], **sizes)
    fails(ValueError, "flat must be of shape (60,), got (84,)", weights.from_cudnn, "lstm", flat, bias=False, **sizes)
    fails(TypeError, "got torch.int64 of shape (84,)", weights.from_cudnn, "lstm", flat.long(), **sizes)
    refuse_peepholes_and_coupled(weights.to_cudnn)


# ---- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@every_options
@cells
def test_there_and_back(cell, options, dtype):
    layer = layer_of(cell, **options, dtype=dtype)
    state = layer.state_dict()
    sizes = dict(input_size=2, hidden_size=3)
    compare_all_equal(weights.from_onnx(cell, *weights.to_onnx(cell, state), linear_before_reset=1), state)
    compare_all_equal(weights.from_cudnn(cell, weights.to_cudnn(cell, state), **sizes, **options), state)
    if cell != "gru":  # of two biases Keras has the sum
        state = {name: torch.zeros_like(weight) if "bias_hh" in name else weight for name, weight in state.items()}
    keras = weights.to_keras(cell, state)
    compare_all_equal(weights.from_keras(cell, *keras, bidirectional=options["bidirectional"]), state)


@pytest.mark.parametrize("form", [dict(peepholes=True), dict(coupled=True), dict(peepholes=True, coupled=True)], ids=str)
@every_options
def test_there_and_back_of_a_form(form, options):
    state, forget = fusedrnn.LSTM(2, 3, **form, **options).state_dict(), {"input_forget": int(form.get("coupled", False))}
    layers = weights.to_onnx("lstm", state, **forget)
    assert [len(layer) for layer in layers] == [3 + form.get("peepholes", False)] * options["num_layers"]
    compare_all_equal(weights.from_onnx("lstm", *layers, **forget), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, form", [
    ("LSTM", dict(peepholes=True, gate_activation="hard_sigmoid", activation=("tanh", "identity"))),
    ("LSTM", dict(peepholes=True, coupled=True, gate_activation="hard_sigmoid_of_fifths", activation="relu")),
    ("GRU", dict(gate_activation="hard_sigmoid", activation="identity")),
    ("GRU", dict(reset_after=False)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_export_and_back(kind, form, options):
    """What fusedrnn.onnx.export says of a layer, read_onnx understands."""
    pytest.importorskip("onnxscript")
    layer = getattr(fusedrnn, kind)(2, 3, **form, **options).eval()
    model = fusedrnn.onnx.export(layer, (torch.randn(2, 1, 2),), verbose=False).model_proto
    names = [node.name for node in model.graph.node if node.op_type == kind]
    cell, state, found = weights.read_onnx(model, *names)
    assert (cell, found) == (kind.lower(), form)
    assert repr(weights.build(cell, state, found)) == repr(layer)
    compare_all_equal(state, layer.state_dict())


@every_options
@cells
def test_back_and_there(cell, options):
    D, GH, L = 2 if options["bidirectional"] else 1, 3 * GATES[cell], options["num_layers"]
    one = [torch.Size((2, GH) if cell == "gru" else (GH,))] if options["bias"] else []
    keras = [[torch.randn(shape) for shape in ((3 * D if k else 2, GH), (3, GH), *one) * D] for k in range(L)]
    equal(weights.to_keras(cell, weights.from_keras(cell, *keras, bidirectional=options["bidirectional"])), keras)
    onnx = random_onnx(cell, **options)
    back = weights.to_onnx(cell, weights.from_onnx(cell, *onnx, linear_before_reset=1))
    equal(*([[array for array in layer if array is not None] for layer in layers] for layers in (back, onnx)))
    flat = torch.randn(sum(weight.numel() for weight in layer_of(cell, **options).parameters()))
    assert torch.equal(weights.to_cudnn(cell, weights.from_cudnn(cell, flat, input_size=2, hidden_size=3, **options)), flat)


@pytest.mark.filterwarnings("error")
def test_read_only_arrays():
    """Such as other libraries give."""
    array = torch.randn(15, 5).numpy()
    array.flags.writeable = False
    assert weights.from_keras("gru", [array.T[:3], array.T])["weight_hh_l0"].shape == (15, 5)


@pytest.mark.parametrize("form", ["arrays", "tensors"])
@cells
def test_nothing_is_shared(cell, form):
    """Training ours changes no weights that came in or went out, nor the other way round."""
    state = layer_of(cell).state_dict()
    outward = *weights.to_keras(cell, state), *weights.to_onnx(cell, state), [weights.to_cudnn(cell, state)]
    keras, onnx, (flat,) = tensors(outward) if form == "tensors" else outward
    inward = [*weights.from_keras(cell, keras).values(), *weights.from_onnx(cell, onnx, linear_before_reset=1).values(),
              *weights.from_cudnn(cell, flat, input_size=2, hidden_size=3).values()]  # fmt: skip
    outward = list(itertools.chain(*tensors(outward)))
    before = [tensor.clone() for tensor in inward + outward]
    for tensor in (*state.values(), *outward):
        tensor.add_(1)
    after = inward + [tensor - 1 for tensor in outward]
    assert all(torch.allclose(tensor, old, atol=1e-5) for tensor, old in zip(after, before, strict=True))
