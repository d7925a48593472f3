"""Sends full chunks to the learner: copies their rows into the replay, then commits them."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

from collector_proc.episodes import EpisodeTracker, FinishedEpisodes
from collector_proc.learner_input import LearnerInput
from collector_proc.simulators.base import Simulator
from collector_proc.status import StatusReporter
from collector_proc.writer import ChunkWriter
from shared.errors import TransportError
from shared.handover import Channel
from shared.memory import MemoryMeter
from shared.messages import MAX_EPISODES, Commit, Grant
from shared.process import Process

POLL_S = 0.0005  # between two looks at a copy that the loop has to wait for


@dataclass(frozen=True)
class UncommittedChunk:
    """A chunk whose copy to granted rows has started, and which is not committed yet."""

    grant: Grant
    policy_version: int  # of the policy that chose its last actions; 0 if they were random
    checksum: int  # 0 if replay_buffer.checksum is off


class ChunkSender:
    """Copies full chunks into the replay, and commits each as soon as its copy is done.

    At most one chunk is uncommitted at a time, so commits have the order of their grants.
    """

    def __init__(
        self,
        process: Process,
        channel: Channel,
        writer: ChunkWriter,
        tracker: EpisodeTracker,
        learner: LearnerInput,
        simulator: Simulator,
        meter: MemoryMeter,
        status: StatusReporter,
    ) -> None:
        self._process, self._channel = process, channel
        self._writer, self._tracker, self._learner, self._simulator = writer, tracker, learner, simulator
        self._meter, self._status = meter, status
        self._uncommitted: UncommittedChunk | None = None

    def send(self, grant: Grant, policy_version: int) -> None:
        """Start to copy the gathered chunk to the granted rows."""
        assert self._uncommitted is None, "the previous chunk is not committed"
        checksum = self._writer.checksum() if self._process.settings.replay_buffer.checksum else 0
        self._tracker.send()
        self._writer.write(grant.row)  # after the numbers: once the rows are complete, the numbers are too
        self._uncommitted = UncommittedChunk(grant, policy_version, checksum)

    def commit_if_done(self) -> bool:
        """Commit the uncommitted chunk if its copy is done, and return whether it was. This does not wait for the copy.

        Raises: Disconnected if the learner has ended.
        """
        if self._uncommitted is None or not self._writer.done():
            return False
        chunk, self._uncommitted = self._uncommitted, None
        episodes = self._tracker.take(MAX_EPISODES)
        commit = self._commit(chunk, episodes)
        compile_s = self._process.settings.deadlines.compile_s  # a learner that compiles does not read its socket
        self._channel.send(commit, deadline_s=compile_s, alive=self._process.progress.advance)
        self._status.report(episodes.steps)
        return True

    def wait_until_committed(self) -> None:
        """Wait until the uncommitted chunk, if there is one, has been copied and committed.

        Raises: Disconnected if the learner has ended; TransportError if the copy takes longer than a tick may take.
        """
        began, deadlines = time.monotonic(), self._process.settings.deadlines
        while self._uncommitted is not None and not self.commit_if_done():
            self._process.progress.advance()
            self._learner.read_grants()  # raises Disconnected if the learner has ended
            limit, setting = deadlines.step_s, "deadlines.step_s"
            if self._process.stop.requested:
                limit, setting = min((limit, setting), (deadlines.stop_s / 2, "deadlines.stop_s"))
            if time.monotonic() - began > limit:
                raise TransportError(
                    f"the copy of a chunk to row {self._uncommitted.grant.row} of the replay is not done after "
                    f"{limit:g} s; expected it to take milliseconds; check whether another process uses the GPU, or "
                    f"raise {setting}"
                )
            time.sleep(POLL_S)

    def _commit(self, chunk: UncommittedChunk, episodes: FinishedEpisodes) -> Commit:
        count, memory = len(episodes.returns), self._meter.read()
        return Commit(
            seq=chunk.grant.seq,
            row=chunk.grant.row,
            agent_steps=episodes.steps,
            env_frames=episodes.steps * self._simulator.frames_per_step,
            policy_version=chunk.policy_version,
            checksum=chunk.checksum,
            returns=struct.pack(f"<{count}f", *episodes.returns),
            lengths=struct.pack(f"<{count}i", *episodes.lengths),
            kinds=bytes(episodes.kinds),
            versions=struct.pack(f"<{count}q", *episodes.versions),
            num_episodes=episodes.num_episodes,
            num_diverged=self._simulator.num_diverged,
            eval_steps=episodes.eval_steps,
            rss_bytes=memory.rss_bytes,
            gpu_bytes=memory.gpu_bytes,
            device_bytes=memory.device_bytes,
        )
