"""The learner's metrics.jsonl on its way out: new rows to TensorBoard or wandb, the last one into summary.json."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.config import Settings
from shared.errors import SettingError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shared.run_folder import RunFolder

STEP = "gradient_steps"
SUMMARY_KEYS = (
    "exit_reason",
    "wall_s",
    "agent_steps",
    "env_frames",
    "gradient_steps",
    "collect_fps",
    "updates_per_s",
    "replay_ratio_target",
    "replay_ratio",
    "policy_version",
    "policy_lag_mean",
    "episodes",
    "episode_return_mean",
    "eval_return_mean",
    "collector_restarts",
    "nan_skips",
    "devices",
    "transport",
)


class MetricsTail:
    """Complete new rows of a file that another process appends to."""

    def __init__(self, path: Path, log: FilteringBoundLogger) -> None:
        self._path, self._log = path, log
        # A resumed run's older rows were forwarded by the launch that saw them.
        self._offset = path.stat().st_size if path.exists() else 0

    def new_rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:  # a resumed learner cuts rows that lie after its checkpoint
            self._offset = self._path.stat().st_size
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete = file.read().rpartition(b"\n")[0]
        if not complete:
            return []
        self._offset += len(complete) + 1
        rows = [parse_row(line) for line in complete.splitlines()]
        if None in rows:
            self._log.warning(
                "metrics.jsonl has lines that are no JSON object; they are left out", rows=rows.count(None)
            )
        return [row for row in rows if row is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of metrics.jsonl, or {} if there is none yet."""
    if not path.exists():
        return {}
    rows = (parse_row(line) for line in reversed(path.read_bytes().splitlines()))
    return next((row for row in rows if row is not None), {})


def summarize(row: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json: every promised key (null where nothing is known), the row's other numbers, launch's own on top."""
    merged = dict.fromkeys(SUMMARY_KEYS) | {key: value for key, value in row.items() if key != "time"} | dict(own)
    for key in ("collect_fps", "updates_per_s"):  # a row's own are of its window, a summary's of the whole run
        merged[key] = row.get(f"{key}_mean", merged[key])
    merged["wall_s"] = row.get("wall_s", own.get("launch_s"))  # of the whole run, all its launches together
    return {key: _finite(value) for key, value in merged.items()}


def _finite(value: Any) -> Any:
    """JSON has no word for nan and inf."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Forwarder(Protocol):
    """Where rows go."""

    def add(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoForwarder:
    """logger.backend=none: metrics.jsonl is all there is."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Rows stay in metrics.jsonl."""

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardForwarder:
    """Scalars into `tb/`, by tensorboard's own writer: the one in torch would bring torch into launch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # The generated protobuf modules declare their classes at run time, out of a type checker's sight.
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._writer = EventFileWriter(str(folder), flush_secs=10)

    def add(self, row: Mapping[str, Any]) -> None:
        values = [self._summary.Summary.Value(tag=key, simple_value=value) for key, value in scalars(row).items()]
        written = row.get("time")
        self._writer.add_event(
            self._event.Event(
                wall_time=written if isinstance(written, int | float) else time.time(),
                step=int(row.get(STEP) or 0),
                summary=self._summary.Summary(value=values),
            )
        )

    def close(self) -> None:
        self._writer.close()


class WandbForwarder:
    """Rows into one wandb run that carries the run folder's name, so that a resumed run goes on in it."""

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        wandb = importlib.import_module("wandb")
        name = folder.path.name
        try:
            self._run = wandb.init(
                project=settings.logger.project,
                mode=settings.logger.mode,
                dir=str(folder.path),
                name=name,
                id=name,
                resume="allow",
                config=asdict(settings),
            )
        except Exception as error:  # wandb raises many kinds: no key, no network, a full disk
            raise SettingError(
                f"wandb could not start: {error}; wanted a run in project {settings.logger.project!r}; run 'wandb login', "
                f"or set logger.mode=offline or logger.backend=tensorboard"
            ) from error

    def add(self, row: Mapping[str, Any]) -> None:
        self._run.log(scalars(row), step=int(row.get(STEP) or 0))

    def close(self) -> None:
        self._run.finish()


def check_logger(settings: Settings) -> None:
    """Pass if the chosen backend is installed. Raises: SettingError naming the extra to install."""
    if settings.logger.backend == "wandb" and importlib.util.find_spec("wandb") is None:
        raise SettingError(
            "logger.backend=wandb, but wandb is not installed; wanted the extra that brings it; "
            "run: pip install -e '.[wandb]', or set logger.backend=tensorboard"
        )


def open_forwarder(settings: Settings, folder: RunFolder) -> Forwarder:
    """The forwarder that `logger.backend` names. Raises: SettingError if it cannot start."""
    if settings.logger.backend == "wandb":
        return WandbForwarder(folder, settings)
    if settings.logger.backend == "tensorboard":
        return TensorBoardForwarder(folder.tensorboard)
    return NoForwarder()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, without its time and step."""
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("time", STEP)
    }
