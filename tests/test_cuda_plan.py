"""How the CUDA kernels divide a layer's work (csrc/cuda/plan.h): on every chip and at every shape it fits and covers the sums."""

import itertools

import pytest
import torch

from fusedrnn import _C, select

# name: multiprocessors, most shared memory of a block, major compute capability (CUDA C programming guide)
CHIPS = {"A100": (108, 163 << 10, 8), "H100": (132, 227 << 10, 9), "H200": (132, 227 << 10, 9), "sm_86, 48 of them": (48, 99 << 10, 8),
         "MIG slice of an H100": (16, 227 << 10, 9), "one multiprocessor": (1, 99 << 10, 8)}  # fmt: skip
BATCHES, WIDTHS = [0, 1, 7, 8, 9, 33, 64, 257, 2048, 1 << 20], [1, 15, 16, 17, 128, 1000, 1792, 4096]
DTYPES = [("float32", False), ("float32", True), ("float64", False), ("bfloat16", False), ("float16", False)]
DEPTH = {("float32", False): 4, ("float32", True): 16, ("float64", False): 2, ("bfloat16", False): 32, ("float16", False): 32}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 2}  # of the product with h


def plans(cell, chip, dtype, tf32):
    multiprocessors, shared, major = CHIPS[chip]
    for B, H, D in itertools.product(BATCHES, WIDTHS, (1, 2)):
        for P in {H, max(1, H // 3)} if cell == "lstm" else {H}:
            where = dict(T=1 + B % 3, B=B, H=H, P=P, D=D, multiprocessors=multiprocessors, shared_bytes=shared, major=major, tf32=tf32)
            yield where, _C.cuda_plan(cell, dtype, **where)


@pytest.mark.parametrize("dtype, tf32", DTYPES)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("cell", GATES)
def test_every_plan_fits_and_covers(cell, chip, dtype, tf32):
    for where, plan in plans(cell, chip, dtype, tf32):
        B, H, P = where["B"], where["H"], where["P"]
        sums = {"cell": (H, GATES[cell], P), "projection": (P, 1, H), "dh": (P, 1, GATES[cell] * H), "dunprojected": (H, 1, P)}
        for name, (units, gates, depth) in sums.items():
            product, context = plan[name], (name, where, plan[name])
            one_kernel_a_step = P == H and where["T"] > 1 and name in ("cell", "dh") and cell != "gru_reset_before"
            assert product["shared_bytes"] <= CHIPS[chip][1], context
            assert product["block_rows"] == 8 * product["tiles"] * product["groups"], context
            assert one_kernel_a_step or product["regime"] == "step", context
            of_regime = {"step": check_step, "block": check_block, "cluster": check_cluster, "grid": check_grid}[product["regime"]]
            of_regime(product, where, Memory(product, gates, dtype, tf32), context)
            # All units and rows, and no block without any.
            assert 0 <= product["unit_tiles"] * 16 - units < 16, context
            assert 0 <= product["batch_tiles"] * product["block_rows"] - B < product["block_rows"], context
            assert 0 <= product["depth_blocks"] * DEPTH[dtype, tf32] - depth < DEPTH[dtype, tf32], context
            assert product["split"] <= product["depth_blocks"], context
            assert product["blocks"] == product["sharers"] * product["batch_tiles"] < 2**31, context
            # What a regime would not have room for, it has no room for.
            if one_kernel_a_step and product["regime"] != "block":
                assert product["unit_tiles"] * Memory(product, gates, dtype, tf32).tile > CHIPS[chip][1], context
            if one_kernel_a_step and product["regime"] == "step":
                copies = where["multiprocessors"] // (product["unit_tiles"] * where["D"])
                most_rows = copies * 8 * 8 * (2 if dtype == "float64" else 4)  # warps, rows of a tile, tiles
                assert B > most_rows - 32 or has_no_room(where, gates, dtype, tf32, product, copies), context


class Memory:
    """Bytes of shared memory that the parts of a product take, counted once more."""

    def __init__(self, product, gates, dtype, tf32):
        self.tile = 16 * gates * product["depth_blocks"] * DEPTH[dtype, tf32] * BYTES[dtype]  # weights of 16 units
        self.row = product["depth_blocks"] * DEPTH[dtype, tf32] * BYTES[dtype]  # states of a row
        # 20 numbers for each row, gate and part of a sum.
        self.sums_of_a_warp = gates * product["tiles"] * 8 * 20 * (8 if dtype == "float64" else 4)


def check_step(product, where, memory, context):
    warps = product["split"] * product["groups"]
    assert product["shared_bytes"] == warps * memory.sums_of_a_warp and product["slots"] == product["split"], context
    assert product["threads"] == 32 * warps <= 256, context
    assert product["sharers"] == product["unit_tiles"], context


def check_block(product, where, memory, context):
    """A block has all weights and some rows for all steps."""
    assert product["shared_bytes"] == product["unit_tiles"] * memory.tile, context
    assert product["threads"] == 32 * min(8, product["unit_tiles"] * product["groups"]), context
    assert product["sharers"] == 1, context
    # Blocks for all multiprocessors, before a block has more rows than a warp takes at once.
    assert product["groups"] == 1 or product["blocks"] * where["D"] <= max(where["multiprocessors"], where["D"]), context


def check_shared(product, where, memory, copies, context):
    """Some blocks have the weights of some tiles of 16 units each, and `copies` of the states of their rows."""
    warps, each = product["split"] * product["groups"], -(-product["unit_tiles"] // product["sharers"])
    states = copies * product["block_rows"] * memory.row
    sums = product["slots"] * product["groups"] * memory.sums_of_a_warp
    assert product["shared_bytes"] == each * memory.tile + states + sums, context
    assert 1 <= product["slots"] <= product["split"] and product["threads"] == 32 * warps <= 256, context
    assert product["split"] == min(8 // product["groups"], product["depth_blocks"]), context
    assert product["blocks"] * where["D"] <= where["multiprocessors"], context


def check_cluster(product, where, memory, context):
    assert product["sharers"] in (2, 4, 8) and product["sharers"] <= product["unit_tiles"] and where["major"] == 9, context
    check_shared(product, where, memory, 2, context)


def check_grid(product, where, memory, context):
    """All blocks are on the chip at once, one to a multiprocessor."""
    assert product["sharers"] == product["unit_tiles"], context
    check_shared(product, where, memory, 0, context)


def has_no_room(where, gates, dtype, tf32, product, copies):
    """Whether 16 units' weights and one warp's sums for each group of rows are more than a block has."""
    if copies == 0:
        return True
    tiles = max(1, -(-(-(-where["B"] // 8)) // copies))
    of_warp = tiles if tiles <= 2 else 2 if dtype == "float64" else 4
    memory = Memory(product | {"tiles": of_warp}, gates, dtype, tf32)
    return memory.tile + -(-tiles // of_warp) * memory.sums_of_a_warp > where["shared_bytes"]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_heads_are_planned_as_so_many_directions(cell, chip):
    """Each head's product is as wide as the head, and those that wait for each other are on the chip at once, with all others'."""
    multiprocessors, shared, major = CHIPS[chip]
    where = dict(T=9, multiprocessors=multiprocessors, shared_bytes=shared, major=major)
    regimes = set()
    for B, units, N, D in itertools.product([1, 64, 257], [15, 64, 400], [2, 3, 8, 70], (1, 2)):
        plan = _C.cuda_plan(cell, "bfloat16", B=B, H=N * units, P=N * units, D=D, N=N, **where)
        assert plan == _C.cuda_plan(cell, "bfloat16", B=B, H=units, P=units, D=D * N, **where)
        regimes.add(plan["cell"]["regime"])
        for product in plan.values():
            assert product["regime"] not in ("cluster", "grid") or product["blocks"] * D * N <= multiprocessors
    assert regimes == {"step"} if cell == "gru_reset_before" else {"block", "step"} <= regimes


def test_a_small_batch_is_spread_by_depth_and_a_large_one_by_rows():
    sizes = dict(T=9, H=1024, P=1024, D=1, multiprocessors=132, shared_bytes=227 << 10, kernel="step")
    plan = lambda B: _C.cuda_plan("lstm", "bfloat16", B=B, **sizes)  # noqa: E731
    assert plan(16)["cell"]["split"] == 8 and plan(16)["cell"]["groups"] == 1
    assert plan(4096)["cell"]["groups"] == 8 and plan(4096)["cell"]["split"] == 1


@pytest.mark.parametrize("cell, dtype, tf32, widest", [
    ("rnn_tanh", "bfloat16", False, 320), ("gru", "bfloat16", False, 192), ("lstm", "float16", False, 160),
    ("lstm", "float32", False, 112), ("gru", "float32", False, 132), ("gru", "float32", True, 128), ("lstm", "float64", False, 80),
])  # fmt: skip
def test_widths_whose_weights_stay(cell, dtype, tf32, widest):
    """On an H100, what the bytes allow: 227 KiB."""
    chip = {"multiprocessors": 132, "shared_bytes": 227 << 10, "tf32": tf32, "kernel": "block"}
    plan = lambda H, P: _C.cuda_plan(cell, dtype, T=9, B=64, H=H, P=P, D=1, **chip)  # noqa: E731
    for name in ("cell", "dh"):
        assert plan(widest, widest)[name]["regime"] == "block"
    assert plan(widest + 1, widest + 1)["cell"]["regime"] == plan(16, 8)["cell"]["regime"] == "step"


@pytest.mark.parametrize("cell, dtype, tf32, B, D, widest", [
    ("lstm", "bfloat16", False, 8, 1, 1792), ("lstm", "bfloat16", False, 16, 1, 1760), ("lstm", "float16", False, 64, 1, 1632),
    ("gru", "bfloat16", False, 16, 1, 2112), ("gru", "bfloat16", False, 32, 1, 2112), ("rnn_tanh", "float16", False, 32, 1, 2112),
    ("lstm", "bfloat16", False, 16, 2, 1056), ("lstm", "float32", False, 16, 1, 896), ("gru", "float32", True, 32, 1, 1168),
    ("gru", "float32", False, 2048, 1, 256), ("lstm", "bfloat16", False, 128, 1, 1472),
])  # fmt: skip
def test_widths_that_a_whole_chip_holds(cell, dtype, tf32, B, D, widest):
    """On an H100: by bytes, by multiprocessors (132 of 16 units) or by rows, whichever ends first."""
    chip = {"multiprocessors": 132, "shared_bytes": 227 << 10, "tf32": tf32, "kernel": "grid"}
    regimes = lambda H: {  # noqa: E731
        _C.cuda_plan(cell, dtype, T=9, B=B, H=H, P=H, D=D, **chip)[name]["regime"] for name in ("cell", "dh")
    }
    assert regimes(widest) == {"grid"} and "step" in regimes(widest + 16)


@pytest.mark.parametrize("cell, dtype, tf32, B, D, forward, backward", [
    ("lstm", "bfloat16", False, 16, 1, 416, 384), ("lstm", "bfloat16", False, 64, 2, 416, 384),
    ("lstm", "bfloat16", False, 256, 1, 384, 352), ("gru", "bfloat16", False, 16, 1, 512, 480),
    ("rnn_tanh", "float16", False, 32, 1, 896, 896), ("lstm", "float32", False, 16, 1, 272, 256), ("gru", "float32", True, 32, 1, 352, 288),
])  # fmt: skip
def test_widths_that_a_cluster_holds(cell, dtype, tf32, B, D, forward, backward):
    """On an H100, eight blocks. Backward keeps the gradients of all gates where forward keeps a state."""
    chip = {"multiprocessors": 132, "shared_bytes": 227 << 10, "tf32": tf32, "kernel": "cluster"}
    regime = lambda H, name: _C.cuda_plan(cell, dtype, T=9, B=B, H=H, P=H, D=D, **chip)[name]["regime"]  # noqa: E731
    for widest, name in ((forward, "cell"), (backward, "dh")):
        assert regime(widest, name) == "cluster" and regime(widest + 16, name) == "step"
    assert _C.cuda_plan(cell, dtype, T=9, B=B, H=128, P=128, D=D, **chip | {"major": 8})["cell"]["regime"] == "step"


@pytest.mark.parametrize("dtype, tf32", DTYPES)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_every_stack_fits_and_is_resident(cell, chip, dtype, tf32):
    """All blocks of all layers are on the chip at once, one to a multiprocessor, with the weights of both products."""
    multiprocessors, shared, major = CHIPS[chip]
    traits = _C.cell_traits()[cell]
    found = set()
    for B, H, layers, T, wanted in itertools.product([1, 8, 33, 257], [1, 16, 100, 256, 512, 800], [1, 2, 3, 5, 16], [1, 9, 200], [False, True]):
        where = dict(T=T, B=B, H=H, multiprocessors=multiprocessors, shared_bytes=shared, major=major, tf32=tf32)
        count, plan, back = _C.cuda_stack(cell, dtype, layers=layers, wanted=wanted, **where)
        alone = _C.cuda_plan(cell, dtype, P=H, D=1, **where)["cell"]["regime"]
        context = (where, layers, wanted, count, plan, back)
        assert 1 <= count <= min(layers, 8), context
        found.add(count)
        if count == 1:
            continue
        assert wanted or alone in ("grid", "cluster") and T >= 4 * count and plan["groups"] == 1, context
        for each, gates, sums_of_unit in [(plan, traits["gates"], traits["pre"]), (back, 1, 2)]:
            if not wanted and each is back and each["blocks"] == 0:  # each by itself
                assert each["regime"] == "step", context
                continue
            assert each["regime"] == "grid" and each["sharers"] == each["unit_tiles"] == -(-H // 16), context
            assert each["blocks"] * count <= multiprocessors and each["batch_tiles"] * each["block_rows"] >= B, context
            memory = Memory(each, gates, dtype, tf32)
            sums = each["slots"] * each["groups"] * memory.sums_of_a_warp // gates * sums_of_unit
            assert each["shared_bytes"] == 2 * memory.tile + sums <= shared, context
        assert not back["blocks"] or 0 <= back["depth_blocks"] * DEPTH[dtype, tf32] - traits["gates"] * H < DEPTH[dtype, tf32], context
    assert found == {1} if multiprocessors == 1 else len(found) > 1


@pytest.mark.parametrize("cell, dtype, T, B, H, layers, count", [
    ("lstm", "float16", 1024, 16, 512, 4, 4), ("lstm", "float16", 1024, 16, 768, 4, 2), ("lstm", "float16", 1024, 16, 1024, 4, 1),
    ("lstm", "float16", 1024, 16, 512, 6, 4), ("lstm", "float16", 1024, 32, 512, 4, 4), ("lstm", "float16", 1024, 33, 512, 4, 2),
    ("lstm", "float16", 11, 16, 512, 4, 2), ("lstm", "float16", 7, 16, 512, 4, 1), ("gru", "bfloat16", 500, 32, 1024, 3, 2),
    ("gru", "bfloat16", 500, 32, 256, 12, 8), ("lstm", "float16", 1024, 16, 128, 4, 1), ("lstm", "float32", 500, 16, 384, 3, 3),
    ("lstm", "float64", 500, 16, 384, 3, 1),
])  # fmt: skip
def test_how_many_layers_an_h100_takes_at_once(cell, dtype, T, B, H, layers, count):
    """By multiprocessors, by bytes, by rows or by steps, whichever ends first; none where a block holds weight_hh."""
    assert _C.cuda_stack(cell, dtype, T=T, B=B, H=H, layers=layers, multiprocessors=132, shared_bytes=227 << 10)[0] == count


@pytest.mark.parametrize("cell, dtype, B, H, layers, goes", [
    ("lstm", "float16", 16, 512, 4, True), ("lstm", "float16", 32, 512, 4, False), ("lstm", "float16", 16, 768, 2, False),
    ("lstm", "float16", 8, 768, 2, False), ("gru", "bfloat16", 16, 512, 4, True), ("gru", "bfloat16", 32, 512, 4, False),
    ("rnn_tanh", "float16", 32, 1024, 2, False), ("rnn_tanh", "float16", 16, 1024, 2, True),
])  # fmt: skip
def test_backward_goes_at_once_where_it_does_not_read_too_much(cell, dtype, B, H, layers, goes):
    """On an H100. Of what does not, the layers go by themselves backward, unless a stack is asked for."""
    sizes = dict(T=500, B=B, H=H, layers=layers, multiprocessors=132, shared_bytes=227 << 10)
    count, _, back = _C.cuda_stack(cell, dtype, **sizes)
    assert count == layers and (back["regime"] == "grid") == goes
    assert _C.cuda_stack(cell, dtype, wanted=True, **sizes)[2]["regime"] == "grid"


@pytest.mark.parametrize("cell", ["lstm_general", "gru_reset_before", "indrnn", "slstm", "lstm_norm"])
def test_no_stack_of_cells_beyond_torchs(cell):
    sizes = dict(T=100, B=4, H=64, layers=3, multiprocessors=132, shared_bytes=227 << 10)
    assert [_C.cuda_stack(cell, "float32", wanted=wanted, **sizes)[0] for wanted in (False, True)] == [1, 1]


@pytest.mark.parametrize("kernel", ["", *select.FUSED_CUDA_KERNELS])
@pytest.mark.parametrize("cell", ["lstm_general", "lstm_coupled", "gru_general", "slstm", "lstm_norm", "gru_norm"])
def test_a_cell_beyond_torchs_is_planned_by_its_product(cell, kernel):
    """Like torch's with as many gates; but one that waits for the sums of all units goes in steps."""
    waits = cell.endswith("norm")
    sizes = dict(T=9, B=64, H=64, P=64, D=1, multiprocessors=132, shared_bytes=227 << 10)
    plan = _C.cuda_plan(cell, "float32", kernel=kernel, **sizes)
    of_torch = _C.cuda_plan({3: "gru", 4: "lstm"}[_C.cell_traits()[cell]["gates"]], "float32", kernel="step" if waits else kernel, **sizes)
    assert plan == of_torch
    assert _C.cuda_kernels()[cell] == (["step"] if waits else _C.cuda_kernels()["lstm"])
    in_float64 = _C.cuda_plan(cell, "float64", kernel=kernel, **sizes)
    assert {product["regime"] for product in in_float64.values()} == {"step"} and _C.cuda_kernels("float64")[cell] == ["step"]


def test_a_warp_takes_fewer_rows_of_a_cell_of_many_states():
    sizes = dict(T=9, B=4096, H=64, P=64, D=1, multiprocessors=132, shared_bytes=227 << 10)
    for cell, tiles in (("lstm", 2), ("lstm_general", 2), ("slstm", 1)):
        plan = _C.cuda_plan(cell, "bfloat16", **sizes)["dh"]
        assert plan["regime"] == "block" and plan["tiles"] == tiles and plan["batch_tiles"] * plan["block_rows"] >= 4096


@pytest.mark.parametrize("kernel", ["", *select.FUSED_CUDA_KERNELS])
def test_a_late_gate_is_a_product_of_its_own(kernel):
    sizes = dict(T=9, B=64, H=64, P=64, D=1, multiprocessors=132, shared_bytes=227 << 10)
    plan = _C.cuda_plan("gru_reset_before", "float32", kernel=kernel, **sizes)
    assert {product["regime"] for product in plan.values()} == {"step"} and _C.cuda_kernels()["gru_reset_before"] == ["step"]
    of_gru = _C.cuda_plan("gru", "float32", kernel="step", **sizes)
    assert plan["projection"] == of_gru["projection"] and plan["dunprojected"] == of_gru["dunprojected"]
    assert plan["dh"]["depth_blocks"] * 3 == of_gru["dh"]["depth_blocks"] * 2
    assert plan["cell"]["shared_bytes"] * 3 == of_gru["cell"]["shared_bytes"] * 2


@pytest.mark.parametrize("kernel", ["", *select.FUSED_CUDA_KERNELS])
@pytest.mark.parametrize("T, B, H, D", [(1, 1, 1, 1), (9, 0, 5, 1), (9, 1, 64, 2), (9, 13, 5, 1), (9, 1 << 20, 4096, 2)])
def test_a_cell_without_a_product_has_a_thread_for_each_unit(T, B, H, D, kernel):
    plan = _C.cuda_plan("indrnn", "float16", T=T, B=B, H=H, P=H, D=D, multiprocessors=132, shared_bytes=227 << 10, kernel=kernel)
    for name in ("cell", "dh"):
        product = plan[name]
        assert product["regime"] == "alone" and product["threads"] == 64 and product["shared_bytes"] == 0
        assert 0 <= product["blocks"] * 64 - B * H < 64 and product["blocks"] < 2**31
    assert plan["projection"]["blocks"] == plan["dunprojected"]["blocks"] == 0 and _C.cuda_kernels()["indrnn"] == ["alone"]


@pytest.mark.parametrize("wanted", ["", "step", "grid"])
def test_reasons_for_cells_beyond_torchs(wanted, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_KERNEL", wanted)
    monkeypatch.setattr(select, "chip", lambda device: {"multiprocessors": 132, "shared_bytes": 227 << 10, "major": 9})
    sizes = dict(T=9, B=64, H=64, P=64, D=1, tf32=False)
    why_not = lambda cell: select.reasons_against_kernels(torch.device("cuda"), cell, torch.float32, **sizes)  # noqa: E731
    reasons = why_not("indrnn")
    assert list(reasons) == ["alone", *select.FUSED_CUDA_KERNELS] and reasons.pop("alone") is None
    assert all("its units do not need each other" in reason for reason in reasons.values())
    for cell in ("gru_norm", "lstm_norm", "gru_reset_before"):
        reasons = why_not(cell)
        assert list(reasons) == list(select.FUSED_CUDA_KERNELS) and reasons.pop("step") is None
        assert all("a step of this cell is two kernels" in reason for reason in reasons.values())
    for cell in ("lstm", "lstm_general", "gru_general", "slstm"):
        assert why_not(cell)[wanted or "block"] is None
    of_stack = dict(layers=2, T=9, B=64, H=256, tf32=False)
    for cell in ("slstm", "lstm_norm", "lstm:2"):
        reason = select.reason_against_stack(torch.device("cuda"), cell, torch.float32, **of_stack)
        assert ("FUSEDRNN_KERNEL" if wanted else "for torch's own cells only") in reason
    in_float64 = select.reasons_against_kernels(torch.device("cuda"), "slstm", torch.float64, **sizes)
    assert in_float64.pop("step") is None and all("in float64" in reason for reason in in_float64.values())


@pytest.mark.parametrize("cell, dtype, message", [("lstm", "int8", "dtype must be float32"), ("tree", "float32", "no cell 'tree'")])
def test_unknown_names(cell, dtype, message):
    with pytest.raises(ValueError, match=message):
        _C.cuda_plan(cell, dtype, T=1, B=1, H=1, P=1, D=1, multiprocessors=1, shared_bytes=1 << 16)


@pytest.mark.parametrize("sizes, message", [
    (dict(T=1 << 31), "at most 1073741824 steps, got 2147483648"), (dict(B=1 << 30, D=2), "rows in all directions, got 2147483648"),
    (dict(H=1 << 21, P=1 << 21), "at most 1048576 units"), (dict(B=1 << 29, H=1 << 7, P=1 << 7), "blocks of states"),
])  # fmt: skip
def test_what_does_not_fit_32_bits_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        _C.cuda_plan("lstm", "float64", **(dict(T=2, B=1, H=1, P=1, D=1, multiprocessors=132, shared_bytes=227 << 10) | sizes))
