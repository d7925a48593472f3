"""Checkpoints: they restore all rows in order, and a killed save never leaves a run without a complete one."""

from pathlib import Path

import pytest
import torch

from learner_proc import checkpoint
from learner_proc.host_blocks import HostBlocks
from shared.errors import SettingError
from tests.learner_proc.identified_rows import LENGTH, SPEC, fill, make_replay, sampled_rows


@pytest.mark.parametrize("chunks", [3, 6, 9])
def test_a_checkpoint_restores_the_rows_in_their_order(tmp_path, chunks):
    replay = make_replay()
    fill(replay, chunks)
    expected = replay.views["reward"][sampled_rows(replay)].clone()
    folder = checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, replay, spec_digest=SPEC.digest(), keep=2)
    assert checkpoint.newest(tmp_path) == folder
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
    assert checkpoint.load_state(checkpoint.newest(tmp_path)) == {"step": 3}


def test_resuming_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(SettingError, match="without --resume"):
        checkpoint.newest(tmp_path)


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
    assert checkpoint.load_state(checkpoint.newest(tmp_path))["save"] in (1, 2)


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
