"""The socket to the collector: who is welcomed, who is refused, and what happens to grants and commits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from learner_proc import link as link_module
from learner_proc.handshake import Handshake, SharedReplay
from learner_proc.link import CollectorLink
from learner_proc.startup import allocate_replay
from learner_proc.streaming import Streaming
from shared.errors import TransportError
from shared.geometry import Geometry
from shared.handover import Disconnected
from shared.messages import PROTOCOL, Grant, Refusal
from shared.process import Process
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.scripted_collector import SPEC, ScriptedCollector


def make_link(process: Process, folder: Path, **options: float) -> CollectorLink:
    settings, cpu = process.settings, torch.device("cpu")
    handshake = Handshake(
        run_id="run",
        num_envs=2,
        allocate=lambda spec, on_gpu: allocate_replay(spec, settings, Geometry.of(settings), device=cpu),
        random_frames=lambda: 32,
        agent_steps=lambda: 7,
        gpu_storage=None,
        log=process.log,
        **options,
    )
    return CollectorLink(folder, handshake, check_sums=True, log=process.log)


@pytest.fixture
def link(process: Process, tmp_path) -> Iterator[CollectorLink]:
    made = make_link(process, tmp_path)
    yield made
    made.close()


def shared_of(link: CollectorLink) -> SharedReplay:
    assert link.shared is not None
    return link.shared


def streaming_of(link: CollectorLink) -> Streaming:
    assert link.streaming is not None
    return link.streaming


def poll(link: CollectorLink, times: int = 3) -> None:
    """One message is often answered in the next poll only."""
    for _ in range(times):
        link.poll()


def test_the_chunk_of_the_self_test_is_the_first_grant(link, join):
    collector = join(link.poll)
    assert link.streaming is not None
    assert (collector.welcome.random_frames, collector.welcome.agent_steps) == (32, 7)
    assert collector.receive_grant() == Grant(1, collector.welcome.test_row, 0)
    assert link.bandwidth > 0


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"protocol": PROTOCOL + 1}, "one checkout"),
        ({"run_id": "another"}, "same --run-dir"),
        ({"spec": {"num_envs": 2}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"num_envs": float("inf")}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"action_dim": 1 << 23, "num_envs": 1 << 20}}, "out of bounds"),
        ({"spec": SPEC.to_dict() | {"num_envs": 4}}, "has 4 environments; expected 2"),
        ({"spec": StreamSpec(2, {"policy": ObsSpec((3, 4), "float32")}, 3).to_dict()}, "'policy'"),
        ({"spec": StreamSpec(2, {"pixels": ObsSpec((32, 32, 3), "uint8")}, 3).to_dict()}, "(64, 64, 3)"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_with_a_reason(link, tmp_path, changes, part):
    collector = ScriptedCollector(tmp_path)
    collector.send_hello(**changes)
    poll(link)
    refusal = collector.receive()
    assert isinstance(refusal, Refusal) and part in refusal.reason
    with pytest.raises(Disconnected):
        collector.receive()


def test_a_later_collector_with_another_stream_is_refused(link, join, tmp_path):
    join(link.poll).channel.close()
    link.poll()
    second = ScriptedCollector(tmp_path)
    second.send_hello(spec=StreamSpec(2, SPEC.obs, 3).to_dict(), incarnation=1)
    poll(link)
    refusal = second.receive()
    assert isinstance(refusal, Refusal) and "as at the first hello" in refusal.reason


def test_a_second_collector_is_refused_while_one_is_connected(link, join, tmp_path):
    first = join(link.poll)
    second = ScriptedCollector(tmp_path)
    link.poll()
    refusal = second.receive()
    assert isinstance(refusal, Refusal) and "one at a time" in refusal.reason
    assert link.streaming is not None and isinstance(first.receive(), Grant), "the first collector continues"


def test_no_incarnation_is_stated_before_the_first_hello(link, process, tmp_path):
    first = ScriptedCollector(tmp_path)
    poll(link)
    second = ScriptedCollector(tmp_path)
    poll(link)
    refusal = second.receive()
    assert isinstance(refusal, Refusal) and "incarnation" not in refusal.reason
    first.channel.close()
    poll(link)
    lines = (process.run_dir / "logs" / "learner.jsonl").read_text().splitlines()
    (lost,) = [line for line in lines if "collector lost" in line]
    assert "Greeting" in lost and "incarnation" not in lost


def test_a_collector_whose_self_test_fails_is_refused_and_gets_no_grant(link, tmp_path):
    collector = ScriptedCollector(tmp_path)
    collector.send_hello()
    poll(link)
    collector.receive_welcome()
    collector.send_self_test(error=1)
    link.poll()
    refusal = collector.receive()
    assert isinstance(refusal, Refusal) and "self-test failed" in refusal.reason
    assert shared_of(link).replay.num_granted == 0


def test_a_commit_makes_its_chunk_part_of_the_replay(link, join):
    collector = join(link.poll)
    collector.commit_next(version=3)
    (chunk,) = link.poll()
    assert chunk.commit.policy_version == 3 and chunk.rows.shape == (8,)
    assert (chunk.rows["policy_version"] == 3).all() and shared_of(link).replay.num_rows == 8


def test_a_chunk_with_a_wrong_checksum_raises(link, join):
    collector = join(link.poll)
    collector.commit_next(error=1)
    with pytest.raises(TransportError, match=r"has checksum .* expected"):
        link.poll()


def test_a_commit_without_a_grant_is_dropped_and_counted(link, join):
    collector = join(link.poll)
    grant = collector.receive_grant()
    collector.commit(Grant(grant.seq + 5, grant.row, 0))
    assert link.poll() == [] and link.num_dropped == 1
    collector.commit(Grant(grant.seq, grant.row + 8, 0))
    assert link.poll() == [] and link.num_dropped == 2, "the number is right and the row is not"
    collector.commit(grant)
    assert len(link.poll()) == 1


def test_commits_before_a_disconnect_count_and_open_grants_are_granted_again(link, join):
    collector = join(link.poll)
    streaming_of(link).grant()
    first, second = collector.receive_grant(), collector.receive_grant()
    collector.commit(first)
    collector.channel.close()
    assert len(link.poll()) == 1
    link.poll()
    replay = shared_of(link).replay
    assert link.streaming is None and replay.num_rows == 8 and replay.num_granted == 0
    assert join(link.poll).welcome.test_row == second.row
    assert link.num_welcomed == 2


def test_malformed_messages_are_counted_while_the_collector_is_connected(link, join):
    collector = join(link.poll)
    collector.channel._socket.send(b"\xc1 is no message")
    poll(link)
    assert link.streaming is not None and link.num_dropped == 1
    poll(link)
    assert link.num_dropped == 1


@pytest.mark.parametrize("state", ["hello", "self-test"])
def test_a_connection_that_does_not_go_on_is_refused_with_the_reason(process, tmp_path, monkeypatch, state):
    link = make_link(process, tmp_path, self_test_s=-1.0)
    collector = ScriptedCollector(tmp_path)
    poll(link)
    if state == "self-test":
        collector.send_hello()
        poll(link)
        collector.receive_welcome()
    else:
        monkeypatch.setattr(link_module, "GREETING_S", -1.0)
    poll(link)
    refusal = collector.receive()
    assert isinstance(refusal, Refusal) and f"the {state} has not arrived" in refusal.reason
    assert ("deadlines.start_s" in refusal.reason) == (state == "self-test")
    link.close()


def test_a_learner_without_a_collector_logs_that_it_waits(link, monkeypatch, capsys):
    monkeypatch.setattr(link_module, "REMINDER_S", -1.0)
    link.poll()
    assert "waiting for a collector" in capsys.readouterr().err
