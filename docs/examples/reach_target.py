"""An environment of your own: a puck on a table is pushed to a target. Dict observation, own reward, both kinds of end.

Train it from the folder of this repository:

    PYTHONPATH=docs/examples python launch.py --config gym env.name=reach_target:make_env env.frame_skip=1 \
        optimization.reward_scale=5 optimization.gamma=0.97 networks.continue_head=true
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import TimeLimit
from torchrl.envs import EnvBase, GymWrapper

STEP_S = 0.1  # s, one agent step
MAX_PUSH = 2.0  # m/s^2
TABLE = 1.5  # m, from the centre to each edge
MAX_STEPS = 100  # agent steps in one episode


class ReachTarget(gymnasium.Env):
    """A puck without friction; the action is a push in x and y. The puck must reach the target and stay there.

    Observation "puck": position (m) and velocity (m/s), 4 numbers. Observation "target": position (m), 2 numbers.
    Reward of one step: 1 at the target, 0.5 at a distance of 0.35 m, almost 0 from 1 m on. The episode ends when the
    puck falls off the table.
    """

    observation_space = Dict(puck=Box(-np.inf, np.inf, (4,)), target=Box(-1.0, 1.0, (2,)))
    action_space = Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Draw where the puck and the target are; the puck stands still."""
        super().reset(seed=seed)
        self._position = self.np_random.uniform(-1.0, 1.0, 2)
        self._velocity = np.zeros(2)
        self._target = self.np_random.uniform(-1.0, 1.0, 2)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Push for STEP_S seconds. Return observation, reward, terminated, truncated and an empty info."""
        self._velocity = self._velocity + MAX_PUSH * STEP_S * np.clip(action, -1.0, 1.0)
        self._position = self._position + STEP_S * self._velocity
        distance = float(np.linalg.norm(self._position - self._target))
        reward = float(np.exp(-((distance / 0.42) ** 2)))
        fell = bool(np.abs(self._position).max() > TABLE)  # the task ended: nothing can be gained any more
        return self._observe(), reward, fell, False, {}  # TimeLimit sets truncated: the task could have gone on

    def _observe(self) -> dict[str, np.ndarray]:
        puck = np.concatenate([self._position, self._velocity])
        return {"puck": puck.astype(np.float32), "target": self._target.astype(np.float32)}


def make_env() -> EnvBase:
    """Return one environment; Tandem calls this once for each of env.num_envs and seeds the result."""
    return GymWrapper(TimeLimit(ReachTarget(), max_episode_steps=MAX_STEPS))
