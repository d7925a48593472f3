"""run.json describes each launch of a run: its command line, its sources and its versions."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from launcher.provenance import describe_run, git_state
from shared.config import Settings
from shared.files import write_json
from shared.run_folder import RunFolder, read_run


def test_run_json_lists_package_versions_and_every_launch(tmp_path: Path) -> None:
    content = describe_run(
        Settings(),
        argv=["env.seed=0"],
        devices={"sim": "cpu"},
        run_dir=tmp_path,
        socket_dir=tmp_path,
        before=None,
        repo=tmp_path,
    )
    assert content["git"] is None  # not a repository
    assert set(content["versions"]) >= {"python", "torch", "tensordict", "pyzmq"}
    write_json(RunFolder(tmp_path).run_json, content)
    assert json.loads(RunFolder(tmp_path).run_json.read_text()) == content
    run = read_run(tmp_path)
    assert (run.run_id, run.run_dir, run.socket_dir) == (content["run_id"], str(tmp_path), str(tmp_path))
    again = describe_run(
        Settings(),
        argv=["--resume"],
        devices={},
        run_dir=tmp_path,
        socket_dir=tmp_path,
        before=run,
        repo=tmp_path,
    )
    assert [launch["argv"] for launch in again["launches"]] == [["env.seed=0"], ["--resume"]]
    assert again["num_resumes"] == 1 and again["run_id"] != run.run_id


def test_the_git_state_is_dirty_once_a_file_has_changed(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    def state() -> dict:
        return describe_run(
            Settings(), argv=[], devices={}, run_dir=tmp_path, socket_dir=tmp_path, before=None, repo=tmp_path
        )["git"]

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    assert re.fullmatch(r"[0-9a-f]{40}", state()["commit"]) and state()["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert state()["dirty"] is True
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None, "a repository that contains the folder is not ours"
