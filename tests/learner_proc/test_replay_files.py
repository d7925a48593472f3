"""The replay on the disk: all rows come back in order, and only new rows are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from learner_proc import checkpoint, finishing, replay_files
from learner_proc.host_blocks import HostBlocks
from learner_proc.replay import Replay
from learner_proc.replay_files import ReplayFiles, load_replay
from shared.checkpoints import Checkpoint, CheckpointError, read_manifest
from shared.errors import SettingError
from tests.learner_proc.identified_rows import LENGTH, SPEC, fill, make_replay, sampled_rows
from tests.learner_proc.saved_checkpoints import save


def restored(folder: Path, replay: Replay) -> int:
    return load_replay(Checkpoint(folder, read_manifest(folder)), replay, spec_digest=SPEC.digest())


def rewards(replay: Replay) -> list[float]:
    """Return the reward of the first environment in every row that can be sampled, oldest first."""
    return replay.views["reward"][sampled_rows(replay)][:, 0].tolist()


def written(folder: Path) -> list[str]:
    """Return the segments of a checkpoint that no other checkpoint shares."""
    return sorted(path.name for path in folder.glob("replay-*") if path.stat().st_nlink == 1)


@pytest.mark.parametrize("chunks", [3, 6, 9])
def test_a_checkpoint_restores_the_rows_in_their_order(tmp_path, chunks):
    replay = make_replay()
    fill(replay, chunks)
    folder = save(tmp_path, 5, replay)
    fresh = make_replay()
    assert restored(folder, fresh) == replay.num_rows
    for entry in replay.layout.fields:
        assert torch.equal(
            fresh.views.get(entry.key)[sampled_rows(fresh)], replay.views.get(entry.key)[sampled_rows(replay)]
        ), entry.name
    fill(fresh, 1, start=chunks)
    assert (fresh.sample(200, LENGTH)["reward"].diff(dim=1) == 1.0).all(), "new rows follow the restored ones"


def test_a_smaller_ring_gets_the_newest_rows_of_a_checkpoint(tmp_path):
    replay = make_replay()
    files = ReplayFiles(replay)
    for step in (1, 2, 3):
        fill(replay, 3, start=3 * (step - 1))
        folder = save(tmp_path, step, files)
    small = make_replay(capacity=16)
    assert restored(folder, small) == 16
    assert rewards(small) == [float(t) for t in range(20, 36)]


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    replay = make_replay()
    fill(replay, 2)
    folder = save(tmp_path, 5, replay, digest="other")
    with pytest.raises(SettingError, match="start a new run"):
        restored(folder, make_replay())


@pytest.mark.parametrize("segment_bytes", [1, 300, 1 << 30])
def test_every_checkpoint_of_a_long_run_restores_all_rows_and_writes_only_new_ones(
    tmp_path, monkeypatch, segment_bytes
):
    """The ring has 6 chunks, so rows are overwritten from the third save on. Resumes in between change nothing."""
    monkeypatch.setattr(replay_files, "SEGMENT_BYTES", segment_bytes)
    replay, chunk = make_replay(), 0
    files = ReplayFiles(replay)
    for step, new_chunks in enumerate([2, 3, 0, 1, 4, 1, 7, 2], start=1):
        fill(replay, new_chunks, start=chunk)
        chunk += new_chunks
        folder = save(tmp_path, step, files)
        new_bytes = sum((folder / name).stat().st_size for name in written(folder))
        row_bytes = sum(file.stat().st_size for file in folder.glob("replay-*")) // _stored_rows(folder)
        assert new_bytes == min(4 * new_chunks, replay.num_rows) * row_bytes
        fresh = make_replay()
        restored(folder, fresh)
        assert rewards(fresh) == rewards(replay) == [float(t) for t in range(4 * chunk - replay.num_rows, 4 * chunk)]
        if step % 3 == 0:  # a resume
            found, _ = checkpoint.load_newest(tmp_path)
            replay, files = fresh, ReplayFiles(fresh)
            files.continue_from(found)


def _stored_rows(folder: Path) -> int:
    return sum(segment.rows for segment in read_manifest(folder).segments)


@pytest.mark.parametrize("reason", ["no links", "cut", "deleted"])
def test_if_segments_cannot_be_shared_every_row_is_written_again(tmp_path, monkeypatch, reason):
    replay = make_replay()
    files = ReplayFiles(replay)
    fill(replay, 2)
    first = save(tmp_path, 1, files)
    fill(replay, 1, start=2)

    def no_links(*arguments):
        raise PermissionError("Operation not permitted")

    if reason == "no links":
        monkeypatch.setattr(os, "link", no_links)
    elif reason == "cut":
        os.truncate(first / "replay-000001.bin", 10)
    else:
        (first / "replay-000001.bin").unlink()
    folder = save(tmp_path, 2, files)
    assert [segment.rows for segment in read_manifest(folder).segments] == [12]
    fresh = make_replay()
    restored(folder, fresh)
    assert rewards(fresh) == rewards(replay)


def test_the_number_of_small_segments_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_files, "MAX_SMALL_SEGMENTS", 3)
    replay = make_replay()
    files, counts = ReplayFiles(replay), []
    for step in range(6):
        fill(replay, 1, start=step)
        counts.append(len(read_manifest(save(tmp_path, step, files)).segments))
    assert counts == [1, 2, 3, 4, 1, 2]


def test_segments_are_written_and_read_in_blocks_smaller_than_a_field(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_files, "BLOCK_BYTES", 50)  # for reading
    replay, arrived = make_replay(), []
    fill(replay, 9)
    blocks = HostBlocks(torch.device("cpu"), block_bytes=50, on_block=lambda: arrived.append(1))
    folder = save(tmp_path, 5, ReplayFiles(replay, blocks))
    size = (folder / "replay-000001.bin").stat().st_size
    assert len(arrived) == -(-size // 50) > 10, "each block counts as progress"
    fresh = make_replay()
    restored(folder, fresh)
    assert rewards(fresh) == rewards(replay)


def test_a_save_that_fails_does_not_count_its_rows_as_stored(tmp_path, monkeypatch):
    replay = make_replay()
    files = ReplayFiles(replay)
    fill(replay, 2)
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "write_manifest", _full)
        with pytest.raises(CheckpointError):
            save(tmp_path, 1, files)
    fresh = make_replay()
    assert restored(save(tmp_path, 2, files), fresh) == 8


def _full(*arguments: object) -> None:
    raise OSError("no space left")
