"""Which checkpoints of a run a command reads: --checkpoint STEP, best, latest or all. Torch-free."""

from __future__ import annotations

from pathlib import Path

from shared.checkpoints import Checkpoint, whole_checkpoints
from shared.errors import SettingError
from shared.metrics import EVAL_RETURN_MEAN, GRADIENT_STEPS, parse_row
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
        return [best_checkpoint(folder, whole).folder]
    found = [each.folder for each in whole if choice.isdecimal() and each.manifest.step == int(choice)]
    if not found:
        steps = ", ".join(str(each.manifest.step) for each in whole)
        raise SettingError(
            f"--checkpoint {choice} is not a checkpoint of {folder.path}; expected best, latest, all or one of the "
            f"steps {steps}; choose one of them"
        )
    return found[-1:]


def best_checkpoint(folder: RunFolder, whole: list[Checkpoint]) -> Checkpoint:
    """Return the checkpoint at whose step the run's own evaluation return was highest.

    Raises: SettingError if the run reported no evaluation return before any of its checkpoints.
    """
    scores = [(score, each) for each in whole if (score := _score_at(folder, each.manifest.step)) is not None]
    if not scores:
        raise SettingError(
            f"--checkpoint best needs {EVAL_RETURN_MEAN.name} in {folder.metrics}, and no row has it; expected a run "
            "with collector.eval_envs of at least 1 that has evaluated; use --checkpoint latest"
        )
    return max(scores, key=lambda scored: scored[0])[1]


def _score_at(folder: RunFolder, step: int) -> float | None:
    """Return the newest evaluation return that the run had reported when it saved the checkpoint of a step."""
    score = None
    lines = folder.metrics.read_bytes().splitlines() if folder.metrics.is_file() else []
    for row in filter(None, map(parse_row, lines)):
        done, value = GRADIENT_STEPS.of(row), EVAL_RETURN_MEAN.of(row)
        if done is not None and done <= step and value is not None:
            score = value
    return score
