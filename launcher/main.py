"""The entry of the command line: check that Python finds our own modules, then run. Torch-free.

The commands are in launcher/commands/. Without a command, a run is trained: its options are in launcher/options.py, and
the run, from its folder to its summary, is in launcher/run.py.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

OWN_MODULES = ("collector_proc", "launcher", "learner_proc", "shared")
ROOT = Path(__file__).resolve().parents[1]  # the source tree, or site-packages


def main(argv: Sequence[str] | None = None, *, commands: Mapping[str, Sequence[str]] | None = None) -> int:
    """Do what the command line asks for and return the exit code.

    argv: the arguments, by default those of this process. commands: the command that starts each process, before its
    arguments; tests and benchmarks replace it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    conflict = find_name_conflict([Path.cwd(), *_python_path()])
    if conflict is not None:
        sys.stderr.write(f"error: {conflict}\n")
        return 2
    # This import must follow the check: until then, a module of the user could be imported in place of ours.
    from collector_proc.simulators.ending import guarded

    return guarded(lambda: _do(argv, commands))  # some commands start a simulator


def _do(argv: list[str], commands: Mapping[str, Sequence[str]] | None) -> int:
    """Run the command, or train, and return the exit code. Errors of the user are printed."""
    from launcher.commands.table import find_command
    from shared.errors import SettingError
    from shared.lifetime import ExitCode
    from shared.output import write_error

    interrupted = "interrupted before anything was started"
    try:
        command = find_command(argv)
        if command is None:
            return _train(argv, commands)
        interrupted = "interrupted"
        return importlib.import_module(command.module).main(argv[1:])
    except SettingError as error:
        write_error(f"error: {error}\n")
        return ExitCode.REFUSED
    except KeyboardInterrupt:  # a run has its own handling of signals, which it installs before it starts a process
        write_error(f"{interrupted}\n")
        return 130


def _train(argv: list[str], commands: Mapping[str, Sequence[str]] | None) -> int:
    """Start or resume a run, and return its exit code. With --print-config, only print its settings."""
    from launcher.children import COMMANDS
    from launcher.options import parse_options
    from launcher.run import run
    from launcher.settings import compose_settings
    from shared.compose import settings_text
    from shared.output import write_output

    options = parse_options(argv)
    if options.print_config:
        write_output(settings_text(compose_settings(options.decided())))
        return 0
    return run(options, argv, COMMANDS if commands is None else commands)


def find_name_conflict(folders: Sequence[Path]) -> str | None:
    """Return an error message if a module in one of `folders` has the name of one of our modules, else None.

    Python would import only one of the two, in this process or in the collector and the learner. Our own modules, found
    again through one of the folders, are no conflict. Neither is a folder without __init__.py: ours is preferred to it.
    """
    for name in OWN_MODULES:
        ours = _find_module(name, ROOT)
        for folder in folders:
            theirs = _find_module(name, folder)
            if theirs is not None and theirs != ours:
                return (
                    f"{theirs} has the name of a module of Tandem, {ours}, and would hide it or be hidden by it; "
                    f"expected no other module named {name} in the current folder or on PYTHONPATH; rename {theirs}, "
                    f"or start from another folder and without {theirs.parent} on PYTHONPATH"
                )
    return None


def _find_module(name: str, folder: Path) -> Path | None:
    """Return the file that `import NAME` would load if it looked in this folder alone, or None."""
    spec = PathFinder.find_spec(name, [str(folder)])
    return Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None


def _python_path() -> list[Path]:
    """Return the folders that the environment variable PYTHONPATH lists; an empty entry is the current folder."""
    value = os.environ.get("PYTHONPATH", "")
    return [Path(entry).absolute() for entry in value.split(os.pathsep)] if value else []
