"""Import a user's module and print what it defines.

    python -m collector_proc.simulators.torchrl.user_module MODULE NAME

`checks` runs this in a child process, because the user's module may import torch or a simulator, and launch must not.
The last line on stdout is a `Findings` as JSON. This file itself imports no torch.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

OURS = Path(__file__).resolve().parents[2]  # collector_proc


@dataclass(frozen=True)
class Findings:
    """What the import of a module shows about one name in it.

    kind: the type of the object that has the name; empty if there is none. callable: whether it can be called.
    names: names to suggest: the module's functions and classes or, if a module is missing, the modules of its package.
    missing: the module that does not exist, if there is one. error: the exception that the import raised, if it did.
    place: the file and line of that exception, or the module's file.
    """

    kind: str = ""
    callable: bool = False
    names: tuple[str, ...] = ()
    missing: str = ""
    error: str = ""
    place: str = ""


def inspect_module(module: str, name: str) -> Findings:
    """Import `module`, and return what the import shows about `name`."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            package = sys.modules.get(error.name.rpartition(".")[0])
            return Findings(missing=error.name, names=_submodules(package))
        return _failure(error)
    except BaseException as error:  # a user's module can raise anything, SystemExit included
        return _failure(error)
    place = Path(loaded.__file__ or module).name
    if not hasattr(loaded, name):
        return Findings(names=_definitions(loaded), place=place)
    found = getattr(loaded, name)
    return Findings(kind=type(found).__name__, callable=callable(found), place=place)


def place_of(error: BaseException) -> str:
    """Return "file.py:12": the innermost line of the user's own code in the traceback, or the innermost of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _is_users(filename: str) -> bool:
    """Return whether the file belongs neither to an installed library, nor to Python, nor to the collector."""
    path = Path(filename)
    installed = "site-packages" in path.parts or path.is_relative_to(Path(os.__file__).parent)
    return not installed and not filename.startswith("<") and not path.is_relative_to(OURS)


def _failure(error: BaseException) -> Findings:
    return Findings(error=f"{type(error).__name__}: {error}", place=place_of(error))


def _submodules(package: ModuleType | None) -> tuple[str, ...]:
    return tuple(found.name for found in pkgutil.iter_modules(getattr(package, "__path__", [])))


def _definitions(module: ModuleType) -> tuple[str, ...]:
    """Return the public functions and classes that this module, or another module of its package, defines."""
    root = module.__name__.partition(".")[0]
    return tuple(
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and str(getattr(value, "__module__", "")).partition(".")[0] == root
    )


def main() -> NoReturn:
    """Inspect the module named on the command line, print the findings as JSON and end the process."""
    findings = inspect_module(*sys.argv[1:3])
    sys.stdout.write(f"\n{json.dumps(asdict(findings))}\n")
    sys.stdout.flush()
    os._exit(0)  # threads and exit hooks of the user's module must not keep the answer waiting


if __name__ == "__main__":
    main()
