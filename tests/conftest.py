"""Set-up of all tests: one torch thread, and a closing line that counts the tests that the markers left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

# Set before anything imports torch: several tests run at once, each with processes of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

OPTIONAL = ("gpu", "fake_gpu", "isaac", "isaaclab3", "slow")
_left_out: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the tests that a marker left out."""
    for item in items:
        _left_out.update(marker for marker in OPTIONAL if item.get_closest_marker(marker))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the counts from a worker of pytest-xdist to the process that prints the summary."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the counts from a worker. Every worker collects all tests, so all workers send the same counts."""
    counts = getattr(node, "workeroutput", {}).get("left_out", {})
    for marker, count in counts.items():
        _left_out[marker] = count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests the markers left out, and how to run them."""
    counts = ", ".join(f"{_left_out[marker]} {marker}" for marker in OPTIONAL)
    options = ", ".join(f"-m {marker}" for marker in OPTIONAL)
    terminalreporter.write_line(f"not run: {counts} (run them with {options})")
