"""What the commands read of a trained run before a simulator starts: its settings, its checkpoints. Torch-free."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.simulators import ending
from collector_proc.simulators.registry import build_simulator, check_env, find_backend
from launcher.checkpoint_choice import choose_checkpoints
from shared.compose import load_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.lifetime import ExitCode
from shared.output import output_aside, write_error
from shared.run_folder import RunFolder
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from collector_proc.simulators.base import Simulator

SEED_OFFSET = 500_000  # so that the first episodes of an evaluation are not those of the training
CLOSE_S = 30.0


@dataclass(frozen=True)
class TrainedRun:
    """A run whose policy is used. settings: those of the training, with the changes of `env.*` that were asked for."""

    folder: RunFolder
    settings: Settings
    checkpoints: list[Path]
    overrides: tuple[str, ...] = ()

    def use_environments(self, num_envs: int) -> None:
        """Change the settings to `num_envs` environments in this process, or as many as the overrides say.

        None of them starts in the middle of an episode.
        """
        settings, backend = self.settings, find_backend(self.settings.env.backend)
        fixed = any(text.startswith(("env.num_envs=", "env.n_parallel_envs=")) for text in self.overrides)
        settings.collector.eval_envs = 0
        if "env.randomize_start" not in backend.ignores:
            settings.env.randomize_start = False
        if not backend.one_batch:
            settings.collector.num_collectors = 0
        if not fixed and backend.one_batch:
            settings.env.num_envs = num_envs
        elif not fixed:
            settings.env.n_parallel_envs = num_envs


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
    return TrainedRun(folder, settings, choose_checkpoints(folder, checkpoint), tuple(overrides))


@contextmanager
def running_simulator(settings: Settings, *, seed: int, device: str) -> Iterator[Simulator]:
    """Run the simulator that the settings choose in this block, with the user's modules in the current folder.

    Enter it before torch is imported. What simulators print goes to stderr.
    Raises: SettingError or SimulatorError if it does not start.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with output_aside():
        check_env(settings, lambda line: write_error(f"{line}\n"))
        simulator = build_simulator(settings, seed=seed, device=device)
        try:
            yield simulator
        finally:
            with ending.closing_deadline(CLOSE_S, ExitCode.FAILED):
                simulator.close()


def check_stream(simulator: Simulator, spec: StreamSpec) -> None:
    """Raise SettingError if a simulator streams something else than the policy was trained with."""
    have, need = (StreamSpec(1, each.obs, each.action_dim).to_dict() for each in (simulator.spec, spec))
    if have != need:
        raise SettingError(
            f"the environment streams {have}; expected {need}, which the policy was trained with; leave out the env.* "
            "settings that change observations or actions"
        )
