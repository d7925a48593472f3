"""One launch at a time uses a run folder, and no existing file is overwritten."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.run_folder import ResumeUndo, RunLock, create_run_folder, make_default_run_dir, open_run_folder
from shared.config import Settings
from shared.errors import SettingError
from tests.fakes.child import save_checkpoint


def test_a_second_launch_in_the_same_folder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from launcher.run_folder import create_run_folder\n"
        "lock = create_run_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SettingError, match=rf"in use by the launch with pid {holder.pid}"):
        create_run_folder(tmp_path / "run")
    holder.kill()
    holder.communicate(timeout=300)
    (tmp_path / "run" / "config.yaml").write_text("")
    save_checkpoint(tmp_path / "run", 1)
    open_run_folder(tmp_path / "run").release()  # the kernel released the lock when the process ended


def test_a_folder_with_files_is_refused_and_stays_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SettingError, match=r"is not empty: it contains thesis\.tex; .*--resume"):
        create_run_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_a_new_one_both_become_run_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "deep" / "new"):
        lock = create_run_folder(path)
        folder = lock.folder
        for part in (folder.logs, folder.tensorboard, folder.checkpoints, folder.crash):
            assert part.is_dir()
        assert folder.lock.read_text() == f"{os.getpid()}\n"
        lock.release()


def test_a_folder_that_cannot_be_created_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot create the run folder.*--run-dir"):
        create_run_folder(tmp_path / "file" / "run")


def test_only_a_run_with_a_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no config\.yaml"):
        open_run_folder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(SettingError, match="has no whole checkpoint"):
        open_run_folder(tmp_path)


def test_a_resume_that_came_to_nothing_restores_the_small_files(tmp_path: Path) -> None:
    with create_run_folder(tmp_path / "run") as lock:
        lock.folder.config.write_text("old")
        save_checkpoint(tmp_path / "run", 40)
        undo = ResumeUndo(lock.folder)
        lock.folder.config.write_text("new")
        lock.folder.run_json.write_text("new")
        undo.unless_saved()
        assert lock.folder.config.read_text() == "old"
        lock.folder.config.write_text("new")
        save_checkpoint(tmp_path / "run", 60)
        undo.unless_saved()
        assert lock.folder.config.read_text() == "new", "the checkpoint was trained with the new settings"


def test_default_names_contain_the_task_and_never_collide(tmp_path: Path) -> None:
    first = make_default_run_dir(Settings(), tmp_path)
    assert first.is_dir() and re.fullmatch(r"cheetah-run-\d{8}-\d{6}", first.name)
    settings = Settings()
    settings.env.name, settings.env.task = "a/b c", ""
    assert re.fullmatch(r"a_b_c-\d{8}-\d{6}", make_default_run_dir(settings, tmp_path).name)
    # At least two of these are made within one second, as by two launches.
    assert len({make_default_run_dir(Settings(), tmp_path) for _ in range(3)}) == 3


def test_a_default_folder_that_cannot_be_made_is_a_setting_error(tmp_path: Path) -> None:
    settings = Settings()
    settings.env.name = "x" * 300
    with pytest.raises(SettingError, match=r"cannot create the run folder .*too long.*--run-dir"):
        make_default_run_dir(settings, tmp_path)


@pytest.mark.parametrize("broken", ["lock", "logs"])
def test_a_run_folder_that_cannot_be_opened_is_a_setting_error(broken: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    save_checkpoint(tmp_path, 1)
    if broken == "lock":
        (tmp_path / "lock").mkdir()
    else:
        (tmp_path / "logs").write_text("")
    with pytest.raises(SettingError, match=rf"cannot open the run folder .*{broken}.*; expected .*; correct the file"):
        open_run_folder(tmp_path)


@pytest.mark.parametrize("open_folder", [create_run_folder, open_run_folder])
def test_a_folder_with_a_name_that_is_too_long_is_a_setting_error(
    open_folder: Callable[[Path], RunLock], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"; expected "):
        open_folder(tmp_path / ("x" * 300))


def test_the_hint_to_kill_a_launch_needs_its_pid(tmp_path: Path) -> None:
    with create_run_folder(tmp_path) as lock:
        lock.folder.lock.write_bytes(b"\xff")
        with pytest.raises(SettingError, match=r"in use by another launch; .*; wait for that run, or give another"):
            create_run_folder(tmp_path)


@pytest.mark.parametrize("file", ["config.yaml", "run.json", "summary.json"])
def test_an_undone_resume_restores_files_that_are_no_text(file: str, tmp_path: Path) -> None:
    with create_run_folder(tmp_path) as lock:
        (tmp_path / file).write_bytes(b"\xff\x00")
        undo = ResumeUndo(lock.folder)
        (tmp_path / file).write_text("new")
        undo.unless_saved()
        assert (tmp_path / file).read_bytes() == b"\xff\x00"
