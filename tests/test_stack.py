"""Several layers in one launch (csrc/cuda/stack.cuh): the numbers of layer after layer, and layer after layer where it must be.

The kernels run on the CPU, compiled for it (tests/cuda_on_host), as if it were a GPU of 31 multiprocessors.
"""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from conftest import CELLS, compare_all_equal, host, make_pair, states_for
from fusedrnn import functional, layer, ops, select, stacks as in_one_launch
from fusedrnn.testing import compare_modules, run_module
from workshop import cuda_headers

CHIP = {"multiprocessors": 31, "shared_bytes": 99 << 10, "major": 9}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def stacks(request, monkeypatch):
    """Tensors on the CPU go to the kernels of CUDA. stacks.calls has the number of layers of each launch of several, and stacks.backward
    that of each backward."""
    if not cuda_headers():
        pytest.skip("the headers of the CUDA toolkit are not here (CUDA_HOME, nvcc on PATH, /usr/local/cuda)")
    hosted = request.getfixturevalue("hosted_kernels")
    override = host(hosted, monkeypatch, "recurrence_forward", "recurrence_backward", "stack_forward", "stack_backward")
    monkeypatch.setattr(select, "STACKING", frozenset({"cpu"}))
    monkeypatch.setattr(select, "chip", lambda device: CHIP)

    class Stacks:
        def __init__(self):
            self.calls, self.backward = [], []

        def order(self, order, seed=0):
            hosted.configure(order, seed, CHIP["multiprocessors"], CHIP["major"], True, True, True)

        def wanted(self, yes=True):
            monkeypatch.setenv("FUSEDRNN_KERNEL", "stack" if yes else "grid")

    found = Stacks()
    forward, backward = in_one_launch.stack_forward, in_one_launch.stack_backward
    monkeypatch.setattr(in_one_launch, "stack_forward", lambda *given: found.calls.append(len(given[3])) or forward(*given))
    monkeypatch.setattr(in_one_launch, "stack_backward", lambda *given: found.backward.append(len(given[3])) or backward(*given))
    found.order(2)
    found.wanted()
    yield found
    override._destroy()


# cell, layers, T, B, I, H, and what else
CASES = [
    (cell, dtype, *sizes, options)
    for cell, dtype in itertools.product(CELLS, DTYPES)
    for sizes, options in [
        ((2, 1, 1, 3, 1), {}),
        ((3, 9, 9, 7, 19), {"bias": False}),
        ((5, 7, 3, 40, 33), {"batch_first": True}),
        ((2, 12, 33, 16, 16), {"packed": True}),
    ]
]


@pytest.mark.parametrize("cell, dtype, layers, T, B, I, H, options", CASES, ids=str)
def test_as_accurate_as_torch(cell, dtype, layers, T, B, I, H, options, stacks):
    """Results and gradients, with and without first states, by every order of threads in turn."""
    options = dict(options)
    packed = options.pop("packed", False)
    ours, stock = make_pair(cell, I, H, layers, dtype=dtype, **options)
    input = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I), dtype=dtype)
    if packed:
        input = pack_padded_sequence(input, torch.randint(1, T + 1, (B,)), enforce_sorted=False)
    stacks.order(CASES.index((cell, dtype, layers, T, B, I, H, options | ({"packed": True} if packed else {}))) % 4)
    compare_modules(ours, stock, input)
    assert stacks.calls and sum(stacks.calls) % layers == 0 and stacks.backward == stacks.calls[::-1]
    compare_modules(ours, stock, input, states_for(ours, B))


@cells
def test_more_layers_than_fit_are_several_launches(cell, stacks):
    """Of 33 units ten layers of three blocks each; of a kernel's argument eight."""
    ours, _ = make_pair(cell, 5, 33, 11)
    run_module(ours, torch.randn(4, 3, 5))
    assert stacks.calls == [8, 3] and stacks.backward == [3, 8]
    stacks.calls.clear()
    ours, _ = make_pair(cell, 5, 90, 11, dtype=torch.bfloat16)  # of six blocks
    run_module(ours, torch.randn(4, 3, 5, dtype=torch.bfloat16))
    assert stacks.calls == [5, 5]  # the last goes by itself


@cells
def test_same_bits_in_every_order(cell, stacks):
    ours, _ = make_pair(cell, 6, 35, 3)
    input, hx = torch.randn(11, 10, 6), states_for(ours, 10)
    runs = []
    for order, seed in [(0, 0), (1, 0), (2, 1), (2, 2), (3, 3), (3, 4)]:
        stacks.order(order, seed)
        runs.append(run_module(ours, input, hx))
        compare_all_equal(runs[0], runs[-1])
    assert stacks.calls == [3] * 6


@cells
def test_over_more_steps_than_a_launch_lists(cell, stacks):
    ours, _ = make_pair(cell, 4, 7, 3, dtype=torch.float64)
    input = pack_padded_sequence(torch.randn(600, 4, 4, dtype=torch.float64), [600, 400, 260, 20])
    found = {}
    for yes in (True, False):
        stacks.wanted(yes)
        found[yes] = run_module(ours, input)
    assert stacks.calls == [3]
    for name, expected in found[False].items():
        torch.testing.assert_close(found[True][name], expected, rtol=1e-11, atol=1e-11, msg=name)


def test_layers_below_the_first_that_is_trained_keep_nothing(stacks):
    ours, _ = make_pair("lstm", 5, 19, 4)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(not name.endswith(("_l0", "_l1")))
    input, grads = torch.randn(6, 3, 5), {}
    for yes in (True, False):
        stacks.wanted(yes)
        ours.zero_grad()
        output, _ = ours(input)
        output.sum().backward()
        grads[yes] = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert stacks.calls == stacks.backward == [2] and len(grads[True]) == 8
    for name, expected in grads[False].items():
        torch.testing.assert_close(grads[True][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_graph_for_any_size_goes_layer_by_layer(stacks):
    ours, _ = make_pair("lstm", 5, 19, 3)
    input = torch.randn(6, 3, 5)
    graph = make_fx(lambda x: ours(x)[0], tracing_mode="symbolic", _allow_non_fake_inputs=True)(input)
    assert stacks.calls == []
    torch.testing.assert_close(graph(input), ours(input)[0])


@cells
def test_tf32(cell, stacks, monkeypatch):
    """Rounded before they are multiplied, in the input's product too."""
    for module in (layer, in_one_launch):
        monkeypatch.setattr(module, "allows_tf32", lambda *given: True)
    ours, stock = make_pair(cell, 6, 35, 3)
    input = torch.randn(8, 5, 6)
    with torch.no_grad():
        found, exact = ours(input)[0], stock(input)[0]
    assert stacks.calls == [3]
    assert 1e-6 < (found - exact).abs().max() < 1e-2


def test_dropout_goes_between_layers(stacks):
    ours, stock = make_pair("lstm", 3, 20, 3, dropout=0.5)
    input = torch.randn(8, 2, 3)
    compare_modules(ours, stock, input)
    assert not stacks.calls
    compare_modules(ours.eval(), stock.eval(), input)
    assert set(stacks.calls) == {3}


def test_what_a_stack_has_not_goes_layer_by_layer(stacks):
    input, lengths = torch.randn(9, 2, 3), torch.tensor([9, 4])
    for options in [dict(bidirectional=True), dict(proj_size=5), dict(zoneout=(0.1, 0.1)), dict(recurrent_dropout=0.2), dict(num_heads=2),
                    dict(weight_dropout=0.1), dict(save="states"), dict(peepholes=True), dict(coupled=True)]:  # fmt: skip
        fusedrnn.LSTM(3, 20, 3, **options)(input)[0].sum().backward()
    module = fusedrnn.LSTM(3, 20, 3)
    module(input, lengths=lengths)
    module(input, reset=torch.rand(9, 2) < 0.3)
    module(input, return_states=True)
    fusedrnn.IndRNN(3, 20, 3)(input)
    fusedrnn.LayerNormLSTM(3, 20, 3)(input)
    assert not stacks.calls
    module(input)
    assert stacks.calls == [3]


@pytest.mark.parametrize("kernel", ["step", "block", "cluster", "grid", ""])
def test_another_kernel_is_asked_for(kernel, stacks, monkeypatch):
    """Unset: a stack only where it is a gain, and not where a block holds all weights."""
    monkeypatch.setenv("FUSEDRNN_KERNEL", kernel)
    fusedrnn.GRU(3, 20, 3)(torch.randn(9, 2, 3))
    assert not stacks.calls
    fusedrnn.GRU(3, 110, 2)(torch.randn(9, 2, 3))  # whose weight_hh is 145 KB
    assert stacks.calls == ([2] if kernel == "" else [])


@pytest.mark.parametrize("B, backward", [(2, [2]), (33, [])])
def test_backward_goes_by_layer_where_it_would_read_too_much(B, backward, stacks, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_KERNEL", "")
    ours, stock = make_pair("gru", 3, 110, 2)
    input = torch.randn(9, B, 3)
    compare_modules(ours, stock, input, states_for(ours, B))
    assert stacks.calls == [2] and stacks.backward == backward


def test_frozen_layers(stacks):
    """Gradients where one is asked for: of a layer in the middle, of the input alone, of none."""
    ours, stock = make_pair("gru", 3, 20, 3)
    for module in (ours, stock):
        module.requires_grad_(False).weight_hh_l1.requires_grad_()
    compare_modules(ours, stock, torch.randn(8, 2, 3))
    for module in (ours, stock):
        module.requires_grad_(False)
    compare_modules(ours, stock, torch.randn(8, 2, 3))
    assert not ours(torch.randn(8, 2, 3))[0].requires_grad
    assert set(stacks.calls) == {3}


@cells
def test_second_derivatives(cell, stacks):
    ours, _ = make_pair(cell, 2, 3, 2, dtype=torch.float64)
    given = [torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True), *ours.parameters()]

    def run(input, *params):
        return functional.stack(cell, input, None, None, params, True, 2, 0.0, True, False, False, None)[0]

    assert gradcheck(run, given) and stacks.calls and stacks.backward
    assert gradgradcheck(run, given)


@cells
def test_gradients_of_some_results(cell, stacks):
    """Of the last states of all layers alone, of the output alone."""
    ours, stock = make_pair(cell, 4, 17, 3)
    for uses in (("hy",), ("output",), ("cy",)):
        if cell == "lstm" or uses != ("cy",):
            compare_modules(ours, stock, torch.randn(6, 3, 4), states_for(ours, 3), uses=uses)
    assert stacks.backward == stacks.calls[: len(stacks.backward)]


def test_many_gradients_at_once(stacks):
    """is_grads_batched, which goes layer by layer in plain torch."""
    ours, _ = make_pair("gru", 3, 5, 2, dtype=torch.float64)
    input = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    output, hy = ours(input)
    grads = torch.randn(3, *output.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(output, input, grads, retain_graph=True, is_grads_batched=True)
    assert stacks.calls == [2] and not stacks.backward
    for grad, each in zip(grads, found):
        torch.testing.assert_close(torch.autograd.grad(output, input, grad, retain_graph=True)[0], each, rtol=1e-11, atol=1e-11)
    assert stacks.backward == [2] * 3


def test_a_graph_that_is_gone(stacks):
    output, _ = fusedrnn.GRU(3, 5, 2)(torch.randn(4, 2, 3))
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    output, _ = fusedrnn.GRU(3, 5, 2)(torch.randn(4, 2, 3))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_transforms_and_compiled_graphs_go_layer_by_layer(stacks, nothing_compiled):
    ours, _ = make_pair("lstm", 3, 20, 2, dtype=torch.float64)
    input = torch.randn(8, 2, 3, dtype=torch.float64)
    expected = run_module(ours, input)
    assert stacks.calls == [2]
    parameters = dict(ours.named_parameters())
    output = torch.func.functional_call(ours, parameters, (input,))[0]
    assert stacks.calls == [2, 2]
    grads = torch.func.grad(lambda given: torch.func.functional_call(ours, given, (input,))[0].sum())(parameters)
    for grad, found in zip(torch.autograd.grad(output.sum(), list(parameters.values())), grads.values()):
        torch.testing.assert_close(grad, found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.vmap(lambda x: ours(x)[0])(input.unsqueeze(0))[0], expected["output"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(input)[0], expected["output"], rtol=1e-12, atol=1e-12)
    assert stacks.calls == [2, 2]


def operands(cell="gru", layers=3, T=4, B=2, H=5, dtype=torch.float32):
    G = ops.TRAITS[cell]["gates"]
    hx = torch.randn(layers, B, H, dtype=dtype)
    return {
        "cell": cell, "gates_x": torch.randn(T, B, G * H, dtype=dtype), "weight_ih": [torch.randn(G * H, H, dtype=dtype) for _ in range(layers - 1)],
        "weight_hh": [torch.randn(G * H, H, dtype=dtype) for _ in range(layers)], "bias_ih": [torch.randn(G * H, dtype=dtype) for _ in range(layers - 1)],
        "bias_hh": [torch.randn(G * H, dtype=dtype) for _ in range(layers)], "hx": hx, "cx": hx.clone() if cell == "lstm" else None,
        "batch_sizes": None, "save": 2, "allow_tf32": False,
    }  # fmt: skip


ERRORS = [
    (dict(weight_hh=[torch.zeros(15, 5)]), "weight_hh must hold from 2 to 8 tensors, one a layer, got 1"),
    (dict(weight_hh=[torch.zeros(15, 5)] * 9), "weight_hh must hold from 2 to 8 tensors, one a layer, got 9"),
    (dict(weight_ih=[torch.zeros(15, 5)]), "weight_ih must hold 2 tensors, got 1"),
    (dict(bias_ih=[torch.zeros(15)]), "bias_ih must hold 2 tensors, got 1"),
    (dict(bias_hh=[torch.zeros(15)]), "bias_hh must hold 3 tensors, got 1"),
    (dict(weight_hh=[torch.zeros(15, 5), torch.zeros(15, 5), torch.zeros(18, 6)]), r"weight_hh must be \(15, 5\), got \(18, 6\)"),
    (dict(weight_ih=[torch.zeros(15, 5), torch.zeros(15, 4)]), r"weight_ih must be \(15, 5\), got \(15, 4\)"),
    (dict(weight_ih=[torch.zeros(15, 5), torch.zeros(15, 5).double()]), "weight_ih must be Float like weight_hh, got Double"),
    (dict(gates_x=torch.zeros(4, 2, 5)), r"gates_x must be \(4, 2, 15\), got \(4, 2, 5\)"),
    (dict(hx=torch.zeros(1, 2, 5)), r"hx must be \(3, 2, 5\), got \(1, 2, 5\)"),
    (dict(cx=torch.zeros(3, 2, 5)), "cx is for cells of more than one state"),
    (dict(batch_sizes=torch.tensor([2, 2])), r"batch_sizes are for packed sequences, with gates_x of \(rows, features\), got \(4, 2, 15\)"),
    (dict(save=3), "save must be 0, 1 or 2, got 3"),
    (dict(cell="gru_general:sigmoid,tanh,tanh,0"), "cell must be one of torch's, without heads"),
    (dict(cell="tree"), "cell must be one of"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", ERRORS)
def test_errors(wrong, message, stacks):
    with pytest.raises(RuntimeError, match=f"fusedrnn::stack_forward: {message}"):
        ops.stack_forward(*{**operands(), **wrong}.values())


def test_layers_that_do_not_fit_are_refused(stacks):
    with pytest.raises((RuntimeError, ValueError), match="expected layers that the GPU holds at once, got 8 of 65 units"):
        ops.stack_forward(*operands(layers=8, H=65).values())


def test_a_cpu_refuses():
    with pytest.raises(RuntimeError, match="fusedrnn::stack_forward: weight_hh must be on a CUDA device, got one on the CPU"):
        ops.stack_forward(*operands().values())
    given = operands()
    outputs, saved, states = ([torch.zeros(4, 2, *shape) for _ in range(3)] for shape in ((5,), (1, 4, 5), (1, 0, 5)))
    with pytest.raises(RuntimeError, match="fusedrnn::stack_backward: weight_hh must be on a CUDA device, got one on the CPU"):
        ops.stack_backward("gru", None, given["weight_ih"], given["weight_hh"], None, None, outputs, saved, states, *[None] * 4,
                           *[False] * 6)  # fmt: skip


def backward_operands(cell="gru", **options):
    given = operands(cell, **options)
    output, hy, cy, saved, states = ops.stack_forward(*given.values())
    inner = cell == "lstm"
    return {
        "cell": cell, "input": torch.randn(*output[0].shape[:-1], 7), "weight_ih": given["weight_ih"], "weight_hh": given["weight_hh"],
        "hx": given["hx"], "cx": given["cx"], "output": list(output), "saved": list(saved), "states": list(states), "batch_sizes": None,
        "grad_output": torch.ones_like(output[-1]), "grad_hy": torch.cat(list(hy)), "grad_cy": torch.cat(list(cy)) if inner else None,
        "need_grad_hx": True, "need_grad_cx": inner, "need_grad_weight_ih": True, "need_grad_weight_hh": True, "need_grad_bias": True,
        "allow_tf32": False,
    }  # fmt: skip


BACKWARD_ERRORS = [
    (dict(output=[]), "output must hold a tensor for each layer, got 0"),
    (dict(saved=[torch.zeros(4, 2, 1, 4, 5)]), "saved must hold 3 tensors, got 1"),
    (dict(states=[torch.zeros(4, 2, 1, 0, 5)]), "states must hold 3 tensors, got 1"),
    (dict(output=[torch.zeros(4, 2, 5)] * 2), "output must hold 3 tensors, got 2"),
    (dict(weight_hh=[torch.zeros(15, 5)]), "weight_hh must hold from 2 to 8 tensors, one a layer, got 1"),
    (dict(grad_output=torch.zeros(4, 2, 6)), r"grad_output must be \(4, 2, 5\), got \(4, 2, 6\)"),
    (dict(grad_hy=torch.zeros(1, 2, 5)), r"grad_hy must be \(3, 2, 5\), got \(1, 2, 5\)"),
    (dict(need_grad_cx=True), "grad_cy and need_grad_cx are for cells of more than one state"),
    (dict(input=None), "need_grad_weight_ih needs the input"),
    (dict(cell="tree"), "cell must be one of"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", BACKWARD_ERRORS)
def test_errors_backward(wrong, message, stacks):
    with pytest.raises(RuntimeError, match=f"fusedrnn::stack_backward: {message}"):
        ops.stack_backward(*{**backward_operands(), **wrong}.values())


@pytest.mark.parametrize("save", [0, 1, 2])
@cells
def test_fake_results_are_like_real_ones(cell, save, stacks):
    torch.library.opcheck(ops.stack_forward, tuple((operands(cell) | {"save": save}).values()),
                          test_utils=("test_schema", "test_faketensor"))
    if save == 2:
        given = backward_operands(cell)
        for needs in ({}, dict.fromkeys([name for name in given if name.startswith("need")], False)):
            torch.library.opcheck(ops.stack_backward, tuple((given | needs).values()), test_utils=("test_schema", "test_faketensor"))


def test_no_rows(stacks):
    output, hy, cy, saved, states = ops.stack_forward(*operands("lstm", B=0).values())
    assert [tuple(each[2].shape) for each in (output, hy, cy, saved, states)] == [(4, 0, 5), (1, 0, 5), (1, 0, 5), (4, 0, 1, 4, 5), (4, 0, 1, 1, 5)]


def test_floating_point_operations():
    from torch.utils.flop_counter import flop_registry

    given = [tensor.shape if isinstance(tensor, torch.Tensor) else [each.shape for each in tensor] if isinstance(tensor, list) else tensor
             for tensor in operands().values()]  # fmt: skip
    assert flop_registry[torch.ops.fusedrnn.stack_forward](*given) == 2 * 4 * 2 * (2 + 3) * 15 * 5


def test_floating_point_operations_are_those_of_layers(stacks):
    from torch.utils.flop_counter import FlopCounterMode

    ours, counts = fusedrnn.LSTM(7, 20, 3), []
    for yes in (True, False):
        stacks.wanted(yes)
        with FlopCounterMode(display=False) as mode:
            ours(torch.randn(9, 2, 7))[0].sum().backward()
        counts.append(mode.get_total_flops())
    assert counts[0] == counts[1] and stacks.backward == [3]


