"""Grants: the rows of a chunk reach the collector only when no queued gradient step can sample them any more."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import structlog
import torch

from learner_proc.handshake import SharedReplay, Testing
from learner_proc.replay import Replay
from learner_proc.streaming import Streaming
from shared.messages import Commit, Grant
from shared.stream import ObsSpec, StreamSpec, plan_layout

E, K, CAPACITY = 4, 8, 32
SPEC = StreamSpec(E, {"policy": ObsSpec((3,), "float32")}, 2)
BEING_WRITTEN = -1.0


class InstantCollector:
    """Stands in for the channel to a collector that overwrites a chunk as soon as its grant arrives.

    Like another process, it writes on a stream of its own, which no event of the learner orders.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay, self.stream = replay, torch.cuda.Stream()
        self.granted: list[Grant] = []

    def try_send(self, grant: Grant) -> bool:
        self.granted.append(grant)
        self._fill(grant, BEING_WRITTEN)
        return True

    def _fill(self, grant: Grant, value: float) -> None:
        rows: Any = self.replay.chunk(grant.row)
        with torch.cuda.stream(self.stream):
            rows["obs", "policy"].fill_(value)
        self.stream.synchronize()

    def commit(self, streaming: Streaming, value: float) -> None:
        """Finish the oldest chunk and commit it."""
        grant = self.granted.pop(0)
        self._fill(grant, value)
        fields: dict[str, Any] = dict.fromkeys(Commit.__dataclass_fields__, 0)
        fields |= {"seq": grant.seq, "row": grant.row, "returns": b"", "lengths": b"", "kinds": b""}
        streaming.take(Commit(**fields))


@pytest.mark.gpu
def test_no_queued_sample_reads_a_row_that_the_collector_overwrites():
    layout = plan_layout(SPEC, CAPACITY)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda:0")
    replay = Replay(slab, layout, ticks_per_chunk=K, seed=0, device=slab.device)
    collector: Any = InstantCollector(replay)
    testing = Testing(collector, SharedReplay(SPEC, replay, None), replay.grant())
    streaming = Streaming(testing, itertools.count(), check_sums=False, log=structlog.get_logger())
    streaming.flush()
    samples = []
    for chunk in range(16):
        end = time.monotonic() + 60
        while not collector.granted:
            assert time.monotonic() < end, "the grant was not sent"
            streaming.flush()
        collector.commit(streaming, float(chunk))
        if chunk >= 1:  # a queued gradient step that the GPU reaches late
            torch.cuda._sleep(5_000_000)
            samples.append(replay.sample(8, K)["obs", "policy"].clone())
        streaming.grant()
    lowest = [sample.min().item() for sample in samples]
    assert all(value > BEING_WRITTEN for value in lowest), lowest
