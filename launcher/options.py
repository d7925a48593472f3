"""The options of the command line. Torch-free."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from launcher.main import ROOT
from shared.compose import config_names
from shared.errors import SettingError
from shared.words import nearest

DEFAULT_CONFIG = "dm_control"
EVALUATION = "no option evaluates: collector.eval_envs=N environments act without noise during the training"
DISTRIBUTION = "tandem-dreamer"
EPILOG = """\
Settings are given as key=value. They replace values of the config:
  {command} env.name=walker env.task=walk optimization.autocast=false
Every key, with its unit and its default, is in docs/settings.md.

configs (configs/*.yaml): {configs}

exit codes:
  0    The run finished.
  1    A process died and could not be replaced, or the last checkpoint could not be saved.
  2    A setting, an option or a checkpoint cannot work. If training had begun, the learner saved a checkpoint.
  130  The run was interrupted by Ctrl-C (143: by SIGTERM, 129: because the terminal was closed).
       If training had begun, the learner saved a checkpoint: continue with --resume.
"""


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    config: str | None
    sim_gpu: int | None
    train_gpu: int | None
    run_dir: Path | None
    resume: Path | None
    overrides: list[str]


def parse_options(argv: Sequence[str]) -> Options:
    """Return the options in `argv`. --help and --version print their text and raise SystemExit.

    Raises: SettingError on unknown options, missing values and options that exclude each other.
    """
    parser = _Parser(
        prog=command_name(),
        description="Train Dreamer with two processes: a collector, which runs the simulator, and a learner.",
        epilog=EPILOG.format(command=command_name(), configs=", ".join(config_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="NAME", help=f"a file of configs/ (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "--sim-gpu",
        metavar="N",
        type=int,
        help="GPU of simulator and acting policy (default: 0, or 1 if the learner has 0)",
    )
    parser.add_argument(
        "--train-gpu",
        metavar="N",
        type=int,
        help="GPU of the learner (default: another GPU than the simulator's, if there is one)",
    )
    parser.add_argument("--run-dir", metavar="DIR", type=_path, help="run folder (default: runs/ENV-TASK-TIME)")
    parser.add_argument("--resume", metavar="DIR", type=_path, help="continue the run in this folder")
    parser.add_argument("--version", action="version", version=version_text(), help="print the version and exit")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings, see below")
    parsed = parser.parse_intermixed_args(list(argv))
    if parsed.resume is not None and (parsed.config is not None or parsed.run_dir is not None):
        raise SettingError(
            f"--resume {parsed.resume} is given together with --config or --run-dir; expected --resume alone, because "
            "the resumed run has its own config and folder; leave the other option out (key=value may follow)"
        )
    return Options(**vars(parsed))


def _path(text: str) -> Path:
    """Return the path in an argument. An empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def command_name() -> str:
    """Return the command that the user typed to start this program."""
    return "tandem" if Path(sys.argv[0]).name == "tandem" else "python launch.py"


def version_text() -> str:
    """Return the name and version of the installed distribution, or that there is none."""
    try:
        return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed: this is the source tree {ROOT}"


class _Parser(argparse.ArgumentParser):
    """A parser that raises SettingError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        hint = "see --help"
        if message.startswith("unrecognized arguments:"):
            flag = message.split()[2].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            similar = nearest(flag, known)
            hint = f"write {similar[0]}" if similar else "give settings as key=value, such as env.seed=3"
            if flag.startswith("--eval"):
                hint = EVALUATION
        raise SettingError(f"cannot read the command line: {message}; expected the options that --help lists; {hint}")
