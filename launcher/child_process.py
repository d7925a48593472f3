"""One process that launch started: how it is asked to end, killed and reaped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

KILL_S = 30.0  # how long the kernel may take to end a process after SIGKILL


class ChildProcess:
    """One started process: leader of its own group, its output in a file, never left as a zombie."""

    def __init__(
        self, name: str, command: Sequence[str], *, output: Path, env: Mapping[str, str], cwd: Path, note: str = ""
    ) -> None:
        self.name, self.command, self.output = name, list(command), output
        self.returncode: int | None = None
        with output.open("ab") as file:
            file.write(f"--- {name} {note} {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def poll(self) -> int | None:
        """None while it runs, else its exit code; then its whole group is dead and it is reaped."""
        if self.returncode is None and self._has_ended():
            # The group goes before the reap: only an unreaped leader keeps its number from being given away.
            self._signal_group(signal.SIGKILL)
            self.returncode = self._popen.wait()
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end. Only the leader: workers that died first would look like a failure to it."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Ask for a stack dump and give it a second to be written."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGUSR1)
            self.wait(1.0)

    def wait(self, timeout_s: float, *, hurry: Callable[[], bool] = lambda: False) -> int | None:
        """Its exit code, or None if it still runs after `timeout_s` or as soon as `hurry()` says so."""
        end = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < end and not hurry():
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> int | None:
        """SIGKILL to the whole group, then reap; None only if the kernel could not end it within 30 s."""
        if self.poll() is None:
            self._signal_group(signal.SIGKILL)
        return self.wait(KILL_S)

    def stop(self, timeout_s: float, *, hurry: Callable[[], bool] = lambda: False) -> int | None:
        """Orderly end: SIGTERM, `timeout_s` of patience unless `hurry()`, SIGKILL to the group, reap."""
        self.terminate()
        self.wait(timeout_s, hurry=hurry)
        return self.kill()

    def last_output(self, num_lines: int = 20) -> list[str]:
        """The end of what it wrote to stdout and stderr."""
        with self.output.open("rb") as file:
            file.seek(max(0, self.output.stat().st_size - 16_384))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    def _has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)
