"""Waiting for the learner: for grants, which allow a chunk to be written, and for weights to act with."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from collector_proc.status import StatusReporter
from collector_proc.weights_receiver import WeightsReceiver
from shared.config import DeadlineSettings
from shared.errors import TransportError
from shared.handover import Channel
from shared.messages import Grant, Refusal

if TYPE_CHECKING:
    from shared.lifetime import StopFlag
    from shared.progress import Progress


class LearnerInput:
    """Receives what the learner sends to this collector: grants through the socket, and weights through ZeroMQ."""

    def __init__(
        self,
        channel: Channel,
        weights: WeightsReceiver,
        *,
        deadlines: DeadlineSettings,
        status: StatusReporter,
        progress: Progress,
        stop: StopFlag,
    ) -> None:
        self.weights = weights
        self._channel, self._deadlines = channel, deadlines
        self._status, self._progress, self._stop = status, progress, stop
        self._grants: deque[Grant] = deque()  # received and not used yet, oldest first

    def read_grants(self) -> None:
        """Receive every waiting message.

        Raises: Disconnected if the learner has ended; TransportError if it refuses this collector.
        """
        while (received := self._channel.receive()) is not None:
            message, _ = received
            if isinstance(message, Refusal):
                raise TransportError(f"the learner refused this collector: {message.reason}")
            if isinstance(message, Grant):
                self._grants.append(message)

    def wait_for_grant(self) -> Grant:
        """Return the oldest unused grant; wait for one if there is none.

        Raises: StopRequested if asked to stop while waiting; as `read_grants`.
        """
        self.read_grants()
        if not self._grants:
            self._progress.phase("waiting")
        while not self._grants:
            self._stop.check()
            self._status.report()  # while no grant arrives, the reported pace falls to 0
            self._progress.advance()
            self._channel.wait(0.05)
            self.read_grants()
        self._progress.phase("collecting")
        return self._grants.popleft()

    def wait_for_version(self, version: int) -> None:
        """Adopt weights until they are of this policy version or a later one.

        Raises: StopRequested if asked to stop; TransportError if the weights do not arrive in time; as `read_grants`.
        """
        limit = self._deadlines.compile_s + self._deadlines.step_s  # the learner compiles before it publishes
        end = time.monotonic() + limit
        while True:
            self._stop.check()
            if self.weights.version >= version:
                return
            if time.monotonic() > end:
                raise TransportError(
                    f"the learner's weights did not arrive within {limit:.0f} s: policy version {self.weights.version}, "
                    f"{self.weights.num_refused} messages with unsuitable weights; expected version {version} or later; "
                    "look at logs/learner.jsonl, and raise deadlines.compile_s if the learner was still compiling"
                )
            if not self.weights.adopt():
                self._progress.advance()
                self.read_grants()  # raises Disconnected if the learner has ended
                time.sleep(0.002)
