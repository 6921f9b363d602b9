"""torch.export, AOTInductor and ONNX: programs for any number of steps and rows, which compute the same without this package's Python."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import fusedrnn
import fusedrnn.onnx
from conftest import states_for
from documents import ROOT
from models import Model, all_kinds, input_for, kinds

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = [dict(), dict(num_layers=2, bidirectional=True, batch_first=True), dict(bias=False)]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
close = torch.testing.assert_close
ANY = {0: Dim("a"), 1: Dim("b")}


def inputs():
    return [torch.randn(*sizes, 3) for sizes in ((6, 7), (9, 2), (2, 11))]


@pytest.mark.parametrize("strict", [False, True])
@options
@kinds
def test_export(kind, options, strict):
    """Steps and rows are free."""
    model = Model(kind, **options).eval()
    program = export(model, (inputs()[0],), strict=strict, dynamic_shapes={"input": ANY})
    assert any("fusedrnn.recurrence_forward" in str(node.target) for node in program.graph.nodes)
    run = program.module()
    for input in inputs():
        close(run(input), model(input))


@kinds
def test_decompositions(kind):
    model = Model(kind, **OPTIONS[1]).eval()
    program = export(model, (inputs()[0],), dynamic_shapes={"input": ANY}).run_decompositions()
    run = program.module()
    for input in inputs():
        close(run(input), model(input))


@all_kinds
def test_export_of_fixed_sizes(kind):
    model, input = Model(kind).eval(), input_for(kind)
    close(export(model, (input,)).module()(input), model(input))


@pytest.mark.parametrize("strict", [False, True])
@kinds
def test_export_with_lengths(kind, strict):
    model = Model(kind, batch_first=True).eval()
    lengths = torch.tensor([7, 2, 3, 1, 5, 6])
    program = export(model, (inputs()[0], lengths), strict=strict, dynamic_shapes={"input": ANY, "lengths": {0: ANY[0]}})
    run = program.module()
    for input in inputs():
        lengths = torch.randint(0, input.shape[1] + 1, (len(input),))
        close(run(input, lengths), model(input, lengths))


def test_saved_program(tmp_path):
    """It is loaded where only the operators are: their library, without this package."""
    model, input = Model("LSTM", num_layers=2).eval(), inputs()[0]
    torch.export.save(export(model, (input,), dynamic_shapes={"input": ANY}), tmp_path / "model.pt2")
    torch.save((inputs()[1], model(inputs()[1])), tmp_path / "expected.pt")
    (input, expected) = torch.load(tmp_path / "expected.pt")
    torch.save((input, model(input)), tmp_path / "expected.pt")
    code = f"""
import sys, torch
torch.ops.load_library({str(ROOT / "fusedrnn" / "_ops.so")!r})
program = torch.export.load({str(tmp_path / "model.pt2")!r})
input, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(program.module()(input), expected)
assert "fusedrnn" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


def test_program_without_our_operators():
    """convert(model, to="torch") first: torch's own operators, for a place where nothing of this package is."""
    model, input = Model("GRU").eval(), inputs()[0]
    expected = model(input)
    program = export(fusedrnn.convert(model, to="torch"), (input,))
    assert "fusedrnn" not in str(program.graph)
    close(program.module()(input), expected)


def test_aoti(tmp_path):
    """An AOTInductor package, with free sizes and lengths."""
    model = Model("LSTM", num_layers=2, bidirectional=True, batch_first=True).eval()
    lengths = torch.tensor([7, 2, 3, 1, 5, 6])
    sizes = {0: Dim("a", min=2, max=64), 1: Dim("b", min=2, max=512)}
    with torch.no_grad():
        program = export(model, (inputs()[0], lengths), dynamic_shapes={"input": sizes, "lengths": {0: sizes[0]}})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for input in inputs():
            lengths = torch.randint(0, input.shape[1] + 1, (len(input),))
            close(run(input, lengths), model(input, lengths))


# ---------------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """All that a layer returns."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = getattr(fusedrnn, kind)(4, 5, **options)

    def forward(self, input, hx, lengths):
        return self.rnn(input, hx) if lengths is None else self.rnn(input, hx, lengths=lengths)


def run_onnx(program, arguments):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = program.model_proto.SerializeToString() if hasattr(program, "model_proto") else program
    session = onnxruntime.InferenceSession(model)
    flat = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if leaf is not None]
    return [torch.from_numpy(t) for t in session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), flat)})]


def nodes_of(program):
    return [node.op_type for node in program.model_proto.graph.node]


of_calls = pytest.mark.parametrize("options, given", [
    ({}, "nothing"), (OPTIONS[1], "both"), (dict(bias=False, bidirectional=True), "lengths")], ids=str)  # fmt: skip


@of_calls
@kinds
def test_onnx_nodes(kind, options, given):
    """One node a layer, in ONNX's order of gates, for any steps and rows: onnxruntime has our numbers."""
    check_nodes(kind, options, given)


def check_nodes(kind, options, given):
    pytest.importorskip("onnxscript")
    model = Whole(kind, **options).eval()
    some = {1: Dim.DYNAMIC}
    of_states = ((some, some) if kind == "LSTM" else some) if given in ("states", "both") else None
    of_lengths = {0: Dim.DYNAMIC} if given in ("lengths", "both") else None

    def arguments(*sizes):
        rows, steps = sizes if model.rnn.batch_first else sizes[::-1]
        return (torch.randn(*sizes, 4), states_for(model.rnn, rows) if of_states else None,
                torch.randint(1, steps + 1, (rows,)) if of_lengths else None)  # fmt: skip

    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, of_states, of_lengths)
    program = fusedrnn.onnx.export(model, arguments(6, 3), dynamic_shapes=dynamic, verbose=False)
    assert nodes_of(program).count(kind) == model.rnn.num_layers and "Loop" not in nodes_of(program)
    for sizes in ((6, 3), (2, 9)):
        call = arguments(*sizes)
        expected = torch.utils._pytree.tree_leaves(model(*call))
        close(run_onnx(program, call), expected)
    # What torch has recorded, run by torch, as its own comparison of both does.
    close(torch.utils._pytree.tree_leaves(program.exported_program.module()(*call)), expected)


# For each form what its node has besides the sizes, ONNX's defaults left out.
FIFTH, SIXTH = 0.2, 1 / 6
FORMS = [
    ("LSTM", dict(peepholes=True), {}),
    ("LSTM", dict(coupled=True), dict(input_forget=1)),
    ("LSTM", dict(peepholes=True, coupled=True, activation="relu"), dict(activations=["Sigmoid", "Relu", "Relu"], input_forget=1)),
    ("LSTM", dict(gate_activation="hard_sigmoid", activation=("identity", "tanh"), peepholes=True),
     dict(activations=["HardSigmoid", "Affine", "Tanh"], activation_alpha=[SIXTH, 1.0], activation_beta=[0.5, 0.0])),
    ("LSTM", dict(activation=("tanh", "identity")),
     dict(activations=["Sigmoid", "Tanh", "Affine"], activation_alpha=[1.0], activation_beta=[0.0])),
    ("GRU", dict(gate_activation="hard_sigmoid_of_fifths", activation="relu"),
     dict(activations=["HardSigmoid", "Relu"], activation_alpha=[FIFTH], activation_beta=[0.5], linear_before_reset=1)),
    ("GRU", dict(activation="identity"),
     dict(activations=["Sigmoid", "Affine"], activation_alpha=[1.0], activation_beta=[0.0], linear_before_reset=1)),
    ("GRU", dict(reset_after=False), {}),
]  # fmt: skip
forms = pytest.mark.parametrize("kind, form, attributes", FORMS, ids=[f"{kind}, {form}" for kind, form, _ in FORMS])


@of_calls
@forms
def test_onnx_forms(kind, form, attributes, options, given):
    """And of what torch.nn has not."""
    check_nodes(kind, {**options, **form}, given)


@forms
def test_onnx_attributes(kind, form, attributes):
    """A node says its form in ONNX's words, those of functions once for each direction."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = Whole(kind, bidirectional=True, **form).eval()
    proto = fusedrnn.onnx.export(model, (torch.randn(6, 3, 4), None, None), verbose=False).model_proto
    (node,) = (node for node in proto.graph.node if node.op_type == kind)
    found = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    assert (found.pop("hidden_size"), found.pop("direction")) == (5, b"bidirectional")
    assert [name.decode() for name in found.pop("activations", [])] == 2 * attributes.get("activations", [])
    for name in ("activation_alpha", "activation_beta"):
        assert found.pop(name, []) == pytest.approx(2 * attributes.get(name, []))
    numbers = {name: value for name, value in attributes.items() if isinstance(value, int)}
    assert {name: value for name, value in found.items() if value} == numbers
    assert (len(node.input) > 7 and node.input[7] != "") == form.get("peepholes", False)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_onnx_activations(nonlinearity):
    pytest.importorskip("onnxscript")
    model = Whole("RNN", nonlinearity=nonlinearity, bidirectional=True).eval()
    call = (torch.randn(6, 3, 4), None, None)
    close(run_onnx(fusedrnn.onnx.export(model, call, verbose=False), call), list(model(*call)))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_onnx_cells(kind):
    pytest.importorskip("onnxscript")
    model, input = Model(kind).eval(), torch.randn(2, 3)
    program = fusedrnn.onnx.export(model, (input,), verbose=False)
    assert kind.removesuffix("Cell") in nodes_of(program)
    close(run_onnx(program, (input,)), [model(input)])


@kinds
def test_onnx_unbatched(kind):
    pytest.importorskip("onnxscript")
    model, input = Model(kind).eval(), torch.randn(6, 3)
    close(run_onnx(fusedrnn.onnx.export(model, (input,), verbose=False), (input,)), [model(input)])


def test_onnx_cannot_say_it():
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="ONNX has no projections, and 'rnn' has proj_size=2"):
        fusedrnn.onnx.export(Whole("LSTM", proj_size=2), (torch.randn(6, 3, 4), None, None))
    for kind, options, words in (
        ("LSTM", dict(cell_clip=3.0, peepholes=True), "ONNX has no cell_clip, and 'rnn' has cell_clip=3.0"),
        ("GRU", dict(num_heads=5), "ONNX has no num_heads, and 'rnn' has num_heads=5"),
        ("IndRNN", {}, r"ONNX has no IndRNN, and 'rnn' is one: IndRNN\(4, 5\)"),
        ("SLSTM", {}, r"ONNX has no SLSTM, and 'rnn' is one: SLSTM\(4, 5\)"),
    ):
        with pytest.raises(ValueError, match=f"^fusedrnn.onnx.export: {words}$"):
            fusedrnn.onnx.export(Whole(kind, **options), (torch.randn(6, 3, 4), None, None))

    class Limited(nn.Module):
        def forward(self, input):
            weights = [torch.zeros(20, 4), torch.zeros(20, 5)]
            cell = fusedrnn.reference.Choice(clip=3.0).of("lstm_general")
            return fusedrnn.functional.stack(cell, input, None, None, weights, False, 1, 0.0, False, False, False, None)[0]

    with pytest.raises(torch.onnx.OnnxExporterError, match="is not written for the cell lstm_general:sigmoid,tanh,tanh,3.0"):
        fusedrnn.onnx.export(Limited(), (torch.randn(6, 3, 4),), verbose=False)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.GRU(4, 5)

        def forward(self, data):
            return self.rnn(nn.utils.rnn.PackedSequence(data, torch.tensor([3, 2, 1])))[0].data

    with pytest.raises(torch.onnx.OnnxExporterError, match="ONNX has no packed sequences; give padded input and lengths"):
        fusedrnn.onnx.export(Packed(), (torch.randn(6, 4),), verbose=False)
    assert not fusedrnn.onnx.is_recording()


@pytest.mark.parametrize("dynamo", [True, False])
@kinds
def test_torchs_own_onnx_export(kind, dynamo, tmp_path):
    """As with torch.nn: nodes for one number of steps, or, of the newer exporter and an RNN, every step written out."""
    pytest.importorskip("onnxscript")
    model, input = Model(kind, bidirectional=True).eval(), inputs()[0]
    if dynamo:
        program = torch.onnx.export(model, (input,), dynamo=True, verbose=False)
        assert "fusedrnn" not in str(nodes_of(program))
    else:
        program = str(tmp_path / "model.onnx")
        torch.onnx.export(model, (input,), program, dynamo=False)
    close(run_onnx(program, (input,)), [model(input)])
