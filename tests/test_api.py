"""The public face: what is exported, that every example in a docstring runs, and what the modules say of themselves."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusedrnn

MODULES = [name for _, name, _ in pkgutil.iter_modules(fusedrnn.__path__) if not name.startswith("_")]
PUBLIC = ["RNN", "LSTM", "GRU", "IndRNN", "SLSTM", "LayerNormLSTM", "LayerNormGRU", "RNNCell", "LSTMCell", "GRUCell", "convert", "explain",
          "freeze", "functional", "patch"]


def test_exports():
    assert set(PUBLIC) <= set(fusedrnn.__all__)
    assert all(hasattr(fusedrnn, name) for name in fusedrnn.__all__)
    assert isinstance(fusedrnn.__version__, str) and fusedrnn.__version__[0].isdigit()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"fusedrnn.{name}")
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, verbose=False, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_public_things_have_examples():
    """Each exported class and function shows a call that runs."""
    for name in PUBLIC:
        thing = getattr(fusedrnn, name)
        if not inspect.ismodule(thing):
            assert ">>>" in thing.__doc__, name
    for name in ("compare_modules", "compare_tensors"):
        assert ">>>" in getattr(importlib.import_module("fusedrnn.testing"), name).__doc__


@pytest.mark.parametrize("name", ["", *MODULES])
def test_every_module_says_what_it_is(name):
    module = importlib.import_module(f"fusedrnn.{name}".rstrip("."))
    assert module.__doc__ and len(module.__doc__.strip()) > 20


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_signatures_show_the_arguments(kind):
    """torch.nn shows (*args, **kwargs); editors and torch.nn.utils.skip_init need names."""
    parameters = list(inspect.signature(getattr(fusedrnn, kind)).parameters)
    own = ["zoneout", "recurrent_dropout", "weight_dropout", "save"]
    own += {"LSTM": ["forget_bias", "peepholes", "coupled", "gate_activation", "activation", "cell_clip", "num_heads"],
            "GRU": ["gate_activation", "activation", "num_heads", "reset_after"]}.get(kind, [])  # fmt: skip
    of_torch = [name for name in parameters if name not in own]
    assert of_torch[:2] == ["input_size", "hidden_size"] and of_torch[-2:] == ["device", "dtype"]
    assert parameters == of_torch + ([] if "Cell" in kind else own)
    if "Cell" in kind:
        assert parameters == list(inspect.signature(getattr(nn, kind)).parameters)
    assert ("proj_size" in parameters) == (kind == "LSTM")


def test_import_is_quiet_and_changes_no_global_state():
    script = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.nn.LSTM\n"
        "import fusedrnn\n"
        "after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.nn.LSTM\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stdout + done.stderr


def test_info_runs():
    done = subprocess.run([sys.executable, "-m", "fusedrnn.info"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in (torch.__version__, *fusedrnn._C.cpu_isas()):
        assert word in done.stdout


def test_fuzz_repeats_a_case_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "fusedrnn.fuzz", "7"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Case(seed=7,") and "ok   output" in done.stdout
