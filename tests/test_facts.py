"""README's table of what each library can do: each cell has its source, and what is said of torch on the CPU is seen here.

A test of stock torch that fails with a new torch is news: docs/facts.json wants another value, then python -m benchmarks.facts.
"""

import ast
import functools
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
import torchgen
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fusedrnn
from benchmarks import facts, report
from documents import README, ROOT
from models import KINDS, kinds

FACTS = facts.load()
COLUMNS, ROWS = FACTS["columns"], FACTS["rows"]
pytestmark = pytest.mark.filterwarnings("ignore")
every_cell = pytest.mark.parametrize(
    "column, cell", [pytest.param(column, row[column], id=f"{row['ability']}-{column}") for row in ROWS for column in COLUMNS])


# ---------------------------------------------------------------------------------------------------------------------
# The table and its sources
# ---------------------------------------------------------------------------------------------------------------------


def is_test(source):
    """Whether a source is the name of a test that is there."""
    path, separator, name = source.partition("::")
    if not separator or not re.fullmatch(r"tests/test_\w+\.py", path) or not (ROOT / path).exists():
        return False
    return name.startswith("test_") and name in functions(path)


@functools.cache
def functions(path):
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_readme_is_up_to_date():
    assert facts.main(["--check"]) == 0


def test_the_table_is_written_and_checked(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "facts.json").write_bytes((ROOT / "docs" / "facts.json").read_bytes())
    begin, end = report.markers("facts")
    (tmp_path / "README.md").write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    assert facts.main(["--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert facts.main([]) == 0 and facts.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| [no](tests/test_facts.py) | [no](https://github.com/pytorch/pytorch/issues/158007) |" in text
    (tmp_path / "README.md").write_text("no markers")
    assert facts.main([]) == 1 and begin in capsys.readouterr().err


def test_rows_are_whole():
    assert len({row["ability"] for row in ROWS}) == len(ROWS)
    assert all(list(row) == ["ability", *COLUMNS] for row in ROWS)
    assert all(prefix.startswith("https://") and prefix.endswith("/") for prefix in FACTS["sources"].values())
    assert f"{report.markers('facts')[0]}\n{facts.table(FACTS)}\n" in README.read_text()


@every_cell
def test_cell_has_its_source(column, cell):
    value, *sources = cell
    assert value and "|" not in value
    if value in facts.UNSOURCED:
        assert not sources and column != "fusedrnn"
        return
    assert sources
    for source in sources:
        public = re.fullmatch(r"https://[\w./#?=~-]+", facts.address(source, FACTS["sources"]))
        assert is_test(source) or public, source
        assert column not in ("torch on CPU", "fusedrnn") or is_test(source), source


def test_a_wrong_source_is_found():
    for source in ("tests/test_facts.py", "tests/test_facts.py::test_nothing", "tests/test_nothing.py::test_readme_is_up_to_date",
                   "tests/test_facts.py::is_test", "issue:1"):  # fmt: skip
        assert not is_test(source)
    assert is_test("tests/test_facts.py::test_a_wrong_source_is_found")


# ---------------------------------------------------------------------------------------------------------------------
# torch on the CPU
# ---------------------------------------------------------------------------------------------------------------------


def stock(kind, dtype=torch.float32, **options):
    """torch.nn's layer, its weights, and an input."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(3, 4, dtype=dtype, **options)
    return layer, {name: p.detach() for name, p in layer.named_parameters()}, torch.randn(3, 2, 3, dtype=dtype)


def by_onednn(kind, dtype):
    return kind == "LSTM" and dtype == torch.float32


formats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@kinds
def test_compile_refuses(kind, nothing_compiled):
    layer, _, input = stock(kind)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(layer, fullgraph=True, backend="eager")(input)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_allow_rnn_unrolls_time(kind, nothing_compiled):
    """A graph for each number of steps, but for the LSTM of oneDNN without gradients."""
    layer, counter, found = stock(kind)[0], CompileCounterWithBackend("eager"), []
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
        for sizes in ((2, 4), (3, 5)):
            compiled(torch.randn(*sizes, 3))
            found.append(counter.frame_count)
    assert (found[0] == found[1]) == (kind == "LSTM")


def test_allow_rnn_cannot_train_the_lstm(nothing_compiled):
    layer, _, input = stock("LSTM")
    with torch._dynamo.config.patch(allow_rnn=True), pytest.raises(AssertionError, match="NoneType"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(input)


@kinds
def test_export_fixes_time(kind):
    layer, _, input = stock(kind)
    logging.disable(logging.ERROR)
    try:
        with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
            export(layer, (input,), dynamic_shapes={"input": {0: Dim("T")}})
        program = export(layer, (input,), dynamic_shapes={"input": {1: Dim("B")}})
    finally:
        logging.disable(logging.NOTSET)
    other = torch.randn(3, 5, 3)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_onnx_exporters_and_time(tmp_path):
    """Seen with the LSTM. The older exporter has a node for any T and B, the newer does not take a T that is free."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, _, input = stock("LSTM")
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(layer, (input,), path, dynamo=False, input_names=["input"], dynamic_axes={"input": {0: "T", 1: "B"}})
    session, other = onnxruntime.InferenceSession(path), torch.randn(7, 5, 3)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": other.numpy()})[0]), layer(other)[0].detach())
    assert b"LSTM" in Path(path).read_bytes()
    with pytest.raises(Exception, match="tracing inferred a static shape"):
        torch.onnx.export(layer, (input,), dynamo=True, verbose=False, dynamic_shapes={"input": {0: Dim.DYNAMIC}})


@formats
@kinds
def test_double_backward(kind, dtype):
    layer, _, input = stock(kind, dtype)
    input.requires_grad_()
    (first,) = torch.autograd.grad(layer(input)[0].square().sum(), input, create_graph=True)
    first.square().sum().backward()
    assert input.grad.abs().sum() > 0


@kinds
def test_backward_in_eval_mode(kind):
    layer, _, input = stock(kind)
    layer.eval()(input)[0].sum().backward()
    assert layer.weight_hh_l0.grad.abs().sum() > 0


@formats
@kinds
def test_forward_mode(kind, dtype):
    layer, _, input = stock(kind, dtype)
    for derivative in (lambda: jvp(lambda x: layer(x)[0], (input,), (input,)),
                       lambda: hessian(lambda x: layer(x)[0].square().sum())(input)):  # fmt: skip
        if by_onednn(kind, dtype):
            with pytest.raises(NotImplementedError, match="forward AD with mkldnn_rnn_layer"):
                derivative()
        else:
            derivative()


@formats
@kinds
def test_vmap(kind, dtype):
    layer, _, input = stock(kind, dtype)
    weights, _ = stack_module_state([layer, layer])
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda x: layer(x)[0])(torch.stack([input, input]))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda w: functional_call(layer, w, (input,))[0])(weights)


@formats
@kinds
def test_gradients_of_each_sample(kind, dtype):
    layer, weights, input = stock(kind, dtype)
    each = vmap(grad(lambda w, x: functional_call(layer, w, (x,))[0].sum()), (None, 0))
    inputs = torch.stack([input, -input])
    if by_onednn(kind, dtype):
        assert each(weights, inputs)["weight_hh_l0"].shape == (2, 16, 4)
    else:
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            each(weights, inputs)


def test_what_torch_has_no_words_for():
    """No argument of a layer or of its call; ours have some."""
    ours = {"zoneout", "weight_dropout", "recurrent_dropout"}
    of_some = {"LSTM": {"num_heads", "peepholes", "coupled", "gate_activation"}, "GRU": {"num_heads", "gate_activation"}}
    neither = {"layer_norm"}  # for which ours have classes
    for kind in KINDS:
        stock = getattr(nn, kind)
        options = {*inspect.signature(nn.RNNBase).parameters, *inspect.signature(stock).parameters}
        assert not options & (ours | neither | of_some["LSTM"])
        own = {*inspect.signature(getattr(fusedrnn, kind)).parameters}
        assert own >= ours | of_some.get(kind, set()) and not own & neither
        assert not {"lengths", "reset"} & {*inspect.signature(stock.forward).parameters}
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            stock(3, 4, zoneout=0.1)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            getattr(fusedrnn, kind)(3, 4, layer_norm=True)
    layers = {"IndRNN", "SLSTM", "LayerNormLSTM", "LayerNormGRU"}
    assert not layers & {*dir(nn)} and layers <= {*dir(fusedrnn)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_autocast(kind, dtype):
    layer, _, input = stock(kind)
    onednn = torch.ops.mkldnn
    has = onednn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported()
    with torch.autocast("cpu", dtype):
        if kind == "LSTM" and not has:
            with pytest.raises(RuntimeError, match="could not create a primitive"):
                layer(input)
        else:
            assert layer(input)[0].dtype == (torch.float32 if kind == "GRU" else dtype)


@kinds
def test_same_bits(kind):
    layer, _, _ = stock(kind, bidirectional=True)
    input, found = torch.randn(9, 8, 3), []
    for _ in range(5):
        layer.zero_grad()
        layer(input)[0].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    assert all(torch.equal(other, found[0]) for other in found)


@kinds
def test_quantize_dynamic(kind):
    layer, _, input = stock(kind)
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})[0]
    assert type(quantized).__module__.startswith("torch.ao") == (kind != "RNN")
    assert quantized(input)[0].shape == (3, 2, 4)


@formats
@kinds
def test_flop_counter(kind, dtype):
    layer, _, input = stock(kind, dtype)
    with FlopCounterMode(display=False) as counter:
        layer(input)[0].sum().backward()
    assert (counter.get_total_flops() == 0) == by_onednn(kind, dtype)


@kinds
def test_onednn_has_the_lstm_only(kind):
    layer, _, input = stock(kind)
    with torch.profiler.profile() as profile:
        layer(input)
    assert any("mkldnn_rnn_layer" in event.key for event in profile.key_averages()) == (kind == "LSTM")


# ---------------------------------------------------------------------------------------------------------------------
# What this torch's own files say of cuDNN
# ---------------------------------------------------------------------------------------------------------------------


def test_derivatives_of_cudnn():
    """No forward mode, no double backward."""
    text = (Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml").read_text()
    forward, backward = (re.search(rf"^- name: {name}\(.*?\n\n", text, re.M | re.S)[0].split("\n\n")[0]
                         for name in ("_cudnn_rnn", "_cudnn_rnn_backward"))  # fmt: skip
    assert "result:" not in forward and 'input: not_implemented("_cudnn_rnn_backward"' in backward


def test_flops_of_cudnn():
    assert not any("cudnn_rnn" in str(operator) for operator in flop_registry)
