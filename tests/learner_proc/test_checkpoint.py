"""Checkpoints: they restore all rows in order, and a killed save never leaves a run without a complete one."""

import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from learner_proc import checkpoint
from learner_proc.host_blocks import HostBlocks
from shared.errors import SettingError
from shared.run_folder import damaged_checkpoints, newest_checkpoint
from tests.learner_proc.identified_rows import LENGTH, SPEC, fill, make_replay, sampled_rows


@pytest.mark.parametrize("chunks", [3, 6, 9])
def test_a_checkpoint_restores_the_rows_in_their_order(tmp_path, chunks):
    replay = make_replay()
    fill(replay, chunks)
    expected = replay.views["reward"][sampled_rows(replay)].clone()
    folder = checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, replay, spec_digest=SPEC.digest(), keep=2)
    assert newest_checkpoint(tmp_path) == folder
    fresh = make_replay()
    assert checkpoint.load_replay(folder, fresh, spec_digest=SPEC.digest()) == len(expected)
    assert torch.equal(fresh.views["reward"][sampled_rows(fresh)], expected)
    fill(fresh, 1, start=chunks)
    assert (fresh.sample(200, LENGTH)["reward"].diff(dim=1) == 1.0).all(), "new rows follow the restored ones"


def test_a_smaller_ring_gets_the_newest_rows_of_a_checkpoint(tmp_path):
    replay = make_replay()
    fill(replay, 9)
    folder = checkpoint.save(tmp_path, 5, {}, replay, spec_digest=SPEC.digest(), keep=2)
    small = make_replay(capacity=16)
    assert checkpoint.load_replay(folder, small, spec_digest=SPEC.digest()) == 16
    assert (small.views["reward"][sampled_rows(small)][:, 0]).tolist() == [float(t) for t in range(20, 36)]


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    replay = make_replay()
    fill(replay, 2)
    folder = checkpoint.save(tmp_path, 5, {}, replay, spec_digest="other", keep=2)
    with pytest.raises(SettingError, match="start a new run"):
        checkpoint.load_replay(folder, make_replay(), spec_digest=SPEC.digest())


def test_only_the_newest_checkpoints_are_kept_and_partial_ones_are_deleted(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, None, spec_digest="x", keep=2)
    (tmp_path / ".partial-00000009").mkdir()  # as a killed process leaves it
    checkpoint.save(tmp_path, 3, {"step": 3}, None, spec_digest="x", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003", "latest"]
    assert checkpoint.load_newest(tmp_path) == (tmp_path / "00000003", {"step": 3})


def test_resuming_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(SettingError, match="without --resume"):
        checkpoint.load_newest(tmp_path)


def test_a_save_that_is_killed_between_its_renames_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 3, {"save": 1}, None, spec_digest="x", keep=1)

    def killed(self, target):
        if target.name == "00000003":
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 3, {"save": 2}, None, spec_digest="x", keep=1)
    assert checkpoint.load_newest(tmp_path)[1]["save"] in (1, 2)


def test_a_checkpoint_is_written_in_blocks_smaller_than_a_field(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 50)  # for reading
    replay, arrived = make_replay(), []
    fill(replay, 9)
    blocks = HostBlocks(torch.device("cpu"), block_bytes=50, on_block=lambda: arrived.append(1))
    folder = checkpoint.save(tmp_path, 5, {}, replay, spec_digest=SPEC.digest(), keep=2, blocks=blocks)
    assert len(arrived) == -(-(folder / "replay.bin").stat().st_size // 50) > 10, "each block counts as progress"
    fresh = make_replay()
    checkpoint.load_replay(folder, fresh, spec_digest=SPEC.digest())
    for entry in replay.layout.fields:
        assert torch.equal(
            fresh.views.get(entry.key)[sampled_rows(fresh)], replay.views.get(entry.key)[sampled_rows(replay)]
        ), entry.name


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch, failing):
    checkpoint.save(tmp_path, 3, {"save": 1}, None, spec_digest="x", keep=1)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "no space left") if failing == "os.fsync" else RuntimeError("failed writing file")

    monkeypatch.setattr(failing, full)
    with pytest.raises(checkpoint.CheckpointError, match=r"step 4 could not .*the last one is of step 3: .*free"):
        checkpoint.save(tmp_path, 4, {"save": 2}, None, spec_digest="x", keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "latest"]
    assert checkpoint.load_newest(tmp_path)[1] == {"save": 1}


def test_the_error_of_a_full_disk_names_the_disk(tmp_path):
    """torch.save reports a position in the file that it did not expect."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"saved, there is no earlier one: .*too large"):
            checkpoint.save(tmp_path, 1, {"x": torch.zeros(100_000)}, None, spec_digest="x", keep=1)
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
    "state.pt empty", "state.pt cut", "state.pt missing", "state.pt changed", "replay.bin cut", "replay.bin missing",
    "manifest.json empty", "manifest.json missing", "manifest.json {}", "manifest.json []", "manifest.json cut",
])  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_and_deleted_at_the_next_save(tmp_path, kind):
    for step in (1, 2):
        replay = make_replay()
        fill(replay, 3)
        checkpoint.save(tmp_path, step, {"step": step}, replay, spec_digest=SPEC.digest(), keep=2)
    damage(tmp_path / "00000002", kind)
    assert checkpoint.load_newest(tmp_path) == (tmp_path / "00000001", {"step": 1})
    if kind != "state.pt changed":  # its size is right, so only reading it shows the damage
        ((folder, problem),) = damaged_checkpoints(tmp_path)
        assert folder.name == "00000002" and kind.split()[0] in problem
        checkpoint.save(tmp_path, 2, {"step": 2}, None, spec_digest="x", keep=2)
        assert not damaged_checkpoints(tmp_path)
        checkpoint.save(tmp_path, 3, {"step": 3}, None, spec_digest="x", keep=2)
        damage(tmp_path / "00000003", "state.pt missing")
        checkpoint.save(tmp_path, 4, {"step": 4}, None, spec_digest="x", keep=2)
        assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000002", "00000004"]


def test_if_every_checkpoint_is_damaged_the_error_names_the_file(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"step": 1}, None, spec_digest="x", keep=2)
    damage(folder, "state.pt changed")
    with pytest.raises(SettingError, match=r"no whole checkpoint.*00000001: state\.pt cannot be read"):
        checkpoint.load_newest(tmp_path)
    damage(folder, "state.pt cut")
    with pytest.raises(SettingError, match=r"no whole checkpoint.*00000001: state\.pt has \d+ bytes; expected \d+"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"../..", None])
def test_a_latest_that_cannot_be_read_is_ignored_and_replaced(tmp_path, content):
    checkpoint.save(tmp_path, 1, {"step": 1}, None, spec_digest="x", keep=2)
    (tmp_path / "latest").unlink()
    if content is None:
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "latest").write_bytes(content)
    assert checkpoint.load_newest(tmp_path)[1] == {"step": 1}
    checkpoint.save(tmp_path, 2, {"step": 2}, None, spec_digest="x", keep=2)
    assert (tmp_path / "latest").read_text() == "00000002"


def test_a_checkpoint_of_an_older_version_without_file_sizes_is_whole_but_a_short_replay_is_refused(tmp_path):
    replay = make_replay()
    fill(replay, 3)
    folder = checkpoint.save(tmp_path, 1, {}, replay, spec_digest=SPEC.digest(), keep=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(tmp_path) == folder
    damage(folder, "replay.bin cut")
    with pytest.raises(SettingError, match=r"replay\.bin ends after .*; expected every row"):
        checkpoint.load_replay(folder, make_replay(), spec_digest=SPEC.digest())
