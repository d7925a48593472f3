"""The whole tree passes the linter, the formatter, the spelling checker and the type checker."""

from __future__ import annotations

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
