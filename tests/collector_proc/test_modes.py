"""The async and the lockstep mode: what they wait for, and when they adopt weights."""

from __future__ import annotations

from typing import cast

import pytest

from collector_proc.acting_policy import ActingPolicy
from collector_proc.learner_input import LearnerInput
from collector_proc.modes import AsyncMode, LockstepMode
from shared.messages import Grant


class RecordedLearner:
    """Records the calls of a mode, and gives grants whose row and version are known."""

    def __init__(self, version: int = 5) -> None:
        self.calls: list[str] = []
        self.weights = self
        self._version = version

    def wait_for_grant(self) -> Grant:
        self.calls.append("grant")
        return Grant(0, 6, self._version)

    def wait_for_version(self, version: int) -> None:
        self.calls.append(f"version {version}")

    def adopt(self) -> bool:
        self.calls.append("adopt")
        return True


class FakeActing:
    def __init__(self, required_version: int) -> None:
        self.required_version = required_version


def test_async_waits_for_a_grant_only_when_a_chunk_is_full_and_adopts_weights_between_ticks():
    learner = RecordedLearner()
    mode = AsyncMode(cast(LearnerInput, learner))
    mode.begin_chunk()
    assert learner.calls == [] and not mode.waits_for_commit
    mode.adopt_weights()
    assert mode.take_grant().row == 6 and learner.calls == ["adopt", "grant"]


@pytest.mark.parametrize(("granted", "required", "expected"), [(5, 1, 5), (0, 1, 1), (0, 0, 0)])
def test_lockstep_waits_for_the_grant_and_its_version_before_a_chunk(granted, required, expected):
    learner = RecordedLearner(version=granted)
    mode = LockstepMode(cast(LearnerInput, learner), cast(ActingPolicy, FakeActing(required)))
    mode.begin_chunk()
    assert learner.calls == ["grant", f"version {expected}"] and mode.waits_for_commit
    mode.adopt_weights()
    assert mode.take_grant().row == 6 and len(learner.calls) == 2, "weights and grants do not change within a chunk"


def test_lockstep_uses_a_grant_for_one_chunk_only():
    mode = LockstepMode(cast(LearnerInput, RecordedLearner()), cast(ActingPolicy, FakeActing(1)))
    mode.begin_chunk()
    mode.take_grant()
    with pytest.raises(AssertionError):
        mode.take_grant()
