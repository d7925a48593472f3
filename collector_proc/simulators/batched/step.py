"""Turn the tensors of a batched simulator's step into an Arrival. The isaaclab, mjlab and torchrl backends use it.

Such a simulator returns views of buffers that its next step overwrites. An episode can end and the next one begin
within one tick. This example shows one tick in which environment 2 falls and environment 3 diverges:

    env                  0      1      2      3
    row.obs              o0     o1     end    0      the last observation of the old episode; zeros if it is not finite
    acting_obs           o0     o1     fresh  fresh  the observation that the policy acts on
    is_last              0      0      1      1
    is_first             0      0      0      1      environment 2's next row is `is_first` and keeps its true reward

Nothing here waits for the device unless its docstring states it. Counts are copied to the host while the policy acts,
and the host reads them before the next step. This file imports torch: import it after the simulator has started.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from collector_proc.simulators.base import Arrival
from shared.errors import SimulatorError
from shared.stream import evaluation_columns

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from collector_proc.simulators.batched.spaces import ObservationMap
    from shared.config import EnvSettings, Settings

MAX_DUMPS = 4  # files per process
MAX_DUMPED_ROWS = 8  # environments per file
# The collector ends if one environment has this many diverged rows without two finite rows in between, because resets
# do not help it.
MAX_STREAK = 100
# The collector ends if more than this share of all rows of the last ticks diverged, because the rest is not worth
# learning from.
SHARE_TICKS, MAX_SHARE = 1000, 0.01


class HostCounts:
    """Integers that are copied from the device now and read by the host later.

    Reading waits for the copy alone, not for work that was queued after it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=cuda)
        self._event = torch.cuda.Event(blocking=True) if cuda else None  # sleeps instead of spinning

    def post(self, counts: Tensor) -> None:
        """Start the copy. Shapes: counts (size,) int64."""
        self._host.copy_(counts, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> list[int]:
        """Return the numbers that were posted last; waits until their copy has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Divergence:
    """Counts on the device how often each environment diverged. `counts` are the numbers that `check` needs."""

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self._num_envs = num_envs
        self._whole = torch.ones(num_envs, dtype=torch.bool, device=device)  # whether the last row was finite
        self._streak = torch.zeros(num_envs, dtype=torch.int64, device=device)
        # the number of diverged rows in each of the last ticks
        self._ticks = torch.zeros(SHARE_TICKS, dtype=torch.int64, device=device)
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._tick = 0

    def add(self, diverged: Tensor) -> None:
        """Count one tick. Shapes: diverged (E,) bool."""
        recovered = self._whole & ~diverged
        self._streak = torch.where(diverged, self._streak + 1, torch.where(recovered, 0, self._streak))
        self._whole = ~diverged
        number = diverged.sum()
        self._ticks[self._tick % SHARE_TICKS] = number
        self._total += number
        self._tick += 1

    def counts(self) -> Tensor:
        """Return the diverged rows so far, those of the last SHARE_TICKS ticks, and the longest streak.

        Shapes: (3,) int64.
        """
        return torch.stack([self._total, self._ticks.sum(), self._streak.amax()])

    def check(self, total: int, recent: int, streak: int) -> None:
        """Check what `counts` returned.

        Raises: SimulatorError if an environment does not recover, or if too many environments diverge.
        """
        if streak < MAX_STREAK and recent <= MAX_SHARE * SHARE_TICKS * self._num_envs:
            return
        raise SimulatorError(
            f"{total} rows diverged: {recent} of them in the last {SHARE_TICKS} ticks of {self._num_envs} "
            f"environments, and {streak} in one environment without two finite rows in between; expected at most "
            f"{MAX_SHARE:.0%} of the rows, and fewer than {MAX_STREAK} in one environment; look at "
            "crash/diverged-*.npz, and lower env.action_scale or the task's forces"
        )


class BatchedStep:
    """Turns each tick of E environments into an Arrival that owns its memory, and counts the rows that diverged.

    The backend calls, in every tick: `pending()`, which returns the environments to reset first; the simulator's step;
    `row()`; and `arrival()`, after the ended environments have been reset.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        device: torch.device,
        reward_factor: float = 1.0,
        finite_horizon: bool = False,
        crash_dir: Path | None = None,
        images: ObservationMap | None = None,
    ) -> None:
        """Start with every environment at the beginning of an episode.

        reward_factor: multiplies every reward. finite_horizon: if true, a time-out is a true end of the task.
        crash_dir: the folder for files of the first non-finite states; None writes none. images: the ObservationMap
        used for this stream; it is asked once per tick whether an image left its range.
        """
        self._reward_factor, self._finite_horizon = reward_factor, finite_horizon
        self._crash_dir, self._images = crash_dir, images
        self._first = torch.ones(num_envs, dtype=torch.bool, device=device)  # whether the next row begins an episode
        self._diverged = torch.zeros_like(self._first)  # whether the newest row diverged
        self._pending = torch.zeros_like(self._first)
        self._divergence = Divergence(num_envs, device)
        self._counts = HostCounts(4, device)
        self._raw: dict[str, Tensor] = {}
        self._num_dumps = 0
        self.num_diverged = 0  # diverged rows so far, as of the last `pending()`

    def begin(self, obs: dict[str, Tensor]) -> Arrival:
        """Return the arrival of a reset of all environments. Shapes: entries of obs (E, *shape)."""
        self._first = torch.ones_like(self._first)
        none, reward = torch.zeros_like(self._first), torch.zeros_like(self._first, dtype=torch.float32)
        row = self.row(obs, reward, none, none)
        return self.arrival(row, obs, was_reset=none)

    def row(self, obs: dict[str, Tensor], reward: Tensor, terminated: Tensor, time_out: Tensor) -> Arrival:
        """Return the part of a tick that is recorded, in memory of its own; `acting_obs` is not set yet.

        An episode that terminated and timed out in the same tick counts as terminated. Rows that are not finite become
        zeros with is_first and is_last both set. The backend must reset every environment whose `is_last` is set.

        Shapes: obs has entries (E, *shape); for an ended episode it is the last observation. reward, terminated and
        time_out are (E,).
        """
        diverged = ~(_finite(obs) & reward.isfinite())
        self._raw = {**{f"obs.{name}": entry for name, entry in obs.items()}, "reward": reward}
        self._diverged = diverged
        last = terminated | time_out | diverged
        first, self._first = self._first | diverged, last
        return Arrival(
            obs=_blank(obs, diverged),
            reward=torch.where(diverged, 0.0, reward.float() * self._reward_factor),
            is_first=first,
            is_last=last,
            is_terminal=(last if self._finite_horizon else terminated) & ~diverged,
            diverged=diverged,
        )

    def arrival(self, row: Arrival, fresh: dict[str, Tensor], *, was_reset: Tensor) -> Arrival:
        """Return the row with the observation to act on: `fresh` where an environment was reset, else the row's.

        An environment that diverged and was not reset acts on zeros, and the next `pending()` returns it.

        Shapes: fresh has entries (E, *shape); was_reset is (E,) bool, set for environments reset since the simulator's
        step.
        """
        acting = {name: _where(was_reset, fresh[name], entry) for name, entry in row.obs.items()}
        bad = ~_finite(acting)
        self._pending = (self._diverged & ~was_reset) | bad
        self._diverged = self._diverged | bad
        self._divergence.add(self._diverged)
        outside = torch.zeros_like(bad[:1]) if self._images is None else self._images.outside.view(1)
        self._counts.post(torch.cat([self._divergence.counts(), outside]))
        return dataclasses.replace(row, acting_obs=_blank(acting, bad))

    def pending(self) -> Tensor | None:
        """Return the indices of environments to reset before the next step, or None if there are none.

        Call it once per tick. It waits for a small copy that the last tick started. It waits for the device only if
        something diverged, and then writes the diverged rows to `crash_dir`.
        Raises: SimulatorError if environments do not recover or too many diverge; SettingError if an image left its
        range.
        """
        total, recent, streak, outside = self._counts.read()
        if outside and self._images is not None:
            self._images.refuse_range()
        if total == self.num_diverged:
            return None
        self.num_diverged = total
        self._dump()
        self._divergence.check(total, recent, streak)
        indices = self._pending.nonzero().squeeze(-1)
        return indices if len(indices) else None

    def _dump(self) -> None:
        """Write the raw rows that diverged to `crash/diverged-<pid>-<n>.npz`. A full disk does not end the run."""
        if self._crash_dir is None or self._num_dumps >= MAX_DUMPS:
            return
        indices = self._diverged.nonzero().squeeze(-1)[:MAX_DUMPED_ROWS]
        rows: dict[str, Any] = {name: entry[indices].cpu().numpy() for name, entry in self._raw.items()}
        path = self._crash_dir / f"diverged-{os.getpid()}-{self._num_dumps}.npz"
        self._num_dumps += 1
        try:
            np.savez(path, env=indices.cpu().numpy(), **rows)
        except OSError:
            traceback.print_exc()


def episode_length_s(horizon: int, step_s: float) -> float:
    """Return the cfg.episode_length_s for which `ceil(episode_length_s / step_dt)` is exactly `horizon` agent steps."""
    return (horizon - 0.5) * step_s


def finite_horizon(cfg: Any, env: EnvSettings) -> bool:
    """Return whether the task declares its time-out as a true end of the task.

    A time-out that env.horizon sets is never one.
    """
    return bool(getattr(cfg, "is_finite_horizon", False)) and env.horizon is None


def whole_columns(settings: Settings, num_envs: int) -> list[int]:
    """Return the environments whose first episode begins at age 0.

    These are the evaluation environments, or all environments if env.randomize_start is false.
    """
    num_whole = settings.collector.eval_envs if settings.env.randomize_start else num_envs
    return evaluation_columns(num_envs, num_whole)


def randomize_episode_lengths(env: Any, *, whole: list[int]) -> None:
    """Give the first episodes random ages, so that they end at different times.

    Without it, all environments would reach their time limit in the same tick, again and again. Some tasks draw such
    ages themselves; those are replaced. Environments in `whole` start at age 0. Nothing happens if `env` has no
    `episode_length_buf` (E,).
    """
    lengths = getattr(env, "episode_length_buf", None)
    if lengths is None:
        return
    drawn = torch.randint_like(lengths, int(env.max_episode_length))
    drawn[whole] = 0
    env.episode_length_buf = drawn


def _finite(obs: dict[str, Tensor]) -> Tensor:
    """Return, for each environment, whether every float value of its entries is finite. Shapes: (E,) bool."""
    whole = [
        entry.reshape(len(entry), -1).isfinite().all(-1) for entry in obs.values() if entry.dtype.is_floating_point
    ]
    if whole:
        return torch.stack(whole).all(0)
    entry = next(iter(obs.values()))
    return torch.ones(len(entry), dtype=torch.bool, device=entry.device)


def _where(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (other.dim() - 1)), chosen, other)


def _blank(obs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Return the entries with zeros where the mask is set, in memory of their own.

    It selects instead of multiplying, because 0 * NaN is NaN.
    """
    return {name: _where(mask, torch.zeros_like(entry), entry) for name, entry in obs.items()}
