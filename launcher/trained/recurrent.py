"""The policy as a pure function of tensors, and the description of its inputs and outputs.

    obs_<name>, belief, reset, noise   ->   action, next_belief

A belief is one vector that the caller only passes on: deter, stoch and the last action. Observations are normalised,
images are scaled and actions are brought to the simulator's range inside.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from collector_proc.simulators.base import ActionRange
from launcher.trained.policy import TrainedPolicy
from shared.model.rssm import Belief, feat

OUTPUTS = ("action", "next_belief")


class RecurrentPolicy(nn.Module):
    """The policy of a checkpoint as a pure function."""

    factor: Tensor
    offset: Tensor

    def __init__(self, trained: TrainedPolicy, actions: ActionRange | None) -> None:
        """actions: the simulator's range; with None, actions stay in [-1, 1]."""
        super().__init__()
        self.policy, self.entries = trained.policy, sorted(trained.spec.obs)
        size = trained.spec.action_dim
        low = torch.tensor([-1.0] * size if actions is None else actions.low)
        high = torch.tensor([1.0] * size if actions is None else actions.high)
        assert low.shape == high.shape == (size,), (low.shape, high.shape, size)
        self.register_buffer("factor", (high - low) / 2)
        self.register_buffer("offset", (high + low) / 2)

    @property
    def parts(self) -> dict[str, int]:
        """The parts of a belief vector in their order, with their sizes."""
        rssm = self.policy.rssm
        return {"deter": rssm.deter_dim, "stoch": rssm.stoch_dim, "last_action": self.policy.actor.action_dim}

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs in their order."""
        return [*map(obs_input, self.entries), "belief", "reset", "noise"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the action (N, A) in the simulator's units, and the next belief.

        Shapes: the inputs, in the order of `input_names`, are an entry (N, *shape) for each observation; the belief
        (N, D + S + A); reset (N,) bool; noise (N, S).
        """
        policy, (*obs, belief, reset, noise) = self.policy, inputs
        deter, stoch, last_action = belief.split(list(self.parts.values()), -1)
        share = policy.rssm.embed_share(policy.encoder(policy.normaliser(dict(zip(self.entries, obs, strict=True)))))
        new = policy.rssm.posterior_step(Belief(deter, stoch), last_action, share, reset[:, None], noise).belief
        action = torch.tanh(policy.actor(feat(new))[0])
        return action * self.factor + self.offset, torch.cat([new.deter, new.stoch, action], -1)


def obs_input(entry: str) -> str:
    """Return the name of the input for an observation entry: letters, digits and underscores, as in C++."""
    return "obs_" + re.sub(r"\W", "_", entry, flags=re.ASCII)


def describe(module: RecurrentPolicy, trained: TrainedPolicy, actions: ActionRange | None) -> dict[str, Any]:
    """Return names, order, shapes, types and units of inputs and outputs, and the environment, for policy.json."""
    env, size = trained.settings.env, sum(module.parts.values())
    images = "bytes 0..255, (height, width, channels)"
    inputs = [
        {
            "name": obs_input(name),
            "observation": name,
            "type": entry.dtype,
            "shape": ["batch", *entry.shape],
            "unit": images if entry.is_image else "as the simulator returns it, not normalised",
        }
        for name, entry in sorted(trained.spec.obs.items())
    ]
    noise = "standard normal numbers, drawn for every step as in training; or zeros, for a policy without randomness"
    inputs += [
        _port("belief", size, "what the last call returned as next_belief; anything at the first step of an episode"),
        {"name": "reset", "type": "bool", "shape": ["batch"], "unit": "true at the first step of an episode"},
        _port("noise", module.parts["stoch"], noise),
    ]
    limits = {"low": [-1.0] * trained.spec.action_dim, "high": [1.0] * trained.spec.action_dim}
    if actions is not None:
        limits = {"low": list(actions.low), "high": list(actions.high)}
    unit = "-1 to 1" if actions is None else "the simulator's own"
    begin = 0
    parts = []
    for name, width in module.parts.items():
        parts.append({"name": name, "begin": begin, "size": width})
        begin += width
    return {
        "format": 1,
        "gradient_steps": trained.step,
        "environment": {"backend": env.backend, "name": env.name, "task": env.task, "frame_skip": env.frame_skip},
        "inputs": inputs,
        "outputs": [
            {**_port("action", trained.spec.action_dim, unit), **limits},
            {**_port("next_belief", size, "the belief of the next call"), "parts": parts},
        ],
    }


def _port(name: str, size: int, unit: str) -> dict[str, Any]:
    return {"name": name, "type": "float32", "shape": ["batch", size], "unit": unit}
