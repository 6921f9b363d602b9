"""Suite options: what is written in torch says what fusedrnn does; rows and tables. No test here asserts a speed."""

import contextlib
import dataclasses
import io
import json
import re

import pytest
import torch

from benchmarks import gate, machine, options, providers, registry, report, rows, run, suites, table, written
from benchmarks.shapes import Case, Shape
from benchmarks.workload import Workload

SMALL = Shape(9, 4, 8, 16, why="Small.", source="-")
CASES = [Case(SMALL, cell, mode, option=name) for name, option in written.OPTIONS.items() for cell in option.cells
         for mode in option.modes]  # fmt: skip
OWN_PARAMETERS = {"peepholes": 1, "layer_norm_lstm": 3, "layer_norm_gru": 2}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def workloads(case):
    return [Workload(case, registry.provider_named(name)) for name in ("fusedrnn", "torch")]


@every_case
def test_both_sides_do_the_same(case):
    """With masks of one seed, which are the same."""
    ours, stock = workloads(case)
    verdict = gate.judge(ours, stock)
    assert verdict.passed, verdict.worst
    assert ours.kernel().startswith("fused/") and stock.kernel() in ("aten", "onednn")
    assert [tuple(a.shape) for a in ours.leaves] == [tuple(b.shape) for b in stock.leaves]
    if case.mode == "training":
        assert len(ours.call()) == len(stock.call()) == 5 + OWN_PARAMETERS.get(case.option, 0)


@every_case
def test_the_option_is_at_work(case):
    """A layer without it gives other numbers, or another memory."""
    without = Workload(case, registry.provider_named(providers.WITHOUT))
    assert without.case == dataclasses.replace(case, option=None) and gate.judge(without, workloads(without.case)[1]).passed
    ours, _ = workloads(case)
    if case.option in ("save", "return_states"):
        kept = [0, 0]
        for k, workload in enumerate((ours, without)):
            count = lambda t, k=k: kept.__setitem__(k, kept[k] + t.numel()) or t  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
                found = workload.module(workload.input)
        assert kept[0] < kept[1] if case.option == "save" else found[1][0].shape != ours.module(ours.input)[1].shape
        return
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.module(ours.input)[0], without.module(without.input)[0])


@pytest.mark.parametrize(
    "option, wrong",
    [
        ("lengths", lambda module: module.lengths.fill_(9)),
        ("reset", lambda module: module.reset.bitwise_not_()),
        ("zoneout", lambda module: setattr(module, "zoneout", module.zoneout[::-1])),
        ("zoneout_eval", lambda module: setattr(module, "zoneout", (0.3, 0.3))),
        ("recurrent_dropout", lambda module: setattr(module, "option", None)),
    ],
)
def test_the_gate_finds_another_option(option, wrong):
    ours, stock = workloads(Case(SMALL, "lstm", "inference", option=option))
    wrong(stock.module)
    verdict = gate.judge(ours, stock)
    assert not verdict.passed and "output" in verdict.worst


def test_gradients_of_every_state_are_taken():
    """Of c as well as of h."""
    ours, stock = workloads(Case(SMALL, "lstm", "training", option="return_states"))
    assert ours.uses == ("output", "hy") and len(ours._forward()) == 2
    for found, expected in zip(ours.call(), stock.call()):
        torch.testing.assert_close(found, expected)
    without = Workload(ours.case, registry.provider_named(providers.WITHOUT))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.call(), without.call())


def test_lengths_and_resets():
    shape = suites.OPTION_SHAPES[0]
    lengths, resets = written.lengths_of(shape), written.resets_of(shape)
    assert sorted(lengths.tolist()) == sorted(dataclasses.replace(shape, packed=True).lengths) and lengths[0] != max(lengths)
    assert 0.5 < resets.double().mean() * written.EPISODE < 2
    padded = Case(shape, "gru", "inference")
    flops = {name: dataclasses.replace(padded, option=name).flops for name in ("lengths", "reset")}
    assert flops["lengths"] < padded.flops == flops["reset"]


def test_the_suite_names_every_option():
    every = suites.cases("options")
    assert {case.option for case in every} == set(written.OPTIONS) and len(every) == 92
    assert suites.case_named("save/lstm/training/T50-B64-I256-H256").option == "save"
    assert Case.from_json(json.loads(json.dumps(every[0].to_json()))) == every[0]
    assert "no-such-option" not in written.OPTIONS and all(case.option is None for case in suites.cases("cpu"))


def test_who_has_no_options_says_so():
    case = Case(SMALL, "lstm", "training", option="reset")
    assert providers.reason_against(registry.provider_named("torch-compile"), case) == "has no reset"
    for name in ("torch", "fusedrnn", providers.WITHOUT):
        assert providers.reason_against(registry.provider_named(name), case) is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(file with the rows of a quick run, what it printed)."""
    out = tmp_path_factory.mktemp("options") / "benchmarks" / "results" / "m" / "options.jsonl"
    printed, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(suites.SUITES, "options", dataclasses.replace(suites.SUITES["options"], shapes=(SMALL,)))
        patch.setattr(options, "QUICK", dataclasses.replace(options.QUICK, seconds=0.01, memory_flops=1e9, minutes=9))
        patch.setattr(run.limits, "gemm_peak", lambda *arguments: 1e11)
        assert options.main(["--quick", "--threads", "1", "--out", str(out), "--only", "^(save|reset)/lstm"]) == 0
    torch.set_num_threads(threads)
    return out, printed.getvalue()


def test_rows_and_tables(measured, monkeypatch):
    out, printed = measured
    found = rows.read(out)
    assert [row["provider"] for row in found] == ["torch", "fusedrnn", "fusedrnn-without"] * 3
    for row in found:
        assert row["gate"] == "green" and row["suite"] == "options" and row["case"].startswith(f"{row['option']}/lstm/")
        ours = row["provider"] == "fusedrnn"
        ratios = row["speedup"] is not None, row["cost"] is not None
        assert (row["against"], ratios) == ("torch" if ours else None, (ours, ours))
        assert (row["peak_bytes"] is not None) == (row["mode"] == "training")
    (save,) = [row for row in found if row["option"] == "save" and row["provider"] == "fusedrnn"]
    (plain,) = [row for row in found if row["option"] == "save" and row["provider"] == "fusedrnn-without"]
    assert save["cost_low"] <= save["cost"] <= save["cost_high"]
    assert save["cost"] == pytest.approx(save["seconds"]["p50"] / plain["seconds"]["p50"], rel=0.02)
    lines = table.option_lines(found)
    assert len(lines) == 3 and all(len(line) == len(table.OPTION_HEADER) for line in lines)
    assert lines[-1][:5] == ["save", "LSTM", "T9 B4 I8 H16", "training", "checkpoint"]
    assert f"{save['cost']:.2f}x" in lines[-1]
    assert re.search(r"reset +LSTM +T9 B4 I8 H16 +training +loop of cells", printed) and "3 cases:" in printed

    monkeypatch.setattr(report, "ROOT", out.parents[3])
    page = report.machine_page(out.parent)
    assert "## options: what torch.nn's layers cannot do" in page and f"| {' | '.join(lines[-1])} |" in page
    assert "cost: time of fusedrnn with the option" in page and "floor" not in page
    line = "| options: what torch.nn's layers cannot do, beside what one writes for it in torch | 3 |"
    assert line in report.machine_section(out.parent)


def test_what_has_no_time_or_is_wrong_has_no_ratio(measured):
    found = rows.read(measured[0])
    for row in found[:2]:
        row |= {"gate": "red", "seconds": None, "speedup": None, "cost": None}
    assert table.option_lines(found)[0][5:] == ["red", "red", "-", "-", "-", "-", "-", "-", "-"]
    for row in found[3:6]:
        row |= {"cost": None}
    assert table.option_lines(found)[1][9:11] == ["-", "-"]


def test_only_a_full_run_replaces_the_committed_rows():
    home = machine.RESULTS / machine.machine_name()
    assert run.rows_file(run.parse(["--suite", "options", "--device", "cpu"]), "options") == home / "options.jsonl"
    assert run.rows_file(run.parse(["--suite", "options", "--providers", "torch,fusedrnn"]), "options") is None


def test_quick_is_the_first_shape_cut_short(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "main", lambda words, quick: asked.append((words, quick)) or 0)
    for words in (["--quick"], []):
        assert options.main(words) == 0
    assert asked == [(["--suite", "options", "--only", "B16-", "--steps", "25", "--quick"], options.QUICK),
                     (["--suite", "options"], options.QUICK)]
    cut = run.parse([*asked[0][0], "--only", "reset/lstm", "--device", "cpu"])
    assert [case.name for case in run.chosen_cases(cut, "options")] == [
        f"reset/lstm/{mode}/T25-B{B}-I256-H256" for B in (16, 64) for mode in ("inference", "training")]
