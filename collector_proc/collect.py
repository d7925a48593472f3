"""The collector's loop: act, tick, gather rows, commit chunks. It owns nothing that must survive."""

from __future__ import annotations

import os
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from collector_proc.acting_policy import ActingPolicy
from collector_proc.arrival_mover import ArrivalMover
from collector_proc.copies import copier_between
from collector_proc.episodes import EpisodeTracker
from collector_proc.simulators.base import Simulator
from collector_proc.weights_receiver import WeightsReceiver
from collector_proc.writer import ChunkWriter
from shared.config import Geometry, Settings
from shared.errors import SettingError, SimulatorError, TransportError
from shared.handover import Channel, Disconnected, import_cuda_slab, map_memfd_slab, pin_slab
from shared.memory import MemoryMeter
from shared.messages import MAX_EPISODES, PROTOCOL, Commit, Grant, Hello, Refusal, SelfTest, Welcome
from shared.progress import HELD_GB
from shared.stream import plan_layout, ring_views

if TYPE_CHECKING:
    from shared.lifetime import StopFlag
    from shared.progress import Progress

PACE_WINDOW_S = 5.0
POLL_S = 0.0005  # between two looks at copies that the loop has to wait for


@dataclass(frozen=True)
class UncommittedChunk:
    """A chunk on its way to granted rows. policy_version: of the policy that chose its last actions, 0 for random ones."""

    grant: Grant
    policy_version: int
    checksum: int


class Collector:
    """One incarnation: connected to the learner, with the replay mapped and a simulator running."""

    def __init__(
        self,
        settings: Settings,
        geometry: Geometry,
        simulator: Simulator,
        channel: Channel,
        *,
        socket_dir: str,
        run_id: str,
        incarnation: int,
        seed: int,
        device: torch.device,
        progress: Progress,
        stop: StopFlag,
    ) -> None:
        self._settings, self._geometry, self._simulator = settings, geometry, simulator
        self._channel, self._device, self._progress, self._stop = channel, device, progress, stop
        self._run_id, self._incarnation = run_id, incarnation
        self._grants: deque[Grant] = deque()
        self._turn: Grant | None = None  # lockstep: the grant of the chunk being gathered
        self._uncommitted: UncommittedChunk | None = None  # written, and not yet committed
        self._lockstep = settings.collector.mode == "lockstep"
        self._window = (time.monotonic(), 0)
        self._meter = MemoryMeter(str(device))
        self._held_gb = 0.0  # when it was held against the limit last
        self._fitted = False  # a chunk was committed within the limit of memory
        self.outgrown = False
        welcome = self._hello()
        self.agent_steps = welcome.agent_steps
        random_ticks = -(-welcome.random_frames // geometry.num_envs)
        self._acting = ActingPolicy(
            simulator.spec, settings.networks, settings.collector, device=device, seed=seed, random_ticks=random_ticks
        )
        self._weights = WeightsReceiver(self._acting.policy, socket_dir=socket_dir, run_id=run_id)
        self._self_test(welcome)

    def run(self) -> None:
        """Stream chunks until asked to stop, until the learner is gone, or until memory has `outgrown` its limit.

        Raises: SettingError, SimulatorError if the limit does not hold even one chunk's work; TransportError.
        """
        self._progress.phase("collecting")
        try:
            self._stream()
            self._settle()  # what was written when the stop came is whole, and counts
        except Disconnected:
            return  # the learner ended; launch decides what comes next
        finally:
            self._weights.close()
            self._channel.close()

    def _stream(self) -> None:
        """Act, tick, gather, ship, until asked to stop. On a GPU nothing in the loop waits for it, but a full chunk for the
        arrival of the last one."""
        mover, arrival = ArrivalMover(self._device), self._simulator.reset()
        tracker = self._tracker = self._make_tracker()
        action = torch.zeros(self._geometry.num_envs, self._simulator.spec.action_dim, device=self._device)
        version = 0
        # a restarted collector has no random actions left to take: it waits for the learner's weights
        if not self._begin_chunk() or not self._await_version(0 if self._acting.random_ticks > 0 else 1):
            return
        while not self._stop.requested:
            arrival = mover.move(arrival)
            action = torch.where(arrival.is_first[:, None], 0.0, action)
            self._writer.add(arrival, action, version)
            tracker.add(arrival, random=version == 0)
            if self._writer.full and not (self._ship(version) and self._fits() and self._begin_chunk()):
                return
            self._commit_arrived()
            if not self._lockstep:
                self._weights.adopt()
            version = 0 if self._acting.random_ticks > 0 else self._weights.version
            action = self._acting.act(arrival, action, version=version)
            arrival = self._simulator.step(action.to(self._simulator.device))
            self._progress.advance()

    def _make_tracker(self) -> EpisodeTracker:
        return EpisodeTracker(
            self._simulator.spec,
            ticks=self._geometry.ticks_per_chunk,
            evaluation=self._acting.evaluation,
            copier=self._copier,
        )

    def _alive(self) -> None:
        """Called by every wait before the loop. Raises: Disconnected when asked to stop."""
        self._progress.advance()
        if self._stop.requested:
            raise Disconnected("asked to stop")

    def _hello(self) -> Welcome:
        self._progress.phase("hello")
        spec = self._simulator.spec
        self._channel.send(Hello(PROTOCOL, self._run_id, self._incarnation, os.getpid(), spec.to_dict()))
        answer, fds = self._channel.receive_within(
            self._settings.deadlines.start_s + self._settings.deadlines.compile_s,  # it may be compiling
            waiting_for="the learner's welcome",
            alive=self._alive,
        )
        if isinstance(answer, Refusal):
            raise TransportError(f"the learner refused this collector: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise TransportError(f"the learner answered the hello with {type(answer).__name__}, wanted Welcome")
        layout = plan_layout(spec, answer.capacity)
        if layout.num_bytes != answer.num_bytes:
            raise TransportError(f"the replay has {answer.num_bytes} bytes, this stream needs {layout.num_bytes}")
        if answer.transport == "memfd":
            slab = map_memfd_slab(fds[0], answer.num_bytes)
            os.close(fds[0])
            if self._device.type == "cuda":
                pin_slab(slab)
        else:
            slab = import_cuda_slab(answer.uuid, answer.handle, answer.num_bytes)
        ticks = self._geometry.ticks_per_chunk
        self._copier = copier_between(self._device, slab.device)
        self._writer = ChunkWriter(
            ring_views(slab, layout), layout, ticks=ticks, device=self._device, copier=self._copier
        )
        return answer

    def _self_test(self, welcome: Welcome) -> None:
        """Write a pattern the way chunks are written; the learner grants rows only after it found the pattern whole."""
        expected, num_bytes, seconds = self._writer.write_pattern(welcome.test_row)
        self._channel.send(SelfTest(expected, num_bytes, seconds))

    def _wait_for_grant(self) -> Grant | None:
        """The next grant; None when asked to stop. Raises: Disconnected; TransportError on a refusal."""
        self._read_grants()
        if not self._grants:
            self._progress.phase("waiting")
        while not self._grants and not self._stop.requested:
            self._report(0)  # a pace that falls to 0 is what back-pressure looks like
            self._progress.advance()
            self._channel.wait(0.05)
            self._read_grants()
        self._progress.phase("collecting")
        return self._grants.popleft() if self._grants else None

    def _read_grants(self) -> None:
        while (received := self._channel.receive()) is not None:
            message, _ = received
            if isinstance(message, Refusal):
                raise TransportError(f"the learner refused this collector: {message.reason}")
            if isinstance(message, Grant):
                self._grants.append(message)

    def _begin_chunk(self) -> bool:
        """In lockstep: wait for the next grant and adopt the policy it names. False when asked to stop."""
        if not self._lockstep:
            return True
        self._turn = self._wait_for_grant()
        if self._turn is None:
            return False
        return self._await_version(max(self._turn.version, 0 if self._acting.random_ticks > 0 else 1))

    def _await_version(self, wanted: int) -> bool:
        """Adopt weights until they are at least of version `wanted`; False when asked to stop. Raises: TransportError."""
        deadlines = self._settings.deadlines
        end = time.monotonic() + deadlines.compile_s + deadlines.step_s  # the first come after the learner has compiled
        while self._weights.version < wanted and not self._stop.requested:
            if time.monotonic() > end:
                raise TransportError(
                    f"waited {deadlines.compile_s + deadlines.step_s:.0f} s for the learner's weights, have version "
                    f"{self._weights.version}, refused {self._weights.num_refused}; wanted {wanted}; see logs/learner.jsonl, "
                    "raise deadlines.compile_s if it was still compiling"
                )
            if not self._weights.adopt():
                self._progress.advance()
                self._read_grants()  # notices a learner that is gone
                time.sleep(0.002)
        return not self._stop.requested

    def _ship(self, version: int) -> bool:
        """Send the gathered chunk off to granted rows; in lockstep it is committed then. False when asked to stop."""
        self._settle()  # one at a time: commits leave in the order of their grants
        grant, self._turn = self._turn or self._wait_for_grant(), None
        if grant is None:
            return False
        chunk_sum = self._writer.checksum() if self._settings.replay_buffer.checksum else 0
        self._tracker.send()
        self._writer.write(grant.row)  # behind the numbers: what says that the rows are there says it of both
        self._uncommitted = UncommittedChunk(grant, version, chunk_sum)
        if self._lockstep:
            self._settle()
        return True

    def _fits(self) -> bool:
        """Whether this process still holds less than collector.max_rss_gb.

        Raises: SettingError if it never did; SimulatorError, a death that counts, where an earlier incarnation had fitted.
        """
        limit = self._settings.collector.max_rss_gb
        # an older measurement may be from before the first chunk's work
        self._held_gb = held_gb = self._meter.read(anew=not self._fitted).rss_bytes / 1e9
        if limit is None or held_gb <= limit:
            self._fitted = True
            return True
        if not self._fitted:
            kind = SettingError if self._incarnation == 0 else SimulatorError
            raise kind(
                f"collector.max_rss_gb={limit:g} is below the {held_gb:.2f} GB that the collector and its workers hold after "
                f"one chunk; wanted room to grow; set collector.max_rss_gb={2 * held_gb:.1f}, or null for no limit"
            )
        self.outgrown = True
        self._report(0)  # launch tells how much it was
        return False

    def _settle(self) -> None:
        """Commit the chunk that is on its way, once it has arrived.

        Raises: Disconnected if the learner is gone; TransportError when the copies take longer than a tick may.
        """
        began, deadlines = time.monotonic(), self._settings.deadlines
        while self._uncommitted is not None and not self._commit_arrived():
            self._progress.advance()
            self._read_grants()  # notices a learner that is gone
            limit = min(deadlines.step_s, deadlines.stop_s / 2) if self._stop.requested else deadlines.step_s
            if time.monotonic() - began > limit:
                raise TransportError(
                    f"a chunk has not arrived in the replay's row {self._uncommitted.grant.row} after {limit:.0f} s; wanted its "
                    "copies to take milliseconds; look whether another process holds the GPU, or raise deadlines.step_s"
                )
            time.sleep(POLL_S)

    def _commit_arrived(self) -> bool:
        """Tell the learner of the chunk on its way if it has arrived; True if so. Raises: Disconnected."""
        if self._uncommitted is None or not self._writer.done():
            return False
        chunk, self._uncommitted = self._uncommitted, None
        finished = self._tracker.take(MAX_EPISODES)
        count, memory = len(finished.returns), self._meter.read()
        commit = Commit(
            seq=chunk.grant.seq,
            row=chunk.grant.row,
            agent_steps=finished.steps,
            env_frames=finished.steps * self._simulator.frames_per_step,
            policy_version=chunk.policy_version,
            checksum=chunk.checksum,
            returns=struct.pack(f"<{count}f", *finished.returns),
            lengths=struct.pack(f"<{count}i", *finished.lengths),
            kinds=bytes(finished.kinds),
            num_episodes=finished.num_episodes,
            num_diverged=getattr(self._simulator, "num_diverged", 0),
            rss_bytes=memory.rss_bytes,
            gpu_bytes=memory.gpu_bytes,
            device_bytes=memory.device_bytes,
        )
        self._channel.send(commit, deadline_s=self._settings.deadlines.compile_s, alive=self._progress.advance)
        self._report(finished.steps)
        return True

    def _report(self, steps: int) -> None:
        """The live numbers; the pace is that of the last seconds."""
        now, (since, counted) = time.monotonic(), self._window
        self.agent_steps += steps
        self._window = (since, counted + steps)
        fps = (counted + steps) / max(now - since, 1e-9)
        self._progress.status(
            {
                "agent_steps": self.agent_steps,
                "fps": fps,
                "policy_version": self._weights.version,
                "weights_refused": self._weights.num_refused,
                HELD_GB: self._held_gb,
            }
        )
        if now - since > PACE_WINDOW_S:
            self._window = (now, 0)
