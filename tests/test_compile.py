"""torch.compile: one graph, forward and backward, for any number of steps and rows, soon compiled and not slower."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, jvp, vmap

import fusedrnn
from documents import ROOT
from models import KINDS, Model, all_kinds, input_for, kinds
from same import compare

pytestmark = [pytest.mark.usefixtures("nothing_compiled"),
              pytest.mark.filterwarnings("ignore:.*functools.lru_cache", "ignore::DeprecationWarning")]
DEEP = dict(num_layers=2, bidirectional=True, batch_first=True)
WAYS = [(kind, "aot_eager", True, {}, with_lengths) for kind in KINDS for with_lengths in (False, True)]
WAYS += [("LSTM", "aot_eager", None, DEEP, False), ("GRU", "aot_eager", None, {}, True)]
WAYS += [("LSTM", "inductor", True, DEEP, True), ("GRU", "inductor", True, {}, False), ("RNN", "inductor", None, {}, True)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@all_kinds
def test_without_a_break(kind, backend):
    """One graph, forward and backward, and new weights are seen by the compiled model."""
    model, input = Model(kind), input_for(kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output = call(input)
        output.square().sum().backward()
        results.append((output, [p.grad.clone() for p in model.parameters()]))
    compare(results[1], results[0])
    with torch.no_grad():
        model.middle.get_parameter("weight_ih" + ("" if "Cell" in kind else "_l0")).zero_()
    torch.testing.assert_close(compiled(input), model(input))


def step(call, model, *args):
    model.zero_grad()
    output = call(*args)
    output.square().mean().backward()
    return output.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind, backend, dynamic, options, with_lengths", WAYS, ids=str)
def test_any_size_is_compiled_once(kind, backend, dynamic, options, with_lengths):
    """Steps and rows change from call to call; after the second nothing is compiled any more."""
    model, counter = Model(kind, **options), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    frames = []
    for sizes in ((6, 7), (9, 4), (12, 5), (3, 8), (17, 2)):
        input, (rows, steps) = torch.randn(*sizes, 3), sizes if "batch_first" in options else sizes[::-1]
        args = (input, torch.randint(0, steps + 1, (rows,))) if with_lengths else (input,)
        torch.testing.assert_close(step(compiled, model, *args), step(model, model, *args))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), model(*args))
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4 and frames[1] <= 4, frames  # with gradients and without


@kinds
def test_no_loop_over_time(kind):
    """The graph of a thousand steps is as long as that of two."""
    lengths = []
    for steps in (2, 1000):
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(Model(kind), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        compiled(torch.randn(steps, 2, 3))
        lengths.append([len(graph.graph.nodes) for graph in graphs])
    assert lengths[0] == lengths[1] and lengths[0][0] < 60


def test_state_that_is_carried_on():
    """Truncated backpropagation: the state of one call is the next one's, detached."""
    class Chunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = Model("LSTM").middle

        def forward(self, input, hx):
            output, (h, c) = self.rnn(input, hx)
            return output, (h.detach(), c.detach())

    model = Chunk()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        torch.manual_seed(0)
        model.zero_grad()
        hx = (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
        for _ in range(3):
            output, hx = call(torch.randn(4, 2, 4), hx)
            output.square().sum().backward()
        results.append((hx, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*results)


def loss_of(module):
    return lambda weights, input: functional_call(module, weights, (input,))[0].sin().sum()


def many(input):
    return torch.stack([input, 2 * input])


INSIDE = {
    "grad": lambda f, w, x: grad(f)(w, x),
    "grad of the input": lambda f, w, x: grad(f, argnums=1)(w, x),
    "grad of grad": lambda f, w, x: grad(lambda w, x: grad(f, argnums=1)(w, x).square().sum())(w, x),
    "jacrev": lambda f, w, x: jacrev(lambda y: f(w, y))(x),
    "jvp": lambda f, w, x: jvp(lambda y: f(w, y), (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, w, x: vmap(f, in_dims=(None, 0))(w, many(x)),
    "vmap of grad": lambda f, w, x: vmap(grad(f), in_dims=(None, 0))(w, many(x)),
}


@pytest.mark.filterwarnings("ignore:.*its reference in plain torch, not on the fused engine")
@pytest.mark.parametrize("transform", INSIDE)
@kinds
def test_transforms_inside(kind, transform):
    """torch.func within what is compiled, of weights that go straight to the layer."""
    module = getattr(fusedrnn, kind)(3, 4).double()
    weights, input = {name: p.detach() for name, p in module.named_parameters()}, torch.randn(3, 2, 3, dtype=torch.float64)
    call = lambda w, x: INSIDE[transform](loss_of(module), w, x)  # noqa: E731
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(weights, input), call(weights, input))


@pytest.mark.parametrize("what", ["output", "input", "hx"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_edits_in_place_are_noticed(backend, what):
    """What backward needs was edited: torch's error, as without torch.compile, and no wrong gradient."""
    module = fusedrnn.GRU(3, 4)

    def call(input, hx):
        input, hx = input * 1, hx * 1
        output, _ = module(input, hx)
        {"output": output, "input": input, "hx": hx}[what].mul_(2)
        return output.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(call, backend=backend)(torch.randn(3, 2, 3), torch.randn(1, 2, 4)).backward()


SPEED = """
import sys, time, torch, torch._inductor.config
sys.path.insert(0, {tests!r})
import fusedrnn
torch._inductor.config.force_disable_caches = True
model = torch.nn.Sequential(fusedrnn.LSTM(128, 256, 2, batch_first=True))
head = torch.nn.Linear(256, 10)
def step(input):
    head(model(input)[0]).square().mean().backward()
compiled, input = torch.compile(lambda x: head(model(x)[0]).square().mean(), fullgraph=True), torch.randn(16, 50, 128)
begin = time.perf_counter()
compiled(input).backward()
took = time.perf_counter() - begin
def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
eager, fast = lambda: step(input), lambda: compiled(input).backward()
def median_ratio():
    return sorted(1 / (seconds(eager) / seconds(fast)) for _ in range(20))[10]
def least(enough):  # what else runs on this machine can only add to a ratio
    found = 9.0
    for _ in range(12):
        found = min(found, median_ratio())
        if found < enough:
            break
    return found
whole = least(1.1)
fusedrnn.layer.OVERWRITING = ()
print(took, whole, least(1.0))
"""


def test_compile_time_and_speed():
    """Two layers, forward and backward, from a cold start: under 30 seconds on two cores, and then not slower than eager, but for what that
    gains by writing gradients in the place of what was saved, of which a compiled program is never the only owner."""
    code = SPEED.format(tests=str(ROOT / "tests"))
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    seconds, ratio, likewise = map(float, found.stdout.split())
    print(f"compiled in {seconds:.1f} s; {ratio:.2f} of the time of eager, {likewise:.2f} where it has two tensors as well")
    assert seconds < 30 and ratio < 1.3 and likewise < 1.1


def test_autocast_around_backward_alone():
    """Gradients are of the format that the graph was made for."""
    for kind in ("GRU", "LSTM"):
        module = getattr(fusedrnn, kind)(8, 16)
        input = torch.randn(5, 3, 8, requires_grad=True)
        compiled = torch.compile(lambda x, module=module: module(x * 2)[0], backend="aot_eager", fullgraph=True)
        found = []
        for call in (compiled, lambda x, module=module: module(x * 2)[0]):
            output = call(input)
            with torch.autocast("cpu"):
                found.append(torch.autograd.grad(output.sum(), [input, *module.parameters()]))
        for one, other in zip(*found):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
