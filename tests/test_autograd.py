"""Gradients as autograd users meet them: gradcheck, any subset of outputs and inputs, twice, checkpointed. torch.func: test_func.py."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from benchmarks.memory import allocator_peak
from benchmarks.registry import provider_named
from benchmarks.suites import case_named
from benchmarks.workload import Workload
from conftest import CELLS, kind_of, make_pair, states_for
from fusedrnn.testing import named_outputs
from same import compare

cells = pytest.mark.parametrize("cell", CELLS)
LAYOUTS = [
    dict(),
    dict(bidirectional=True),
    dict(batch_first=True, bias=False),
    dict(num_layers=2, bidirectional=True),
    dict(proj_size=2),
    dict(proj_size=2, bidirectional=True, num_layers=2),
]
CELLS_AND_LAYOUTS = [(cell, o) for cell in CELLS for o in LAYOUTS if cell == "lstm" or "proj_size" not in o]
cells_and_layouts = pytest.mark.parametrize("cell, options", CELLS_AND_LAYOUTS, ids=str)


def double_pair(cell, I=3, H=4, **options):  # noqa: E741
    return make_pair(cell, I, H, dtype=torch.float64, **options)


def as_function(module, batch_sizes=None):
    """A function of (input, *states, *parameters) that returns a flat tuple, and its arguments' names."""
    names = [name for name, _ in module.named_parameters()]
    states = 2 if module.mode == "LSTM" else 1

    def function(input, *rest):
        hx = rest[:states] if states == 2 else rest[0]
        data = input if batch_sizes is None else PackedSequence(input, batch_sizes)
        result = functional_call(module, dict(zip(names, rest[states:])), (data, hx))
        return tuple(named_outputs(result).values())

    return function


def arguments(module, T=3, B=2, batch_sizes=None):
    rows = T if batch_sizes is None else int(batch_sizes.sum())
    shape = (rows, 3) if batch_sizes is not None else (B, T, 3) if module.batch_first else (T, B, 3)
    hx = states_for(module, B)
    tensors = [torch.randn(shape, dtype=torch.float64), *(hx if module.mode == "LSTM" else [hx]), *module.parameters()]
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# gradcheck
# ---------------------------------------------------------------------------------------------------------------------


@cells_and_layouts
def test_gradcheck(cell, options, engine):
    ours, _ = double_pair(cell, **options)
    assert gradcheck(as_function(ours), arguments(ours), fast_mode="num_layers" in options)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
@cells
def test_gradcheck_packed(cell, bidirectional, proj_size, engine):
    options = {"proj_size": proj_size} if proj_size and cell == "lstm" else {}
    ours, _ = double_pair(cell, bidirectional=bidirectional, **options)
    batch_sizes = torch.tensor([3, 2, 2, 1], device="cpu")
    assert gradcheck(as_function(ours, batch_sizes), arguments(ours, B=3, batch_sizes=batch_sizes))


@cells_and_layouts
def test_gradgradcheck(cell, options):
    ours, _ = double_pair(cell, **options)
    assert gradgradcheck(as_function(ours), arguments(ours, T=2), fast_mode=True)


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True)], ids=str)
@cells
def test_gradgradcheck_packed(cell, options):
    ours, _ = double_pair(cell, **options)
    batch_sizes = torch.tensor([3, 2, 1])
    assert gradgradcheck(as_function(ours, batch_sizes), arguments(ours, B=3, batch_sizes=batch_sizes), fast_mode=True)


# ---------------------------------------------------------------------------------------------------------------------
# Subsets, repetitions, modes
# ---------------------------------------------------------------------------------------------------------------------


def backward_of(module, input, hx=None, uses=("output",), **options):
    found = named_outputs(module(input, hx))
    sum((found[name] * (1 + torch.arange(found[name].numel()).view_as(found[name]))).sum() for name in uses).backward(**options)


SUBSETS = [("output",), ("hy",), ("cy",), ("output", "hy"), ("hy", "cy"), ("output", "cy"), ("output", "hy", "cy")]


@pytest.mark.parametrize("uses", SUBSETS, ids="+".join)
@cells_and_layouts
def test_any_subset_of_outputs(cell, options, uses):
    uses = [name for name in uses if name != "cy" or cell == "lstm"] or ["hy"]
    results = []
    for module in double_pair(cell, **options):
        torch.manual_seed(2)
        input = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
        backward_of(module, input, states_for(module, 3), uses)
        results.append([input.grad, {name: p.grad for name, p in module.named_parameters()}])
    compare(*results)


@cells
def test_frozen_subsets(cell):
    """Every single weight frozen, and every weight but one: grad stays None for the frozen alone."""
    ours, stock = double_pair(cell, bidirectional=True)
    names = [name for name, _ in ours.named_parameters()]
    for chosen in names:
        for frozen in ({chosen}, set(names) - {chosen}):
            results = []
            for module in (ours, stock):
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(name not in frozen).grad = None
                backward_of(module, torch.ones(3, 2, 3, dtype=torch.float64), uses=("output", "hy"))
                results.append([p.grad for p in module.parameters()])
                assert {n for n, p in module.named_parameters() if p.grad is None} == frozen
            compare(*results)


@pytest.mark.parametrize("only", ["input", "hx", "cx"])
@cells
def test_gradient_of_one_argument_only(cell, only):
    if only == "cx" and cell != "lstm":
        only = "hx"
    results = []
    for module in double_pair(cell, num_layers=2):
        module.requires_grad_(False)
        torch.manual_seed(4)
        input, hx = torch.randn(3, 2, 3, dtype=torch.float64), states_for(module, 2)
        states = list(hx) if cell == "lstm" else [hx]
        leaf = {"input": input, "hx": states[0], "cx": states[-1]}[only]
        leaf.requires_grad_()
        backward_of(module, input, hx)
        results.append(leaf.grad)
        assert all(t.grad is None for t in [input, *states] if t is not leaf)
    compare(*results)


@cells
def test_nothing_requires_grad(cell):
    ours, _ = make_pair(cell, 3, 4)
    ours.requires_grad_(False)
    output, hidden = ours(torch.randn(2, 2, 3))
    assert output.grad_fn is None and not output.requires_grad


@cells
def test_eval_mode(cell):
    results = []
    for module in double_pair(cell, num_layers=2, dropout=0.5):
        module.eval()
        input = torch.ones(3, 2, 3, dtype=torch.float64, requires_grad=True)
        backward_of(module, input)
        results.append((input.grad, [p.grad for p in module.parameters()]))
    compare(*results)


@cells_and_layouts
def test_backward_twice_is_bit_equal(cell, options):
    """retain_graph: the saved tensors are as they were after a backward."""
    ours, _ = make_pair(cell, 3, 17, **options)
    input = torch.randn(4, 4, 3, requires_grad=True)
    outputs = list(named_outputs(ours(input, states_for(ours, 4))).values())
    wrt = [input, *ours.parameters()]
    weights = [torch.randn_like(t) for t in outputs]
    first = torch.autograd.grad(outputs, wrt, weights, retain_graph=True)
    torch.autograd.grad(outputs[:1], wrt, weights[:1], retain_graph=True)
    second = torch.autograd.grad(outputs, wrt, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(outputs, wrt, weights)


@pytest.mark.parametrize("name", ["rnn/training/T100-B1-I64-H64", "gru/training/T100-B1-I64-H64", "rnn/training/T1-B1-I64-H64"])
def test_peak_memory_is_at_most_that_of_torch(name):
    """What only the recurrence's backward needs is freed once it has run, if no one retains the graph."""
    torch.set_num_threads(2)
    workloads = [Workload(case_named(name), provider_named(provider)) for provider in ("fusedrnn", "torch")]
    ours, stock = (allocator_peak(workload.call) for workload in workloads)
    assert ours <= stock


@cells
def test_outputs_and_arguments_are_left_alone(cell):
    """Backward writes to none of: input, hx, weights, outputs, incoming gradients."""
    ours, _ = make_pair(cell, 3, 5, bidirectional=True)
    input, hx = torch.randn(4, 2, 3, requires_grad=True), states_for(ours, 2, requires_grad=True)
    found = named_outputs(ours(input, hx))
    weights = [torch.randn_like(t) for t in found.values()]
    kept = [input, *(hx if cell == "lstm" else [hx]), *ours.parameters(), *found.values(), *weights]
    before = [(t.detach().clone(), t._version) for t in kept]
    torch.autograd.backward(list(found.values()), weights)
    assert all(torch.equal(t.detach(), old) and t._version == version for t, (old, version) in zip(kept, before))


@pytest.mark.parametrize("what", ["output", "input", "weight_hh_l0", "weight_ih_l0"])
@cells
def test_in_place_change_of_what_backward_needs(cell, what):
    ours, _ = make_pair(cell, 3, 5)
    input = torch.randn(4, 2, 3, requires_grad=True) * 1
    output, _ = ours(input)
    total = output.sum()
    with torch.no_grad():
        {"output": output, "input": input, **dict(ours.named_parameters())}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@cells
def test_in_place_change_of_output_in_the_graph(cell):
    """output.relu_() and the like: right, or torch's error; never a wrong gradient."""
    ours, _ = double_pair(cell)
    output, _ = ours(torch.randn(4, 2, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.mul_(2).sum().backward()


@cells
def test_views_of_outputs(cell):
    """hy[-1], output[:, 0] and output.chunk(2) are what models use."""
    results = []
    for module in double_pair(cell, num_layers=2, bidirectional=True):
        input = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 2, 3).requires_grad_()
        found = named_outputs(module(input))
        forward, reverse = found["output"].chunk(2, -1)
        (found["hy"][-1].sum() + forward[-1].square().sum() + reverse[0].sum()).backward()
        results.append([input.grad, [p.grad for p in module.parameters()]])
    compare(*results)


# ---------------------------------------------------------------------------------------------------------------------
# Tools around autograd
# ---------------------------------------------------------------------------------------------------------------------


def gradients(module, call):
    input = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 2, 3).requires_grad_()
    output, _ = call(module, input)
    output.square().sum().backward()
    found = [input.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@cells
def test_checkpoint(cell, reentrant):
    ours, stock = double_pair(cell, num_layers=2, dropout=0.5)
    torch.manual_seed(6)
    expected = gradients(stock, lambda m, x: m(x))
    torch.manual_seed(6)
    compare(gradients(ours, lambda m, x: checkpoint(m, x, use_reentrant=reentrant)), expected)


@cells
def test_save_on_cpu_and_saved_tensor_hooks(cell):
    ours, _ = double_pair(cell)
    expected = gradients(ours, lambda m, x: m(x))
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.save_on_cpu():
        compare(gradients(ours, lambda m, x: m(x)), expected)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compare(gradients(ours, lambda m, x: m(x)), expected)
    assert (4, 2, 3) in packed, "the input is saved through save_for_backward"


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@cells
def test_anomaly_mode(cell):
    ours, _ = double_pair(cell)
    expected = gradients(ours, lambda m, x: m(x))
    with torch.autograd.detect_anomaly():
        compare(gradients(ours, lambda m, x: m(x)), expected)
        with pytest.raises(RuntimeError, match="returned nan values"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output, _ = ours(torch.full((2, 1, 3), float("nan"), dtype=torch.float64))
            output.sum().backward()


@cells
def test_gradient_hooks_and_accumulation(cell):
    ours, stock = double_pair(cell)
    results = []
    for module in (ours, stock):
        seen = []
        module.weight_hh_l0.register_hook(lambda g: seen.append(g.shape) or g * 3)
        for _ in range(2):
            module(torch.ones(2, 2, 3, dtype=torch.float64))[0].sum().backward()
        results.append([seen, [p.grad for p in module.parameters()]])
    compare(*results)


# ---------------------------------------------------------------------------------------------------------------------
# Second derivatives
# ---------------------------------------------------------------------------------------------------------------------


def penalty(module, call):
    """Gradient penalty, as WGAN-GP has it: the gradient of the norm of a gradient."""
    input = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 2, 3).requires_grad_()
    (first,) = torch.autograd.grad(call(module, input).sum(), input, create_graph=True)
    return torch.autograd.grad(first.square().sum(), list(module.parameters()), allow_unused=True)


@cells_and_layouts
def test_double_backward(cell, options):
    ours, stock = double_pair(cell, **options)

    def call(module, input):
        found = named_outputs(module(input))
        return sum(t.square().sum() for t in found.values())

    compare(penalty(ours, call), penalty(stock, call))


@cells
def test_double_backward_packed(cell):
    ours, stock = double_pair(cell, bidirectional=True)
    compare(*(penalty(m, lambda m, x: m(pack_padded_sequence(x, [4, 2]))[0].data.square()) for m in (ours, stock)))


@pytest.mark.parametrize("cell", CELLS)
def test_create_graph_through_a_chain_of_steps(cell):
    """The states of a step depend on the weights of the step too: each use counts once."""
    extra = {"nonlinearity": cell.split("_")[1]} if cell.startswith("rnn") else {}
    stock = getattr(nn, kind_of(cell) + "Cell")(3, 4, **extra, dtype=torch.float64)
    ours = getattr(fusedrnn, kind_of(cell) + "Cell")(3, 4, **extra, dtype=torch.float64)
    ours.load_state_dict(stock.state_dict())
    results = []
    for module in (ours, stock):
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 2, 3)
        hx = None
        for t in range(3):
            hx = module(x[t], hx)
        loss = (hx[0] if cell == "lstm" else hx).square().sum()
        first = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(module.parameters()))
        results.append((list(first), list(second)))
    compare(*results)


@cells
def test_create_graph_with_shared_weights(cell):
    """One weight in both layers, and an input that was computed from a weight."""
    results = []
    for module in double_pair(cell, I=4, num_layers=2):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
        x = torch.ones(3, 2, 4, dtype=torch.float64) * module.weight_ih_l0.sum()
        loss = module(x)[0].square().sum()
        first = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(module.parameters()))
        results.append((list(first), list(second)))
    compare(*results)


@cells
def test_create_graph_gives_the_same_first_gradient(cell):
    ours, _ = double_pair(cell, num_layers=2, bidirectional=True)
    input = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    plain, graph = (
        torch.autograd.grad(ours(input)[0].square().sum(), [input, *ours.parameters()], create_graph=create)
        for create in (False, True)
    )
    compare([g.detach() for g in graph], list(plain))


def wgan_step(module, head):
    """The critic's gradients in a step with gradient penalty: Gulrajani and others, arXiv:1704.00028 (2017), section 4."""
    torch.manual_seed(3)
    real, fake = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    share = torch.rand(1, 3, 1, dtype=torch.float64)
    between = (share * real + (1 - share) * fake).requires_grad_()
    score = lambda x: head(module(x)[0][-1])  # noqa: E731
    (slope,) = torch.autograd.grad(score(between).sum(), between, create_graph=True)
    loss = score(fake).mean() - score(real).mean() + 10 * (slope.transpose(0, 1).flatten(1).norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(loss, [*module.parameters(), *head.parameters()])


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True)], ids=str)
@cells
def test_wgan_gradient_penalty(cell, options):
    pair = double_pair(cell, **options)
    head = nn.Linear(8 if options else 4, 1, dtype=torch.float64)
    compare(*(wgan_step(module, head) for module in pair))


def maml_step(module, head):
    """The outer gradients of model-agnostic meta-learning through two inner steps: Finn and others, arXiv:1703.03400 (2017)."""
    torch.manual_seed(4)
    support, query = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    weights = {name: p for name, p in module.named_parameters()}

    def loss(weights, x):
        return (head(functional_call(module, weights, (x,))[0]) - x.sum(-1, keepdim=True)).square().mean()

    fast = weights
    for _ in range(2):
        grads = torch.autograd.grad(loss(fast, support), list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads)}
    return torch.autograd.grad(loss(fast, query), [*weights.values(), *head.parameters()])


@cells
def test_maml(cell):
    pair = double_pair(cell, num_layers=2)
    head = nn.Linear(4, 1, dtype=torch.float64)
    compare(*(maml_step(module, head) for module in pair))
