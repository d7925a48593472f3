"""Isaac Lab's own cart-pole with observations of the last three frames. It is imported after Kit has started."""

import gymnasium
from isaaclab.utils import configclass  # pyright: ignore[reportMissingImports]
from isaaclab_tasks.manager_based.classic.cartpole.cartpole_env_cfg import (  # pyright: ignore[reportMissingImports]
    CartpoleEnvCfg,
)


@configclass
class HistoryCartpoleCfg(CartpoleEnvCfg):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.observations.policy.history_length = 3


gymnasium.register(
    id="History-Cartpole-v0",
    entry_point="isaaclab.envs:ManagerBasedRLEnv",
    disable_env_checker=True,
    kwargs={"env_cfg_entry_point": f"{__name__}:HistoryCartpoleCfg"},
)
