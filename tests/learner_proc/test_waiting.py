"""The learner before it trains: grants of the prefill, chunks that arrive early, deadlines."""

from __future__ import annotations

import pytest
import torch

from learner_proc.pacing import Pacing
from learner_proc.startup import allocate_replay
from learner_proc.totals import Counters
from learner_proc.waiting import WaitingLearner, allocate_and_restore, remaining_random_frames
from shared.checkpoints import newest_checkpoint
from shared.errors import TransportError
from shared.geometry import Geometry
from shared.messages import Refusal
from tests.fakes.scripted_collector import SPEC, ScriptedCollector
from tests.learner_proc.saved_checkpoints import save


def built(waiting: WaitingLearner):
    assert waiting.link.streaming is not None
    return waiting.build(waiting.link.streaming.shared)


def test_the_whole_prefill_is_granted_at_once(waiting, join):
    collector = join(waiting.serve)
    assert (collector.welcome.random_frames, collector.welcome.agent_steps) == (32, 0)
    assert [collector.receive_grant().row for _ in range(2)] == [0, 8]


def test_a_restarted_collector_acts_at_random_for_the_rest_of_the_prefill(waiting, join):
    collector = join(waiting.serve)
    first, _ = collector.receive_grant(), collector.receive_grant()
    collector.commit(first)
    collector.channel.close()
    for _ in range(2):
        waiting.serve()
    assert join(waiting.serve).welcome.random_frames == 16


def test_a_chunk_that_is_committed_before_the_networks_exist_is_counted_once(waiting, join):
    collector = join(waiting.serve)
    for _ in range(2):
        collector.commit_next()
    learner = built(waiting)
    assert learner.pacing.collected == 32 and learner.counters.agent_steps == 32
    assert learner.may_step()


def test_the_first_weights_are_published_before_training(waiting, join):
    join(waiting.serve)
    learner = built(waiting)
    assert learner.publisher.version == learner.counters.policy_version == 1


def test_a_replay_that_is_allocated_twice_shortens_the_prefill_once(process, tmp_path):
    """It is allocated again in host memory if the collector cannot use the GPU's memory."""
    cpu, geometry = torch.device("cpu"), Geometry.of(process.settings)
    pacing = Pacing(geometry.frames_per_chunk, geometry.frames_per_step, None, geometry.prefill_frames)
    replay, _ = allocate_replay(SPEC, process.settings, geometry, device=cpu)
    replay.commit(replay.grant())
    save(tmp_path, 1, replay, digest=SPEC.digest())
    saved = newest_checkpoint(tmp_path)
    for on_gpu in (True, False):
        restored, _ = allocate_and_restore(
            process, geometry, SPEC, on_gpu, device=cpu, pacing=pacing, counters=Counters(), saved=saved, row_bounds={}
        )
        assert (restored.num_rows, pacing.prefill) == (8, 16)


def test_waiting_for_a_collector_ends_at_its_deadline(process):
    process.settings.deadlines.start_s = 0.01
    waiting = WaitingLearner(process, device=torch.device("cpu"), resume=False)
    with pytest.raises(TransportError, match=r"no collector has passed its self-test .* deadlines\.start_s"):
        waiting.run()
    waiting.link.close()


def test_the_time_for_a_self_test_follows_the_longest_start(process, tmp_path):
    process.settings.deadlines.start_s = 1e-6
    waiting = WaitingLearner(process, device=torch.device("cpu"), resume=False)
    collector = ScriptedCollector(tmp_path)
    for call in (waiting.serve, collector.send_hello, waiting.serve, collector.receive_welcome, waiting.serve):
        call()
    refusal = collector.receive()
    assert isinstance(refusal, Refusal) and "the self-test has not arrived within 1.5e-06 s" in refusal.reason
    waiting.link.close()


def test_a_request_to_stop_ends_the_wait_without_networks(waiting, process):
    process.stop.requested = True
    assert waiting.run() is None


def test_rows_that_were_restored_in_the_prefill_shorten_the_random_actions():
    """A run that was interrupted in its prefill continues with the part of the prefill that is missing."""
    pacing = Pacing(chunk_frames=16, step_frames=8, ratio=None, prefill=16)
    assert remaining_random_frames(16, counters=Counters(), pacing=pacing) == 16
    assert remaining_random_frames(16, counters=Counters(gradient_steps=1), pacing=pacing) == 0
    without_evaluation = Pacing(chunk_frames=12, step_frames=8, ratio=None, prefill=24, collected=12)
    assert remaining_random_frames(16, counters=Counters(), pacing=without_evaluation) == 16, "one whole chunk"
