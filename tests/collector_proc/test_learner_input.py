"""Waiting for grants and weights of a learner that the test plays."""

from __future__ import annotations

import socket
from typing import cast

import pytest

from collector_proc.learner_input import LearnerInput
from collector_proc.rounds import RoundBegins
from collector_proc.status import StatusReporter
from collector_proc.weights_receiver import WeightsReceiver
from shared.config import DeadlineSettings, Settings
from shared.errors import TransportError
from shared.handover import Channel, Disconnected
from shared.lifetime import StopFlag, StopRequested
from shared.messages import Grant, NextRound, Refusal
from tests.fakes.fake_process import FakeProgress, fake_process


class FakeWeights:
    """A receiver of weights. `arriving`: the versions that the next calls of `adopt` find."""

    def __init__(self) -> None:
        self.version, self.num_refused, self.arriving, self.last_refusal = 0, 0, [], ""

    def reconnect_if_silent(self) -> None:
        return None

    def adopt(self) -> bool:
        if not self.arriving:
            return False
        self.version = self.arriving.pop(0)
        return True


class CountedReports:
    def __init__(self) -> None:
        self.count = 0

    def report(self, new_steps: int = 0) -> None:
        assert new_steps == 0
        self.count += 1


class Scene:
    def __init__(self, *, compile_s: float = 60.0, step_s: float = 60.0) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.learner = Channel(theirs)
        self.weights, self.status, self.progress, self.stop = (
            FakeWeights(),
            CountedReports(),
            FakeProgress(),
            StopFlag(),
        )
        settings = Settings(deadlines=DeadlineSettings(compile_s=compile_s, step_s=step_s))
        self.input = LearnerInput(
            fake_process(settings, self.progress, self.stop),
            Channel(ours),
            cast(WeightsReceiver, self.weights),
            cast(StatusReporter, self.status),
        )


def test_grants_are_used_in_the_order_in_which_they_were_sent():
    scene = Scene()
    for seq, row in enumerate((6, 0, 3)):
        scene.learner.send(Grant(seq, row, 0))
    assert [scene.input.wait_for_grant().row for _ in range(3)] == [6, 0, 3]
    assert scene.status.count == 0 and "waiting" not in scene.progress.phases


def test_while_no_grant_arrives_the_phase_is_waiting_and_the_status_is_published():
    scene, polls = Scene(), 0

    def on_advance() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            scene.learner.send(Grant(0, 9, 0))

    scene.progress.on_advance = on_advance
    assert scene.input.wait_for_grant().row == 9
    assert scene.status.count == 3 and scene.progress.phases == ["waiting", "collecting"]


def test_a_stop_ends_the_wait_for_a_grant_but_a_grant_that_has_arrived_is_used():
    scene = Scene()
    scene.stop.requested = True
    with pytest.raises(StopRequested):
        scene.input.wait_for_grant()
    scene.learner.send(Grant(0, 3, 0))
    assert scene.input.wait_for_grant().row == 3


def test_weights_are_adopted_until_the_version_is_reached():
    scene = Scene()
    scene.weights.arriving = [1, 2, 3, 4]
    scene.input.wait_for_version(3)
    assert scene.weights.version == 3 and scene.weights.arriving == [4]


def test_a_version_that_was_adopted_already_needs_no_wait():
    scene = Scene(compile_s=0.0, step_s=0.0)
    scene.input.wait_for_version(0)


def test_weights_that_do_not_arrive_in_time_are_an_error_that_names_both_versions():
    scene = Scene(compile_s=0.02, step_s=0.0)
    scene.weights.arriving, scene.weights.num_refused = [4], 2
    with pytest.raises(TransportError, match=r"version 4 .*messages: 2\); expected version 5 or later; .*compile_s"):
        scene.input.wait_for_version(5)


def test_a_stop_ends_the_wait_for_weights():
    scene = Scene()
    scene.stop.requested = True
    with pytest.raises(StopRequested):
        scene.input.wait_for_version(0)


@pytest.mark.parametrize("wait", ["wait_for_grant", "wait_for_version"])
def test_every_wait_notices_that_the_learner_has_ended(wait):
    scene = Scene()
    scene.learner.close()
    with pytest.raises(Disconnected):
        scene.input.wait_for_grant() if wait == "wait_for_grant" else scene.input.wait_for_version(1)


def test_a_refusal_is_an_error_with_its_reason():
    scene = Scene()
    scene.learner.send(Refusal("the self-test found a wrong byte"))
    with pytest.raises(TransportError, match="refused this collector: the self-test found a wrong byte"):
        scene.input.wait_for_grant()


def test_a_round_that_begins_ends_the_wait_for_a_grant():
    scene = Scene()
    scene.learner.send(NextRound(4))
    with pytest.raises(RoundBegins) as begins:
        scene.input.wait_for_grant()
    assert begins.value.number == 4
