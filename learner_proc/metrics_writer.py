"""What the learner says of itself: one row of metrics.jsonl every `log_every` gradient steps, and the live status."""

from __future__ import annotations

import json
import math
import struct
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from learner_proc.numbers import Numbers
from shared.memory import Memory, MemoryMeter, gigabytes
from shared.messages import EPISODE_KINDS, Commit
from shared.metrics import METRICS, SKIPPED, Metric

TRAIN_WINDOW, EVAL_WINDOW = 100, 20  # finished episodes a mean return is taken over


@dataclass
class Counters:
    """Totals since the run began. They are saved in checkpoints and continue after a resume."""

    gradient_steps: int = 0
    agent_steps: int = 0
    env_frames: int = 0
    episodes: int = 0
    nan_skips: int = 0
    policy_version: int = 0
    num_diverged: int = 0
    wall_s: float = 0.0


class Report:
    """Collects sums on the device and numbers from commits; never waits for the GPU.

    `request_row` starts an asynchronous copy of the summed metrics; `poll` writes the row once that copy has arrived.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        counters: Counters,
        *,
        constants: dict,
        streaming_since: float,
        diagnostic_metrics: tuple[Metric, ...] = (),
    ) -> None:
        """Open the file for appending.

        constants: columns of every row; streaming_since: time.monotonic() when the collector began; diagnostic_metrics:
        what `request_row` gets from the device, measured once per row. Rows without a measurement hold null there.
        """
        cut_after(path, counters.gradient_steps)
        self._file: IO[str] = path.open("a", buffering=1)
        self._device, self._counters, self._constants = device, counters, constants
        self._diagnostic_metrics = diagnostic_metrics
        # of each metric of a step, which the first step names: the sum of its finite values, and their number, so that
        # one bad step does not blank the row
        self._metrics: tuple[Metric, ...] = ()
        self._sums = torch.zeros(2, 0, device=device)
        self._count = 0
        self._num_rows = int(path.exists() and path.stat().st_size > 0)
        self._pinned = torch.zeros(len(diagnostic_metrics), pin_memory=device.type == "cuda")
        self._pending: tuple[dict, int, torch.cuda.Event | None] | None = None
        self._returns = {kind: deque(maxlen=EVAL_WINDOW if kind == "eval" else TRAIN_WINDOW) for kind in EPISODE_KINDS}
        self._lengths: deque[float] = deque(maxlen=TRAIN_WINDOW)
        self._lags: deque[int] = deque(maxlen=TRAIN_WINDOW)
        self._began = time.monotonic() - counters.wall_s
        self._window = (time.monotonic(), counters.gradient_steps, counters.agent_steps)
        self._first_step: tuple[float, int] | None = None  # of this process; means count from here
        self._streaming_since, self._first_agent_steps = streaming_since, counters.agent_steps
        self.skipped_in_a_row = 0  # steps of the last windows in which none was finite
        self._diverged_before = 0
        self._meter, self._collector_memory = MemoryMeter(str(device), whole_device=False), Memory(0)

    def recent(self) -> dict[str, list[float]]:
        """The newest episodes' returns by kind, and `lengths`: what mean returns are taken over, for a checkpoint."""
        return {kind: list(values) for kind, values in self._returns.items()} | {"lengths": list(self._lengths)}

    def remember(self, recent: Mapping[str, list[float]]) -> None:
        """Go on with what `recent` gave before."""
        for name, values in recent.items():
            (self._lengths if name == "lengths" else self._returns[name]).extend(values)

    def add_commit(self, commit: Commit, *, newest_version: int) -> None:
        """Count a commit; newest_version: the version published last when it arrived."""
        totals = self._counters
        totals.agent_steps += commit.agent_steps
        totals.env_frames += commit.env_frames
        # a restarted collector counts from 0 again
        totals.num_diverged += max(0, commit.num_diverged - self._diverged_before)
        self._diverged_before = commit.num_diverged
        totals.episodes += commit.num_episodes
        count = len(commit.kinds)  # the list names the newest: nobody infers the number from it
        returns = struct.unpack(f"<{count}f", commit.returns)
        for value, length, kind in zip(returns, struct.unpack(f"<{count}i", commit.lengths), commit.kinds, strict=True):
            self._returns[EPISODE_KINDS[min(kind, 2)]].append(value)
            self._lengths.append(length)
        self._collector_memory = Memory(commit.rss_bytes, commit.gpu_bytes, commit.device_bytes)
        if commit.policy_version > 0:
            self._lags.append(newest_version - commit.policy_version)

    def add_step(self, numbers: Numbers) -> None:
        """Add what one gradient step measured. Every step measures the same metrics."""
        if not self._metrics:
            self._metrics = numbers.metrics
            self._sums = torch.zeros(2, len(self._metrics), device=self._device)
            width = 2 * len(self._metrics) + len(self._diagnostic_metrics)
            self._pinned = torch.zeros(width, pin_memory=self._device.type == "cuda")
        assert numbers.metrics == self._metrics, numbers.metrics
        finite = numbers.values.isfinite()
        self._sums += torch.stack([torch.where(finite, numbers.values, 0.0), finite.float()])
        self._count += 1
        if self._first_step is None:
            self._first_step = (time.monotonic(), self._counters.gradient_steps)

    def request_row(self, diagnostics: Numbers | None = None, **numbers: float | None) -> None:
        """Ask for a row of the present window, unless nothing happened since the last one.

        diagnostics: the numbers of `diagnostic_metrics`, or None where they could not be measured; numbers: further
        columns.
        """
        self.poll(wait=True)
        if self._count == 0 and self._num_rows > 0:
            return
        self._num_rows += 1
        row = self._numbers() | numbers
        event = None
        if diagnostics is None:
            values = self._sums.new_full((len(self._diagnostic_metrics),), float("nan"))
            diagnostics = Numbers(self._diagnostic_metrics, values)
        assert diagnostics.metrics == self._diagnostic_metrics, diagnostics.metrics
        self._pinned.copy_(torch.cat([self._sums.flatten(), diagnostics.values]), non_blocking=True)
        if self._sums.is_cuda:
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._pending = (row, self._count, event)
        self._sums.zero_()
        self._count = 0
        self.poll()

    def poll(self, *, wait: bool = False) -> dict | None:
        """Write the requested row if its metrics have arrived; returns it then. `wait` is for the end of the run."""
        if self._pending is None:
            return None
        row, count, event = self._pending
        if event is not None and not wait and not event.query():
            return None
        if event is not None:
            event.synchronize()
        self._pending = None
        values, width = self._pinned.tolist(), len(self._metrics)
        sums, numbers = values[:width], values[width : 2 * width]
        skipped = round(dict(zip(self._metrics, sums, strict=True)).get(SKIPPED, 0.0))
        self._counters.nan_skips += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + count if skipped == count else 0
        means = [total / number if number else None for total, number in zip(sums, numbers, strict=True)]
        # every declared column is in every row, so a run that was stopped before its first step has them all as well
        row = dict.fromkeys(METRICS) | row
        row |= {metric.name: mean for metric, mean in zip(self._metrics, means, strict=True)}
        further = zip(self._diagnostic_metrics, values[2 * width :], strict=True)
        row |= {metric.name: value for metric, value in further}
        row |= {"nan_skips": self._counters.nan_skips} | self._constants
        self._file.write(json.dumps({k: _json(v) for k, v in row.items()}) + "\n")
        return row

    def live(self) -> dict:
        """Numbers for the progress line, without the device's metrics."""
        return self._numbers(window=False)

    def close(self) -> None:
        self._file.close()

    def _numbers(self, *, window: bool = True) -> dict:
        totals, now = self._counters, time.monotonic()
        totals.wall_s = now - self._began
        began, steps, agent_steps = self._window
        first_step = self._first_step or (now, totals.gradient_steps)
        if window:
            self._window = (now, totals.gradient_steps, totals.agent_steps)
        return {
            "time": time.time(),
            "wall_s": totals.wall_s,
            "gradient_steps": totals.gradient_steps,
            "agent_steps": totals.agent_steps,
            "env_frames": totals.env_frames,
            "episodes": totals.episodes,
            "collect_fps": (totals.agent_steps - agent_steps) / max(now - began, 1e-9),
            "updates_per_s": (totals.gradient_steps - steps) / max(now - began, 1e-9),
            "collect_fps_mean": (totals.agent_steps - self._first_agent_steps) / max(now - self._streaming_since, 1e-9),
            "updates_per_s_mean": (totals.gradient_steps - first_step[1]) / max(now - first_step[0], 1e-9),
            "episode_return_mean": _mean(self._returns["train"]),
            "eval_return_mean": _mean(self._returns["eval"]),
            "random_return_mean": _mean(self._returns["random"]),
            "episode_length_mean": _mean(self._lengths),
            "num_diverged": totals.num_diverged,
            "policy_version": totals.policy_version,
            "policy_lag_mean": _mean(self._lags),
            **self._memory(),
        }

    def _memory(self) -> dict:
        """GB that both processes hold; null where there is no GPU, and until a commit has told the collector's."""
        own, collector = self._meter.read(), self._collector_memory
        return {
            "learner_rss_gb": gigabytes(own.rss_bytes),
            "learner_gpu_gb": gigabytes(own.gpu_bytes),
            "collector_rss_gb": gigabytes(collector.rss_bytes),
            "collector_gpu_gb": gigabytes(collector.gpu_bytes),
            "sim_gpu_used_gb": gigabytes(collector.device_bytes),
        }


def cut_after(path: Path, gradient_steps: int) -> None:
    """Drop the rows of a life that a resume has undone: those behind the checkpoint it starts from."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _steps_of(line) <= gradient_steps]
        if len(kept) != len(lines):
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(kept))
            partial.replace(path)


def _steps_of(line: str) -> float:
    """Gradient steps of a row; infinite for a line that is no row."""
    try:
        return json.loads(line)["gradient_steps"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _mean(values: deque) -> float | None:
    return sum(values) / len(values) if values else None


def _json(value: object) -> object:
    """JSON has no NaN: a number that is not finite becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
