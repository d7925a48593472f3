"""The status that a collector publishes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from collector_proc.status import PACE_WINDOW_S, StatusReporter
from shared.metrics import CollectorStatus
from shared.progress import Progress
from tests.fakes.fake_process import FakeProgress


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


def make_reporter(agent_steps: int = 0) -> tuple[StatusReporter, FakeProgress]:
    progress = FakeProgress()
    weights: Any = SimpleNamespace(version=7, num_refused=2)
    memory_limit: Any = SimpleNamespace(held_gb=1.5)
    return StatusReporter(cast(Progress, progress), weights, memory_limit, agent_steps), progress


def test_the_status_has_the_steps_of_the_run_the_pace_the_weights_and_the_memory(clock):
    reporter, progress = make_reporter(agent_steps=1000)
    clock.s += 2.0
    reporter.report(60)
    assert progress.last_status == CollectorStatus(
        agent_steps=1060, fps=30.0, policy_version=7, weights_refused=2, rss_gb=1.5, chunks=1
    )


def test_the_pace_does_not_jump_when_its_window_is_full(clock):
    reporter, progress = make_reporter()
    paces = []
    for after_s in (PACE_WINDOW_S + 0.1, 0.05):
        clock.s += after_s
        reporter.report(1000)
        assert progress.last_status is not None
        paces.append(progress.last_status.fps)
    assert paces == pytest.approx([1000 / (PACE_WINDOW_S + 0.1), 2000 / (PACE_WINDOW_S + 0.15)], rel=1e-6)


def test_the_pace_is_that_of_the_last_seconds_and_falls_to_0_without_new_steps(clock):
    reporter, progress = make_reporter()
    paces = []
    for steps in (600, 0, 0):
        clock.s += PACE_WINDOW_S + 1.0
        reporter.report(steps)
        assert progress.last_status is not None
        paces.append(progress.last_status.fps)
    assert paces == [100.0, 0.0, 0.0]
