"""What a user sees while a run goes on: two live lines on a terminal, one plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from shared.progress import Snapshot

PLAIN_EVERY_S = 10.0
SAYINGS = {"hello": "waiting for the other process", "waiting": "waiting for the learner"}
CAUGHT_UP = 0.9  # of the replay ratio: below it the learner has yet to replay what was collected before it could train
LIVE_PER_S = 2.0


def learner_line(snapshot: Snapshot | None, row: Mapping[str, Any], *, now: float) -> str:
    """Gradient steps done and to do, their pace and losses; the phase while there are no numbers yet.

    row: the last row of metrics.jsonl, which knows the losses and the pace over a whole window.
    """
    numbers = {**snapshot.status, **_windowed(row)} if snapshot else {}
    if snapshot is None or "gradient_steps" not in numbers:
        return f"learner    {_phase(snapshot, now)}"
    parts = [f"step {_count(numbers['gradient_steps'])}/{_count(numbers.get('total_optim_steps'))}"]
    parts += _known(numbers, ("updates_per_s", "{:.1f} updates/s"))
    if _is_number(numbers.get("replay_ratio")):
        target = numbers.get("replay_ratio_target")
        parts.append(f"ratio {numbers['replay_ratio']:.3g}/{f'{target:.3g}' if _is_number(target) else 'free'}")
    losses = [
        f"{key.removeprefix('loss_')} {value:.3g}"
        for key, value in numbers.items()
        if key in ("loss_model", "loss_actor", "loss_value") and _is_number(value)
    ]
    parts += [f"ETA {duration(eta)}" for eta in [_eta_s(numbers)] if eta is not None]
    if snapshot.phase != "training":
        parts.append(_phase(snapshot, now))
    parts += ["loss " + " ".join(losses)] if losses else []
    return "learner    " + "  ".join(parts)


def _windowed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's numbers that the live status lacks, or knows only over a moment."""
    return {key: value for key, value in row.items() if key == "updates_per_s" or key.startswith("loss_")}


def collector_line(snapshot: Snapshot | None, learner: Mapping[str, Any], *, now: float, restarts: int) -> str:
    """Agent steps, their pace, policy lag and returns; the phase while there are no numbers yet.

    learner: the learner's status, which knows the policy lag and the evaluation's return.
    """
    numbers = snapshot.status if snapshot else {}
    parts = []
    if "agent_steps" in numbers:
        parts.append(f"{_count(numbers['agent_steps'])} agent steps")
        parts += _known(numbers, ("fps", "{:.0f} steps/s"))
        parts += _known(learner, ("policy_lag_mean", "lag {:.1f}"))
        own, shared = numbers.get("return_mean"), learner.get("episode_return_mean")
        parts += [f"return {value:.1f}" for value in [own if _is_number(own) else shared] if _is_number(value)]
        parts += _known(learner, ("eval_return_mean", "eval {:.1f}"))
    if snapshot is None or snapshot.phase != "collecting" or not parts:
        catching_up = snapshot is not None and snapshot.phase == "waiting" and _catching_up(learner)
        parts.append("while the learner catches up to the replay ratio" if catching_up else _phase(snapshot, now))
    if restarts:
        parts.append(f"restarts {restarts}")
    return "collector  " + "  ".join(parts)


def _catching_up(learner: Mapping[str, Any]) -> bool:
    ratio, target = learner.get("replay_ratio"), learner.get("replay_ratio_target")
    return isinstance(ratio, int | float) and isinstance(target, int | float) and ratio < CAUGHT_UP * target


class Display:
    """Shows the two lines at the pace that suits where they go."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self._shown_at = -PLAIN_EVERY_S
        self._started_at = time.monotonic()

    def start(self) -> None:
        if self._live:
            self._live.start()

    def show(
        self, learner: Snapshot | None, collector: Snapshot | None, row: Mapping[str, Any], *, restarts: int
    ) -> None:
        """Draw the lines if it is time to."""
        now = time.monotonic()
        if now - self._shown_at < (1 / LIVE_PER_S if self._live else PLAIN_EVERY_S):
            return
        self._shown_at = now
        numbers = learner.status if learner else {}
        lines = (learner_line(learner, row, now=now), collector_line(collector, numbers, now=now, restarts=restarts))
        if self._live:
            self._live.update(Group(*(Text(line) for line in lines)), refresh=True)
        else:
            self.say(f"[{duration(now - self._started_at)}] " + " | ".join(" ".join(line.split()) for line in lines))

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(Text(line), soft_wrap=True)

    def stop(self) -> None:
        if self._live:
            self._live.stop()


def _phase(snapshot: Snapshot | None, now: float) -> str:
    return (
        "starting"
        if snapshot is None
        else f"{SAYINGS.get(snapshot.phase, snapshot.phase)} {duration(now - snapshot.phase_since)}"
    )


def _known(numbers: Mapping[str, Any], *entries: tuple[str, str]) -> list[str]:
    return [text.format(numbers[key]) for key, text in entries if _is_number(numbers.get(key))]


def _eta_s(numbers: Mapping[str, Any]) -> float | None:
    total, pace = numbers.get("total_optim_steps"), numbers.get("updates_per_s")
    if total is None or not pace:
        return None
    return max(0.0, (total - numbers["gradient_steps"]) / pace)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
