"""Backend `torchrl`: any torchrl EnvBase, by its wrapper's name or by the import path of a function that makes it.

    env.name=gym:HalfCheetah-v5            E copies of torchrl's GymEnv, stepped one after the other in this process
    env.name=brax:ant                      one environment of batch size [E]
    env.name=my_package.my_module:make     whatever `make` returns: batch size [E], or anything else E times

Every environment that ended is reset within the tick (torchrl's `reset`, with a "_reset" mask where the environment is
batched), so `obs` holds the true last observation and `acting_obs` the first of the fresh episode. Imports torch.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collector_proc.simulators.batched.spaces import ActionMap, ObservationMap
from collector_proc.simulators.batched.step import ManagerStep
from collector_proc.simulators.checks import TORCHRL_WRAPPERS
from collector_proc.simulators.dm_control.environment import UNLIMITED, environment_seed, renderer_variables
from collector_proc.simulators.torchrl.layers import MAKE_VECTOR, refuse_own_resets, resets_any_row
from collector_proc.simulators.torchrl.specs import (
    Key,
    action_leaf,
    check_row_entries,
    chosen_observations,
    refuse_missing_ends,
)
from shared.errors import SettingError, SimulatorError
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchrl.envs import EnvBase

    from collector_proc.simulators.base import Arrival
    from shared.config import EnvSettings, Settings


@dataclass(frozen=True)
class Outcome:
    """One agent step of some rows: obs entries as the environment has them, (n, ...); reward, terminated, done (n,)."""

    obs: dict[str, Tensor]
    reward: Tensor
    terminated: Tensor
    done: Tensor


class EnvRows:
    """The rows of the vector that one EnvBase steps: batch size [n], or none, which is one row."""

    def __init__(self, env: EnvBase, keys: dict[str, Key]) -> None:
        """keys: where the streamed observations lie.

        Raises: SettingError if the environment resets itself, its actions are not one continuous entry, or its rewards
        or ends not one per row.
        """
        self.env, self.num_rows = env, env.batch_size.numel()
        refuse_own_resets(env)
        self._action = action_leaf(env)
        self._keys = keys
        check_row_entries(env, self.num_rows)
        self.resets_any = resets_any_row(env)
        self._next = env.reset()
        self._ended = self._next.get("done").reshape(self.num_rows)  # in the last tick

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest action of one row, (A,) each; infinite where there is no limit."""
        _, spec = self._action
        low, high = (bound.reshape(self.num_rows, -1)[0].double() for bound in (spec.space.low, spec.space.high))
        return (
            torch.where(low <= -UNLIMITED, -math.inf, low),
            torch.where(high >= UNLIMITED, math.inf, high),
        )

    def observe(self) -> dict[str, Tensor]:
        """What the next action answers."""
        return self._entries(self._next)

    def reset(self, mask: Tensor) -> Tensor:
        """Start new episodes where the mask (n,) is set, as far as that can be done; returns where one has begun.

        Where only ended rows can be reset, one that ended in the middle of a repeat stands some frames in its new episode.
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
        """`repeat` frames, or fewer where an episode ends: rewards are summed up to there. action: (n, A), native."""
        result = frame = self._frame(action)
        for _ in range(repeat - 1):
            if bool(result.done.all()):
                break
            result = _copy(result)  # the environment may overwrite what it handed out
            self.reset(
                frame.done.clone()
            )  # nothing is stepped past its end; what is stepped on is reset after the tick
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


class TorchrlSimulator:
    """env.num_envs environments. Environment e of a vector of copies draws from its own stream of `seed`.

    Copies cost what torchrl's `step` costs, once per environment; a batched environment pays it once per tick.
    """

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        env = settings.env
        assert env.num_envs is not None, "check_env demands env.num_envs"
        with _told(env):
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
        self._act = ActionMap(*self._rows[0].bounds(), scale=env.action_scale, device=first.device)
        self._tick = ManagerStep(env.num_envs, device=first.device, crash_dir=crash_dir, images=self._observe)
        self._steps = torch.zeros(env.num_envs, dtype=torch.int64, device=first.device)  # of the running episodes
        self.spec = StreamSpec(env.num_envs, self._observe.spec, self._act.action_dim)

    @property
    def num_diverged(self) -> int:
        """Rows that were not finite: recorded as zeros, their environments reset. As of the last tick looked at."""
        return self._tick.num_diverged

    def reset(self) -> Arrival:
        """Start every environment anew."""
        self._reset(torch.ones_like(self._steps, dtype=torch.bool))
        return self._tick.begin(self._observed())

    def step(self, action: Tensor) -> Arrival:
        """One agent step of every environment. action: (E, A) in [-1, 1]. Raises: SimulatorError."""
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
    if env.horizon is not None and not all(rows.resets_any or rows.num_rows == 1 for rows in vector):
        raise SettingError(
            f"env.horizon={env.horizon} ends episodes of a gymnasium vector that resets only what ended by itself (SAME_STEP "
            f"mode); wanted null; set env.horizon=null and give its environments a time limit, or {MAKE_VECTOR}"
        )


def _copy(outcome: Outcome) -> Outcome:
    obs = {name: entry.clone() for name, entry in outcome.obs.items()}
    return Outcome(obs, outcome.reward.clone(), outcome.terminated.clone(), outcome.done.clone())


def _add(before: Outcome, after: Outcome) -> Outcome:
    """Two frames as one; rows that were done before keep what they had."""
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
    """One batched environment or num_envs copies, seeded. Raises: SettingError, SimulatorError."""
    make = _maker(env, num_envs=num_envs, device=device)
    first = make(environment_seed(seed, 0) >> 1)
    size = first.batch_size.numel()
    made = [first] if first.batch_size else []
    if first.batch_size and size != num_envs:
        raise SettingError(
            f"env.num_envs={num_envs} does not fit {env.name}, whose batch size is {list(first.batch_size)}; wanted "
            f"{size} or an environment that takes num_envs; set env.num_envs={size}"
        )
    made = made or [first, *(make(environment_seed(seed, index) >> 1) for index in range(1, num_envs))]
    for index, one in enumerate(made):
        one.set_seed(environment_seed(seed, index) >> 1)  # some wrappers take 31 bits only
    return made


def _maker(env: EnvSettings, *, num_envs: int, device: str) -> Callable[[int], EnvBase]:
    """A function of a seed that makes one environment."""
    prefix, _, name = env.name.partition(":")
    wrapper = TORCHRL_WRAPPERS.get(prefix)
    _leave_isaaclab_alone()
    if wrapper is None:
        return _imported_maker(prefix, name, num_envs=num_envs, device=device)
    os.environ.update(renderer_variables(env.from_pixels))  # read once, when mujoco is first imported
    made_by = getattr(importlib.import_module("torchrl.envs"), wrapper.cls)
    options: dict[str, Any] = {"batch_size": [num_envs], "device": device} if wrapper.batched else {}
    if env.from_pixels:
        options |= {"from_pixels": True, "pixels_only": True}
    arguments = name.split("/") if prefix == "dm_control" else [name]
    return lambda _: made_by(*arguments, **options)


def _imported_maker(module: str, name: str, *, num_envs: int, device: str) -> Callable[[int], EnvBase]:
    from torchrl.envs import EnvBase

    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingError(
            f"env.name={module}:{name} does not import: {error}; wanted module:callable; set env.name to a callable or "
            "EnvBase class that this Python finds (PYTHONPATH)"
        ) from error
    except Exception as error:
        raise SettingError(
            f"env.name={module}:{name} does not import: {type(error).__name__}: {error} ({_place(error)}); wanted a module "
            "that can be imported; mend it there"
        ) from error
    if not callable(target):
        raise SettingError(
            f"env.name={module}:{name} is a {type(target).__name__}; wanted a function that makes an environment, or a class; "
            "set env.name to one"
        )
    # a class of torchrl has a metaclass whose own signature hides that of __init__
    taken = inspect.signature(target.__init__ if inspect.isclass(target) else target).parameters

    def make(seed: int) -> EnvBase:
        offered = {"num_envs": num_envs, "seed": seed, "device": device}
        made = target(**{key: value for key, value in offered.items() if key in taken})
        if not isinstance(made, EnvBase):
            raise SettingError(
                f"env.name={module}:{name} makes {type(made).__name__}; wanted a torchrl EnvBase; wrap it, for instance "
                "in torchrl.envs.GymWrapper"
            )
        return made

    return make


@contextmanager
def _told(env: EnvSettings) -> Iterator[None]:
    """Whatever fails inside is a SimulatorError that says where."""
    try:
        yield
    except (SettingError, SimulatorError):
        raise
    except Exception as error:  # each library, and each user's own function, fails in its own ways
        raise SimulatorError(
            f"{env.name} cannot be made and reset: {type(error).__name__}: {error} ({_place(error)}); wanted an environment "
            "that torchrl can reset; see that library's own message, or mend the function there"
        ) from error


def _place(error: BaseException) -> str:
    """The innermost line of code that is no installed library's, or the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _leave_isaaclab_alone() -> None:
    """Keep torchrl's GymEnv from importing an installed isaaclab, which dies without a running Omniverse."""
    wrapping = importlib.import_module("torchrl.envs.libs.gym")
    if getattr(wrapping, "_has_isaaclab", False) and "isaaclab" not in sys.modules:
        wrapping._has_isaaclab = False  # pyright: ignore[reportAttributeAccessIssue]
