"""What is made of rows: pairs, tables, pictures, README's part, comparisons. The rows are invented."""

import json

import pytest

from benchmarks import compare, machine, plot, report, rows, shapes, suites, table


def made_up(case: shapes.Case, provider: str, speedup: float = 1.0, gate: str = "green", peak: int = 1 << 20) -> dict:
    """A row as a run writes it, with invented numbers."""
    names = ("T", "B", "I", "H", "layers", "bidirectional", "packed", "nonlinearity", "threads", "group")
    shape = {name: getattr(case.shape, name) for name in names}
    ours, green = provider != "torch", gate == "green"
    return {
        "suite": "cpu",
        "case": case.name,
        "shape": shape,
        "cell": case.cell,
        "mode": case.mode,
        "dtype": "float32",
        "provider": provider,
        "kernel": "k",
        "gate": gate,
        "gate_worst": "",
        "against": "torch" if ours else None,
        "seconds": {"p20": 1e-3, "p50": 1e-3, "p80": 1e-3} if green else None,
        "gflops": 1.0,
        "gemm_peak_gflops": 100.0,
        "fraction_of_gemm_peak": 0.25,
        "fraction_of_bandwidth": None,
        "floor_seconds": 5e-4 if green else None,
        "fraction_of_floor": 0.5 if green else None,
        "peak_bytes": peak if case.mode == "training" else None,
        "resident_peak_bytes": None,
        "speedup": speedup if ours and green else None,
        "speedup_low": speedup * 0.98 if ours and green else None,
        "speedup_high": speedup * 1.02 if ours and green else None,
        "machine": "m",
        "cpu": "a processor",
        "cores": 2,
        "isa": "avx2",
        "threads": 2,
        "versions": {"torch": "2", "python": "3", "fusedrnn": "1"},
        "commit": "c0ffee",
        "date": "2024-02-29",
        "quick": False,
    }


def made_up_run(speedups, suite="cpu", **ours) -> list[dict]:
    """Rows of both providers for every case of the suite; speedups is a number or a function of the case."""
    found = []
    for case in suites.cases(suite):
        found += [made_up(case, "torch"), made_up(case, "fusedrnn", speedups(case) if callable(speedups) else speedups)]
        found[-1] |= ours
        found[-2]["suite"] = found[-1]["suite"] = suite
    return found


def written(path, some: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def test_losses_and_targets_are_named():
    slow = "lstm/training/T50-B64-I512-H512"
    pairs = rows.pairs(made_up_run(lambda case: 0.5 if case.name == slow else 4.0))
    text = table.summary(pairs)
    assert f"LOSS {slow}: 0.50x" in text and "66 cases: 1 losses" in text
    means = {what: (count, mean) for what, count, mean, _ in table.target_lines(pairs)}
    assert means["packed"] == (6, pytest.approx(4.0))
    assert means["lstm training"] == (9, pytest.approx((4.0**8 * 0.5) ** (1 / 9)))
    assert "LOSS" in table.case_table(pairs)


def test_formats_have_means_of_their_own():
    slow, fast = made_up_run(2.0), made_up_run(8.0)
    for row in fast:
        row |= {"dtype": "bfloat16", "case": f"{row['case']}/bfloat16"}
    means = {what: (count, mean) for what, count, mean, _ in table.target_lines(rows.pairs(slow + fast))}
    assert means["gru training float32"] == (9, pytest.approx(2.0)) and means["gru training bfloat16"] == (9, pytest.approx(8.0))
    assert means["packed bfloat16"] == (6, pytest.approx(8.0))


def test_below_one_within_the_noise_is_not_called_a_loss():
    pair = rows.pairs(made_up_run(0.99))[0]
    assert (pair.ours["speedup_high"] > 1, pair.verdict) == (True, "even")


@pytest.mark.parametrize(
    "after, status, word",
    [
        (dict(speedups=2.0), 0, "0 worse"),
        (dict(speedups=1.99), 0, "0 worse"),
        (dict(speedups=1.8), 1, "slower"),
        (dict(speedups=3.0), 0, "faster"),
        (dict(speedups=2.0, peak_bytes=2 << 20), 1, "larger"),
        (dict(speedups=2.0, gate="red", speedup=None), 1, "WRONG"),
    ],
)
def test_compare_fails_on_what_got_worse_only(after, status, word, tmp_path, capsys):
    files = [written(tmp_path / "a", made_up_run(2.0)), written(tmp_path / "b", made_up_run(**after))]
    assert compare.main([str(file) for file in files]) == status
    assert word in capsys.readouterr().out


def test_compare_refuses_what_is_no_row_file(tmp_path, capsys):
    good = written(tmp_path / "good", made_up_run(2.0))
    (tmp_path / "bad").write_text('{"case": 1}\n')
    assert compare.main([str(good), str(tmp_path / "bad")]) == 2
    assert compare.main([str(good), str(tmp_path / "absent")]) == 2
    assert "bad:1: not a benchmark row" in capsys.readouterr().err


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a README and committed rows, in the place of this project."""
    results = tmp_path / "benchmarks" / "results"
    written(results / "m" / "cpu.jsonl", made_up_run(lambda case: 0.5 if case.cell == "rnn" else 2.0))
    written(results / "m" / "scaling.jsonl", made_up_run(2.0, "scaling"))
    written(results / "m" / "memory.jsonl", made_up_run(2.0, "memory"))
    slower = made_up_run(lambda case: 0.75 if case.cell == "gru" else 3.0, "deepbench-train")
    written(results / "m" / "deepbench-train.jsonl", slower)
    parts = [f"{begin}\nstale words\n{end}\n" for begin, end in map(report.markers, ("benchmarks", "examples"))]
    (tmp_path / "README.md").write_text(f"before\n{''.join(parts)}after\n")
    output = tmp_path / "examples" / "output" / "digits.txt"
    output.parent.mkdir(parents=True)
    output.write_text("python -m examples.digits\nmany\nwords\nresult: 97 % of the digits\n")
    monkeypatch.setattr(machine, "RESULTS", results)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def test_report_writes_readme_and_checks_it(project, capsys):
    pytest.importorskip("matplotlib")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale words" not in text
    assert "| **0.50x** (0.49 to 0.51) |" in text and "| 2.00x |" in text
    for picture in ("cpu-speedup", "scaling-cost", "memory-peak"):
        assert f"(benchmarks/results/m/{picture}.svg)" in text and (project / f"benchmarks/results/m/{picture}.svg").exists()
    assert "| [digits](examples/digits.py) | 97 % of the digits |" in text
    assert "| deepbench-train: DeepBench's 53 training configurations | 53 |" in text
    assert "| 19 | 0.75x (GRU training, T" in text
    page = (project / "benchmarks" / "results" / "m" / "README.md").read_text()
    assert page.startswith("# a processor, 2 cores, avx2") and page.index("## cpu:") < page.index("## deepbench-train:")
    assert "T25 B16 I4096 H4096 |" in page and "(cpu-speedup.svg)" in page and "| 50% / 50% |" in page
    written(project / "benchmarks" / "results" / "m" / "cpu.jsonl", made_up_run(3.0))
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    complaints = capsys.readouterr().err
    for name in ("README.md", "cpu-speedup.svg", "m/README.md"):
        assert f"{name} is out of date" in complaints


def test_plot_draws_all_committed_rows(project, capsys):
    pytest.importorskip("matplotlib")
    assert plot.main([]) == 0
    assert "cpu-speedup.svg" in capsys.readouterr().out


def test_the_picture_is_the_same_at_every_drawing(project):
    pytest.importorskip("matplotlib")
    path = project / "benchmarks" / "results" / "m" / "cpu.jsonl"
    assert plot.draw(path).read_bytes() == plot.draw(path).read_bytes()


def test_report_wants_its_markers(project, capsys):
    (project / "README.md").write_text("nothing here")
    assert report.main([]) == 1
    assert report.markers("benchmarks")[0] in capsys.readouterr().err


def test_readme_of_this_project_is_up_to_date():
    readme = machine.ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README in this tree")
    assert report.main(["--check"]) == 0


def test_rows_of_a_gpu_have_their_own_section(tmp_path, monkeypatch):
    (committed,) = [path for path in machine.row_files() if path.name == "cpu.jsonl"][:1]
    path = tmp_path / "benchmarks" / "results" / "nvidia" / "gpu.jsonl"
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        for row in rows.read(committed):
            for dtype in ("float32", "bfloat16"):
                changed = {"suite": "gpu", "case": f"{row['case']}/{dtype}", "dtype": dtype, "device": "cuda"}
                changed |= {"gpu": "NVIDIA H100", "versions": row["versions"] | {"cudnn": 91300}}
                print(json.dumps(row | changed), file=file)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    text = report.machine_section(path.parent)
    assert text.startswith("### NVIDIA H100\n\nfloat32, bfloat16, cuDNN 91300, torch ")
    assert "T100 B1 I64 H64 |" in text and "T100 B1 I64 H64, bfloat16 |" in text
    assert "aimed at" in text and "| 2.5x |" not in text
    assert plot.draw(path).exists()


def test_packed_weights_have_a_table_beside_the_unfrozen_call(tmp_path, monkeypatch):
    found = []
    for case in suites.cases("frozen"):
        seconds = {"torch": 4e-3, "fusedrnn": 2e-3, "frozen-int8": 5e-4}
        for name in seconds:
            found.append(made_up(case, name, seconds["torch"] / seconds[name]))
            found[-1] |= {"suite": "frozen", "error": 1e-3 * len(name), "seconds": {"p50": seconds[name]}}
            found[-1]["shape"] |= {"step": case.shape.step}
    path = tmp_path / "frozen.jsonl"
    written(path, found)
    text = report.suite_section(path)
    assert "| one call (fusedrnn over it) | torch | fusedrnn | frozen-int8 |" in text
    assert "| LSTM T1 B1 I64 H64 | 4 ms (0.50x) | 2 ms | 500 us (4.00x) |" in text
    assert "| GRU T1 B1 I1024 H1024, cell | 4 ms" in text
    assert "over all cases: torch 5.0e-03, fusedrnn 8.0e-03, frozen-int8 1.1e-02." in text
