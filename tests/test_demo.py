"""The demo, examples/digits.py: both trainings agree and learn, MNIST is read, what is wrong is said in one line."""

import fcntl
import gzip
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from examples import common, digits, mnist

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r" *(\d+) +([\d.]+) +([\d.]+) +([\d.]+)% +([\d.]+)% +([\d.]+) +([\d.]+)")


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    """No window for the picture."""
    monkeypatch.setenv("MPLBACKEND", "agg")


def run(*words):
    return common.main(digits.parse, digits.run, [str(word) for word in words])


def rows(text):
    return [[float(number) for number in match.groups()] for match in map(ROW.fullmatch, text.splitlines()) if match]


def test_the_job(capsys, tmp_path):
    """As `make demo` runs it."""
    assert run("--plot", tmp_path / "digits.png") == 0
    output = capsys.readouterr().out
    table = rows(output)
    assert [row[0] for row in table] == list(range(1, 26))
    for _, torch_loss, loss, torch_accuracy, accuracy, *_ in table:
        assert loss == pytest.approx(torch_loss, rel=1e-2, abs=1e-4)
        assert accuracy == pytest.approx(torch_accuracy, abs=1.0)
    assert table[0][1] == pytest.approx(table[0][2], abs=1e-5)  # before rounding has been multiplied by training
    assert min(table[-1][3:5]) > 95
    truth, stock, ours = (re.search(rf"^{name} +((?:\d ?)+)$", output, re.M)[1] for name in ("truth", *common.PACKAGES))
    assert len(truth.split()) == len(stock.split()) == len(ours.split()) == 10
    percent = f"{table[-1][3]:.2f}% with torch, {table[-1][4]:.2f}% with fusedrnn"
    assert re.search(rf"^result: LSTM .*{percent}.* [\d.]+x as fast$", output.splitlines()[-1])
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("cell", "read"), [("gru", "output"), ("RNN", "hidden")])
def test_other_layers_and_sizes(capsys, tmp_path, cell, read):
    words = f"--cell {cell} --read {read} --epochs 2 --batch 100 --hidden 19 --layers 2 --seed 3"
    assert run(*words.split(), "--plot", tmp_path / "curve.svg") == 0
    output = capsys.readouterr().out
    table = rows(output)
    assert len(table) == 2 and table[-1][1] == pytest.approx(table[-1][2], abs=1e-4)
    assert f"{cell.upper()} of 19 units x 2, batch 100" in output
    assert "<svg" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize(("cell", "sizes"), [("RNN", "128 units x 2, batch 100"), ("LSTM", "64 units x 1, batch 64")])
def test_sizes_of_tutorials(capsys, cell, sizes):
    assert run("--cell", cell, "--epochs", 1, "--module", "fusedrnn", "--plot", "none") == 0
    assert f"{cell} of {sizes}" in capsys.readouterr().out


def test_two_ways_to_read_the_last_step(capsys):
    outputs = []
    for read in ("output", "hidden"):
        assert run("--read", read, "--epochs", 2, "--module", "torch", "--plot", "none") == 0
        outputs.append(capsys.readouterr().out)
    assert "fusedrnn" not in outputs[0] and "picture" not in outputs[0]
    losses = [re.findall(r"^ +\d +([\d.]+)", output, re.M) for output in outputs]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def idx(array):
    """A tensor of bytes as an idx file."""
    head = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    return head + bytes(array.flatten().tolist())


@pytest.fixture
def mnist_folder(tmp_path):
    """A folder with MNIST's four files, 90 and 30 images of noise; a mix of plain and .gz."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 90), ("t10k", 30)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator)
        labels = torch.arange(count) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def run_with(folder, tmp_path):
    return run("--data", folder, "--epochs", 1, "--hidden", 8, "--plot", tmp_path / "a.png")


def test_mnist(mnist_folder, capsys, tmp_path):
    assert run_with(mnist_folder, tmp_path) == 0
    assert "90 images of 28x28 to learn from, 30 to test" in capsys.readouterr().out
    (train, _), (_, labels) = mnist.load_mnist(mnist_folder)
    assert train.shape == (90, 28, 28) and 0 <= train.min() and train.max() <= 1 and labels.tolist()[:3] == [0, 1, 2]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(("name", "spoil", "says"), [
    (LABELS, lambda whole: None, f"has no {LABELS}"),
    (LABELS, lambda whole: whole[:-7], "cut short"),
    (IMAGES, lambda whole: whole[:-7], "cannot be read"),
    (IMAGES, lambda whole: b"<html>", "cannot be read"),
    (LABELS, lambda whole: b"<html>not found", "no idx file"),
    (LABELS, lambda whole: b"", "no idx file"),
    (LABELS, lambda whole: idx(torch.arange(5)), "90 train images and 5 labels"),
    (LABELS, lambda whole: idx(torch.arange(90)), "digits are 0 to 9"),
    (IMAGES, lambda whole: gzip.compress(idx(torch.zeros(90, 8, 8, dtype=torch.int64))), "of two sizes, 8x8 and 28x28"),
])  # fmt: skip
def test_wrong_files(mnist_folder, capsys, tmp_path, name, spoil, says):
    content = spoil((mnist_folder / name).read_bytes())
    (mnist_folder / name).unlink()
    if content is not None:
        (mnist_folder / name).write_bytes(content)
    refused(run_with(mnist_folder, tmp_path), capsys, says)


def refused(status, capsys, says):
    assert status == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("digits: ") and says in output.err


def test_wrong_paths(capsys, tmp_path):
    refused(run_with(tmp_path / "nowhere", tmp_path), capsys, "is not a folder")
    refused(run_with(tmp_path, tmp_path), capsys, "has no train-images-idx3-ubyte")


@pytest.mark.parametrize("words", [
    "--epochs 0", "--batch -1", "--hidden x", "--cell CNN", "--module jax", "--read middle", "--seed -1",
    "--plot digits.txt", "--plot nowhere/digits.png",
])  # fmt: skip
def test_wrong_options(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        run(*words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"digits: error: argument {words.split()[0]}: ")


def test_ctrl_c_leaves_a_clean_terminal(tmp_path):
    """On a terminal of its own, where the progress bar is drawn, the key itself is sent."""
    command = [sys.executable, "-m", "examples.digits", "--epochs", "10000", "--plot", str(tmp_path / "a.png")]
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whoever runs the tests in the background ignores
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # of no width, it would show no bar
    text, sent, deadline = "", False, time.monotonic() + 120
    try:
        while select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the program has ended
                break
            drawn = "fusedrnn:" in text and "torch:" in text and text.endswith("]")  # the bar
            if not sent and drawn and len(rows(text.replace("\r", "\n"))) >= 2:
                sent = os.write(terminal, b"\x03")
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(terminal)
    assert sent and status == 130, text
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is not hidden
    # All that follows the last row: the bar is overwritten with blanks, and the line erased.
    assert text.endswith("\r\x1b[2Kdigits: stopped\r\n")
