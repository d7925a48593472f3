"""The hook `supervision.on_event`: a command of the user, called when something happens to the run. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

MAX_RUNNING = 8  # calls at once; if the command hangs, later events are not passed on until its deadline


class Hook:
    """Calls a shell command with an event as JSON on stdin, without waiting. No method raises an error.

    deadline_s: a call that takes longer is killed. output: the file that gets what the command prints.
    """

    def __init__(self, command: str | None, *, deadline_s: float, output: Path, log: FilteringBoundLogger) -> None:
        self._command, self._deadline_s, self._output, self._log = command, deadline_s, output, log
        self._running: list[tuple[float, subprocess.Popen[bytes]]] = []  # with the time of each deadline

    def call(self, event: Mapping[str, Any]) -> None:
        """Start the command for one event."""
        self.check()
        if self._command is None:
            return
        if len(self._running) >= MAX_RUNNING:
            self._log.info(
                "supervision.on_event is not called, because earlier calls still run", event_text=event["text"]
            )
            return
        try:
            with tempfile.TemporaryFile() as stdin, self._output.open("ab") as output:
                stdin.write(json.dumps(event).encode() + b"\n")
                stdin.seek(0)
                started = subprocess.Popen(
                    ["/bin/sh", "-c", self._command],
                    stdin=stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._log.warning("supervision.on_event could not be called", error=str(error))
            return
        self._running.append((time.monotonic() + self._deadline_s, started))

    def check(self) -> None:
        """Forget the calls that have ended, and kill those that are late."""
        kept = []
        for deadline, process in self._running:
            code = process.poll()
            if code is None and time.monotonic() < deadline:
                kept.append((deadline, process))
            elif code is None:
                self._kill(process)
            elif code != 0:
                self._log.warning("supervision.on_event failed", exit_code=code, output=str(self._output))
        self._running = kept

    def close(self, *, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until all calls have ended or are late. Kill them once `give_up()` is true."""
        while self._running:
            if give_up():
                self._running = [(0.0, process) for _, process in self._running]
            self.check()
            time.sleep(0.02)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._log.warning("supervision.on_event was killed", deadline_s=self._deadline_s)
