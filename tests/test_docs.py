"""The reference of the API: every public thing is described, and `make docs` writes pages without a warning
or a broken link."""

import ast
import dataclasses
import functools
import html.parser
import importlib
import inspect
import pkgutil
import posixpath
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

import fusedrnn
from documents import ROOT

pytest.importorskip("pdoc")

MODULES = [f"fusedrnn.{name}" for _, name, _ in pkgutil.iter_modules(fusedrnn.__path__) if not name.startswith("_")]
EXAMPLES = ["RNN", "LSTM", "GRU", "IndRNN", "SLSTM", "LayerNormLSTM", "LayerNormGRU", "RNNCell", "LSTMCell", "GRUCell", "convert",
            "explain", "freeze.freeze", "patch",
            "onnx.export", "functional.rnn", "functional.lstm", "functional.gru", "reference.layer", "testing.compare_modules",
            "weights.build", "weights.from_keras", "weights.to_keras", "weights.from_onnx", "weights.to_onnx",
            "weights.read_onnx", "weights.from_cudnn", "weights.to_cudnn", "fuzz.random_case"]  # fmt: skip


def is_public(name):
    return not name.startswith("_")


def things():
    """{full name: class, function, method or property} of all that fusedrnn defines under public names."""
    found = {}
    for name in MODULES:
        for member, thing in vars(importlib.import_module(name)).items():
            if not is_public(member) or getattr(thing, "__module__", "") != name or not callable(thing):
                continue
            if inspect.isclass(thing):
                inner = {key: getattr(value, "__func__", value) for key, value in vars(thing).items() if is_public(key)}
                found |= {f"{name}.{member}.{key}": value for key, value in inner.items()
                          if isinstance(value, property) or inspect.isfunction(value) and value.__module__ == name}
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{name}.{member}"] = thing
    return found


THINGS = things()
FUNCTIONS = {name: thing for name, thing in THINGS.items() if inspect.isfunction(thing)}


def section(doc, name):
    """The text of a Google section, "" if it is not there."""
    found = re.search(rf"^{name}:\n((?:[ ]{{4}}.*\n?|\n(?=[ ]{{4}}))+)", doc, re.M)
    return found[1] if found else ""


@functools.cache
def body(function):
    """The nodes of a function's own code, without those of functions in it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    inner = {node for child in ast.walk(definition) if child is not definition
             and isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)) for node in ast.walk(child)}
    return [node for node in ast.walk(definition) if node not in inner]


def doc_of(thing):
    """Its own docstring: what a base class says is not about it."""
    return inspect.cleandoc(thing.__doc__ or "")


@pytest.mark.parametrize("name", THINGS)
def test_it_is_described(name):
    doc = doc_of(THINGS[name])
    assert len(doc.split()) >= 3, "a docstring is wanting"
    first = doc.splitlines()[0]
    assert first[0] != first[0].lower() or first[0] in '`("' or not first[0].isalpha() or "=" in first, first


def described(doc, name):
    """The names that a section describes: "input, hx: as for the call" has two."""
    items = re.findall(r"^ {4}(\S.*?):", section(doc, name), re.M)
    return {word for item in items for word in item.split(", ")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_results_and_errors_are_described(name):
    function, doc = FUNCTIONS[name], doc_of(FUNCTIONS[name])
    assert described(doc, "Args") == set(inspect.signature(function).parameters) - {"self", "_"}
    gives = any(isinstance(node, ast.Return) and node.value is not None for node in body(function))
    assert bool(section(doc, "Returns")) == gives, "Returns: there, and only there, where something is returned"
    raises = [node.exc for node in body(function) if isinstance(node, ast.Raise) and node.exc]
    assert {ast.unparse(exc.func) for exc in raises} - {"NotImplementedError"} <= described(doc, "Raises")


@pytest.mark.parametrize("name", [name for name, thing in THINGS.items() if inspect.isclass(thing)])
def test_constructors_and_fields_are_described(name):
    cls, doc = THINGS[name], doc_of(THINGS[name])
    if dataclasses.is_dataclass(cls):
        assert described(doc, "Attributes") == {field.name for field in dataclasses.fields(cls)}
    elif hasattr(fusedrnn, cls.__name__):
        assert described(doc, "Args") == set(inspect.signature(cls).parameters) and section(doc, "Raises")


@pytest.mark.parametrize("name", EXAMPLES)
def test_main_things_have_examples(name):
    """tests/test_api.py runs them."""
    found = [thing for full, thing in THINGS.items() if full.endswith(f".{name}")]
    assert found and all(">>> " in doc_of(thing) for thing in found)


# ---- the pages


class Page(html.parser.HTMLParser):
    """The places that a page has and those that it links to; the marks of its text."""

    def __init__(self, text):
        super().__init__()
        self.places, self.links, self.tags = set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.places.add(attributes.get("id"))
        if "href" in attributes:
            self.links.append(attributes["href"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{path: (text, Page)}, written by the very command of `make docs` but for the folder."""
    folder = tmp_path_factory.mktemp("docs")
    steps = ["make", "-n", "docs", "VENV=0", f"PYTHON={sys.executable}"]
    steps = subprocess.run(steps, cwd=ROOT, capture_output=True, text=True).stdout
    (command,) = [line for line in steps.replace("\\\n", " ").splitlines() if " -m pdoc " in line]
    assert " -o build/docs " in command and " -W error " in command
    words = [str(folder) if word == "build/docs" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}
    return {path: (text, Page(text)) for path, text in texts.items()}


def page_of(module):
    return f"{module.replace('.', '/')}.html"


def test_every_module_has_a_page(pages):
    assert set(pages) == {"index.html", "fusedrnn.html", *map(page_of, MODULES)}


@pytest.mark.parametrize("name", THINGS)
def test_it_is_on_its_page(pages, name):
    package, module, member = name.split(".", 2)
    exported = getattr(sys.modules[f"{package}.{module}"], "__all__", [member.split(".")[0]])
    assert (member in pages[page_of(f"{package}.{module}")][1].places) == (member.split(".")[0] in exported)


def test_what_is_exported_is_on_the_first_page(pages):
    places = pages["fusedrnn.html"][1].places
    assert {name for name in fusedrnn.__all__ if name not in ("__version__", "functional")} <= places


def test_no_link_is_broken(pages):
    count = 0
    for path, (_, page) in pages.items():
        for link in page.links:
            if re.match(r"https?:|data:", link):
                continue
            target, _, place = link.partition("#")
            where = posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) if target else path
            assert where in pages, f"{path}: {link}"
            assert not place or place in pages[where][1].places, f"{path}: {link}"
            count += 1
    assert count > 100


def test_markup_renders(pages):
    """A * between two shapes is no emphasis, a section's name no text, and no ` is left over."""
    for path, (text, page) in pages.items():
        said = re.sub(r"<style>.*?</style>|<script.*?</script>|<pre.*?</pre>|<code.*?</code>", "", text, flags=re.S)
        assert "em" not in page.tags, f"{path}: {re.findall(r'.*<em>.*', text)[:3]}"
        assert not re.search(r"<p>\s*(Args|Returns|Raises|Call|Example|Attributes)\b:", said), path
        assert "`" not in said and "::" not in said, f"{path}: {re.findall(r'.*(?:`|::).*', said)[:3]}"
