"""Start the collector and the learner: command, environment, output file and a new progress file."""

from __future__ import annotations

import os
import signal
import site
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.child_process import ChildProcess
from launcher.devices import Devices, child_environment
from shared.progress import Progress
from shared.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]  # where our packages are: the source tree, or site-packages
COMMANDS: Mapping[str, Sequence[str]] = {
    "learner": (sys.executable, "-m", "learner_proc"),
    "collector": (sys.executable, "-m", "collector_proc"),
}


@dataclass(frozen=True)
class Starter:
    """Starts either process of one run. `commands` are the commands without their arguments.

    The processes work in the user's current folder: relative paths and the user's own modules are found from there.
    """

    folder: RunFolder
    devices: Devices
    environ: Mapping[str, str]
    resume: bool
    commands: Mapping[str, Sequence[str]]

    def start(self, role: str, incarnation: int = 0) -> ChildProcess:
        """Start "learner" or "collector". incarnation: how many collectors of this launch came before."""
        # The first progress page is written here: the deadline of a process that hangs in its imports counts from now.
        Progress.create(self.folder.progress(role), pid=0)
        return ChildProcess(
            role,
            [*self.commands[role], *self._arguments(role, incarnation)],
            output=self.folder.logs / f"{role}.out",
            env=child_environment(role, self.devices, self.environ) | {"PYTHONPATH": python_path(self.environ)},
            cwd=Path.cwd(),
            note=f"incarnation {incarnation}",
        )

    def _arguments(self, role: str, incarnation: int) -> list[str]:
        arguments = ["--run-dir", str(self.folder.path), "--device", self.devices.kind]
        if role == "collector":
            return [*arguments, "--incarnation", str(incarnation)]
        return [*arguments, "--resume"] if self.resume else arguments


def python_path(outer: Mapping[str, str], *, root: Path = ROOT) -> str:
    """Return the PYTHONPATH of a child: our source tree, then what the user's PYTHONPATH lists.

    If the project is installed, it is in site-packages, which is not added: Python finds it anyway, and as a part of
    PYTHONPATH it would come before the standard library.
    """
    installed = root in {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return os.pathsep.join(part for part in ("" if installed else str(root), outer.get("PYTHONPATH", "")) if part)


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
