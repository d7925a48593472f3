"""The publisher knows which version the collector has, and sends a version again until it arrives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from collector_proc.weights_receiver import WeightsReceiver
from learner_proc import publisher
from learner_proc.publisher import Publisher


class CountingPublisher(Publisher):
    """Counts how often the last version was sent again."""

    num_republished = 0

    def republish(self) -> None:
        self.num_republished += 1
        super().republish()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingPublisher]:
    """A publisher that has published version 1 for the first collector, and does not wait before it sends again."""
    monkeypatch.setattr(publisher, "REPUBLISH_S", 0.0)
    made = CountingPublisher(nn.Linear(2, 2), socket_dir=tmp_path, run_id="run")
    made.publish(step=0)
    made.collector_streams(1)
    made.num_republished = 0
    yield made
    made.close()


def test_a_version_is_sent_again_until_the_collector_has_it(made):
    made.republish_if_missed()
    made.republish_if_missed()
    assert made.num_republished == 2
    made.collector_has(1)
    made.republish_if_missed()
    assert made.num_republished == 2


def test_a_version_is_not_sent_again_before_the_time_between_two_attempts_has_passed(made, monkeypatch):
    monkeypatch.setattr(publisher, "REPUBLISH_S", 1000.0)
    made.republish_if_missed()
    assert made.num_republished == 0


def test_a_new_collector_is_sent_the_weights_that_the_one_before_it_had(made):
    made.collector_has(1)
    made.collector_streams(1)
    assert made.num_republished == 0, "it is the same collector"
    made.collector_streams(2)
    assert made.num_republished == 1
    made.republish_if_missed()
    assert made.num_republished == 2, "the new collector has not committed with version 1 yet"


def test_a_resumed_run_continues_the_numbers_of_its_versions(tmp_path):
    resumed = Publisher(nn.Linear(2, 2), socket_dir=tmp_path, run_id="run", version=7)
    assert resumed.published_step == -1
    resumed.publish(step=30)
    assert (resumed.version, resumed.published_step) == (8, 30)
    resumed.close()


def received(socket_dir: Path, publisher: Publisher, *steps: dict[str, Any]) -> list[tuple[int, float]]:
    """Publish once for each of `steps`, and return the version and the weight that a collector has after each."""
    policy = nn.Linear(1, 1, bias=False)
    receiver = WeightsReceiver(policy, socket_dir=socket_dir, run_id="run")
    found = []
    for step, options in enumerate(steps):
        publisher.publish(step=step, **options)
        end = time.monotonic() + 20
        while receiver.version < publisher.version and receiver.version + 1 >= publisher.version:
            assert time.monotonic() < end
            if not receiver.adopt():
                publisher.republish()
        found.append((receiver.version, policy.weight.item()))
    receiver.close()
    publisher.close()
    return found


def test_weights_that_are_not_finite_are_never_sent_and_the_version_has_the_last_good_ones(tmp_path):
    policy = nn.Linear(1, 1, bias=False)

    class Training(Publisher):
        def publish(self, *, step: int, skipped: torch.Tensor | None = None, weight: float = 0.0) -> None:
            with torch.no_grad():
                policy.weight.fill_(weight)
            super().publish(step=step, skipped=skipped)

    nan, inf, no, yes = float("nan"), float("inf"), torch.tensor(0.0), torch.tensor(1.0)
    assert received(
        tmp_path,
        Training(policy, socket_dir=tmp_path, run_id="run"),
        {"weight": 1.0},
        {"weight": nan},
        {"weight": 2.0, "skipped": no},
        {"weight": -inf, "skipped": no},
        {"weight": 3.0, "skipped": yes},
        {"weight": nan, "skipped": yes},
        {"weight": 4.0, "skipped": no},
    ) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 4.0)]


def test_without_any_good_weights_nothing_is_sent(tmp_path, monkeypatch):
    policy = nn.Linear(1, 1, bias=False)
    publisher = Publisher(policy, socket_dir=tmp_path, run_id="run")
    monkeypatch.setattr(publisher, "_socket", None)  # sending would raise
    with torch.no_grad():
        policy.weight.fill_(float("nan"))
    publisher.publish(step=0)
    publisher.republish()
    assert publisher.version == 1


class RecordingPublisher(Publisher):
    """Records what it would send."""

    def __init__(self, policy: nn.Module, **rest: Any) -> None:
        super().__init__(policy, **rest)
        self.sent: dict[int, bytes] = {}

    def _send(self, version: int, buffer: torch.Tensor) -> None:
        self.sent[version] = buffer.numpy().tobytes()


@pytest.mark.gpu
def test_on_a_gpu_a_version_has_the_weights_of_its_step_although_later_steps_overwrite_them(tmp_path):
    policy = nn.Linear(64, 64, bias=False, device="cuda:0")
    publisher = RecordingPublisher(policy, socket_dir=tmp_path, run_id="run")
    values = {}
    for step in range(8):
        with torch.no_grad():
            policy.weight.fill_(float(step))
        if step % 3 == 0:
            torch.cuda._sleep(20_000_000)
        publisher.publish(step=step)
        values.setdefault(publisher.version, float(step))  # a publication is skipped while both buffers are busy
        publisher.flush()
    end = time.monotonic() + 60
    while len(publisher.sent) < publisher.version:
        assert time.monotonic() < end
        publisher.flush()
    publisher.close()
    for version, content in publisher.sent.items():
        floats = set(torch.frombuffer(bytearray(content[:-1]), dtype=torch.float32)[:64].tolist())
        assert floats == {values[version]}, f"version {version} holds {floats}"
