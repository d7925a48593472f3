"""What IsaacLab-shaped simulators (isaaclab, mjlab) share: their step's tensors become an Arrival. Imported after launch.

Such a simulator hands out the managers' own buffers, which the next step overwrites, and an episode ends and begins again
within one tick. One tick, environment 2 falling at it, environment 3 diverging:

    env                  0      1      2      3
    row.obs              o0     o1     end    0      the last observation of the old episode; zeros where not finite
    acting_obs           o0     o1     fresh  fresh  what the policy answers
    is_last              0      0      1      1
    is_first             0      0      0      1      environment 2's next row is `is_first` and keeps its true reward

Nothing here waits for the device, except where a function says so.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from collector_proc.simulators.base import Arrival
from shared.errors import SimulatorError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MAX_DUMPS = 4  # files of one incarnation
MAX_DUMPED_ROWS = 8  # environments in one file
DIVERGED_TICKS = 100  # in a row: resets mend nothing any more


class HostFlag:
    """One bool of the device that the host reads later, having waited for its copy only and not for newer work."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._host = torch.zeros((), dtype=torch.bool, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None

    def post(self, flag: Tensor) -> None:
        self._host.copy_(flag, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)


class ManagerStep:
    """Turns each tick of E environments into an Arrival that owns its memory, and keeps account of what diverged.

    A tick is: `pending()` (which environments the backend must reset first), the simulator's step, `row()`, then
    `arrival()` once ended environments are reset. reward_factor multiplies every reward. crash_dir: where the first
    non-finite states are written.
    """

    def __init__(
        self, num_envs: int, *, device: torch.device, reward_factor: float = 1.0, crash_dir: Path | None = None
    ) -> None:
        self._num_envs, self._reward_factor, self._crash_dir = num_envs, reward_factor, crash_dir
        self._first = torch.ones(num_envs, dtype=torch.bool, device=device)  # the next row begins an episode
        self._diverged = torch.zeros_like(self._first)  # in the newest row
        self._pending = torch.zeros_like(self._first)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._flag = HostFlag(device)
        self._raw: dict[str, Tensor] = {}
        self._num_dumps = self._streak = 0

    @property
    def num_diverged(self) -> int:
        """Rows that were not finite. Waits for the device."""
        return int(self._count)

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
            is_terminal=terminated & ~diverged,
        )

    def arrival(self, row: Arrival, fresh: dict[str, Tensor], *, was_reset: Tensor) -> Arrival:
        """The row with what the policy acts on: `fresh` where environments were reset in this tick, else the row's own.

        fresh: entries (E, *shape). was_reset: (E,) bool, the environments reset since the simulator's step. What diverged
        and was not reset acts on zeros and is named by the next `pending()`.
        """
        acting = {name: _where(was_reset, fresh[name], entry) for name, entry in row.obs.items()}
        bad = ~_finite(acting)
        self._pending = (self._diverged & ~was_reset) | bad
        self._count += (self._diverged | bad).sum()
        self._diverged = self._diverged | bad
        self._flag.post(self._diverged.any())
        return dataclasses.replace(row, acting_obs=_blank(acting, bad))

    def pending(self) -> Tensor | None:
        """Indices of environments to reset before the next step, None in the ordinary tick. Call it once per tick.

        Waits for a copy made at the end of the last tick, and for the device only if something diverged, which it then
        writes down. Raises: SimulatorError if environments have diverged in 100 ticks in a row.
        """
        if not self._flag.read():
            self._streak = 0
            return None
        self._streak += 1
        self._dump()
        if self._streak >= DIVERGED_TICKS:
            raise SimulatorError(
                f"environments diverged in each of the last {DIVERGED_TICKS} ticks, {self.num_diverged} rows so far; "
                "wanted finite observations and rewards after a reset; look at crash/diverged-*.npz, lower "
                "env.action_scale or the task's forces"
            )
        indices = self._pending.nonzero().squeeze(-1)
        return indices if len(indices) else None

    def _dump(self) -> None:
        """The raw rows of what diverged, as `crash/diverged-<pid>-<n>.npz`."""
        if self._crash_dir is None or self._num_dumps >= MAX_DUMPS:
            return
        indices = self._diverged.nonzero().squeeze(-1)[:MAX_DUMPED_ROWS]
        rows: dict[str, Any] = {name: entry[indices].cpu().numpy() for name, entry in self._raw.items()}
        path = self._crash_dir / f"diverged-{os.getpid()}-{self._num_dumps}.npz"
        np.savez(path, env=indices.cpu().numpy(), **rows)
        self._num_dumps += 1


def episode_length_s(horizon: int, step_s: float) -> float:
    """The cfg.episode_length_s that makes `ceil(episode_length_s / step_dt)` exactly `horizon` agent steps."""
    return (horizon - 0.5) * step_s


def randomize_episode_lengths(env: Any, *, num_whole: int) -> None:
    """Let the first episodes end at different times: after one reset of all, time-outs would otherwise coincide for good.

    env: has `episode_length_buf` (E,) and `max_episode_length`; otherwise nothing happens. The last num_whole environments
    (evaluation) keep whole episodes.
    """
    lengths = getattr(env, "episode_length_buf", None)
    if lengths is None:
        return
    drawn = torch.randint_like(lengths, int(env.max_episode_length))
    drawn[len(drawn) - num_whole :] = 0
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
