"""The policy as the collector runs it: it acts for all environments and carries one belief per environment."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from collector_proc.graphed_policy import GraphedPolicy
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.model.policy import Policy
from shared.stream import StreamSpec, evaluation_columns


class ActingPolicy:
    """Chooses the actions of all E environments and keeps their beliefs from tick to tick.

    `eval_envs` of the environments, spread evenly, act without exploration noise. Actions are uniform random for the
    first `random_ticks`, and as long as no weights have been adopted.
    """

    def __init__(
        self,
        spec: StreamSpec,
        networks: NetworkSettings,
        collector: CollectorSettings,
        *,
        device: torch.device,
        seed: int,
        random_ticks: int,
    ) -> None:
        self.policy = Policy(spec, networks).to(device).requires_grad_(False)
        self.device, self.random_ticks = device, random_ticks
        self._shape = (spec.num_envs, spec.action_dim)
        self.evaluation = torch.zeros(spec.num_envs, dtype=torch.bool, device=device)
        columns = evaluation_columns(spec.num_envs, collector.eval_envs)
        self.evaluation[columns] = True
        self.belief = self.policy.initial_belief(spec.num_envs)
        self._act = partial(
            self.policy.act,
            noise_std=networks.exploration_noise,
            evaluation=torch.tensor(columns, dtype=torch.int64, device=device),
            eval_action=collector.eval_action,
        )
        use_graph = device.type == "cuda" and collector.cudagraphs
        self._graphed = GraphedPolicy(self._act, spec, self.belief) if use_graph else None
        self._generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)

    @property
    def uses_graph(self) -> bool:
        """Whether a CUDA graph chooses the actions."""
        return self._graphed is not None

    @property
    def is_random(self) -> bool:
        """Whether the next action belongs to the random ticks at the beginning of the run."""
        return self.random_ticks > 0

    @property
    def required_version(self) -> int:
        """The lowest policy version that may choose the next action: 0 during the random ticks, then 1."""
        return 0 if self.is_random else 1

    @torch.no_grad()
    def act(self, arrival: Arrival, prev_action: Tensor, *, version: int) -> Tensor:
        """Return the actions to execute after an arrival: (E, A) in [-1, 1], valid until the next call.

        prev_action: (E, A), as recorded in the arrival's row. version: of the adopted weights; 0 if the action must
        be random.
        """
        if self.is_random or version == 0:
            self.random_ticks -= 1
            return torch.rand(self._shape, device=self.device, generator=self._generator) * 2 - 1
        obs, reset = arrival.obs, arrival.is_first
        if arrival.acting_obs is not None:  # the simulator resets inside `step`: the next action starts a new episode
            obs, reset = arrival.acting_obs, arrival.is_first | arrival.is_last
        if self._graphed is not None:
            return self._graphed(obs, prev_action, reset)
        obs = {name: entry.to(self.device, non_blocking=True) for name, entry in obs.items()}
        action, self.belief = self._act(obs, self.belief, prev_action, reset.to(self.device))
        return action
