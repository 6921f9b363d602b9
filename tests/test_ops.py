"""The two registered operators: schema, fake kernels, argument errors, memory they must fill, determinism."""

import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
from conftest import CELLS, ON_GPU, compare_all_equal, make_pair, states_for
from fusedrnn.ops import SAVE_ALL, SAVE_NOTHING
from fusedrnn.testing import run_module

forward = torch.ops.fusedrnn.recurrence_forward
backward = torch.ops.fusedrnn.recurrence_backward
cells = pytest.mark.parametrize("cell", CELLS)
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
LAYOUTS = {
    "plain": dict(),
    "both": dict(D=2),
    "projected": dict(D=2, P=3),
    "packed": dict(batch_sizes=(3, 3, 2, 1)),
    "packed both": dict(D=2, batch_sizes=(4, 2, 1)),
    "packed projected": dict(D=2, P=3, batch_sizes=(4, 2, 1)),
    "zeros": dict(states=False),
    "no bias": dict(bias=False, D=2),
    "carry": dict(D=2, carry=True),
    "packed carry": dict(D=2, carry=True, batch_sizes=(4, 2, 1)),
    "packed projected resets": dict(D=2, P=3, reset=True, batch_sizes=(4, 2, 1)),
}
CELLS_AND_LAYOUTS = [(cell, name) for cell in CELLS for name in LAYOUTS if cell == "lstm" or "projected" not in name]
cells_and_layouts = pytest.mark.parametrize("cell, layout", CELLS_AND_LAYOUTS)


def forward_arguments(cell, T=3, B=2, H=5, P=None, D=1, batch_sizes=None, states=True, bias=True, save=True,
                      carry=False, reset=False, dtype=torch.float32):  # fmt: skip
    """Keyword arguments of recurrence_forward, in order."""
    G, width = GATES[cell], P or H
    rows = (T, B) if batch_sizes is None else (sum(batch_sizes),)
    B = B if batch_sizes is None else batch_sizes[0]

    def make(*shape):
        return 0.5 * torch.randn(*shape, dtype=dtype)

    return dict(
        cell=cell,
        gates_x=[make(*rows, G * H) for _ in range(D)],
        weight_hh=[make(G * H, width) for _ in range(D)],
        bias_hh=[make(G * H) for _ in range(D)] if bias else [],
        weight_hr=[make(P, H) for _ in range(D)] if P else [],
        hx=make(D, B, width) if states else None,
        cx=make(D, B, H) if states and cell == "lstm" else None,
        batch_sizes=None if batch_sizes is None else torch.tensor(batch_sizes, device="cpu"),
        reset=torch.rand(rows) < 0.3 if carry or reset else None,
        zoneout=torch.rand(*rows, D, 1 + (cell == "lstm"), H, dtype=dtype) if carry else None,
        hidden_mask=torch.rand(D, B, H, dtype=dtype) if carry else None,
        reset_hx=make(D, B, width) if carry or reset else None,
        reset_cx=make(D, B, H) if (carry or reset) and cell == "lstm" else None,
        save=SAVE_ALL if save else SAVE_NOTHING,
        allow_tf32=False,
    )


def backward_arguments(cell, **options):
    """Keyword arguments of recurrence_backward after a forward with those of `forward_arguments`."""
    given = forward_arguments(cell, **options)
    output, hy, cy, saved, states = forward(*given.values())
    lstm = cell == "lstm"
    return dict(
        cell=cell,
        input=0.5 * torch.randn(*output.shape[:-1], 4, dtype=output.dtype),
        **{name: given[name] for name in ("weight_hh", "weight_hr", "hx", "cx")},
        output=output,
        saved=saved,
        states=states,
        **{name: given[name] for name in ("batch_sizes", "reset", "zoneout", "hidden_mask", "reset_hx", "reset_cx")},
        grad_output=torch.randn_like(output),
        grad_hy=torch.randn_like(hy),
        grad_cy=torch.randn_like(cy) if lstm else None,
        grad_states=torch.randn_like(states) if lstm and given["reset"] is not None else None,
        need_grad_hx=True,
        need_grad_cx=lstm,
        need_grad_reset_hx=given["reset_hx"] is not None,
        need_grad_reset_cx=given["reset_cx"] is not None,
        need_grad_weight_ih=True,
        need_grad_weight_hh=True,
        need_grad_bias=True,
        need_grad_weight_hr=bool(given["weight_hr"]),
        allow_tf32=False,
    )


NEEDS_OF_STATES = ["need_grad_hx", "need_grad_cx", "need_grad_reset_hx", "need_grad_reset_cx"]
NEEDS = [*NEEDS_OF_STATES, "need_grad_weight_ih", "need_grad_weight_hh", "need_grad_bias", "need_grad_weight_hr"]


def flat(results):
    """The tensors of an operator's results, of which one may be a list."""
    return [tensor for result in results for tensor in (result if isinstance(result, list) else [result])]


# ---------------------------------------------------------------------------------------------------------------------
# Schema, fake kernels, opcheck
# ---------------------------------------------------------------------------------------------------------------------


def test_schemas():
    assert str(forward.default._schema) == (
        "fusedrnn::recurrence_forward(str cell, Tensor[] gates_x, Tensor[] weight_hh, Tensor[]? bias_hh, "
        "Tensor[]? weight_hr, Tensor? hx, Tensor? cx, Tensor? ragged, Tensor? reset, Tensor? zoneout, Tensor? hidden_mask, "
        "Tensor? reset_hx, Tensor? reset_cx, int save, bool allow_tf32, Tensor[]? weight_ih=None, Tensor[]? bias_ih=None) -> "
        "(Tensor output, Tensor hy, Tensor cy, Tensor saved, Tensor states)"
    )
    assert str(backward.default._schema) == (
        "fusedrnn::recurrence_backward(str cell, Tensor? input, Tensor[] weight_hh, Tensor[]? weight_hr, Tensor? hx, Tensor? cx, "
        "Tensor output, Tensor saved, Tensor states, Tensor? ragged, Tensor? reset, Tensor? zoneout, Tensor? hidden_mask, "
        "Tensor? reset_hx, Tensor? reset_cx, Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_states, "
        "bool need_grad_hx, bool need_grad_cx, bool need_grad_reset_hx, bool need_grad_reset_cx, bool need_grad_weight_ih, "
        "bool need_grad_weight_hh, "
        "bool need_grad_bias, bool need_grad_weight_hr, bool allow_tf32) -> "
        "(Tensor grad_pre, Tensor grad_hx, Tensor grad_cx, Tensor grad_reset_hx, Tensor grad_reset_cx, Tensor[] grad_weights)"
    )
    for op in (forward, backward):
        assert not op.default._schema.is_mutable
        assert not any(r.alias_info for r in op.default._schema.returns)


@cells_and_layouts
def test_opcheck(cell, layout):
    torch.library.opcheck(forward, tuple(forward_arguments(cell, **LAYOUTS[layout]).values()))
    torch.library.opcheck(backward, tuple(backward_arguments(cell, **LAYOUTS[layout]).values()))


@pytest.mark.parametrize("save", [True, False])
@cells_and_layouts
def test_fake_kernels_promise_what_comes(cell, layout, save):
    """Shape, strides and dtype of every result, also where gradients are not asked for and the batch is empty."""
    extra = {} if "packed" in layout else {"B": 0}
    for options in (LAYOUTS[layout], {**LAYOUTS[layout], **extra}, {**LAYOUTS[layout], "dtype": torch.bfloat16}):
        given = forward_arguments(cell, **options, save=save)
        check_fake(forward, given)
        if save:
            given = backward_arguments(cell, **options)
            check_fake(backward, given)
            check_fake(backward, {**given, **dict.fromkeys(NEEDS, False), "input": None, "grad_hy": None})
            for need in NEEDS:
                check_fake(backward, {**given, need: False})


def check_fake(op, given):
    real = op(*given.values())
    with FakeTensorMode() as mode:
        def faked(value):
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            return [mode.from_tensor(t) for t in value] if isinstance(value, list) else value

        fake = op(*map(faked, given.values()))
    for a, b in zip(flat(real), flat(fake), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.stride() == b.stride(), (a.shape, a.stride(), b.stride())
        assert a.device == b.device


@cells
def test_inference_saves_nothing(cell):
    given = forward_arguments(cell, save=False)
    assert [t.numel() for t in forward(*given.values())[3:]] == [0, 0]
    kept = forward(*{**given, "save": SAVE_ALL}.values())
    assert kept[3].numel() > 0 or cell.startswith("rnn")


# ---------------------------------------------------------------------------------------------------------------------
# Wrong arguments
# ---------------------------------------------------------------------------------------------------------------------

WRONG = [
    ("cell", "foo", "cell must be one of .*lstm.*got 'foo'"),
    ("weight_hh", [], "weight_hh must hold 1 or 2 tensors.* got 0"),
    ("weight_hh", [torch.zeros(20, 5)] * 3, "weight_hh must hold 1 or 2 tensors.* got 3"),
    ("weight_hh", [torch.zeros(20, 4)], r"weight_hh must be .*\(20, 5\), got \(20, 4\)"),
    ("weight_hh", [torch.zeros(21, 5)], r"weight_hh must be .*got \(21, 5\)"),
    ("weight_hh", [torch.zeros(20)], r"weight_hh must be .*got \(20,\)"),
    ("weight_hh", [torch.zeros(0, 0)], r"weight_hh must be .*got \(0, 0\)"),
    ("weight_hh", [torch.zeros(20, 5, dtype=torch.int64)], "weight_hh must be float32.* got Long"),
    ("weight_hh", [torch.zeros(20, 5, dtype=torch.complex64)], "weight_hh must be float32.* got Complex"),
    ("gates_x", [], "gates_x must hold 1 tensors, got 0"),
    ("gates_x", [torch.zeros(3, 2, 20)] * 2, "gates_x must hold 1 tensors, got 2"),
    ("gates_x", [torch.zeros(3, 2, 19)], r"gates_x must be \(3, 2, 20\), got \(3, 2, 19\)"),
    ("gates_x", [torch.zeros(6, 20)], r"gates_x must have 3 dimensions .*got \(6, 20\)"),
    ("gates_x", [torch.zeros(0, 2, 20)], "expected sequence length to be larger than 0"),
    ("gates_x", [torch.zeros(3, 2, 20).double()], "gates_x must be Float like weight_hh, got Double"),
    ("bias_hh", [torch.zeros(19)], r"bias_hh must be \(20,\), got \(19,\)"),
    ("bias_hh", [torch.zeros(20)] * 2, "bias_hh must hold 1 tensors or none, got 2"),
    ("bias_hh", [torch.zeros(20).half()], "bias_hh must be Float like weight_hh, got Half"),
    ("weight_hr", [torch.zeros(5, 4)], r"weight_hr must be \(5, 5\), got \(5, 4\)"),
    ("weight_hr", [torch.zeros(5, 5)] * 2, "weight_hr must hold 1 tensors, got 2"),
    ("hx", torch.zeros(1, 3, 5), r"hx must be \(1, 2, 5\), got \(1, 3, 5\)"),
    ("hx", torch.zeros(2, 5), r"hx must be \(1, 2, 5\), got \(2, 5\)"),
    ("hx", torch.zeros(1, 2, 5).double(), "hx must be Float like weight_hh, got Double"),
    ("cx", torch.zeros(1, 2, 4), r"cx must be \(1, 2, 5\), got \(1, 2, 4\)"),
    ("batch_sizes", torch.tensor([2, 2, 2]), "lengths must be .*one for each of 2 sequences"),
    ("reset", None, "reset_hx and reset_cx need reset"),
    ("reset", torch.zeros(3, 2), "reset must be Bool, got Float"),
    ("reset_hx", torch.zeros(1, 3, 5), r"reset_hx must be \(1, 2, 5\), got \(1, 3, 5\)"),
    ("reset_cx", torch.zeros(1, 2, 5).double(), "reset_cx must be Float like weight_hh, got Double"),
]


@pytest.mark.parametrize("name, value, text", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_of_forward(name, value, text):
    given = {**forward_arguments("lstm", reset="reset" in name), name: value}
    with pytest.raises(RuntimeError, match=f"fusedrnn::recurrence_forward: {text}"):
        forward(*given.values())


WRONG_SIZES = [
    (torch.tensor([1, 2, 2]), "batch_sizes must be positive and never increase, got 2 at step 1"),
    (torch.tensor([3, 2, 0]), "batch_sizes must be positive and never increase, got 0 at step 2"),
    (torch.tensor([3, -1]), "batch_sizes must be positive and never increase, got -1 at step 1"),
    (torch.tensor([-5]), "batch_sizes must be positive and never increase, got -5 at step 0"),
    (torch.tensor([3, 3]), "batch_sizes must add up to the 5 rows of gates_x, got more by step 1"),
    (torch.tensor([3, 1]), "batch_sizes must add up to the 5 rows of gates_x, got 4"),
    (torch.tensor([], dtype=torch.int64), "expected sequence length to be larger than 0"),
    (torch.tensor([3, 2], dtype=torch.int32), "batch_sizes must be a one-dimensional int64 tensor on the CPU"),
    (torch.tensor([3.0, 2.0]), "batch_sizes must be a one-dimensional int64 tensor on the CPU"),
    (torch.tensor([[3, 2]]), "batch_sizes must be a one-dimensional int64 tensor on the CPU"),
]


@pytest.mark.parametrize("batch_sizes, text", WRONG_SIZES, ids=str)
@cells
def test_errors_of_batch_sizes(cell, batch_sizes, text):
    given = {**forward_arguments(cell, batch_sizes=(3, 2)), "batch_sizes": batch_sizes}
    with pytest.raises(RuntimeError, match=f"fusedrnn::recurrence_forward: {text}"):
        forward(*given.values())


def test_batch_sizes_that_wrap_around():
    """Sizes whose sum overflows to the number of rows."""
    given = forward_arguments("gru", batch_sizes=(2, 2))
    sizes = torch.tensor([2**62, 2**62, 2**62, 2**62 - 4, 8])  # 2^64 + 4
    with pytest.raises(RuntimeError, match="batch_sizes"):
        forward(*{**given, "batch_sizes": sizes}.values())


def test_strided_batch_sizes():
    given = forward_arguments("gru", batch_sizes=(3, 2, 1))
    spread = torch.tensor([3, 9, 2, 9, 1, 9])[::2]
    assert torch.equal(forward(*given.values())[0], forward(*{**given, "batch_sizes": spread}.values())[0])


def test_cell_states_are_for_the_lstm():
    with pytest.raises(RuntimeError, match="cx is for cells of more than one state"):
        forward(*{**forward_arguments("gru"), "cx": torch.zeros(1, 2, 5)}.values())
    with pytest.raises(RuntimeError, match="only the lstm takes projections"):
        forward(*{**forward_arguments("gru"), "weight_hr": [torch.zeros(5, 5)]}.values())
    with pytest.raises(RuntimeError, match="for cells of more than one state"):
        backward(*{**backward_arguments("gru"), "need_grad_cx": True}.values())
    with pytest.raises(RuntimeError, match="reset_cx is for cells of more than one state"):
        forward(*{**forward_arguments("gru", reset=True), "reset_cx": torch.zeros(1, 2, 5)}.values())


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("cell", "foo", "cell must be one of"),
        ("weight_hh", [torch.zeros(20, 4)], "weight_hh must be"),
        ("output", torch.zeros(3, 2, 6), r"output must be \(3, 2, 5\), got \(3, 2, 6\)"),
        ("output", torch.zeros(3, 2, 5).double(), "output must be Float like weight_hh, got Double"),
        ("saved", torch.zeros(0), r"saved must be \(3, 2, 1, \d, 5\), got \(0,\)"),
        ("states", torch.zeros(0), r"states must be \(3, 2, 1, \d, 5\), got \(0,\)"),
        ("grad_output", torch.zeros(3, 2, 4), r"grad_output must be \(3, 2, 5\), got \(3, 2, 4\)"),
        ("grad_output", torch.zeros(3, 2, 5).half(), "grad_output must be Float like weight_hh, got Half"),
        ("grad_hy", torch.zeros(2, 5), r"grad_hy must be \(1, 2, 5\), got \(2, 5\)"),
        ("grad_cy", torch.zeros(1, 2, 6), r"grad_cy must be \(1, 2, 5\), got \(1, 2, 6\)"),
        ("hx", torch.zeros(1, 3, 5), r"hx must be \(1, 2, 5\), got \(1, 3, 5\)"),
        ("batch_sizes", torch.tensor([3, 3, 3]), "lengths must be .*one for each of 2 sequences"),
        ("input", None, "need_grad_weight_ih needs the input"),
        ("input", torch.zeros(6, 4), r"input must have 3 dimensions like output, got \(6, 4\)"),
        ("input", torch.zeros(2, 3, 4), r"input must be \(3, 2, 4\), got \(2, 3, 4\)"),
        ("input", torch.zeros(3, 2, 4).double(), "input must be Float like weight_hh, got Double"),
        ("need_grad_weight_hr", True, "need_grad_weight_hr needs weight_hr"),
        ("need_grad_reset_hx", True, "need_grad_reset_hx needs reset_hx"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_of_backward(name, value, text):
    given = {**backward_arguments("lstm"), name: value}
    with pytest.raises(RuntimeError, match=f"fusedrnn::recurrence_backward: {text}"):
        backward(*given.values())


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="FUSEDRNN_CPU_ISA must be one of .*baseline.*got 'mmx'"):
        forward(*forward_arguments("gru").values())
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", "")
    forward(*forward_arguments("gru").values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison():
    """torch fills memory that it gives out uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 1, 1), (2, 3, 17), (1, 17, 33)], ids=str)
@cells_and_layouts
def test_results_are_written_whole(cell, layout, shape, engine, poison):
    """No element of a result, and no value computed from one, is memory as it was found."""
    T, B, H = shape
    options = LAYOUTS[layout] if "packed" in layout else {**LAYOUTS[layout], "T": T, "B": B}
    options = {**options, "H": H} if "P" not in options else options
    for dtype in (torch.float32, torch.bfloat16):
        for tensor in forward(*forward_arguments(cell, **options, dtype=dtype).values()):
            assert not tensor.isnan().any()
        given = backward_arguments(cell, **options, dtype=dtype)
        for tensor in flat(backward(*given.values())):
            assert not tensor.isnan().any()
        for unused in ("grad_output", "grad_hy", "grad_cy"):
            for tensor in flat(backward(*{**given, unused: None}.values())):
                assert not tensor.isnan().any()


@cells
def test_modules_on_poisoned_memory(cell, poison):
    ours, _ = make_pair(cell, 3, 17, num_layers=2, bidirectional=True)
    clean = torch.use_deterministic_algorithms
    input, hx = torch.randn(3, 5, 3), states_for(ours, 5)
    poisoned = run_module(ours, input, hx)
    clean(False)
    compare_all_equal(poisoned, run_module(ours, input, hx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@cells
def test_arguments_at_the_end_of_their_memory(cell, dtype, engine):
    """Every argument ends where mapped memory ends: one element read behind it is a fault, not a wrong number."""
    if engine == ON_GPU:
        pytest.skip("a GPU's memory is not laid out by hand; compute-sanitizer watches it (benchmarks/gpu.py)")
    for options in (dict(T=2, B=3, H=5), dict(T=1, B=1, H=1), dict(T=3, B=2, H=17, D=2), dict(T=2, B=30, H=9),
                    dict(H=5, batch_sizes=(3, 2, 2))):  # fmt: skip
        given = forward_arguments(cell, **options, dtype=dtype)
        expected = forward(*given.values())
        at_end = {name: at_the_end(value) for name, value in given.items()}
        for a, b in zip(forward(*at_end.values()), expected):
            assert torch.equal(a, b)
        given = backward_arguments(cell, **options, dtype=dtype)
        expected = backward(*given.values())
        found = backward(*{name: at_the_end(value) for name, value in given.items()}.values())
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(a, b)


def at_the_end(value):
    """The same tensor in memory that is followed by a page that may not be touched."""
    if isinstance(value, list):
        return [at_the_end(t) for t in value]
    if not isinstance(value, torch.Tensor) or not value.numel():
        return value
    import ctypes

    size = value.numel() * value.element_size()
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    buffer = torch.frombuffer(area, dtype=torch.uint8)
    last = buffer.data_ptr() + pages * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(last), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    begin = pages * mmap.PAGESIZE - size
    return buffer[begin : begin + size].view(value.dtype).view(value.shape).copy_(value)


@cells_and_layouts
def test_gradients_of_weights_on_demand(cell, layout, engine):
    """Each gradient is there if it is needed, empty if not, and the same bits whatever else is; an empty batch gives zeros."""
    given = backward_arguments(cell, **LAYOUTS[layout])
    everything = backward(*given.values())
    for need in NEEDS:
        if not given[need]:
            continue
        alone = backward(*{**given, **dict.fromkeys(NEEDS, False), need: True}.values())
        there = 0
        for a, b in zip(flat(alone)[1:], flat(everything)[1:], strict=True):
            assert not a.numel() or torch.equal(a, b)
            there += a.numel() > 0
        directions = 1 if need in NEEDS_OF_STATES else len(given["weight_hh"])
        assert there == directions * (2 if need == "need_grad_bias" else 1)
    if given["batch_sizes"] is None:
        nothing = backward_arguments(cell, **{**LAYOUTS[layout], "B": 0})
        for grad in backward(*nothing.values())[-1]:
            assert not grad.any() and not grad.isnan().any()


@cells
def test_offsets_beyond_32_bits(cell, engine):
    """gates_x whose steps lie more than 2^31 elements apart: pages never touched cost nothing."""
    given = forward_arguments(cell, T=3, B=2, H=5, dtype=torch.float16)
    expected = forward(*given.values())[0]
    far = 2**31 + 7
    if engine == ON_GPU:
        wide = torch.empty(2 * far + 1000, dtype=torch.float16).as_strided(given["gates_x"][0].shape, (far, 100, 1))
        assert torch.equal(forward(*{**given, "gates_x": [wide.copy_(given["gates_x"][0])]}.values())[0], expected)
        return
    try:
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name from 3.13 on
        area = mmap.mmap(-1, (2 * far + 1000) * 2, flags=mmap.MAP_PRIVATE | no_reserve)
    except (OSError, ValueError):
        pytest.skip("no address space for 8 GiB")
    wide = torch.frombuffer(area, dtype=torch.float16).as_strided(given["gates_x"][0].shape, (far, 100, 1))
    wide.copy_(given["gates_x"][0])
    assert torch.equal(forward(*{**given, "gates_x": [wide]}.values())[0], expected)


def test_many_steps(engine):
    """More steps than a dimension of a grid of CUDA blocks may have."""
    T = 65536 + 3
    given = forward_arguments("gru", T=T, B=1, H=2)
    for packed in (False, True):
        if packed:
            given["gates_x"] = [gates.flatten(0, 1) for gates in given["gates_x"]]
            given["batch_sizes"] = torch.ones(T, dtype=torch.int64, device="cpu")
        output, hy, _, _, _ = forward(*given.values())
        begin = {**given, "gates_x": [given["gates_x"][0][: T - 5]], "save": SAVE_NOTHING}
        end = {**given, "gates_x": [given["gates_x"][0][T - 5 :]], "save": SAVE_NOTHING}
        if packed:
            begin["batch_sizes"], end["batch_sizes"] = given["batch_sizes"][: T - 5], given["batch_sizes"][T - 5 :]
        end["hx"] = forward(*begin.values())[1]
        last = forward(*end.values())
        assert torch.equal(last[0].flatten(), output[T - 5 :].flatten()) and torch.equal(last[1], hy)


# ---------------------------------------------------------------------------------------------------------------------
# Determinism
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cells
def test_same_call_same_bits(cell, dtype, engine):
    """Run to run, and under torch.use_deterministic_algorithms, every bit is the same, weight gradients too."""
    ours, _ = make_pair(cell, 16, 65, num_layers=2, bidirectional=True, dtype=dtype)
    input, hx = torch.randn(9, 20, 16, dtype=dtype), states_for(ours, 20)
    first = run_module(ours, input, hx)
    for _ in range(5):
        compare_all_equal(run_module(ours, input, hx), first)
    torch.use_deterministic_algorithms(True)
    try:
        compare_all_equal(run_module(ours, input, hx), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["both", "packed both", "projected", "plain", "carry"])
@pytest.mark.parametrize("size", [(5, 3, 17), (4, 40, 65), (3, 1, 130)], ids=str)
@cells
def test_operators_do_not_depend_on_the_number_of_threads(cell, layout, size, isa):
    """The order of every sum in the engine depends on shapes alone. (ATen's products around it make no such promise.)"""
    if layout == "projected" and cell != "lstm":
        layout = "both"
    T, B, H = size
    options = LAYOUTS[layout] if "packed" in layout else {**LAYOUTS[layout], "T": T, "B": B}
    options = {**options, "H": H}
    given, results = forward_arguments(cell, **options), []
    input = torch.randn(*given["gates_x"][0].shape[:-1], 19)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        outputs = forward(*given.values())
        output, hy, cy, saved, states = outputs
        grads = backward(
            cell, input, given["weight_hh"], given["weight_hr"], given["hx"], given["cx"], output, saved, states,
            given["batch_sizes"], given["reset"], given["zoneout"], given["hidden_mask"], given["reset_hx"], given["reset_cx"],
            torch.ones_like(output), None, None, None, True, cell == "lstm", given["reset_hx"] is not None,
            given["reset_cx"] is not None, True, True, True,
            bool(given["weight_hr"]), False,
        )  # fmt: skip
        results.append([*outputs, *flat(grads)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@cells
def test_a_sequence_does_not_depend_on_its_neighbours(cell, engine):
    """A row of a batch comes out the same, to rounding, alone and among others."""
    ours, _ = make_pair(cell, 8, 33)
    input = torch.randn(6, 37, 8)
    together = ours(input)[0]
    for b in (0, 5, 36):
        alone = ours(input[:, b : b + 1])[0]
        torch.testing.assert_close(alone, together[:, b : b + 1], rtol=0, atol=16 * torch.finfo(torch.float32).eps)


def test_engine_takes_the_calls(monkeypatch):
    """What the other tests compare is the engine: every option reaches recurrence_forward once a layer, a cell cell_forward."""
    seen = []
    real = fusedrnn.layer.recurrence_forward
    monkeypatch.setattr(fusedrnn.layer, "recurrence_forward", lambda *a: seen.append(a[0]) or real(*a))
    for cell in CELLS:
        for options in (dict(), dict(bidirectional=True), dict(batch_first=True), dict(bias=False), dict(num_layers=3)):
            ours, _ = make_pair(cell, 3, 4, **options)
            seen.clear()
            ours(torch.randn(2, 2, 3))
            with torch.no_grad():
                ours(torch.randn(2, 2, 3))
                ours(torch.nn.utils.rnn.pack_padded_sequence(torch.randn(2, 2, 3), [2, 1], ours.batch_first))
                ours(torch.randn(2, 3))
            assert seen == [cell] * 4 * options.get("num_layers", 1)
    seen.clear()
    real_step = fusedrnn.one_step.cell_forward
    monkeypatch.setattr(fusedrnn.one_step, "cell_forward", lambda *a: seen.append(a[0]) or real_step(*a))
    for module in (fusedrnn.RNNCell(3, 4), fusedrnn.LSTMCell(3, 4), fusedrnn.GRUCell(3, 4)):
        module(torch.randn(2, 3))
    assert seen == ["rnn_tanh", "lstm", "gru"]
