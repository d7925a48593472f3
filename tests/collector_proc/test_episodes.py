"""Returns, lengths and kinds of finished episodes, and the agent steps of each chunk."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from collector_proc.episodes import EpisodeTracker
from collector_proc.simulators.base import Arrival
from shared.messages import EPISODE_KINDS, MAX_EPISODES
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.evaluating import evaluations_in
from tests.fakes.late_copier import LateCopier

E = 3
SPEC = StreamSpec(E, {"policy": ObsSpec((1,), "float32")}, 1)


def arrival(*, first=(), last=(), reward: float = 1.0, acting: bool = False) -> Arrival:
    """Return an arrival whose flags are set for the listed environments; the reward is 0 at `is_first`."""
    is_first, is_last = (torch.tensor([env in listed for env in range(E)]) for listed in (first, last))
    obs = {"policy": torch.zeros(E, 1)}
    rewards = torch.where(is_first, 0.0, torch.full((E,), reward))
    return Arrival(obs, rewards, is_first, is_last, torch.zeros_like(is_last), acting_obs=obs if acting else None)


def track(ticks: list[Arrival], *, random=lambda tick: False, evaluation=(2,)) -> EpisodeTracker:
    """Return a tracker that has sent the numbers of one chunk."""
    evaluations = evaluations_in(evaluation, E, version=7)
    tracker = EpisodeTracker(SPEC, ticks=len(ticks), evaluations=evaluations)
    for tick, now in enumerate(ticks):
        tracker.add(now, random=random(tick))
    tracker.send()
    return tracker


EPISODES = [
    arrival(first=(0, 1, 2)),
    arrival(reward=2.0),
    arrival(reward=3.0, last=(0, 2)),
    arrival(reward=5.0, first=(0, 2)),
    arrival(reward=7.0, last=(1,)),
]


def test_returns_lengths_and_agent_steps_leave_out_resets():
    returns, lengths, kinds, versions, num_episodes, steps, eval_steps = track(EPISODES).take(100)
    assert returns == [5.0, 5.0, 17.0]  # environments 0 and 2 end at tick 2; environment 1 gets 2 + 3 + 5 + 7
    assert lengths == [2, 2, 4]
    assert [EPISODE_KINDS[kind] for kind in kinds] == ["train", "eval", "train"]
    assert versions == [0, 7, 0]
    assert num_episodes == 3 and steps == 5 * E - 5  # five of the rows are resets
    assert eval_steps == 3, "two of environment 2's rows are resets"


def test_if_the_simulator_resets_inside_step_every_row_but_the_very_first_is_an_agent_step():
    ticks = [
        arrival(first=(0, 1, 2), acting=True),
        arrival(last=(0, 1, 2), acting=True),
        arrival(first=(0, 1, 2), acting=True),
        arrival(last=(0, 1, 2), acting=True),
    ]
    finished = track(ticks).take(100)
    assert finished.steps == 3 * E and finished.lengths == [1, 1, 1, 2, 2, 2]


def test_a_diverged_row_finishes_no_episode():
    diverged = dataclasses.replace(
        arrival(reward=0.0, first=(1,), last=(0, 1)), diverged=torch.tensor([False, True, False])
    )
    ticks = [arrival(first=(0, 1, 2)), arrival(reward=2.0), diverged, arrival(reward=5.0, first=(0, 1))]
    finished = track([*ticks, arrival(reward=7.0, last=(1,))]).take(100)
    assert finished[:3] == ([2.0, 7.0], [2, 1], [0, 0]), "environment 1's first episode diverged and is not reported"


def test_an_episode_with_one_random_action_is_of_the_kind_random():
    kinds = track(EPISODES, random=lambda tick: tick == 1).take(100).kinds
    assert [EPISODE_KINDS[kind] for kind in kinds] == ["random"] * 3
    kinds = track(EPISODES, random=lambda tick: tick <= 0).take(100).kinds
    assert [EPISODE_KINDS[kind] for kind in kinds] == ["train", "eval", "train"], "no action leads to a reset row"


def test_numbers_that_are_gathered_during_a_copy_do_not_change_the_numbers_being_copied():
    copier = LateCopier()
    tracker = EpisodeTracker(SPEC, ticks=2, evaluations=evaluations_in((), E), copier=copier)
    tracker.add(arrival(first=(0, 1, 2)), random=False)
    tracker.add(arrival(last=(0,)), random=False)
    tracker.send()
    tracker.add(arrival(first=(0,), last=(1, 2)), random=False)
    copier.finish()
    assert tracker.take(10) == ([1.0], [1], [0], [0], 1, 3, 0)
    tracker.add(arrival(first=(1, 2)), random=False)
    tracker.send()
    copier.finish()
    assert tracker.take(10) == ([2.0, 2.0], [2, 2], [0, 0], [0, 0], 2, 3, 0)
    for _ in range(2):
        tracker.add(arrival(), random=False)
    tracker.send()
    copier.finish()
    assert tracker.take(10) == ([], [], [], [], 0, 2 * E, 0), (
        "the first chunk's buffer was emptied before it was used again"
    )
    assert tracker.take(10) == ([], [], [], [], 0, 0, 0) and copier.num_host_waits == 0


def send_many_ends(tracker: EpisodeTracker, spec: StreamSpec, chunk: int, ticks: int) -> None:
    """Send a chunk in which every environment ends an episode at every tick; its return is 100 * chunk + tick."""
    flag = torch.ones(spec.num_envs, dtype=torch.bool)
    obs = {"policy": torch.zeros(spec.num_envs, 1)}
    for tick in range(ticks):
        reward = torch.full((spec.num_envs,), 100.0 * chunk + tick)
        tracker.add(Arrival(obs, reward, flag, flag, torch.zeros_like(flag)), random=False)
    tracker.send()


@pytest.mark.parametrize("num_evaluating", [1, 16, 4095])
def test_if_more_episodes_end_than_a_commit_describes_it_describes_the_most_recent_and_counts_all(num_evaluating: int):
    spec, ticks = StreamSpec(4096, {"policy": ObsSpec((1,), "float32")}, 1), 2
    evaluations = evaluations_in(tuple(range(num_evaluating)), 4096, per_column=1000, version=7)
    tracker = EpisodeTracker(spec, ticks=ticks, evaluations=evaluations)
    for chunk in range(3):
        send_many_ends(tracker, spec, chunk, ticks)
        finished = tracker.take(MAX_EPISODES)
        assert finished.num_episodes == 8192 and len(finished.returns) <= MAX_EPISODES
        newest = {kind: value for value, kind in zip(finished.returns, finished.kinds, strict=True)}
        assert newest == {0: 100.0 * chunk + 1, 1: 100.0 * chunk + 1}, "both kinds are described"
        assert finished.kinds.count(1) == min(2 * num_evaluating, MAX_EPISODES // 2)
        assert all(value >= 100.0 * chunk for value in finished.returns), "no episode of an earlier chunk is described"
    assert tracker.take(MAX_EPISODES) == ([], [], [], [], 0, 0, 0), "no episode waits for a later call"


def test_described_episodes_keep_the_order_in_which_they_ended():
    returns = track(EPISODES).take(2).returns
    assert returns == [5.0, 17.0], "the evaluation episode, and the most recent of the others"
