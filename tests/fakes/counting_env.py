"""A torchrl environment in which every number shows where it comes from. Its outputs are buffers that it overwrites.

    observation "where"             (1000 * row + number of frames so far, number of the episode)
    observation ("extra", "push")   the last action
    reward                          number of frames so far

Row r has episodes of 5 + r frames. Rows with an even number terminate, and the others time out. A step after the end of
an episode fails.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, NonTensor, OneHot, Unbounded
from torchrl.envs import (
    CatTensors,
    EnvBase,
    GymEnv,
    GymWrapper,
    InitTracker,
    ParallelEnv,
    RenameTransform,
    RewardSum,
    SelectTransform,
    SerialEnv,
    StepCounter,
    TrajCounter,
    Transform,
    TransformedEnv,
)

IMAGE = (128, 96, 3)
singles = itertools.count()  # the number of the next row that make_single creates


class CountingEnv(EnvBase):
    """The rows with the numbers `rows`: one batch of them, or a single row without a batch size.

    diverge_at: the frame whose reward is NaN.
    """

    def __init__(self, rows: list[int], *, batched: bool, diverge_at: int = -1, image: bool = False) -> None:
        lead = torch.Size([len(rows)] if batched else [])
        super().__init__(batch_size=lead)
        self._lead, self._diverge_at, self._image = lead, diverge_at, image
        self._row = torch.tensor(rows).view(lead)
        self._length = 5 + self._row
        self._frames, self._age, self._episode = (torch.zeros_like(self._row) for _ in range(3))
        self._where, self._push = torch.zeros(*lead, 2, dtype=torch.float64), torch.zeros(*lead, 1)
        one = torch.Size([*lead, 1])
        entries: dict[str, Any] = {
            "where": Unbounded(torch.Size([*lead, 2]), dtype=torch.float64),
            "extra": Composite(push=Unbounded(one), shape=lead),
        }
        if image:
            entries["camera"] = Bounded(0, 255, torch.Size([*lead, *IMAGE]), dtype=torch.uint8)
        self.observation_spec = Composite(**entries, shape=lead)
        self.action_spec = Bounded(-2.0, 4.0, one)
        self.reward_spec = Unbounded(one)
        flags: dict[str, Any] = {name: Binary(1, one, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(**flags, shape=lead)

    def _observation(self) -> dict[str, Any]:
        self._where[..., 0] = 1000 * self._row + self._frames
        self._where[..., 1] = self._episode
        data: dict[str, Any] = {"where": self._where, "extra": TensorDict({"push": self._push}, self._lead)}
        if self._image:
            data["camera"] = torch.full((*self._lead, *IMAGE), 200, dtype=torch.uint8)
        return data

    def _reset(self, tensordict: TensorDict | None = None, **_: Any) -> TensorDict:
        mask = torch.ones_like(self._row, dtype=torch.bool)
        if tensordict is not None and tensordict.get("_reset", None) is not None:
            mask = tensordict["_reset"].view(self._lead)
        self._episode += mask
        self._age[mask] = 0
        return TensorDict(self._observation(), self._lead)

    def _step(self, tensordict: TensorDict) -> TensorDict:
        assert bool((self._age < self._length).all()), f"stepped past the end: {self._age} of {self._length}"
        self._frames += 1
        self._age += 1
        self._push.copy_(tensordict["action"])
        ended, even = self._age >= self._length, self._row % 2 == 0
        reward = torch.where(self._frames == self._diverge_at, torch.nan, self._frames.float())
        flags = {"terminated": ended & even, "truncated": ended & ~even, "done": ended, "reward": reward}
        return TensorDict(self._observation() | {k: v.unsqueeze(-1) for k, v in flags.items()}, self._lead)

    def _set_seed(self, seed: int | None) -> None:
        self.seed = seed


def make_batched(num_envs: int) -> CountingEnv:
    return CountingEnv(list(range(num_envs)), batched=True)


def make_single() -> CountingEnv:
    return CountingEnv([next(singles)], batched=False)


def make_diverging(num_envs: int) -> CountingEnv:
    return CountingEnv(list(range(num_envs)), batched=True, diverge_at=3)


def make_images(num_envs: int) -> CountingEnv:
    return CountingEnv(list(range(num_envs)), batched=True, image=True)


def make_three() -> CountingEnv:
    return CountingEnv([0, 1, 2], batched=True)


def make_discrete() -> CountingEnv:
    env = make_single()
    env.action_spec = OneHot(2)
    return env


def make_nothing() -> dict:
    return {}


SELF_RESETTING: dict[str, Any] = {"auto_reset": True}  # with it, torchrl's metaclass returns an AutoResetEnv


def make_self_resetting(num_envs: int) -> EnvBase:
    return CountingEnv(list(range(num_envs)), batched=True, **SELF_RESETTING)


def make_self_resetting_kept(num_envs: int) -> EnvBase:
    kept = CountingEnv(list(range(num_envs)), batched=True, **(SELF_RESETTING | {"auto_reset_replace": False}))
    return TransformedEnv(kept, StepCounter())


def make_self_resetting_workers(num_envs: int) -> EnvBase:
    return SerialEnv(num_envs, lambda: CountingEnv([0], batched=False, **SELF_RESETTING))


class Spoiled(gymnasium.vector.VectorWrapper):
    """Replaces the third reward of row 0 after a reset of all rows by NaN."""

    def __init__(self, env: gymnasium.vector.VectorEnv) -> None:
        super().__init__(env)
        self.steps, self.autoreset_mode = 0, getattr(env, "autoreset_mode", None)

    def reset(self, **options: Any) -> Any:
        self.steps = 0
        return super().reset(**options)

    def step(self, actions: Any) -> Any:
        obs, reward, *rest = super().step(actions)
        self.steps += 1
        reward[0] = math.nan if self.steps == 3 else reward[0]
        return obs, reward, *rest


def transformed(env: EnvBase, *transforms: Transform) -> EnvBase:
    made = TransformedEnv(env)
    for transform in transforms:
        made.append_transform(transform)
    return made


def make_accounts(num_envs: int) -> EnvBase:
    """Add transforms that describe the run, one that copies such an entry, and two that read observations.

    "joined" is made of an observation, and "timed" of an observation and a step count.
    """
    return transformed(
        make_batched(num_envs),
        *(StepCounter(), RewardSum(), InitTracker(), TrajCounter()),
        RenameTransform(["episode_reward"], ["return_so_far"], create_copy=True),
        CatTensors(["where"], "joined", del_keys=False),
        CatTensors(["where", "step_count"], "timed", del_keys=False),
    )


class LastReward(Transform):
    """A user's own transform: the last reward as an observation."""

    def __init__(self) -> None:
        super().__init__(in_keys=["reward"], out_keys=["last_reward"])

    def _apply_transform(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.clone()

    def _reset(self, tensordict: Any, tensordict_reset: Any) -> Any:
        return tensordict_reset.set("last_reward", torch.zeros(*tensordict_reset.batch_size, 1))

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        observation_spec["last_reward"] = Unbounded(torch.Size([*observation_spec.shape, 1]))
        return observation_spec


def make_last_reward(num_envs: int) -> EnvBase:
    return transformed(make_batched(num_envs), LastReward())


def make_tallied() -> EnvBase:
    return transformed(make_single(), RewardSum(), StepCounter(), InitTracker())


def make_workers(batch: str, num_envs: int) -> EnvBase:
    """Return a SerialEnv or ParallelEnv whose workers add entries that describe the run."""
    return {"SerialEnv": SerialEnv, "ParallelEnv": ParallelEnv}[batch](num_envs, make_tallied)


def make_only_accounts(num_envs: int) -> EnvBase:
    return transformed(make_batched(num_envs), StepCounter(), SelectTransform("step_count", "action"))


class WithInfo(gymnasium.Wrapper):
    """Returns an info at every step and reset."""

    def reset(self, **options: Any) -> Any:
        obs, _ = super().reset(**options)
        return obs, {"speed": np.float64(0.5)}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"speed": np.float64(0.5)}


def make_infos() -> EnvBase:
    return GymWrapper(WithInfo(gymnasium.make("Pendulum-v1"))).auto_register_info_dict()


class WordyEnv(CountingEnv):
    """One of the observations is a word."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows, batched=True)
        spec = self.observation_spec.clone()
        spec["word"] = NonTensor(torch.Size([len(rows)]))
        self.observation_spec = spec

    def _observation(self) -> dict[str, Any]:
        return super()._observation() | {"word": "far"}


def make_wordy(num_envs: int) -> EnvBase:
    return WordyEnv(list(range(num_envs)))


def make_colliding(num_envs: int) -> EnvBase:
    return TransformedEnv(make_batched(num_envs), RenameTransform(["where"], ["extra_push"], create_copy=True))


class UnfinishedEnv(CountingEnv):
    """Reports whether an episode is done or truncated, but not whether it terminated."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows, batched=True)
        flags: dict[str, Any] = {
            name: Binary(1, torch.Size([len(rows), 1]), dtype=torch.bool) for name in ("done", "truncated")
        }
        self.done_spec = Composite(**flags, shape=self._lead)

    def _step(self, tensordict: TensorDict) -> TensorDict:
        return super()._step(tensordict).exclude("terminated")


def make_unfinished(num_envs: int) -> EnvBase:
    return UnfinishedEnv(list(range(num_envs)))


def make_mistaken(num_envs: int) -> EnvBase:
    raise KeyError("no such robot")


def make_demanding(robot: str) -> EnvBase:
    raise AssertionError("this function must not be called, because it needs an argument that is not offered")


class StuckEnv(CountingEnv):
    def _reset(self, tensordict: TensorDict | None = None, **_: Any) -> TensorDict:
        raise ZeroDivisionError("no floor")


def make_stuck(num_envs: int) -> EnvBase:
    return StuckEnv(list(range(num_envs)), batched=True)


def make_vector(num_envs: int, mode: str, *, spoil: bool = False) -> EnvBase:
    """Return a gymnasium vector of inverted pendulums. They fall after a few steps, not all at the same time."""
    options = {"autoreset_mode": gymnasium.vector.AutoresetMode[mode]}
    vector = gymnasium.make_vec("InvertedPendulum-v5", num_envs, vectorization_mode="sync", vector_kwargs=options)
    return GymWrapper(Spoiled(vector) if spoil else vector)


def make_same_step(num_envs: int) -> EnvBase:
    return make_vector(num_envs, "SAME_STEP")


def make_spoiled(num_envs: int) -> EnvBase:
    return make_vector(num_envs, "SAME_STEP", spoil=True)


def make_disabled(num_envs: int) -> EnvBase:
    return make_vector(num_envs, "DISABLED")


def make_next_step(num_envs: int) -> EnvBase:
    return GymEnv("InvertedPendulum-v5", num_envs=num_envs)
