"""The benchmark tool: its shapes, its statistics, its gate, its meters, and what it makes of committed rows.

No test here asserts a speed. The few that measure do so on the smallest cases.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
import types

import pytest
import torch

from benchmarks import gate, gpu, limits, machine, memory, providers, registry, rows, run, shapes, suites, timing
from benchmarks.progress import Progress
from benchmarks.workload import Workload

TINY = "rnn/(inference|training)/T37-"


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


def test_every_shape_has_a_reason_and_a_name_of_its_own():
    for suite in suites.SUITES:
        names = [case.name for case in suites.cases(suite)]
        assert len(set(names)) == len(names)
        for shape in suites.SUITES[suite].shapes:
            assert shape.why.endswith(".") and shape.source
    assert len(suites.cases("cpu")) == 11 * 3 * 2
    assert suites.case_named("gru/training/T37-B7-I19-H45").shape.H == 45


def test_packed_lengths_run_from_one_to_T():
    shape = next(shape for shape in suites.SUITES["cpu"].shapes if shape.packed)
    assert (shape.lengths[0], shape.lengths[-1], len(shape.lengths)) == (100, 1, 32)
    assert shape.lengths == sorted(shape.lengths, reverse=True)


def test_work_is_counted_for_all_layers_and_directions():
    shape = shapes.Shape(3, 2, 5, 7, why=".", source="-", layers=2, bidirectional=True)
    first, second = 2 * 6 * 4 * 7 * (5 + 7), 2 * 6 * 4 * 7 * (14 + 7)
    assert shape.flops("lstm", "inference") == 2 * (first + second)
    assert shape.flops("lstm", "training") == 3 * 2 * (first + second)
    assert shape.flops("lstm", "forward") + shape.flops("lstm", "backward") == shape.flops("lstm", "training")
    assert shape.recurrent_bytes("lstm") * shape.steps("inference") == (2 * 4 * 4 * 7 * 7) * (3 * 2)
    assert shape.steps("training") == 2 * shape.steps("backward") == 2 * shape.steps("forward")


def test_suites_of_the_field_are_whole():
    """DeepBench's own counts; one of its 72 inference configurations stands in two of its lists."""
    assert len(suites.cases("deepbench-train")) == 53
    assert len(suites.cases("deepbench-inference")) == 72 - 1
    relu = suites.case_named("rnn/training/T50-B16-I1760-H1760-relu")
    assert registry.provider_named("torch").module(relu.cut(1), torch.float32).nonlinearity == "relu"
    assert {case.shape.T for case in suites.cases("deepbench-train", steps=25)} == {25, 1}
    assert set(suites.suites_of("cpu")) == set(suites.SUITES) - {"gpu", "flashrnn"}
    names = [case.name for case in suites.cases("scaling", device="cpu", threads=4)]
    assert any(name.endswith("-2threads") for name in names) and any(name.endswith("-1threads") for name in names)
    packed = {case.name for case in suites.cases("packed")}
    assert all(name.removesuffix("-packed") in packed for name in packed)


def test_a_case_survives_json():
    case = suites.case_named("rnn/training/T50-B16-I1760-H1760-relu")
    assert shapes.Case.from_json(json.loads(json.dumps(case.to_json()))) == case


# ---------------------------------------------------------------------------------------------------------------------
# Clock and statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_calls_take_turns():
    order = []
    calls = [lambda: order.append("A"), lambda: order.append("B")]
    around = [lambda name=name: mark(order, name) for name in "ab"]
    samples = timing.interleave(calls, seconds=60, least=4, most=4, around=around, clock=Ticks())
    assert "".join(order) == "a" + "b" + "aAbBbBaAaAbBbBaA"
    assert [len(times) for times in samples] == [4, 4]


@contextlib.contextmanager
def mark(order, name):
    order.append(name)
    yield


class Ticks:
    """A clock for which every call takes a second."""

    def repeats(self, call):
        return 1

    def sample(self, call, repeats):
        call()
        return 1.0


def test_long_calls_get_fewer_rounds():
    slow = [lambda: time.sleep(0.02)] * 2
    assert [len(times) for times in timing.interleave(slow, seconds=0.001, least=50)] == [timing.FEWEST] * 2


class FakeCuda:
    """torch.cuda's names that the clock calls, which write down what they were asked for. A GPU is not faked, only the order."""

    def __init__(self, capturable: bool):
        self.log, self.capturable = [], capturable

    def Event(self, enable_timing):
        assert enable_timing
        log = lambda: self.log.append("event")  # noqa: E731
        return types.SimpleNamespace(record=log, synchronize=lambda: None, elapsed_time=lambda end: 2.0)

    def synchronize(self):
        self.log.append("wait")

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: self.log.append("join"))

    current_stream = Stream

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.log.append("replay"))

    def set_stream(self, stream):
        self.log.append("usual stream")

    def stream(self, side):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph):
        yield
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_order_of_a_cuda_sample(monkeypatch):
    fake = FakeCuda(True)
    monkeypatch.setattr(timing.torch, "cuda", fake)
    clock = object.__new__(timing.CudaClock)
    clock.flushed = types.SimpleNamespace(zero_=lambda: fake.log.append("flush"))
    call = lambda: fake.log.append("call")  # noqa: E731
    assert clock.repeats(call) == 1 and clock.sample(call, 1) == 2e-3
    assert fake.log == ["call"] * 3 + ["flush", "wait", "event", "call", "event"]


@pytest.mark.parametrize("capturable", [True, False])
def test_launch_times(monkeypatch, capturable):
    fake = FakeCuda(capturable)
    monkeypatch.setattr(timing.torch, "cuda", fake)
    found = timing.launch_times(lambda: fake.log.append("call"), rounds=2)
    assert found["eager_seconds"] > 0 and (found["graph_seconds"] is not None) == capturable
    assert fake.log[:6] == ["wait", "call", "wait"] * 2
    assert fake.log.count("replay") == 2 * capturable and fake.log.count("call") == 4
    assert ("usual stream" in fake.log) == (not capturable)
    assert timing.launch_times(lambda: None, rounds=1, captures=False)["graph_seconds"] is None


def test_limits_of_this_machine():
    """A floor is a floor: the machine reads and multiplies no faster than it was seen to."""
    near, far = (limits.read_bandwidth(count, 1) for count in (1 << 14, 1 << 27))
    if near is None:
        pytest.skip("no compiler here")
    assert near > far > 1e9
    assert 0 < limits.meeting_seconds(1) < limits.meeting_seconds(2) < 1e-2
    case = suites.case_named("lstm/inference/T25-B1-I1024-H1024")
    peak = limits.gemm_peak(0.05)
    alone = limits.floor_seconds(case, peak, 1)
    read = 25 * 4 * 4 * 1024**2 / limits.read_bandwidth(16 << 20, 1)
    assert alone == pytest.approx(max(read, case.flops / peak))  # and the matrix library may be the slower one
    assert limits.floor_seconds(case, peak, 2) <= 2 * alone
    wide = suites.case_named("lstm/training/T50-B64-I512-H512")
    assert limits.floor_seconds(wide, peak, 1) >= wide.flops / peak


def test_interval_of_the_ratio_holds_the_ratio_and_narrows():
    generator = torch.Generator().manual_seed(0)
    noisy = lambda center, n: (center * (1 + 0.1 * torch.randn(n, generator=generator))).tolist()  # noqa: E731
    few = timing.ratio_interval(noisy(3.0, 10), noisy(2.0, 10))
    many = timing.ratio_interval(noisy(3.0, 1000), noisy(2.0, 1000))
    assert few[1] <= few[0] <= few[2] and many[1] <= 1.5 <= many[2]
    assert many[2] - many[1] < few[2] - few[1]


def test_a_slow_spell_of_the_machine_leaves_the_ratio_alone():
    fast, spell = [1.0, 1.01, 0.99, 1.0, 1.02], [1.0, 1.0, 5.0, 5.0, 1.0]
    slowed = [a * b for a, b in zip(fast, spell)]
    assert timing.ratio_interval([2 * t for t in slowed], slowed) == pytest.approx((2, 2, 2))


def test_few_rounds_claim_no_more_than_they_saw():
    assert timing.ratio_interval([2.0, 3.0], [1.0, 1.0]) == (2.5, 2.0, 3.0)


def test_a_case_is_judged_with_all_its_rows():
    large = suites.case_named("lstm/training/T25-B128-I4096-H4096")
    assert (large.shortened(1e9).shape.T, large.shortened(1e9).shape.B) == (2, 128)
    small = suites.case_named("lstm/training/T37-B7-I19-H45")
    assert small.shortened(run.LARGE) == small


def test_geometric_mean():
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_progress_tells_the_time_left_and_stays_off_pipes():
    pipe = io.StringIO()
    progress = Progress(10, pipe)
    assert progress.time_left() == "--:--"
    progress.advance(5)
    progress.show("x")
    assert re.fullmatch(r"0:0\d", progress.time_left()) and pipe.getvalue() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Gate, meters, rows
# ---------------------------------------------------------------------------------------------------------------------


class Wrong(providers.TorchProvider):
    """torch.nn with an output that is off by a thousandth."""

    def module(self, case, dtype):
        module = super().module(case, dtype)
        forward = module.forward

        def wrong(self, *arguments):
            output, hidden = forward(*arguments)
            return output * 1.001, hidden

        module.forward = types.MethodType(wrong, module)
        return module


def test_a_wrong_result_is_red_prints_no_speed_and_fails_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(registry.PROVIDERS, "wrong", lambda: Wrong("wrong"))
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--no-memory", "--threads", "1", "--only", "rnn/inference/T1-", "--out", str(out)]
    assert run.main([*arguments, "--providers", "torch,wrong"]) == 1
    bad = next(row for row in rows.read(out) if row["provider"] == "wrong")
    assert bad["gate"] == "red" and bad["seconds"] is None and bad["speedup"] is None
    assert "RED rnn/inference/T1-B1-I64-H64" in capsys.readouterr().out


@pytest.mark.parametrize("cell", shapes.CELLS)
@pytest.mark.parametrize("mode", shapes.MODES)
@pytest.mark.parametrize("packed", [False, True])
def test_fusedrnn_passes_the_gate_and_its_kernel_is_named(cell, mode, packed):
    case = shapes.Case(shapes.Shape(9, 4, 8, 16, why=".", source="-", packed=packed), cell, mode)
    ours, stock = (Workload(case, registry.provider_named(name)) for name in ("fusedrnn", "torch"))
    verdict = gate.judge(ours, stock)
    assert verdict.passed, verdict.worst
    assert ours.kernel().startswith("fused/")
    assert stock.kernel() in ("aten", "onednn")
    assert stock.kernel() == "aten" or (cell == "lstm" and not packed)


PACKED_PROVIDERS = suites.SUITES["frozen"].providers.split(",")[2:]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("name", PACKED_PROVIDERS)
def test_packed_weights_pass_a_gate_of_their_own(name, step, cell, monkeypatch):
    shape = shapes.Shape(1 if step else 9, 1, 8, 16, why=".", source="-", step=step, states=True)
    case = shapes.Case(shape, cell, "inference")
    ours, stock = (Workload(case, registry.provider_named(provider)) for provider in (name, "torch"))
    verdict = gate.judge(ours, stock)
    assert verdict.passed, verdict.worst
    assert verdict.error > 10 * verdict.torch_error or name == "frozen-float32"
    assert ours.kernel().startswith("dynamic/" if name == "torch-dynamic" else f"frozen/{name.removeprefix('frozen-')}/")
    monkeypatch.setattr(type(ours.provider), "finished", lambda self, module: torch.nn.Module.apply(module, spoil))
    spoiled = gate.judge(Workload(case, ours.provider), stock)
    assert not spoiled.passed and "allowed" in spoiled.worst
    assert ours.provider.refuses(dataclasses.replace(case, mode="training")) == "for inference on padded sequences"
    assert ours.provider.refuses(dataclasses.replace(case, device="cuda")) == "for float32 on a CPU"


def spoil(module):
    for weight in module._parameters.values():
        torch.nn.init.constant_(weight, 0.2)


def test_training_computes_the_gradients_of_input_and_weights():
    workload = Workload(suites.case_named("lstm/training/T37-B7-I19-H45"), registry.provider_named("torch"))
    assert [tuple(grad.shape) for grad in workload.call()] == [(37, 7, 19), (180, 19), (180, 45), (180,), (180,)]


def test_the_allocator_meter_is_exact():
    def step():
        large = torch.empty(1 << 18)
        del large
        return torch.empty(1 << 10), torch.empty(1 << 10)

    assert memory.allocator_peak(step) == 4 << 18


def test_the_resident_meter_sees_what_torch_does_not(tmp_path):
    found = memory.resident_peak(lambda: bytearray(b"x" * (32 << 20)))
    if found is None:
        pytest.skip("this system does not tell")
    assert (30 << 20) < found < (80 << 20)


def test_the_memory_process_answers_and_its_end_is_survived():
    case = suites.case_named("rnn/training/T37-B7-I19-H45")
    with memory.Meter(["torch", "fusedrnn"], threads=1) as meter:
        peaks = meter.measure(case)
        assert set(peaks) == {"torch", "fusedrnn"}
        assert all(peak["peak_bytes"] > 37 * 7 * 45 * 4 for peak in peaks.values())
        meter.process.kill()
        meter.process.wait()
        assert meter.measure(case) == {}


def test_a_run_writes_whole_rows_and_prints_a_table(capsys, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    assert run.main(["--quick", "--only", TINY, "--out", str(out), "--threads", "1"]) == 0
    found = rows.read(out)
    assert not list(out.parent.glob("*.partial"))
    assert [(row["mode"], row["provider"]) for row in found] == [
        ("inference", "torch"),
        ("inference", "fusedrnn"),
        ("training", "torch"),
        ("training", "fusedrnn"),
    ]
    for row in found:
        assert row["gate"] == "green" and row["threads"] == 1 and row["quick"]
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert 0 < row["fraction_of_gemm_peak"] < 2
        assert (row["peak_bytes"] is not None) == (row["mode"] == "training")
        assert (row["speedup"] is not None) == (row["provider"] == "fusedrnn")
    printed = capsys.readouterr().out
    assert "T37 B7 I19 H45" in printed and "rnn training" in printed and "cases:" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "no such case"], "matches no case of suite cpu"),
        (["--only", "("], "is no regular expression"),
        (["--threads", "0"], "at least 1, got 0"),
        (["--providers", "torch,nobody"], "no provider is called 'nobody'"),
        (["--modes", "inference,sideways"], "no mode is called 'sideways'"),
        (["--steps", "0"], "at least 1, got 0"),
        (["--modes", "inference,"], "no mode is called ''"),
        (["--minutes", "0"], "above 0, got 0"),
        (["--device", "cuda"], "suite cpu is not measured on cuda"),
        (["--suite", "all", "--out", "rows.jsonl"], "--out names only one"),
    ],
)
def test_a_bad_argument_gets_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_only_a_full_run_replaces_the_committed_rows():
    home = machine.RESULTS / machine.machine_name()
    assert run.rows_file(run.parse([]), "cpu") == home / "cpu.jsonl"
    assert run.rows_file(run.parse(["--suite", "frozen"]), "frozen") == home / "frozen.jsonl"
    assert run.rows_file(run.parse(["--suite", "frozen", "--providers", "torch,fusedrnn"]), "frozen") is None
    everything = run.parse(["--suite", "all", "--device", "cpu"])
    assert [run.rows_file(everything, suite).name for suite in everything.suites[:2]] == ["cpu.jsonl", "deepbench-train.jsonl"]
    for partial in (["--steps", "9"], ["--minutes", "9"], ["--threads", "1"], ["--quick"], ["--only", "lstm"], ["--providers", "torch,torch-again"], ["--modes", "forward"]):
        assert run.rows_file(run.parse(partial), "cpu") is None


def test_what_cannot_be_run_says_so(capsys, tmp_path):
    """A provider that refuses has a row with the reason, and the others are measured."""
    out = tmp_path / "rows.jsonl"
    words = ["--quick", "--no-memory", "--threads", "1", "--only", "gru/.*/T1-", "--modes", "forward,backward"]
    asked = "torch,fusedrnn-step,fusedrnn-baseline,torch-plain"
    assert run.main([*words, "--out", str(out), "--providers", asked]) == 0
    found = {(row["provider"], row["mode"]): row for row in rows.read(out)}
    assert len(found) == 8
    for mode in ("forward", "backward"):
        refused, forced = found["fusedrnn-step", mode], found["fusedrnn-baseline", mode]
        assert (refused["gate"], refused["gate_worst"], refused["speedup"]) == ("unable", "a kernel for cuda", None)
        assert forced["kernel"] == "fused/baseline" and forced["speedup"] > 0 and forced["floor_seconds"] > 0
    printed = capsys.readouterr().out
    assert "unable (a kernel for cuda)" in printed and "2 that cannot be run" in printed


def test_settings_of_a_provider_end_with_it(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_KERNEL", "torch")
    monkeypatch.delenv("FUSEDRNN_CPU_ISA", raising=False)
    with registry.provider_named("fusedrnn-baseline").around():
        assert (os.environ["FUSEDRNN_CPU_ISA"], os.environ["FUSEDRNN_KERNEL"]) == ("baseline", "torch")
    assert "FUSEDRNN_CPU_ISA" not in os.environ and os.environ["FUSEDRNN_KERNEL"] == "torch"
    before = torch.backends.mkldnn.enabled
    with registry.provider_named("torch-plain").around():
        assert not torch.backends.mkldnn.enabled and not torch.backends.cudnn.enabled
    assert torch.backends.mkldnn.enabled == before


def test_a_run_out_of_time_names_what_it_left_out(monkeypatch, capsys):
    monkeypatch.setattr(run, "QUICK", dataclasses.replace(run.QUICK, minutes=0.0))
    assert run.main(["--quick", "--no-memory", "--only", "gru/inference/T1-"]) == 0
    printed = capsys.readouterr().out
    assert "no time for 1 cases: gru/inference/T1-B1-I64-H64" in printed and "unable (no time was left)" in printed


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


def test_a_format_of_its_own_for_tf32():
    names = {case.name for case in suites.cases("gpu", "gru/training/T1000-", device="cuda")}
    assert names == {"gru/training/T1000-B1-I64-H64" + tail for tail in ("", "/tf32", "/bfloat16", "/float16")}
    case = shapes.Case(shapes.Shape(9, 4, 8, 16, why=".", source="-"), "gru", "inference", "tf32")
    assert (case.stored, case.itemsize) == ("float32", 4)
    settings = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for dtype, asked in (("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")):
        with machine.precision(dtype, "cuda"):
            assert [setting.fp32_precision for setting in settings] == [asked] * 2
        assert [setting.fp32_precision for setting in settings] == before
    with machine.precision("tf32", "cpu"):
        assert [setting.fp32_precision for setting in settings] == before


def test_what_the_sanitizers_watch_runs(engine, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", torch.backends.cudnn.rnn.fp32_precision)
    gpu.small(torch.get_default_device().type)
    assert capsys.readouterr().out == "every kernel ran\n"


def test_a_gpu_run_starts_before_anything_is_built():
    code = "import sys; sys.modules['fusedrnn'] = None; import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, check=True)


def test_parts_of_a_gpu_run_are_kept_in_time(tmp_path):
    parts = gpu.parts("python", tmp_path)
    assert [name for name, _, _ in parts] == ["build", "tests", "exchange", "speed", "memcheck", "racecheck", "synccheck"]
    assert sum(seconds for _, _, seconds in parts) <= 60 * gpu.MINUTES
    assert gpu.run("a", "echo said; exit 3", 5, tmp_path / "a.txt")[0] == "FAILED"
    assert gpu.run("b", "echo said", 5, tmp_path / "b.txt")[0] == "ok" and (tmp_path / "b.txt").read_text() == "said\n"
    assert gpu.run("c", "echo said; sleep 60", 0.3, tmp_path / "c.txt")[0] == "out of time"
    assert (tmp_path / "c.txt").read_text() == "said\n"


@pytest.mark.parametrize("cell, mode, dtype, changes, algorithm", [
    ("lstm", "inference", "float16", {}, "persist"),
    ("lstm", "training", "float16", {}, "persist"),
    ("lstm", "training", "bfloat16", {}, "standard"),
    ("gru", "training", "float16", {}, "standard"),
    ("lstm", "training", "float16", {"B": 12}, "standard"),
    ("lstm", "training", "float16", {"layers": 2}, "standard"),
    ("lstm", "training", "float32", {"H": 160}, "persist-small+standard"),
    ("rnn", "inference", "float32", {"H": 384}, "persist-small"),
    ("gru", "training", "float32", {"H": 128}, "persist-small"),
    ("gru", "training", "float32", {"H": 128, "packed": True}, "standard"),
])  # fmt: skip
def test_cudnn_algorithm(cell, mode, dtype, changes, algorithm):
    sizes = {"T": 9, "B": 64, "I": 512, "H": 512} | changes
    assert providers.cudnn_algorithm(shapes.Case(shapes.Shape(**sizes, why=".", source="-"), cell, mode, dtype)) == algorithm
