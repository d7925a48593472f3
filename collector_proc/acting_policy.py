"""The policy as the collector runs it: it acts for all environments and carries one belief per environment."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from collector_proc.evaluation import Evaluations
from collector_proc.graphed_policy import GraphedPolicy, captured
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.evaluation import EvaluationPlan
from shared.model.policy import Policy
from shared.model.rssm import Belief
from shared.stream import StreamSpec
from shared.weights import acting_tensors


class ActingPolicy:
    """Chooses the actions of all E environments and keeps their beliefs from tick to tick.

    `eval_envs` of the environments, spread evenly, act without exploration noise, and with a copy of the weights that
    changes only when an evaluation begins (`collector_proc.evaluation`). Actions are uniform random for the first
    `random_ticks`, and as long as no weights have been adopted.
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
        plan = EvaluationPlan.of(collector, spec.num_envs)
        self.evaluations = Evaluations(plan, spec.num_envs, device=device)
        self._frozen = copy.deepcopy(self.policy)  # acts in the evaluation columns
        self._weights, self._frozen_weights = (
            list(acting_tensors(policy).values()) for policy in (self.policy, self._frozen)
        )
        self._noise_std, self._eval_action = networks.exploration_noise, collector.eval_action
        self.belief = self.policy.initial_belief(spec.num_envs)
        use_graph = device.type == "cuda" and collector.cudagraphs
        # Its own, because a simulator in this process may seed torch's global one at every reset.
        self._generator = torch.Generator(device)
        capture = partial(captured, generators=(self._generator,))
        self._graphed = GraphedPolicy(self._act, spec, self.belief, capture=capture) if use_graph else None
        self._generator.manual_seed(seed)
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
        if self.evaluations.is_due(version):
            torch._foreach_copy_(self._frozen_weights, self._weights)  # pyright: ignore[reportPrivateImportUsage]
            # If the simulator resets inside `step`, the older weights have chosen the action that led to `is_first`.
            self.evaluations.begin(version, arrival.is_first if arrival.acting_obs is None else None)
        obs, reset = arrival.obs, arrival.is_first
        if arrival.acting_obs is not None:  # the simulator resets inside `step`: the next action starts a new episode
            obs, reset = arrival.acting_obs, arrival.is_first | arrival.is_last
        if self._graphed is not None:
            return self._graphed(obs, prev_action, reset)
        obs = {name: entry.to(self.device, non_blocking=True) for name, entry in obs.items()}
        action, self.belief = self._act(obs, self.belief, prev_action, reset.to(self.device))
        return action

    def _act(self, obs: dict[str, Tensor], belief: Belief, prev_action: Tensor, reset: Tensor) -> tuple[Tensor, Belief]:
        """Return actions (E, A) and beliefs: those of the policy, and in the evaluation columns those of its copy."""
        action, new = self.policy.explore(
            obs, belief, prev_action, reset, noise_std=self._noise_std, generator=self._generator
        )
        columns = self.evaluations.columns
        if not len(columns):
            return action, new
        own_action, own = self._frozen.evaluate(
            {name: entry[columns] for name, entry in obs.items()},
            Belief(*(part[columns] for part in belief)),
            prev_action[columns],
            reset[columns],
            eval_action=self._eval_action,
            generator=self._generator,
        )
        parts = (part.index_copy(0, columns, replaced) for part, replaced in zip(new, own, strict=True))
        return action.index_copy(0, columns, own_action), Belief(*parts)
