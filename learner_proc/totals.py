"""What the learner counts on the host: totals of the run, the newest episodes, and the pace."""

from __future__ import annotations

import statistics
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shared.messages import EPISODE_KINDS, Commit
from shared.metrics import (
    COLLECT_FPS,
    COLLECT_FPS_MEAN,
    EPISODE_LENGTH_MEAN,
    EPISODE_RETURN_MEAN,
    EVAL_RETURN_MEAN,
    RANDOM_RETURN_MEAN,
    UPDATES_PER_S,
    UPDATES_PER_S_MEAN,
    Metric,
)

TRAIN_WINDOW, EVAL_WINDOW = 100, 20  # finished episodes in a mean return
RETURN_MEANS = {"train": EPISODE_RETURN_MEAN, "eval": EVAL_RETURN_MEAN, "random": RANDOM_RETURN_MEAN}
_LENGTHS = "lengths"  # the key of the episode lengths in a saved state, beside the kinds


@dataclass
class Counters:
    """Totals since the run began. They are saved in checkpoints and continue after a resume."""

    gradient_steps: int = 0
    agent_steps: int = 0
    eval_agent_steps: int = 0  # those of `agent_steps` that evaluation environments made
    env_frames: int = 0
    episodes: int = 0
    prefill_steps: int = 0  # agent steps before the first gradient step
    prefill_eval_steps: int = 0  # those of them that evaluation environments made
    nan_skips: int = 0
    policy_version: int = 0
    num_diverged: int = 0
    wall_s: float = 0.0
    rounds: int = 0  # of lockstep, see `learner_proc.rounds`
    paced: dict[str, float | None] = field(default_factory=dict)  # the ledger of `Pacing` at the end of a round

    def count_gradient_step(self) -> int:
        """Count one gradient step, and return the number of all so far."""
        if self.gradient_steps == 0:
            self.prefill_steps, self.prefill_eval_steps = self.agent_steps, self.eval_agent_steps
        self.gradient_steps += 1
        return self.gradient_steps

    def learned_steps(self, *, eval_in_replay: bool) -> int:
        """Return the agent steps that can be learned from: all, or those of the training environments."""
        return self.agent_steps if eval_in_replay else self.agent_steps - self.eval_agent_steps

    def replay_ratio(self, step_frames: int, *, pretrained: float, eval_in_replay: bool) -> float:
        """Return the replay ratio since the prefill of the run. The counts of `Pacing` start again at every resume.

        pretrained: rows that were replayed on the prefill alone.
        """
        prefill = self.prefill_steps if eval_in_replay else self.prefill_steps - self.prefill_eval_steps
        learned = self.learned_steps(eval_in_replay=eval_in_replay) - prefill
        return max(0.0, self.gradient_steps * step_frames - pretrained) / max(learned, 1)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of `count` returns."""

    count: int
    mean: float
    std: float


class Episodes:
    """Returns and lengths of the newest finished episodes."""

    def __init__(self) -> None:
        windows = {kind: EVAL_WINDOW if kind == "eval" else TRAIN_WINDOW for kind in EPISODE_KINDS}
        self._returns: dict[str, deque[float]] = {kind: deque(maxlen=size) for kind, size in windows.items()}
        self._lengths: deque[float] = deque(maxlen=TRAIN_WINDOW)

    def add(self, commit: Commit) -> None:
        """Add the episodes that a commit lists. Their number may be smaller than `commit.num_episodes`."""
        count = len(commit.kinds)
        returns = struct.unpack(f"<{count}f", commit.returns)
        lengths = struct.unpack(f"<{count}i", commit.lengths)
        for value, length, kind in zip(returns, lengths, commit.kinds, strict=True):
            self._returns[EPISODE_KINDS[kind]].append(value)
            self._lengths.append(length)

    def means(self) -> dict[Metric, float | None]:
        """Return the mean returns and the mean length; None for kinds without an episode."""
        returns = {metric: mean(self._returns[kind]) for kind, metric in RETURN_MEANS.items()}
        return {**returns, EPISODE_LENGTH_MEAN: mean(self._lengths)}

    def spread(self, kind: str) -> Spread | None:
        """Return the spread of the newest returns of a kind in EPISODE_KINDS; None without an episode."""
        values = list(self._returns[kind])
        return Spread(len(values), statistics.fmean(values), statistics.pstdev(values)) if values else None

    def state(self) -> dict[str, list[float]]:
        """Return the content for a checkpoint."""
        return {kind: list(values) for kind, values in self._returns.items()} | {_LENGTHS: list(self._lengths)}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Add what `state` returned in the process that wrote the checkpoint."""
        for name, values in state.items():
            (self._lengths if name == _LENGTHS else self._returns[name]).extend(values)


class Pace:
    """Agent steps and gradient steps per second: since the previous row, and since this process began."""

    def __init__(self, counters: Counters, *, streaming_since: float) -> None:
        """streaming_since: when the collector began to stream, time.monotonic() seconds."""
        self._counters = counters
        self._window = (time.monotonic(), counters.gradient_steps, counters.agent_steps)
        self._streaming_since, self._first_agent_steps = streaming_since, counters.agent_steps
        self._first_step: tuple[float, int] | None = None  # when the first step of this process was counted

    def count_step(self) -> None:
        """Start the mean of gradient steps, if this is the first step of the process. Call it before it is counted."""
        if self._first_step is None:
            self._first_step = (time.monotonic(), self._counters.gradient_steps)

    def start_window(self) -> None:
        """Count COLLECT_FPS and UPDATES_PER_S from now on."""
        self._window = (time.monotonic(), self._counters.gradient_steps, self._counters.agent_steps)

    def rates(self) -> dict[Metric, float]:
        """Return the rates up to now."""
        counters, now = self._counters, time.monotonic()
        began, steps, agent_steps = self._window
        first_at, first_steps = self._first_step or (now, counters.gradient_steps)
        return {
            COLLECT_FPS: _rate(counters.agent_steps - agent_steps, now - began),
            UPDATES_PER_S: _rate(counters.gradient_steps - steps, now - began),
            COLLECT_FPS_MEAN: _rate(counters.agent_steps - self._first_agent_steps, now - self._streaming_since),
            UPDATES_PER_S_MEAN: _rate(counters.gradient_steps - first_steps, now - first_at),
        }


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None without values."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _rate(count: int, seconds: float) -> float:
    """Return the count per second; `seconds` may be 0."""
    return count / max(seconds, 1e-9)
