"""How the two processes are started: command, environment, output file, a fresh progress file."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.child_process import ChildProcess
from launcher.devices import Devices, child_environment
from shared.progress import Progress
from shared.run_folder import RunFolder

REPO = Path(__file__).resolve().parents[1]
COMMANDS: Mapping[str, Sequence[str]] = {
    "learner": (sys.executable, "-m", "learner_proc"),
    "collector": (sys.executable, "-m", "collector_proc"),
}


@dataclass(frozen=True)
class Starter:
    """Starts either process of one run; `commands` says what stands before the arguments."""

    folder: RunFolder
    devices: Devices
    environ: Mapping[str, str]
    resume: bool
    commands: Mapping[str, Sequence[str]]

    def start(self, role: str, incarnation: int = 0) -> ChildProcess:
        # Launch writes the first page, so that a child that dies or hangs while it imports is timed from here.
        Progress.create(self.folder.progress(role), pid=0)
        return ChildProcess(
            role,
            [*self.commands[role], *self._arguments(role, incarnation)],
            output=self.folder.logs / f"{role}.out",
            env=child_environment(role, self.devices, self.environ, repo=REPO),
            cwd=REPO,
            note=f"incarnation {incarnation}",
        )

    def _arguments(self, role: str, incarnation: int) -> list[str]:
        arguments = ["--run-dir", str(self.folder.path), "--device", self.devices.kind]
        if role == "collector":
            return [*arguments, "--incarnation", str(incarnation)]
        return [*arguments, "--resume"] if self.resume else arguments


def describe_exit(returncode: int | None) -> str:
    """`exit code 1`, `SIGKILL`, or that it could not be ended."""
    if returncode is None:
        return "still alive after SIGKILL"
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
