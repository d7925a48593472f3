"""What IsaacLab-shaped simulators (isaaclab, mjlab) share: their step's tensors become an Arrival. Imported after launch.

Such a simulator hands out the managers' own buffers, which the next step overwrites, and an episode ends and begins again
within one tick. One tick, environment 2 falling at it, environment 3 diverging:

    env                  0      1      2      3
    row.obs              o0     o1     end    0      the last observation of the old episode; zeros where not finite
    acting_obs           o0     o1     fresh  fresh  what the policy answers
    is_last              0      0      1      1
    is_first             0      0      0      1      environment 2's next row is `is_first` and keeps its true reward

Nothing here waits for the device, except where a function says so: counts travel to the host while the policy acts, and are
looked at before the next step.
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

MAX_DUMPS = 4  # files of one incarnation
MAX_DUMPED_ROWS = 8  # environments in one file
MAX_STREAK = 100  # diverged rows of one environment, never two finite ones in between: resets mend nothing
SHARE_TICKS, MAX_SHARE = 1000, 0.01  # of all rows of the last ticks: what is left is not worth learning from


class HostCounts:
    """Whole numbers of the device that the host reads later, having waited for their copy only and not for newer work."""

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=cuda)
        self._event = torch.cuda.Event(blocking=True) if cuda else None  # sleeps instead of spinning

    def post(self, counts: Tensor) -> None:
        """counts: (size,) int64."""
        self._host.copy_(counts, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Divergence:
    """How often each environment diverged of late, kept on the device. `counts` is what the host needs for its verdict."""

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self._num_envs = num_envs
        self._whole = torch.ones(num_envs, dtype=torch.bool, device=device)  # the last row was finite
        self._streak = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._ticks = torch.zeros(
            SHARE_TICKS, dtype=torch.int64, device=device
        )  # diverged rows of each of the last ticks
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._tick = 0

    def add(self, diverged: Tensor) -> None:
        """diverged: (E,) bool, of one tick."""
        mended = self._whole & ~diverged
        self._streak = torch.where(diverged, self._streak + 1, torch.where(mended, 0, self._streak))
        self._whole = ~diverged
        number = diverged.sum()
        self._ticks[self._tick % SHARE_TICKS] = number
        self._total += number
        self._tick += 1

    def counts(self) -> Tensor:
        """(3,) int64: diverged rows so far, in the last SHARE_TICKS ticks, and the longest streak of one environment."""
        return torch.stack([self._total, self._ticks.sum(), self._streak.amax()])

    def check(self, total: int, recent: int, streak: int) -> None:
        """Raises: SimulatorError if an environment does not mend, or too many diverge."""
        if streak < MAX_STREAK and recent <= MAX_SHARE * SHARE_TICKS * self._num_envs:
            return
        raise SimulatorError(
            f"{total} rows diverged, {recent} of them in the last {SHARE_TICKS} ticks of {self._num_envs} environments and "
            f"{streak} of one environment without two finite rows in between; wanted at most {MAX_SHARE:.0%} of the rows, "
            f"fewer than {MAX_STREAK} of one environment; look at crash/diverged-*.npz, lower env.action_scale or the "
            "task's forces"
        )


class ManagerStep:
    """Turns each tick of E environments into an Arrival that owns its memory, and keeps account of what diverged.

    A tick is: `pending()` (which environments the backend must reset first), the simulator's step, `row()`, then
    `arrival()` once ended environments are reset. reward_factor multiplies every reward. finite_horizon: a time-out ends the
    task itself. crash_dir: where the first non-finite states are written. images: what every tick's observations went through, asked whether its images stayed in
    their range.
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
        self._reward_factor, self._finite_horizon = reward_factor, finite_horizon
        self._crash_dir, self._images = crash_dir, images
        self._first = torch.ones(num_envs, dtype=torch.bool, device=device)  # the next row begins an episode
        self._diverged = torch.zeros_like(self._first)  # in the newest row
        self._pending = torch.zeros_like(self._first)
        self._divergence = Divergence(num_envs, device)
        self._counts = HostCounts(4, device)
        self._raw: dict[str, Tensor] = {}
        self._num_dumps = 0
        self.num_diverged = 0  # rows that were not finite, as of the last `pending()`; reading it never waits

    def begin(self, obs: dict[str, Tensor]) -> Arrival:
        """The arrival at reset(): every environment begins. obs: entries (E, *shape)."""
        self._first = torch.ones_like(self._first)
        none, reward = torch.zeros_like(self._first), torch.zeros_like(self._first, dtype=torch.float32)
        row = self.row(obs, reward, none, none)
        return self.arrival(row, obs, was_reset=none)

    def row(self, obs: dict[str, Tensor], reward: Tensor, terminated: Tensor, time_out: Tensor) -> Arrival:
        """What is recorded of a tick, in memory of its own; `acting_obs` is still missing.

        obs: entries (E, *shape) on arrival, of ended episodes their last. Where both ends are set, the episode terminated.
        Non-finite rows become zeros with is_first = is_last; where `is_last` is set, the environment must be reset.
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
        """The row with what the policy acts on: `fresh` where environments were reset in this tick, else the row's own.

        fresh: entries (E, *shape). was_reset: (E,) bool, the environments reset since the simulator's step. What diverged
        and was not reset acts on zeros and is named by the next `pending()`.
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
        """Indices of environments to reset before the next step, None in the ordinary tick. Call it once per tick.

        Waits for a copy made at the end of the last tick, and for the device only if something diverged, which it then
        writes down. Raises: SimulatorError if environments do not mend or too many diverge, SettingError if an image left
        its range.
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
        """The raw rows of what diverged, as `crash/diverged-<pid>-<n>.npz`; a full disk ends no run."""
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
    """The cfg.episode_length_s that makes `ceil(episode_length_s / step_dt)` exactly `horizon` agent steps."""
    return (horizon - 0.5) * step_s


def finite_horizon(cfg: Any, env: EnvSettings) -> bool:
    """Whether the task says that its time-out is its end, so that nothing comes after it; a cut of ours never is."""
    return bool(getattr(cfg, "is_finite_horizon", False)) and env.horizon is None


def whole_columns(settings: Settings, num_envs: int) -> list[int]:
    """The environments whose first episodes begin at age 0: those that evaluate, or all without env.randomize_start."""
    num_whole = settings.collector.eval_envs if settings.env.randomize_start else num_envs
    return evaluation_columns(num_envs, num_whole)


def randomize_episode_lengths(env: Any, *, whole: list[int]) -> None:
    """Let the first episodes end at different times: after one reset of all, time-outs would otherwise coincide for good.

    Some tasks draw such ages themselves: those are replaced.

    env: has `episode_length_buf` (E,) and `max_episode_length`; otherwise nothing happens. The environments in `whole`
    keep whole episodes.
    """
    lengths = getattr(env, "episode_length_buf", None)
    if lengths is None:
        return
    drawn = torch.randint_like(lengths, int(env.max_episode_length))
    drawn[whole] = 0
    env.episode_length_buf = drawn


def _finite(obs: dict[str, Tensor]) -> Tensor:
    """(E,) bool: every value of the environment's entries is finite."""
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
    """Zeros where the mask is set: 0 * NaN is NaN, so by choice and not by product. The result owns its memory."""
    return {name: _where(mask, torch.zeros_like(entry), entry) for name, entry in obs.items()}
