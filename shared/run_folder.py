"""The run folder `runs/<name>/`: the path of each file in it, and its run.json.

    config.yaml, run.json, lock          written by launch when it starts
    collector.progress learner.progress  written by each process (`shared.progress`)
    metrics.jsonl, evaluations.jsonl     written by the learner
    checkpoints/                         written by the learner
    logs/, crash/                        written by every process; crash/ holds stack dumps
    tb/, status.json, summary.json       written by launch; summary.json when the run ends

Only the sockets are somewhere else, in a folder with a short path (`shared.socket_folder`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import SettingError


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def run_json(self) -> Path:
        """What was run, with which versions and on which devices."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """The rows of metrics that the learner writes."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """The evaluations that the learner writes, one line for each."""
        return self.path / "evaluations.jsonl"

    @property
    def summary(self) -> Path:
        """The result, written when the run ends."""
        return self.path / "summary.json"

    @property
    def status(self) -> Path:
        """What the run does now, for `launch.py status`."""
        return self.path / "status.json"

    @property
    def logs(self) -> Path:
        """The folder of log files and of printed output."""
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard files."""
        return self.path / "tb"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def crash(self) -> Path:
        """The folder of stack dumps and of states that diverged."""
        return self.path / "crash"

    @property
    def lock(self) -> Path:
        """The file that is locked while the run is active."""
        return self.path / "lock"

    def warnings(self, process: str) -> Path:
        """Return the path of the warnings of "learner", one JSON object with the keys time, cause and text a line."""
        return self.logs / f"{process}.warnings.jsonl"

    def progress(self, process: str) -> Path:
        """Return the path of the progress file of "collector" or "learner"."""
        return self.path / f"{process}.progress"


@dataclass(frozen=True)
class Run:
    """The part of run.json that the collector, the learner and a resuming launch read."""

    run_id: str  # new for each launch, so that a process refuses messages of an earlier launch
    socket_dir: str
    run_dir: str = ""  # the run folder that launch wrote this into; a copy of the folder still names the original
    num_resumes: int = 0  # part of the collector's seed, so that a resumed run does not repeat its first episodes
    launches: tuple[dict[str, Any], ...] = ()  # the command line, start and sources of every launch so far


def read_run(run_dir: Path) -> Run:
    """Return what run.json states. Raises: SettingError if it is missing, unreadable or lacks a key."""
    path = RunFolder(run_dir).run_json
    try:
        content = json.loads(path.read_text())
        return Run(
            str(content["run_id"]),
            str(content["socket_dir"]),
            str(content.get("run_dir", "")),
            int(content.get("num_resumes", 0)),
            tuple(dict(launch) for launch in content.get("launches") or [_first_launch(content)]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path} cannot be read: {error!r}; expected the run_id and socket_dir that launch writes; "
            "start this process with launch.py"
        ) from error


def _first_launch(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the only launch of a run.json from before it listed its launches."""
    return {key: content[key] for key in ("argv", "started", "git") if key in content}
