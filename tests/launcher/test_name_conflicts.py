"""A module of the user with the name of one of ours stops launch before anything starts, with a clear error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.main import OWN_MODULES, ROOT, find_name_conflict, main


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a copy of our modules, as if it were site-packages, and the script that pip writes for `tandem`."""
    folder = tmp_path_factory.mktemp("installed")
    packages, script = folder / "packages", folder / "bin" / "tandem"
    packages.mkdir()
    script.parent.mkdir()
    for name in (*OWN_MODULES, "configs"):
        shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    script.write_text("import sys\nfrom launcher.main import main\nsys.exit(main())\n")
    return packages, script


def _start(command: list[str], *, cwd: Path, python_path: list[Path]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, python_path)), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def _write_module(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text("raise RuntimeError('this module of the user must not be imported')\n")
    return path


# With the installed command, one case has no test: Python imports a `launcher` on PYTHONPATH in place of our entry
# point, and reports with an ImportError that the user's file has no `main`.
CASES = [
    (command, place, name)
    for command in ("launch.py", "tandem")
    for place in ("current folder", "PYTHONPATH")
    for name in OWN_MODULES
    if (command, place, name) != ("tandem", "PYTHONPATH", "launcher")
]


@pytest.mark.parametrize(("command", "place", "name"), CASES)
def test_a_module_with_one_of_our_names_is_refused_before_anything_starts(
    command: str, place: str, name: str, tmp_path: Path, installed: tuple[Path, Path]
) -> None:
    packages, script = installed
    theirs = _write_module(tmp_path / "mine", name)
    cwd, python_path = (theirs.parent, []) if place == "current folder" else (tmp_path, [theirs.parent])
    if command == "tandem":
        ours, start, python_path = packages, script, [*python_path, packages]
    else:
        ours, start = ROOT, ROOT / "launch.py"
    done = _start([str(start), "--config", "quickstart"], cwd=cwd, python_path=python_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {theirs} has the name of a module of Tandem, {ours / name}")
    assert f"; rename {theirs}, or start from another folder" in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (cwd / "runs").exists()


@pytest.mark.parametrize("command", ["launch.py", "tandem"])
def test_a_module_named_launch_is_no_conflict(command: str, tmp_path: Path, installed: tuple[Path, Path]) -> None:
    """ROS 2 puts its package `launch` on PYTHONPATH. No process imports our launch.py, so the two do not collide."""
    packages, script = installed
    theirs = _write_module(tmp_path / "ros", "launch").parent
    start, python_path = (script, [theirs, packages]) if command == "tandem" else (ROOT / "launch.py", [theirs])
    done = _start([str(start), "--version"], cwd=tmp_path, python_path=python_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("tandem-dreamer")


def test_a_package_of_the_user_counts_and_a_plain_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    assert find_name_conflict([tmp_path]) is None
    (tmp_path / "shared" / "__init__.py").write_text("")
    assert str(tmp_path / "shared" / "__init__.py") in (find_name_conflict([tmp_path]) or "")


def test_our_own_source_tree_is_no_conflict_under_any_path_to_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    assert find_name_conflict([ROOT, ROOT / "tests" / "..", tmp_path / "link", tmp_path / "missing"]) is None


def test_an_installed_command_refuses_to_start_in_another_source_tree(
    tmp_path: Path, installed: tuple[Path, Path]
) -> None:
    """The children would take their modules from the source tree, launch its own from site-packages."""
    packages, script = installed
    done = _start([str(script), "--version"], cwd=ROOT, python_path=[packages])
    assert done.returncode == 2 and f"error: {ROOT}" in done.stderr
    done = _start([str(script), "--version"], cwd=tmp_path, python_path=[packages])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("tandem-dreamer")


def test_the_paths_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    _write_module(tmp_path / "mine", "shared")
    for value in ("mine", f"{os.pathsep}{tmp_path / 'mine'}"):
        monkeypatch.setenv("PYTHONPATH", value)
        assert main(["--version"]) == 2
