"""The laws of the tree: imports go one way, torch comes after the simulator, packages hold a docstring only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# What each part may import: launch -> launcher -> {collector_proc, learner_proc} -> shared.
MAY_IMPORT = {
    "shared": {"shared"},
    "collector_proc": {"collector_proc", "shared"},
    "learner_proc": {"learner_proc", "shared"},
    "launcher": {"launcher", "collector_proc", "learner_proc", "shared"},
    "launch": {"launcher", "collector_proc", "learner_proc", "shared"},
}
SIMULATORS = REPO / "collector_proc" / "simulators"
TORCH_FREE = [
    "launch",
    *sorted(f"shared.{path.stem}" for path in (REPO / "shared").glob("*.py") if path.stem != "__init__"),
    *sorted(f"launcher.{path.stem}" for path in (REPO / "launcher").glob("*.py")),
    *sorted(f"launcher.commands.{path.stem}" for path in (REPO / "launcher" / "commands").glob("*.py")),
    *sorted(f"collector_proc.simulators.{path.stem}" for path in SIMULATORS.glob("*.py") if path.stem != "__init__"),
    *sorted(f"collector_proc.simulators.{path.parent.name}.checks" for path in SIMULATORS.glob("*/checks.py")),
    *(
        f"collector_proc.simulators.{name}"
        for name in ("isaaclab.simulator", "dm_control.workers", "torchrl.user_module")
    ),
    "collector_proc.__main__",
]


def _sources(owner: str) -> list[Path]:
    return [REPO / "launch.py"] if owner == "launch" else sorted((REPO / owner).rglob("*.py"))


def _imported(path: Path) -> set[str]:
    """Return the top-level names of our own modules that a file imports anywhere, also under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import; expected the full module name"
            found.add((node.module or "").split(".")[0])
    return found & set(MAY_IMPORT)


@pytest.mark.parametrize("owner", MAY_IMPORT)
def test_imports_go_one_way(owner: str) -> None:
    files = _sources(owner)
    assert files, f"{owner} has no source files"
    wrong = {str(path.relative_to(REPO)): _imported(path) - MAY_IMPORT[owner] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


def test_modules_imported_before_the_simulator_starts_do_not_import_torch() -> None:
    script = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    found = sorted({'torch', 'tensordict', 'torchrl'} & set(sys.modules))\n"
        "    assert not found, f'importing {name} also imports {found}'\n"
        "assert len(sys.modules) > 100, 'nothing was imported'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_package_file_holds_a_docstring_and_nothing_else() -> None:
    packages = [path for owner in MAY_IMPORT if owner != "launch" for path in (REPO / owner).rglob("__init__.py")]
    assert len(packages) >= 6, packages
    for path in packages:
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), path


def test_test_folders_are_not_packages() -> None:
    assert not list((REPO / "tests").rglob("__init__.py"))


def test_no_file_has_a_name_without_meaning() -> None:
    names = {path.name for owner in MAY_IMPORT for path in _sources(owner)}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}


def test_the_tree_stays_readable() -> None:
    """The house check counts long functions, large classes, unclear words, and the edits that a new backend needs."""
    result = subprocess.run(
        [sys.executable, ".ci/house.py", "--check"], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
