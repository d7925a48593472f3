"""What happens to numbers that are not finite or absurd when their chunk is committed, and what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner_proc.replay import Replay
from shared import metrics
from shared.model.layers import RunningNorm
from shared.stream import ObsSpec, StreamSpec, plan_layout

E, K, SIZE = 4, 50, 3
SPEC = StreamSpec(E, {"policy": ObsSpec((SIZE,), "float32"), "pixels": ObsSpec((64, 64, 1), "uint8")}, 2)
CPU = torch.device("cpu")


def make(max_deviation: float | None = 100.0) -> Replay:
    layout = plan_layout(SPEC, 4 * K)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    return Replay(slab, layout, ticks_per_chunk=K, seed=0, device=CPU, max_deviation=max_deviation)


def commit(replay: Replay, obs: Tensor, *, reward: Tensor | None = None, version: int = 1) -> dict[str, Tensor]:
    """Commit a chunk with these observations (K, E, SIZE) and return what the replay has of it."""
    row = replay.grant()
    rows: Any = replay.chunk(row)
    rows["obs", "policy"].copy_(obs)
    rows["reward"].copy_(torch.zeros(K, E) if reward is None else reward)
    rows["action"].fill_(0.5)
    rows["policy_version"].fill_(version)
    for flag in ("is_first", "is_last", "is_terminal"):
        rows[flag].fill_(False)
    replay.commit(row)
    return {"policy": rows["obs", "policy"].clone()} | {
        key: rows[key].clone() for key in ("reward", "action", "is_first", "is_last", "is_terminal")
    }


def noise(seed: int) -> Tensor:
    return torch.randn(K, E, SIZE, generator=torch.Generator().manual_seed(seed))


def counted(replay: Replay) -> dict[metrics.Metric, float]:
    return replay.row_bounds.numbers().to_host()


def visible(chunks: Iterable[Tensor]) -> Tensor:
    """Return the spread of ordinary numbers, of standard deviation 1, in the eyes of a normaliser that saw the chunks.

    Shapes: (SIZE,).
    """
    norm = RunningNorm(SIZE)
    for chunk in chunks:
        norm.update(chunk)
    return norm(noise(999)).flatten(0, 1).std(0)


def walk(seed: int) -> Tensor:
    """Return 40 chunks whose scale grows by a third with each: a policy that learns to move faster and faster."""
    return torch.stack([noise(seed + n) * 1.33**n for n in range(40)])


LEGITIMATE = {
    "noise": torch.stack([noise(n) for n in range(40)]),
    "a scale that grows by a third with each chunk": walk(0),
    "a drift without end": torch.stack([noise(n) + 5.0 * n for n in range(40)]),
    "heavy tails": torch.distributions.StudentT(3.0).sample((40, K, E, SIZE)),
    "a contact flag in one of 2000 rows": (torch.rand(40, K, E, SIZE) < 5e-4).float(),
    "a contact force of 300 in one of 30 rows": 300.0 * (torch.rand(40, K, E, SIZE) < 1 / 30),
    "a pressure near 100,000": 101_325 + torch.stack([noise(n) for n in range(40)]),
    "constants": torch.full((40, K, E, SIZE), -7.5),
    "two positions far apart": torch.where(torch.rand(40, K, E, SIZE) < 0.3, 1000.0, 0.0),
}


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_legitimate_numbers_stay_as_they_are_bit_for_bit(kind):
    torch.manual_seed(0)
    replay = make()
    for obs in LEGITIMATE[kind]:
        reward = obs[..., 0]
        kept = commit(replay, obs, reward=reward)
        assert torch.equal(kept["policy"], obs) and torch.equal(kept["reward"], reward)
    assert counted(replay)[metrics.CLIPPED_VALUES] == 0


@pytest.mark.parametrize("absurd", [1e25, -1e6, 3e38])
@pytest.mark.parametrize("when", [0, 3])
def test_an_absurd_observation_is_clipped_counted_and_named_and_its_dimension_stays_visible(absurd, when):
    replay, kept = make(), []
    for n in range(6):
        obs = noise(n)
        if n == when:
            obs[7, 2, 1] = absurd
        kept.append(commit(replay, obs)["policy"])
    assert kept[when][7, 2, 1].abs() <= 1010 and kept[when][7, 2, 1].sign() == math.copysign(1, absurd)
    assert counted(replay)[metrics.CLIPPED_VALUES] == 1
    assert replay.row_bounds.names() == [("policy[1]", 1, pytest.approx(abs(absurd), rel=1e-6))]
    others = torch.ones(K, E, SIZE, dtype=torch.bool)
    others[7, 2, 1] = False
    assert torch.equal(kept[when][others], noise(when)[others])
    assert visible(kept).min() > 0.5


def test_without_bounds_before_it_the_normaliser_itself_keeps_an_absurd_number_from_blinding_it():
    chunks = [noise(n) for n in range(6)]
    chunks[2][0, 0, 0], chunks[2][0, 0, 1], chunks[2][0, 0, 2] = 1e25, 1e6, math.nan
    assert visible(chunks).min() > 0.5


def test_a_merge_that_is_not_finite_leaves_the_statistics_as_they_were():
    norm = RunningNorm(SIZE)
    norm.update(noise(0))
    before = norm.mean.clone(), norm.var.clone()
    bad = noise(1)
    bad[0, 0] = math.nan
    norm.update(bad)
    assert torch.equal(norm.mean, before[0]) and torch.equal(norm.var, before[1])


@pytest.mark.parametrize(
    "kind", ["a scale that grows by a third with each chunk", "a contact force of 300 in one of 30 rows"]
)
def test_the_statistics_follow_signals_that_grow_or_have_heavy_tails(kind):
    torch.manual_seed(1)
    chunks = LEGITIMATE[kind]
    norm = RunningNorm(SIZE)
    for chunk in chunks:
        norm.update(chunk)
    true = chunks.flatten(0, 2).std(0)
    torch.testing.assert_close(norm.var.sqrt(), true, rtol=0.3, atol=0.0)


def test_a_signal_that_leaves_its_range_for_good_is_soon_followed():
    replay = make()
    for n in range(60):
        commit(replay, 0.01 * noise(n))
    seen = [commit(replay, 5000 + noise(100 + n))["policy"].mean().item() for n in range(6)]
    assert seen[0] == pytest.approx(1000, rel=0.01) and seen[-1] == pytest.approx(5000, abs=1)


def test_an_absurd_reward_is_clipped_and_a_rare_reward_of_a_thousand_is_not():
    replay = make()
    reward = torch.zeros(K, E)
    reward[3, 1] = 1000.0
    assert torch.equal(commit(replay, noise(0), reward=reward)["reward"], reward)
    reward[9, 0] = 1e30
    kept = commit(replay, noise(1), reward=reward)["reward"]
    assert kept[3, 1] == 1000 and 1000 <= kept[9, 0] <= 10_000
    assert [name for name, _, _ in replay.row_bounds.names()] == ["reward"]
    assert counted(replay)[metrics.REWARD_MAX] == pytest.approx(kept[9, 0].item())


@pytest.mark.parametrize("field", ["policy", "reward", "action"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_becomes_an_episode_of_zeros(field, value):
    replay = make()
    row = replay.grant()
    rows: Any = replay.chunk(row)
    rows["obs", "policy"].copy_(noise(0))
    for key in ("action", "reward"):
        rows[key].fill_(0.5)
    for flag in ("is_first", "is_last"):
        rows[flag].fill_(False)
    rows["is_terminal"].fill_(True)
    spoiled = rows["obs", "policy"] if field == "policy" else rows[field]
    spoiled[5, 1] = value
    replay.commit(row)
    assert not rows["obs", "policy"][5, 1].any() and rows["reward"][5, 1] == 0 and not rows["action"][5, 1].any()
    assert rows["is_first"][5, 1] and rows["is_last"][5, 1] and not rows["is_terminal"][5, 1]
    assert rows["is_first"][6, 1] and not rows["action"][6, 1].any(), "the next row begins an episode"
    assert rows["is_first"].sum() == 2 and rows["is_last"].sum() == 1 and rows["is_terminal"].sum() == K * E - 1
    assert rows["reward"][6, 1] == 0.5 and torch.equal(rows["obs", "policy"][6:], noise(0)[6:])
    found = counted(replay)
    assert (found[metrics.MASKED_ROWS], found[metrics.CLIPPED_VALUES]) == (1, 0)
    assert found[metrics.TERMINAL_ROWS] == K * E - 1


def test_after_a_masked_last_row_the_first_row_of_the_next_chunk_begins_an_episode():
    replay, obs = make(), noise(0)
    obs[-1, 3, 0] = math.nan
    commit(replay, obs)
    kept = commit(replay, noise(1))
    assert kept["is_first"].nonzero().tolist() == [[0, 3]]
    assert not commit(replay, noise(2))["is_first"].any()


def test_with_max_deviation_null_only_what_could_overflow_is_clipped():
    replay, obs = make(None), noise(0)
    obs[0, 0, 0], obs[1, 0, 0], obs[2, 0, 0] = 1e12, 1e25, math.nan
    kept = commit(replay, obs)["policy"]
    assert kept[0, 0, 0] == 1e12 and kept[1, 0, 0] == pytest.approx(1e15) and not kept[2, 0].any()


def test_a_restored_replay_bounds_as_before():
    replay = make()
    for n in range(2):
        commit(replay, 0.5 * noise(n))
    again = make()
    again.slab.copy_(replay.slab)
    again.restore(2 * K)
    low, high = (torch.tensor(limit) for limit in ([-1e9], [1e9]))
    for each in (replay, again):
        obs = noise(9)
        obs[:, :, 0] = 5000.0  # a whole chunk: its own median does not help
        kept = commit(each, obs)["policy"][:, :, 0]
        low, high = torch.maximum(low, kept.amin()), torch.minimum(high, kept.amax())
    torch.testing.assert_close(low, high, rtol=1e-4, atol=0.0)


def test_the_share_of_saturated_actions_is_that_of_the_policy_since_the_last_call():
    replay = make()
    row = replay.grant()
    rows: Any = replay.chunk(row)
    rows["action"].fill_(0.2)
    rows["action"][:10, :, 0] = -1.0
    rows["policy_version"].fill_(3)
    replay.commit(row)
    assert counted(replay)[metrics.SATURATED_ACTIONS] == pytest.approx(10 / (2 * K))
    commit(replay, noise(0), version=0)
    assert math.isnan(counted(replay)[metrics.SATURATED_ACTIONS]), "random actions do not count"
