"""The status that the collector publishes in its progress file; launch shows it."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from collector_proc.memory_limit import MemoryLimit
from collector_proc.weights_receiver import WeightsReceiver
from shared.metrics import CollectorStatus

if TYPE_CHECKING:
    from shared.progress import Progress

PACE_WINDOW_S = 5.0


class Mark(NamedTuple):
    """The time of a report, in seconds, and the agent steps by then."""

    s: float
    steps: int


class StatusReporter:
    """Counts agent steps and publishes a `CollectorStatus`. Its pace is the mean of at least the last 5 seconds.

    agent_steps: of the whole run when this collector started.
    """

    def __init__(
        self, progress: Progress, weights: WeightsReceiver, memory_limit: MemoryLimit, agent_steps: int
    ) -> None:
        self._progress, self._weights, self._memory_limit = progress, weights, memory_limit
        self._marks = deque([Mark(time.monotonic(), agent_steps)])  # the pace counts from the first one
        self.agent_steps, self.num_chunks = agent_steps, 0

    def report(self, new_steps: int = 0) -> None:
        """Add the agent steps of a committed chunk to the count and publish the status."""
        now = time.monotonic()
        self.agent_steps += new_steps
        self.num_chunks += new_steps > 0
        while len(self._marks) > 1 and now - self._marks[1].s > PACE_WINDOW_S:
            self._marks.popleft()
        began = self._marks[0]
        self._marks.append(Mark(now, self.agent_steps))
        self._progress.status(
            CollectorStatus(
                agent_steps=self.agent_steps,
                fps=(self.agent_steps - began.steps) / max(now - began.s, 1e-9),
                policy_version=self._weights.version,
                weights_refused=self._weights.num_refused,
                rss_gb=self._memory_limit.held_gb,
                chunks=self.num_chunks,
            )
        )
