"""The progress of a run for the user: two live lines on a terminal, else one plain line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from shared.metrics import (
    LOSS_ACTOR,
    LOSS_MODEL,
    LOSS_VALUE,
    UPDATES_PER_S,
    CollectorStatus,
    LearnerStatus,
    read_status,
)
from shared.output import BLOCKED_S, lost_output_ignored
from shared.progress import Snapshot

PLAIN_EVERY_S = 10.0
LIVE_PER_S = 2.0
PHASE_TEXTS = {"hello": "waiting for the other process", "waiting": "waiting for the learner"}
LOSSES = {"model": LOSS_MODEL, "actor": LOSS_ACTOR, "value": LOSS_VALUE}
# Below this share of the target replay ratio, the learner still has to replay what was collected before it could train.
CAUGHT_UP = 0.9


class Display:
    """Shows the two lines: redrawn in place on a terminal, printed now and then elsewhere.

    If the terminal or the program that reads the lines is gone, nothing more is shown. No method raises an error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self._shown_at = -PLAIN_EVERY_S
        self._started_at = time.monotonic()

    def start(self) -> None:
        """Begin to draw in place, if this is a terminal."""
        if self._live:
            with self._lost_output_ignored():
                self._live.start()

    def show(self, learner: Snapshot, collector: Snapshot, row: Mapping[str, Any], *, restarts: int) -> None:
        """Show the progress of both processes, unless it was shown a moment ago.

        row: the newest row of metrics.jsonl.
        """
        now = time.monotonic()
        if now - self._shown_at < (1 / LIVE_PER_S if self._live else PLAIN_EVERY_S):
            return
        self._shown_at = now
        trained = read_status(LearnerStatus, learner.status)
        lines = (learner_line(learner, row, now=now), collector_line(collector, trained, now=now, restarts=restarts))
        if self._live:
            with self._lost_output_ignored():
                self._live.update(Group(*(Text(line) for line in lines)), refresh=True)
        else:
            plain = " | ".join(" ".join(line.split()) for line in lines)
            self.print_line(f"[{duration(now - self._started_at)}] {plain}")

    def print_line(self, line: str) -> None:
        """Print a line that stays, above the live lines."""
        encoding = self._console.encoding
        encodable = line.encode(encoding, errors="replace").decode(encoding)  # the output of a child may be anything
        with self._lost_output_ignored():
            self._console.print(Text(encodable), soft_wrap=True)

    def stop(self) -> None:
        """Stop drawing in place; the last lines stay."""
        if self._live:
            with self._lost_output_ignored():
                self._live.stop()

    @contextmanager
    def _lost_output_ignored(self) -> Iterator[None]:
        with lost_output_ignored(self._console.file, limit_s=BLOCKED_S):
            yield


def learner_line(snapshot: Snapshot, row: Mapping[str, Any], *, now: float) -> str:
    """Return the learner's gradient steps, their pace and the losses; its phase if it has no status yet.

    row: the newest row of metrics.jsonl, which has the losses, and the pace over a longer time than the status.
    """
    status = read_status(LearnerStatus, snapshot.status)
    if status is None:
        return f"learner    {_phase(snapshot, now)}"
    row_pace = UPDATES_PER_S.of(row)
    pace = status.updates_per_s if row_pace is None else row_pace
    target = "free" if status.replay_ratio_target is None else f"{status.replay_ratio_target:.3g}"
    parts = [
        f"step {status.gradient_steps:,}/{status.total_optim_steps:,}",
        f"{pace:.1f} updates/s",
        f"ratio {status.replay_ratio:.3g}/{target}",
    ]
    if pace > 0:
        parts.append(f"ETA {duration(max(0.0, (status.total_optim_steps - status.gradient_steps) / pace))}")
    if snapshot.phase != "training":
        parts.append(_phase(snapshot, now))
    losses = [f"{name} {value:.3g}" for name, metric in LOSSES.items() if (value := metric.of(row)) is not None]
    if losses:
        parts.append(f"loss {' '.join(losses)}")
    return "learner    " + "  ".join(parts)


def collector_line(snapshot: Snapshot, learner: LearnerStatus | None, *, now: float, restarts: int) -> str:
    """Return the collector's agent steps, their pace and the returns; its phase if it has no status yet.

    learner: the learner's status, which has the policy lag and the returns.
    """
    status = read_status(CollectorStatus, snapshot.status)
    parts = []
    if status is not None:
        parts += [f"{status.agent_steps:,} agent steps", f"{status.fps:.0f} steps/s"]
        parts += _results(learner) if learner is not None else []
    if status is None or snapshot.phase != "collecting":
        waits_for_replay = snapshot.phase == "waiting" and _catching_up(learner)
        parts.append("while the learner catches up to the replay ratio" if waits_for_replay else _phase(snapshot, now))
    if status is not None and status.weights_refused > 0:
        parts.append(f"unusable weights {status.weights_refused}")
    if restarts:
        parts.append(f"restarts {restarts}")
    return "collector  " + "  ".join(parts)


def duration(seconds: float) -> str:
    """Return a time for people: 12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _results(learner: LearnerStatus) -> list[str]:
    """Return the policy lag and the returns, as far as they are known."""
    texts = {
        "lag {:.1f}": learner.policy_lag_mean,
        "return {:.1f}": learner.episode_return_mean,
        "eval {:.1f}": learner.eval_return_mean,
    }
    return [text.format(value) for text, value in texts.items() if value is not None]


def _catching_up(learner: LearnerStatus | None) -> bool:
    if learner is None or learner.replay_ratio_target is None:
        return False
    return learner.replay_ratio < CAUGHT_UP * learner.replay_ratio_target


def _phase(snapshot: Snapshot, now: float) -> str:
    """Return the phase of a process and how long it has been in it."""
    return f"{PHASE_TEXTS.get(snapshot.phase, snapshot.phase)} {duration(now - snapshot.phase_since)}"
