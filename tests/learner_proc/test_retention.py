"""Which checkpoints are kept, and what is left of those that are kept for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner_proc import checkpoint, retention
from learner_proc.checkpoint import Content
from learner_proc.replay_files import ReplayFiles
from learner_proc.retention import chosen
from shared.checkpoints import Checkpoint, Manifest, damage, read_manifest
from shared.config import CheckpointSettings
from tests.learner_proc.identified_rows import SPEC, fill, make_replay
from tests.learner_proc.saved_checkpoints import loaded

RETURNS = [None, 5.0, 9.0, 9.0, 3.0, None, 4.0]  # of saves at 0, 1, ... 6 hours


def found() -> list[Checkpoint]:
    """Return seven checkpoints, one each hour, the newest first."""
    saves = [
        Checkpoint(Path(str(hour)), Manifest(step=hour, serial=hour, saved_at=hour * 3600.0, eval_return_mean=value))
        for hour, value in enumerate(RETURNS)
    ]
    return saves[::-1]


@pytest.mark.parametrize(("options", "kept"), [
    (CheckpointSettings(keep=2, keep_best=False, keep_every_h=None), [6, 5]),
    (CheckpointSettings(keep=1, keep_best=True, keep_every_h=None), [6, 3]),
    (CheckpointSettings(keep=5, keep_best=True, keep_every_h=None), [6, 5, 4, 3, 2]),
    (CheckpointSettings(keep=1, keep_best=False, keep_every_h=2.5), [6, 3, 0]),
    (CheckpointSettings(keep=2, keep_best=True, keep_every_h=4.0), [6, 5, 4, 3, 0]),
    (CheckpointSettings(keep=9, keep_best=True, keep_every_h=1.0), [6, 5, 4, 3, 2, 1, 0]),
])  # fmt: skip
def test_the_newest_the_best_and_one_in_each_span_are_kept(options, kept):
    assert [each.manifest.step for each in chosen(found(), options)] == kept


def test_the_choice_of_hourly_checkpoints_stays_the_same_when_it_is_made_after_every_save():
    options, kept = CheckpointSettings(keep=2, keep_best=False, keep_every_h=2.5), []
    for save in reversed(found()):
        kept = chosen([save, *kept], options)
    assert [each.manifest.step for each in kept] == [6, 5, 3, 0]


def test_a_checkpoint_that_is_only_the_best_loses_its_replay_and_stays_whole(tmp_path):
    replay = make_replay()
    files, options = ReplayFiles(replay), CheckpointSettings(keep=1, keep_best=True, keep_every_h=None)
    for step, value in ((1, 7.0), (2, 3.0), (3, 4.0)):
        fill(replay, 1, start=step - 1)
        checkpoint.save(tmp_path, Content(step, {"step": step}, {}, SPEC.digest(), value), files, options)
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000001", "00000003"]
    best = tmp_path / "00000001"
    assert sorted(path.name for path in best.iterdir()) == ["manifest.json", "state.pt"]
    assert damage(best) is None and read_manifest(best).replay_rows == 0
    assert len(list((tmp_path / "00000003").glob("replay-*"))) == 3, "the newest keeps its links"
    (tmp_path / "00000003" / "state.pt").unlink()
    assert loaded(tmp_path) == ("00000001", {"step": 1})


def test_a_kill_between_manifest_and_replay_leaves_files_that_the_next_save_deletes(tmp_path, monkeypatch):
    replay = make_replay()
    fill(replay, 1)
    files, options = ReplayFiles(replay), CheckpointSettings(keep=1, keep_best=True, keep_every_h=None)
    for step, value in ((1, 7.0), (2, 3.0), (3, 1.0)):
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr(Path, "unlink", _full)
            checkpoint.save(tmp_path, Content(step, {"step": step}, {}, SPEC.digest(), value), files, options)
        left = list((tmp_path / "00000001").glob("replay-*"))
        assert damage(tmp_path / "00000001") is None and len(left) == (step < 3)


def test_a_disk_that_is_full_when_a_replay_is_dropped_changes_nothing(tmp_path, monkeypatch):
    replay = make_replay()
    fill(replay, 1)
    files, options = ReplayFiles(replay), CheckpointSettings(keep=1, keep_best=True, keep_every_h=None)
    monkeypatch.setattr(retention, "write_manifest", _full)
    for step, value in ((1, 7.0), (2, 3.0)):
        checkpoint.save(tmp_path, Content(step, {"step": step}, {}, SPEC.digest(), value), files, options)
    assert damage(tmp_path / "00000001") is None and read_manifest(tmp_path / "00000001").replay_rows == 4


def _full(*arguments: object, **options: object) -> None:
    raise OSError("no space left")
