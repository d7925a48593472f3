"""The collector's side of the socket inside a test: it sends one message at a time, when the test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter
from shared.handover import Channel, connect, map_memfd_slab
from shared.messages import PROTOCOL, Commit, Grant, Hello, Message, SelfTest, Welcome
from shared.socket_folder import read_secret
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views

SPEC = StreamSpec(2, {"policy": ObsSpec((3,), "float32")}, 1)
DEADLINE_S = 5.0


def nothing() -> None:
    return None


Spoil = Callable[[dict[tuple[str, ...], torch.Tensor]], None]


def nothing_spoiled(rows: dict[tuple[str, ...], torch.Tensor]) -> None:
    return None


class ScriptedCollector:
    """Connects at once. Every receiving method has a deadline of DEADLINE_S."""

    def __init__(self, socket_dir: Path, ticks_per_chunk: int = 8) -> None:
        self.channel: Channel = connect(socket_dir, deadline_s=DEADLINE_S, alive=nothing)
        self._ticks, self._secret = ticks_per_chunk, read_secret(socket_dir)

    def send_hello(self, **changes) -> None:
        """Send a valid hello of incarnation 0, except for the fields in `changes`."""
        values = {
            "protocol": PROTOCOL,
            "run_id": "run",
            "secret": self._secret,
            "incarnation": 0,
            "pid": 1,
            "spec": SPEC.to_dict(),
        }
        self.channel.send(Hello(**(values | changes)))

    def receive(self) -> Message:
        return self.channel.receive_within(DEADLINE_S, waiting_for="a message of the learner", alive=nothing)[0]

    def receive_grant(self) -> Grant:
        grant = self.receive()
        assert isinstance(grant, Grant), grant
        return grant

    def receive_welcome(self) -> Welcome:
        """Receive the welcome and map the slab."""
        welcome, fds = self.channel.receive_within(DEADLINE_S, waiting_for="the welcome", alive=nothing)
        assert isinstance(welcome, Welcome), welcome
        layout = plan_layout(SPEC, welcome.capacity)
        ring = ring_views(map_memfd_slab(fds[0], welcome.num_bytes), layout)
        os.close(fds[0])
        self._writer = ChunkWriter(ring, layout, ticks=self._ticks, device=torch.device("cpu"))
        self.welcome = welcome
        return welcome

    def send_self_test(self, *, error: int = 0) -> None:
        """Write the pattern and report its checksum plus `error`."""
        checksum, num_bytes, seconds = self._writer.write_pattern(self.welcome.test_row, nonce=self.welcome.nonce)
        self.channel.send(SelfTest(checksum + error, num_bytes, seconds))

    def commit(self, grant: Grant, *, error: int = 0, version: int = 0, spoil: Spoil = nothing_spoiled) -> None:
        """Fill a granted chunk with random rows and commit it; its checksum is wrong by `error`.

        spoil: changes the rows (K, E, ...) before they are written.
        """
        for _ in range(self._ticks):
            false = torch.zeros(2, dtype=torch.bool)
            arrival = Arrival({"policy": torch.randn(2, 3)}, torch.rand(2), false, false, false)
            self._writer.add(arrival, torch.rand(2, 1), version)
        spoil(self._writer.rows)
        checksum = self._writer.checksum()
        self._writer.write(grant.row)
        self.channel.send(Commit(grant.seq, grant.row, 16, 32, version, checksum + error))

    def commit_next(self, *, error: int = 0, version: int = 0, spoil: Spoil = nothing_spoiled) -> None:
        """Receive one grant and commit its chunk."""
        self.commit(self.receive_grant(), error=error, version=version, spoil=spoil)
