"""Writes keras.json: layers that Keras made and ran, for tests/test_layouts.py to hold ours against.

pip install keras, then, with torch or any other of its backends: KERAS_BACKEND=torch python tests/data/write_keras.py
"""

import json
from pathlib import Path

import keras
import numpy as np
from keras import layers

ROWS, STEPS, INPUT, HIDDEN = 2, 4, 2, 3
SINGLE = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn_tanh": layers.SimpleRNN, "rnn_relu": layers.SimpleRNN}


def single(cell, **options):
    if cell == "rnn_relu":
        options["activation"] = "relu"
    return SINGLE[cell](HIDDEN, return_sequences=True, **options)


def draw(generator, shape):
    """Numbers up to 1 with few digits."""
    return (generator.integers(-32, 33, shape) / 32).astype("float32")


def plain(array):
    """Nested lists, with as few digits as tell a float32."""
    return [plain(part) for part in array] if array.ndim else float(str(array))


def record(cell, *stack, form=None, **options):
    """One case: each layer's weights, drawn at random, an input and Keras's output, all of float32; form: our layer's options."""
    generator = np.random.default_rng(0)
    input = output = draw(generator, (ROWS, STEPS, INPUT))
    for layer in stack:
        layer.build(output.shape)
        layer.set_weights([draw(generator, w.shape) for w in layer.get_weights()])
        output = keras.ops.convert_to_numpy(layer(output))
    weights = [[plain(array) for array in layer.get_weights()] for layer in stack]
    form = {"form": form} if form else {}
    return {"cell": cell, "options": options, **form, "layers": weights, "input": plain(input), "output": plain(output)}


cases = {}
for cell in SINGLE:
    cases[cell] = record(cell, single(cell))
    cases[f"{cell}, no bias"] = record(cell, single(cell, use_bias=False))
    cases[f"{cell}, bidirectional"] = record(cell, layers.Bidirectional(single(cell)), bidirectional=True)
cases["lstm, two layers"] = record("lstm", single("lstm"), single("lstm"))
both = (layers.Bidirectional(single("gru")) for _ in range(2))
cases["gru, two layers, bidirectional"] = record("gru", *both, bidirectional=True)
cases["gru, resets before"] = record("gru", single("gru", reset_after=False), form={"reset_after": False}, reset_after=False)
hard = single("lstm", recurrent_activation="hard_sigmoid")
cases["lstm, hard sigmoid"] = record("lstm", hard, form={"gate_activation": "hard_sigmoid"})
cases["lstm, relu"] = record("lstm", single("lstm", activation="relu"), form={"activation": "relu"})
hard = single("gru", recurrent_activation="hard_sigmoid", activation="linear")
cases["gru, hard sigmoid and linear"] = record("gru", hard, form={"gate_activation": "hard_sigmoid", "activation": "identity"})

wrote = f"Keras {keras.__version__}, backend {keras.backend.backend()}"
lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in {"wrote": wrote, **cases}.items())
Path(__file__).with_name("keras.json").write_text(f"{{\n{lines}\n}}\n")
