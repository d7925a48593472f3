"""Measure how easy the tree is to read, and compare it with an earlier revision.

    python .ci/house.py                 a table of the working tree
    python .ci/house.py --base REV      the same beside a git revision
    python .ci/house.py --where         in addition, every place that a number counts
    python .ci/house.py --check         exit with 1 if a number is above its limit

Functions, classes and imports are measured in launch.py and in the four packages; words in every Python, Markdown and
YAML file.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OWN_NAME = ".ci/house.py"  # not searched for unclear words: it lists them
PACKAGES = ("shared", "launcher", "collector_proc", "learner_proc")
LAUNCH_ONLY = {"launch", "launcher"}
SIMULATORS = "collector_proc/simulators"
MAX_FUNCTION, MAX_CLASS = 40, 150
# The docstring of a longer class gives the reason why it is one class: it has "long because" or "one class because".
REASON = re.compile(r"\b(long|one class) because\b", re.IGNORECASE)
# Words and phrases that readers of English as a second language had to read twice.
UNCLEAR = (
    r"mend(s|ed|ing)?|obituary|obituaries|anew|nobody|whoever|whatever|met|wanted|told|tells|said|says|nought|whence"
    r"|streets?|shipments?|flights?|travellers?|of (its|their) own accord|is to be had"
    r"|the reference(?! (count|implementation|value|model))"
)
# An underscore ends a word here, so that names such as `what_is_told` are found.
UNCLEAR_WORD = re.compile(rf"(?<![A-Za-z])({UNCLEAR})(?![A-Za-z])", re.IGNORECASE)

Tree = dict[str, str]  # path -> text


@dataclass(frozen=True)
class Number:
    """One row of the table: what was counted, where, and the largest count that `--check` accepts."""

    name: str
    places: list[str]
    count: int
    limit: int | None = None


@dataclass(frozen=True)
class Definition:
    """A function or class of the measured packages."""

    path: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

    @property
    def lines(self) -> int:
        """Return the number of lines, docstring included."""
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    def __str__(self) -> str:
        return f"{self.path}:{self.node.lineno} {self.name} {self.lines}"


def working_tree() -> Tree:
    """Return every text file that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: (REPO / name).read_text() for name in names if _is_text(name) and (REPO / name).is_file()}


def revision(name: str) -> Tree:
    """Return the text files of a git revision."""
    archive = subprocess.run(["git", "archive", name], cwd=REPO, check=True, capture_output=True).stdout
    tree: Tree = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            if _is_text(member.name) and (file := files.extractfile(member)) is not None:
                tree[member.name] = file.read().decode()
    return tree


def measure(tree: Tree) -> list[Number]:
    """Return the rows of the table, in the order in which they are printed."""
    parsed = {path: ast.parse(text) for path, text in tree.items() if _is_measured(path)}
    found = [definition for path, module in parsed.items() for definition in definitions(path, module)]
    functions = [each for each in found if not isinstance(each.node, ast.ClassDef)]
    classes = sorted((each for each in found if isinstance(each.node, ast.ClassDef)), key=lambda each: -each.lines)
    long_functions = [str(each) for each in functions if each.lines > MAX_FUNCTION]
    unexplained = [str(each) for each in classes if each.lines > MAX_CLASS and not _has_reason(each)]
    unclear = list(unclear_words(tree))
    launch_only = sorted(files_for_launch_alone(parsed))
    places = sorted(backend_places(tree, parsed))
    readme_words = len(tree.get("README.md", "").split())
    return [
        Number("words in README.md", [], readme_words, 900),
        Number(f"functions over {MAX_FUNCTION} lines, of {len(functions)}", long_functions, len(long_functions), 0),
        *[Number(f"largest classes, no. {rank}", [str(each)], each.lines) for rank, each in enumerate(classes[:5], 1)],
        Number(f"classes over {MAX_CLASS} lines without a reason", unexplained, len(unexplained), 0),
        Number("unclear words", unclear, len(unclear), 0),
        Number("files in shared/ for launch alone", launch_only, len(launch_only), 0),
        Number("edits to add a backend", ["its folder", *places], 1 + len(places), 2),
    ]


def definitions(path: str, module: ast.Module) -> Iterator[Definition]:
    """Yield the functions and classes of a file, nested ones included."""
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield Definition(path, node.name, node)


def unclear_words(tree: Tree) -> Iterator[str]:
    """Yield the place of every unclear word, in code as well as in prose."""
    for path, text in sorted(tree.items()):
        if path == OWN_NAME:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for word in UNCLEAR_WORD.finditer(line):
                yield f"{path}:{number} {word.group()}: {line.strip()[:100]}"


def files_for_launch_alone(parsed: dict[str, ast.Module]) -> Iterator[str]:
    """Yield the files of shared/ that no process but launch needs, neither directly nor through other files."""
    importers: dict[str, set[str]] = {}
    for path, module in parsed.items():
        for name in _imported(module):
            importers.setdefault(name, set()).add(_module_name(path))
    for path in parsed:
        if path.startswith("shared/") and not path.endswith("__init__.py"):
            users = {name.split(".")[0] for name in _all_importers(_module_name(path), importers)}
            if users - {"shared"} <= LAUNCH_ONLY:
                yield path


def backend_places(tree: Tree, parsed: dict[str, ast.Module]) -> Iterator[str]:
    """Yield the places outside the backends' folders that compare with a backend's name or list several of them.

    An engineer who adds a backend must look at each of them. The registry's table is one; the folder counts separately.
    """
    names = {path.split("/")[2] for path in tree if path.startswith(f"{SIMULATORS}/") and path.count("/") > 2}
    names -= {"batched"}
    if len(names) < 2:  # in older trees a backend was one file
        names = {"dm_control", "pendulum", "isaaclab", "mjlab", "torchrl"}
    for path, module in parsed.items():
        if not path.startswith(tuple(f"{SIMULATORS}/{name}/" for name in names)):
            for statement in module.body:
                if any(_names_backends(node, names) for node in ast.walk(statement)):
                    yield f"{path}:{statement.lineno} {_title(statement)}"
    for number, line in enumerate(tree.get("pyproject.toml", "").splitlines(), 1):
        if re.search(rf"{SIMULATORS}/({'|'.join(sorted(names))})\b", line):
            yield f"pyproject.toml:{number} {line.strip()}"


def _names_backends(node: ast.AST, names: set[str]) -> bool:
    """Return whether a node compares `backend` with a name, or is a collection of names of backends alone."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        about_backend = any(getattr(side, "attr", getattr(side, "id", None)) == "backend" for side in sides)
        return about_backend and any(_literals(side) & names for side in sides)
    if isinstance(node, ast.Match):
        return getattr(node.subject, "attr", getattr(node.subject, "id", None)) == "backend"
    if isinstance(node, ast.Dict):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        keys = [element.value for element in node.elts if isinstance(element, ast.Constant)]
    else:
        return False
    return len(keys) > 1 and set(keys) <= names


def _literals(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def _title(statement: ast.stmt) -> str:
    """Return the name that a statement at module level defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return statement.name
    return ast.unparse(statement).split("=")[0].strip()[:60]


def _has_reason(definition: Definition) -> bool:
    return bool(REASON.search(ast.get_docstring(definition.node) or ""))


def _imported(module: ast.Module) -> set[str]:
    """Return the full names of modules that a file imports; `from a import b` counts as both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _all_importers(name: str, importers: dict[str, set[str]]) -> set[str]:
    """Return the modules that import a module, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        new = importers.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _is_text(path: str) -> bool:
    return path.endswith((".py", ".md", ".yaml", ".yml")) or path == "pyproject.toml"


def _is_measured(path: str) -> bool:
    return path == "launch.py" or (path.endswith(".py") and path.startswith(tuple(f"{name}/" for name in PACKAGES)))


def table(now: list[Number], before: list[Number] | None) -> str:
    """Return the numbers as a table, beside those of the earlier revision if there are any."""
    lines = [f"{'':<48}{'before' if before else '':>8}{'now':>8}{'limit':>8}"]
    for index, number in enumerate(now):
        earlier = before[index].count if before and index < len(before) else ""
        limit = "" if number.limit is None else number.limit
        detail = f"  {number.places[0]}" if number.limit is None else ""
        lines.append(f"{number.name:<48}{earlier:>8}{number.count:>8}{limit:>8}{detail}")
    return "\n".join(lines)


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV", help="a git revision to compare with")
    parser.add_argument("--where", action="store_true", help="print every place that a number counts")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a number is above its limit")
    options = parser.parse_args()
    now = measure(working_tree())
    above = [number for number in now if number.limit is not None and number.count > number.limit]
    sys.stdout.write(table(now, measure(revision(options.base)) if options.base else None) + "\n")
    for number in now if options.where else above if options.check else []:
        sys.stdout.write("\n".join(["", number.name, *(f"  {place}" for place in number.places)]) + "\n")
    return 1 if options.check and above else 0


if __name__ == "__main__":
    sys.exit(main())
