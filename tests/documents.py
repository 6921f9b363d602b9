"""The project's documents as its tests read them: the blocks of code in Markdown, and what they claim to be.

The first line of a block may name a file. `// csrc/cells/gru.h` (or `# fusedrnn/modules.py`): the block quotes that file.
`// new: csrc/cells/ugrnn.h`: the block is a file that the reader makes. A `diff` edits files that are there.
"""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "docs/DESIGN.md"))]
FENCE = re.compile(r"```(\S*)$")
LABEL = re.compile(r"(?://|#) (new: )?(\S+\.\w+)\n")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: the word behind its fence, its text, and whether a program writes this part of the document."""

    path: Path
    line: int
    kind: str
    text: str
    generated: bool

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    @property
    def names(self) -> str | None:
        """The file that the block names, or None."""
        found = LABEL.match(self.text)
        return found and found[2]

    @property
    def is_new(self) -> bool:
        """Whether that file is one to be made."""
        found = LABEL.match(self.text)
        return bool(found and found[1])

    @property
    def body(self) -> str:
        """The text without the name of a file."""
        return LABEL.sub("", self.text, count=1)


def blocks(path: Path) -> list[Block]:
    """Every fenced block of a document, in order. AssertionError for code in a form that this would overlook."""
    found, lines, opened, generated = [], path.read_text().splitlines(), None, False
    for number, line in enumerate(lines, 1):
        where = f"{path.name}:{number}"
        if opened is not None:
            if line == "```":
                text = "".join(f"{line}\n" for line in lines[opened: number - 1])
                found.append(Block(path, opened, FENCE.match(lines[opened - 1])[1], text, generated))
                opened = None
            continue
        if FENCE.match(line):
            opened = number
            continue
        assert "```" not in line and "~~~" not in line and "<pre" not in line, f"{where}: code, but not in a plain fence"
        assert not re.match(r"    |\t", line), f"{where}: code by indentation; a fence says what it is"
        if marker := re.match(r"<!-- \w+:(begin|end) -->", line):
            generated = marker[1] == "begin"
    assert opened is None, f"{path.name}:{opened}: the block does not end"
    return found


def all_blocks() -> list[Block]:
    """The blocks of all documents."""
    return [block for path in DOCUMENTS for block in blocks(path)]


def apply_diff(text: str, root: Path) -> list[Path]:
    """Edits files below `root` as a `diff` says, and returns them.

    `--- path` opens a file, `@@` the next place in it. Lines with " " or "-" must stand there, once; those with "+" come in.
    """
    edited = []
    for part in re.split(r"^--- ", text, flags=re.M)[1:]:
        name, _, changes = part.partition("\n")
        path = root / name
        content = path.read_text()
        for change in re.split(r"^@@\n", changes, flags=re.M):
            lines = change.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            assert {line[0] for line in lines} <= set(" -+") and before != after, f"{name}: no change:\n{change}"
            assert content.count(before) == 1, f"{name} has {content.count(before)} times, wanted once:\n{before}"
            content = content.replace(before, after)
        path.write_text(content)
        edited.append(path)
    return edited
