"""The collector or the learner as launch watches it: its process and its newest progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from launcher.children import Starter
from launcher.forwarding import MetricsTail
from shared.config import DeadlineSettings
from shared.progress import overdue_s, read

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.display import Display


class WatchedProcess:
    """One process from its start to its end. `snapshot` is its progress at the last call of `observe`."""

    def __init__(self, role: str, starter: Starter, *, log: FilteringBoundLogger, display: Display) -> None:
        self._role, self._log, self._display = role, log, display
        self._progress_file = starter.folder.progress(role)
        self.child = starter.start(role)
        self.snapshot = read(self._progress_file)
        self._warnings = MetricsTail(starter.folder.warnings(role), log)
        log.info(
            "started", role=role, pid=self.child.pid, incarnation=starter.incarnation(role), command=self.child.command
        )

    def observe(self) -> None:
        """Read the progress file, and show the process's new warnings."""
        self.snapshot = read(self._progress_file)
        for warning in self._warnings.new_rows():
            self._display.print_line(f"warning: {warning.get('text')}")

    def kill_if_hung(self, deadlines: DeadlineSettings, *, watched_since: float) -> str | None:
        """Kill the process if it made no progress for longer than its phase allows; return how it hung, else None.

        watched_since: when launch itself last began to watch without interruption, see `overdue_s`.
        """
        seen, now = self.snapshot, time.monotonic()
        if overdue_s(seen, deadlines, now=now, watched_since=watched_since) is None:
            return None
        how = f"hung in phase {seen.phase}: no progress for {now - seen.changed_at:.1f} s at count {seen.counter}"
        self._log.error(f"{self._role} {how}; it is killed", pid=self.child.pid, stacks=f"crash/{self._role}.stacks")
        self.child.dump_stacks()
        if self.child.kill() is None:
            self._log.error(
                "SIGKILL did not end the process within 30 s: a device driver may be stuck", pid=self.child.pid
            )
        return how

    def refusal(self) -> str:
        """Return why the process, which has ended, could not work; it wrote the reason into its progress file."""
        return read(self._progress_file).refusal or f"no reason was reported; see logs/{self._role}.out"

    def cause(self) -> str:
        """Return the error with which the process, which has ended, reported its end; otherwise its last output.

        It is empty for a process that a signal ended: its last output has nothing to do with that.
        """
        if self.child.returncode is None or self.child.returncode <= 0:
            return ""
        return (read(self._progress_file).refusal or self.last_line())[:500]

    def last_line(self) -> str:
        """Return the last line that the process wrote, or an empty text if it wrote none."""
        for line in reversed(self.child.last_output()):
            if line.startswith(f"--- {self._role} "):  # launch writes this before the output of each process
                break
            if line.strip():
                return line.strip()
        return ""

    def show_death(self, how: str) -> None:
        """Log that the process died and show the end of its output."""
        self._log.error(f"{self._role} died ({how}); the last lines of logs/{self._role}.out:", pid=self.child.pid)
        for line in self.child.last_output():
            self._display.print_line(f"  {self._role}> {line}")
