"""A hook for mkdocs. The README becomes a page of the site, and links to files outside docs/ work in the site.

A linked file, such as ../configs/gym.yaml, is copied to `repository/` in the site, and the link is pointed to the copy.
A link to a file that does not exist is left as it is, and `mkdocs build --strict` reports it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")  # a relative link, up to its anchor
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as a page, and every file of the repository that a page links to."""
    files.append(File.generated(config, "readme.md", content=_readme()))
    linked = {name for page in files.documentation_pages() for name in OUTSIDE.findall(page.content_string)}
    for name in sorted(linked - {"README.md"}):
        if (REPO / name).is_file():
            files.append(File.generated(config, _site_path(name), abs_src_path=str(REPO / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links of a page to the copies."""
    return OUTSIDE.sub(lambda found: f"]({_site_path(found[1])}" if (REPO / found[1]).is_file() else found[0], markdown)


def _readme() -> str:
    """Return the README with its links written as a page in docs/ would write them."""
    text = (REPO / "README.md").read_text()
    return LINK.sub(lambda found: "](" + f"../{found[1]}".replace("../docs/", ""), text)


def _site_path(name: str) -> str:
    """Return the path in the site. Markdown other than the README is shown as plain text."""
    if name == "README.md":
        return "readme.md"
    return f"repository/{name}.txt" if name.endswith(".md") else f"repository/{name}"
