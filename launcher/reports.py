"""What a run reports beside its metrics: events, the user's hook, status.json and the forecasts. Torch-free."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from launcher.events import Events
from launcher.hook import Hook
from launcher.resources import ResourceWatch
from launcher.status_file import Seen, StatusFile

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.children import Starter
    from launcher.ending import Outcome
    from shared.config import Settings
    from shared.progress import Snapshot


class Reports:
    """Keeps the reports of one launch. An error in them is logged once and never ends the run."""

    def __init__(self, starter: Starter, settings: Settings, log: FilteringBoundLogger) -> None:
        supervision, folder, devices = settings.supervision, starter.folder, starter.devices
        self._starter, self._log, self._has_failed = starter, log, False
        origin = {"run": str(folder.path), "host": socket.gethostname(), "launch_pid": os.getpid()}
        output, deadline_s = folder.logs / "on_event.out", supervision.on_event_s
        self._hook = Hook(supervision.on_event, deadline_s=deadline_s, output=output, log=log)
        self.events = Events(lambda event: self._hook.call({**origin, **event}))
        gpus = {gpu.uuid for gpu in (devices.sim, devices.train) if gpu is not None}
        self._resources = ResourceWatch(
            folder.path, warn_hours=supervision.warn_hours, gpus=sorted(gpus), events=self.events, log=log
        )
        self._status = StatusFile(folder.status, self.events, self._resources)

    def update(self, learner: Snapshot, collector: Snapshot, row: Mapping[str, Any]) -> None:
        """Do what is due. Call it often; it does not wait. row: the newest row of metrics.jsonl."""
        if self._has_failed:
            return
        try:
            self._hook.check()
            self._resources.check(learner.pid)
            self._status.update(Seen(learner, collector, row, self._restarts()))
        except Exception:
            self._has_failed = True
            self._log.warning("status.json and the forecasts stop, because of an error of launch", exc_info=True)

    def end(self, outcome: Outcome) -> None:
        """Report the end of the run."""
        self._resources.close()
        self.events.end(outcome.reason, exit_code=outcome.exit_code)
        self._status.end(outcome.exit_code, outcome.reason, self._restarts())

    def _restarts(self) -> dict[str, int]:
        return {role: self._starter.incarnation(role) for role in ("learner", "collector")}

    def close(self, *, give_up: Callable[[], bool]) -> None:
        """Wait for the hook, at most until its deadline or until `give_up()` is true."""
        self._hook.close(give_up=give_up)
