"""The children find our packages and the user's modules, wherever the project is installed."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

import pytest

from launcher.children import Starter, python_path
from launcher.devices import Devices
from launcher.main import ROOT
from launcher.run_folder import create_run_folder


def test_a_source_tree_comes_before_the_users_own_path() -> None:
    assert python_path({}) == str(ROOT)
    assert python_path({"PYTHONPATH": "/mine:/yours"}) == f"{ROOT}{os.pathsep}/mine:/yours"


def test_site_packages_are_not_put_before_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    assert python_path({}, root=tmp_path) == ""
    assert python_path({"PYTHONPATH": "/mine"}, root=tmp_path) == "/mine"


def test_a_child_works_in_the_current_folder_and_finds_the_users_modules_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_task.py").write_text("")
    (tmp_path / "my_child.py").write_text(
        "import my_task, shared.stream\n"
        "from pathlib import Path\n"
        "Path('result').write_text(f'{my_task.__file__} {shared.stream.__file__}')\n"
    )
    monkeypatch.chdir(tmp_path)
    command = (sys.executable, "-m", "my_child")
    with create_run_folder(Path("run")) as lock:
        starter = Starter(lock.folder, Devices(None, None), os.environ, resume=False, commands={"learner": command})
        child = starter.start("learner")
        assert child.wait(30.0) == 0, child.last_output()
    assert (tmp_path / "result").read_text() == f"{tmp_path / 'my_task.py'} {ROOT / 'shared' / 'stream.py'}"
