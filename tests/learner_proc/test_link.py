"""The socket to the collector: who is welcomed, who is refused, and what happens to grants and commits."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learner_proc import link as link_module
from learner_proc.handshake import Handshake, SharedReplay
from learner_proc.link import CollectorLink
from learner_proc.startup import allocate_replay
from learner_proc.streaming import Streaming
from shared.checksum import checksum
from shared.errors import TransportError
from shared.geometry import Geometry
from shared.handover import Disconnected
from shared.messages import PROTOCOL, Commit, Grant, Refusal, encode
from shared.process import Process
from shared.socket_folder import obtain_secret
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.scripted_collector import SPEC, ScriptedCollector

HUGE = {f"entry {number}": ObsSpec((1 << 24,), "float32") for number in range(100)}  # a replay of 1.7 TB


def make_link(process: Process, folder: Path, **options: Any) -> CollectorLink:
    settings, cpu = process.settings, torch.device("cpu")
    handshake = Handshake(
        run_id="run",
        secret=obtain_secret(folder),
        num_envs=2,
        allocate=lambda spec, on_gpu: allocate_replay(spec, settings, Geometry.of(settings), device=cpu),
        random_frames=lambda: 32,
        agent_steps=lambda: 7,
        gpu_storage=None,
        log=process.log,
        **options,
    )
    return CollectorLink(folder, handshake, check_sums=True, log=process.log, newest_version=lambda: 3)


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


def checksum_at(link: CollectorLink, row: int) -> int:
    replay = shared_of(link).replay
    return checksum(replay.chunk(row)[entry.key] for entry in replay.layout.fields)


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
        ({"secret": bytes(32)}, "does not contain the secret of this run"),
        ({"secret": bytes(32), "spec": {}}, "does not contain the secret of this run"),
        ({"spec": {"num_envs": 2}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"num_envs": float("inf")}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"num_envs": True}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"obs": {"a.b": {"shape": [3], "dtype": "float32"}}}}, "without a dot"),
        ({"spec": SPEC.to_dict() | {"obs": {"\x1b[2J": {"shape": [3], "dtype": "float32"}}}}, "printable"),
        ({"spec": SPEC.to_dict() | {"obs": {"x": {"shape": [1] * 9, "dtype": "float32"}}}}, "9 dimensions"),
        ({"spec": StreamSpec(2, HUGE, 1).to_dict()}, "expected a replay that fits"),
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


def test_a_stranger_that_sends_no_hello_delays_the_collector_and_does_not_replace_it(link, process, tmp_path):
    stranger = ScriptedCollector(tmp_path)
    poll(link)
    collector = ScriptedCollector(tmp_path)
    collector.send_hello()
    poll(link)
    stranger.channel.close()
    poll(link)
    collector.receive_welcome()
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


@pytest.mark.parametrize(
    "changes",
    [
        {"row": 128},
        {"seq": 99},
        {"agent_steps": 17},
        {"agent_steps": 1 << 48},
        {"env_frames": 1 << 48},
        {"num_episodes": 17},
        {"num_diverged": 1 << 48},
        {"policy_version": 4},
    ],
    ids=str,
)
def test_a_commit_with_impossible_numbers_is_dropped_and_the_right_one_still_counts(process, tmp_path, join, changes):
    link = make_link(process, tmp_path)
    collector = join(link.poll)
    grant = collector.receive_grant()
    right = Commit(grant.seq, grant.row, 16, 32, 0, checksum_at(link, grant.row))
    collector.channel.send(dataclasses.replace(right, **changes))
    assert link.poll() == [] and link.num_dropped == 1
    collector.channel.send(right)
    assert [chunk.commit for chunk in link.poll()] == [right]
    link.close()


def test_a_collector_that_never_repairs_a_dropped_commit_is_refused(link, join, monkeypatch):
    collector = join(link.poll)
    grant = collector.receive_grant()
    monkeypatch.setattr(link_module, "REPAIR_S", -1.0)
    link.poll()
    assert link.streaming is not None, "no commit was dropped yet"
    collector.channel.send(Commit(grant.seq, grant.row, 17, 32, 0))
    link.poll()
    refusal = collector.receive()
    assert isinstance(refusal, Refusal) and "valid commit after one that was dropped" in refusal.reason


def test_descriptors_that_come_with_any_message_are_closed(link, join):
    collector = join(link.poll)
    grant = collector.receive_grant()
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as file:
        for number in range(20):
            collector.channel.send(Grant(number, 0, 0), (file.fileno(),))
            socket.send_fds(collector.channel._socket, [b"no message"], [file.fileno()])  # not one of the protocol
            socket.send_fds(collector.channel._socket, [encode(Grant(1, 1, 1))], [file.fileno()] * 5)
            poll(link)
    assert len(os.listdir("/proc/self/fd")) == before
    assert link.num_dropped == 60
    collector.commit(grant)
    assert len(link.poll()) == 1, "the collector goes on"


def test_a_process_without_free_descriptors_accepts_the_collector_later(link, join, tmp_path, monkeypatch):
    class Full:
        def accept(self):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def close(self):
            return None

    listener = link.listener._socket
    link.listener._socket = Full()
    for _ in range(3):
        link.poll()
    link.listener._socket = listener
    join(link.poll)
    assert link.streaming is not None


def test_a_flood_of_malformed_messages_is_counted_at_once_and_logged_once(link, join, process):
    collector = join(link.poll)
    grant = collector.receive_grant()
    log = process.run_dir / "logs" / "learner.jsonl"
    before = len(log.read_text().splitlines())
    for number in range(1, 101):
        collector.channel._socket.send(b"\xc1garbage")
        link.poll()
        assert link.num_dropped == number
    assert len(log.read_text().splitlines()) == before + 1
    collector.commit(grant)
    assert len(link.poll()) == 1


def test_one_poll_takes_a_bounded_number_of_messages(link, join):
    collector = join(link.poll)
    for _ in range(60):
        collector.channel.send(Grant(1, 1, 1))
    link.poll()
    assert link.num_dropped == link_module.MAX_MESSAGES


def test_sockets_that_are_deleted_in_mid_run_are_made_again_and_named(link, join, process, tmp_path):
    first = join(link.poll)
    first.receive_grant()
    (tmp_path / "replay.sock").unlink()
    (tmp_path / "secret").unlink()
    link.listener.watch._looked_at = -1e9  # the next look is due
    link.poll()
    lines = (process.run_dir / "logs" / "learner.jsonl").read_text()
    assert "the folder of sockets was damaged" in lines and "was deleted" in lines
    first.channel.close()
    poll(link)
    join(link.poll)
    assert link.streaming is not None
