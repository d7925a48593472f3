"""One process that launch started: ask it to end, kill it, and collect its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared.lifetime import held_signals

KILL_S = 30.0  # how long the kernel may take to end a process after SIGKILL


class ChildProcess:
    """A started process. It leads its own process group, writes its output to a file, and is never left as a zombie."""

    def __init__(
        self, name: str, command: Sequence[str], *, output: Path, env: Mapping[str, str], cwd: Path, note: str = ""
    ) -> None:
        self.name, self.command, self.output = name, list(command), output
        self.returncode: int | None = None
        with output.open("ab") as file, held_signals():
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
        """Return None while the process runs, else its exit code. By then its whole group is killed."""
        if self.returncode is None and self._has_ended():
            # Kill the group before the exit code is collected: until then, no other group can get the same number.
            self._signal_group(signal.SIGKILL)
            self.returncode = self._popen.wait()
        return self.returncode

    def ask_to_save(self) -> None:
        """Send SIGUSR2, which waits until the process handles it."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGUSR2)

    def terminate(self) -> None:
        """Send SIGTERM to the process, but not to its children: if they ended first, it would report a failure."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Ask the process to write its stacks to a file, and give it a second to do so."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGUSR1)
            self.wait(1.0)

    def wait(self, timeout_s: float, *, give_up: Callable[[], bool] = lambda: False) -> int | None:
        """Return the exit code, or None if the process still runs after `timeout_s` or once `give_up()` is true."""
        end = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < end and not give_up():
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> int | None:
        """Kill the whole group and return the exit code, or None if the kernel does not end it within KILL_S."""
        if self.poll() is None:
            self._signal_group(signal.SIGKILL)
        return self.wait(KILL_S)

    def stop(self, timeout_s: float, *, give_up: Callable[[], bool] = lambda: False) -> int | None:
        """Ask the process to end, wait as `wait` does, then kill what is left. Return the exit code as `kill` does."""
        self.terminate()
        self.wait(timeout_s, give_up=give_up)
        return self.kill()

    def last_output(self, num_lines: int = 20) -> list[str]:
        """Return the last lines that the process wrote to stdout and stderr."""
        with self.output.open("rb") as file:
            file.seek(max(0, self.output.stat().st_size - 16_384))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    def _has_ended(self) -> bool:
        """Return whether the process has ended, without collecting its exit code."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)


def describe_exit(returncode: int | None) -> str:
    """Return how a process ended: `exit code 1`, `SIGKILL`, or that not even SIGKILL ended it (None)."""
    if returncode is None:
        return "still alive after SIGKILL"
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
