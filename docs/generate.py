"""Write the generated parts of the documentation: `python -m docs.generate`, or with `--check` only compare.

A page marks each generated part, and everything between the two marks is replaced:

    <!-- generated: metrics -->
    ...
    <!-- end of generated part -->

The word after the colon names a function in `PARTS`; what follows it is the function's argument.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from collector_proc.simulators.registry import BACKENDS
from launcher.setting_words import bounds_of, type_of, value_in_words
from shared.compose import config_names, setting_keys
from shared.metrics import FAMILIES, METRICS, SATURATED, DimensionFamily, Metric, MetricFamily

DOCS = Path(__file__).resolve().parent
REPO = DOCS.parent
PART = re.compile(r"(<!-- generated: (\w+) ?(\S*) -->\n).*?(<!-- end of generated part -->)", re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. A vertical bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Return the text as inline code, or nothing for an empty text."""
    return f"`{text}`" if text else ""


def settings(_: str) -> str:
    """Return one section for each group of settings, such as `env`, in the order in which they are declared."""
    sections: dict[str, list[list[str]]] = {}
    for key, field in setting_keys():
        doc, unit = field.metadata["doc"], field.metadata.get("unit") or ""
        row = [code(key), type_of(field), code(value_in_words(field.default)), _allowed(field), unit, doc]
        sections.setdefault(key.rpartition(".")[0], []).append(row)
    head = ["key", "type", "default", "allowed", "unit", "meaning"]
    return "\n\n".join(f"## {section}\n\n{table(head, rows)}" for section, rows in sections.items())


def presets(_: str) -> str:
    """Return the table of the files in `configs/`: name, and the first sentence of the comment at its top."""
    texts = {name: (REPO / "configs" / f"{name}.yaml").read_text() for name in config_names()}
    return table(["`--config`", "what it is"], ([code(name), _first_sentence(text)] for name, text in texts.items()))


def backends(_: str) -> str:
    """Return the table of simulator backends with the settings that each of them ignores."""
    rows = ([code(name), ", ".join(map(code, backend.ignores))] for name, backend in BACKENDS.items())
    return table(["`env.backend`", "settings that it does not read"], rows)


def metrics(_: str) -> str:
    """Return one section for each group of metrics, in the order in which they are declared."""
    groups: dict[str, list[Declared]] = {}
    for metric in (*METRICS.values(), *FAMILIES, SATURATED):
        groups.setdefault(metric.tag.partition("/")[0], []).append(metric)
    return "\n\n".join(f"## {group}\n\n{_metric_table(members)}" for group, members in groups.items())


def file(path: str) -> str:
    """Return a file of the repository as a block of code."""
    source = REPO / path
    return f"```{LANGUAGES.get(source.suffix, 'text')}\n{source.read_text().rstrip()}\n```"


def body(path: str) -> str:
    """Return a Markdown file of the repository without its title."""
    return (REPO / path).read_text().partition("\n")[2].strip()


Declared = Metric | MetricFamily | DimensionFamily
PARTS: dict[str, Callable[[str], str]] = {
    "settings": settings,
    "presets": presets,
    "backends": backends,
    "metrics": metrics,
    "file": file,
    "body": body,
}


def fill(page: str) -> str:
    """Return the page with every generated part renewed."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]](found[3])}\n\n{found[4]}", page)


def main() -> int:
    """Renew every page; with `--check`, name the pages that are stale and return 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.generate", description="Write the generated parts of the documentation."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    check, stale = parser.parse_args().check, []
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text()
        renewed = fill(page)
        if renewed != page:
            stale.append(path.name)
            if not check:
                path.write_text(renewed)
    for name in stale:
        sys.stdout.write(f"docs/{name} {'is stale; run: python -m docs.generate' if check else 'renewed'}\n")
    return int(check and bool(stale))


def _metric_table(members: Iterable[Declared]) -> str:
    rows = ([code(metric.name), code(metric.tag), metric.unit, metric.meaning] for metric in members)
    return table(["column", "tag", "unit", "meaning"], rows)


def _allowed(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    return ", ".join(map(code, choices)) if choices else bounds_of(field)


def _first_sentence(text: str) -> str:
    comment = " ".join(line.removeprefix("#").strip() for line in _leading_comment(text))
    return re.split(r"\.\s", f"{comment} ")[0] + "."


def _leading_comment(text: str) -> list[str]:
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


if __name__ == "__main__":
    sys.exit(main())
