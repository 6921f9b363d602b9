"""Calls of `forward`, right and wrong: the same call on torch.nn and on fusedrnn, compared in everything seen."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fusedrnn
from conftest import CELLS, make_pair, states_for
from same import compare, same

KINDS = ["RNN", "LSTM", "GRU"]
CELL_KINDS = ["RNNCell", "LSTMCell", "GRUCell"]
kinds = pytest.mark.parametrize("kind", KINDS)
cell_kinds = pytest.mark.parametrize("kind", CELL_KINDS)
cells = pytest.mark.parametrize("cell", CELLS)


def call(kind, shape, hx=None, cx=None, sizes=(4, 5), **options):
    """A function of home: build a module, call it with random tensors of these shapes."""

    def use(home):
        module = getattr(home, kind)(*sizes, **options)
        input = torch.randn(shape)
        if hx is None:
            return module(input)
        states = torch.randn(hx) if kind not in ("LSTM", "LSTMCell") else (torch.randn(hx), torch.randn(cx or hx))
        return module(input, states)

    return use


# ---------------------------------------------------------------------------------------------------------------------
# Right calls
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, dict(batch_first=True), dict(num_layers=2, bidirectional=True), dict(batch_first=True, bidirectional=True)],
    ids=str,
)
@kinds
def test_shapes_and_strides(kind, options):
    for shape in ((6, 3, 4), (1, 3, 4), (6, 1, 4), (1, 1, 4)):
        same(call(kind, shape, **options))
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    same(call(kind, (3, 3, 4), (rows, 3, 5), **options))
    same(call(kind, (3, 4), (rows, 5), **options))
    same(call(kind, (1, 4), **options))


def test_projected_shapes():
    for options in ({}, dict(batch_first=True, bidirectional=True), dict(num_layers=2)):
        rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        same(call("LSTM", (3, 3, 4), proj_size=2, **options))
        same(call("LSTM", (3, 3, 4), (rows, 3, 2), (rows, 3, 5), proj_size=2, **options))
        same(call("LSTM", (3, 4), (rows, 2), (rows, 5), proj_size=2, **options))


@cells
def test_batch_first_output_is_a_transposed_view(cell):
    ours, _ = make_pair(cell, 4, 5, batch_first=True, bidirectional=True)
    output = ours(torch.randn(3, 7, 4))[0]
    assert output.shape == (3, 7, 10) and output.stride() == (10, 30, 1)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("grad", [True, False])
@cells
def test_states_do_not_alias(cell, T, grad):
    """hy and cy share memory neither with output nor with hx, and are contiguous."""
    ours, _ = make_pair(cell, 4, 5)
    input, hx = torch.randn(T, 3, 4), states_for(ours, 3)
    with torch.set_grad_enabled(grad):
        output, hidden = ours(input, hx)
    tensors = [output, *(hidden if cell == "lstm" else [hidden]), input, *(hx if cell == "lstm" else [hx])]
    assert all(t.is_contiguous() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_states_hold_the_layers_in_order():
    """hy is [l0 forward, l0 reverse, l1 forward, l1 reverse]; a reverse half is the state at t = 0."""
    module = fusedrnn.GRU(4, 5, 2, bidirectional=True)
    output, hy = module(torch.randn(6, 3, 4))
    assert torch.equal(hy[2], output[-1, :, :5]) and torch.equal(hy[3], output[0, :, 5:])


@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [2, 5, 1, 4], [5], [3, 3]], ids=str)
@pytest.mark.parametrize("options", [{}, dict(bidirectional=True, num_layers=2), dict(batch_first=True)], ids=str)
@pytest.mark.parametrize("given", [False, True])
@kinds
def test_packed(kind, options, lengths, given):
    def use(home):
        module = getattr(home, kind)(4, 5, **options)
        x = torch.randn(len(lengths), max(lengths), 4)
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        hx = states_for(module, len(lengths)) if given else None
        output, hidden = module(packed, hx)
        assert output.batch_sizes is packed.batch_sizes
        assert output.sorted_indices is packed.sorted_indices
        assert output.unsorted_indices is packed.unsorted_indices
        return output, hidden

    same(use)


@kinds
def test_packed_without_indices(kind):
    same(lambda home: getattr(home, kind)(4, 5)(pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])))
    same(lambda home: getattr(home, kind)(4, 5)(PackedSequence(torch.randn(5, 4), torch.tensor([2, 2, 1]))))


@cells
def test_strided_arguments(cell):
    """Any strides, also 0, in input, hx and the gradient that comes back."""
    ours, stock = make_pair(cell, 4, 5, num_layers=2)
    base = torch.randn(4, 3, 14)
    for input in (base[:, :, 3:11:2].permute(0, 1, 2), base[:2].permute(2, 1, 0)[:, :, :1].expand(14, 3, 4),
                  torch.randn(1, 3, 4).expand(6, 3, 4), torch.randn(6, 1, 4).expand(6, 3, 4),
                  torch.randn(6, 3, 1).expand(6, 3, 4)):  # fmt: skip
        for hx in (None, torch.randn(2, 1, 5).expand(2, 3, 5), torch.randn(5, 3, 2).permute(2, 1, 0)):
            results = []
            for module in (ours, stock):
                leaf = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                states = (hx, hx) if cell == "lstm" and hx is not None else hx
                output, _ = module(leaf, states)
                output.sum().backward()
                results.append((output, leaf.grad, {n: p.grad.clone() for n, p in module.named_parameters()}))
                module.zero_grad()
            compare(*results)


@pytest.mark.parametrize("options", [{}, dict(batch_first=True), dict(num_layers=2, bidirectional=True)], ids=str)
@pytest.mark.parametrize("given", [False, True])
@kinds
def test_empty_batch(kind, options, given):
    """No sequence: empty outputs, and gradients that are zero, not None."""

    def use(home):
        module = getattr(home, kind)(4, 5, **options)
        input = torch.randn((0, 6, 4) if options.get("batch_first") else (6, 0, 4), requires_grad=True)
        output, hidden = module(input, states_for(module, 0) if given else None)
        (output.sum() + sum(h.sum() for h in (hidden if kind == "LSTM" else [hidden]))).backward()
        return output, hidden, input.grad, [parameter.grad for parameter in module.parameters()]

    (_, _, _, grads), _ = same(use)
    assert all(grad is not None and not grad.any() for grad in grads)


@kinds
def test_no_grad_and_inference_mode(kind):
    def use(home):
        module = getattr(home, kind)(4, 5, 2, bidirectional=True)
        input = torch.randn(3, 2, 4)
        with torch.no_grad():
            first = module(input)
        with torch.inference_mode():
            second = module(input)
        return first, second, second[0].is_inference()

    same(use)


@pytest.mark.parametrize("kind", KINDS + CELL_KINDS)
def test_dtypes(kind):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        shape = (2, 4) if "Cell" in kind else (3, 2, 4)
        same(lambda home: getattr(home, kind)(4, 5, dtype=dtype)(torch.ones(shape, dtype=dtype)))


@pytest.mark.filterwarnings("ignore:.*not on the fused engine")
@pytest.mark.parametrize("kind", KINDS + CELL_KINDS)
def test_complex_numbers_go_to_torch_with_one_warning(kind):
    module = getattr(fusedrnn, kind)(4, 5, dtype=torch.complex64)
    stock = getattr(nn, kind)(4, 5, dtype=torch.complex64)
    stock.load_state_dict(module.state_dict())
    input = torch.randn(2, 4, dtype=torch.complex64)
    with pytest.warns(UserWarning, match=f"{kind}.*not on the fused engine.*complex64"):
        result = module(input)
    compare(result, stock(input))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(input)


@pytest.mark.parametrize("kind", KINDS + CELL_KINDS)
def test_meta(kind):
    shape = (2, 4) if "Cell" in kind else (3, 2, 4)
    same(lambda home: getattr(home, kind)(4, 5, device="meta")(torch.randn(shape, device="meta")))


LOWER = {"RNN": True, "LSTM": True, "GRU": False, "RNNCell": True, "LSTMCell": False, "GRUCell": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LOWER)
def test_autocast_gives_torchs_dtypes(kind, dtype):
    """Under autocast(bfloat16) torch gives bfloat16 out of RNN, RNNCell and LSTM, float32 out of the others."""

    def use(home):
        module = getattr(home, kind)(4, 5, dtype=dtype)
        input = torch.randn((2, 4) if "Cell" in kind else (3, 2, 4), dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            result = module(input)
        while isinstance(result, tuple):
            result = result[0]
        return result.dtype, result.shape

    expected = torch.bfloat16 if LOWER[kind] and dtype == torch.float32 else dtype
    assert use(fusedrnn)[0] == expected
    if kind != "LSTM" or torch.ops.mkldnn._is_mkldnn_bf16_supported():  # otherwise torch's own LSTM raises
        same(use)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong calls: the exception and its words are torch's
# ---------------------------------------------------------------------------------------------------------------------


@kinds
def test_input_dimensions(kind):
    name = f"{kind}: Expected input to be 2D or 3D, got"
    same(call(kind, (4,)), raises=ValueError, match=f"{name} 1D")
    same(call(kind, (2, 3, 4, 4)), raises=ValueError, match=f"{name} 4D")
    same(call(kind, ()), raises=ValueError, match=f"{name} 0D")


@kinds
def test_input_size(kind):
    text = "input.size(-1) must be equal to input_size. Expected 4, got 3"
    same(call(kind, (2, 2, 3)), raises=RuntimeError, match=text)
    same(call(kind, (2, 3)), raises=RuntimeError, match=text)
    same(call(kind, (2, 2, 3), (1, 2, 5)), raises=RuntimeError, match=text)


@kinds
def test_input_dtype(kind):
    text = "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). " \
           "Convert input: input.to(torch.float32), or convert model: model.to(torch.float64)"  # fmt: skip
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 4).double()), raises=ValueError, match=text)
    same(lambda home: getattr(home, kind)(4, 5)(torch.ones(2, 2, 4, dtype=torch.long)), raises=ValueError)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 3).double()), raises=ValueError)


@kinds
def test_state_dtype(kind):
    def use(home):
        module = getattr(home, kind)(4, 5, dtype=torch.float64)
        return module(torch.randn(2, 2, 4).double(), states_for(module, 2, torch.float32))

    same(use, raises=RuntimeError)


@pytest.mark.parametrize(
    "shape, hx, text",
    [
        ((2, 2, 4), (2, 5), "For batched 3-D input, hx should also be 3-D but got 2-D tensor"),
        ((2, 2, 4), (1, 1, 2, 5), "For batched 3-D input, hx should also be 3-D but got 4-D tensor"),
        ((2, 4), (1, 1, 5), "For unbatched 2-D input, hx should also be 2-D but got 3-D tensor"),
        ((2, 2, 4), (1, 3, 5), "Expected hidden size (1, 2, 5), got [1, 3, 5]"),
        ((2, 2, 4), (2, 2, 5), "Expected hidden size (1, 2, 5), got [2, 2, 5]"),
        ((2, 2, 4), (1, 2, 6), "Expected hidden size (1, 2, 5), got [1, 2, 6]"),
        ((2, 2, 4), (1, 1, 5), "Expected hidden size (1, 2, 5), got [1, 1, 5]"),
        ((2, 4), (2, 5), "Expected hidden size (1, 1, 5), got [2, 1, 5]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_hidden_shape(kind, shape, hx, text):
    same(call(kind, shape, hx), raises=RuntimeError, match=text)


@pytest.mark.parametrize(
    "shape, hx, cx, text",
    [
        ((2, 2, 4), (2, 5), (2, 5), "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors"),
        ((2, 2, 4), (1, 2, 5), (2, 5), "For batched 3-D input, hx and cx should also be 3-D but got (3-D, 2-D) tensors"),
        ((2, 4), (1, 1, 5), (1, 5), "For unbatched 2-D input, hx and cx should also be 2-D but got (3-D, 2-D) tensors"),
        ((2, 2, 4), (1, 3, 5), None, "Expected hidden[0] size (1, 2, 5), got [1, 3, 5]"),
        ((2, 2, 4), (1, 2, 5), (1, 2, 4), "Expected hidden[1] size (1, 2, 5), got [1, 2, 4]"),
        ((2, 2, 4), (2, 2, 5), (1, 2, 5), "Expected hidden[0] size (1, 2, 5), got [2, 2, 5]"),
    ],
    ids=str,
)
def test_lstm_hidden_shape(shape, hx, cx, text):
    same(call("LSTM", shape, hx, cx), raises=RuntimeError, match=text)


def test_projected_hidden_shape():
    for hx, cx, text in [
        ((1, 2, 5), (1, 2, 5), "Expected hidden[0] size (1, 2, 3), got [1, 2, 5]"),
        ((1, 2, 3), (1, 2, 3), "Expected hidden[1] size (1, 2, 5), got [1, 2, 3]"),
    ]:
        same(call("LSTM", (2, 2, 4), hx, cx, proj_size=3), raises=RuntimeError, match=text)


def lstm_called_with(hx):
    return lambda home: home.LSTM(4, 5)(torch.randn(2, 2, 4), hx)


def test_lstm_states_of_other_forms():
    h = torch.randn(1, 2, 5)
    same(lstm_called_with([h, h]))
    same(lstm_called_with((h, h, h)), raises=RuntimeError, match="lstm expects two hidden states")
    same(lstm_called_with((h,)), raises=IndexError)
    same(lstm_called_with(()), raises=IndexError)
    same(lstm_called_with(torch.stack([h, h])), raises=TypeError)
    same(lstm_called_with((None, None)), raises=AttributeError)
    same(lstm_called_with((h, None)), raises=AttributeError)
    same(lstm_called_with(5), raises=TypeError)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_states_of_other_forms(kind):
    h = torch.randn(1, 2, 5)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 4), (h, h)), raises=AttributeError)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 4), [h]), raises=AttributeError)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 4), 5), raises=AttributeError)


@pytest.mark.parametrize("kind", KINDS + CELL_KINDS)
def test_input_of_other_forms(kind):
    same(lambda home: getattr(home, kind)(4, 5)([[1.0, 2.0, 3.0, 4.0]]), raises=AttributeError)
    same(lambda home: getattr(home, kind)(4, 5)(None), raises=AttributeError)
    same(lambda home: getattr(home, kind)(4, 5)(), raises=TypeError, match="missing 1 required positional argument")
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 4), None, None), raises=TypeError)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 4), foo=1), raises=TypeError, match="foo")


@kinds
def test_keyword_arguments(kind):
    same(lambda home: getattr(home, kind)(4, 5)(input=torch.randn(2, 2, 4), hx=None))


@kinds
def test_devices(kind):
    hidden = "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta"
    weights = "Input and parameter tensors are not at the same device, found input tensor at"

    def meta_states(home):
        module = getattr(home, kind)(4, 5)
        hx = torch.zeros(1, 2, 5, device="meta")
        return module(torch.randn(2, 2, 4), (hx, hx) if kind == "LSTM" else hx)

    same(meta_states, raises=RuntimeError, match=hidden)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 2, 4, device="meta")), raises=RuntimeError)
    same(lambda home: getattr(home, kind)(4, 5, device="meta")(torch.randn(2, 2, 4)), raises=RuntimeError, match=weights)


@pytest.mark.parametrize("options", [{}, dict(batch_first=True), dict(num_layers=2)], ids=str)
@kinds
def test_no_time(kind, options):
    text = "Expected sequence length to be larger than 0 in RNN"
    shape = (3, 0, 4) if options.get("batch_first") else (0, 3, 4)
    same(call(kind, shape, **options), raises=RuntimeError, match=text)
    same(call(kind, (0, 4), **options), raises=RuntimeError, match=text)


def packed_call(kind, width=4, dtype=None, hx=None, batch_sizes=(2, 2, 1), **options):
    def use(home):
        packed = PackedSequence(torch.randn(sum(batch_sizes), width, dtype=dtype), torch.tensor(batch_sizes))
        states = None if hx is None else torch.zeros(hx) if kind != "LSTM" else (torch.zeros(hx), torch.zeros(hx))
        return getattr(home, kind)(4, 5, **options)(packed, states)

    return use


def test_packed_errors():
    """torch.nn checks a packed call of GRU and RNN, and leaves that of an LSTM to its kernels."""
    for kind in ("RNN", "GRU"):
        same(packed_call(kind, width=3), raises=RuntimeError, match="input.size(-1) must be equal to input_size.")
        same(packed_call(kind, dtype=torch.float64), raises=ValueError, match="does not match weight dtype")
        same(packed_call(kind, hx=(1, 3, 5)), raises=RuntimeError, match="Expected hidden size (1, 2, 5), got [1, 3, 5]")
        same(packed_call(kind, hx=(2, 5)), raises=RuntimeError, match="Expected hidden size")
    same(packed_call("LSTM", width=3), raises=RuntimeError, match="mat1 and mat2 shapes cannot be multiplied")
    same(packed_call("LSTM", dtype=torch.float64), raises=RuntimeError, match="must have the same dtype")
    same(packed_call("LSTM", hx=(1, 3, 5)), raises=RuntimeError)
    same(packed_call("LSTM", hx=(1, 2, 6)), raises=RuntimeError)


def test_packed_lstm_without_bias_of_wrong_width():
    """torch.nn reads past the end of the weights here. fusedrnn raises."""
    with pytest.raises(RuntimeError, match=r"input_size|shape|size"):
        packed_call("LSTM", width=5, bias=False)(fusedrnn)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("batch_sizes", [(1, 2, 2), (2, 0, 3), (3, 3)], ids=str)
def test_packed_by_hand_with_wrong_sizes(kind, batch_sizes):
    """batch_sizes that grow, hold 0, or do not add up never read outside the data: an error, whatever torch.nn does."""
    module = getattr(fusedrnn, kind)(4, 5)
    with pytest.raises(RuntimeError):
        module(PackedSequence(torch.randn(5, 4), torch.tensor(batch_sizes)))


def test_gru_with_positional_projection_fails_in_forward():
    same(lambda home: home.GRU(4, 5, 1, True, False, 0.0, False, 3)(torch.randn(2, 2, 4)), raises=RuntimeError)


@cell_kinds
def test_cell_calls(kind):
    for shape, hx in (((2, 4), None), ((4,), None), ((2, 4), (2, 5)), ((4,), (5,)), ((0, 4), None), ((0, 4), (0, 5))):
        same(call(kind, shape, hx))
        same(call(kind, shape, hx, bias=False))
    same(lambda home: getattr(home, kind)(4, 5)(input=torch.randn(2, 4), hx=None))


def test_lstm_cell_takes_a_list():
    h = torch.randn(2, 5)
    same(lambda home: home.LSTMCell(4, 5)(torch.randn(2, 4), [h, h]))


@cell_kinds
def test_cell_errors(kind):
    same(call(kind, (2, 3, 4)), raises=ValueError, match=f"{kind}: Expected input to be 1D or 2D, got 3D instead")
    same(call(kind, ()), raises=ValueError, match="got 0D instead")
    what = "hx[0]" if kind == "LSTMCell" else "hidden"
    same(call(kind, (2, 4), (1, 2, 5)), raises=ValueError, match=f"{kind}: Expected {what} to be 1D or 2D, got 3D instead")
    same(call(kind, (2, 3)), raises=RuntimeError, match="input has inconsistent input_size: got 3 expected 4")
    same(call(kind, (3,)), raises=RuntimeError, match="input has inconsistent input_size: got 3 expected 4")
    same(call(kind, (2, 4), (3, 5)), raises=RuntimeError, match="Input batch size 2 doesn't match hidden0 batch size 3")
    same(call(kind, (2, 4), (2, 6)), raises=RuntimeError, match="hidden0 has inconsistent hidden_size: got 6, expected 5")
    same(call(kind, (2, 4), (5,)), raises=RuntimeError)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 4).double()),
         raises=RuntimeError, match="must have the same dtype, but got Double and Float")  # fmt: skip


def test_lstm_cell_errors():
    h, wrong = torch.randn(2, 5), torch.randn(2, 6)
    same(lambda home: home.LSTMCell(4, 5)(torch.randn(2, 4), (h, wrong)), raises=RuntimeError, match="hidden1")
    same(lambda home: home.LSTMCell(4, 5)(torch.randn(2, 4), (h, h[None])), raises=ValueError, match="hx[1]")
    same(lambda home: home.LSTMCell(4, 5)(torch.randn(2, 4), h), raises=TypeError)
    same(lambda home: home.LSTMCell(4, 5)(torch.randn(2, 4), (h, h, h)), raises=RuntimeError)
    same(lambda home: home.LSTMCell(4, 5)(torch.randn(2, 4), (h,)), raises=RuntimeError, match="two hidden states")


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell"])
def test_cell_states_of_other_forms(kind):
    h = torch.randn(2, 5)
    same(lambda home: getattr(home, kind)(4, 5)(torch.randn(2, 4), (h, h)), raises=AttributeError)


@pytest.mark.parametrize("I, H", [(0, 5), (4, 0)])
@cell_kinds
def test_cells_of_size_zero(kind, I, H):  # noqa: E741
    same(lambda home: getattr(home, kind)(I, H)(torch.randn(2, I)), falls_back=True)
