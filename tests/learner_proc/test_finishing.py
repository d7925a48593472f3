"""A checkpoint is finished by another process, and a kill at any file operation of a save loses no older one."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from learner_proc import checkpoint
from learner_proc.checkpoint import Content, Written, write_files
from learner_proc.finishing import Finisher
from learner_proc.replay_files import ReplayFiles, load_replay
from shared.checkpoints import Checkpoint, CheckpointError, damage, newest_verified, read_manifest
from shared.config import CheckpointSettings
from tests.learner_proc.identified_rows import SPEC, fill, make_replay, sampled_rows
from tests.learner_proc.saved_checkpoints import loaded, save
from tests.learner_proc.test_damaged_checkpoints import Template

OPTIONS = CheckpointSettings(keep=2, keep_best=False, keep_every_h=None)
FILE_OPERATIONS = ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
KILLED = 9


def written(root: Path, step: int) -> Written:
    replay = make_replay()
    fill(replay, 2)
    content = Content(step, {"step": step}, {"x": torch.ones(2)}, SPEC.digest())
    return write_files(root, content, ReplayFiles(replay))


def test_a_process_of_its_own_makes_a_whole_checkpoint_and_reports_that_it_moves(tmp_path):
    save(tmp_path, 1)
    files, moved = written(tmp_path, 2), []
    assert loaded(tmp_path)[0] == "00000001", "it is no checkpoint before it is finished"
    folder = Finisher(files.partial, files.manifest, OPTIONS).wait(on_block=lambda: moved.append(1))
    assert folder.name == "00000002" and damage(folder) is None and moved
    assert (tmp_path / "latest").read_text() == "00000002" and not list(tmp_path.glob(".*"))


def test_a_process_that_is_killed_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    root, killed = tmp_path / "checkpoints", tmp_path / "killed"
    killed.write_text("#!/bin/sh\ncat > /dev/null\nkill -9 $$\n")
    killed.chmod(0o700)
    save(root, 1)
    files = written(root, 2)
    monkeypatch.setattr(sys, "executable", str(killed))
    finisher = Finisher(files.partial, files.manifest, OPTIONS)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved, the last one is of step 1: .*exit code -9"):
        finisher.wait()
    assert sorted(path.name for path in root.iterdir()) == ["00000001", "latest"]


def test_an_error_of_the_disk_is_passed_on_and_leaves_nothing(tmp_path):
    files = written(tmp_path, 2)
    (files.partial / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"there is no earlier one: .*No such file"):
        Finisher(files.partial, files.manifest, OPTIONS).wait()
    assert not files.partial.exists()


def test_a_process_that_cannot_be_started_is_an_error(tmp_path, monkeypatch):
    files = written(tmp_path, 2)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="No such file"):
        Finisher(files.partial, files.manifest, OPTIONS)
    assert not files.partial.exists()


def die_in_a_save(root: Path, number: int) -> bool:
    """Continue the run in a child process that dies at its file operation `number`; return whether it died."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child uses none of the parent's threads
        pid = os.fork()
    if pid == 0:
        try:
            replay, seen = make_replay(), 0
            found, _ = checkpoint.load_newest(root)
            load_replay(found, replay, spec_digest=SPEC.digest())
            files = ReplayFiles(replay)
            files.continue_from(found)
            fill(replay, 4, start=6)

            def count(event: str, arguments: tuple) -> None:
                nonlocal seen
                if event in FILE_OPERATIONS:
                    seen += 1
                    if seen == number:
                        os._exit(KILLED)

            sys.addaudithook(count)
            save(root, 3, files)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED)
    return os.waitstatus_to_exitcode(status) == KILLED


def test_a_kill_at_any_file_operation_of_a_save_leaves_the_checkpoints_before_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it only takes time here
    root, number, steps = tmp_path / "checkpoints", 0, set()
    template = Template(root)
    while True:
        number += 1
        template.restore()
        died = die_in_a_save(root, number)
        for folder in root.glob("0*"):
            if folder.name != "00000001":  # the save may have begun to delete the oldest one
                assert damage(folder) is None, (number, folder)
        found = newest_verified(root)
        assert found is not None
        steps.add(found.manifest.step)
        first, end = {2: (0, 24), 3: (16, 40)}[found.manifest.step]
        replay = make_replay()
        load_replay(found, replay, spec_digest=SPEC.digest())
        assert replay.views["reward"][sampled_rows(replay)][:, 0].tolist() == [float(row) for row in range(first, end)]
        if not died:
            break
        if number % 4 == 0:
            save(root, 4)
            assert loaded(root) == ("00000004", {"step": 4}) and not list(root.glob(".*")), number
    assert number > 20 and steps == {2, 3}


def test_rows_are_shared_after_a_checkpoint_that_another_process_finished(tmp_path):
    replay = make_replay()
    files = ReplayFiles(replay)
    for step in (1, 2):
        fill(replay, 2, start=2 * (step - 1))
        content = Content(step, {}, {}, SPEC.digest())
        saved = write_files(tmp_path, content, files)
        folder = Finisher(saved.partial, saved.manifest, OPTIONS).wait()
        files.finished(folder, saved.rows)
    names = [segment.file for segment in read_manifest(folder).segments]
    assert names == ["replay-000001.bin", "replay-000002.bin"]
    assert (folder / names[0]).samefile(tmp_path / "00000001" / names[0]) and damage(folder) is None
    assert load_replay(Checkpoint(folder, read_manifest(folder)), make_replay(), spec_digest=SPEC.digest()) == 16
