"""README's table of what each library can do at home in PyTorch, from docs/facts.json.

    python -m benchmarks.facts             write the table
    python -m benchmarks.facts --check     change nothing; exit status 1 if README is out of date

docs/facts.json has a row for each ability and in it a cell for each library: a value, then the sources that show it. A
source is a public address, its beginning shortened to a word of "sources" (issue:158007), or the name of a test
(tests/test_facts.py::test_vmap). "?" stands where no source was found, "-" where nobody asks.
"""

from __future__ import annotations

import argparse
import json
import sys

from .machine import ROOT
from .report import markdown, rewritten

UNSOURCED = ("?", "-")  # these values need no source


def load() -> dict:
    return json.loads((ROOT / "docs" / "facts.json").read_text())


def address(source: str, prefixes: dict[str, str]) -> str:
    """The address of a source that is none of our tests; a test's is its file."""
    word, _, rest = source.partition(":")
    return prefixes[word] + rest if word in prefixes else source.partition("::")[0]


def cell_text(cell: list[str], prefixes: dict[str, str]) -> str:
    """The value, linked to its first source, and the numbers of the others."""
    value, *sources = cell
    links = dict.fromkeys(address(source, prefixes) for source in sources)
    return " ".join(f"[{value if n == 1 else n}]({link})" for n, link in enumerate(links, 1)) or value


def table(facts: dict) -> str:
    columns, prefixes = facts["columns"], facts["sources"]
    lines = [[row["ability"], *(cell_text(row[column], prefixes) for column in columns)] for row in facts["rows"]]
    return markdown(["", *columns], lines).replace("---:", "---")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.facts", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if README is out of date")
    check = parser.parse_args(arguments).check
    path = ROOT / "README.md"
    try:
        before = path.read_text()
        after = rewritten(before, {"facts": table(load())})
    except (OSError, ValueError, KeyError) as error:
        print(f"benchmarks.facts: {error}", file=sys.stderr)
        return 1
    if before == after:
        return 0
    if check:
        print("benchmarks.facts: README.md is out of date: run python -m benchmarks.facts", file=sys.stderr)
        return 1
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
