"""Imagined against real returns: the critic's value of a recorded belief, and the rewards that were recorded after it.

The critic learns from imagination alone. If its values are far above the recorded returns of the same states, the actor
exploits errors of the model. A small difference is normal while the policy improves, because older and noisier policies
chose the recorded actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner_proc.diagnostics import MAX_CONTEXT
from learner_proc.numbers import Numbers
from shared.metrics import IMAGINED_VALUE, RECORDED_RETURN
from shared.model.rssm import feat

if TYPE_CHECKING:
    from tensordict import TensorDict

    from learner_proc.heads import ScalarHead
    from learner_proc.world_model import WorldModel
    from shared.config import OptimizationSettings
    from shared.model.layers import Normaliser


class ReturnCheck:
    """Mean value and mean recorded return of the same replayed states, for rows of metrics.jsonl."""

    metrics = (IMAGINED_VALUE, RECORDED_RETURN)

    def __init__(
        self, world_model: WorldModel, normaliser: Normaliser, critic: ScalarHead, optimization: OptimizationSettings
    ) -> None:
        self._world_model, self._normaliser, self._critic = world_model, normaliser, critic
        self._gamma, self._reward_scale = optimization.gamma, optimization.reward_scale

    @torch.no_grad()
    def features(self, batch: TensorDict) -> Tensor:
        """Return the features (B, L, F) of a batch [B, L], without noise."""
        num_windows, length = batch["reward"].shape
        obs = self._normaliser(batch.get("obs").to_dict())
        noise = torch.zeros(length, num_windows, self._world_model.rssm.stoch_dim, device=batch["reward"].device)
        return feat(self._world_model.observe(obs, batch["action"], batch["is_first"], noise).belief)

    @torch.no_grad()
    def __call__(self, batch: TensorDict, features: Tensor) -> Numbers:
        """Return both means over the windows in which no episode begins after row 0, or NaN. Does not synchronise.

        The state is the last row of the context. Its recorded return is the sum of the discounted rewards from this row
        to the row before the window's end, and of the critic's discounted value at the end.
        Shapes: batch [B, L] in the arrival layout of `shared.stream`; features (B, L, F), those of `features`.
        Units: scaled rewards.
        """
        reward, first = batch.get("reward"), batch.get("is_first")
        length = reward.shape[1]
        start = min(MAX_CONTEXT, length - 1) - 1
        states = torch.stack([features[:, start], features[:, -1]], 1)  # a list as index would copy it from the host
        value = self._critic(states)  # (B, 2); a value includes its own state's reward
        steps = length - 1 - start
        discount = torch.pow(self._gamma, torch.arange(steps, device=reward.device))
        recorded = (reward[:, start:-1] * self._reward_scale * discount).sum(1) + self._gamma**steps * value[:, 1]
        whole = ~first[:, 1:].any(1)
        both = torch.stack([value[:, 0], recorded], 1).masked_fill(~whole[:, None], 0.0)
        imagined, recorded = both.sum(0) / whole.sum()
        return Numbers.of({IMAGINED_VALUE: imagined, RECORDED_RETURN: recorded})
