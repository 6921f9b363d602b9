"""What becomes of states between steps: resets, zoneout, recurrent dropout; and states kept, returned, and made again.

The engines are held against `fusedrnn.reference`, and what resets stand for against torch.nn, episode after episode.
"""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from conftest import CELLS, compare_all_equal, make_pair, states_for
from fusedrnn import autograd, masks, reference
from fusedrnn.reference import Carry
from fusedrnn.testing import named_outputs
from test_lengths import gradients, leaves_of

cells = pytest.mark.parametrize("cell", CELLS)
close = torch.testing.assert_close
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
# reset, zoneout (per row, or of all alike), hidden_mask, lengths
KINDS = [flags for flags in itertools.product((0, 1), ("", "each", "alike"), (0, 1), (0, 1)) if any(flags[:3])]


def carry_of(cell, kind, T, B, D, H, dtype=torch.float64, S=None):
    reset, zoneout, mask, lengths = kind
    S = S or (2 if cell == "lstm" else 1)
    if zoneout:  # all of some numbers, nothing of others, and of the rest a part
        shape = (T, B, D, S, H) if zoneout == "each" else (D, S, H)
        zoneout = torch.rand(shape, dtype=dtype).mul(1.6).sub(0.3).clamp(0, 1)
    carry = Carry(torch.rand(T, B) < 0.3 if reset else None, zoneout if zoneout != "" else None,
                  torch.dropout(torch.ones(D, B, H, dtype=dtype), 0.4, True) if mask else None)
    return carry, torch.randint(0, T + 1, (B,)) if lengths else None


def arguments(cell, T, B, D, H, P=None, dtype=torch.float64):
    """(input, hx, cx, weights) that want gradients."""
    G, I = GATES[cell], 3
    def make(*shape):
        return (0.4 * torch.randn(*shape, dtype=dtype)).requires_grad_()
    weights = [(make(G * H, I), make(G * H, P or H), make(G * H), make(G * H), make(P, H) if P else None) for _ in range(D)]
    return make(T, B, I), make(D, B, P or H), make(D, B, H) if cell == "lstm" else None, weights


def begun(carry, others):
    """The carry with the states of other arguments for the sequences that begin within a row."""
    return carry._replace(reset_hx=others[1], reset_cx=others[2])


def compare(cell, given, ragged, carry, recompute, tolerance=1e-10):
    input, hx, cx, weights = given
    leaves = [t for t in (input, hx, cx, *carry[3:], *(t for group in weights for t in group)) if t is not None and t.requires_grad]
    results = []
    for run in (autograd.layer, reference.layer):
        options = {} if run is reference.layer else {"recompute": recompute, "return_states": True}
        outputs = [t for t in run(cell, input, hx, cx, weights, ragged, False, carry, **options) if t is not None]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    assert len(results[0]) == len(results[1])
    close(results[0], results[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@cells
def test_engine_does_what_the_reference_does(cell, kind, engine):
    for recompute, D, (T, B, H) in ((False, 2, (5, 3, 7)), (True, 1, (9, 2, 5)), (False, 1, (1, 4, 17)), (True, 2, (4, 5, 9))):
        carry, lengths = carry_of(cell, kind, T, B, D, H)
        compare(cell, arguments(cell, T, B, D, H), lengths, carry, recompute)
        if carry.reset is not None:
            compare(cell, arguments(cell, T, B, D, H), lengths, begun(carry, arguments(cell, T, B, D, H)), recompute)


@pytest.mark.parametrize("threads", [1, 2, 3])
@cells
def test_larger(cell, threads, isa):
    """Several tiles of units and rows, and parts of a sequence whose gates are made again."""
    torch.set_num_threads(threads)
    carry, lengths = carry_of(cell, (1, "each", 1, 1), 40, 60, 1, 70)
    compare(cell, arguments(cell, 40, 60, 1, 70), lengths, begun(carry, arguments(cell, 40, 60, 1, 70)), recompute=True)
    carry, _ = carry_of(cell, (1, "alike", 0, 0), 7, 50, 2, 33)
    compare(cell, arguments(cell, 7, 50, 2, 33), None, carry, recompute=False)


@pytest.mark.parametrize("recompute", [False, True])
def test_projections_and_resets(recompute, engine):
    for D, lengths in itertools.product((1, 2), (None, torch.tensor([4, 0, 2]))):
        carry = Carry(torch.rand(6, 3) < 0.3)
        for each in (carry, begun(carry, arguments("lstm", 6, 3, D, 9, 4))):
            compare("lstm", arguments("lstm", 6, 3, D, 9, 4), lengths, each, recompute)


@cells
def test_packed(cell, engine):
    """The operators take it all for packed rows as well."""
    sizes = torch.tensor([4, 4, 2, 1], device="cpu")
    input, hx, cx, weights = arguments(cell, 4, 4, 2, 7)
    data = input.flatten(0, 1)[:11]
    carry = Carry(torch.rand(11) < 0.4, torch.rand(11, 2, 2 if cell == "lstm" else 1, 7, dtype=torch.float64), torch.rand_like(hx))
    for each in (carry, begun(carry, arguments(cell, 4, 4, 2, 7))):
        compare(cell, (data, hx, cx, weights), sizes, each, recompute=False)


# ---- resets


def episodes(module, input, hx, reset, to=None):
    """Each row of the batch alone, each of its sequences alone: (output, hy) of torch's module, T first."""
    directions = 2 if module.bidirectional else 1
    rows = []
    of_call = hx if isinstance(hx, tuple) else (hx,)
    of_resets = tuple(map(torch.zeros_like, of_call)) if to is None else to if isinstance(to, tuple) else (to,)
    for b in range(input.shape[1]):
        begins = [0, *(t for t in range(1, len(input)) if reset[t, b]), len(input)]
        outputs, ends = [], None
        for k, (begin, end) in enumerate(zip(begins, begins[1:])):
            first, last = k == 0 and not reset[0, b], end == len(input)

            def state(given, anew):
                return torch.stack([given[d, b] if (last if d % directions else first) else anew[d, b] for d in range(len(given))])

            h = tuple(state(*both).unsqueeze(1) for both in zip(of_call, of_resets))
            output, hy = module(input[begin:end, b : b + 1], h if isinstance(hx, tuple) else h[0])
            outputs.append(output)
            hy = hy if isinstance(hy, tuple) else (hy,)
            ends = hy if ends is None else tuple(
                torch.stack([new[d] if last and not d % directions else old[d] for d in range(len(new))]) for new, old in zip(hy, ends))
        rows.append((torch.cat(outputs), *ends))
    output, *hy = (torch.cat(part, 1) for part in zip(*rows))
    return output, tuple(hy) if len(hy) > 1 else hy[0]


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(batch_first=True)], ids=str)
@pytest.mark.parametrize("given", [False, True])
@cells
def test_resets_are_the_loop_over_episodes(cell, given, options, engine):
    ours, stock = make_pair(cell, 3, 7, dtype=torch.float64, **options)
    input, hx, leaves = leaves_of(ours, 8, 4)
    reset = torch.rand(8, 4) < 0.3
    reset[0, :2] = True
    first = input.transpose(0, 1) if ours.batch_first else input
    to = states_for(ours, 4, requires_grad=True) if given else None
    leaves += [] if to is None else to if isinstance(to, tuple) else [to]
    found = ours(input, hx, reset=reset.t() if ours.batch_first else reset, reset_to=to)
    stock.batch_first = False
    expected = episodes(stock, first, hx, reset, to)
    expected = (expected[0].transpose(0, 1) if ours.batch_first else expected[0], expected[1])
    close(found, expected)
    close(gradients(ours, found, leaves), gradients(stock, expected, leaves))


@cells
def test_resets_of_stacks_and_of_one_sequence(cell):
    """Every layer begins anew, and (T, I) has resets of (T,)."""
    ours, _ = make_pair(cell, 3, 7, num_layers=2, dtype=torch.float64)
    input, reset = torch.randn(9, 3, dtype=torch.float64), torch.zeros(9, dtype=torch.bool)
    reset[4] = True
    output, hy = ours(input, reset=reset)
    begin, end = ours(input[:4]), ours(input[4:])
    close(output, torch.cat([begin[0], end[0]]))
    close(hy, end[1])


@cells
def test_resets_to_zeros_are_the_same_bits(cell, engine):
    """Given or not, and wherever they are given for no reset at all."""
    ours, _ = make_pair(cell, 3, 20, num_layers=2, bidirectional=True)
    input, reset, hx = torch.randn(6, 5, 3), torch.rand(6, 5) < 0.3, states_for(ours, 5)
    zeros = tuple(map(torch.zeros_like, hx)) if isinstance(hx, tuple) else torch.zeros_like(hx)
    for mask, one, other in ((reset, None, zeros), (torch.zeros_like(reset), zeros, hx)):
        results = [ours(input, hx, reset=mask, reset_to=to) for to in (one, other)]
        compare_all_equal(*map(named_outputs, results))
        slopes = [gradients(ours, result, []) for result in results]
        assert all(torch.equal(a, b) for a, b in zip(*slopes))


def test_a_learned_first_state():
    """One row of numbers for all sequences, at the first step too: its gradient is a sum over all of them."""
    ours, learned = fusedrnn.GRU(3, 7), torch.randn(1, 1, 7, requires_grad=True)
    input, reset = torch.randn(6, 4, 3), torch.rand(6, 4) < 0.3
    reset[0] = True
    output, _ = ours(input, reset=reset, reset_to=learned.expand(-1, 4, -1))
    begins = [[t for t in range(6) if reset[t, b]] + [6] for b in range(4)]
    alone = [torch.cat([ours(input[a:e, b : b + 1], learned)[0] for a, e in zip(row, row[1:])]) for b, row in enumerate(begins)]
    close(output, torch.cat(alone, 1))
    close(*(torch.autograd.grad(each.square().sum(), learned) for each in (output, torch.cat(alone, 1))))


def test_reset_to_errors():
    reset, input = torch.zeros(5, 2, dtype=torch.bool), torch.randn(5, 2, 3)
    for ours, wrong, kind, text in (
        (fusedrnn.GRU(3, 4), torch.zeros(1, 3, 4), ValueError, r"h of reset_to must be of shape \(1, 2, 4\) on cpu, .* got \(1, 3, 4\) on cpu"),
        (fusedrnn.GRU(3, 4), torch.zeros(1, 2, 4, device="meta"), ValueError, r"got \(1, 2, 4\) on meta"),
        (fusedrnn.GRU(3, 4), 0.0, TypeError, "reset_to must be a tensor or None, got float"),
        (fusedrnn.LSTM(3, 4), torch.zeros(1, 2, 4), TypeError, r"reset_to must be a tuple of tensors \(h, c\) or None, got Tensor"),
        (fusedrnn.LSTM(3, 4, proj_size=2), (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)), ValueError, r"c of reset_to .*\(1, 2, 4\) on cpu"),
        (fusedrnn.SLSTM(3, 4), (torch.zeros(1, 2, 4),) * 3, TypeError, r"tensors \(h, c, n, m\) or None, got tuple of Tensor, Tensor, Tensor"),
    ):  # fmt: skip
        with pytest.raises(kind, match=f"{ours._who}: {text}|{ours._who}: .*{text}"):
            ours(input, reset=reset, reset_to=wrong)
    with pytest.raises(ValueError, match="GRU: reset_to is for calls with reset, .* got reset=None"):
        fusedrnn.GRU(3, 4)(input, reset_to=torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="are for padded input, got a PackedSequence"):
        packed = pack_padded_sequence(input, torch.tensor([5, 2]))
        fusedrnn.GRU(3, 4)(packed, reset=reset, reset_to=torch.zeros(1, 2, 4))
    with pytest.raises(RuntimeError, match="for the fused engine alone, .* different dtypes"):
        fusedrnn.GRU(3, 4)(input, reset=reset, reset_to=torch.zeros(1, 2, 4).double())


def test_reset_errors():
    ours = fusedrnn.GRU(3, 4)
    input = torch.randn(5, 2, 3)
    for wrong in (torch.zeros(5, 2), torch.zeros(2, 5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool), [True]):
        with pytest.raises(ValueError, match=r"fusedrnn.GRU: reset must be a tensor of shape \(5, 2\) of torch.bool, got"):
            ours(input, reset=wrong)
    packed = pack_padded_sequence(input, torch.tensor([5, 2]))
    for wrong in (dict(reset=torch.zeros(5, 2, dtype=torch.bool)), dict(return_states=True)):
        with pytest.raises(ValueError, match="are for padded input, got a PackedSequence"):
            ours(packed, **wrong)
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):  # torch's own
        ours(torch.randn(5, 2, 4), reset=torch.zeros(5, 2, dtype=torch.bool))


def test_where_the_engine_cannot_it_says_so():
    ours = fusedrnn.LSTM(3, 4, zoneout=0.1)
    with pytest.raises(RuntimeError, match="LSTM: zoneout: for the fused engine alone, which does not take this call because"):
        torch.jit.trace(ours, torch.randn(5, 2, 3))
    with pytest.raises(RuntimeError, match="GRU: reset, return_states: for the fused engine alone"):
        fusedrnn.GRU(3, 4).to(torch.complex64)(torch.randn(5, 2, 3, dtype=torch.complex64), reset=torch.zeros(5, 2, dtype=torch.bool),
                                              return_states=True)  # fmt: skip
    with pytest.raises(ValueError, match="torch.nn.LSTM has no zoneout"):
        fusedrnn.convert(nn.Sequential(ours), to="torch")
    ours.zoneout = 0.0
    assert type(fusedrnn.convert(ours, to="torch")) is nn.LSTM


# ---- states of every step


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True, num_layers=2), dict(batch_first=True, num_layers=2)], ids=str)
@cells
def test_states_of_every_step(cell, options, engine):
    ours, stock = make_pair(cell, 3, 7, dtype=torch.float64, **options)
    input, hx, leaves = leaves_of(ours, 5, 3)
    output, hy, states = ours(input, hx, return_states=True)
    close((output, hy), stock(input, hx))
    h, c = states if cell == "lstm" else (states, None)
    assert len(h) == ours.num_layers and h[-1].shape == output.shape
    close(h[-1], output)
    first = [state.transpose(0, 1) if ours.batch_first else state for state in h]
    ends = torch.cat([torch.stack([s[-1, :, :7], *([s[0, :, 7:]] if ours.bidirectional else [])]) for s in first])
    close(ends, hy[0] if cell == "lstm" else hy)
    if c is not None and not ours.bidirectional and ours.num_layers == 1:  # as a loop of torch's cells has it
        state, expected = (hx[0][0], hx[1][0]), []
        cell_of_torch = nn.LSTMCell(3, 7, dtype=torch.float64)
        cell_of_torch.load_state_dict({name[:-3]: value for name, value in stock.state_dict().items()})
        for x in input:
            state = cell_of_torch(x, state)
            expected.append(state[1])
        expected = torch.stack(expected)
        close(c[0], expected)
        weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
        found = torch.autograd.grad((c[0] * weight).sum(), leaves)
        close(found, torch.autograd.grad((expected * weight).sum(), leaves))
    with torch.no_grad():
        close(ours(input, hx, return_states=True), (output, hy, states))


# ---- less memory


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(batch_first=True, num_layers=2), dict(proj_size=3)], ids=str)
@cells
def test_states_alone_give_the_same_gradients(cell, options):
    if "proj_size" in options and cell != "lstm":
        return
    ours, _ = make_pair(cell, 3, 20, dtype=torch.float64, **options)
    thrifty = copy.deepcopy(ours)
    thrifty.save = "states"
    input, hx, leaves = leaves_of(ours, 64, 40)  # several parts
    for lengths in (None, torch.randint(0, 65, (40,))):
        found = [gradients(module, module(input, hx, lengths=lengths), leaves) for module in (thrifty, ours)]
        close(*found, rtol=1e-9, atol=1e-9)


def test_what_is_kept():
    """Between forward and backward: 4H numbers a row less."""
    kept = {}
    for save in ("all", "states"):
        ours = fusedrnn.LSTM(8, 16, save=save)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ours(torch.randn(10, 3, 8))
        kept[save] = sum(sizes)
    assert kept["all"] - kept["states"] == 10 * 3 * 4 * 16
    with pytest.raises(ValueError, match="save must be 'all' or 'states', got 'some'"):
        fusedrnn.LSTM(8, 16, save="some")


# ---- regularisers


@cells
def test_zoneout_by_the_paper(cell):
    """Training: a number is the old or the new one. Otherwise: their mean. On the loop of cells, written out."""
    ours, _ = make_pair(cell, 3, 50)
    ours.zoneout = (0.3, 0.6) if cell == "lstm" else 0.3
    input, hx = torch.randn(20, 8, 3), states_for(ours, 8)
    weights = [(ours.weight_ih_l0, ours.weight_hh_l0, ours.bias_ih_l0, ours.bias_hh_l0, None)]
    h0, c0 = hx if cell == "lstm" else (hx, None)
    step, before = reference.CELLS[cell], [s[0] for s in (h0, c0) if s is not None]
    for train in (True, False):
        ours.train(train)
        output, _, states = ours(input, hx, return_states=True)
        each = zip(*(s[0] for s in (states if cell == "lstm" else (states,))))
        was, stayed, count = before, [0, 0], 0
        for x, now in zip(input, each):
            fresh = step(nn.functional.linear(x, weights[0][0], weights[0][2]),
                         nn.functional.linear(was[0], weights[0][1], weights[0][3]), tuple(was))  # fmt: skip
            for k, rate in zip(range(len(now)), (0.3, 0.6)):
                if train:
                    old = now[k] == was[k]
                    stayed[k] += old.sum().item()
                    close(now[k], torch.where(old, was[k], fresh[k]))
                else:
                    close(now[k], rate * was[k] + (1 - rate) * fresh[k])
            count, was = count + now[0].numel(), now
        if train and cell != "rnn_relu":  # whose old and new numbers are often both zero
            for k, rate in zip(range(len(was)), (0.3, 0.6)):
                assert abs(stayed[k] / count - rate) < 0.03
    del output


@pytest.mark.parametrize("option", [dict(zoneout=0.3), dict(recurrent_dropout=0.3), dict(weight_dropout=0.3)], ids=str)
@cells
def test_masks_are_the_generators_and_are_off_in_eval(cell, option):
    ours, stock = make_pair(cell, 3, 7, num_layers=2)
    for name, value in option.items():
        setattr(ours, name, value)
    input = torch.randn(5, 4, 3)
    def run(seed):
        torch.manual_seed(seed)
        return ours(input)[0]
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    ours.eval()
    state = torch.get_rng_state()
    found = ours(input)[0]
    assert torch.equal(torch.get_rng_state(), state)
    if "zoneout" not in option:
        assert torch.equal(found, make_pair_like(ours)(input)[0])
        close(found, stock(input)[0])
    ours.train()
    ours.zoneout = ours.recurrent_dropout = ours.weight_dropout = 0.0
    assert torch.equal(ours(input)[0], make_pair_like(ours)(input)[0])  # off: the plain kernel


def test_masks():
    """Ones with this probability, independent of their neighbours, in any memory and format, and the generator's, whoever looks on."""
    for shape, dtype, rate in itertools.product([(1024,), (101, 7, 3), (1000, 1000)], [torch.float32, torch.float64, torch.bfloat16],
                                                [0.0, 1e-3, 0.25, 0.5, 0.9]):
        mask = masks.draw(torch.full(shape, float("nan"), dtype=dtype), rate).double()
        assert mask.shape == shape and ((mask == 0) | (mask == 1)).all()
        allowed = 6 * (rate * (1 - rate) / mask.numel()) ** 0.5
        assert abs(mask.mean() - rate) <= allowed
        flat = mask.flatten()
        for apart in (1, 2, 3, 4):  # of the bits of one number of the generator's, and of the next
            assert abs((flat[apart:] * flat[:-apart]).mean() - rate**2) <= 2 * allowed
    within = torch.full((40, 3, 64), -1.0)
    masks.draw(within[:, 1], 0.5)
    assert (within[:, [0, 2]] == -1).all() and 0.4 < within[:, 1].mean() < 0.6
    some = []
    for seed, context in ((1, torch.no_grad()), (1, FlopCounterMode(display=False)), (1, torch.device("meta")), (2, torch.no_grad())):
        torch.manual_seed(seed)
        mask = torch.empty(4000)
        with context:
            some.append(masks.draw(mask, 0.5))
    assert torch.equal(some[0], some[1]) and torch.equal(some[0], some[2]) and not torch.equal(some[0], some[3])


def test_dropout_of_weights():
    for size in (64, 16):  # where bits are drawn, and where not
        leaf = torch.randn(size, size, requires_grad=True)
        assert (leaf.numel() >= masks.LEAST) == (size == 64)
        dropped = masks.dropout(leaf, 0.25)
        gone = dropped == 0
        close(dropped[~gone], (leaf / 0.75)[~gone])
        assert abs(gone.double().mean() - 0.25) < 6 * (0.25 * 0.75) ** 0.5 / size
        (grad,) = torch.autograd.grad(dropped.sum(), leaf)
        assert torch.equal(grad == 0, gone)


def test_masks_are_drawn_again_by_a_checkpoint():
    """The same ones, though a mode was on when they were drawn first."""
    layer, input = fusedrnn.GRU(64, 64, weight_dropout=0.5), torch.randn(3, 2, 64)
    found = []
    for checkpointed in (True, False):
        torch.manual_seed(5)
        with FlopCounterMode(display=False):
            output = checkpoint(layer, input, use_reentrant=False)[0] if checkpointed else layer(input)[0]
        found.append(torch.autograd.grad(output.sum(), list(layer.parameters())))
    for one, other in zip(*found):
        close(one, other)


def make_pair_like(module):
    """The same layer without options."""
    plain = copy.deepcopy(module)
    plain.zoneout = plain.recurrent_dropout = plain.weight_dropout = 0.0
    return plain


@cells
def test_recurrent_dropout_is_one_mask_a_sequence(cell):
    """h is zeroed in the same places at all steps, and scaled, before weight_hh: told from the gradient of weight_hh."""
    ours, _ = make_pair(cell, 3, 64)
    ours.recurrent_dropout = 0.5
    ours(torch.randn(6, 1, 3))[0].sum().backward()
    dead = (ours.weight_hh_l0.grad == 0).all(0)
    assert 12 < dead.sum() < 52


def test_weight_dropout_is_of_weight_hh():
    ours = fusedrnn.LSTM(3, 16, weight_dropout=0.5)
    ours(torch.randn(6, 2, 3))[0].sum().backward()
    assert 0.4 < (ours.weight_hh_l0.grad == 0).double().mean() < 0.6 and not (ours.weight_ih_l0.grad == 0).any()


def test_forget_bias():
    ours = fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True, forget_bias=1.5)
    for name, parameter in ours.named_parameters():
        if name.startswith("bias"):
            assert torch.equal(parameter[4:8], torch.full((4,), 1.5 if "ih" in name else 0.0)) and parameter[:4].abs().min() > 0
    fusedrnn.LSTM(3, 4, bias=False, forget_bias=1.0)
    with pytest.raises(ValueError, match="forget_bias must be a number or None, got 'x'"):
        fusedrnn.LSTM(3, 4, forget_bias="x")


@pytest.mark.parametrize("name", ["zoneout", "recurrent_dropout", "weight_dropout"])
@pytest.mark.parametrize("value", [1.0, -0.1, "x", (0.1, 0.2), None, True], ids=str)
def test_wrong_rates(name, value):
    with pytest.raises(ValueError, match=f"fusedrnn.GRU: {name} must be a probability from 0 to below 1, got"):
        fusedrnn.GRU(3, 4, **{name: value})


def test_not_with_projections():
    for option in (dict(zoneout=0.1), dict(recurrent_dropout=0.1)):
        with pytest.raises(ValueError, match="do not go with projections, got proj_size=2"):
            fusedrnn.LSTM(3, 4, proj_size=2, **option)(torch.randn(5, 2, 3))


def test_options_live_as_attributes_do():
    ours = fusedrnn.LSTM(3, 4, zoneout=(0.1, 0.2), recurrent_dropout=0.3, save="states", forget_bias=1.0)
    text = "zoneout=(0.1, 0.2), recurrent_dropout=0.3, save='states', forget_bias=1.0"
    assert repr(ours) == f"LSTM(3, 4, {text})" and repr(copy.deepcopy(ours)) == repr(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert repr(torch.load(file, weights_only=False)) == repr(ours)
    assert repr(fusedrnn.convert(nn.LSTM(3, 4))) == "LSTM(3, 4)"


# ---- derivatives, compilers, autocast


@pytest.mark.parametrize("kind", [(1, "each", 1, 0), (1, "alike", 0, 1)], ids=str)
@cells
def test_gradcheck_and_gradgradcheck(cell, kind):
    carry, lengths = carry_of(cell, kind, 3, 2, 2, 3)
    input, hx, cx, weights = arguments(cell, 3, 2, 2, 3)
    there = [t for t in (cx, *arguments(cell, 3, 2, 2, 3)[1:3], *(t for group in weights for t in group)) if t is not None]

    def run(input, hx, *rest):
        rest = list(rest)
        c = rest.pop(0) if cx is not None else None
        to = carry._replace(reset_hx=rest.pop(0), reset_cx=None if cx is None else rest.pop(0))
        groups = [(*rest[4 * d : 4 * d + 4], None) for d in range(2)]
        return tuple(t for t in autograd.layer(cell, input, hx, c, groups, lengths, False, to, return_states=True) if t is not None)

    assert gradcheck(run, (input, hx, *there), fast_mode=True)
    assert gradgradcheck(run, (input, hx, *there), fast_mode=True)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiled(cell, backend):
    ours, _ = make_pair(cell, 3, 7, num_layers=2)
    ours.save = "states"
    input, reset = torch.randn(6, 4, 3, requires_grad=True), torch.rand(6, 4) < 0.3
    to = states_for(ours, 4, requires_grad=True)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    found, expected = (module(input, reset=reset, return_states=True, reset_to=to) for module in (compiled, ours))
    close(found, expected)

    def slopes(results):
        inner = results[2][1][0] if cell == "lstm" else results[2][0]
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (results[0], inner))
        return torch.autograd.grad(loss, [input, *(to if cell == "lstm" else [to]), *ours.parameters()])

    close(slopes(found), slopes(expected), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        close(compiled(input, reset=reset, return_states=True, reset_to=to), expected)


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_masks():
    ours = fusedrnn.LSTM(3, 7, zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.1)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    first, second = (compiled(torch.ones(6, 4, 3))[0] for _ in range(2))
    assert first.isfinite().all() and not torch.equal(first, second)


def test_autocast_and_transforms():
    ours = fusedrnn.GRU(3, 7, zoneout=0.2)
    input, reset = torch.randn(6, 4, 3), torch.rand(6, 4) < 0.3
    to = torch.randn(1, 4, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _, states = ours(input, reset=reset, return_states=True, reset_to=to)
    assert torch.equal(states[0], output)
    (grad,) = torch.autograd.grad(output.sum(), to)
    assert grad.dtype == torch.float32 and grad.any()
    ours.eval()
    with pytest.warns(UserWarning, match="transforms of the engine take no resets"):
        each = torch.func.vmap(lambda x: ours(x, reset=reset)[0])(input.expand(3, 6, 4, 3))
    close(each[1], ours(input, reset=reset)[0])
    many = torch.randn(3, 1, 4, 7)
    each = torch.func.vmap(lambda state: ours(input, reset=reset, reset_to=state)[0])(many)
    close(each, torch.stack([ours(input, reset=reset, reset_to=state)[0] for state in many]))

    def of_states(state):
        return ours(input, reset=reset, reset_to=state)[0]

    output = of_states(to)
    grad, pullback = torch.ones_like(output), torch.func.vjp(of_states, to.detach())[1]
    close(pullback(grad), torch.autograd.grad(output, to, grad, retain_graph=True))
    batch = torch.randn(2, *output.shape)
    each = torch.autograd.grad(output, to, batch, retain_graph=True, is_grads_batched=True)[0]
    close(each, torch.stack([torch.autograd.grad(output, to, one, retain_graph=True)[0] for one in batch]))


@pytest.mark.filterwarnings("ignore:.*the engine has no forward-mode derivative")
def test_forward_mode_of_the_states_after_resets():
    ours, reset = fusedrnn.LSTM(3, 7, dtype=torch.float64), torch.rand(6, 4) < 0.3
    input, to = torch.randn(6, 4, 3, dtype=torch.float64), states_for(ours, 4)

    def of_states(*states):
        return ours(input, reset=reset, reset_to=states)[0]

    _, tangent = torch.func.jvp(of_states, to, tuple(map(torch.ones_like, to)))
    jacobians = torch.autograd.functional.jacobian(of_states, to)
    close(tangent, sum(jacobian.sum((-3, -2, -1)) for jacobian in jacobians))


def test_named_outputs_are_not_confused():
    assert set(named_outputs(fusedrnn.LSTM(3, 4)(torch.randn(2, 2, 3)))) == {"output", "hy", "cy"}


def test_no_rows_at_all():
    ours = fusedrnn.LSTM(3, 4, save="states")
    ours(torch.randn(5, 0, 3, requires_grad=True))[0].sum().backward()
    assert not ours.weight_hh_l0.grad.any()


@pytest.mark.parametrize("cell, less", [("lstm", 1.5), ("gru", 5.0)])
def test_a_training_step_takes_less_memory(cell, less):
    """At its peak, by so many numbers a row and unit."""
    from benchmarks.memory import allocator_peak

    T, B, H = 512, 16, 64
    peaks = {}
    for save in ("all", "states"):
        ours = getattr(fusedrnn, cell.upper())(H, H, save=save)
        input, grad = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)

        def step(ours=ours, input=input, grad=grad):
            return torch.autograd.grad(ours(input)[0], [input, *ours.parameters()], grad)

        step()
        peaks[save] = allocator_peak(step)
    assert peaks["all"] - peaks["states"] > less * T * B * H * 4
