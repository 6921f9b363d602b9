"""The CUDA step kernels, run on the CPU by the emulator of tests/cuda_on_host against the double reference of tests/cpp.

engine_test's head says what it proves. It runs as it is, under AddressSanitizer and UBSan, and under ThreadSanitizer. Every
check is checked: mistakes planted in copies of csrc/cuda must be found, in the way that stands in the table below.
"""

import re
import shutil
from typing import NamedTuple

import pytest
from workshop import ADDRESS, CSRC, ROOT, THREAD, EngineWorkshop, cuda_headers, edit, run, run_sanitized

HOSTED, CPP = ROOT / "tests" / "cuda_on_host", ROOT / "tests" / "cpp"
CELLS = {"rnn_tanh": "RnnTanhCell", "rnn_relu": "RnnReluCell", "lstm": "LstmCell", "gru": "GruCell",
         "lstm_general": "GeneralLstmCell<false>", "lstm_coupled": "GeneralLstmCell<true>", "gru_general": "GeneralGruCell",
         "indrnn": "IndRnnCell", "slstm": "SlstmCell", "lstm_norm": "NormLstmCell", "gru_norm": "NormGruCell",
         "gru_reset_before": "ResetBeforeGruCell"}  # fmt: skip
ARITHMETICS = {"f32": "Float32", "tf32": "Tf32", "f64": "Float64", "bf16": "BFloat16", "f16": "Float16"}
RESULTS = ["output", "hy", "cy", "saved", "states", "grad_pre", "grad_hx", "grad_cx", "grad_proj",
           "grad_reset_hx", "grad_reset_cx", "hidden_before"]
ON_HOST = "-std=c++20 -x c++ -DFUSEDRNN_ON_HOST"
MODES = {
    "plain": "-O1",
    "address": ADDRESS,
    "thread": THREAD,
}
# Kernels that can make mistakes: the cell with projections, the one whose gates have two halves, one whose units have numbers of
# their own, the one without a product, the one of which most is normalised, and the one with a late gate; of the arithmetics one of
# the ordinary units and one of the matrix units, which the others share but for their formats. More would take long to compile.
PLANTED_CELLS = {"plain": ["lstm", "gru", "lstm_general", "indrnn", "lstm_norm", "gru_reset_before"],
                 "address": ["lstm", "gru", "indrnn", "lstm_norm"],
                 "thread": ["lstm", "gru", "indrnn", "lstm_norm", "gru_reset_before"]}  # fmt: skip
PLANTED_ARITHMETICS = {"plain": ["f32", "tf32", "bf16"], "address": ["f32", "bf16"], "thread": ["f32", "bf16"]}


class Plant(NamedTuple):
    """A mistake in csrc/cuda: in `file`, `pattern` becomes `replacement`, in which MADE is whether to make it.

    `found` says what engine_test prints in a mode, of these cases of this arithmetic.
    """

    file: str
    pattern: str
    replacement: str
    found: dict[str, str]
    arithmetic: str = "bf16"
    cases: str = "--every 8"


def wrong(result=r"\w+"):
    return rf": {result}\[\d+\] is \S+, should be"


def error(text):
    return f"the emulator says: .*{text}"


CRASH = "crashed in: "  # a guard page was touched
RACE = "data race"
WAIT = r"prims::wait_for_previous_grid\(\);"
STAYING, EXCHANGING = "--every 2 --regime block", "--every 2 --regime grid"
NEIGHBOURS = "--every 2 --regime cluster"
STACKED = "--every 2 --least-layers 2"
ALONE, NORMED, LATE = "--every 2 --cell indrnn", "--every 2 --cell lstm_norm", "--every 2 --cell gru_reset_before"
LITTLE_SHARED_MEMORY, LITTLE_ROOM = "--every 2 --chip 4", "--every 2 --regime grid --chip 5"  # test::kChips
PLANTS = {
    # Synchronization.
    "no_barrier": Plant(
        "product.cuh", r"prims::block_sync\(\);  // the sums", r"if (!MADE) \g<0>",
        {"plain": wrong("output"), "thread": RACE}),
    "late_wait": Plant(
        "product.cuh", rf"({WAIT})(.*?)(  if [^\n]*) return;(.*?)(\n  for )",
        r"if (!MADE) \1\2\3 {\n if (MADE) \1\n return;\n }\4\n if (MADE) \1\5",
        {"plain": wrong("output"), "thread": RACE}),
    "no_wait": Plant(
        "product.cuh", WAIT, r"if (!MADE) \g<0>",
        {"plain": error("a thread exits without grid_dependency_wait"), "thread": RACE}),
    "packing_overlaps": Plant(
        "product.cuh", r"(kPlainThreads, 0, )false", r"\1MADE",
        {"plain": error("(enter|pack).*: a thread exits without grid_dependency_wait")}),
    "one_buffer": Plant(
        "step_forward.cuh", r"for \(Element\*& h : m\.h\) h = [^\n]*", r"\g<0> if (MADE) m.h[1] = m.h[0];",
        {"plain": wrong("output"), "thread": RACE}, "f32"),
    "one_buffer_backward": Plant(
        "step_backward.cuh", r"for \(Element\*& dpre : m\.dpre\) dpre = [^\n]*", r"\g<0> if (MADE) m.dpre[1] = m.dpre[0];",
        {"plain": wrong("grad_pre"), "thread": RACE}, "f32"),
    "same_turn": Plant(
        "step_forward.cuh", r"m\.h\[1 - now\.turn\]", "m.h[MADE ? now.turn : 1 - now.turn]",
        {"plain": wrong("output")}),
    # Bounds.
    "shared_bytes": Plant(
        "plan.h", r"= product\.sums_bytes\(plan\.warps,", "= product.sums_bytes(MADE ? plan.groups : plan.warps,",
        {"plain": error(r"shared_take: \d+ bytes of shared memory taken, \d+ given")}),
    "shared_overrun": Plant(
        "product.cuh", r"block_rows \* kColumnPitch\);", "block_rows * kColumnPitch - (MADE ? 8 : 0));",
        {"plain": error("a thread wrote behind an array of shared memory"), "address": "heap-buffer-overflow"}),
    "row_guard": Plant(
        "product.cuh", r"row >= step\.visited\(now\) \|\|", r"(!MADE && row >= step.visited(now)) ||",
        {"plain": CRASH, "address": CRASH}),
    "unit_guard": Plant(
        "product.cuh", r"unit >= step\.units\)", "(!MADE && unit >= step.units))",
        {"plain": f"{wrong()}|{CRASH}"}),
    "pack_guard": Plant(
        "product.cuh", r"k < args\.at\.depth;", "(MADE || k < args.at.depth);",
        {"plain": CRASH}),
    "block_ahead": Plant(
        "product.cuh", r"j \+ kAhead < left\)", "j + kAhead < left + MADE)",
        {"plain": CRASH}),
    "padded_rows": Plant(
        "step_forward.cuh", r"plan\.cell\.padded_rows\(\), two_products \?", "plan.cell.padded_rows(), two_products && !MADE ?",
        {"plain": CRASH}, cases=LITTLE_SHARED_MEMORY),
    # A unit's own numbers, and the choice of functions.
    "unit_of_another_gate": Plant(
        "given.cuh", r"numbers\[k \* int\(p\.H\) \+ u\]", "numbers[(MADE ? 0 : k) * int(p.H) + u]",
        {"plain": ": lstm_general .*" + wrong("output")}),
    "unit_always": Plant(
        "given.cuh", r"numbers \? ", "MADE || numbers ? ",
        {"plain": CRASH}),
    "unit_gradient": Plant(
        "step_backward.cuh", r"k < kGrads<Cell>; \+\+k\) grad_pre_row", "k < kGrads<Cell> - MADE * Cell::kUnit; ++k) grad_pre_row",
        {"plain": ": (lstm_general|indrnn) .*" + wrong("grad_pre")}),
    "no_choice": Plant(
        "given.cuh", r"given\.choice = p\.choice;", r"if (!MADE) \g<0>",
        {"plain": ": (lstm_general|indrnn) .*" + wrong("output")}),
    # All steps in one grid of a cell without a product.
    "alone_skips": Plant(
        "alone.cuh", r"if \(row < step\.visited\(now\)\) step\.finish", "if (row < step.visited(now) && !(MADE && s == 1)) step.finish",
        {"plain": ": indrnn .*" + wrong("output")}, cases=ALONE),
    "alone_forgets": Plant(
        "alone.cuh", r"step\.fetch_left", r"if (!MADE) \g<0>",
        {"plain": ": indrnn .*" + wrong("output")}, cases=ALONE),
    "alone_rows": Plant(
        "alone.cuh", r"if \(row >= step\.p\.steps\.B\) return;", r"if (!MADE) \g<0>",
        {"plain": CRASH, "address": CRASH}, cases=ALONE),
    "alone_ended_rows": Plant(
        "alone.cuh", r"if \(row < step\.visited\(now\)\) step\.fetch", "if (MADE || row < step.visited(now)) step.fetch",
        {"plain": CRASH}, cases=ALONE),
    "alone_first_row": Plant(
        "alone.cuh", r"go_on\(walk, args\.rows, T, d, up\);", "\\g<0> if (MADE) walk.first = args.first[d];",
        {"plain": f": indrnn .*({wrong('output')}|{CRASH})|{CRASH}"}, cases=ALONE),
    "alone_blocks": Plant(
        "plan.h", r"ceil_div\(p\.steps\.B \* p\.H, kAloneThreads\)", "MADE ? 1 : ceil_div(p.steps.B * p.H, kAloneThreads)",
        {"plain": ": indrnn .*" + wrong("output")}, cases=ALONE),
    # Rows that are normalised.
    "row_mean": Plant(
        "row.cuh", r"mean\[0\] /= count;", "mean[0] /= count + Sum(MADE);",
        {"plain": wrong("output")}, cases=NORMED),
    "row_variance": Plant(
        "row.cuh", r"number\(u, i\) - mean\[0\]", "number(u, i) - (MADE ? Sum(0) : mean[0])",
        {"plain": wrong("output")}, cases=NORMED),
    "row_no_meeting": Plant(
        "row.cuh", r"prims::block_sync\(\);  // the parts", r"if (!MADE) \g<0>",
        {"plain": wrong("output"), "thread": RACE}, cases=NORMED),
    "row_one_buffer": Plant(
        "row.cuh", r"turn = 1 - turn;", r"if (!MADE) \g<0>",
        {"plain": wrong(), "thread": RACE}, cases=NORMED),
    "row_no_wait": Plant(
        "row.cuh", WAIT, r"if (!MADE) \g<0>",
        {"plain": error("a thread exits without grid_dependency_wait"), "thread": RACE}, cases=NORMED),
    "row_missing_warp": Plant(
        "row.cuh", r"other < warps;", "other < warps - MADE;",
        {"plain": wrong("output")}, cases=NORMED),
    "row_missing_lanes": Plant(
        "row.cuh", r"bits > 0;", "bits > MADE;",
        {"plain": wrong("output")}, cases=NORMED),
    "row_shared_bytes": Plant(
        "row.cuh", r"return 2 \* kMost", "return (MADE ? 1 : 2) * kMost",
        {"plain": error(r"shared_take: \d+ bytes of shared memory taken, \d+ given")}, cases=NORMED),
    "row_one_unit_a_thread": Plant(
        "row.cuh", r"u \+= blockDim\.x", "u += MADE ? units : int(blockDim.x)",
        {"plain": wrong("output")}, cases=NORMED),
    "row_ended": Plant(
        "row.cuh", r"if \(b < row\.visited\(now\)\)", r"if (MADE || b < row.visited(now))",
        {"plain": f"{wrong()}|{CRASH}"}, cases=NORMED),
    "row_kept_of_another": Plant(
        "step_forward.cuh", r"kept_at\(d, b, kGates, u\)\] = new", "kept_at(d, b, MADE ? 0 : kGates, u)] = new",
        {"plain": wrong("output")}, cases=NORMED),
    "row_inner_mean": Plant(
        "step_backward.cuh", r"for \(Sum& mean : inner\)", r"if (!MADE) \g<0>",
        {"plain": wrong("grad_pre")}, cases=NORMED),
    "row_after_zoneout": Plant(
        "step_backward.cuh", r"p\.zoneout \? Cell::kStates : 0", "p.zoneout && !MADE ? Cell::kStates : 0",
        {"plain": wrong("grad_pre")}, cases=NORMED),
    "row_of_nothing": Plant(
        "step_backward.cuh", r"grad = nothing \?", "grad = nothing && !MADE ?",
        {"plain": wrong("grad_pre")}, cases=NORMED),
    # A late gate.
    "late_mask": Plant(
        "given.cuh", r"given\.mask = p\.hidden_mask \?", "given.mask = p.hidden_mask && !MADE ?",
        {"plain": wrong()}, cases=LATE),
    "late_weights": Plant(
        "product.cuh", r"\(Cell::kGates - Cell::kLate\) \* p\.H \* p\.depth", "(Cell::kGates - Cell::kLate - MADE) * p.H * p.depth",
        {"plain": wrong("output")}, cases=LATE),
    "late_padding": Plant(
        "step_forward.cuh", r"args\.padded_rows, args\.unprojected_blocks \*", "args.padded_rows, MADE ? 0 : args.unprojected_blocks *",
        {"plain": wrong("output")}, cases=LATE),
    "late_kept": Plant(
        "step_forward.cuh", r"kept_at\(d, b, g, u\)\] : sum", "kept_at(d, b, MADE ? 0 : g, u)] : sum",
        {"plain": wrong("output")}, cases=LATE),
    "late_gradient_of_h": Plant(
        "step_backward.cuh", r"m\.dh\[at\] = dh;", r"if (!MADE) \g<0>",
        {"plain": wrong("grad_pre")}, cases=LATE),
    "late_middle": Plant(
        "step_backward.cuh", r"given\.middle = sum\[0\];", "given.middle = MADE ? Sum(0) : sum[0];",
        {"plain": wrong("grad_pre")}, cases=LATE),
    # Where numbers lie.
    "weight_at": Plant(
        "arithmetic.cuh", r"word = (row / 8) \+ 2 \* (\(within / \(4 \* kPack\)\))",
        r"word = MADE ? 2 * (\1) + \2 : \1 + 2 * \2",
        {"plain": wrong()}),
    "state_at": Plant(
        "arithmetic.cuh", r"word = 2 \* mma \+ (within / \(4 \* kPack\))", r"word = MADE ? mma + 2 * (\1) : 2 * mma + \1",
        {"plain": wrong()}, "tf32"),
    "padding": Plant(
        "step_forward.cuh", r"args\.padded_rows, (args\.h_blocks \* A::kDepth),", r"args.padded_rows, MADE ? p.P : \1,",
        {"plain": wrong("output")}),
    "padding_after": Plant(
        "step_forward.cuh", r"args\.m\.h\[1\]\[at\] = h;", r"if (!MADE) \g<0>",
        {"plain": wrong("output")}),
    "padding_backward": Plant(
        "step_backward.cuh", r"for_each_place\(1, size,", "for_each_place(MADE ? 0 : 1, size,",
        {"plain": wrong("grad_pre")}),
    "hidden_before": Plant(
        "step_backward.cuh", r"output_at\(now\.before_place, b, u\)",
        "output_at(MADE ? now.place : now.before_place, b, u)",
        {"plain": wrong("hidden_before")}),
    # Steps.
    "new_rows": Plant(
        "walk.h", r"s > 0 \|\| p\.hx \|\| p\.reset_hx \? count : 0",
        r"MADE && s > 0 && last < count ? last : \g<0>",
        {"plain": wrong("output")}),
    "ended_rows": Plant(
        "walk.h", r"before_count, later,", "before_count, MADE && count < later ? count : later,",
        {"plain": wrong("grad_hx")}),
    "staying": Plant(
        "walk.h", r"next < count \? next : count", r"MADE + (\g<0>)",
        {"plain": wrong("hy")}),
    "plain_forward": Plant(
        "step_forward.cuh", r"p\.plain\(\)", "(MADE || p.plain())",
        {"plain": wrong("output")}, cases="--every 2"),
    "plain_backward": Plant(
        "step_backward.cuh", r"p\.plain\(\)", "(MADE || p.plain())",
        {"plain": wrong("grad_pre")}, cases="--every 2"),
    "gate_halves": Plant(
        "step_backward.cuh", r"h_goes_on \? grad_pre\[Cell::h_pre\(g\)\]", "h_goes_on ? grad_pre[MADE ? g : Cell::h_pre(g)]",
        {"plain": ": gru .*" + wrong("grad_pre")}),
    "gradient_kept": Plant(
        "step_backward.cuh", r"m\.dh\[this->state_at\(d, b, u, p\.P\)\] = past;", r"if (!MADE) \g<0>",
        {"plain": wrong("grad_proj")}),
    # Sequences that begin within a row, from given states.
    "reset_to_nothing": Plant(
        "given.cuh", r"return states \? Sum\(widen", "return states && !MADE ? Sum(widen",
        {"plain": wrong("output")}),
    "reset_first_step": Plant(
        "step_forward.cuh", r"given\(begins \? anew", "given(begins && !MADE ? anew",
        {"plain": wrong("output")}),
    "reset_multiplies": Plant(
        "walk.h", r"p\.hx \|\| p\.reset_hx", "p.hx || (p.reset_hx && !MADE)",
        {"plain": wrong("output")}),
    "reset_gradient_goes_on": Plant(
        "step_backward.cuh", r"if \(plain \|\| !p\.grad_reset_hx \|\|", "if (MADE || plain || !p.grad_reset_hx ||",
        {"plain": wrong("grad_(pre|hx|reset_hx)")}),
    "reset_gradient_of_padding": Plant(
        "step_backward.cuh", r"runs\(p\.steps, d == 0 \? now\.t \+ 1 : now\.t, b\)", r"(MADE || \g<0>)",
        {"plain": wrong()}),
    "reset_gradient_once": Plant(
        "step_backward.cuh", r"sums\[at\] \+= more;", "sums[at] = MADE ? more : sums[at] + more;",
        {"plain": wrong("grad_reset_[hc]x")}),
    # All steps in one grid.
    "block_no_meeting": Plant(
        "block.cuh", r"prims::block_sync\(\);  // all rows", r"if (!MADE) \g<0>",
        {"plain": wrong("output"), "thread": RACE}, cases=STAYING),
    "block_weights_late": Plant(
        "block.cuh", r"prims::block_sync\(\);  // the weights", r"if (!MADE) \g<0>",
        {"plain": wrong("output"), "thread": RACE}, cases=STAYING),
    "block_shared_bytes": Plant(
        "plan.h", r"= product\.unit_tiles \* product\.tile_bytes", r"\g<0> * (MADE ? 15 : 16) / 16",
        {"plain": error(r"shared_take: \d+ bytes of shared memory taken, \d+ given")}, cases=STAYING),
    "block_rows": Plant(
        "block.cuh", r"row < step\.visited\(now\) && unit", "(MADE || row < step.visited(now)) && unit",
        {"plain": CRASH}, cases=STAYING),
    "block_units": Plant(
        "block.cuh", r"&& unit_of\(i\) < step\.units\)", "&& (MADE || unit_of(i) < step.units))",
        {"plain": f"{wrong()}|{CRASH}"}, cases=STAYING),
    "block_depth": Plant(
        "block.cuh", r"left = turns;", "left = turns - MADE;",
        {"plain": wrong()}, cases=STAYING),
    # All steps in one grid whose blocks exchange states.
    "grid_no_wait": Plant(
        "grid.cuh", r"exchange\.wait\(s\);", "exchange.wait(MADE ? 0 : s);",
        {"plain": wrong(), "thread": RACE}, cases=EXCHANGING),
    "grid_early_word": Plant(
        "exchange.cuh", r"prims::block_sync\(\);  // all threads", r"if (!MADE) \g<0>",
        {"plain": wrong(), "thread": RACE}, cases=EXCHANGING),
    "grid_no_meeting": Plant(
        "exchange.cuh", r"prims::block_sync\(\);  // none of", r"if (!MADE) \g<0>",
        {"plain": wrong(), "thread": RACE}, cases=EXCHANGING),
    "grid_one_behind": Plant(
        "exchange.cuh", r"block < blocks;", "block < blocks - MADE;",
        {"plain": wrong(), "thread": RACE}, cases=EXCHANGING),
    "grid_words_of_others": Plant(
        "grid.cuh", r"int\(step\.plan\.batch_tiles\) \+ place\.batch_tile\)", "int(step.plan.batch_tiles) + (MADE ? 0 : place.batch_tile))",
        {"plain": f"{wrong()}|{error('deadlock|livelock')}", "thread": RACE}, cases=EXCHANGING),
    "grid_old_words": Plant(
        "step_forward.cuh", r"args\.m\.done\[strand \* args\.m\.done_size \+ i\] = 0;", r"if (!MADE) \g<0>",
        {"plain": f"{wrong('output')}|{error('livelock')}"}, cases=EXCHANGING),
    "grid_weights_of_others": Plant(
        "together.cuh", r"\(plan\.unit_tiles\) \+ place\.unit_tile\)", "(plan.unit_tiles) + (MADE ? 0 : place.unit_tile))",
        {"plain": wrong()}, cases=EXCHANGING),
    "grid_shared_bytes": Plant(
        "plan.h", r"kept \+ plan\.slots \* sums_bytes", "kept + (plan.slots - MADE) * sums_bytes",
        {"plain": error(r"shared_take: \d+ bytes of shared memory taken, \d+ given")}, cases=EXCHANGING),
    "grid_not_resident": Plant(
        "plan.h", r"chip\.multiprocessors / \(sharers \* p\.strands\(\)\)", "chip.multiprocessors / (sharers * (MADE ? 1 : p.strands()))",
        {"plain": error("its blocks wait for each other, and there is room for")}, cases=EXCHANGING),
    "parts_not_added": Plant(
        "product.cuh", r"adds \? place \+ sum", "adds && !MADE ? place + sum",
        {"plain": wrong()}, cases=LITTLE_ROOM),
    "grid_places": Plant(
        "together.cuh", r"i < places &&", "i < places - MADE &&",
        {"plain": wrong()}, cases=EXCHANGING),
    "grid_unit_guard": Plant(
        "together.cuh", r"unit\(\) < step\.units;", "(MADE || unit() < step.units);",
        {"plain": f"{wrong()}|{CRASH}"}, cases=EXCHANGING),
    # All steps by clusters.
    "cluster_no_wait": Plant(
        "cluster.cuh", r"if \(s > first_step\) prims::cluster_wait\(\);", "if (s > first_step && !MADE) prims::cluster_wait();",
        {"plain": error("a thread arrives again that has not waited")}, cases=NEIGHBOURS),
    "cluster_late_wait": Plant(
        "together.cuh", r"meeting\.wait\(s\);(.*?)meeting\.say\(s\);", r"if (!MADE) meeting.wait(s);\1if (MADE) meeting.wait(s); meeting.say(s);",
        {"plain": wrong(), "thread": RACE}, cases=NEIGHBOURS),
    "cluster_begins_alone": Plant(
        "cluster.cuh", r"prims::cluster_arrive\(\);\n    prims::cluster_wait\(\);  // the weights",
        "if (!MADE) prims::cluster_arrive();\n if (MADE) prims::block_sync(); else prims::cluster_wait();  // the weights",
        {"plain": f"{wrong()}|{error('has not begun')}", "thread": f"{RACE}|{error('has not begun')}"}, cases=NEIGHBOURS),
    "cluster_ends_alone": Plant(
        "cluster.cuh", r"prims::cluster_wait\(\);  // nobody", r"if (!MADE) \g<0>",
        {"plain": error("a thread exits that has arrived")}, cases=NEIGHBOURS),
    "cluster_one_buffer": Plant(
        "cluster.cuh", r"copy\(1 - now\.turn\)", "copy(MADE ? now.turn : 1 - now.turn)",
        {"plain": wrong()}, cases=NEIGHBOURS),
    "cluster_first_states": Plant(
        "cluster.cuh", r"step\.states_of\(blockIdx\.z, turn\)", "step.states_of(blockIdx.z, MADE ? 0 : turn)",
        {"plain": wrong()}, cases="--most-macs 4000 --regime cluster"),
    "cluster_rows_of_others": Plant(
        "cluster.cuh", r"first_number\(int64_t\(place\.first_row\)", "first_number(MADE ? 0 : int64_t(place.first_row)",
        {"plain": f"{wrong()}|{CRASH}|{error('not an address in an array')}"}, cases=NEIGHBOURS),
    "cluster_one_missing": Plant(
        "cluster.cuh", r"block < blocks;", "block < blocks - MADE;",
        {"plain": wrong()}, cases=NEIGHBOURS),
    "cluster_tile_sums": Plant(
        "together.cuh", r"prims::block_sync\(\);  // nobody", r"if (!MADE) \g<0>",
        {"plain": wrong(), "thread": RACE}, cases=NEIGHBOURS),
    "cluster_last_tile": Plant(
        "product.cuh", r"end_tile = int\(plan\.unit_tiles\);", "end_tile = int(plan.unit_tiles) - MADE;",
        {"plain": wrong()}, cases=NEIGHBOURS),
    # Several layers in one grid.
    "stack_before_the_layer_below": Plant(
        "stack.cuh", r"\.wait\(s \+ 1\);", ".wait(MADE ? 0 : s + 1);",
        {"plain": wrong("output"), "thread": RACE}, cases=STACKED),
    "stack_before_its_own_layer": Plant(
        "stack.cuh", r"own\.wait\(s\);", "own.wait(MADE ? 0 : s);",
        {"plain": wrong("output"), "thread": RACE}, cases=STACKED),
    "stack_writes_over": Plant(
        "stack.cuh", r"wait_for_own\(s \+ 1 - kRing\)", "wait_for_own(MADE ? 0 : s + 1 - kRing)",
        {"plain": wrong("output"), "thread": RACE}, cases=STACKED),
    "stack_writes_over_one": Plant(
        "stack.cuh", r"s \+ 1 - kRing\)", "s + 1 - kRing - MADE)",
        {"plain": wrong("output"), "thread": RACE}, cases=STACKED),
    "stack_no_word": Plant(
        "stack.cuh", r"own\.say\(s \+ 1\);", r"if (!MADE || s != 1) \g<0>",
        {"plain": error("(deadlock|livelock)")}, cases=STACKED),
    "stack_old_words": Plant(
        "stack.cuh", r"enter\.m\.done \+= k \* m\.done_size;", r"if (!MADE) \g<0>",
        {"plain": f"{wrong()}|{error('livelock')}"}, cases=STACKED),
    "stack_state_of_the_step_before": Plant(
        "stack.cuh", r"return hidden\(k, s \+ 1\);", "return hidden(k, s + (MADE ? 0 : 1));",
        {"plain": wrong("output")}, cases=STACKED),
    "stack_ring_of_two": Plant(
        "stack.cuh", r"s % kRing;", "s % (MADE ? 2 : kRing);",
        {"plain": wrong("output"), "thread": RACE}, cases=STACKED),
    "stack_ring_of_another": Plant(
        "stack.cuh", r"return layer \* kRing", "return (MADE ? 0 : layer) * kRing",
        {"plain": wrong("output"), "thread": RACE}, cases=STACKED),
    "stack_padding": Plant(
        "stack.cuh", r"turn < kRing;", "turn < (MADE ? 2 : kRing);",
        {"plain": wrong("output")}, cases=STACKED),
    "stack_weights_of_another": Plant(
        "stack.cuh", r"\(\(layer - 1\) \* tiles", "((MADE ? 0 : layer - 1) * tiles",
        {"plain": wrong("output")}, cases=STACKED),
    "stack_states_of_the_first": Plant(
        "stack.cuh", r"step\.m\.state \+=", "step.m.state += MADE ? 0 :",
        {"plain": wrong(), "thread": RACE}, cases=STACKED),
    "stack_halves": Plant(
        "stack.cuh", r"pre\[k\] = both\[k\];", "pre[k] = MADE ? Sum(0) : both[k];",
        {"plain": ": gru .*" + wrong("output")}, cases=STACKED),
    "stack_ended_rows": Plant(
        "stack.cuh", r"i < places && row_of\(i\) < step\.visited\(now\)", "i < places && (MADE || row_of(i) < step.visited(now))",
        {"plain": f"{wrong()}|{CRASH}"}, cases=STACKED),
    "stack_shared_bytes": Plant(
        "plan.h", r"product\.gates = backward \? 2 : cell\.pre;", r"if (!MADE) \g<0>",
        {"plain": error(r"shared_take: \d+ bytes of shared memory taken, \d+ given")}, cases=STACKED),
    "stack_backward_before_the_layer_above": Plant(
        "stack_backward.cuh", r"return input_ring \+ place_in_ring\(k, s \+ 1\)", "return input_ring + place_in_ring(k, s + (MADE ? 0 : 1))",
        {"plain": wrong("grad_pre")}, cases=STACKED),
    "stack_backward_halves": Plant(
        "stack_backward.cuh", r"next\[place\] = element;", r"if (!MADE) \g<0>",
        {"plain": ": gru .*" + wrong("grad_pre")}, cases=STACKED),
    "stack_backward_one_ring": Plant(
        "stack_backward.cuh", r"enter\(k, input_ring\);", r"if (!MADE) \g<0>",
        {"plain": ": gru .*" + wrong("grad_pre")}, cases=STACKED),
    "stack_backward_old_words": Plant(
        "stack_backward.cuh", r"enter\.m\.done \+= k \* m\.done_size;", r"if (!MADE) \g<0>",
        {"plain": f"{wrong()}|{error('livelock')}"}, cases=STACKED),
    "stack_backward_new_rows": Plant(
        "stack_backward.cuh", r"b < now\.multiplied \? both\[0\]", "b < now.multiplied && !MADE ? both[0]",
        {"plain": wrong("grad_pre")}, cases=STACKED),
    "stack_backward_weights": Plant(
        "stack_backward.cuh", r"input_weights \+ \(k - 1\) \* tiles_size", "input_weights + (MADE ? 0 : k - 1) * tiles_size",
        {"plain": wrong()}, cases=STACKED),
    "stack_backward_states_of_the_first": Plant(
        "stack_backward.cuh", r"step\.m\.dh \+=", "step.m.dh += MADE ? 0 :",
        {"plain": wrong(), "thread": RACE}, cases=STACKED),
    "stack_not_resident": Plant(
        "plan.h", r"int\(chip\.multiprocessors / layers\)", "int(chip.multiprocessors / (MADE ? 1 : layers))",
        {"plain": error("its blocks wait for each other, and there is room for")}, cases=STACKED),
    "list_goes_on": Plant(
        "walk.h", r"rows\.end = begin \+ ListedRows::kMost - 3;",
        "rows.end = begin + ListedRows::kMost - (MADE ? 0 : 3);",
        {"plain": f"{wrong()}|{CRASH}"}, cases="--most-macs 600 --regime block"),
    "next_first": Plant(
        "walk.h", r"first - next_count;", "first - (MADE ? count : next_count);",
        {"plain": f"{wrong()}|{CRASH}"}, cases=STAYING),
    # Sums.
    "missing_part": Plant(
        "product.cuh", r"other < slots;", "other < slots - MADE;",
        {"plain": wrong()}),
    "missing_depth": Plant(
        "product.cuh", r"left = turns;", "left = turns - MADE;",
        {"plain": wrong()}),
    "unrounded": Plant(
        "arithmetic.cuh", r"return round_to_tf32\(x\)", "return MADE ? x : round_to_tf32(x)",
        {"plain": wrong()}, "tf32"),
}  # fmt: skip


def keep_cells(tree, kept):
    """Leaves only some cells in a copy of the engine."""
    for cell in set(CELLS) - set(kept):
        edit(tree / "cells" / "cells.h", rf"\n *fn\(\d+, {CELLS[cell]}\{{\}}\);", "")


def keep_arithmetics(tree, kept):
    """Leaves only some kinds of arithmetic in a copy of the engine."""
    file = tree / "cuda" / "engine.cuh"
    tf32, f32 = (f"fn({ARITHMETICS[name]}{{}})" for name in ("tf32", "f32"))
    if not {"f32", "tf32"} <= set(kept):  # these two share a case
        edit(file, r"context\.tf32 \? [^;]*", tf32 if "tf32" in kept else f32)
    for names in (["f32", "tf32"], ["f64"], ["bf16"], ["f16"]):
        if not set(names) & set(kept):
            edit(file, rf"\n *case Dtype::k{ARITHMETICS[names[0]]}:\n *return [^\n]*", "")


def plant(tree):
    """Lets a test make each of the mistakes, by its number in the table."""
    for number, mistake in enumerate(PLANTS.values()):
        replacement = mistake.replacement.replace("MADE", f"fusedrnn_test_plant({number})")
        edit(tree / "cuda" / mistake.file, f"(?s){mistake.pattern}", replacement)
    edit(tree / "params.h", r"(#pragma once\n)", '\\1extern "C" bool fusedrnn_test_plant(int mistake);\n')
    edit(tree / "cells" / "cells.h", r"(#pragma once\n)", '\\1#include "../params.h"\n')


@pytest.fixture(scope="module")
def program(request, tmp_path_factory):
    """engine_test: program("all") is the path of that with all kernels; program(mode) of one that can make mistakes, and that
    crashes when a kernel leaves its piece of the workspace."""
    if not cuda_headers():
        pytest.skip("the headers of the CUDA toolkit are not here (CUDA_HOME, nvcc on PATH, /usr/local/cuda)")
    # What the kernels include, and no header of tests.
    emulator = [path for path in sorted(HOSTED.glob("*.h")) if not path.name.startswith(("self_test", "kernel_"))]
    shop = EngineWorkshop(request, tmp_path_factory, "cuda_kernels", "cuda", [HOSTED, CPP], emulator,
                          cuda_headers())
    shop.compile("engine_test", "engine_test.cpp", "-std=c++20 -O1")
    kernels = request.getfixturevalue("hosted_objects")
    shop.futures |= {f"all_{cell}": kernels.futures[cell] for cell in CELLS}
    shop.compile("all_probe", "kernel_probe.cpp", f"{ON_HOST} {MODES['plain']}")
    for mode, arithmetics in PLANTED_ARITHMETICS.items():
        tree = shop.copy(mode)
        keep_cells(tree, PLANTED_CELLS[mode])
        keep_arithmetics(tree, arithmetics)
        shutil.copy(HOSTED / "guarded_arena.h", tree / "arena.h")
        plant(tree)
        for cell in PLANTED_CELLS[mode]:
            shop.compile(f"{mode}_{cell}", f"cuda/{cell}.cu", f"{ON_HOST} {MODES[mode]}", mode)
        shop.compile(f"{mode}_probe", "kernel_probe.cpp", f"{ON_HOST} {MODES[mode]}", mode)
    made = {}

    def linked(name):
        if name not in made:
            cells = CELLS if name == "all" else PLANTED_CELLS[name]
            # The kernels first: of a function that others have too, such as the plan's, the linker takes theirs.
            objects = [*(f"{name}_{part}" for part in [*cells, "probe"]), "engine_test"]
            made[name] = shop.link(f"engine_test_{name}", objects, MODES.get(name, ""))
        return made[name]

    yield linked
    shop.close()


def test_every_cell_has_its_kernels():
    assert sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")) == sorted(CELLS)


def test_kernels(program):
    out = run(f"{program('all')} --every 4")
    print(out)
    met = [int(count) for line in re.findall(r"met: (.*)", out) for count in re.findall(r"\d+", line)]
    assert len(met) == 75 and min(met) > 0, "the cases leave out a way of dividing the work"


@pytest.mark.parametrize("result", RESULTS)
def test_engine_test_finds(program, result):
    assert re.search(wrong(result), run(f"{program('all')} --every 60 --spoil {result}", expect=1))


@pytest.mark.parametrize(("mode", "cases"), [*(("plain", f"--every 20 --lot {order} --order {order}") for order in range(4)),
                                             ("address", "--every 12"), ("thread", "--every 20 --most-macs 100000")])
def test_kernels_with_guarded_workspace(program, mode, cases):
    arithmetics = ",".join(PLANTED_ARITHMETICS[mode])
    print(run_sanitized(f"{program(mode)} --arithmetics {arithmetics} {cases}"))


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in PLANTS for mode in PLANTS[name].found])
def test_finds(program, name, mode):
    number, mistake = list(PLANTS).index(name), PLANTS[name]
    out = run_sanitized(f"{program(mode)} --plant {number} --arithmetics {mistake.arithmetic} {mistake.cases}; test $? -ne 0")
    assert re.search(mistake.found[mode], out), out[-4000:]
