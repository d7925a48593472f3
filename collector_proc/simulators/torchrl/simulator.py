"""Backend `torchrl`: any torchrl EnvBase, chosen by its wrapper's name or by the path of a function that creates it.

    env.name=gym:HalfCheetah-v5            E copies of torchrl's GymEnv, stepped one after the other in this process
    env.name=brax:ant                      one environment of batch size [E]
    env.name=my_package.my_module:make     the environment that `make` returns: one of batch size [E], or E single ones

Every environment whose episode ended is reset within the tick, with a "_reset" mask if the environment is batched. So
`obs` holds the true last observation and `acting_obs` the first observation of the new episode. This file imports
torch.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collector_proc.simulators.batched.spaces import ActionMap, ObservationMap
from collector_proc.simulators.batched.step import BatchedStep
from collector_proc.simulators.dm_control.environment import UNLIMITED, environment_seed, renderer_variables
from collector_proc.simulators.torchrl.checks import WRAPPERS
from collector_proc.simulators.torchrl.layers import MAKE_VECTOR, refuse_own_resets, resets_any_row
from collector_proc.simulators.torchrl.specs import (
    Key,
    action_leaf,
    check_row_entries,
    chosen_observations,
    refuse_missing_ends,
)
from collector_proc.simulators.torchrl.user_module import place_of
from shared.errors import SettingError, SimulatorError
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torchrl.envs import EnvBase

    from collector_proc.simulators.base import Arrival
    from shared.config import EnvSettings, Settings


@dataclass(frozen=True)
class Outcome:
    """The result of one agent step of n rows.

    Shapes: entries of obs (n, ...), as the environment returns them; reward, terminated and done (n,).
    """

    obs: dict[str, Tensor]
    reward: Tensor
    terminated: Tensor
    done: Tensor


class EnvRows:
    """The rows that one EnvBase steps: n rows for batch size [n], one row without a batch size."""

    def __init__(self, env: EnvBase, keys: dict[str, Key]) -> None:
        """Check and reset the environment. `keys` are the keys of the streamed observations.

        Raises: SettingError if the environment resets itself, if its action is not one continuous entry, or if it does
        not have one reward and one end per row.
        """
        self.env, self.num_rows = env, env.batch_size.numel()
        refuse_own_resets(env)
        self._action = action_leaf(env)
        self._keys = keys
        check_row_entries(env, self.num_rows)
        self.resets_any = resets_any_row(env)
        self._next = env.reset()
        self._ended = self._next.get("done").reshape(self.num_rows)  # whether the row ended in the last tick

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return each row's lowest and highest action, infinite where there is no limit. Shapes: (n, A) each."""
        _, spec = self._action
        low, high = (bound.reshape(self.num_rows, -1).double() for bound in (spec.space.low, spec.space.high))
        return (
            torch.where(low <= -UNLIMITED, -math.inf, low),
            torch.where(high >= UNLIMITED, math.inf, high),
        )

    def observe(self) -> dict[str, Tensor]:
        """Return the observation that the next action answers to."""
        return self._entries(self._next)

    def reset(self, mask: Tensor) -> Tensor:
        """Start new episodes where the mask is set, if possible, and return where one has started. Shapes: (n,) bool.

        If only ended rows can be reset, a row that ended in the middle of an action repeat is already some frames into
        its new episode.
        """
        if bool(mask.all()):
            self._next = self.env.reset()
            return mask
        done = self._next.get("done")
        now, begun = (mask, mask) if self.resets_any else (mask & done.reshape(self.num_rows), mask & self._ended)
        if bool(now.any()):
            self._next.set("_reset", now.view(done.shape))
            self._next = self.env.reset(self._next)
        return begun

    def step(self, action: Tensor, *, repeat: int) -> Outcome:
        """Repeat an action for `repeat` frames, or until the episode ends, and sum the rewards.

        Shapes: action (n, A), in the environment's own range.
        """
        result = frame = self._frame(action)
        for _ in range(repeat - 1):
            if bool(result.done.all()):
                break
            result = _copy(result)  # the environment may overwrite the tensors that it returned
            # A row must not be stepped past its end. Rows that are stepped on are reset after the tick.
            self.reset(frame.done.clone())
            frame = self._frame(action)
            result = _add(result, frame)
        self._ended = result.done
        return result

    def _frame(self, action: Tensor) -> Outcome:
        key, spec = self._action
        self._next.set(key, action.reshape(spec.shape).to(spec.dtype))
        try:
            stepped = self.env.step(self._next)
        except RuntimeError as error:
            refuse_missing_ends(error)
            raise
        arrived = stepped.get("next")
        self._next = self.env.step_mdp(stepped)
        return Outcome(
            self._entries(arrived),
            arrived.get("reward").reshape(self.num_rows).float(),
            arrived.get("terminated").reshape(self.num_rows),
            arrived.get("done").reshape(self.num_rows),
        )

    def _entries(self, data: Any) -> dict[str, Tensor]:
        lead = len(self.env.batch_size)
        return {
            name: (entry := data.get(key)).reshape(self.num_rows, *entry.shape[lead:])
            for name, key in self._keys.items()
        }


def common_bounds(rows: list[EnvRows]) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest action of all rows, (A,) each. Raises: SettingError if two rows differ."""
    low, high = (torch.cat(bounds).cpu() for bounds in zip(*(each.bounds() for each in rows), strict=True))
    for row in range(1, len(low)):
        if not (torch.equal(low[row], low[0]) and torch.equal(high[row], high[0])):
            raise SettingError(
                f"the actions of environment 0 lie in {low[0].tolist()} .. {high[0].tolist()}, those of environment "
                f"{row} in {low[row].tolist()} .. {high[row].tolist()}; expected the same bounds in all environments; "
                "scale the actions inside the environment"
            )
    return low[0], high[0]


class TorchrlSimulator:
    """Steps env.num_envs environments; single environments are copied, each with its own random seed from `seed`.

    In every frame, torchrl's `step` is called once for each copy, or once for a whole batch.
    """

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        env = settings.env
        assert env.num_envs is not None, "check_env refuses settings without env.num_envs"
        with _explained(env):
            made = _make_all(env, num_envs=env.num_envs, seed=seed, device=device)
            keys = chosen_observations(made[0], env.obs_groups)
            self._rows = [EnvRows(one, keys) for one in made]
        self._sizes = [rows.num_rows for rows in self._rows]
        self._horizon, self.frames_per_step = env.horizon, env.frame_skip
        _check_horizon(env, self._rows)
        sample = self._gather([rows.observe() for rows in self._rows])
        first = next(iter(sample.values()))
        self.device = str(first.device)
        self._observe = ObservationMap(sample, env)
        self._act = ActionMap(*common_bounds(self._rows), scale=env.action_scale, device=first.device)
        self.action_range = self._act.range
        self._tick = BatchedStep(env.num_envs, device=first.device, crash_dir=crash_dir, images=self._observe)
        # the number of agent steps of each current episode
        self._steps = torch.zeros(env.num_envs, dtype=torch.int64, device=first.device)
        self.spec = StreamSpec(env.num_envs, self._observe.spec, self._act.action_dim)

    @property
    def num_diverged(self) -> int:
        """The number of rows that were not finite, as of the last tick that was checked.

        Such rows are recorded as zeros and their environments are reset.
        """
        return self._tick.num_diverged

    def reset(self) -> Arrival:
        """Reset every environment."""
        self._reset(torch.ones_like(self._steps, dtype=torch.bool))
        return self._tick.begin(self._observed())

    def step(self, action: Tensor) -> Arrival:
        """Make one agent step of every environment. Shapes: action (E, A) in [-1, 1]. Raises: SimulatorError."""
        assert action.shape == (self.spec.num_envs, self.spec.action_dim), action.shape
        with torch.no_grad():
            if (stuck := self._tick.pending()) is not None:
                self._reset(torch.zeros_like(self._steps, dtype=torch.bool).index_fill(0, stuck, True))
            native = self._act(action.detach()).split(self._sizes)
            repeat = self.frames_per_step
            outcomes = [rows.step(part, repeat=repeat) for rows, part in zip(self._rows, native, strict=True)]
            reward, terminated, done = (
                torch.cat([getattr(outcome, name) for outcome in outcomes]) for name in ("reward", "terminated", "done")
            )
            self._steps += 1
            cut = done if self._horizon is None else done | (self._steps >= self._horizon)
            obs = self._observe(self._gather([outcome.obs for outcome in outcomes]))
            row = self._tick.row(obs, reward, terminated, cut & ~terminated)
            if not bool(row.is_last.any()):
                return self._tick.arrival(row, row.obs, was_reset=row.is_last)
            was_reset = self._reset(row.is_last)
            return self._tick.arrival(row, self._observed(), was_reset=was_reset)

    def close(self) -> None:
        """Close every environment that is still open."""
        for rows in self._rows:
            if not rows.env.is_closed:
                rows.env.close()

    def _reset(self, mask: Tensor) -> Tensor:
        self._steps = torch.where(mask, 0, self._steps)
        parts = zip(self._rows, mask.split(self._sizes), strict=True)
        return torch.cat([rows.reset(part) for rows, part in parts])

    def _observed(self) -> dict[str, Tensor]:
        return self._observe(self._gather([rows.observe() for rows in self._rows]))

    def _gather(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_horizon(env: EnvSettings, vector: list[EnvRows]) -> None:
    """Raises: SettingError if env.horizon is set, but some rows can be reset only when their episode has ended."""
    if env.horizon is not None and not all(rows.resets_any or rows.num_rows == 1 for rows in vector):
        raise SettingError(
            f"env.horizon={env.horizon} would end episodes of a gymnasium vector in SAME_STEP mode, which cannot "
            f"reset them; expected null; set env.horizon=null and give its environments a time limit, or {MAKE_VECTOR}"
        )


def _copy(outcome: Outcome) -> Outcome:
    obs = {name: entry.clone() for name, entry in outcome.obs.items()}
    return Outcome(obs, outcome.reward.clone(), outcome.terminated.clone(), outcome.done.clone())


def _add(before: Outcome, after: Outcome) -> Outcome:
    """Combine two frames into one. Rows that were done before the second frame keep their values."""
    over = before.done
    obs = {
        name: torch.where(over.view(-1, *[1] * (entry.dim() - 1)), before.obs[name], entry)
        for name, entry in after.obs.items()
    }
    return Outcome(
        obs,
        before.reward + torch.where(over, 0.0, after.reward),
        torch.where(over, before.terminated, after.terminated),
        over | after.done,
    )


def _make_all(env: EnvSettings, *, num_envs: int, seed: int, device: str) -> list[EnvBase]:
    """Create and seed one batched environment, or num_envs copies of a single one.

    Raises: SettingError if the batch size does not fit env.num_envs.
    """
    make = _maker(env, num_envs=num_envs, device=device)
    first = make(environment_seed(seed, 0) >> 1)
    size = first.batch_size.numel()
    made = [first] if first.batch_size else []
    if first.batch_size and size != num_envs:
        raise SettingError(
            f"env.num_envs={num_envs} does not fit {env.name}, whose batch size is {list(first.batch_size)}; expected "
            f"{size} or an environment that takes num_envs; set env.num_envs={size}"
        )
    made = made or [first, *(make(environment_seed(seed, index) >> 1) for index in range(1, num_envs))]
    for index, one in enumerate(made):
        one.set_seed(environment_seed(seed, index) >> 1)  # some wrappers accept 31 bits only
    return made


def _maker(env: EnvSettings, *, num_envs: int, device: str) -> Callable[[int], EnvBase]:
    """Return a function that creates one environment from a seed."""
    prefix, _, name = env.name.partition(":")
    wrapper = WRAPPERS.get(prefix)
    _leave_isaaclab_alone()
    if wrapper is None:
        return _imported_maker(prefix, name, num_envs=num_envs, device=device)
    os.environ.update(renderer_variables(env.from_pixels))  # mujoco reads them once, when it is imported
    made_by = getattr(importlib.import_module("torchrl.envs"), wrapper.cls)
    options: dict[str, Any] = {"batch_size": [num_envs], "device": device} if wrapper.batched else {}
    if env.from_pixels:
        options |= {"from_pixels": True, "pixels_only": True}
    arguments = name.split("/") if prefix == "dm_control" else [name]
    return lambda _: made_by(*arguments, **options)


def _imported_maker(module: str, name: str, *, num_envs: int, device: str) -> Callable[[int], EnvBase]:
    """Return a function that creates one environment from a seed, with the user's callable.

    The callable gets num_envs, seed and device if it has parameters of these names. Importing and calling it can raise
    any exception.
    """
    from torchrl.envs import EnvBase

    target = getattr(importlib.import_module(module), name)
    # Classes of torchrl have a metaclass whose signature hides that of __init__.
    taken = inspect.signature(target.__init__ if inspect.isclass(target) else target).parameters

    def make(seed: int) -> EnvBase:
        offered = {"num_envs": num_envs, "seed": seed, "device": device}
        made = target(**{key: value for key, value in offered.items() if key in taken})
        if not isinstance(made, EnvBase):
            raise SettingError(
                f"env.name={module}:{name} returns a {type(made).__name__}; expected a torchrl EnvBase; wrap it, for "
                "example in torchrl.envs.GymWrapper"
            )
        return made

    return make


@contextmanager
def _explained(env: EnvSettings) -> Iterator[None]:
    """Turn any exception of the code inside into a SimulatorError that names the line where it was raised."""
    try:
        yield
    except (SettingError, SimulatorError):
        raise
    except Exception as error:  # libraries and users' functions can raise anything
        raise SimulatorError(
            f"{env.name} cannot be created and reset: {type(error).__name__}: {error} ({place_of(error)}); expected an "
            "environment that torchrl can reset; read that library's message, or fix the function at that line"
        ) from error


def _leave_isaaclab_alone() -> None:
    """Keep torchrl's GymEnv from importing an installed isaaclab, which fails without a running Omniverse."""
    wrapping = importlib.import_module("torchrl.envs.libs.gym")
    if getattr(wrapping, "_has_isaaclab", False) and "isaaclab" not in sys.modules:
        wrapping._has_isaaclab = False  # pyright: ignore[reportAttributeAccessIssue]
