"""Episodes of a frozen policy in a simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from collector_proc.simulators.base import Arrival, Simulator
from launcher.trained.policy import TrainedPolicy
from shared.errors import SettingError

MAX_STEPS = 100_000  # of an episode: a task that never ends must not run forever


@dataclass(frozen=True)
class Episode:
    """One finished episode. length: in agent steps. terminal: the task ended; otherwise its time was over."""

    total: float  # the return
    length: int
    terminal: bool


def play_episodes(
    simulator: Simulator,
    policy: TrainedPolicy,
    num_episodes: int,
    *,
    rows: int | None = None,
    max_steps: int = MAX_STEPS,
    on_arrival: Callable[[Arrival], None] = lambda arrival: None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> list[Episode]:
    """Return finished episodes of the policy. Every environment plays the same number of them, or one more.

    If the first episodes that finish were taken, short ones would be too many. An episode whose state diverged does not
    count. rows: count the episodes of the first environments only; None counts all. on_arrival: is called with every
    arrival. on_episode: is called with every finished episode that counts.
    Raises: SettingError if an episode exceeds `max_steps`; SimulatorError.
    """
    num_envs = simulator.spec.num_envs
    quota = _quotas(num_envs, num_envs if rows is None else rows, num_episodes)
    total, length = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.int64)
    episodes: list[Episode] = []
    arrival = simulator.reset()
    resets_inside = arrival.acting_obs is not None
    on_arrival(arrival)
    while len(episodes) < num_episodes:
        obs, begins = arrival.obs, arrival.is_first
        if arrival.acting_obs is not None:  # the next action begins the new episode
            obs, begins = arrival.acting_obs, arrival.is_first | arrival.is_last
        arrival = simulator.step(policy.act(obs, begins).to(simulator.device))
        on_arrival(arrival)
        first, last = arrival.is_first.cpu(), arrival.is_last.cpu()
        total = torch.where(first, 0.0, total) + arrival.reward.cpu()
        length = torch.where(first, 0, length) + (torch.ones_like(length) if resets_inside else (~first).long())
        counted = last if arrival.diverged is None else last & ~arrival.diverged.cpu()
        for row in (counted & (quota > 0)).nonzero().flatten().tolist():
            quota[row] -= 1
            episodes.append(Episode(float(total[row]), int(length[row]), bool(arrival.is_terminal[row])))
            on_episode(episodes[-1])
        _check_length(int(length.max()), max_steps)
    return episodes


def _quotas(num_envs: int, num_counted: int, num_episodes: int) -> Tensor:
    """Return how many episodes each environment plays; only the first `num_counted` play any that count."""
    quotas = torch.zeros(num_envs, dtype=torch.int64)
    quotas[:num_counted] = num_episodes // num_counted
    quotas[: num_episodes % num_counted] += 1
    return quotas


def _check_length(length: int, max_steps: int) -> None:
    if length > max_steps:
        raise SettingError(
            f"an episode has {length} agent steps and has not ended; expected at most {max_steps}; "
            "add env.horizon=1000 to end episodes after 1000 agent steps"
        )
