"""Weights may be anything at any time: they are read by name at every call (parametrize, functional_call, tying, pruning ...).

Each use runs on torch.nn and on fusedrnn and must give the same numbers; and where a use changes a weight, the result
must change with it, so that a stale copy of a weight cannot pass.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn
from conftest import CELLS, make_pair
from same import compare, observe, same

KINDS = ["RNN", "LSTM", "GRU"]
CELL_KINDS = ["RNNCell", "LSTMCell", "GRUCell"]
kinds = pytest.mark.parametrize("kind", KINDS)
all_kinds = pytest.mark.parametrize("kind", KINDS + CELL_KINDS)


def build(home, kind, **options):
    return getattr(home, kind)(4, 5, **options)


def weight_name(kind):
    return "weight_hh" if "Cell" in kind else "weight_hh_l0"


def input_for(kind):
    """The same numbers at every call."""
    shape = (2, 4) if "Cell" in kind else (3, 2, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def run(module, kind):
    result = module(input_for(kind))
    while isinstance(result, tuple):
        result = result[0]
    return result


def test_replaced_by_every_means():
    """del, assignment of a Parameter, of a plain tensor after del, .data, in-place: the next call sees each of them."""
    for kind in KINDS + CELL_KINDS:
        name = weight_name(kind)

        def use(home):
            module = build(home, kind)
            weight = getattr(module, name)
            results = [run(module, kind)]
            setattr(module, name, nn.Parameter(torch.full_like(weight, 0.1)))
            results.append(run(module, kind))
            getattr(module, name).data = torch.full_like(weight, 0.2)
            results.append(run(module, kind))
            with torch.no_grad():
                getattr(module, name).mul_(2)
            results.append(run(module, kind))
            getattr(module, name).data.mul_(2)
            results.append(run(module, kind))
            delattr(module, name)
            setattr(module, name, torch.full_like(weight, 0.3))
            results.append(run(module, kind))
            delattr(module, name)
            setattr(module, name, nn.Parameter(torch.full_like(weight, 0.5)))
            results.append(run(module, kind))
            return results

        results, _ = same(use)
        # A cell starts from zeros, where weight_hh has no say: use the gradient of the others instead of the value.
        if "Cell" not in kind:
            assert all(not torch.equal(a, b) for a, b in zip(results, results[1:])), kind


@all_kinds
def test_functional_call(kind):
    def use(home):
        module = build(home, kind)
        other = {name: p.detach().mul(1.5).requires_grad_() for name, p in module.named_parameters()}
        before = run(module, kind)
        result = functional_call(module, other, (input_for(kind),))
        after = run(module, kind)
        while isinstance(result, tuple):
            result = result[0]
        result.sum().backward()
        assert torch.equal(before, after), "functional_call left its weights behind"
        return before, result, [t.grad for t in other.values()], [p.grad for p in module.parameters()]

    (before, result, *_), _ = same(use)
    assert not torch.equal(before, result)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@all_kinds
def test_parametrize(kind):
    name = weight_name(kind).replace("hh", "ih")

    def use(home):
        module = build(home, kind)
        plain = run(module, kind)
        parametrize.register_parametrization(module, name, Doubled())
        doubled = run(module, kind)
        doubled.sum().backward()
        original = module.parametrizations[name].original
        with torch.no_grad():
            original.mul_(0.5)
        again = run(module, kind)
        with parametrize.cached():
            cached = run(module, kind)
        parametrize.remove_parametrizations(module, name)
        return plain, doubled, again, cached, run(module, kind), original.grad

    (plain, doubled, again, cached, removed, _), _ = same(use)
    assert not torch.equal(plain, doubled)
    assert torch.equal(plain, again) and torch.equal(plain, cached) and torch.equal(plain, removed)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda f: f.__name__)
@all_kinds
def test_norms_by_hooks(kind, norm):
    """The old ones put a plain tensor in the weight's place before each call."""
    name = weight_name(kind).replace("hh", "ih")

    def use(home):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = norm(build(home, kind), name)
        results = [run(module, kind)]
        results[0].sum().backward()
        with torch.no_grad():
            getattr(module, name + ("_g" if norm is nn.utils.weight_norm else "_orig")).mul_(3)
            module.get_parameter("bias_ih" + name.removeprefix("weight_ih")).add_(1)
        results.append(run(module, kind))
        return results, {n: p.grad for n, p in module.named_parameters()}, list(module.state_dict())

    (results, *_), _ = same(use)
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
    ids=lambda f: f.__name__,
)  # fmt: skip
@all_kinds
def test_parametrizations(kind, norm):
    def use(home):
        module = norm(build(home, kind), weight_name(kind).replace("hh", "ih"))
        module.eval()  # in training spectral_norm changes the weight at every look, and torch.nn looks four times a call
        result = run(module, kind)
        result.sum().backward()
        return result, {name: p.grad for name, p in module.named_parameters()}

    same(use)


@all_kinds
def test_pruning(kind):
    name = weight_name(kind).replace("hh", "ih")

    def use(home):
        module = build(home, kind)
        plain = run(module, kind)
        prune.random_unstructured(module, name, 0.5)
        pruned = run(module, kind)
        pruned.sum().backward()
        grad = getattr(module, name + "_orig").grad
        prune.remove(module, name)
        return plain, pruned, run(module, kind), grad

    (plain, pruned, removed, grad), _ = same(use)
    assert not torch.equal(plain, pruned) and torch.equal(pruned, removed) and (grad == 0).sum() >= grad.numel() // 2


@kinds
def test_tying(kind):
    """Two layers that share a weight, and two modules that do: one Parameter, gradients added."""

    def use(home):
        one, two = build(home, kind), build(home, kind)
        two.weight_hh_l0 = one.weight_hh_l0
        model = nn.ModuleList([one, two])
        stacked = getattr(home, kind)(5, 5, 2)
        stacked.weight_ih_l1 = stacked.weight_hh_l0
        y = one(input_for(kind))[0].sum() + two(input_for(kind))[0].sum() + stacked(torch.ones(3, 2, 5))[0].sum()
        y.backward()
        return y, len(list(model.parameters())), len(list(stacked.parameters())), one.weight_hh_l0.grad, [
            p.grad for p in stacked.parameters()
        ]

    same(use)


@all_kinds
def test_load_state_dict_assign(kind):
    def use(home):
        module, other = build(home, kind), build(home, kind)
        before = run(module, kind)
        state = {name: t.double() for name, t in other.state_dict().items()}
        module.load_state_dict(state, assign=True)
        assert getattr(module, weight_name(kind)).data_ptr() == state[weight_name(kind)].data_ptr()
        module.float()
        meta = build(home, kind, device="meta")
        meta.load_state_dict(other.state_dict(), assign=True)
        return before, run(module, kind), run(meta, kind), run(other, kind), module

    same(use)


@pytest.fixture
def swap():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@all_kinds
def test_swap_module_params(kind, swap):
    def use(home):
        module = build(home, kind)
        run(module, kind)
        weight = getattr(module, weight_name(kind))
        module.double()
        assert getattr(module, weight_name(kind)) is weight and weight.dtype == torch.float64
        module.float()
        return run(module, kind)

    same(use)


@all_kinds
def test_load_state_dict_with_swap(kind, swap):
    """torch.nn's layers fail here ("Cannot swap t1 because it has weakref associated with it"). fusedrnn loads."""
    stock, ours = build(nn, kind), build(fusedrnn, kind)
    run(ours, kind)
    ours.load_state_dict(stock.state_dict())
    compare(run(ours, kind), run(stock, kind))


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double().float(),
        lambda m: m.to("cpu"),
        lambda m: m.to("meta"),
        lambda m: m.to("meta").to_empty(device="cpu").requires_grad_(False).apply(fill),
        lambda m: m.requires_grad_(False),
        lambda m: m.cpu().eval(),
        lambda m: m.share_memory(),
        lambda m: m.apply(fill),
        lambda m: m.type(torch.float64),
    ],
    ids=range(12),
)
@all_kinds
def test_moves(kind, move):
    def use(home):
        module = move(build(home, kind))
        weight = getattr(module, weight_name(kind))
        result = module(input_for(kind).to(weight.device, weight.dtype))
        while isinstance(result, tuple):
            result = result[0]
        return module, result, weight.is_shared()

    same(use)


def fill(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.25)


@kinds
def test_missing_weight(kind):
    """A deleted weight is tolerated by .to() and deepcopy. A call raises; torch.nn's may run on the deleted one."""

    def use(home):
        module = build(home, kind, num_layers=2)
        del module.weight_hh_l1
        module.double().float()
        twin = copy.deepcopy(module)
        twin.weight_hh_l1 = nn.Parameter(torch.ones_like(twin.weight_hh_l0))
        return [w is None for w in module._flat_weights], run(twin, kind)

    same(use)

    module = build(fusedrnn, kind)
    run(module, kind)
    del module.weight_hh_l0
    with pytest.raises(TypeError, match="got NoneType"):
        run(module, kind)


@kinds
def test_weight_of_wrong_shape(kind):
    """Never read past the end of a weight: an error."""
    for name, shape in (("weight_hh_l0", (5, 4)), ("weight_ih_l0", (5, 5)), ("bias_hh_l0", (4,)), ("bias_ih_l0", (3,))):
        module = build(fusedrnn, kind)
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
        setattr(module, name, nn.Parameter(torch.zeros(gates * shape[0] - 1, *shape[1:])))
        with pytest.raises(RuntimeError):
            run(module, kind)


@kinds
def test_weight_of_other_dtype(kind):
    same(lambda home: run(build_with(home, kind, "weight_hh_l0", torch.float64), kind), raises=observe(
        nn, lambda home: run(build_with(home, kind, "weight_hh_l0", torch.float64), kind)).failure.__class__)  # fmt: skip


def build_with(home, kind, name, dtype):
    module = build(home, kind)
    setattr(module, name, nn.Parameter(getattr(module, name).detach().to(dtype)))
    return module


@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_any_strides(cell):
    """A weight may be a transposed or a strided view."""
    ours, stock = make_pair(cell, 4, 5, num_layers=2, bidirectional=True)
    for module in (ours, stock):
        for name, parameter in list(module.named_parameters()):
            wide = torch.zeros(*[2 * size for size in parameter.shape[::-1]]).permute(*range(parameter.dim())[::-1])
            view = wide[tuple(slice(None, None, 2) for _ in parameter.shape)]
            view.copy_(parameter.detach())
            setattr(module, name, nn.Parameter(view))
            assert not getattr(module, name).is_contiguous()
    input = torch.randn(3, 2, 4)
    results = []
    for module in (ours, stock):
        output, _ = module(input)
        output.sum().backward()
        results.append((output, [p.grad.contiguous() for p in module.parameters()]))
    compare(*results)


@all_kinds
def test_skip_init(kind):
    """torch.nn.utils.skip_init refuses torch.nn's layers (they show no `device`). fusedrnn's show their arguments."""
    module = nn.utils.skip_init(getattr(fusedrnn, kind), 4, 5, dtype=torch.float64)
    assert getattr(module, weight_name(kind)).dtype == torch.float64 and not getattr(module, weight_name(kind)).is_meta
    fill(module)
    assert run(module.float(), kind).isfinite().all()


@kinds
def test_subclass_that_calls_super(kind):
    def use(home):
        class Residual(getattr(home, kind)):
            def __init__(self, size, scale):
                super().__init__(size, size, batch_first=True)
                self.scale = nn.Parameter(torch.tensor(scale))

            def forward(self, input, hx=None):
                output, hidden = super().forward(input, hx)
                return self.scale * output + input, hidden

        module = Residual(4, 0.5)
        output, hidden = module(torch.randn(2, 3, 4))
        output.sum().backward()
        return repr(module), output, hidden, {name: p.grad for name, p in module.named_parameters()}

    same(use)


@kinds
def test_replicas_have_their_own_lists(kind):
    """torch.nn.DataParallel copies a module this way for each device, and gives the copy its own weights."""
    module = build(fusedrnn, kind)
    replica = module._replicate_for_data_parallel()
    assert replica._flat_weights is not module._flat_weights
    assert replica._flat_weights_names is not module._flat_weights_names
    for name, parameter in module.named_parameters():
        setattr(replica, name, torch.zeros_like(parameter.detach()))  # plain tensors, as broadcast makes them
    assert not run(replica, kind).any()
    assert run(module, kind).any()


@kinds
def test_optimizer_sees_and_changes_the_weights(kind):
    def use(home):
        module = build(home, kind)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = run(module, kind).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    losses, _ = same(use)
    assert (losses[1:] < losses[:-1]).all()


@all_kinds
def test_gradients_do_not_share_memory(kind):
    """bias_ih and bias_hh often have equal gradients; an optimizer that changes one in place must not change the other."""
    module = build(fusedrnn, kind)
    grads = torch.autograd.grad(run(module, kind).sum(), list(module.parameters()))
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads), "as torch.autograd.grad returns them"
    run(module, kind).sum().backward()
    assert len({p.grad.untyped_storage().data_ptr() for p in module.parameters()}) == len(grads)
