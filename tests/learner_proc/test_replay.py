"""The ring: windows hold consecutive rows of one environment, and never a granted or unwritten one."""

from pathlib import Path

import pytest
import torch

from learner_proc import checkpoint
from learner_proc.replay import Replay
from shared.errors import SettingError
from shared.stream import ObsSpec, StreamSpec, plan_layout

E, K, CAPACITY, LENGTH = 3, 4, 24, 6
SPEC = StreamSpec(E, {"policy": ObsSpec((2,), "float32")}, 1)
LOUD = 0xAB


def make(capacity: int = CAPACITY) -> Replay:
    layout = plan_layout(SPEC, capacity)
    slab = torch.full((layout.num_bytes,), LOUD, dtype=torch.uint8)
    return Replay(slab, layout, ticks_per_chunk=K, seed=0, device=torch.device("cpu"))


def write(replay: Replay, row: int, first_tick: int) -> None:
    """Rows whose values say where they belong: reward = 1000 * environment + tick."""
    for k in range(K):
        value = 1000.0 * torch.arange(E) + first_tick + k
        replay.views["reward"][row + k] = value
        replay.views["obs", "policy"][row + k] = value[:, None]
        replay.views["action"][row + k] = value[:, None]
        for flag in ("is_first", "is_last", "is_terminal"):
            replay.views[flag][row + k] = False
        replay.views["policy_version"][row + k] = first_tick + k


def in_reach(replay: Replay) -> torch.Tensor:
    """Ring rows the sampler may draw, oldest first."""
    return torch.arange(replay.first, replay.committed) % replay.layout.capacity


def fill(replay: Replay, chunks: int, start: int = 0) -> None:
    for chunk in range(start, start + chunks):
        row = replay.grant()
        write(replay, row, chunk * K)
        replay.commit(row)


def test_a_window_holds_consecutive_rows_of_one_environment():
    replay = make()
    fill(replay, 9)  # wraps: ticks 12..35 are in reach
    batch = replay.sample(256, LENGTH)
    reward = batch["reward"]
    assert reward.shape == (256, LENGTH)
    assert (reward.diff(dim=1) == 1.0).all()
    assert torch.equal(batch["obs", "policy"][..., 0], reward) and torch.equal(batch["action"][..., 0], reward)
    assert torch.equal(batch["policy_version"].float(), reward % 1000)
    assert set((reward // 1000).unique().tolist()) == {0.0, 1.0, 2.0}


def test_every_valid_start_is_drawn_and_no_other_from_the_oldest_to_the_newest_row():
    replay = make()
    fill(replay, 9)
    ticks = replay.sample(4000, LENGTH)["reward"] % 1000
    assert ticks.min() == 12 and ticks.max() == 35
    counts = torch.bincount(ticks[:, 0].long() - 12, minlength=24 - LENGTH + 1)
    assert counts.shape == (19,) and (counts > 0).all()
    assert counts.max() < 2 * counts.min(), "starts are drawn uniformly"


def test_granted_rows_are_out_of_reach_until_they_are_committed():
    replay = make()
    fill(replay, 6)
    row = replay.grant()
    replay.views["reward"][row : row + 2] = float("nan")  # half written
    assert (replay.sample(2000, LENGTH)["reward"] % 1000).min() == K
    assert replay.num_rows == CAPACITY - K
    second = replay.grant()
    assert second == row + K and replay.num_rows == CAPACITY - 2 * K


def test_unwritten_rows_are_never_sampled():
    replay = make()
    fill(replay, 2)
    loud = torch.full((4,), LOUD, dtype=torch.uint8).view(torch.float32)
    assert not (replay.sample(500, LENGTH)["reward"] == loud).any()


def test_a_dead_collectors_grants_are_granted_again_and_its_rows_stay_out_of_reach():
    replay = make()
    fill(replay, 6)
    rows = [replay.grant(), replay.grant()]
    replay.views["reward"][rows[0]] = float("nan")
    replay.revoke()
    assert replay.num_granted == 0 and replay.num_rows == CAPACITY - 2 * K
    assert replay.sample(1000, LENGTH)["reward"].isfinite().all()
    assert replay.grant() == rows[0]


def test_commits_come_in_the_order_of_their_grants():
    replay = make()
    _first, second = replay.grant(), replay.grant()
    with pytest.raises(ValueError, match="wanted the oldest grant"):
        replay.commit(second)
    replay.revoke()
    with pytest.raises(ValueError, match="None"):
        replay.commit(0)


def test_equal_seeds_draw_equal_windows():
    one, two = make(), make()
    fill(one, 7)
    fill(two, 7)
    assert torch.equal(one.sample(64, LENGTH)["reward"], two.sample(64, LENGTH)["reward"])


@pytest.mark.parametrize("chunks", [3, 6, 9])
def test_a_checkpoint_restores_the_rows_in_reach_in_order(tmp_path, chunks):
    replay = make()
    fill(replay, chunks)
    expected = replay.views["reward"][in_reach(replay)].clone()
    folder = checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, replay, spec_digest=SPEC.digest(), keep=2)
    assert checkpoint.newest(tmp_path) == folder
    fresh = make()
    assert checkpoint.load_replay(folder, fresh, spec_digest=SPEC.digest()) == len(expected)
    assert torch.equal(fresh.views["reward"][in_reach(fresh)], expected)
    fill(fresh, 1, start=chunks)
    assert (fresh.sample(200, LENGTH)["reward"].diff(dim=1) == 1.0).all(), "new rows follow the restored ones"


def test_a_smaller_ring_keeps_the_newest_rows_of_a_checkpoint(tmp_path):
    replay = make()
    fill(replay, 9)
    folder = checkpoint.save(tmp_path, 5, {}, replay, spec_digest=SPEC.digest(), keep=2)
    small = make(capacity=16)
    assert checkpoint.load_replay(folder, small, spec_digest=SPEC.digest()) == 16
    assert (small.views["reward"][in_reach(small)][:, 0]).tolist() == [float(t) for t in range(20, 36)]


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    replay = make()
    fill(replay, 2)
    folder = checkpoint.save(tmp_path, 5, {}, replay, spec_digest="other", keep=2)
    with pytest.raises(SettingError, match="start a new run"):
        checkpoint.load_replay(folder, make(), spec_digest=SPEC.digest())


def test_only_the_newest_checkpoints_are_kept_and_a_partial_one_is_never_named(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, None, spec_digest="x", keep=2)
    (tmp_path / ".partial-00000009").mkdir()  # a save that was killed
    checkpoint.save(tmp_path, 3, {"step": 3}, None, spec_digest="x", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003", "latest"]
    assert checkpoint.load_state(checkpoint.newest(tmp_path)) == {"step": 3}


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(SettingError, match="without --resume"):
        checkpoint.newest(tmp_path)


def test_a_save_killed_between_its_renames_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 3, {"life": 1}, None, spec_digest="x", keep=1)

    def killed(self, target):
        if target.name == "00000003":
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 3, {"life": 2}, None, spec_digest="x", keep=1)
    assert checkpoint.load_state(checkpoint.newest(tmp_path))["life"] in (1, 2)


def test_a_checkpoint_is_written_in_blocks_smaller_than_a_field(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 50)
    replay = make()
    fill(replay, 9)
    folder = checkpoint.save(tmp_path, 5, {}, replay, spec_digest=SPEC.digest(), keep=2)
    fresh = make()
    checkpoint.load_replay(folder, fresh, spec_digest=SPEC.digest())
    for entry in replay.layout.fields:
        assert torch.equal(
            fresh.views.get(entry.key)[in_reach(fresh)], replay.views.get(entry.key)[in_reach(replay)]
        ), entry.name
