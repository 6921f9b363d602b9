"""torch.func: derivatives of derivatives, forward mode, and many calls at once. Truth is torch.nn, called once for each."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from conftest import CELLS, kind_of, make_pair, states_for
from fusedrnn.testing import named_outputs

cells = pytest.mark.parametrize("cell", CELLS)
LAYOUTS = [dict(), dict(bidirectional=True), dict(batch_first=True, bias=False), dict(num_layers=2, bidirectional=True),
           dict(proj_size=2, bidirectional=True)]  # fmt: skip
cells_and_layouts = pytest.mark.parametrize(
    "cell, options", [(cell, o) for cell in CELLS for o in LAYOUTS if cell == "lstm" or "proj_size" not in o], ids=str)
slow_path = pytest.mark.filterwarnings("ignore:.*its reference in plain torch, not on the fused engine")
BATCH_SIZES = torch.tensor([3, 2, 2, 1])
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def stock_as_it_can_be_differentiated():
    """oneDNN's LSTM has no forward mode; float64 never goes there, but torch asks."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


def double_pair(cell, I=3, H=4, **options):  # noqa: E741
    return make_pair(cell, I, H, dtype=torch.float64, **options)


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def double(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


def call(module, weights, input, hx=None):
    """(output, hy, cy), those there are, for these weights."""
    return tuple(named_outputs(functional_call(module, weights, (input, hx))).values())


def loss_of(module):
    return lambda weights, input, hx=None: sum(t.square().sum() for t in call(module, weights, input, hx))


def stacked(results):
    """A list of results as one with a leading dimension."""
    first = results[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(results)
    if isinstance(first, dict):
        return {key: stacked([one[key] for one in results]) for key in first}
    return tuple(stacked(parts) for parts in zip(*results))


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


@cells_and_layouts
def test_grad(cell, options):
    ours, stock = double_pair(cell, **options)
    weights, input, hx = weights_of(ours), double(3, 3, 3), states_for(ours, 3)
    close(grad(loss_of(ours))(weights, input, hx), grad(loss_of(stock))(weights, input, hx))


@cells_and_layouts
def test_grad_of_grad(cell, options):
    ours, stock = double_pair(cell, **options)
    weights, input = weights_of(ours), double(3, 3, 3)

    def twice(module):
        return grad(lambda w, x: grad(loss_of(module), argnums=1)(w, x).square().sum())(weights, input)

    close(twice(ours), twice(stock))


@cells
def test_third_derivative(cell):
    ours, stock = double_pair(cell, H=2)
    weights, input = weights_of(ours), double(2, 1, 3)

    def thrice(module):
        f = loss_of(module)
        for _ in range(3):
            f = (lambda g: lambda w, x: grad(g, argnums=1)(w, x).sin().sum())(f)
        return f(weights, input)

    close(thrice(ours), thrice(stock))


@cells_and_layouts
def test_vjp_and_jacrev(cell, options):
    ours, stock = double_pair(cell, **options)
    weights, input = weights_of(ours), double(3, 3, 3)
    results = []
    for module in (ours, stock):
        outputs, pull = vjp(lambda w, x: call(module, w, x), weights, input)
        results.append((outputs, pull(tuple(torch.ones_like(t) for t in outputs))))
        results[-1] += (jacrev(lambda x: call(module, weights, x))(input), jacrev(lambda w: call(module, w, input))(weights))
    close(*results)


@slow_path
@cells_and_layouts
def test_jvp(cell, options):
    """Forward mode over the input, the states and the weights at once."""
    ours, stock = double_pair(cell, **options)
    primals = (weights_of(ours), double(3, 3, 3), states_for(ours, 3))
    tangents = torch.utils._pytree.tree_map(torch.randn_like, primals)
    close(*(jvp(lambda w, x, h: call(module, w, x, h), primals, tangents) for module in (ours, stock)))


@slow_path
@cells
def test_dual_numbers(cell):
    ours, stock = double_pair(cell)
    input, tangent, found = double(3, 2, 3), double(3, 2, 3), []
    for module in (ours, stock):
        with forward_ad.dual_level():
            outputs = call(module, dict(module.named_parameters()), forward_ad.make_dual(input, tangent))
            found.append([forward_ad.unpack_dual(t).tangent for t in outputs])
    close(*found)


@cells
def test_forward_mode_says_that_it_is_slow(cell):
    ours, _ = double_pair(cell)
    with pytest.warns(UserWarning, match=f"{cell}: ran on its reference in plain torch, .* no forward-mode derivative"):
        jvp(lambda x: ours(x)[0], (double(3, 2, 3),), (double(3, 2, 3),))


@slow_path
@pytest.mark.parametrize("what", [jacfwd, hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))],
                         ids=["jacfwd", "hessian", "forward over forward", "reverse over reverse"])  # fmt: skip
@cells
def test_jacobians_and_hessians(cell, what):
    ours, stock = double_pair(cell, H=3)
    weights, input = weights_of(ours), double(2, 2, 3)
    close(*(what(lambda x: loss_of(module)(weights, x))(input) for module in (ours, stock)))


@slow_path
@cells
def test_hessian_of_the_weights(cell):
    ours, stock = double_pair(cell, I=2, H=2)
    weights, input = weights_of(ours), double(3, 2, 2)
    close(*(hessian(loss_of(module))(weights, input) for module in (ours, stock)))


@slow_path
@cells
def test_linearize(cell):
    ours, stock = double_pair(cell)
    input, tangent = double(3, 2, 3), double(3, 2, 3)
    close(linearize(lambda x: ours(x)[0], input)[1](tangent), jvp(lambda x: stock(x)[0], (input,), (tangent,))[1])


@pytest.mark.parametrize("create_graph", [False, True])
@cells_and_layouts
def test_is_grads_batched(cell, options, create_graph):
    results = []
    for module in double_pair(cell, **options):
        input = torch.linspace(-1, 1, 27).double().view(3, 3, 3).requires_grad_()
        output = module(input)[0]
        basis = torch.eye(output.numel(), dtype=torch.float64).view(-1, *output.shape)
        wrt = [input, *module.parameters()]
        results.append(torch.autograd.grad(output, wrt, basis, is_grads_batched=True, create_graph=create_graph))
    close(*results)


@cells
def test_vectorized_jacobian(cell):
    ours, stock = double_pair(cell)
    input = double(3, 2, 3)
    close(*(torch.autograd.functional.jacobian(lambda x: m(x)[0], input, vectorize=True) for m in (ours, stock)))


# ---------------------------------------------------------------------------------------------------------------------
# Many calls at once
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1])
@cells_and_layouts
def test_vmap_over_inputs(cell, options, dim):
    ours, stock = double_pair(cell, **options)
    weights, inputs = weights_of(ours), double(4, 3, 3, 3)
    found = vmap(lambda x: call(ours, weights, x), in_dims=dim, out_dims=1)(inputs.movedim(0, dim))
    expected = stacked([call(stock, weights, x) for x in inputs])
    close(tuple(t.movedim(1, 0) for t in found), expected)


@pytest.mark.parametrize("over", ["states", "both"])
@cells_and_layouts
def test_vmap_over_states(cell, options, over):
    ours, stock = double_pair(cell, **options)
    weights, many, one = weights_of(ours), double(4, 3, 3, 3), double(3, 3, 3)
    states = stacked([states_for(ours, 3) for _ in range(4)])
    each = [torch.utils._pytree.tree_map(lambda t: t[n], states) for n in range(4)]
    both = over == "both"
    found = vmap(lambda x, h: call(ours, weights, x, h), in_dims=(0 if both else None, 0))(many if both else one, states)
    close(found, stacked([call(stock, weights, many[n] if both else one, each[n]) for n in range(4)]))


@cells_and_layouts
def test_vmap_over_ensembles(cell, options):
    """Models of the same form: stack_module_state, as its documentation has it."""
    pairs = [double_pair(cell, **options) for _ in range(3)]
    weights, _ = stack_module_state([ours for ours, _ in pairs])
    input, inputs = double(3, 3, 3), double(3, 3, 3, 3)
    base = pairs[0][0]
    one = vmap(lambda w: call(base, w, input))(weights)
    close(one, stacked([call(stock, dict(stock.named_parameters()), input) for _, stock in pairs]))
    own = vmap(lambda w, x: call(base, w, x))(weights, inputs)
    close(own, stacked([call(stock, dict(stock.named_parameters()), x) for (_, stock), x in zip(pairs, inputs)]))
    sum(t.square().sum() for t in own).backward()
    for (_, stock), x in zip(pairs, inputs):
        loss_of(stock)(dict(stock.named_parameters()), x).backward()
    for name, many in weights.items():
        close(many.grad, torch.stack([stock.get_parameter(name).grad for _, stock in pairs]))


@cells
def test_nested_vmap(cell):
    ours, stock = double_pair(cell, bidirectional=True)
    weights, inputs, states = weights_of(ours), double(2, 4, 3, 2, 3), stacked([states_for(ours, 2) for _ in range(4)])
    found = vmap(vmap(lambda x, h: call(ours, weights, x, h)), in_dims=(0, None))(inputs, states)
    h = [torch.utils._pytree.tree_map(lambda t: t[n], states) for n in range(4)]
    close(found, stacked([stacked([call(stock, weights, inputs[m, n], h[n]) for n in range(4)]) for m in range(2)]))


@cells_and_layouts
def test_gradients_of_each_sample(cell, options):
    ours, stock = double_pair(cell, **options)
    weights, inputs = weights_of(ours), double(4, 3, 1, 3)
    found = vmap(grad(loss_of(ours), argnums=(0, 1)), in_dims=(None, 0))(weights, inputs)
    close(found, stacked([grad(loss_of(stock), argnums=(0, 1))(weights, x) for x in inputs]))
    alone = vmap(grad(loss_of(ours), argnums=1), in_dims=(None, 0))(weights, inputs)
    close(alone, found[1])


@cells
def test_second_derivatives_of_each_sample(cell):
    ours, stock = double_pair(cell)
    weights, inputs = weights_of(ours), double(3, 3, 1, 3)

    def penalty(module):
        return grad(lambda w, x: grad(loss_of(module), argnums=1)(w, x).square().sum())

    close(vmap(penalty(ours), in_dims=(None, 0))(weights, inputs), stacked([penalty(stock)(weights, x) for x in inputs]))


@slow_path
@cells
def test_vmap_of_jvp(cell):
    ours, stock = double_pair(cell)
    input, tangents = double(3, 2, 3), double(4, 3, 2, 3)
    found = vmap(lambda t: jvp(lambda x: ours(x)[0], (input,), (t,))[1])(tangents)
    close(found, stacked([jvp(lambda x: stock(x)[0], (input,), (t,))[1] for t in tangents]))


@pytest.mark.parametrize("bidirectional", [False, True])
@cells
def test_packed(cell, bidirectional):
    """Rows of a PackedSequence, many times."""
    ours, stock = double_pair(cell, bidirectional=bidirectional)
    weights, rows = weights_of(ours), double(4, int(BATCH_SIZES.sum()), 3)

    def loss(module):
        return lambda w, x: sum(t.square().sum() for t in call(module, w, PackedSequence(x, BATCH_SIZES)))

    def expected(x):  # by autograd: torch.func cannot take torch.nn's packed layers
        wrt = {name: p.requires_grad_() for name, p in weights_of(stock).items()}
        grads = torch.autograd.grad(loss(stock)(wrt, x.requires_grad_()), [*wrt.values(), x])
        return dict(zip(wrt, grads)), grads[-1]

    found = vmap(lambda x: call(ours, weights, PackedSequence(x, BATCH_SIZES)))(rows)
    close(found, stacked([call(stock, weights, PackedSequence(x, BATCH_SIZES)) for x in rows]))
    truth = stacked([expected(x.clone()) for x in rows])
    close(vmap(grad(loss(ours), argnums=(0, 1)), in_dims=(None, 0))(weights, rows), truth)
    close(vmap(grad(loss(ours), argnums=1), in_dims=(None, 0))(weights, rows), truth[1])


@cells
def test_cells(cell):
    """Cells, and the loop over them."""
    extra = {"nonlinearity": cell.split("_")[1]} if cell.startswith("rnn") else {}
    ours, stock = (getattr(home, kind_of(cell) + "Cell")(3, 4, **extra, dtype=torch.float64) for home in (fusedrnn, nn))
    ours.load_state_dict(stock.state_dict())
    weights, inputs = weights_of(ours), double(5, 3, 2, 3)

    def loss(module):
        def run(w, x):
            hx = None
            for step in x:
                hx = functional_call(module, w, (step, hx))
            return (hx[0] if cell == "lstm" else hx).square().sum()

        return run

    each = [grad(loss(stock))(weights, x) for x in inputs]
    close(vmap(grad(loss(ours)), in_dims=(None, 0))(weights, inputs), stacked(each))


def test_batches_of_one_and_of_none():
    ours, stock = double_pair("lstm")
    weights = weights_of(ours)
    for size in (0, 1):
        inputs = double(4, 3, size, 3)
        close(vmap(lambda x: call(ours, weights, x))(inputs), stacked([call(stock, weights, x) for x in inputs]))


@cells
def test_no_calls_at_all(cell):
    """vmap over nothing has results of no calls, as of torch's own modules."""
    ours, _ = double_pair(cell)
    weights, none = weights_of(ours), double(0, 3, 2, 3)
    assert vmap(lambda x: ours(x)[0])(none).shape == (0, 3, 2, 4)
    grads = vmap(grad(lambda x: ours(x)[0].sum()))(none)
    assert grads.shape == none.shape
    stacked_weights = {name: w.new_empty(0, *w.shape) for name, w in weights.items()}
    input = double(3, 2, 3)
    assert vmap(lambda w: call(ours, w, input)[0])(stacked_weights).shape == (0, 3, 2, 4)


@slow_path
@cells
def test_forward_over_reverse(cell):
    """A tangent of the incoming gradient reaches the outgoing one, also through a graph from outside of the dual level."""
    ours, stock = double_pair(cell)
    input, cotangent, tangent = double(3, 2, 3), double(3, 2, 4), double(3, 2, 4)
    found = []
    for module in (ours, stock):
        leaf = input.clone().requires_grad_()
        output = module(leaf)[0]
        with forward_ad.dual_level():
            (gradient,) = torch.autograd.grad(output, leaf, forward_ad.make_dual(cotangent, tangent))
            one = forward_ad.unpack_dual(gradient).tangent
        _, pull = vjp(lambda x: module(x)[0], input)
        found.append((one, jvp(lambda c: pull(c)[0], (cotangent,), (tangent,))))
    close(*found)


def test_dropout_asks_for_a_randomness():
    """As every random function does under torch.vmap."""
    ours, _ = double_pair("gru", num_layers=2, dropout=0.5)
    inputs = double(3, 1, 1, 3).expand(3, 4, 2, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: ours(x)[0])(inputs)
    different = vmap(lambda x: ours(x)[0], randomness="different")(inputs)
    assert different.shape == (3, 4, 2, 4) and not torch.equal(different[0], different[1])


def test_engine_runs_it(monkeypatch):
    """A batch of calls is one call of the engine."""
    from fusedrnn import derivatives

    ours, _ = make_pair("gru", 3, 4)
    batches, forward = [], derivatives.forward
    monkeypatch.setattr(derivatives, "forward", lambda *args, **kw: batches.append(args[4].shape) or forward(*args, **kw))
    vmap(lambda x: ours(x)[0])(torch.randn(6, 5, 2, 3))
    assert batches == [(5, 12, 3)]
