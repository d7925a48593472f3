"""`python launch.py evaluate RUN`: returns of the frozen policy over many episodes. Torch-free at import."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint_choice import CHOICES
from launcher.devices import choose_torch_device
from launcher.parser import command_parser, path_argument
from launcher.trained_run import SEED_OFFSET, check_stream, open_trained_run, running_simulator
from shared.errors import SettingError, SimulatorError
from shared.files import write_json
from shared.lifetime import ExitCode
from shared.output import write_error, write_output
from shared.statistics import Estimate, return_statistics

if TYPE_CHECKING:
    import argparse

    from collector_proc.simulators.base import Simulator
    from launcher.trained.episodes import Episode
    from launcher.trained_run import TrainedRun

DESCRIPTION = """\
Play episodes with the policy of a checkpoint, without exploration noise (tanh of the mean), and print the mean, the
median and the interquartile mean (IQM) of their returns with 95 % bootstrap intervals. Settings of the environment may
follow, to see how robust the policy is, such as env.horizon=200 or env.action_scale=0.8.
"""
MAX_ENVS = 16  # at once, unless the user chooses a number
REPORT_S = 10.0


def main(arguments: list[str]) -> int:
    """Evaluate the chosen checkpoints and return the exit code.

    Raises: SettingError if the run, a checkpoint or a setting cannot work.
    """
    options = _parse(arguments)
    run = open_trained_run(options.run, options.checkpoint, options.overrides)
    run.use_environments(min(options.episodes, MAX_ENVS))
    seed = run.settings.env.seed + SEED_OFFSET if options.seed is None else options.seed
    device = choose_torch_device(options.device)
    try:
        with running_simulator(run.settings, seed=seed, device=device) as simulator:
            results = _evaluate_all(simulator, run, options.episodes, seed=seed, device=device)
    except SimulatorError as error:
        write_error(f"error: {error}\n")
        return ExitCode.FAILED
    document = {
        "run": str(run.folder.path),
        "seed": seed,
        "overrides": options.overrides,
        "environment": asdict(run.settings.env),
        "checkpoints": results,
    }
    if options.out is not None:
        write_json(options.out, document)
    write_output(json.dumps(document, indent=1) + "\n" if options.json else table(results))
    return 0


def table(results: list[dict[str, Any]]) -> str:
    """Return a table with a line for each checkpoint."""
    head = ["step", "episodes", "mean", "median", "IQM", "min", "max", "length"]
    rows = [
        [
            str(result["gradient_steps"]),
            str(len(result["returns"])),
            *(_with_interval(result[name]) for name in ("mean", "median", "iqm")),
            f"{min(result['returns']):.4g}",
            f"{max(result['returns']):.4g}",
            f"{sum(result['lengths']) / len(result['lengths']):.4g}",
        ]
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows])
    return "\n".join(lines) + "\n"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("evaluate", DESCRIPTION, "runs/NAME --checkpoint all --episodes 10 env.horizon=50")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="folder of a run")
    parser.add_argument("--checkpoint", metavar="STEP", default="latest", help=f"{CHOICES} (default: latest)")
    parser.add_argument(
        "--episodes", metavar="N", type=int, default=20, help="episodes of each checkpoint (default: 20)"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        help=f"seed of the start states and of the policy (default: env.seed + {SEED_OFFSET})",
    )
    parser.add_argument("--device", help="cpu or cuda:0 (default: cuda:0 if there is a GPU)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every return, instead of a table")
    parser.add_argument("--out", metavar="FILE", type=path_argument, help="write the JSON into this file too")
    parser.add_argument("overrides", metavar="env.KEY=VALUE", nargs="*", help="settings of the environment")
    options = parser.parse_intermixed_args(arguments)
    if options.episodes < 1:
        raise SettingError(f"--episodes {options.episodes} plays nothing; expected at least 1; correct it")
    return options


def _evaluate_all(
    simulator: Simulator, run: TrainedRun, num_episodes: int, *, seed: int, device: str
) -> list[dict[str, Any]]:
    """Return the results of each checkpoint. This imports torch."""
    import torch

    from launcher.trained.episodes import play_episodes
    from launcher.trained.policy import read_policy

    acting_device = simulator.device if simulator.device.startswith("cuda") else device
    results = []
    for checkpoint in run.checkpoints:
        trained = read_policy(checkpoint, run.settings, device=acting_device)
        check_stream(simulator, trained.spec)
        torch.manual_seed(seed)
        progress = _Progress(checkpoint, num_episodes)
        episodes = play_episodes(simulator, trained, num_episodes, on_episode=progress.add)
        returns = [episode.total for episode in episodes]
        results.append(
            {
                "checkpoint": checkpoint.name,
                "gradient_steps": trained.step,
                **asdict(return_statistics(returns)),
                "returns": returns,
                "lengths": [episode.length for episode in episodes],
                "num_terminal": sum(episode.terminal for episode in episodes),
            }
        )
    return results


class _Progress:
    """Prints a line on stderr every ten seconds."""

    def __init__(self, checkpoint: Path, num_episodes: int) -> None:
        self._what, self._num, self._done = f"checkpoint {checkpoint.name}", num_episodes, 0
        self._printed = time.monotonic()

    def add(self, episode: Episode) -> None:
        self._done += 1
        if time.monotonic() - self._printed > REPORT_S:
            _report(f"{self._what}: {self._done} of {self._num} episodes, the last return is {episode.total:.4g}")
            self._printed = time.monotonic()


def _with_interval(estimate: dict[str, float]) -> str:
    found = Estimate(**estimate)
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def _report(line: str) -> None:
    write_error(f"{line}\n")
