"""The last observations of episodes that end inside Isaac Lab's step, which resets them before it observes.

Isaac Lab 3 can report final observations itself (`cfg.compute_final_obs`). They are not used, because they are wrong in
two cases: histories lack their newest frame, and an observation that is a view of the simulator's state already shows
the next episode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shared.errors import SimulatorError

if TYPE_CHECKING:
    from torch import Tensor


class TerminalObservations:
    """Takes the last observations of episodes that end inside a step, after the rewards and before the resets.

    Side effect: when an episode ends, observations are computed twice, so sensor noise and stateful modifiers advance
    one extra step.
    """

    def __init__(self, env: Any, entries: Any) -> None:
        """Install the hook in the unwrapped environment. `entries` maps observation groups to stream entries.

        Raises: SimulatorError if the environment has no method to hook into.
        """
        if not hasattr(env, "_reset_idx"):
            raise SimulatorError(
                f"{type(env).__name__} has no method _reset_idx, where the last observations are taken; expected a "
                "ManagerBasedRLEnv or DirectRLEnv; choose another env.name"
            )
        self._env, self._entries, self._reset_idx = env, entries, env._reset_idx
        self._stepping = False
        self._caught: list[tuple[Any, dict[str, Tensor]]] = []
        env._reset_idx = self._hook
        # Set only for tasks with resets of their own (`task.check_class`). They are made to call _reset_idx.
        if getattr(env.cfg, "compute_final_obs", False):
            self._reset_ended, env._reset_envs_from_buffer = env._reset_envs_from_buffer, self._checked_reset

    def step(self, action: Tensor) -> tuple[Any, ...]:
        """Make one step of the environment and collect the last observations of the episodes that end in it.

        Raises: SimulatorError from `_checked_reset`.
        """
        self._caught, self._stepping = [], True
        try:
            return self._env.step(action)
        finally:
            self._stepping = False

    def reset(self, indices: Tensor) -> None:
        """Reset these environments outside a step."""
        self._reset_idx(indices)
        self._env.scene.write_data_to_sim()
        self._env.sim.forward()

    def put_into(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the observation after the step, in which ended episodes have their last observation."""
        if not self._caught:
            return obs
        arrived = {name: entry.clone() for name, entry in obs.items()}
        # Reversed, because the first observation counts if an environment was reset twice in one step.
        for indices, rows in reversed(self._caught):
            for name, entry in rows.items():
                arrived[name][indices] = entry
        return arrived

    def _hook(self, env_ids: Any) -> Any:
        """Take the observations of the environments that are about to be reset, and reset them."""
        if self._stepping:
            indices = _as_index(env_ids)
            # Cloned, because an observation may be a view of the state, which the reset overwrites.
            rows = {name: entry.clone() for name, entry in self._entries(self._observe(), indices).items()}
            self._caught.append((indices, rows))
        return self._reset_idx(env_ids)

    def _checked_reset(self) -> Any:
        """Reset the environments that ended, in the way that the task has of its own, and return their indices.

        Raises: SimulatorError if the task returned no indices, or did not call _reset_idx, so that there are no last
        observations.
        """
        indices = self._reset_ended()
        if indices is None or (len(indices) and not self._caught):
            raise SimulatorError(
                f"{type(self._env).__name__} resets ended episodes by a mask or without calling _reset_idx, so their "
                "last observations are lost; expected its _reset_envs_from_buffer to call the method of DirectRLEnv if "
                "cfg.compute_final_obs is set; correct it there"
            )
        return indices

    def _observe(self) -> dict[str, Any]:
        """Return the observation groups of the current state."""
        env = self._env
        if hasattr(env, "observation_manager"):
            return _compute_with_history(env.observation_manager)
        obs = dict(env._get_observations())
        if getattr(env.cfg, "observation_noise_model", None):
            obs["policy"] = env._observation_noise_model(obs["policy"])
        return obs


def _as_index(env_ids: Any) -> Any:
    """Return environment indices as something that indexes a tensor. Isaac Lab 2.3 gives int64, Isaac Lab 3 int32.

    Raises: SimulatorError if they are neither indices, nor a mask, nor a slice.
    """
    if env_ids is None:
        return slice(None)
    if isinstance(env_ids, slice | list):
        return env_ids
    if not hasattr(env_ids, "nonzero"):
        raise SimulatorError(
            f"_reset_idx was called with {type(env_ids).__name__}; expected indices or a mask as a tensor, a list or a "
            "slice; correct it in the task"
        )
    return env_ids.long() if env_ids.dtype != torch.bool else env_ids.nonzero().squeeze(-1)


def _compute_with_history(manager: Any) -> dict[str, Any]:
    """Return the observation groups as the step itself would compute them, with the newest frame in their histories.

    The history buffers are restored afterwards.
    """
    histories = getattr(manager, "_group_obs_term_history_buffer", {})
    buffers = [buffer for group in histories.values() for buffer in group.values()]
    if not buffers:
        return manager.compute()
    names = [name for name in ("_buffer", "_pointer", "_num_pushes", "_need_reset") if name in vars(buffers[0])]
    kept = [[value.clone() if hasattr(value, "clone") else value for value in map(vars(b).get, names)] for b in buffers]
    try:
        return manager.compute(update_history=True)
    finally:
        for buffer, values in zip(buffers, kept, strict=True):
            vars(buffer).update(zip(names, values, strict=True))
