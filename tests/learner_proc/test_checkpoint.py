"""Checkpoints: a failed or killed save never leaves a run without a whole one, and no damaged one is loaded."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from learner_proc import checkpoint, finishing
from shared.checkpoints import CheckpointError, damaged_checkpoints, newest_checkpoint
from shared.errors import SettingError
from tests.learner_proc.identified_rows import fill, make_replay
from tests.learner_proc.saved_checkpoints import loaded, save, save_two


def test_only_the_newest_checkpoints_are_kept_and_partial_ones_are_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / ".partial-00000009").mkdir()  # as a killed process leaves it
    save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000004", "latest"]
    assert loaded(tmp_path) == ("00000004", {"step": 4})


def test_resuming_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(SettingError, match="without --resume"):
        checkpoint.load_newest(tmp_path)


def test_a_second_checkpoint_of_a_step_has_a_folder_of_its_own_and_is_the_newest(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, 3, state={"save": number}, keep=2)
    assert loaded(tmp_path) == ("00000003.2", {"save": 3})
    assert (tmp_path / "latest").read_text() == "00000003.2"


def test_after_a_resume_from_an_older_checkpoint_its_successors_count_as_newer_than_those_that_were_undone(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "00000020" / "state.pt").write_bytes(b"?")
    assert loaded(tmp_path)[0] == "00000010"
    save(tmp_path, 15)
    assert loaded(tmp_path)[0] == "00000015"


@pytest.mark.parametrize("killed_at", ["rename", "sync_folder", "latest"])
def test_a_save_that_is_killed_at_its_end_leaves_a_whole_checkpoint(tmp_path, monkeypatch, killed_at):
    save(tmp_path, 2, keep=1)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_at == "rename":
            patch.setattr(Path, "rename", killed)
        else:
            patch.setattr(finishing, {"latest": "_name_latest"}.get(killed_at, killed_at), killed)
        patch.setattr("shutil.rmtree", lambda *arguments, **options: None)  # a kill cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path) is not None
    save(tmp_path, 4, keep=3)
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000002", "00000003", "00000004"]
    assert loaded(tmp_path) == ("00000004", {"step": 4})
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch, failing):
    save(tmp_path, 3, keep=1)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "no space left") if failing == "os.fsync" else RuntimeError("failed writing file")

    monkeypatch.setattr(failing, full)
    with pytest.raises(CheckpointError, match=r"step 4 could not .*the last one is of step 3: .*free"):
        save(tmp_path, 4, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "latest"]
    assert loaded(tmp_path) == ("00000003", {"step": 3})


def test_the_error_of_a_full_disk_names_the_disk(tmp_path):
    """torch.save reports a position in the file that it did not expect."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"saved, there is no earlier one: .*too large"):
            save(tmp_path, 1, state={"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, kind: str) -> None:
    """Damage a checkpoint as a full or broken disk does."""
    name, _, how = kind.partition(" ")
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    changed = {"empty": b"", "cut": content[: len(content) // 2], "changed": b"?" * len(content)}
    if how != "missing":
        file.write_bytes(changed[how] if how in changed else how.encode())


@pytest.mark.parametrize("kind", [
    "state.pt empty", "state.pt cut", "state.pt missing", "state.pt changed", "replay-000002.bin cut",
    "replay-000002.bin missing", "replay-000002.bin changed", "manifest.json empty", "manifest.json missing",
    "manifest.json {}", "manifest.json []", "manifest.json cut",
])  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_and_deleted_at_the_next_save(tmp_path, kind):
    save_two(tmp_path)
    damage(tmp_path / "00000002", kind)
    assert loaded(tmp_path) == ("00000001", {"step": 1})
    ((folder, problem),) = damaged_checkpoints(tmp_path)
    assert folder.name == "00000002" and kind.split()[0] in problem
    save(tmp_path, 3)
    assert not damaged_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000001", "00000003"]


def test_if_every_checkpoint_is_damaged_the_error_names_the_file(tmp_path):
    folder = save(tmp_path, 1)
    damage(folder, "state.pt changed")
    with pytest.raises(SettingError, match=r"no whole checkpoint.*00000001 is damaged: state\.pt has checksum"):
        checkpoint.load_newest(tmp_path)
    (folder / "damaged").unlink()
    damage(folder, "state.pt cut")
    with pytest.raises(SettingError, match=r"no whole checkpoint.*: state\.pt has \d+ bytes; expected \d+"):
        checkpoint.load_newest(tmp_path)


def test_a_state_that_torch_cannot_read_is_skipped_although_its_checksum_is_right(tmp_path, monkeypatch):
    save_two(tmp_path)
    load = checkpoint.load_state

    def fails(folder):
        if folder.name == "00000002":
            raise RuntimeError("PytorchStreamReader failed")
        return load(folder)

    monkeypatch.setattr(checkpoint, "load_state", fails)
    assert loaded(tmp_path) == ("00000001", {"step": 1})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"../..", b"00000001", None, b""])
def test_latest_is_not_read_and_is_replaced_at_the_next_save(tmp_path, content):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    if content is None:
        (tmp_path / "latest").mkdir()
    elif content:
        (tmp_path / "latest").write_bytes(content)
    assert loaded(tmp_path)[0] == "00000002"
    save(tmp_path, 3)
    assert (tmp_path / "latest").read_text() == "00000003"


def test_a_checkpoint_of_a_newer_version_is_refused_by_its_format_and_not_deleted(tmp_path):
    save_two(tmp_path)
    folder = tmp_path / "00000002"
    make_newer(folder)
    with pytest.raises(SettingError, match=r"00000002 cannot be loaded: it has format 3; expected at most 2.*version"):
        checkpoint.load_newest(tmp_path)
    for step in (3, 4, 5):
        save(tmp_path, step, keep=1)
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000002", "00000005"]


def make_newer(folder: Path) -> None:
    """Give a checkpoint the format of a later version, with a manifest that is whole."""
    from shared.checkpoints import read_manifest, write_manifest

    manifest = read_manifest(folder)
    object.__setattr__(manifest, "format", 3)
    write_manifest(folder, manifest)


def test_a_checkpoint_of_the_first_version_is_loaded_by_its_sizes(tmp_path):
    replay = make_replay()
    fill(replay, 3)
    folder = save(tmp_path, 1, replay)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "replay-000001.bin").rename(folder / "replay.bin")
    old = {key: manifest[key] for key in ("step", "spec_digest", "replay_rows", "fields")}
    (folder / "manifest.json").write_text(json.dumps(old))
    assert loaded(tmp_path) == ("00000001", {"step": 1})
    damage(folder, "replay.bin cut")
    with pytest.raises(SettingError, match=r"replay\.bin has \d+ bytes; expected \d+"):
        checkpoint.load_newest(tmp_path)
