"""Episodes of a frozen policy: each environment plays the same number, and returns are those of the simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from collector_proc.simulators.base import Arrival
from launcher.trained.episodes import play_episodes
from launcher.trained.policy import TrainedPolicy, load_policy
from shared.errors import SettingError
from shared.stream import ObsSpec, StreamSpec

LENGTHS = torch.tensor([2, 3, 7])


class CountingSimulator:
    """Environment e has episodes of LENGTHS[e] steps with reward 10 * e + 1 in each step."""

    device, frames_per_step, num_diverged = "cpu", 1, 0

    def __init__(self, *, resets_inside: bool = False, diverges: bool = False) -> None:
        self.spec = StreamSpec(len(LENGTHS), {"policy": ObsSpec((3,), "float32")}, 1)
        self.age, self.over = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
        self.resets_inside, self.diverges, self.ticks = resets_inside, diverges, 0

    def reset(self) -> Arrival:
        self.over = torch.ones_like(self.over)
        return self._arrival(first=self.over, stepped=torch.zeros_like(self.over))

    def step(self, action: torch.Tensor) -> Arrival:
        self.ticks += 1
        return self._arrival(first=self.over, stepped=torch.ones_like(self.over) if self.resets_inside else ~self.over)

    def _arrival(self, *, first: torch.Tensor, stepped: torch.Tensor) -> Arrival:
        self.age = torch.where(first, 0, self.age) + stepped.long()
        reward = torch.where(stepped, 10.0 * torch.arange(3) + 1, 0.0)
        self.over = last = self.age >= LENGTHS
        obs = {"policy": torch.zeros(3, 3)}
        diverged = None
        if self.diverges and self.ticks == 2:  # the first episode of environment 0 is lost when it ends
            diverged = torch.tensor([True, False, False])
            first = first | diverged
        acting = obs if self.resets_inside else None
        return Arrival(obs, reward, first, last, torch.tensor([True, False, False]) & last, acting, diverged)

    def close(self) -> None:
        pass


@pytest.fixture
def policy(run_dir: Path) -> TrainedPolicy:
    return load_policy(run_dir)


@pytest.mark.parametrize("resets_inside", [False, True])
def test_short_episodes_do_not_count_more_often_than_long_ones(policy: TrainedPolicy, resets_inside: bool) -> None:
    episodes = play_episodes(CountingSimulator(resets_inside=resets_inside), policy, 7)
    found = sorted((episode.length, episode.total, episode.terminal) for episode in episodes)
    assert found == 3 * [(2, 2.0, True)] + 2 * [(3, 33.0, False)] + 2 * [(7, 147.0, False)]


def test_an_episode_that_diverged_is_played_again(policy: TrainedPolicy) -> None:
    episodes = play_episodes(CountingSimulator(diverges=True), policy, 3)
    assert sorted(episode.length for episode in episodes) == [2, 3, 7]


def test_a_task_that_never_ends_is_refused_with_the_setting_that_ends_it(policy: TrainedPolicy) -> None:
    with pytest.raises(SettingError, match=r"an episode has 5 agent steps .*expected at most 4; add env\.horizon=1000"):
        play_episodes(CountingSimulator(), policy, 3, max_steps=4)
