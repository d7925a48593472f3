"""Waiting for the learner: for grants, which allow a chunk to be written, and for weights to act with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from collector_proc.rounds import RoundBegins
from collector_proc.status import StatusReporter
from collector_proc.weights_receiver import WeightsReceiver
from shared.errors import HandoverError, TransportError
from shared.handover import Channel, close_descriptors
from shared.messages import Grant, NextRound, Refusal
from shared.process import Process


class LearnerInput:
    """Receives what the learner sends to this collector: grants through the socket, and weights through ZeroMQ."""

    def __init__(
        self,
        process: Process,
        channel: Channel,
        weights: WeightsReceiver,
        status: StatusReporter,
        grants: Iterable[Grant] = (),
    ) -> None:
        """grants: those that were received already, oldest first."""
        self.weights = weights
        self._process, self._channel, self._status = process, channel, status
        self._grants: deque[Grant] = deque(grants)  # received and not used yet, oldest first

    def read_grants(self) -> None:
        """Receive every waiting message.

        Raises: Disconnected if the learner has ended; HandoverError if it refuses this collector; RoundBegins if it
        begins another round of lockstep.
        """
        while (received := self._channel.receive()) is not None:
            message, descriptors = received
            close_descriptors(descriptors)
            if isinstance(message, Refusal):
                raise HandoverError(f"the learner refused this collector: {message.reason}")
            if isinstance(message, NextRound):
                raise RoundBegins(message.number)
            if isinstance(message, Grant):
                self._grants.append(message)

    def wait_for_grant(self) -> Grant:
        """Return the oldest unused grant; wait for one if there is none.

        This wait has no deadline, because the learner may need no new rows for a long time; launch watches the learner.
        Raises: StopRequested if asked to stop while waiting; as `read_grants`.
        """
        self.read_grants()
        if not self._grants:
            self._process.progress.phase("waiting")
        while not self._grants:
            self._process.alive()
            self._status.report()  # while no grant arrives, the reported pace falls to 0
            self._channel.wait(0.05)
            self.read_grants()
        self._process.progress.phase("collecting")
        return self._grants.popleft()

    def wait_for_version(self, version: int) -> None:
        """Adopt weights until they are of this policy version or a later one.

        Raises: StopRequested if asked to stop; TransportError if the weights do not arrive in time; as `read_grants`.
        """
        deadlines = self._process.settings.deadlines
        limit = deadlines.compile_s + deadlines.step_s  # the learner compiles before it publishes
        end = time.monotonic() + limit
        while True:
            self._process.alive()
            if self.weights.version >= version:
                return
            if time.monotonic() > end:
                raise TransportError(
                    f"after {limit:.0f} s the newest weights from the learner have version {self.weights.version} "
                    f"(unsuitable messages: {self.weights.num_refused}{self._last_refusal()}); expected version "
                    f"{version} or later; look at logs/learner.jsonl, and raise deadlines.compile_s if the learner was "
                    "still compiling"
                )
            if not self.weights.adopt():
                self.read_grants()  # raises Disconnected if the learner has ended
                self.weights.reconnect_if_silent()
                time.sleep(0.002)

    def _last_refusal(self) -> str:
        return f", the last one: {self.weights.last_refusal}" if self.weights.last_refusal else ""
