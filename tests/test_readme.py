"""The documents are true: every block of code in them runs, parses or is quoted, and every file and link in them is there.

python   The blocks of one document run in order, in one namespace. One that names a file is a quotation (documents.py).
text     What the python above it prints; "..." stands for anything.
sh       Each line: make has the target and the variable, a program parses its words, pip knows its options; what is cheap
         runs.
cpp      A quotation of the file it names, or, as a diff, part of the walk that tests/test_add_a_cell.py takes.
"""

import argparse
import contextlib
import doctest
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch

from documents import DOCUMENTS, README, ROOT, all_blocks, apply_diff, blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")  # runpy
BLOCKS = all_blocks()
MAKEFILE = (ROOT / "Makefile").read_text()
SOURCES = [path for folder in ("fusedrnn", "csrc", "tests", "benchmarks", "examples", "docs", ".ci")
           for path in (ROOT / folder).rglob("*") if path.is_file()] + [path for path in ROOT.iterdir() if path.is_file()]
COMMANDS = [(block, line) for block in BLOCKS if block.kind == "sh" for line in block.text.splitlines() if line.strip()]


def of_kind(*kinds):
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind in kinds], ids=str)


def test_no_block_goes_unchecked():
    for block in BLOCKS:
        assert block.kind in ("python", "text", "sh", "cpp", "diff"), f"{block}: no test knows blocks of kind {block.kind!r}"
        assert block.kind != "cpp" or block.names, f"{block}: its first line must name the file that it quotes"
    assert {block.kind for block in blocks(README)} == {"python", "text", "sh", "cpp", "diff"}


# ---- python, and what it prints


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, printed, pending = {}, "", None
    for block in blocks(path):
        if block.kind == "text" and not block.generated:  # a generated one is compared by the test of what writes it
            assert pending, f"{block}: no python stands above it"
            right = doctest.OutputChecker().check_output(block.text, printed, doctest.ELLIPSIS)
            assert right, f"{block} does not show what {pending} prints:\n{printed}"
            pending = None
        elif block.kind == "python" and not block.names:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * block.line + block.text, str(path), "exec"), namespace)
            printed, pending = out.getvalue(), block


def test_the_examples_are_there():
    """The first block is the promise itself, and `explain` says that the engine runs."""
    first, *others = [block.text for block in blocks(README) if block.kind == "python"]
    assert "fusedrnn.LSTM(" in first and "torch.testing.assert_close" in first and len(first.splitlines()) <= 14
    assert any("fusedrnn.convert(" in text for text in others) and any("fusedrnn.explain(" in text for text in others)


# ---- quotations


@of_kind("cpp", "python")
def test_quotations_are_true(block):
    if block.names and not block.is_new:
        assert block.body.strip() in (ROOT / block.names).read_text(), f"{block} is not in {block.names}"


@of_kind("cpp", "python", "diff")
def test_new_files_are_new(block):
    if block.is_new:
        assert not (ROOT / block.names).exists()


def test_a_wrong_diff_is_refused(tmp_path):
    (tmp_path / "file").write_text("one\ntwo\ntwo\n")
    for wrong in (" three\n+four\n", " two\n+four\n", " one\n"):
        with pytest.raises(AssertionError):
            apply_diff(f"--- file\n{wrong}", tmp_path)
    apply_diff("--- file\n one\n+and a half\n@@\n-two\n-two\n+2\n", tmp_path)
    assert (tmp_path / "file").read_text() == "one\nand a half\n2\n"


# ---- the shell


class Parsed(Exception):
    """A program's words were understood; it shall not run."""


def check_make(words):
    variables = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.M))
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    assert set(settings) <= variables, f"the Makefile has the variables {variables}"
    for target in [word for word in words if "=" not in word]:
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.M)
        assert recipe and re.search(rf"^\.PHONY:.*\b{target}\b", MAKEFILE, re.M), f"the Makefile has no {target}"
        if "ARGS" in settings:
            (program,) = re.findall(r"\$\(RUN\) (.*) \$\(ARGS\)", recipe[1])
            check_python(shlex.split(f"{program} {settings['ARGS']}"))


def check_python(words):
    assert words[0] == "-m", "only modules"
    module, arguments = words[1], words[2:]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in arguments if "/" in word), "no such test"
        assert all(re.search(rf"^  (-\w, )?{word}\b", pytest_help(), re.M) for word in arguments if word.startswith("-"))
        return
    cheap = module.startswith("fusedrnn.")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with contextlib.nullcontext() if cheap else pytest.raises((Parsed, SystemExit)) as stopped:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert cheap or stopped.type is Parsed or stopped.value.code == 0, f"{module} refuses {arguments}"


@functools.cache
def pytest_help():
    return subprocess.run([sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, cwd=ROOT).stdout


@functools.cache
def pip_help(command):
    words = [sys.executable, "-m", "pip", command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def check_pip(words):
    command, known = words[0], pip_help(words[0])
    needed = re.findall(r'"([^"]+)"', re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1])
    words = iter(words[1:])
    for word in words:
        if word.startswith("-"):
            option = re.search(rf"^  (?:-\w, )?{word}\b(?:, --[\w-]+)?(?: <(\w+)>)?", known, re.M)
            assert option, f"pip {command} has no option {word}"
            if option[1] and (value := next(words)) and word == "-r":
                assert (ROOT / value).exists(), f"no {value}"
        else:
            assert word in [".", "fusedrnn", "wheel", *needed], f"{word}: not what pyproject.toml requires"


CHECKS = {"make": check_make, "python": check_python, "pip": check_pip}


@pytest.mark.parametrize("block, line", COMMANDS, ids=[f"{block} {line.split('#')[0].strip()}" for block, line in COMMANDS])
def test_command(block, line):
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        assert is_variable(words.pop(0).split("=")[0])
    program, *rest = words
    assert program in CHECKS, f"{block}: no test knows {program!r}"
    CHECKS[program](rest)


@pytest.mark.parametrize("command", [
    "make dance", "make test DANCE=1", 'make bench ARGS="--dance"', "python -m benchmarks.run --suite dance",
    "python -m dance", "python -m pytest tests/test_dance.py", "python -m pytest tests --dance", "pip install --dance .",
    "pip install torchdance", "pip dance .",
])  # fmt: skip
def test_a_wrong_command_is_found(command):
    program, *rest = shlex.split(command)
    with pytest.raises((AssertionError, SystemExit, ImportError, subprocess.CalledProcessError)):
        CHECKS[program](rest)


# ---- what the text names


def is_variable(name):
    readers = ["setup.py", "Makefile", *(f"{folder}/{path.name}" for folder in ("fusedrnn", "csrc/cpu", "benchmarks")
                                         for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".cpp", ".h"))]
    return any(re.search(rf"\b{name}\b", (ROOT / reader).read_text()) for reader in readers)


def prose(path):
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_it_names_is_there(path):
    """Files, folders, variables and make's targets in `backticks`."""
    for name in re.findall(r"`([^`\n]+)`", prose(path)):
        if re.fullmatch(r"[\w./-]+(\.(py|h|cpp|inl|cu|cuh|md|json|toml|txt|svg|in)|/)", name):
            found = (ROOT / name).exists() or any(str(source).endswith(f"/{name}") for source in SOURCES)
            assert found, f"there is no {name}"
        elif re.fullmatch(r"[A-Z]+(_[A-Z]+)+", name):
            assert is_variable(name), f"nothing reads {name}"
        elif name.startswith(("make ", "python -m ")) and "..." not in name:
            program, *rest = shlex.split(name)
            CHECKS[program](rest)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            to = (path.parent / name) if name else path
            assert to.exists(), f"{path.name} links to {target}"
            headings = re.findall(r"^#+ (.*)", to.read_text(), re.M) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, f"{path.name} links to {target}"


def test_a_newcomer_reads_it_in_ten_minutes():
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", prose(README), flags=re.S)
    assert len(text.split()) < 2200, "at some 220 words a minute"
