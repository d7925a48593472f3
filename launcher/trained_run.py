"""What the commands read of a trained run before a simulator starts: its settings, its checkpoints. Torch-free."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.simulators.registry import build_simulator, check_env, find_backend
from launcher.checkpoint_choice import choose_checkpoints
from shared.compose import load_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.run_folder import RunFolder
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from collector_proc.simulators.base import Simulator

SEED_OFFSET = 500_000  # so that the first episodes of an evaluation are not those of the training


@dataclass(frozen=True)
class TrainedRun:
    """A run whose policy is used. settings: those of the training, with the changes of `env.*` that were asked for."""

    folder: RunFolder
    settings: Settings
    checkpoints: list[Path]


def open_trained_run(path: Path, checkpoint: str, overrides: Sequence[str] = ()) -> TrainedRun:
    """Return a run with the chosen checkpoints.

    Raises: SettingError if the run or a checkpoint does not exist, or if an override is not one of `env.*`.
    """
    folder = RunFolder(path.expanduser().resolve())
    if not folder.config.is_file():
        raise SettingError(
            f"{path} is not the folder of a run: it has no config.yaml; expected a folder such as runs/NAME, which "
            "launch.py makes; correct the path"
        )
    for override in overrides:
        if not override.startswith("env."):
            raise SettingError(
                f"{override} cannot change a trained policy; expected settings of the environment, env.*; leave it out"
            )
    settings = load_settings(folder.config, overrides)
    return TrainedRun(folder, settings, choose_checkpoints(folder, checkpoint))


def use_environments(settings: Settings, num_envs: int, *, fixed: bool = False) -> None:
    """Change settings to `num_envs` environments in this process, none of which starts in the middle of an episode.

    fixed: the user chose the number of environments, so it stays.
    """
    backend, env = find_backend(settings.env.backend), settings.env
    settings.collector.eval_envs = 0
    if "env.randomize_start" not in backend.ignores:
        env.randomize_start = False
    if not backend.one_batch:
        settings.collector.num_collectors = 0
        env.n_parallel_envs = env.n_parallel_envs if fixed else num_envs
    elif not fixed:
        env.num_envs = num_envs


def start_simulator(settings: Settings, *, seed: int, device: str, report: Callable[[str], None]) -> Simulator:
    """Start the simulator that the settings choose, with the user's modules in the current folder.

    Call it before torch is imported. report: is called with a line before a step that takes long.
    Raises: SettingError or SimulatorError.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    check_env(settings, report)
    return build_simulator(settings, seed=seed, device=device)


def check_stream(simulator: Simulator, spec: StreamSpec) -> None:
    """Raise SettingError if a simulator streams something else than the policy was trained with."""
    have, need = (StreamSpec(1, each.obs, each.action_dim).to_dict() for each in (simulator.spec, spec))
    if have != need:
        raise SettingError(
            f"the environment streams {have}; expected {need}, which the policy was trained with; leave out the env.* "
            "settings that change observations or actions"
        )
