"""The replay: a window has consecutive rows of one environment, and none that is granted or unwritten."""

import pytest
import torch

from tests.learner_proc.identified_rows import CAPACITY, LENGTH, LOUD, K, fill, make_replay


def test_a_window_has_consecutive_rows_of_one_environment():
    replay = make_replay()
    fill(replay, 9)  # the ring has wrapped: ticks 12 to 35 can be sampled
    batch = replay.sample(256, LENGTH)
    reward = batch["reward"]
    assert reward.shape == (256, LENGTH)
    assert (reward.diff(dim=1) == 1.0).all()
    assert torch.equal(batch["obs", "policy"][..., 0], reward) and torch.equal(batch["action"][..., 0], reward)
    assert torch.equal(batch["policy_version"].float(), reward % 1000)
    assert set((reward // 1000).unique().tolist()) == {0.0, 1.0, 2.0}


def test_all_valid_first_rows_are_drawn_equally_often_and_no_others():
    replay = make_replay()
    fill(replay, 9)
    ticks = replay.sample(4000, LENGTH)["reward"] % 1000
    assert ticks.min() == 12 and ticks.max() == 35
    counts = torch.bincount(ticks[:, 0].long() - 12, minlength=24 - LENGTH + 1)
    assert counts.shape == (19,) and (counts > 0).all()
    assert counts.max() < 2 * counts.min(), "first rows are drawn uniformly"


def test_granted_rows_are_not_sampled_until_they_are_committed():
    replay = make_replay()
    fill(replay, 6)
    row = replay.grant()
    replay.views["reward"][row : row + 2] = float("nan")  # the collector has written half of it
    assert (replay.sample(2000, LENGTH)["reward"] % 1000).min() == K
    assert replay.num_rows == CAPACITY - K
    second = replay.grant()
    assert second == row + K and replay.num_rows == CAPACITY - 2 * K


def test_unwritten_rows_are_never_sampled():
    replay = make_replay()
    fill(replay, 2)
    loud = torch.full((4,), LOUD, dtype=torch.uint8).view(torch.float32)
    assert not (replay.sample(500, LENGTH)["reward"] == loud).any()


def test_revoked_rows_are_not_sampled_and_are_granted_again():
    replay = make_replay()
    fill(replay, 6)
    rows = [replay.grant(), replay.grant()]
    replay.views["reward"][rows[0]] = float("nan")
    replay.revoke()
    assert replay.num_granted == 0 and replay.num_rows == CAPACITY - 2 * K
    assert replay.sample(1000, LENGTH)["reward"].isfinite().all()
    assert replay.grant() == rows[0]


def test_a_commit_out_of_order_raises():
    replay = make_replay()
    _first, second = replay.grant(), replay.grant()
    with pytest.raises(ValueError, match="expected 0, the oldest grant"):
        replay.commit(second)
    replay.revoke()
    with pytest.raises(ValueError, match="expected None"):
        replay.commit(0)


def test_equal_seeds_sample_equal_windows():
    one, two = make_replay(), make_replay()
    fill(one, 7)
    fill(two, 7)
    assert torch.equal(one.sample(64, LENGTH)["reward"], two.sample(64, LENGTH)["reward"])


def test_only_the_given_environments_are_sampled():
    replay = make_replay(columns=[0, 2])
    fill(replay, 6)
    envs = (replay.sample(500, LENGTH)["reward"] // 1000).long()
    assert envs.unique().tolist() == [0, 2] and 0.4 < (envs == 0).float().mean() < 0.6
    rows = replay.chunk(0)
    vectors = replay.vectors(rows, torch.device("cpu"))
    assert torch.equal(vectors["policy"], rows["obs", "policy"][:, [0, 2]]), "statistics of observations follow them"
