"""Weights in and out: those of recurrent layers as Keras, ONNX and cuDNN lay them out, to and from a state_dict.

    state = fusedrnn.weights.from_keras("lstm", layer.get_weights())  # torch.nn's names and order of gates, which are ours
    lstm = fusedrnn.weights.build("lstm", state)
    (arrays,) = fusedrnn.weights.to_keras("lstm", lstm.state_dict())

Libraries have several formulas under one name: a GRU may reset its state before the product, or after it, as torch's does.
What a state_dict does not tell of its formula are options of our layers, which `build` is given; what no layer of ours computes is
refused. torch's gates are i, f, g, o in an LSTM and r, z, n in a GRU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from . import modules, options
from .base import FusedLayer
from .functional import group_weights
from .onnx import FUNCTIONS, NODES, PEEPHOLES
from .reference import GATE_FUNCTIONS, VALUE_FUNCTIONS, Weights

if TYPE_CHECKING:
    import numpy
    import onnx

    Array = numpy.ndarray[Any, Any]
    OnnxLayer = tuple[Array, Array, Array | None] | tuple[Array, Array, Array | None, Array]

# For each cell the places of a library's gates among torch's. cuDNN's are torch's.
_KERAS = {"rnn_tanh": (0,), "rnn_relu": (0,), "lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}
_ONNX = {cell: NODES[cell][1] for cell in _KERAS}

# Which functions a node's f, g and h may be; the first is ONNX's default.
_FUNCTIONS = {"RNN": (("tanh", "relu"),), "LSTM": (GATE_FUNCTIONS, VALUE_FUNCTIONS, VALUE_FUNCTIONS),
              "GRU": (GATE_FUNCTIONS, VALUE_FUNCTIONS)}  # fmt: skip
_HARD_SIGMOID = FUNCTIONS["hard_sigmoid_of_fifths"][1]  # alpha and beta by default
_RESETS_BEFORE = "resets the state before its product, and torch's GRU after it"


def build(cell: str, state: Mapping[str, Tensor], form: Mapping[str, Any] | None = None, **options: Any) -> FusedLayer:
    """A layer of these weights: sizes and dtype follow from them, and whether there are peepholes.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        state: a state_dict, as the functions below return it.
        form: options as well, as `read_onnx` returns them.
        options: of the constructor, such as batch_first or dropout, and those that make another formula of the cell: coupled,
            gate_activation, activation, cell_clip and reset_after.

    Returns:
        a `fusedrnn.RNN`, `LSTM` or `GRU`.

    Raises:
        ValueError: these are not the weights of one such layer, or stack of layers, without projections.

    >>> import fusedrnn
    >>> build("gru", fusedrnn.GRU(3, 5, num_layers=2).state_dict(), batch_first=True)
    GRU(3, 5, num_layers=2, batch_first=True)
    >>> lstm = fusedrnn.LSTM(3, 5, peepholes=True, gate_activation="hard_sigmoid")
    >>> build("lstm", lstm.state_dict(), gate_activation="hard_sigmoid")
    LSTM(3, 5, peepholes=True, gate_activation='hard_sigmoid')
    """
    options = {**(form or {}), **options}
    sizes, _ = _read("fusedrnn.weights.build", cell, state, coupled=options.get("coupled", False), may_have_peepholes=True)
    module = _module(cell, **{**sizes, "dtype": state["weight_ih_l0"].dtype, **options})
    module.load_state_dict(state)
    return module


# ---- Keras


def from_keras(cell: str, *layers: Sequence[Any], bidirectional: bool = False,
               reset_after: bool = True) -> dict[str, Tensor]:
    """Weights of a Keras SimpleRNN, LSTM or GRU, as it is or in Bidirectional; of several, one upon the other.

    A Keras layer has a kernel `(I, G*H)`, a recurrent_kernel `(H, G*H)` and maybe a bias `(G*H,)`, in a GRU (2, 3H); gates
    in the order i, f, c, o in an LSTM, z, r, h in a GRU. Bidirectional has all of forward, then all of backward. A single
    bias becomes bias_ih, and bias_hh is zero. Weights do not show Keras's recurrent_activation and activation, which are
    gate_activation and activation of `build` ("linear" is "identity"; "hard_sigmoid" of Keras before 3 is
    "hard_sigmoid_of_fifths"). go_backwards and merge_mode must be as Keras has them by default. Source:
    keras/src/layers/rnn/lstm.py, gru.py, simple_rnn.py and bidirectional.py of Keras 3.15.

    Args:
        cell: as in `build`.
        layers: for each layer what its get_weights() gives, arrays or tensors.
        bidirectional: whether they are of Bidirectional.
        reset_after: GRU's option. torch's formula has it; False is for `fusedrnn.GRU(reset_after=False)` alone, and `build`
            is to be told.

    Returns:
        a state_dict for torch.nn's and our layers, which shares no memory with what was given.

    Raises:
        ValueError: a shape or a count does not fit, or reset_after does not fit a bias.
        TypeError: a layer is no list of arrays of floating point.

    >>> import torch
    >>> state = from_keras("lstm", [torch.randn(3, 20), torch.randn(5, 20), torch.randn(20)])
    >>> {name: tuple(weight.shape) for name, weight in state.items()}
    {'weight_ih_l0': (20, 3), 'weight_hh_l0': (20, 5), 'bias_ih_l0': (20,), 'bias_hh_l0': (20,)}
    """
    who = "fusedrnn.weights.from_keras"
    order = _order(who, cell, _KERAS)
    two_biases = cell == "gru" and reset_after
    D = 2 if bidirectional else 1
    given = _tensors(who, layers, (2 * D, 3 * D), "kernel, recurrent_kernel and maybe bias for each direction")
    I, H, G, each = len(given[0][0]), len(given[0][1]), len(order), len(given[0]) // D
    weights: list[Tensor] = []
    for k, layer in enumerate(given):
        for d in range(D):
            of = f"of layer {k}" + (" backward" if d else " forward") * (D - 1)
            kernel, recurrent, *biases = layer[d * each: (d + 1) * each]
            _check(who, f"kernel {of}", kernel, (D * H if k else I, G * H))
            _check(who, f"recurrent_kernel {of}", recurrent, (H, G * H))
            weights += [_to_torch(kernel.T, order), _to_torch(recurrent.T, order)]
            for bias in biases:
                if two_biases and bias.shape == (G * H,):
                    got = f"shape ({G * H},) of reset_after=False, which {_RESETS_BEFORE}"
                    raise ValueError(f"{who}: bias {of} must be of shape (2, {G * H}), got {got}")
                _check(who, f"bias {of}", bias, (2, G * H) if two_biases else (G * H,))
                pair = bias if two_biases else (bias, torch.zeros_like(bias))
                weights += [_to_torch(part, order) for part in pair]
    return _named(cell, weights, _sizes(I, H, len(given), each == 3, bidirectional))


def to_keras(cell: str, state: Mapping[str, Tensor], *, reset_after: bool = True) -> list[list[Array]]:
    """Weights for Keras: the inverse of `from_keras`, and there is its layout.

    Args:
        cell, state: as in `build`.
        reset_after: as in `from_keras`.

    Returns:
        for each layer the arrays that its set_weights takes. All but a GRU that resets after its product have one bias: bias_ih +
        bias_hh, rounded.

    Raises:
        ValueError: as in `build`; or there are peepholes or coupled gates, which Keras has not.
        TypeError: NumPy has not the weights' dtype.

    >>> import fusedrnn
    >>> (arrays,) = to_keras("gru", fusedrnn.GRU(3, 5).state_dict())  # for keras.layers.GRU(5)
    >>> [array.shape for array in arrays]
    [(3, 15), (5, 15), (2, 15)]
    """
    who = "fusedrnn.weights.to_keras"
    order = _order(who, cell, _KERAS)
    two_biases = cell == "gru" and reset_after
    layers = []
    for layer in _read(who, cell, state)[1]:
        arrays = []
        for weight_ih, weight_hh, bias_ih, bias_hh, _ in layer:
            arrays += [_from_torch(weight_ih, order).T, _from_torch(weight_hh, order).T]
            if bias_ih is not None and bias_hh is not None:
                pair = _from_torch(bias_ih, order), _from_torch(bias_hh, order)
                arrays.append(torch.stack(pair) if two_biases else pair[0] + pair[1])
        layers.append([_array(who, tensor) for tensor in arrays])
    return layers


# ---- ONNX


def from_onnx(cell: str, *layers: Sequence[Any], linear_before_reset: int | None = None,
              input_forget: int = 0) -> dict[str, Tensor]:
    """Weights of an RNN, LSTM or GRU node of ONNX; of several, one upon the other. `read_onnx` takes them out of a model.

    A node has W `(D, G*H, I)`, R `(D, G*H, H)`, maybe B `(D, 2*G*H)`, W's biases before R's, and an LSTM maybe P `(D, 3*H)`,
    peepholes in the order i, o, f; gates in the order i, o, f, c in an LSTM, z, r, h in a GRU. Activations, which weights do not
    show, are gate_activation and activation of `build`. Source: onnx.ai/onnx/operators, RNN, LSTM and GRU of version 22.

    Args:
        cell: as in `build`.
        layers: for each layer W, R, maybe B and maybe P, arrays or tensors; None is no B.
        linear_before_reset: GRU's attribute, which must be said: ONNX's default is 0, and torch's formula has 1. 0 is for
            `fusedrnn.GRU(reset_after=False)` alone, and `build` is to be told.
        input_forget: LSTM's attribute. 1 is for `fusedrnn.LSTM(coupled=True)`, and `build` is to be told; what is there of f, which
            ONNX does not look at either, is left out.

    Returns:
        as `from_keras`; P is weight_ch.

    Raises:
        ValueError: a shape or a count does not fit, or a GRU's linear_before_reset is not given.
        TypeError: as in `from_keras`.

    >>> import torch
    >>> state = from_onnx("gru", [torch.randn(2, 15, 3), torch.randn(2, 15, 5)], linear_before_reset=1)
    >>> build("gru", state)
    GRU(3, 5, bias=False, bidirectional=True)
    """
    who = "fusedrnn.weights.from_onnx"
    order = _order(who, cell, _ONNX)
    if cell == "gru" and linear_before_reset is None:
        raise ValueError(f"{who}: linear_before_reset of a GRU must be said, 1 or 0, which {_RESETS_BEFORE}")
    lstm, coupled = cell == "lstm", cell == "lstm" and bool(input_forget)
    if coupled:
        order = NODES["lstm_coupled"][1]
    given = _tensors(who, layers, (2, 3, 4) if lstm else (2, 3), "W, R, maybe B and maybe P" if lstm else "W, R and maybe B")
    with_P = [len(layer) > 3 and layer[3] is not None for layer in layers]
    if any(with_P) and not (lstm and all(with_P)):
        got = f"{sum(with_P)} of {len(layers)} layers of {cell!r}"
        raise ValueError(f"{who}: P must be of all layers of an LSTM, or of none, got P of {got}")
    peepholes = [tensors.pop() for tensors in given] if any(with_P) else []
    D, I, H, G = len(given[0][0]), given[0][0].shape[-1], given[0][1].shape[-1], len(order)
    if D not in (1, 2):
        raise ValueError(f"{who}: W of layer 0 must be of shape (1 or 2, {G}*H, I), got {tuple(given[0][0].shape)}")
    weights: list[Tensor] = []
    for k, (W, R, *Bs) in enumerate(given):
        _check(who, f"W of layer {k}", W, (D, G * H, D * H if k else I))
        _check(who, f"R of layer {k}", R, (D, G * H, H))
        for B in Bs:
            _check(who, f"B of layer {k}", B, (D, 2 * G * H))
        for P in peepholes[k: k + 1]:
            _check(who, f"P of layer {k}", P, (D, 3 * H))
        for d in range(D):
            parts = [W[d], R[d], *(half for B in Bs for half in B[d].chunk(2))]
            weights += [_to_torch(part, order) for part in parts]
            weights += [_to_torch(P[d], _peepholes(coupled)).view(-1, H) for P in peepholes[k: k + 1]]
    sizes = _sizes(I, H, len(given), len(given[0]) == 3, D == 2)
    return _named(cell, weights, {**sizes, "coupled": coupled, "peepholes": bool(peepholes)} if lstm else sizes)


def _peepholes(coupled: bool) -> tuple[int, ...]:
    return PEEPHOLES["lstm_coupled" if coupled else "lstm_general"]


def to_onnx(cell: str, state: Mapping[str, Tensor], *, input_forget: int = 0) -> list[OnnxLayer]:
    """Weights for ONNX: the inverse of `from_onnx`, and there is its layout. `fusedrnn.onnx.export` writes models.

    Args:
        cell, state: as in `build`.
        input_forget: 1 for the weights of `fusedrnn.LSTM(coupled=True)`, whose node must have it as well. What ONNX has of f, and
            does not look at, is i's.

    Returns:
        for each layer W, R and B, or None for no B, and, if there are peepholes, P. A GRU's node must have
        linear_before_reset=1, or 0 for the weights of `fusedrnn.GRU(reset_after=False)`.

    Raises:
        ValueError: as in `build`.
        TypeError: as in `to_keras`.

    >>> import fusedrnn
    >>> [(W, R, B)] = to_onnx("lstm", fusedrnn.LSTM(3, 5, bidirectional=True).state_dict())
    >>> W.shape, R.shape, B.shape
    ((2, 20, 3), (2, 20, 5), (2, 40))
    """
    who = "fusedrnn.weights.to_onnx"
    order = _order(who, cell, _ONNX)
    coupled = cell == "lstm" and bool(input_forget)
    if coupled:
        order = NODES["lstm_coupled"][1]
    layers: list[OnnxLayer] = []
    for layer in _read(who, cell, state, coupled, may_have_peepholes=True)[1]:
        *kinds, peepholes = zip(*layer)  # the directions of weight_ih, weight_hh, bias_ih, bias_hh and weight_ch
        W, R, *biases = (torch.stack([_from_torch(part, order) for part in kind]) for kind in kinds if kind[0] is not None)
        B = _array(who, torch.cat(biases, 1)) if biases else None
        if peepholes[0] is None:
            layers.append((_array(who, W), _array(who, R), B))
        else:
            P = torch.stack([_from_torch(part.flatten(), _peepholes(coupled)) for part in peepholes])
            layers.append((_array(who, W), _array(who, R), B, _array(who, P)))
    return layers


def read_onnx(model: str | PathLike[str] | onnx.ModelProto, *nodes: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The weights of recurrent nodes of an ONNX model, whoever wrote it, and the form of their layer. It needs the package onnx.

    W, R, B and P may be computed in the model, from constants. Initial states and lengths are a call's, and not looked at. An
    LSTM's and a GRU's activations may be Sigmoid and HardSigmoid (alpha 1/6 or 0.2, beta 0.5) for gates, Tanh, Relu and Affine
    (alpha 1, beta 0) for the rest.

    Args:
        model: a file, or what onnx.load makes of one.
        nodes: names of nodes, each a layer upon the one before; none: the one recurrent node that there is.

    Returns:
        (cell, state, form): what `build` takes. form has the options of the layer's constructor that make another formula of it
        than torch's, such as peepholes, and is empty for torch's.

    Raises:
        ValueError: there is no such node; its weights are not constant; or it does not compute what a layer of ours does,
            because of activations, layout, direction or clip, which limits what activations are given, and not the state as
            cell_clip does.

    >>> import fusedrnn.onnx, torch
    >>> program = fusedrnn.onnx.export(fusedrnn.LSTM(3, 5).eval(), (torch.randn(7, 2, 3),), verbose=False)
    >>> build(*read_onnx(program.model_proto), batch_first=True)
    LSTM(3, 5, batch_first=True)
    >>> lstm = fusedrnn.LSTM(3, 5, coupled=True, activation="relu").eval()
    >>> cell, state, form = read_onnx(fusedrnn.onnx.export(lstm, (torch.randn(7, 2, 3),), verbose=False).model_proto)
    >>> cell, form
    ('lstm', {'coupled': True, 'activation': 'relu'})
    >>> build(cell, state, form)
    LSTM(3, 5, coupled=True, activation='relu')
    """
    import onnx

    who = "fusedrnn.weights.read_onnx"
    if not isinstance(model, onnx.ModelProto):
        model = onnx.load(model)
    kinds = set(_FUNCTIONS)
    there = [node for node in model.graph.node if node.op_type in kinds and node.domain in ("", "ai.onnx")]
    chosen = [node for name in nodes for node in there if node.name == name] if nodes else there
    if len(chosen) != (len(nodes) or 1):
        names = ", ".join(repr(node.name) for node in there) or "of which there are none"
        got = ", ".join(map(repr, nodes)) or "no name"
        raise ValueError(f"{who}: expected names among the model's recurrent nodes, {names}, got {got}")
    cells, forms = zip(*(_cell_of(who, node) for node in chosen))
    if len(set(cells)) > 1:
        raise ValueError(f"{who}: expected nodes of one cell, got {', '.join(cells)}")
    cell, form = cells[0], forms[0]
    if any(other != form for other in forms):
        raise ValueError(f"{who}: expected nodes of one form, got {', '.join(map(str, forms))}")
    layers: list[list[Any]] = []
    for node in chosen:
        inputs = [*node.input, "", "", "", "", ""]
        names = inputs[1:4] + inputs[7:8]  # W, R, B and P
        found = iter(_constants(who, model, [name for name in names if name]))
        layers.append([next(found) if name else None for name in names])
        attributes, R = _attributes(node), layers[-1][1]
        D, H = 1 + (attributes.get("direction") == "bidirectional"), attributes.get("hidden_size", R.shape[-1])
        _check(who, f"R of '{node.name}'", R, (D, len(NODES[cell][1]) * H, H))
    attributes = {"linear_before_reset": int(form.get("reset_after", True)), "input_forget": int(form.get("coupled", False))}
    return cell, from_onnx(cell, *layers, **attributes), form


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, with str for bytes."""
    import onnx

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value.decode() if isinstance(value, bytes) else value

    return {attribute.name: plain(onnx.helper.get_attribute_value(attribute)) for attribute in node.attribute}


def _cell_of(who: str, node: onnx.NodeProto) -> tuple[str, dict[str, Any]]:
    """The cell that a node computes and its form. ValueError if no layer computes it."""
    attributes, kind = _attributes(node), node.op_type
    direction = attributes.get("direction", "forward")
    clip = f"{attributes.get('clip')}, a limit of what activations are given; cell_clip is one of the state"
    for name, got, fits, expected in (
        ("direction", direction, direction in ("forward", "bidirectional"), "forward or bidirectional"),
        ("clip", clip, "clip" not in attributes, "none"),
        ("layout", 1, not attributes.get("layout", 0), "0, steps first"),
    ):
        if not fits:
            raise ValueError(f"{who}: {name} of {kind} '{node.name}' must be {expected}, got {got}")
    f, *others = _functions_of(who, node, attributes)
    if kind == "RNN":
        return f"rnn_{f}", {}
    form: dict[str, Any] = {"gate_activation": f, "activation": others[0] if len(set(others)) == 1 else tuple(others)}
    if kind == "LSTM":
        coupled, peepholes = attributes.get("input_forget", 0), node.input[7:8]
        form = {"peepholes": any(peepholes), "coupled": bool(coupled), **form}
    else:
        form["reset_after"] = bool(attributes.get("linear_before_reset", 0))
    return kind.lower(), {name: value for name, value in form.items() if value != options.FORM[name]}


def _functions_of(who: str, node: onnx.NodeProto, attributes: dict[str, Any]) -> list[str]:
    """Our names of a node's activations f, g and h, as many as it has, which are those of both its directions."""
    kind, given = node.op_type, attributes.get("activations", [])
    may, of = _FUNCTIONS[kind], f"of {kind} '{node.name}'"
    D = 1 + (attributes.get("direction") == "bidirectional")
    if not given:
        return [functions[0] for functions in may]
    if len(given) != D * len(may):
        raise ValueError(f"{who}: activations {of} must be {D * len(may)}, got {given}")
    # Functions that have alpha and beta take these from the lists, one after the other.
    lists = [list(attributes.get(name, [])) for name in ("activation_alpha", "activation_beta")]
    found = []
    for name, letter, functions in zip(given, "fgh"[: len(may)] * D, may * D):
        named = [function for function in functions if FUNCTIONS[function][0].lower() == name.lower()]
        if not named:
            expected = ", ".join(dict.fromkeys(FUNCTIONS[function][0] for function in functions))
            raise ValueError(f"{who}: activation {letter} {of} must be one of {expected}, got {name}")
        if FUNCTIONS[named[0]][1]:
            default = _HARD_SIGMOID if name.lower() == "hardsigmoid" else (None, None)  # runtimes differ in Affine's
            values = [numbers.pop(0) if numbers else usual for numbers, usual in zip(lists, default)]
            fits = [function for function in named if _alike(values, FUNCTIONS[function][1])]
            if not fits:
                expected = " or ".join("alpha={:.7g} and beta={:.7g}".format(*FUNCTIONS[function][1]) for function in named)
                got = f"alpha={values[0]} and beta={values[1]}"
                raise ValueError(f"{who}: activation {letter} {of}, {name}, must have {expected}, got {got}")
            named = fits
        found.append(named[0])
    taken = [function for function in found if FUNCTIONS[function][1]]
    if taken and any(lists):
        got = ", ".join(f"activation_{name}={attributes.get(f'activation_{name}')}" for name in ("alpha", "beta"))
        expected = f"at most a number for each activation that takes one, {len(taken)}"
        raise ValueError(f"{who}: activation_alpha and activation_beta {of} must be {expected}, got {got}")
    if found[: len(may)] != found[-len(may):]:
        raise ValueError(f"{who}: activations {of} must be those of one direction twice, got {given}")
    return found[: len(may)]


def _alike(values: Sequence[float | None], expected: Sequence[float]) -> bool:
    """Whether numbers are these, rounded to float32."""
    return all(value is not None and abs(value - other) < 1e-6 for value, other in zip(values, expected))


def _constants(who: str, model: onnx.ModelProto, names: list[str]) -> list[Tensor]:
    """Tensors of a model that do not depend on its inputs."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: at for at, node in enumerate(graph.node) for name in node.output}
    wanted, needed, steps = list(names), {}, set()
    while wanted:
        name = wanted.pop()
        if name in stored:
            needed[name] = stored[name]
        elif name not in makers:
            raise ValueError(f"{who}: weights must be constants of the model, got the input '{name}'")
        elif makers[name] not in steps:
            steps.add(makers[name])
            wanted += [name for name in graph.node[makers[name]].input if name]
    results = [onnx.helper.make_empty_tensor_value_info(name) for name in names]
    part = onnx.helper.make_graph([graph.node[at] for at in sorted(steps)], "weights", [], results, needed.values())
    whole = onnx.helper.make_model(part, opset_imports=model.opset_import, functions=model.functions)
    return [torch.tensor(array) for array in ReferenceEvaluator(whole).run(names, {})]


# ---- cuDNN


def from_cudnn(cell: str, flat: Any, *, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
               bidirectional: bool = False) -> dict[str, Tensor]:
    """Weights of a cuDNN RNN, which has all in one buffer, the weight space.

    For each layer, for each direction: the matrices of all gates on the input, then those on the state, row by row; behind
    all matrices, in the same way, the biases. Gates are in torch's order: i, f, new memory, o in an LSTM, reset, update, new
    memory in a GRU, whose formula is torch's too.

    NVIDIA documents the order of gates (linLayerID of cudnnGetRNNWeightParams) and leaves it to that function to tell where
    they lie. That it is so is what jax/experimental/rnn.py found by trial, in its own words, and what flatten_parameters in
    Paddle's python/paddle/nn/layer/rnn.py relies on; get_parameters in torch's aten/src/ATen/native/cudnn/RNN.cpp asks, and
    checks that gates lie side by side.

    Args:
        cell: as in `build`.
        flat: the buffer (N,), an array or a tensor. That of torch._cudnn_rnn_flatten_weight has biases even for a layer
            without: zeros.
        input_size, hidden_size, num_layers, bidirectional: of the layers.
        bias: True for CUDNN_RNN_DOUBLE_BIAS, False for CUDNN_RNN_NO_BIAS.

    Returns:
        as `from_keras`.

    Raises:
        ValueError: the buffer has not as many elements as such layers.
        TypeError: it is not of floating point.

    >>> import torch
    >>> state = from_cudnn("gru", torch.arange(8 * 3 + 6.0), input_size=7, hidden_size=1)
    >>> state["weight_hh_l0"], state["bias_ih_l0"]
    (tensor([[21.],
            [22.],
            [23.]]), tensor([24., 25., 26.]))
    """
    who = "fusedrnn.weights.from_cudnn"
    _order(who, cell, _KERAS)
    shapes = _shapes(cell, _sizes(input_size, hidden_size, num_layers, bias, bidirectional))
    ((tensor,),) = _tensors(who, [[flat]], (1,), "a buffer")
    _check(who, "flat", tensor, (sum(shape.numel() for shape in shapes.values()),))
    parts = tensor.split([shapes[name].numel() for name in _matrices_first(shapes)])
    found = {name: part.view(shapes[name]).clone() for name, part in zip(_matrices_first(shapes), parts)}
    return {name: found[name] for name in shapes}


def to_cudnn(cell: str, state: Mapping[str, Tensor]) -> Tensor:
    """Weights for cuDNN: the inverse of `from_cudnn`, and there is its layout.

    Args:
        cell, state: as in `build`.

    Returns:
        the buffer (N,).

    Raises:
        ValueError: as in `build`; or there are peepholes or coupled gates, which cuDNN has not.

    >>> import fusedrnn
    >>> to_cudnn("lstm", fusedrnn.LSTM(3, 5).state_dict()).shape
    torch.Size([200])
    """
    _read("fusedrnn.weights.to_cudnn", cell, state)
    return torch.cat([state[name].detach().flatten() for name in _matrices_first(state)])


def _matrices_first(names: Mapping[str, Any]) -> list[str]:
    return sorted(names, key=lambda name: name.startswith("bias"))


# ---- what they share


def _module(cell: str, **options: Any) -> FusedLayer:
    kind, _ = NODES[cell]
    extra = {"nonlinearity": cell.removeprefix("rnn_")} if kind == "RNN" else {}
    return getattr(modules, kind)(**extra, **options)


def _sizes(input_size: int, hidden_size: int, num_layers: int, bias: bool, bidirectional: bool) -> dict[str, Any]:
    """Arguments of a constructor."""
    return locals()


def _shapes(cell: str, sizes: dict[str, Any]) -> dict[str, Size]:
    """The names of such a layer's weights and their shapes, in torch's order."""
    return {name: weight.shape for name, weight in _module(cell, device="meta", **sizes).named_parameters()}


def _named(cell: str, weights: list[Tensor], sizes: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict of weights in torch's order."""
    return dict(zip(_shapes(cell, sizes), weights, strict=True))


def _read(who: str, cell: str, state: Mapping[str, Tensor], coupled: bool = False,
          may_have_peepholes: bool = False) -> tuple[dict[str, Any], list[list[Weights]]]:
    """What a state_dict tells of its layer, sizes and peepholes, and its weights by layer and direction."""
    _order(who, cell, _KERAS)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in state:
            raise ValueError(f"{who}: expected a layer's state_dict, with {name}, got {', '.join(state) or 'nothing'}")
    I, H = state["weight_ih_l0"].shape[-1], state["weight_hh_l0"].shape[-1]
    num_layers = sum(re.fullmatch(r"weight_ih_l\d+", name) is not None for name in state)
    sizes = _sizes(I, H, num_layers, "bias_ih_l0" in state, "weight_ih_l0_reverse" in state)
    if cell == "lstm":
        sizes |= {"coupled": coupled, "peepholes": may_have_peepholes and "weight_ch_l0" in state}
    without = "projections" if may_have_peepholes else "projections and peepholes"
    shapes = _shapes(cell, sizes)
    for name in (*shapes, *state):
        if name not in shapes or name not in state:
            got = f"also {name}" if name in state else f"no {name}"
            raise ValueError(f"{who}: expected the weights of {num_layers} layers, alike and without {without}, got {got}")
    for name, shape in shapes.items():
        _check(who, name, state[name], shape)
    weights = [state[name].detach() for name in shapes]
    return sizes, group_weights(weights, sizes["bias"], num_layers, 2 if sizes["bidirectional"] else 1)


def _order(who: str, cell: str, orders: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if cell not in orders:
        raise ValueError(f"{who}: cell must be one of {', '.join(orders)}, got {cell!r}")
    return orders[cell]


def _tensors(who: str, layers: Sequence[Sequence[Any]], counts: tuple[int, ...], what: str) -> list[list[Tensor]]:
    """The arrays given for each layer, as tensors, None left out."""
    given = []
    for layer in layers:
        if not isinstance(layer, (list, tuple)):
            raise TypeError(f"{who}: a layer must be a list of arrays, {what}, got {type(layer).__name__}")
        arrays = [array for array in layer if array is not None]
        # torch.as_tensor would warn of arrays that are read-only.
        given.append([a.detach() if isinstance(a, Tensor) else torch.tensor(a) for a in arrays])
        for tensor in given[-1]:
            if not tensor.is_floating_point() or tensor.dim() == 0:
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise TypeError(f"{who}: weights must be arrays of floating point, got {got}")
    found = [len(tensors) for tensors in given]
    if len(set(found)) != 1 or found[0] not in counts:
        wanted = " or ".join(map(str, counts))
        got = ", ".join(map(str, found)) or "no layer"
        raise ValueError(f"{who}: each layer must have {wanted} arrays, {what}, and all as many, got {got}")
    return given


def _check(who: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{who}: {name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _from_torch(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy of a weight or bias, whose gates are blocks of rows, with these in another order than torch's."""
    return weight.unflatten(0, (max(order) + 1, -1))[list(order)].flatten(0, 1)


def _to_torch(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_from_torch`; what stands in its place twice is left out once."""
    gates = weight.unflatten(0, (len(order), -1))
    return gates[[order.index(gate) for gate in range(max(order) + 1)]].flatten(0, 1)


def _array(who: str, tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        raise TypeError(f"{who}: expected a dtype that NumPy has, got {tensor.dtype}")
    return tensor.cpu().contiguous().numpy()
