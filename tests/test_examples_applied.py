"""Translation, sentiment, weather, streaming, two processes: both packages agree and learn; what is wrong takes one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import parallel, sentiment, streaming, translate, weather

ROOT = Path(__file__).resolve().parent.parent
EVERY = [translate, sentiment, weather, streaming, parallel]
EPOCH = re.compile(r"epoch +(\d+) +(\w+) +(?:training: )?loss ([\d.]+)(.*)")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """More threads gain little in such small steps and lose much on a busy machine. No window for the picture."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def text_of(example, words, capsys):
    """What a run prints; its last line is the result."""
    assert example.main(words.split()) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("result: ") and output.count("result: ") == 1
    return output


def losses(text):
    """{package: [(loss, rest of the line) of each epoch]}"""
    found = {}
    for _, name, loss, rest in EPOCH.findall(text):
        found.setdefault(name, []).append((float(loss), rest))
    return found


def assert_agree_and_fall(text, epochs, tolerance=1e-3):
    by_name = {name: [loss for loss, _ in rows] for name, rows in losses(text).items()}
    assert set(by_name) == {"torch", "fusedrnn"} and {len(rows) for rows in by_name.values()} == {epochs}
    assert by_name["fusedrnn"] == pytest.approx(by_name["torch"], rel=tolerance)
    assert all(rows[-1] < rows[0] for rows in by_name.values())


def test_translate(capsys):
    text = text_of(translate, "--epochs 2 --batches 40 --batch 32 --hidden 24 --test 60 --seed 3", capsys)
    assert_agree_and_fall(text, 2, 2e-2)  # where the writer goes on from its own letters, rounding may choose another
    rows = re.findall(r"^.+? +([\d?-]{10})  ([\d?-]{10})  (\d{4}-\d\d-\d\d)$", text, re.M)
    assert len(rows) == 10
    assert "as fast" in text


def test_translate_learns_one_spelling(capsys, monkeypatch):
    """The whole task takes a minute; one spelling, a few seconds."""
    monkeypatch.setattr(translate, "SPELLINGS", ["{y}.{mm}.{dd}"])
    text = text_of(translate, "--module fusedrnn --epochs 5 --batches 90 --batch 32 --test 200 --forcing 1", capsys)
    assert float(re.search(r"fusedrnn ([\d.]+)%", text.splitlines()[-1])[1]) > 90


def test_translate_forced_and_not_forced_are_one_network():
    """Shown its own letters as if they were the truth, the writer gives the scores that it gave step by step."""
    torch.manual_seed(0)
    model = translate.Translator(translate.common.PACKAGES["fusedrnn"], 16)
    texts = [translate.encode("3 may 2021"), translate.encode("05/03/21")]
    with torch.no_grad():
        free = model(texts)
        torch.testing.assert_close(model(texts, free.argmax(-1)), free)


def test_spellings():
    date = translate.datetime.date(2021, 5, 3)
    said = {translate.spell(date, spelling) for spelling in translate.SPELLINGS}
    assert {"3 may 2021", "monday, the 3rd of may 2021", "03/05/21", "may 3rd '21"} <= said
    endings = [translate.spell(date.replace(day=day), "{nth}") for day in (1, 2, 11, 12, 13, 21, 22, 23, 30)]
    assert endings == ["1st", "2nd", "11th", "12th", "13th", "21st", "22nd", "23rd", "30th"]


def test_sentiment(capsys, monkeypatch):
    train, test = sentiment.load_snippets()
    assert (len(train), len(test)) == (8454, 2114) and not {text for text, _ in train[:99]} & {text for text, _ in test}
    monkeypatch.setattr(sentiment, "load_snippets", lambda: (train[:800], test[:200]))
    text = text_of(sentiment, "--epochs 4 --hidden 16 --batch 20", capsys)
    assert_agree_and_fall(text, 4, 5e-2)
    for _, rest in losses(text)["fusedrnn"]:
        assert re.fullmatch(r", accuracy [\d.]+% +test: loss [\d.]+, accuracy [\d.]+%", rest)
    assert len(re.findall(r"^(?:good|bad) +(?:good|bad) +(?:good|bad) +\S", text, re.M)) == 8


@pytest.fixture
def imdb(tmp_path):
    """A folder as IMDB's, of 2 x 2 x 6 texts."""
    for part in ("train", "test"):
        for label, words in (("pos", "a good film"), ("neg", "<br />a bad film")):
            folder = tmp_path / "aclImdb" / part / label
            folder.mkdir(parents=True)
            for i in range(6):
                (folder / f"{i}_7.txt").write_text(f"{words} {i}")
    return tmp_path / "aclImdb"


def test_imdb(imdb, capsys):
    (imdb / "train" / "pos" / "0_7.txt").write_text("")  # a text of no words is a text
    text = text_of(sentiment, f"--data {imdb} --epochs 20 --batch 3", capsys)
    assert "12 reviews to learn from, 12 to test" in text
    assert "result: test accuracy: torch 100.0%, fusedrnn 100.0%" in text
    train, _ = sentiment.load_imdb(imdb)
    assert {(text.strip()[:5], label) for text, label in train} == {("", 1), ("a goo", 1), ("a bad", 0)}


def no_folder(imdb):
    imdb.rename(imdb.with_name("other"))


def empty_folder(imdb):
    for file in (imdb / "test" / "neg").iterdir():
        file.unlink()


def no_text(imdb):
    (imdb / "train" / "neg" / "3_7.txt").write_bytes(b"\xff\xfe\x00")


def folder_for_text(imdb):
    (imdb / "train" / "pos" / "9_7.txt").mkdir()


@pytest.mark.parametrize(("spoil", "says"), [
    (no_folder, "is not a folder"),
    (empty_folder, "has no .txt files"),
    (no_text, "3_7.txt cannot be read"),
    (folder_for_text, "9_7.txt cannot be read"),
])  # fmt: skip
def test_wrong_imdb(imdb, capsys, spoil, says):
    spoil(imdb)
    refused(sentiment, f"--data {imdb}", capsys, says)


def refused(example, words, capsys, says):
    assert example.main(words.split()) == 2
    output = capsys.readouterr()
    name = example.__name__.removeprefix("examples.")
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith(f"{name}: ") and says in output.err


@pytest.mark.parametrize(("example", "words", "says"), [
    (translate, "--forcing 1.5", "0 to 1"),
    (translate, "--forcing nan", "0 to 1"),
    (translate, "--test 36500 --batch 100", "36,525 dates"),
    (weather, "--ahead 25", "at most 24"),
    (weather, "--window 900", "at most 672"),
    (parallel, "--batch 33", "a multiple of 2"),
])  # fmt: skip
def test_refused(capsys, example, words, says):
    refused(example, words, capsys, says)


@pytest.mark.parametrize("example", EVERY, ids=lambda example: example.__name__)
@pytest.mark.parametrize("words", ["--epochs 0", "--hidden x", "--module cudnn"])
def test_wrong_words(capsys, example, words):
    with pytest.raises(SystemExit) as stopped:
        example.main(words.split())
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_weather(capsys, tmp_path):
    text = text_of(weather, f"--epochs 2 --hidden 8 --batch 256 --window 12 --plot {tmp_path / 'a.png'}", capsys)
    rows = re.findall(r"^(.+?) +(torch|fusedrnn) +loss ([\d.]+) to ([\d.]+)  error ([\d.]+) +[\d.]+ s$", text, re.M)
    assert [row[:2] for row in rows[:2]] == [("RNN", "torch"), ("RNN", "fusedrnn")] and len(rows) == 12
    for stock, ours in zip(rows[::2], rows[1::2]):
        assert [float(x) for x in ours[2:]] == pytest.approx([float(x) for x in stock[2:]], abs=0.011)
        assert float(ours[3]) < float(ours[2])
    naive = min(float(error) for error in re.search(r"same as now ([\d.]+), same as a day before ([\d.]+)", text).groups())
    assert min(float(row[4]) for row in rows) < naive
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_weather_is_in_celsius_and_looks_at_the_past_alone():
    hours, values = weather.load()
    assert all(b - a == hours[1] - hours[0] for a, b in zip(hours, hours[1:])) and len(values) == len(hours)
    temperature = values[:, 0]
    assert temperature.isnan().any() and -15 < temperature.nan_to_num().min() and temperature.nan_to_num().max() < 40
    inputs, _, _ = weather.features(hours, values, 3000)
    assert not inputs.isnan().any()
    values[5000:] = 7.0  # what comes later changes nothing before, the scale included
    assert torch.equal(weather.features(hours, values, 3000)[0][:5000], inputs[:5000])


@pytest.fixture
def fewer_hours(monkeypatch):
    hours, values = weather.load()
    monkeypatch.setattr(weather, "load", lambda: (hours[:2600], values[:2600]))


@pytest.mark.usefixtures("fewer_hours")
@pytest.mark.parametrize("kind", ["rnn", "LSTM", "gru"])
def test_streaming(capsys, kind):
    text = text_of(streaming, f"--epochs 2 --hidden 16 --batch 16 --kind {kind}", capsys)
    assert_agree_and_fall(text, 2)
    rows = re.findall(r"^(\w+) +(layer|cells) +\d+ us a step, error ([\d.]+) degrees, .* at most (\d\S+)$", text, re.M)
    assert len(rows) == 4 and max(float(row[3]) for row in rows) < streaming.SAME
    assert len({row[2] for row in rows}) == 1


@pytest.mark.usefixtures("fewer_hours")
def test_streaming_notices_a_state_that_is_not_carried(capsys, monkeypatch):
    monkeypatch.setattr(streaming, "one_step_calls", lambda model: lambda hour: model(hour.view(1, 1, -1))[0])
    with pytest.raises(AssertionError, match="differs from the whole sequence"):
        streaming.main("--module fusedrnn --epochs 1 --hidden 8".split())


@pytest.mark.usefixtures("fewer_hours")
@pytest.mark.parametrize(("example", "words"), [
    (translate, "--epochs 1 --batches 2 --test 20"),
    (sentiment, "--epochs 1 --hidden 4"),
    (weather, "--epochs 1 --hidden 4 --batch 512 --window 3 --plot none"),
    (streaming, "--epochs 1 --hidden 8 --kind rnn"),
])  # fmt: skip
def test_one_package_alone(capsys, imdb, example, words):
    """`parallel` alone is below, where it is stopped."""
    data = f"--data {imdb}" if example is sentiment else ""
    text = text_of(example, f"--module torch {words} {data}", capsys)
    assert "torch" in text and "fusedrnn" not in text and "as fast" not in text


SHORT = ["--epochs", "1", "--hidden", "8", "--batch", "64"]


def differences(text):
    """How far training moved the weights, and by how much its two ways differ, for each package."""
    found = re.findall(r"^(\w+) +training moved the weights by up to ([\d.]+); .* at most (\S+);", text, re.M)
    return {name: (float(way), float(gap)) for name, way, gap in found}


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]],
                         ids=["spawned", "torchrun"])  # fmt: skip
def test_two_processes(launcher):
    command = [sys.executable, *launcher, "-m", "examples.parallel", *SHORT]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("result: ") == 1 and ended.stdout.splitlines()[-1].startswith("result: ")
    found = differences(ended.stdout)
    assert set(found) == {"torch", "fusedrnn"}
    assert all(gap < parallel.SAME and way > 100 * gap for way, gap in found.values())


def children_of(process):
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_there(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("who", ["a process is killed", "Ctrl-C"])
def test_nothing_is_left_running(who):
    command = [sys.executable, "-m", "examples.parallel", "--epochs", "1000", "--hidden", "16", "--module", "fusedrnn"]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        while not program.stdout.readline().startswith("epoch"):
            assert program.poll() is None
        workers = children_of(program.pid)
        assert len(workers) >= 2
        if who == "Ctrl-C":
            program.send_signal(signal.SIGINT)
        else:
            os.kill(workers[-1], signal.SIGKILL)
        _, error = program.communicate(timeout=40)
    finally:
        program.kill()
    assert program.returncode == (130 if who == "Ctrl-C" else 1)
    assert "Traceback" not in error and error.startswith("parallel: ") and error.count("\n") == 1, error
    deadline = time.monotonic() + 10
    while any(map(is_there, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
