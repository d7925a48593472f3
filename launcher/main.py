"""The entry of the command line: check that Python finds our own modules, then run. Torch-free.

The options of the command line are in launcher/options.py; a run, from its folder to its summary, is in
launcher/run.py.
"""

from __future__ import annotations

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
    # These imports must follow the check: until then, a module of the user could be imported in place of ours.
    from launcher.children import COMMANDS
    from launcher.options import parse_options
    from launcher.run import run
    from shared.errors import SettingError
    from shared.lifetime import ExitCode
    from shared.output import write_error

    try:
        return run(parse_options(argv), argv, COMMANDS if commands is None else commands)
    except SettingError as error:
        write_error(f"error: {error}\n")
        return ExitCode.REFUSED
    except KeyboardInterrupt:  # before the run installed its own handling of signals
        write_error("interrupted before anything was started\n")
        return 130


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
