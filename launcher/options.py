"""The options of the command line. Torch-free."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from launcher.commands.table import command_list
from launcher.main import ROOT
from launcher.parser import Parser, command_name, path_argument
from launcher.run_folder import has_checkpoint
from shared.compose import config_names
from shared.errors import SettingError

DEFAULT_CONFIG = "dm_control"
AUTO = Path("auto")  # compared by identity: the folder of this name is given as ./auto
DISTRIBUTION = "tandem-dreamer"
EPILOG = """\
other commands ({command} COMMAND --help explains each):
{commands}

Settings are given as key=value. They replace values of the config:
  {command} env.name=walker env.task=walk optimization.autocast=false
Every key, with its unit and its default, is in docs/settings.md; `{command} settings` prints them.

configs (configs/*.yaml): {configs}

exit codes:
  0    The run finished.
  1    A process died and could not be replaced, or the last checkpoint could not be saved.
  2    A setting, an option or a checkpoint cannot work. If training had begun, the learner saved a checkpoint.
  130  The run was interrupted by Ctrl-C (143: by SIGTERM, 138: by SIGUSR1, 129: because the terminal was closed).
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
    print_config: bool = False
    auto: bool = False  # --resume auto: a run that is complete is no error, and an attempt without checkpoint is no run

    def decided(self) -> Options:
        """Return these options; with --resume auto, those that continue the run in --run-dir or begin it."""
        if not self.auto or self.run_dir is None or not has_checkpoint(self.run_dir):
            return self
        return replace(self, config=None, run_dir=None, resume=self.run_dir)


def parse_options(argv: Sequence[str]) -> Options:
    """Return the options in `argv`. --help and --version print their text and raise SystemExit.

    Raises: SettingError on unknown options, missing values and options that exclude each other.
    """
    parser = _parser()
    parsed = parser.parse_intermixed_args(list(argv))
    if parsed.resume is AUTO:
        return _automatic(parsed)
    if parsed.resume is not None and (parsed.config is not None or parsed.run_dir is not None):
        raise SettingError(
            f"--resume {parsed.resume} is given together with --config or --run-dir; expected --resume alone, because "
            "the resumed run has its own config and folder; leave the other option out (key=value may follow)"
        )
    return Options(**vars(parsed))


def _parser() -> Parser:
    """Return the parser of the options of a run."""
    parser = Parser(
        prog=command_name(),
        description="Train Dreamer with two processes: a collector, which runs the simulator, and a learner.",
        epilog=EPILOG.format(command=command_name(), commands=command_list(), configs=", ".join(config_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|PATH",
        help=f"a file of configs/ (default: {DEFAULT_CONFIG}), or a YAML file such as the config.yaml of a run",
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML and start nothing")
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
    parser.add_argument("--run-dir", metavar="DIR", type=path_argument, help="run folder (default: runs/ENV-TASK-TIME)")
    parser.add_argument(
        "--resume",
        metavar="DIR|auto",
        type=_resume_argument,
        help="continue the run in this folder; auto: continue that in --run-dir if it has a checkpoint, else begin it",
    )
    parser.add_argument("--version", action="version", version=version_text(), help="print the version and exit")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings, see below")
    return parser


def _resume_argument(text: str) -> Path:
    return AUTO if text == AUTO.name else path_argument(text)


def _automatic(parsed: argparse.Namespace) -> Options:
    """Return the options of a command line with --resume auto. Raises: SettingError if it names no run folder."""
    if parsed.run_dir is None:
        raise SettingError(
            "--resume auto is given without --run-dir; expected the folder of the run, which is the same at every "
            "start; add --run-dir runs/NAME (the folder named auto is --resume ./auto)"
        )
    return Options(**vars(parsed) | {"resume": None, "auto": True})


def version_text() -> str:
    """Return the name and version of the installed distribution, or that there is none."""
    try:
        return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed: this is the source tree {ROOT}"
