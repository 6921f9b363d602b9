"""What a type checker sees, and an editor shows: of the package, of a program that uses it, and of the compiled module."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import typing

import pytest

from documents import ROOT
from fusedrnn import _C

pytest.importorskip("mypy")

# A line is to be refused with the code that it names, and no other line with any.
CLIENT = '''
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import fusedrnn
from fusedrnn import functional

Pair = tuple[Tensor, Tensor]


def layers(x: Tensor, packed: PackedSequence, either: Tensor | PackedSequence, lengths: Tensor) -> None:
    lstm, gru, rnn = fusedrnn.LSTM(3, 5, proj_size=2), fusedrnn.GRU(3, 5), fusedrnn.RNN(3, 5, 1, "relu", device="cpu")
    assert_type(lstm, fusedrnn.LSTM)
    assert_type(lstm(x), tuple[Tensor, Pair])
    assert_type(lstm(packed, (x, x)), tuple[PackedSequence, Pair])
    assert_type(lstm(either), tuple[Tensor | PackedSequence, Pair])
    assert_type(lstm.forward(x, None, lengths=lengths), tuple[Tensor, Pair])
    output, (h, c) = lstm(nn.Parameter(x))
    assert_type(output, Tensor)
    assert_type(c, Tensor)
    assert_type(gru(x, x, lengths=lengths), tuple[Tensor, Tensor])
    assert_type(gru(packed), tuple[PackedSequence, Tensor])
    assert_type(rnn(x), tuple[Tensor, Tensor])
    assert_type(rnn(packed), tuple[PackedSequence, Tensor])
    assert_type(rnn.nonlinearity, str)
    assert_type(gru.reason_for_stock(x), str | None)
    assert_type(gru(x, reset=x > 0, return_states=True), tuple[Tensor, Tensor, tuple[Tensor, ...]])
    assert_type(gru(x, reset=x > 0, reset_to=x), tuple[Tensor, Tensor])
    assert_type(lstm(x, return_states=True, reset=x > 0, reset_to=(x, x))[2], tuple[tuple[Tensor, ...], tuple[Tensor, ...]])

    indrnn, slstm = fusedrnn.IndRNN(3, 5, 1, "tanh", zoneout=0.1), fusedrnn.SLSTM(3, 6, num_heads=2)
    assert_type(indrnn(packed), tuple[PackedSequence, Tensor])
    assert_type(slstm(x, reset=x > 0, reset_to=(x, x, x, x))[1], tuple[Tensor, Tensor, Tensor, Tensor])
    fusedrnn.LSTM(3, 5, peepholes=True, activation=("tanh", "relu"), cell_clip=1.0, num_heads=5)
    fusedrnn.GRU(3, 5, reset_after=False)
    lstm_norm, gru_norm = fusedrnn.LayerNormLSTM(3, 5, zoneout=(0.1, 0.2)), fusedrnn.LayerNormGRU(3, 5, save="states")
    assert_type(lstm_norm(packed), tuple[PackedSequence, Pair])
    assert_type(gru_norm(x, return_states=True), tuple[Tensor, Tensor, tuple[Tensor, ...]])

    fusedrnn.LSTM(3, 5, activation="sine")  # arg-type
    fusedrnn.SLSTM(3, 5, zoneout=0.1)  # call-arg
    slstm(x, (x, x))  # arg-type
    fusedrnn.LayerNormGRU(3, 5, zoneout=(0.1, 0.2))  # arg-type
    fusedrnn.LayerNormLSTM(3, 5, proj_size=2)  # call-arg
    fusedrnn.LSTM(3, "x")  # arg-type
    fusedrnn.LSTM(3)  # call-arg
    fusedrnn.LSTM(3, 5, nonlinearity="relu")  # call-arg
    fusedrnn.GRU(3, 5, zoneout=(0.1, 0.1))  # arg-type
    fusedrnn.GRU(3, 5, save="some")  # arg-type
    gru(packed, return_states=True)  # call-overload
    fusedrnn.GRU(3, 5, proj_size=2)  # call-arg
    fusedrnn.RNN(3, 5, hidden=4)  # call-arg
    fusedrnn.RNN(3, 5, 1, True)  # arg-type
    lstm(x, x)  # call-overload
    lstm([1.0])  # call-overload
    gru(x, (x, x))  # call-overload
    gru(x, x, lengths)  # call-overload
    gru(x, length=lengths)  # call-overload
    output, h, c = lstm(x)  # misc
    output.lenght  # attr-defined


class Subclass(fusedrnn.LSTM):
    def __init__(self) -> None:
        super().__init__(3, 5, bias=False, dtype=torch.float64)
        super().__init__(3, 5, bias="no")  # arg-type


def cells(x: Tensor, packed: PackedSequence) -> None:
    assert_type(fusedrnn.LSTMCell(3, 5, dtype=torch.float32)(x, (x, x)), Pair)
    assert_type(fusedrnn.GRUCell(3, 5)(x), Tensor)
    assert_type(fusedrnn.RNNCell(3, 5, nonlinearity="relu")(x, x), Tensor)

    fusedrnn.LSTMCell(3, 5, nonlinearity="relu")  # call-arg
    fusedrnn.LSTMCell(3, 5)(x, x)  # arg-type
    fusedrnn.GRUCell(3, 5)(packed)  # arg-type


def functions(x: Tensor, weights: list[Tensor]) -> None:
    assert_type(functional.lstm(x, None, weights, batch_sizes=x), tuple[Tensor, Tensor, Tensor])
    assert_type(functional.gru(x, x, weights, True, 2), tuple[Tensor, Tensor])
    assert_type(functional.rnn(x, x, weights, nonlinearity="relu"), tuple[Tensor, Tensor])
    assert_type(functional.rnn_tanh(x, None, weights, bidirectional=True), tuple[Tensor, Tensor])

    functional.lstm(x, x, weights)  # arg-type
    functional.rnn_relu(x, None)  # call-arg
    functional.rnn_relu(x, None, weights, nonlinearity="tanh")  # call-arg


def models(x: Tensor, model: nn.Sequential) -> None:
    assert_type(fusedrnn.convert(model), nn.Sequential)
    assert_type(fusedrnn.convert(model, to="torch"), nn.Sequential)
    assert_type(fusedrnn.explain(model[0], x, (x, x)), str)
    assert_type(fusedrnn.freeze(model, torch.int8), nn.Module)
    assert_type(fusedrnn.__version__, str)

    fusedrnn.convert(model, to="stock")  # arg-type
    fusedrnn.convert("model")  # type-var
    fusedrnn.freeze(model, "int8")  # arg-type
    fusedrnn.explain(model[0])  # call-arg
'''


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What mypy says of the package and of CLIENT, in one run: most of the time it reads torch."""
    cache = getattr(request.config, "cache", None)
    cache = cache.mkdir("fusedrnn_mypy") if cache else tmp_path_factory.mktemp("mypy")
    client = tmp_path_factory.mktemp("client") / "client.py"
    client.write_text(CLIENT)
    command = [sys.executable, "-m", "mypy", "--cache-dir", cache, "--no-error-summary", "fusedrnn", client]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_the_package_is_clean(found):
    assert not [line for line in found if line.startswith("fusedrnn")]


def test_a_program_is_understood(found):
    lines = CLIENT.splitlines()
    wanted = {(number, code[1]) for number, line in enumerate(lines, 1) if (code := re.search(r"  # ([a-z-]+)$", line))}
    matches = [re.search(r"client\.py:(\d+): error: .*\[([a-z-]+)\]$", line) for line in found]
    refused = {(int(match[1]), match[2]) for match in matches if match}
    assert refused == wanted, [lines[number - 1] for number, _ in refused ^ wanted] + found


# ---- the stub of the compiled module


STUB = ROOT / "fusedrnn" / "_C.pyi"
ARGUMENTS = {"cuda_plan": (("lstm", "float32"), dict(T=3, B=4, H=64, P=32, D=2, multiprocessors=132, shared_bytes=232448)),
             "cuda_stack": (("lstm", "float32"), dict(T=30, B=4, H=64, layers=3, multiprocessors=132, shared_bytes=232448))}
FUNCTIONS = [name for name in vars(_C) if not name.startswith("_")]


def executed(code):
    names = {"__name__": "stub"}
    exec(code, names)
    return names


def fits(value, hint):
    """Whether a value is of this type, in all its parts."""
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        return value.keys() == hints.keys() and all(fits(value[key], hints[key]) for key in hints)
    kind, of = typing.get_origin(hint), typing.get_args(hint)
    if kind is dict:
        return type(value) is dict and all(fits(key, of[0]) and fits(part, of[1]) for key, part in value.items())
    if kind is list:
        return type(value) is list and all(fits(part, of[0]) for part in value)
    if kind is tuple:
        return type(value) is tuple and len(value) == len(of) and all(map(fits, value, of))
    return value in of if kind is typing.Literal else type(value) is hint


def test_stub_has_all_names(tmp_path):
    """Beside copies of both, so that nothing imports torch."""
    shutil.copy2(STUB, tmp_path)
    shutil.copy2(_C.__file__, tmp_path)
    paths = {"MYPYPATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "mypy.stubtest", "_C"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stub_has_the_parameters(name):
    """As pybind11 writes them into the first line of a docstring."""
    ours = inspect.signature(executed(STUB.read_text())[name])
    theirs = executed(f"from __future__ import annotations\ndef {getattr(_C, name).__doc__.splitlines()[0]}: ...")[name]
    parameters = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (ours, inspect.signature(theirs))]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "want_large_pages"])
def test_stub_has_the_results(name):
    args, kwargs = ARGUMENTS.get(name, ((), {}))
    value = getattr(_C, name)(*args, **kwargs)
    assert fits(value, inspect.signature(executed(STUB.read_text())[name]).return_annotation), value
