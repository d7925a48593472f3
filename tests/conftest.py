"""Shared by all tests: one torch thread, and a closing line that counts what the markers left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pytest

# Before anything imports torch: tests share a small machine with each other's processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

OPTIONAL = ("gpu", "isaac", "slow")
_left_out: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        _left_out.update(marker for marker in OPTIONAL if item.get_closest_marker(marker))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{_left_out[marker]} {marker}" for marker in OPTIONAL)
    terminalreporter.write_line(f"not run: {counts} (run them with -m gpu, -m isaac, -m slow)")
