"""Laws of what a module's source tells about module:callable."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from collector_proc.simulators.registry import check_env
from collector_proc.simulators.sources import Names, find_module, names_of
from shared.config import Settings
from shared.errors import SettingError

RUNS = "raise RuntimeError('a check ran the module')\n"
BINDS = """
import os.path, numpy as np
from somewhere import thing as other
if other:
    def in_branch(): inner = 1
else:
    async def other_branch(): pass
class Env:
    def method(self):
        global set_later
        set_later = 1
for number in range(3): (a, [b, *c]) = number
with open("x") as file: pass
typed: int = 3
print(walrus := 1)
match typed:
    case {"key": captured, **rest}: pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sourced_envs.py").write_text(f"{RUNS}def make_env(): pass\nclass Wide: pass\n")
    (tmp_path / "sourced_package").mkdir()
    (tmp_path / "sourced_package" / "__init__.py").write_text(RUNS)
    (tmp_path / "sourced_package" / "walkers.py").write_text(f"{RUNS}def make(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def check(name: str) -> None:
    settings = Settings()
    env = settings.env
    env.backend, env.name, env.task, env.num_envs, env.from_pixels = "torchrl", name, "", 2, False
    check_env(settings)


@pytest.mark.parametrize("name", ["sourced_envs:make_env", "sourced_envs:Wide", "sourced_package.walkers:make"])
def test_a_factory_that_exists_passes_and_nothing_of_it_runs(folder: Path, name: str) -> None:
    check(name)
    assert not [module for module in sys.modules if module.startswith("sourced_")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sourced_envs:mak_env", r"sourced_envs.py has no mak_env; wanted one of make_env, .*:make_env$"),
        ("sourced_package:make", r"__init__.py has no make; wanted a make in it; add make there$"),
        ("sourced_package.walkers:mak", r"set env.name=sourced_package.walkers:make$"),
        (
            "sourced_package.walker:make",
            r"has no walker; wanted one of walkers; set env.name=sourced_package.walkers:make",
        ),
    ],
)
def test_a_factory_that_the_source_rules_out_is_refused_with_the_nearest(folder: Path, name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check(name)
    assert not [module for module in sys.modules if module.startswith("sourced_")]


@pytest.mark.parametrize(
    "source",
    [
        "from somewhere import *",
        "def __getattr__(name): return 1",
        "__getattr__, __dir__ = attach(__name__)",
        "globals()['make_env'] = 1",
        "import sys\nsetattr(sys.modules[__name__], 'make_env', 1)",
        "exec('def make_env(): pass')",
        "def broken(:",
        "total = " + " + ".join(["1"] * 3000),
        "import sys\nsys._getframe().f_globals['make_env'] = 1",
        "import importlib\nimportlib.import_module(__name__).make_env = 1",
        "@(make_env := print)\ndef other(): pass",
    ],
)
def test_a_name_that_may_come_to_be_in_another_way_passes(folder: Path, source: str) -> None:
    (folder / "sourced_envs.py").write_text(source)
    check("sourced_envs:make_env")


def test_every_way_to_bind_a_name_is_seen(folder: Path) -> None:
    (folder / "sourced_envs.py").write_text(BINDS)
    spec = find_module("sourced_envs")
    assert spec is not None
    names = names_of(spec)
    assert names is not None
    bound = "os np other in_branch other_branch Env set_later number a b c file typed walrus captured rest"
    assert names == Names(frozenset(bound.split()), frozenset({"in_branch", "other_branch", "Env"}))


def test_what_has_no_source_is_not_told() -> None:
    spec = find_module("sys")
    assert spec is not None and names_of(spec) is None


def test_a_package_that_an_editable_installation_maps_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if name == "sourced_package.mapped":
                return spec_from_file_location(name, folder / "sourced_envs.py")
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    check("sourced_package.mapped:make_env")
