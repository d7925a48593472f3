"""Grants and commits: how one collector that passed its self-test fills the replay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from learner_proc.handshake import Testing
from shared.checksum import checksum
from shared.errors import TransportError
from shared.handover import Disconnected
from shared.messages import Commit, Grant

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger
    from tensordict import TensorDict

MAX_REPEAT = 10_000  # env frames in an agent step, the maximum of env.frame_skip
REPAIR_S = 60.0  # a collector that had a commit dropped must make a valid one in this time


@dataclass(frozen=True)
class Chunk:
    """A committed chunk. `rows` are views of its K rows in the replay, valid until these rows are granted again."""

    commit: Commit
    rows: TensorDict


class Streaming:
    """Grants rows of the replay to one collector and takes its commits. Never blocks.

    A grant passes through two queues: it waits as unsent until the GPU no longer reads its rows and the socket has
    room, then as open until the collector commits it. A collector commits its grants in their order.
    """

    def __init__(
        self, testing: Testing, sequence: Iterator[int], *, check_sums: bool, log: FilteringBoundLogger
    ) -> None:
        """The chunk of the self-test becomes the first grant; call `flush` to send it.

        sequence: numbers for grants, unique in the run. check_sums: compare the checksum of every chunk.
        """
        self.channel, self.shared = testing.channel, testing.shared
        self._sequence, self._check_sums, self._log = sequence, check_sums, log
        self._unsent: deque[tuple[Grant, torch.cuda.Event | None]] = deque()
        self._open: deque[Grant] = deque()
        self._num_commits = 0
        self.dropped_since: float | None = None  # when a commit was dropped; None once a valid one has arrived
        self._unsent.append((Grant(next(sequence), testing.test_row, 0), None))

    def grant(self, version: int = 0) -> None:
        """Take K rows out of the sampler's reach and send them to the collector once the GPU has passed this point.

        version: the policy that the collector must adopt before it fills them (lockstep); 0 for any.
        """
        replay = self.shared.replay
        grant = Grant(next(self._sequence), replay.grant(), version)
        event = None
        if replay.device.type == "cuda":  # queued gradient steps may still sample these rows
            event = torch.cuda.Event()
            event.record()
        self._unsent.append((grant, event))
        self.flush()

    def flush(self) -> None:
        """Send every grant whose event has passed, as far as the socket has room. Never waits.

        If the collector has disconnected, the grants stay unsent. `CollectorLink.poll` notices the disconnect after it
        has read the commits that are still in the socket.
        """
        try:
            while self._unsent and (self._unsent[0][1] is None or self._unsent[0][1].query()):
                if not self.channel.try_send(self._unsent[0][0]):
                    return
                self._open.append(self._unsent.popleft()[0])
        except Disconnected:
            self._log.warning("grant not sent: the collector has disconnected")

    def fault_of(self, commit: Commit, *, newest_version: int) -> str | None:
        """Return why a commit must be dropped; None if it answers the oldest open grant and its counts are possible.

        newest_version: the newest policy that was published.
        """
        fault = self._fault_of(commit, newest_version)
        if fault is not None and self.dropped_since is None:
            self.dropped_since = time.monotonic()
        return fault

    def take(self, commit: Commit) -> Chunk:
        """Put an expected commit's chunk into the sampler's reach. Raises: TransportError if its checksum differs."""
        self._open.popleft()
        self._num_commits += 1
        self.dropped_since = None
        replay = self.shared.replay
        if self._check_sums:
            arrived = replay.chunk(commit.row)
            found = checksum(arrived[entry.key] for entry in replay.layout.fields)
            if found != commit.checksum:
                raise TransportError(
                    f"chunk {commit.seq} at ring row {commit.row} has checksum {found} in the replay; expected "
                    f"{commit.checksum} as in its commit; the link between the GPUs corrupts data: "
                    "run both processes on one GPU"
                )
        return Chunk(commit, replay.commit(commit.row))

    def _fault_of(self, commit: Commit, newest_version: int) -> str | None:
        if not self._open:
            return "no grant is open"
        grant, replay = self._open[0], self.shared.replay
        if (commit.seq, commit.row) != (grant.seq, grant.row):
            return f"it is for grant {commit.seq} at row {commit.row}; expected grant {grant.seq} at row {grant.row}"
        rows = replay.ticks_per_chunk * replay.layout.num_envs
        # The collector counts states that diverged since it began, and by then it may have gathered one chunk more.
        limits = {
            "agent_steps": rows,
            "env_frames": commit.agent_steps * MAX_REPEAT,
            "num_episodes": rows,
            "num_diverged": (self._num_commits + 3) * rows,
            "policy_version": newest_version,
        }
        for name, limit in limits.items():
            if getattr(commit, name) > limit:
                return f"its {name} is {getattr(commit, name)}; expected at most {limit}"
        return None
