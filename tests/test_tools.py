"""Lint, format and types hold for the whole tree; a failure shows the tool's own words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def _run(*command: str) -> None:
    answer = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, f"{' '.join(command)}\n{answer.stdout}{answer.stderr}"


def test_every_file_passes_the_linter() -> None:
    _run("ruff", "check", "--no-cache", ".")


def test_every_file_is_formatted() -> None:
    _run("ruff", "format", "--check", "--no-cache", ".")


def test_every_file_passes_the_type_checker() -> None:
    _run("pyright", "--pythonpath", sys.executable)
