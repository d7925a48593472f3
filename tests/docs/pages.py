"""Read the pages of the documentation: their blocks of code, links, headings and inline code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGES = (REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (run slowly|run|needs|installs packages):? ?(.*?) ?-->\n$")
_PROMPTS = {"bash", "sh", "console"}  # languages of blocks that hold commands


@dataclass(frozen=True)
class Block:
    """A block of commands. `mark` is the first word of the comment above it, or None; `detail` is what follows it."""

    page: Path
    line: int
    text: str
    mark: str | None
    detail: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Return the words of each command, without comments; a line that ends in a backslash goes on in the next."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def blocks() -> list[Block]:
    """Return every block of commands on every page."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for fence in _FENCE.finditer(text):
            if fence[1] in _PROMPTS:
                mark = _MARK.search(text[: fence.start()])
                line = text.count("\n", 0, fence.start()) + 1
                found.append(Block(page, line, fence[2], mark and mark[1], mark[2] if mark else ""))
    return found


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """Return every piece of inline code outside blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Return the target of every link and picture."""
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Return the anchor of every heading, as GitHub and mkdocs both write it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
