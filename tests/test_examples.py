"""Examples: what they print is right: both packages agree, the task is learnt, a wrong word is refused in one line."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import __main__ as together
from examples import characters, common, digits, hello, shapes, writer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"shapes": shapes, "hello": hello, "digits": digits, "characters": characters}
# As short as they still show something.
SHORT = {"shapes": "", "hello": "", "digits": "--epochs 1 --hidden 8 --plot none",
         "characters": "--epochs 1 --steps 3 --hidden 8 --batch 4"}


@pytest.fixture
def output(capsys):
    """output("hello", "--seed 1") is the text that an example prints; its last line says what came of it."""
    def run(name: str, words: str) -> str:
        assert common.main(EXAMPLES[name].parse, EXAMPLES[name].run, words.split()) == 0
        text, errors = capsys.readouterr()
        assert errors == "" and re.fullmatch(r"result: .*\d.*", text.splitlines()[-1]), text
        return text

    return run


def result(text: str) -> str:
    return text.splitlines()[-1]


# ---- what all have in common


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("package", common.PACKAGES)
def test_one_package_alone(output, name, package):
    text = output(name, f"{SHORT[name]} --module {package}")
    (other,) = set(common.PACKAGES) - {package}
    assert re.search(rf"\b{package}\b", text) and not re.search(rf"\b{other}\b|as fast", text)


@pytest.mark.parametrize(("name", "words"), [
    ("shapes", "--hidden 0"), ("hello", "--epochs 1.5"), ("hello", "--seed -1"), ("characters", "--cell CNN"),
    ("characters", "--temperature hot"), ("digits", "--module keras"),
])  # fmt: skip
def test_wrong_words(capsys, name, words):
    with pytest.raises(SystemExit) as stopped:
        common.main(EXAMPLES[name].parse, EXAMPLES[name].run, words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"{name}: error: argument {words.split()[0]}: ")


def test_files_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < (200 if path.name == "common.py" else 150), path


def test_race_times_turns(capsys):
    """Turns alternate, time after stop() does not count, and the median of each package is what is quoted."""
    race, order = common.Race({"torch": torch.nn.Identity(), "fusedrnn": torch.nn.Identity()}, 3, 1), []
    for epoch, name, _ in race:
        order.append((epoch, name))
        race.stop()
        race.step()
        race.stop()
    assert order == [(epoch, name) for epoch in (1, 2, 3) for name in ("torch", "fusedrnn")]
    assert [len(seconds) for seconds in race.seconds.values()] == [3, 3]
    assert max(map(max, race.seconds.values())) < 0.5
    race.seconds = {"torch": [9.0, 3.0, 1.0], "fusedrnn": [0.25, 0.5, 0.02]}
    assert race.ratio() == 12
    assert race.speed_up("a turn") == "; a turn takes 3 s with torch, 250 ms with fusedrnn, 12.00x as fast"


# ---- shapes


def test_shapes(output):
    text = output("shapes", "--steps 6 --batch 2 --inputs 3 --hidden 4")
    table = [line for line in text.splitlines() if re.match(r"(time first|batch first|no batch) +[12] [12] ", line)]
    assert len(table) == 12
    assert re.match(r"batch first +2 2 +\(2, 6, 3\) +\(2, 6, 8\) +\(4, 2, 4\) +\(4, 2, 4\) +\S+ +\S+ +\S+$", table[7])
    assert re.match(r"no batch +1 1 +\(6, 3\) +\(6, 4\) +\(1, 4\) +\(1, 4\) ", table[8])
    differences = [float(number) for line in table for number in line.split()[-3:]]
    assert f"differ by at most {max(differences):.0e} of" in result(text) and max(differences) < 1e-5
    assert "72 calls" in result(text)


def test_shapes_finds_a_difference(monkeypatch):
    """The example's own assertion: with fusedrnn's GRU spoilt, it must fail."""
    class Spoilt(torch.nn.GRU):
        def forward(self, x, state=None):
            output, last = super().forward(x, state)
            return output * (1 + 1e-4), last

    monkeypatch.setattr(common.PACKAGES["fusedrnn"], "GRU", Spoilt)
    with pytest.raises(AssertionError, match="GRU"):
        common.main(shapes.parse, shapes.run, [])


# ---- hello


def test_hello(output):
    text = output("hello", "--seed 1")
    sections = re.split(r"\n(?=(?:cell|module|embedding): )", text)[1:]
    assert len(sections) == 3
    for section in sections:
        rows = re.findall(r"^ +(\d+) +([ehlo]{5}) +([\d.]+) +([ehlo]{5}) +([\d.]+)$", section, re.M)
        assert rows[0][0] == "1" and len(rows) > 2
        for _, word, loss, our_word, our_loss in rows:
            assert word == our_word and float(loss) == pytest.approx(float(our_loss), abs=1e-4)
        assert rows[-1][1] == "ohlol" and "ohlol" not in [row[1] for row in rows[:-1]]
        assert float(rows[-1][2]) < float(rows[0][2])
        assert rows[-1][0] in re.search(r"after ([\d, ]+) epochs with torch and \1 epochs with fusedrnn", result(text))[1]


def test_hello_in_too_few_epochs(output):
    assert "after over 2, over 2, over 2 epochs with torch" in result(output("hello", "--epochs 2 --seed 1"))


# ---- characters


def test_characters(output, tmp_path):
    """A text that is easily learnt. Its bits are far below those of guessing by the frequency of its letters."""
    sentence = "the quick brown fox jumps over the lazy dog\n"
    (tmp_path / "text").write_text(sentence * 2000)
    words = "--hidden 32 --epochs 2 --steps 60 --batch 8 --piece 22 --temperature 0.1"
    text = output("characters", f"--data {tmp_path / 'text'} {words}")
    rows = re.findall(r"^ +(\d+) +([\d.]{10,}) +([\d.]{10,}) +([\d.]{10,})$", text, re.M)
    assert [row[0] for row in rows] == ["1", "10", "100", "200", "300"]
    losses = np.array([[float(loss) for loss in row[1:]] for row in rows])
    assert (np.ptp(losses, axis=1) < 1e-10).all() and (losses[-1] < losses[0] / 2).all()
    epochs = re.findall(r"^epoch (\d), (\w+): learning ([\d.]+), unseen text ([\d.]+)$", text, re.M)
    assert [row[:2] for row in epochs] == [(epoch, name) for epoch in "12" for name in ("torch", "fusedrnn")]
    learning, unseen = np.array([[float(row[2]), float(row[3])] for row in epochs]).reshape(2, 2, 2).transpose(2, 0, 1)
    assert learning[:, 0] == pytest.approx(learning[:, 1], rel=0.02)
    assert unseen[:, 0] == pytest.approx(unseen[:, 1], rel=0.05, abs=0.01)
    assert (learning[1] < learning[0]).all() and (unseen[1] < 1).all()
    assert "the quick brown fox" in text.split("epoch 2, fusedrnn")[1]
    assert re.search(r"GRU .*in bits: ([\d.]+) with torch, ([\d.]+) with fusedrnn; .*x as fast$", result(text))


@pytest.mark.parametrize("cell", ["rnn", "LSTM"])
def test_characters_of_the_library(output, cell):
    text = output("characters", f"{SHORT['characters']} --cell {cell}")
    assert "540,000 characters to learn from, 60,000 to test" in text and f"{cell.upper()} of 8 units" in text
    assert len(set(re.findall(r"unseen text ([\d.]+)", text))) == 1  # three steps: the same to four digits


def test_by_hand_is_the_gradient():
    """Of a plain RNN in numpy, against autograd, where none is clipped: Adagrad's sum of squares after one step."""
    model = writer.Writer(torch.nn, "RNN", 5, 7).double()
    by_hand, piece = characters.ByHand(model), torch.tensor([0, 3, 1, 4, 4, 2, 0, 1])
    loss = by_hand.learn(piece.numpy())
    scores, _ = model(piece[:-1, None])
    wanted = torch.nn.functional.cross_entropy(scores[:, 0], piece[1:])
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-12)
    for name, weight in model.named_parameters():
        np.testing.assert_allclose(by_hand.squares[name], weight.grad.numpy() ** 2, rtol=1e-9, atol=1e-18)


def test_bits_of_carried_state():
    """Scored in pieces or at once, a text has the same bits."""
    model, text = writer.Writer(torch.nn, "GRU", 5, 7), torch.randint(5, (450, 3))
    scores, _ = model(text[:-1])
    wanted = torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten()) / np.log(2)
    assert model.bits(text) == pytest.approx(wanted.item(), rel=1e-5)


def test_streams_are_parts_of_the_text():
    assert writer.streams(torch.arange(11), 3).tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(("content", "words", "says"), [
    (None, "", "cannot be read"),
    (b"\xff\xfe" * 9, "", "cannot be read"),
    (b"too short", "", "a text of 75,000 characters"),
    (b"abc" * 30_000, "--temperature 0", "temperature above 0"),
    (b"abc" * 30_000, "--batch 4000", "a text of 2,040,000 characters"),
])  # fmt: skip
def test_characters_wrong_text(capsys, tmp_path, content, words, says):
    if content:
        (tmp_path / "text").write_bytes(content)
    assert common.main(characters.parse, characters.run, ["--data", str(tmp_path / "text"), *words.split()]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("characters: ") and says in output.err


# ---- all of them in one go


def test_every_example_is_found():
    found = together.find()
    assert set(EXAMPLES) <= set(found) and not {"common", "mnist", "writer", "__main__"} & set(found)
    assert found["shapes"] == [] and found["digits"] == ["--plot", "examples/output/digits.svg"]


def test_all_in_one_go(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(together, "OUTPUT", tmp_path / "output")
    assert together.main(["--only", "shapes"]) == 0
    text = capsys.readouterr().out
    kept = (tmp_path / "output" / "shapes.txt").read_text()
    assert kept.splitlines()[0] == "python -m examples.shapes" and kept in text and "\nresult: 72 calls" in kept
    assert re.fullmatch(r"shapes +[\d.]+ s  result: 72 calls.*", text.splitlines()[-1])
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", "none")  # which the example cannot run with
    assert together.main(["--only", "shapes"]) == 1
    assert re.fullmatch(r"shapes +[\d.]+ s  FAILED with exit status 1", capsys.readouterr().out.splitlines()[-1])


def test_unknown_example():
    run = subprocess.run([sys.executable, "-m", "examples", "--only", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr and "invalid choice: 'nothing'" in run.stderr
