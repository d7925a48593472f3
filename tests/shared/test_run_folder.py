"""The run folder: one launch at a time, nothing overwritten, sockets in a short private folder."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.provenance import describe_run
from launcher.run_folder import create_run_folder, default_run_dir, open_run_folder
from shared.config import Settings
from shared.errors import SettingError
from shared.files import write_json
from shared.run_folder import (
    RunFolder,
    checkpoint_step,
    make_socket_dir,
    newest_checkpoint,
    read_run,
    remove_socket_dir,
)
from tests.fakes.child import save_checkpoint


def test_a_second_launch_in_the_same_folder_is_told_the_first_ones_pid(tmp_path: Path) -> None:
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
    holder.communicate(timeout=20)
    (tmp_path / "run" / "config.yaml").write_text("")
    save_checkpoint(tmp_path / "run", 1)
    open_run_folder(tmp_path / "run").release()  # the kernel let go with the process


def test_a_folder_with_files_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SettingError, match=r"is not empty \(it holds thesis\.tex\).*--resume"):
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


def test_a_folder_that_cannot_be_made_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot be made.*--run-dir"):
        create_run_folder(tmp_path / "file" / "run")


def test_only_a_run_with_a_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no config\.yaml"):
        open_run_folder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(SettingError, match="has no complete checkpoint"):
        open_run_folder(tmp_path)


def test_the_newest_checkpoint_is_the_one_that_latest_names_if_it_is_complete(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert newest_checkpoint(checkpoints) is None
    for step in (9, 20):
        save_checkpoint(tmp_path, step)
    (checkpoints / "latest").write_text("00000009")
    assert newest_checkpoint(checkpoints) == checkpoints / "00000009"
    assert checkpoint_step(checkpoints / "00000009") == 9


@pytest.mark.parametrize("latest", ["00000030", "00000040", "", None])
def test_a_save_that_was_killed_leaves_the_complete_checkpoint_of_the_highest_step(
    latest: str | None, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (9, 20):
        save_checkpoint(tmp_path, step)
    (checkpoints / "00000030").mkdir()  # no manifest.json: incomplete
    (checkpoints / "latest").unlink()
    if latest is not None:
        (checkpoints / "latest").write_text(latest)
    assert newest_checkpoint(checkpoints) == checkpoints / "00000020"


def test_default_names_say_what_runs_and_never_collide(tmp_path: Path) -> None:
    first = default_run_dir(Settings(), tmp_path)
    assert re.fullmatch(r"cheetah-run-\d{8}-\d{6}", first.name)
    settings = Settings()
    settings.env.name, settings.env.task = "a/b c", ""
    assert re.fullmatch(r"a_b_c-\d{8}-\d{6}", default_run_dir(settings, tmp_path).name)
    for _ in range(3):  # at least two of these fall into one second
        default_run_dir(Settings(), tmp_path).mkdir()


def test_the_socket_folder_is_private_and_short_even_under_a_long_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    path = make_socket_dir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert len(str(path / "handover-and-more.sock")) < 107
    (path / "learner.sock").write_text("")
    remove_socket_dir(path)
    assert not path.exists()


def test_only_socket_folders_are_removed(tmp_path: Path) -> None:
    remove_socket_dir(tmp_path)
    assert tmp_path.is_dir()


def test_run_json_says_what_ran_without_importing_it(tmp_path: Path) -> None:
    content = describe_run(
        Settings(), argv=["env.seed=0"], devices={"sim": "cpu"}, socket_dir=tmp_path, before=None, repo=tmp_path
    )
    assert content["git"] is None  # not a repository
    assert set(content["versions"]) >= {"python", "torch", "tensordict", "pyzmq"}
    write_json(RunFolder(tmp_path).run_json, content)
    assert json.loads(RunFolder(tmp_path).run_json.read_text()) == content
    run = read_run(tmp_path)
    assert (run.run_id, run.socket_dir) == (content["run_id"], str(tmp_path))
    again = describe_run(Settings(), argv=["--resume"], devices={}, socket_dir=tmp_path, before=run, repo=tmp_path)
    assert [launch["argv"] for launch in again["launches"]] == [["env.seed=0"], ["--resume"]]
    assert again["num_resumes"] == 1 and again["run_id"] != run.run_id


def test_git_state_tells_a_changed_tree_from_a_clean_one(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    def state() -> dict:
        return describe_run(Settings(), argv=[], devices={}, socket_dir=tmp_path, before=None, repo=tmp_path)["git"]

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    assert re.fullmatch(r"[0-9a-f]{40}", state()["commit"]) and state()["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert state()["dirty"] is True


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": "a"}'])
def test_a_broken_run_json_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SettingError, match=r"run\.json cannot be read.*launch\.py"):
        read_run(tmp_path)
