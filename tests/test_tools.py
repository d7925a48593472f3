"""The whole tree passes the linter, the formatter, the spelling checker and the type checker; .ci/run needs pgrep."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def _run(*command: str) -> None:
    """Run a Python tool over the repository; on failure the assertion shows the tool's own output."""
    result = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def test_every_file_passes_the_linter() -> None:
    _run("ruff", "check", "--no-cache", ".")


def test_every_file_is_formatted() -> None:
    _run("ruff", "format", "--check", "--no-cache", ".")


def test_every_file_passes_the_spelling_checker() -> None:
    _run("codespell_lib", ".")


def test_every_file_passes_the_type_checker() -> None:
    _run("pyright", "--pythonpath", sys.executable)


def test_without_pgrep_the_checks_refuse_to_start(tmp_path: Path) -> None:
    """Without it, a process that the tests left behind would not be found."""
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [tmp_path / "bash", REPO / ".ci" / "run", "no-tier"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: pgrep is not installed; expected it in the PATH")
