"""env.name=module:callable is checked by importing the module in a child process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from collector_proc.simulators.registry import check_env
from shared.config import Settings
from shared.errors import SettingError

MODULE = """
import warnings
def make_env(): pass
class Wide: pass
SIZE = 3
def __getattr__(name):
    if name == "made_on_demand":
        return make_env
    raise AttributeError(name)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "looked_up.py").write_text(MODULE)
    (tmp_path / "looked_up_package").mkdir()
    (tmp_path / "looked_up_package" / "__init__.py").touch()
    (tmp_path / "looked_up_package" / "walkers.py").write_text("def make(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def check(name: str) -> list[str]:
    """Check the settings and return the lines that were reported."""
    settings, lines = Settings(), []
    env = settings.env
    env.backend, env.name, env.task, env.num_envs, env.from_pixels = "torchrl", name, "", 2, False
    check_env(settings, lines.append)
    return lines


@pytest.mark.parametrize(
    "name",
    ["looked_up:make_env", "looked_up:Wide", "looked_up:made_on_demand", "looked_up_package.walkers:make"],
)
def test_a_callable_that_exists_is_accepted_without_importing_it_here(folder: Path, name: str) -> None:
    (line,) = check(name)
    assert line == f"importing {name.split(':')[0]} in a process of its own, to look up env.name={name}"
    assert not [module for module in sys.modules if module.startswith("looked_up")]


@pytest.mark.parametrize("name", ["make", "gym:", ":make", ".:make", ".walkers:make", "__main__:m", "__main__.a:m"])
def test_a_name_that_cannot_be_imported_is_refused_with_the_form_of_a_name(name: str) -> None:
    with pytest.raises(SettingError, match=r"^env.name=\S+ names no wrapper of torchrl; expected PREFIX:ID .*; set"):
        check(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "looked_up:mak_env",
            r"looked_up.py has no mak_env; expected one of Wide, make_env; set .*looked_up:make_env$",
        ),
        ("looked_up:zzz", r"looked_up.py has no zzz; expected one of Wide, make_env; set env.name=looked_up:NAME with"),
        (
            "looked_up:SIZE",
            r"looked_up:SIZE is of type int; expected a function or a class .*; set env.name=looked_up:",
        ),
        (
            "looked_up_package:make",
            r"__init__.py has no make, nor any other name; expected one that exists; change env",
        ),
        ("looked_up_package.walkers:mak", r"; set env.name=looked_up_package.walkers:make$"),
        (
            "looked_up_package.walker:make",
            r"looked_up_package has no module walker; expected one of walkers; set .*=looked_up_package.walkers:make$",
        ),
        ("looked_up.inner:make", r"looked_up has no module inner, nor any other name; "),
        ("no_such_module:make", r"needs the module no_such_module, .*; expected it to be installed; put the folder of"),
    ],
)
def test_a_callable_that_does_not_exist_is_refused_with_the_nearest_name(folder: Path, name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\nmake = undefined\n", r"NameError: name 'undefined' is not defined \(looked_up.py:2\)"),
        ("def broken(:\n", r"SyntaxError: .* \(looked_up.py:1\)"),
        ("import json\njson.loads('{')\n", r"JSONDecodeError: .* \(looked_up.py:2\)"),
        ("\n\nimport no_such_dependency\n", r"ModuleNotFoundError: .*no_such_dependency.* \(looked_up.py:3\)"),
        ("raise SystemExit(0)\n", r"SystemExit: 0 \(looked_up.py:1\)"),
    ],
)
def test_a_module_that_does_not_import_is_refused_with_file_and_line(folder: Path, source: str, message: str) -> None:
    (folder / "looked_up.py").write_text(source)
    with pytest.raises(
        SettingError, match=f"looked_up:make does not import: {message}; expected .*; correct it there$"
    ):
        check("looked_up:make")


def test_a_module_that_ends_its_process_is_refused(folder: Path) -> None:
    (folder / "looked_up.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(SettingError, match=r"ended without an answer; expected a module that imports within deadlines"):
        check("looked_up:make")
