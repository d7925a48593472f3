"""Rounds of lockstep: what happens at the end of one, and when a checkpoint is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from learner_proc.pacing import Pacing
from learner_proc.rounds import Rounds
from learner_proc.totals import Counters
from shared.process import Process


class Scene:
    """Rounds of 20 steps in a run of 50, whose other parts only note what they are asked for."""

    def __init__(self, process: Process, *, lockstep: bool = True) -> None:
        process.settings.checkpoint.every_steps, process.settings.optimization.total_optim_steps = 20, 50
        self.calls: list[Any] = []
        self.counters, self.pacing = Counters(), Pacing(16, 32, 2.0, 64, 100.0, 640, 320, lockstep=lockstep)
        self.link = SimpleNamespace(streaming=object(), num_welcomed=3, begin_round=self.note("link"))
        writer = SimpleNamespace(poll=lambda wait: None, begin_round=self.note("writer"))
        self.saver = SimpleNamespace(save=self.save, save_if_due=self.note("by the clock"), saved_step=-1)
        parts = (process, self.link, self.pacing, self.counters, writer, self.saver)
        self.rounds = Rounds(*cast(Any, parts))

    def note(self, name: str) -> Any:
        return lambda *values: self.calls.append((name, *values))

    def save(self) -> None:
        self.saver.saved_step = self.counters.gradient_steps
        self.calls.append(("save", self.counters.gradient_steps, self.counters.rounds))

    def step_to(self, steps: int) -> list[Any]:
        """Return what is called after this gradient step."""
        self.calls.clear()
        self.counters.gradient_steps = steps
        self.rounds.save_if_due(self.note("row"), self.note("publish"))
        return list(self.calls)

    def end_at(self, steps: int) -> list[Any]:
        """Return what is called if the run ends after this step."""
        self.counters.gradient_steps = steps
        self.calls.clear()
        self.rounds.save_at_end()
        return self.calls


def test_at_the_end_of_a_round_it_is_saved_and_everything_begins_as_after_a_resume(process: Process) -> None:
    scene = Scene(process)
    assert scene.step_to(19) == []
    assert scene.step_to(20) == [("row",), ("save", 20, 1), ("writer",), ("publish",), ("link", 1)]
    assert scene.step_to(20) == [], "a round ends once"
    assert scene.step_to(21) == []
    assert scene.step_to(40)[1] == ("save", 40, 2)


def test_no_step_is_made_until_a_collector_has_begun_the_round(process: Process) -> None:
    scene = Scene(process)
    assert not scene.rounds.waiting
    scene.step_to(20)
    assert scene.rounds.waiting, "the collector of the last round is still connected"
    scene.link.streaming = None
    assert scene.rounds.waiting
    scene.link.num_welcomed += 1
    assert scene.rounds.waiting, "its self-test has not arrived"
    scene.link.streaming = object()
    assert not scene.rounds.waiting


@pytest.mark.parametrize(("steps", "saved"), [(33, []), (40, []), (50, [("save", 50, 3)])])
def test_a_checkpoint_inside_a_round_is_written_only_when_the_run_is_complete(
    process: Process, steps: int, saved: list[Any]
) -> None:
    scene = Scene(process)
    for end in (20, 40):
        if end <= steps:
            scene.step_to(end)
    assert scene.end_at(steps) == saved


def test_a_last_round_that_could_not_be_saved_is_saved_again_at_the_end(process: Process) -> None:
    scene = Scene(process)
    process.settings.optimization.total_optim_steps = 20
    scene.step_to(20)
    assert scene.end_at(20) == []
    scene.saver.saved_step = -1
    assert [call[:2] for call in scene.end_at(20)] == [("save", 20)]


def test_in_async_mode_the_clock_decides_and_the_end_is_always_saved(process: Process) -> None:
    scene = Scene(process, lockstep=False)
    scene.link.streaming = None
    assert not scene.rounds.waiting
    assert scene.step_to(20) == [("by the clock",)]
    assert scene.end_at(33) == [("save", 33, 0)]


def test_the_ledger_of_the_pacing_continues_only_in_lockstep_and_with_the_same_ratio(process: Process) -> None:
    scene = Scene(process)
    scene.step_to(20)
    resumed = Pacing(16, 32, 2.0, 0, 0.0, lockstep=True)
    resumed.resume_from(scene.counters)
    assert resumed == scene.pacing
    for other in (Pacing(16, 32, 2.0, 0), Pacing(16, 32, 4.0, 0, lockstep=True)):
        other.resume_from(scene.counters)
        assert (other.collected, other.replayed) == (0, 0)
