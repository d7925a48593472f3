"""Which checkpoints of a run a command reads: --checkpoint STEP, best, latest or all. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.checkpoints import Checkpoint, whole_checkpoints
from shared.errors import SettingError
from shared.run_folder import RunFolder

CHOICES = "STEP, best, latest or all"


def choose_checkpoints(folder: RunFolder, choice: str) -> list[Path]:
    """Return the folders of the chosen checkpoints, in the order of their steps; "all" chooses each whole one.

    Raises: SettingError if the run has no such checkpoint.
    """
    newest_first = whole_checkpoints(folder.checkpoints)
    whole = sorted(newest_first, key=lambda each: each.manifest.step)
    if not whole:
        raise SettingError(
            f"there is no whole checkpoint in {folder.checkpoints}; expected the folder of a run that has saved one; "
            "correct the path, or wait until the run saves (checkpoint.every_s, and at its end)"
        )
    if choice == "all":
        return [each.folder for each in whole]
    if choice == "latest":
        return [newest_first[0].folder]
    if choice == "best":
        return [best_checkpoint(folder, newest_first).folder]
    found = [each.folder for each in whole if choice.isdecimal() and each.manifest.step == int(choice)]
    if not found:
        steps = ", ".join(str(each.manifest.step) for each in whole)
        raise SettingError(
            f"--checkpoint {choice} is not a checkpoint of {folder.path}; expected best, latest, all or one of the "
            f"steps {steps}; choose one of them"
        )
    return found[-1:]


def best_checkpoint(folder: RunFolder, newest_first: Sequence[Checkpoint]) -> Checkpoint:
    """Return the checkpoint at which the run's own evaluation return was highest; checkpoint.keep_best keeps it too.

    Raises: SettingError if the run had not evaluated when it saved any of them.
    """
    rated = [each for each in newest_first if each.manifest.eval_return_mean is not None]
    if not rated:
        raise SettingError(
            f"--checkpoint best compares evaluation returns, and no checkpoint of {folder.path} has one; expected a "
            "run with collector.eval_envs of at least 1 that has evaluated; use --checkpoint latest"
        )
    return max(rated, key=lambda each: each.manifest.eval_return_mean or 0.0)
