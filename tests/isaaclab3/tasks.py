"""Tasks of the tests, made from Isaac Lab 3's own cart-pole. Import it after isaaclab_tasks, as env.name does."""

from __future__ import annotations

from typing import Any

import gymnasium
from isaaclab.utils import configclass  # pyright: ignore[reportMissingImports]
from isaaclab_tasks.core.cartpole.cartpole_direct_env import CartpoleEnv  # pyright: ignore[reportMissingImports]
from isaaclab_tasks.core.cartpole.cartpole_direct_env_cfg import (  # pyright: ignore[reportMissingImports]
    CartpoleEnvCfg as DirectCfg,
)
from isaaclab_tasks.core.cartpole.cartpole_manager_env_cfg import (  # pyright: ignore[reportMissingImports]
    CartpoleEnvCfg as ManagerCfg,
)


@configclass
class HistoryCfg(ManagerCfg):
    """Each observation holds the last three frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.observations.policy.history_length = 3


@configclass
class ViewCfg(DirectCfg):
    """The joint positions only."""

    observation_space = 2


class ViewCartpole(CartpoleEnv):
    """Its observation is a view of the simulator's state."""

    def _get_observations(self) -> dict[str, Any]:
        return {"policy": self.cartpole.data.joint_pos.torch}


class MaskCartpole(CartpoleEnv):
    """It resets environments without calling `_reset_idx` where others see it."""

    def _reset_envs_from_buffer(self) -> None:
        CartpoleEnv._reset_idx(self, self.reset_buf.nonzero().squeeze(-1).int())


class DelegatingCartpole(MaskCartpole):
    """As MaskCartpole, but with cfg.compute_final_obs it resets as Isaac Lab's other direct tasks do."""

    def _reset_envs_from_buffer(self) -> Any:
        if self.cfg.compute_final_obs:
            return CartpoleEnv._reset_envs_from_buffer(self)
        return super()._reset_envs_from_buffer()


WARP = "isaaclab_tasks_experimental.core.cartpole.cartpole_warp_env:CartpoleWarpEnv"
for name, entry_point, cfg in (
    ("History-Cartpole", "isaaclab.envs:ManagerBasedRLEnv", HistoryCfg),
    ("View-Cartpole-Direct", ViewCartpole, ViewCfg),
    ("Mask-Cartpole-Direct", MaskCartpole, DirectCfg),
    ("Delegating-Cartpole-Direct", DelegatingCartpole, DirectCfg),
    ("Warp-Cartpole-Direct", WARP, DirectCfg),
    ("Warp-Cartpole", "isaaclab_experimental.envs:ManagerBasedRLEnvWarp", ManagerCfg),
):
    gymnasium.register(id=name, entry_point=entry_point, disable_env_checker=True, kwargs={"env_cfg_entry_point": cfg})
