"""LayerNormLSTM and LayerNormGRU against loops of torch.nn.LayerNorm, and what is theirs alone.

What they share with the other layers is in tests/test_more_cells.py, their cells at the operators in tests/test_cells_of_choice.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import autograd, layer, normed, ops
from test_more_cells import as_tuple, make, states_of

close = torch.testing.assert_close
kinds = pytest.mark.parametrize("kind", ["LayerNormLSTM", "LayerNormGRU"])
late_too = pytest.mark.parametrize("kind, options", [("LayerNormLSTM", {}), ("LayerNormGRU", {}), ("GRU", {"reset_after": False})])
I, H = 3, 6


class Written(nn.Module):
    """One direction of one layer as one writes it: torch.nn.LayerNorm around two products, and around c."""

    def __init__(self, module, kind, suffix):
        super().__init__()
        own = {name.removesuffix(suffix): p for name, p in module.named_parameters() if name.endswith(suffix)}
        self.lstm, rows, units = kind == "LayerNormLSTM", len(own["norm_ih"]), own["weight_hh"].shape[1]
        self.weight_ih, self.weight_hh = own["weight_ih"], own["weight_hh"]
        self.norm_ih, self.norm_hh = (nn.LayerNorm(rows, dtype=torch.float64) for _ in range(2))
        for norm, half in ((self.norm_ih, "ih"), (self.norm_hh, "hh")):
            norm.weight = own[f"norm_{half}"]
            if f"bias_{half}" in own:
                norm.bias = own[f"bias_{half}"]
        if self.lstm:
            self.norm_c = nn.LayerNorm(units, dtype=torch.float64)
            self.norm_c.weight, self.norm_c.bias = (nn.Parameter(row.detach()) for row in own["norm_c"])

    def forward(self, input, states, mask=1):
        outputs = []
        for x in input:
            gates_x, gates_h = self.norm_ih(linear(x, self.weight_ih)), self.norm_hh(linear(states[0] * mask, self.weight_hh))
            if self.lstm:
                i, f, g, o = (gates_x + gates_h).chunk(4, -1)
                c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
                states = o.sigmoid() * self.norm_c(c).tanh(), c
            else:
                (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
                r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
                states = ((1 - z) * (n_x + r * n_h).tanh() + z * states[0],)
            outputs.append(states[0])
        return torch.stack(outputs), states


@pytest.mark.parametrize("bias", [True, False])
@kinds
def test_two_layers_of_two_directions(kind, bias):
    module = make(kind, dict(bias=bias), num_layers=2, bidirectional=True)
    input = torch.randn(7, 4, I, dtype=torch.float64, requires_grad=True)
    hx = as_tuple(states_of(module, kind, 4))
    output, last = module(input, hx if len(hx) > 1 else hx[0])
    found, ends = input, []
    for k in range(2):
        directions = []
        for d, suffix in enumerate([f"_l{k}", f"_l{k}_reverse"]):
            written = Written(module, kind, suffix)
            out, states = written(found.flip(0) if d else found, [state[2 * k + d] for state in hx])
            directions.append(out.flip(0) if d else out)
            ends.append(states)
        found = torch.cat(directions, -1)
    close(output, found, rtol=0, atol=1e-12)
    close(as_tuple(last), tuple(map(torch.stack, zip(*ends))), rtol=0, atol=1e-12)
    shared = [p for name, p in module.named_parameters() if "norm_c" not in name]
    slope = torch.randn_like(output)
    grads = [torch.autograd.grad((slope * each).sum(), [input, *shared]) for each in (output, found)]
    close(*grads, rtol=1e-12, atol=1e-12)


@kinds
def test_masks_of_a_seed(kind):
    """One of h for all steps, and one of weight_hh."""
    input = torch.randn(9, 4, I, dtype=torch.float64)
    module = make(kind, {}, recurrent_dropout=0.3)
    states = [torch.zeros(4, H, dtype=torch.float64)] * (2 if kind == "LayerNormLSTM" else 1)
    torch.manual_seed(5)
    found = module(input)[0]
    torch.manual_seed(5)
    mask = torch.dropout(input.new_ones(1, 4, H), 0.3, True)[0]
    close(found, Written(module, kind, "_l0")(input, states, mask)[0], rtol=0, atol=1e-12)
    module = make(kind, {}, weight_dropout=0.3)
    torch.manual_seed(5)
    found = module(input)[0]
    torch.manual_seed(5)
    written = Written(module, kind, "_l0")
    weight = torch.dropout(module.weight_hh_l0, 0.3, True)
    close(found, functional_call(written, {"weight_hh": weight}, (input, states))[0], rtol=0, atol=1e-12)


@kinds
def test_dropout_between_layers_of_a_seed(kind):
    module = make(kind, {}, num_layers=2, dropout=0.4)
    input = torch.randn(9, 4, I, dtype=torch.float64)
    torch.manual_seed(5)
    found = module(input)[0]
    states = [torch.zeros(4, H, dtype=torch.float64)] * (2 if kind == "LayerNormLSTM" else 1)
    torch.manual_seed(5)
    between = torch.dropout(Written(module, kind, "_l0")(input, states)[0], 0.4, True)
    close(found, Written(module, kind, "_l1")(between, states)[0], rtol=0, atol=1e-12)
    module.eval()
    assert torch.equal(module(input)[0], module(input)[0])


@kinds
def test_the_scale_of_a_weight_is_no_matter(kind):
    """What layer normalisation is for; as far as the small number beside the variance allows."""
    module, input = make(kind, {}), torch.randn(9, 4, I, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.mul_(1e4)
        module.weight_hh_l0.mul_(1e4)
        expected = module(1 + input)[0]
        module.weight_ih_l0.mul_(8)
        module.weight_hh_l0.mul_(3)
        close(module(1 + input)[0], expected, rtol=0, atol=1e-6)


@kinds
def test_lengths_are_the_packed_sequence(kind):
    """To the last bit or two, with anything behind the ends."""
    for options in (dict(), dict(bidirectional=True, num_layers=2), dict(batch_first=True)):
        module = make(kind, options)
        lengths = torch.tensor([2, 5, 3])
        input = torch.randn(5, 3, I, dtype=torch.float64)
        behind = torch.arange(5).unsqueeze(-1) >= lengths
        spoilt = torch.where(behind.unsqueeze(-1), torch.nan, input)
        if module.batch_first:
            input, spoilt = input.transpose(0, 1), spoilt.transpose(0, 1)
        results = []
        packed = pack_padded_sequence(input, lengths, module.batch_first, enforce_sorted=False)
        for given, more in ((packed, {}), (spoilt.requires_grad_(), {"lengths": lengths})):
            output, last = module(given, **more)
            output = output if more else pad_packed_sequence(output, module.batch_first)[0]
            grads = torch.autograd.grad(output.pow(2).sum(), list(module.parameters()), retain_graph=True)
            results.append((output, as_tuple(last), grads))
        close(*results, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(output.sum(), spoilt)
        assert (grad[spoilt.isnan()] == 0).all() and grad.isfinite().all()


@kinds
def test_resets_are_sequences_of_their_own(kind):
    module = make(kind, {}, num_layers=2)
    input = torch.randn(9, 1, I, dtype=torch.float64)
    begins = [0, 2, 3, 7, 9]
    reset = torch.zeros(9, 1, dtype=torch.bool)
    reset[begins[1:-1]] = True
    parts = [module(input[a:b]) for a, b in zip(begins, begins[1:])]
    output, last = module(input, reset=reset)
    close((output, last), (torch.cat([part[0] for part in parts]), parts[-1][1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_library", [False, True])
@late_too
def test_many_rows(kind, options, by_library, monkeypatch):
    """The gradients of weights are a matrix library's there, or the engine's; gates made again in parts, or not."""
    monkeypatch.setattr(layer, "MKL_IS_SLOW", not by_library)
    results = []
    for save in ("all", "states"):
        torch.manual_seed(0)
        module = make(kind, options, sizes=(40, 48), save=save)
        input = torch.randn(60, 20, 40, dtype=torch.float64, requires_grad=True)
        hx = states_of(module, kind, 20, requires_grad=True)
        output, last = module(input, hx)
        loss = output.pow(2).sum() + sum(state.sum() for state in as_tuple(last))
        leaves = [input, *as_tuple(hx), *module.parameters()]
        results.append([output, *torch.autograd.grad(loss, leaves)])
        few = [module(input[:, k : k + 10], tuple(s[:, k : k + 10] for s in hx) if isinstance(hx, tuple) else hx[:, k : k + 10])
               for k in (0, 10)]
        loss = sum(out.pow(2).sum() + sum(state.sum() for state in as_tuple(end)) for out, end in few)
        results.append([torch.cat([out for out, _ in few], 1), *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            close(one, two, rtol=1e-11, atol=1e-11 * (1 + two.abs().max().item()))


@pytest.mark.parametrize("onednn", [False, True])
@kinds
def test_the_product_may_be_another_librarys(kind, onednn, monkeypatch):
    """With gradients, without, and with gradients of gradients; as near to float64 as by torch's own."""
    monkeypatch.setattr(layer, "MKL_IS_SLOW", onednn and torch.backends.mkldnn.is_available())
    module, input = make(kind, {}, sizes=(40, 384), dtype=torch.float32), torch.randn(60, 20, 40, requires_grad=True)

    def results(module, input):
        output, last = module(input)
        leaves = [input, module.weight_ih_l0, module.norm_ih_l0]
        slopes = torch.autograd.grad(output.pow(2).sum(), leaves, retain_graph=True)
        twice = torch.autograd.grad(output[-1].sum(), leaves, create_graph=True)
        one, two = torch.autograd.grad(output[-1].sum(), leaves, torch.tensor([1.0, 2.0]).to(input), True, is_grads_batched=True)[0]
        return [output, *as_tuple(last), *slopes, *torch.autograd.grad(sum(grad.pow(2).sum() for grad in twice), leaves), one, two]

    found, exact = results(module, input), results(copy.deepcopy(module).double(), input.double().detach().requires_grad_())
    with torch.no_grad():
        for one, two in zip(module(input), found):
            close(as_tuple(one)[0], as_tuple(two)[0], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(autograd, "plain_product", linear)
    monkeypatch.setattr(layer, "MKL_IS_SLOW", False)
    for one, torchs, true in zip(found, results(module, input), exact, strict=True):
        error, allowed = ((each - true).abs().max().item() for each in (one, torchs))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * true.abs().max().item()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("save", ["all", "states"])
@kinds
def test_compiled_with_lengths_and_resets(kind, save):
    module = make(kind, {}, num_layers=2, bidirectional=True, save=save)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    input, lengths = torch.randn(5, 3, I, dtype=torch.float64), torch.tensor([5, 0, 3])
    reset = torch.rand(5, 3) < 0.3
    results = []
    for each in (compiled, module):
        output, last = each(input, lengths=lengths, reset=reset)
        results.append((output, last, torch.autograd.grad(output.pow(2).sum(), list(module.parameters()))))
    close(*results)


@pytest.mark.filterwarnings("ignore:.*the engine has no forward-mode derivative")
@kinds
def test_many_at_once(kind):
    """One call of a larger batch where the weights are the same; Jacobians; forward mode."""
    module = make(kind, {})
    inputs = torch.randn(4, 5, 2, I, dtype=torch.float64)
    close(vmap(lambda x: module(x)[0])(inputs), torch.stack([module(x)[0] for x in inputs]), rtol=0, atol=1e-12)
    one, direction = inputs[0], torch.randn_like(inputs[0])
    jacobian = jacrev(lambda x: module(x)[0])(one)
    _, tangent = jvp(lambda x: module(x)[0], (one,), (direction,))
    close(tangent, torch.einsum("tbhsci,sci->tbh", jacobian, direction), rtol=1e-10, atol=1e-10)


@kinds
def test_autocast(kind):
    module, input = make(kind, {}, dtype=torch.float32), torch.randn(9, 4, I)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(input)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in module.parameters())
    module.bfloat16()
    output, last = module(input.bfloat16())
    assert output.dtype == torch.bfloat16 and all(state.dtype == torch.bfloat16 for state in as_tuple(last))


@kinds
def test_the_engine_is_given_what_is_left(kind):
    """No weight_ih, no biases; the numbers of each unit behind weight_hh."""
    module = make(kind, {}, num_layers=2, bidirectional=True)
    cell, weights = module._cell(), list(module.parameters())
    layers, gains = normed.group_normed(cell, weights, True, 2, 2)
    assert [len(each) for each in (*layers, *gains)] == [2] * 4
    gates, left = normed.normed_gates(torch.randn(5, 3, I, dtype=torch.float64), layers[0], gains[0], None, False)
    traits = ops.TRAITS[cell]
    assert gates.shape == (5, 3, 2 * traits["gates"] * H) and traits["norms"] > 0
    for empty, weight_hh, bias_ih, bias_hh, unit in left:
        assert empty.shape == (0, 0) and weight_hh.shape == (traits["gates"] * H, H) and unit.shape == (traits["unit"], H)
        assert bias_ih is bias_hh is None
    gates = gates.detach()[..., : traits["gates"] * H]
    bias = torch.zeros(traits["gates"] * H, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"bias_hh must hold none with the cell {cell}"):
        ops.recurrence_forward(cell, [gates], [left[0][1].detach()], [bias], [left[0][4].detach()], *[None] * 8, 0, False)


@kinds
def test_wrong_arguments(kind):
    with pytest.raises(TypeError, match=f"fusedrnn.{kind} has no argument 'proj_size'"):
        make(kind, dict(proj_size=2))
    with pytest.raises(TypeError, match=rf"{kind}.forward\(\) missing 1 required positional argument: 'input'"):
        make(kind, {})()
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        getattr(fusedrnn, kind)(3, 0)
    module = make(kind, {})
    with pytest.raises(ValueError, match=rf"fusedrnn.{kind}: lengths must be of shape \(3,\), got \(2,\)"):
        module(torch.randn(5, 3, I, dtype=torch.float64), lengths=torch.tensor([5, 1]))
