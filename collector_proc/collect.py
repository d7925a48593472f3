"""The collector's loop: act, tick, gather rows, send full chunks, commit them.

A collector owns nothing that must survive it. If it dies, launch starts another one, and the learner keeps the replay.
"""

from __future__ import annotations

import contextlib
import math
import time

import torch
from torch import Tensor

from collector_proc.acting_policy import ActingPolicy
from collector_proc.arrival_mover import ArrivalMover
from collector_proc.chunk_sender import ChunkSender
from collector_proc.connect import Connection
from collector_proc.copies import Copier
from collector_proc.episodes import EpisodeTracker
from collector_proc.learner_input import LearnerInput
from collector_proc.memory_limit import MemoryLimit
from collector_proc.modes import make_mode
from collector_proc.simulators.base import Arrival, Simulator
from collector_proc.status import StatusReporter
from collector_proc.weights_receiver import WeightsReceiver
from shared.handover import Disconnected
from shared.lifetime import StopRequested
from shared.memory import MemoryMeter
from shared.process import Process


class Collector:
    """One collector of a run: a simulator, the acting policy, and the stream of chunks to the learner.

    ticks: K, the ticks of one chunk. incarnation: how many collectors of this run came before. device: the acting
    device. copier, meter: None creates the ones that fit the device.
    """

    def __init__(
        self,
        process: Process,
        simulator: Simulator,
        connection: Connection,
        *,
        ticks: int,
        incarnation: int,
        seed: int,
        device: torch.device,
        copier: Copier | None = None,
        meter: MemoryMeter | None = None,
    ) -> None:
        self._process, self._simulator, self._connection, self._device = process, simulator, connection, device
        settings, run, spec = process.settings, process.run, simulator.spec
        meter = meter or MemoryMeter(str(device))
        self._acting = ActingPolicy(
            spec, settings.networks, settings.collector, device=device, seed=seed, random_ticks=connection.random_ticks
        )
        self._weights = WeightsReceiver(self._acting.policy, socket_dir=run.socket_dir, run_id=run.run_id)
        process.progress.phase("self-test")
        # After the self-test the learner publishes weights, so the receiver must exist.
        self._writer, first_grant = connection.pass_self_test(ticks=ticks, copier=copier)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the self-test needed memory that the simulator can use better
        self._tracker = EpisodeTracker(
            spec, ticks=ticks, evaluations=self._acting.evaluations, copier=self._writer.copier
        )
        self._memory_limit = MemoryLimit(meter, settings.collector.max_rss_gb, incarnation=incarnation)
        hours = settings.collector.recycle_after_hours
        self._recycle_at = math.inf if hours is None else time.monotonic() + 3600.0 * hours
        self.is_recycled = False  # `run` returned because this process reached collector.recycle_after_hours
        agent_steps = connection.welcome.agent_steps
        self._status = StatusReporter(process.progress, self._weights, self._memory_limit, agent_steps)
        self._learner = LearnerInput(process, connection.channel, self._weights, self._status, [first_grant])
        self._mode = make_mode(settings.collector.mode, self._learner, self._acting)
        self._sender = ChunkSender(
            process, connection.channel, self._writer, self._tracker, self._learner, simulator, meter, self._status
        )

    @property
    def agent_steps(self) -> int:
        """Agent steps of the whole run that were committed."""
        return self._status.agent_steps

    @property
    def num_chunks(self) -> int:
        """How many chunks this collector has committed."""
        return self._status.num_chunks

    @property
    def exceeded_memory_limit(self) -> bool:
        """Whether `run` returned because this process exceeded collector.max_rss_gb."""
        return self._memory_limit.exceeded

    def run(self) -> None:
        """Stream chunks until asked to stop, until the learner ends, or until a limit of memory or age is reached.

        Raises: SettingError or SimulatorError if one chunk's work already exceeds the memory limit; TransportError.
        """
        self._process.progress.phase("collecting")
        try:
            with contextlib.suppress(StopRequested):
                self._stream()
            self._sender.wait_until_committed()  # a chunk whose copy has started still counts
        except Disconnected:
            return  # the learner has ended; launch decides what happens next
        finally:
            self._weights.close()
            self._connection.close(self._writer)

    def _stream(self) -> None:
        """Run the loop.

        In async mode it blocks only until the first weights arrive, until a full chunk has a grant and the previous
        chunk is committed, and until the simulator has the action.
        """
        mover, arrival = ArrivalMover(self._device), self._simulator.reset()
        action = torch.zeros(self._simulator.spec.num_envs, self._simulator.spec.action_dim, device=self._device)
        version = 0
        self._mode.begin_chunk()
        # A restarted collector takes no random actions, so it waits for the first weights.
        self._learner.wait_for_version(self._acting.required_version)
        while not self._process.stop.requested:
            arrival = mover.move(arrival)
            action = torch.where(arrival.is_first[:, None], 0.0, action)
            self._gather(arrival, action, version)
            if self._writer.full:
                self._send_chunk(version)
                self.is_recycled = time.monotonic() >= self._recycle_at
                if not self._memory_limit.check() or self.is_recycled:
                    self._status.report()  # launch shows the memory that was held
                    return
                self._mode.begin_chunk()
            self._sender.commit_if_done()
            self._learner.read_grants()  # raises Disconnected if the learner has ended
            self._mode.adopt_weights()
            version = 0 if self._acting.is_random else self._weights.version
            action = self._acting.act(arrival, action, version=version)
            arrival = self._simulator.step(action.to(self._simulator.device))
            self._process.progress.advance()

    def _gather(self, arrival: Arrival, action: Tensor, version: int) -> None:
        """Add one row to the chunk. version: of the policy that chose the action; 0 if it was random."""
        self._writer.add(arrival, action, version)
        self._tracker.add(arrival, random=version == 0)

    def _send_chunk(self, version: int) -> None:
        """Send the full chunk, after the previous one was committed."""
        self._sender.wait_until_committed()
        self._sender.send(self._mode.take_grant(), version)
        if self._mode.waits_for_commit:
            self._sender.wait_until_committed()
