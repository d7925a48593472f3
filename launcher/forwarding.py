"""Send new rows of the learner's metrics.jsonl to TensorBoard or wandb, and write the last row to summary.json."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.config import Settings
from shared.errors import SettingError
from shared.files import write_atomic
from shared.metrics import (
    AGENT_STEPS,
    COLLECT_FPS,
    COLLECT_FPS_MEAN,
    ENV_FRAMES,
    EPISODE_RETURN_MEAN,
    EPISODES,
    EVAL_RETURN_MEAN,
    GRADIENT_STEPS,
    NAN_SKIPS,
    POLICY_LAG_MEAN,
    POLICY_VERSION,
    REPLAY_RATIO,
    REPLAY_RATIO_TARGET,
    TIME,
    TRANSPORT,
    UPDATES_PER_S,
    UPDATES_PER_S_MEAN,
    WALL_S,
    finite_or_none,
    parse_row,
    tagged,
)

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shared.run_folder import RunFolder

# What summary.json always has; null if it is not known.
SUMMARY_KEYS = (
    "exit_reason",
    WALL_S.name,
    AGENT_STEPS.name,
    ENV_FRAMES.name,
    GRADIENT_STEPS.name,
    COLLECT_FPS.name,
    UPDATES_PER_S.name,
    REPLAY_RATIO_TARGET.name,
    REPLAY_RATIO.name,
    POLICY_VERSION.name,
    POLICY_LAG_MEAN.name,
    EPISODES.name,
    EPISODE_RETURN_MEAN.name,
    EVAL_RETURN_MEAN.name,
    "collector_restarts",
    "collector_restart_causes",
    "learner_restarts",
    "learner_restart_causes",
    NAN_SKIPS.name,
    "devices",
    TRANSPORT.name,
)


MAX_WARNINGS = 100  # in summary.json


class MetricsTail:
    """Reads what a process has appended to a file of JSON objects, one a line. The last line may be incomplete.

    The file is metrics.jsonl, or that of warnings.
    """

    def __init__(self, path: Path, log: FilteringBoundLogger) -> None:
        self._path, self._log = path, log
        # The rows of a resumed run that exist already were forwarded by an earlier launch.
        self._offset = path.stat().st_size if path.exists() else 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the complete rows that are new. A line that is not a JSON object is left out, with a warning."""
        if not self._path.exists():
            return []
        # A resumed learner first deletes the rows that are newer than its checkpoint: the file becomes shorter.
        self._offset = min(self._offset, self._path.stat().st_size)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete = file.read().rpartition(b"\n")[0]
        if not complete:
            return []
        self._offset += len(complete) + 1
        rows = [parse_row(line) for line in complete.splitlines()]
        if None in rows:
            self._log.warning(
                f"some lines of {self._path.name} are not JSON objects; they are left out", lines=rows.count(None)
            )
        return [row for row in rows if row is not None]


def last_row(path: Path) -> dict[str, Any]:
    """Return the last complete row of metrics.jsonl, or {} if there is none yet."""
    if not path.exists():
        return {}
    rows = (parse_row(line) for line in reversed(path.read_bytes().splitlines()))
    return next((row for row in rows if row is not None), {})


def warning_texts(path: Path) -> list[str]:
    """Return the warnings of a process, each text once, at most the MAX_WARNINGS newest. path: `RunFolder.warnings`."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    texts = [str(row["text"]) for row in map(parse_row, lines) if row is not None and "text" in row]
    return list(dict.fromkeys(texts))[-MAX_WARNINGS:]


def summarize(row: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of summary.json: SUMMARY_KEYS, the other numbers of the last row, and launch's own numbers.

    row: the last row of metrics.jsonl. own: what launch itself knows, which replaces columns of the same name.
    """
    columns = {key: value for key, value in row.items() if key != TIME.name}
    merged = dict.fromkeys(SUMMARY_KEYS) | columns | dict(own)
    # In a row, these two are means since the previous row. A summary has the means over the whole launch.
    for metric, mean in ((COLLECT_FPS, COLLECT_FPS_MEAN), (UPDATES_PER_S, UPDATES_PER_S_MEAN)):
        merged[metric.name] = row.get(mean.name, merged[metric.name])
    # The row's time covers all launches of the run; launch_s is the time of this one.
    merged[WALL_S.name] = row.get(WALL_S.name, own.get("launch_s"))
    return {key: finite_or_none(value) for key, value in merged.items()}


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row under their tags, without its time and step: every row has these anyway."""
    return tagged({key: value for key, value in row.items() if key not in (TIME.name, GRADIENT_STEPS.name)})


class Forwarder(Protocol):
    """Sends the rows of metrics.jsonl somewhere else."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Send one row."""

    def close(self) -> None:
        """Send what is left and end."""


class RowRelay:
    """Passes the new rows of metrics.jsonl to a forwarder. `newest` is the newest row, also of an earlier launch."""

    def __init__(self, path: Path, forwarder: Forwarder, log: FilteringBoundLogger) -> None:
        self._tail, self._forwarder = MetricsTail(path, log), forwarder
        self.newest = last_row(path)
        self.num_rows = 0  # passed on by this launch

    def forward(self) -> list[dict[str, Any]]:
        """Pass on the rows that are new, and return them."""
        rows = self._tail.new_rows()
        for row in rows:
            self.newest = row
            self.num_rows += 1
            self._forwarder.add(row)
        return rows


class NoForwarder:
    """Sends nothing (logger.backend=none): metrics.jsonl is the only record."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Leave the row in metrics.jsonl."""

    def close(self) -> None:
        """Do nothing."""


class FallibleForwarder:
    """Passes rows to another forwarder until that one fails; then it sends nothing more. No method raises an error.

    TensorBoard and wandb are not needed for training, and metrics.jsonl has every row.
    """

    def __init__(self, forwarder: Forwarder, backend: str, log: FilteringBoundLogger) -> None:
        """backend: the name of `forwarder`, for the error."""
        self._forwarder, self._backend, self._log = forwarder, backend, log

    def add(self, row: Mapping[str, Any]) -> None:
        """Send one row."""
        try:
            self._forwarder.add(row)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Send what is left and end. Ctrl-C ends the sending, and the exit code of the run stays as it is."""
        try:
            self._forwarder.close()
        except Exception as error:
            self._fail(error)
        except KeyboardInterrupt:
            self._log.warning(f"interrupted: {self._backend} did not get the last rows; metrics.jsonl has them")

    def _fail(self, error: Exception) -> None:
        """Report the error once, and go on without the forwarder."""
        self._forwarder = NoForwarder()
        self._log.error(f"rows can no longer be sent to {self._backend}; they stay in metrics.jsonl", error=repr(error))


class TensorBoardForwarder:
    """Writes rows into the folder `tb/`. It uses tensorboard's own writer, because torch's would import torch.

    After a resume from an older checkpoint, steps that were undone are made again. TensorBoard forgets what it has from
    a step on if an event marks the start of a session at that step, so no step is shown twice.
    """

    def __init__(self, folder: Path, *, last_step: int = -1) -> None:
        """last_step: the gradient step of the newest row that an earlier launch wrote into the folder."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # The generated protobuf modules declare their classes at run time, where a type checker cannot see them.
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        self._last_step = last_step

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row at its gradient step and time."""
        written_at, step = TIME.of(row), int(GRADIENT_STEPS.of(row) or 0)
        if step <= self._last_step:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, session_log=start))
        self._last_step = step
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        self._writer.add_event(
            self._event.Event(
                wall_time=time.time() if written_at is None else written_at,
                step=step,
                summary=self._summary.Summary(value=values),
            )
        )

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


class WandbForwarder:
    """Logs rows to one wandb run, which a resumed run continues. It has the name of the run folder."""

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        wandb = importlib.import_module("wandb")
        name = folder.path.name
        try:
            self._run = wandb.init(
                project=settings.logger.project,
                mode=settings.logger.mode,
                dir=str(folder.path),
                name=name,
                id=wandb_id(folder),
                resume="allow",
                config=asdict(settings),
            )
        except Exception as error:  # wandb raises many kinds of errors: no key, no network, a full disk
            raise SettingError(
                f"wandb could not start: {error}; expected a run in project logger.project={settings.logger.project}; "
                "run 'wandb login', or set logger.mode=offline or logger.backend=tensorboard"
            ) from error

    def add(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row at its gradient step."""
        self._run.log(scalars(row), step=int(GRADIENT_STEPS.of(row) or 0))

    def close(self) -> None:
        """Upload what is left and end the wandb run; a later launch can resume it."""
        self._run.finish()


def wandb_id(folder: RunFolder) -> str:
    """Return the identity of the run in wandb, and keep it in the run folder for a resume.

    It is not the name of the folder alone: expA/seed0 and expB/seed0 are two runs. A run that an older version began,
    which has rows and no file with the identity, goes on under its name.
    """
    path, name = folder.path / "wandb_id", folder.path.name
    if path.is_file():
        return path.read_text().strip()
    own = name if last_row(folder.metrics) else f"{name}-{secrets.token_hex(4)}"
    write_atomic(path, own)
    return own


def check_logger(settings: Settings) -> None:
    """Raise SettingError if the chosen backend is not installed."""
    if settings.logger.backend == "wandb" and importlib.util.find_spec("wandb") is None:
        raise SettingError(
            "logger.backend=wandb, but wandb is not installed; expected an installed backend; "
            "run: pip install wandb, or set logger.backend=tensorboard"
        )


def open_forwarder(settings: Settings, folder: RunFolder) -> Forwarder:
    """Return the forwarder that `logger.backend` names. Raises: SettingError if it cannot start."""
    if settings.logger.backend == "wandb":
        return WandbForwarder(folder, settings)
    if settings.logger.backend == "tensorboard":
        newest = GRADIENT_STEPS.of(last_row(folder.metrics))
        return TensorBoardForwarder(folder.tensorboard, last_step=-1 if newest is None else int(newest))
    return NoForwarder()
