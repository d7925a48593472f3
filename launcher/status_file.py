"""status.json in the run folder: what `launch.py status` shows. Launch writes it while it runs and when it ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.metrics import UPDATES_PER_S, CollectorStatus, LearnerStatus, read_status

if TYPE_CHECKING:
    from launcher.events import Events
    from launcher.resources import ResourceWatch
    from shared.progress import Snapshot

EVERY_S = 10.0


@dataclass(frozen=True)
class Seen:
    """What launch saw last. row: the newest row of metrics.jsonl. restarts: by process."""

    learner: Snapshot
    collector: Snapshot
    row: Mapping[str, Any]
    restarts: Mapping[str, int]

    def facts(self) -> dict[str, Any]:
        """Return it for status.json."""
        now = time.monotonic()
        return {
            "learner": _process(self.learner, now) | _learner(self.learner, self.row),
            "collector": _process(self.collector, now) | _collector(self.collector),
            "restarts": dict(self.restarts),
        }


class StatusFile:
    """Writes the state of a run every EVERY_S seconds. A disk that is full does not matter."""

    def __init__(self, path: Path, events: Events, resources: ResourceWatch) -> None:
        self._path, self._events, self._resources = path, events, resources
        self._started, self._written_at = time.time(), -EVERY_S
        self._seen: Seen | None = None
        self._problem: Mapping[str, Any] | None = None  # the last one that was written

    def update(self, seen: Seen) -> None:
        """Write the state if it is time or if there is a new problem."""
        self._seen, now = seen, time.monotonic()
        if now - self._written_at >= EVERY_S or self._problem is not self._events.last_problem:
            self._written_at, self._problem = now, self._events.last_problem
            self._write({"state": "running"})

    def end(self, exit_code: int, reason: str, restarts: Mapping[str, int]) -> None:
        """Write the last state."""
        if self._seen is not None:
            self._seen = replace(self._seen, restarts=restarts)
        self._write({"state": "ended", "exit_code": exit_code, "reason": reason})

    def _write(self, facts: Mapping[str, Any]) -> None:
        content = {
            "updated": time.time(),
            "started": self._started,
            "launch_pid": os.getpid(),
            "host": socket.gethostname(),
            **facts,
            **({} if self._seen is None else self._seen.facts()),
            "restart_causes": {role: self._events.causes(role) for role in ("learner", "collector")},
            "resources": {name: watched.facts() for name, watched in self._resources.watched.items()},
            "last_problem": self._events.last_problem,
            "events": list(self._events.newest),
        }
        partial = self._path.with_name(f"{self._path.name}.partial")
        with suppress(OSError):  # without fsync: a status that a power failure takes is old anyway
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(self._path)


def _process(snapshot: Snapshot, now: float) -> dict[str, Any]:
    return {"pid": snapshot.pid, "phase": snapshot.phase, "phase_s": round(now - snapshot.phase_since, 1)}


def _learner(snapshot: Snapshot, row: Mapping[str, Any]) -> dict[str, Any]:
    status = read_status(LearnerStatus, snapshot.status)
    if status is None:
        return {}
    pace = UPDATES_PER_S.of(row) or status.updates_per_s
    left = status.total_optim_steps - status.gradient_steps
    return {
        "gradient_steps": status.gradient_steps,
        "total_optim_steps": status.total_optim_steps,
        "updates_per_s": pace,
        "replay_ratio": status.replay_ratio,
        "seconds_left": round(left / pace) if pace else None,
        "episode_return_mean": status.episode_return_mean,
        "eval_return_mean": status.eval_return_mean,
    }


def _collector(snapshot: Snapshot) -> dict[str, Any]:
    status = read_status(CollectorStatus, snapshot.status)
    return {} if status is None else {"agent_steps": status.agent_steps, "agent_steps_per_s": status.fps}
