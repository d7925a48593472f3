"""Start the collector and the learner: command, environment, output file and a new progress file."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.child_process import ChildProcess
from launcher.devices import Devices, child_environment
from launcher.main import ROOT
from shared.checkpoints import newest_checkpoint
from shared.progress import Progress
from shared.run_folder import RunFolder

COMMANDS: Mapping[str, Sequence[str]] = {
    "learner": (sys.executable, "-m", "learner_proc"),
    "collector": (sys.executable, "-m", "collector_proc"),
}


@dataclass(frozen=True)
class Starter:
    """Starts the processes of one run. `commands` are the commands of both, without their arguments.

    The processes work in the user's current folder: relative paths and the user's own modules are found from there.
    """

    folder: RunFolder
    devices: Devices
    environ: Mapping[str, str]
    resume: bool
    commands: Mapping[str, Sequence[str]]
    started: list[ChildProcess] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """How many collectors were started after the first one."""
        return self.incarnation("collector")

    def incarnation(self, role: str) -> int:
        """Return the number of the newest learner or collector; the first one is number 0."""
        return max(0, sum(child.name == role for child in self.started) - 1)

    def start(self, role: str) -> ChildProcess:
        """Start the next "learner" or "collector"."""
        incarnation = sum(child.name == role for child in self.started)
        # The first progress page is written here: the deadline of a process that hangs in its imports counts from now.
        Progress.create(self.folder.progress(role), pid=0)
        child = ChildProcess(
            role,
            [*self.commands[role], *self._arguments(role, incarnation)],
            output=self.folder.logs / f"{role}.out",
            env=child_environment(role, self.devices, self.environ) | {"PYTHONPATH": python_path(self.environ)},
            cwd=Path.cwd(),
            note=f"incarnation {incarnation}",
        )
        self.started.append(child)
        return child

    def kill_all(self) -> None:
        """Kill what still runs of the started processes."""
        for child in self.started:
            child.kill()

    def _arguments(self, role: str, incarnation: int) -> list[str]:
        arguments = ["--run-dir", str(self.folder.path), "--device", self.devices.kind]
        if role == "collector":
            return [*arguments, "--incarnation", str(incarnation)]
        resume = self.resume if incarnation == 0 else newest_checkpoint(self.folder.checkpoints) is not None
        return [*arguments, "--resume"] if resume else arguments


def python_path(outer: Mapping[str, str], *, root: Path = ROOT) -> str:
    """Return the PYTHONPATH of a child: our source tree, then what the user's PYTHONPATH lists.

    If the project is installed, it is in site-packages, which is not added: Python finds it anyway, and as a part of
    PYTHONPATH it would come before the standard library.
    """
    installed = root in {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return os.pathsep.join(part for part in ("" if installed else str(root), outer.get("PYTHONPATH", "")) if part)
