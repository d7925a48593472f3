"""What a user's module defines, found by importing it: `python -m collector_proc.simulators.torchrl.user_module MODULE NAME`.

`checks` runs this in a child process, because the module may import torch or a simulator, which launch must not. The
last line on stdout is a `Findings` as JSON. Torch-free by itself.
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
    """What importing a module showed about one name in it.

    kind: the type of what has the name; empty if nothing has it. callable: whether it can be called.
    names: what could have been meant, the module's own functions and classes, or the modules of a package.
    missing: the module or package that does not exist. error: the exception that the import raised.
    place: the file and line of the exception, else the module's file.
    """

    kind: str = ""
    callable: bool = False
    names: tuple[str, ...] = ()
    missing: str = ""
    error: str = ""
    place: str = ""


def inspect_module(module: str, name: str) -> Findings:
    """Import `module`, and return what that shows about `name`. The import may raise anything."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            package = sys.modules.get(error.name.rpartition(".")[0])
            return Findings(missing=error.name, names=_submodules(package))
        return _failure(error)
    except BaseException as error:  # SystemExit too
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
    """Whether the file belongs neither to an installed library, nor to Python, nor to the collector."""
    path = Path(filename)
    installed = "site-packages" in path.parts or path.is_relative_to(Path(os.__file__).parent)
    return not installed and not filename.startswith("<") and not path.is_relative_to(OURS)


def _failure(error: BaseException) -> Findings:
    return Findings(error=f"{type(error).__name__}: {error}", place=place_of(error))


def _submodules(package: ModuleType | None) -> tuple[str, ...]:
    return tuple(found.name for found in pkgutil.iter_modules(getattr(package, "__path__", [])))


def _definitions(module: ModuleType) -> tuple[str, ...]:
    """The public functions and classes that the module, or another one of its package, defines."""
    root = module.__name__.partition(".")[0]
    return tuple(
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and str(getattr(value, "__module__", "")).partition(".")[0] == root
    )


def main() -> NoReturn:
    findings = inspect_module(*sys.argv[1:3])
    sys.stdout.write(f"\n{json.dumps(asdict(findings))}\n")
    sys.stdout.flush()
    os._exit(0)  # threads and exit hooks of the user's module must not keep the answer waiting


if __name__ == "__main__":
    main()
