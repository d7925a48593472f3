"""Load the policy of a checkpoint and act with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint_choice import choose_checkpoints
from learner_proc.checkpoint import load_state
from shared.checkpoints import read_manifest
from shared.compose import load_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.model.policy import Policy
from shared.model.rssm import Belief
from shared.run_folder import RunFolder
from shared.stream import ObsSpec, StreamSpec

ENCODER = "encoder.entries."
FIRST_LAYER = ".layers.0.weight"
ACTOR_OUTPUT = "actor.layers."


@dataclass
class TrainedPolicy:
    """A frozen policy that acts without exploration noise and keeps a belief for every row.

    step: the gradient steps of its checkpoint. spec: the observations and actions of one environment.
    """

    policy: Policy
    spec: StreamSpec
    settings: Settings
    step: int
    belief: Belief | None = field(default=None, repr=False)
    action: Tensor | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.policy.rssm.input.weight.device

    def act(self, obs: Mapping[str, Any], reset: Any = None) -> Tensor:
        """Return the actions for the observations of E environments: tanh of the mean, (E, A) in [-1, 1].

        obs: arrays or tensors (E, *shape) as the simulator streams them, not normalised. reset: (E,) bool, where a new
        episode begins; None stands for nowhere. The first call, and a call with another E, begin new episodes anyway.
        """
        entries = {name: torch.as_tensor(entry).to(self.device) for name, entry in obs.items()}
        num_envs = len(next(iter(entries.values())))
        if self.belief is None or self.action is None or len(self.action) != num_envs:
            self.belief = self.policy.initial_belief(num_envs)
            self.action = torch.zeros(num_envs, self.spec.action_dim, device=self.device)
        none = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.action, self.belief = self.policy.evaluate(
            entries,
            self.belief,
            self.action,
            none if reset is None else torch.as_tensor(reset).to(self.device, torch.bool),
            eval_action="mean",
        )
        return self.action

    def blank(self) -> TrainedPolicy:
        """Return a policy of the same shape with fresh weights."""
        return TrainedPolicy(Policy(self.spec, self.settings.networks), self.spec, self.settings, 0)


def load_policy(run_dir: Path | str, checkpoint: str = "latest", *, device: str = "cpu") -> TrainedPolicy:
    """Return the policy of a run's checkpoint: "latest", "best" or the number of gradient steps.

    Raises: SettingError if there is no such run or checkpoint.
    """
    folder = RunFolder(Path(run_dir).expanduser())
    settings = load_settings(folder.config)
    (chosen,) = choose_checkpoints(folder, checkpoint)
    return read_policy(chosen, settings, device=device)


def read_policy(checkpoint: Path, settings: Settings, *, device: str = "cpu") -> TrainedPolicy:
    """Return the policy in the folder of a checkpoint.

    Raises: SettingError if it does not have the networks that the settings describe.
    """
    try:
        weights = _policy_weights(load_state(checkpoint)["gradient_step"])
        spec = stream_of(weights)
        policy = Policy(spec, settings.networks)
        policy.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds of errors for a damaged file and for other networks
        raise SettingError(
            f"the policy in {checkpoint} cannot be loaded: {str(error).splitlines()[0]:.200}; expected the networks "
            "that config.yaml of this run describes; restore both from a copy, or choose another --checkpoint"
        ) from error
    frozen = policy.to(device).eval().requires_grad_(False)
    return TrainedPolicy(frozen, spec, settings, read_manifest(checkpoint).step)


def stream_of(weights: Mapping[str, Tensor]) -> StreamSpec:
    """Return the observations and the action of one environment, read from the shapes of a policy's weights."""
    obs = {}
    for key, weight in weights.items():
        if key.startswith(ENCODER) and key.endswith(FIRST_LAYER):
            name = key.removeprefix(ENCODER).removesuffix(FIRST_LAYER)
            is_image = weight.dim() == 4  # of a convolution: (channels, colours, 4, 4)
            obs[name] = (
                ObsSpec((64, 64, weight.shape[1]), "uint8") if is_image else ObsSpec((weight.shape[1],), "float32")
            )
    outputs = [weight for key, weight in weights.items() if key.startswith(ACTOR_OUTPUT) and key.endswith(".bias")]
    return StreamSpec(1, obs, len(outputs[-1]) // 2)  # the last layer returns mean and std of every action value


def _policy_weights(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the state of `Policy` from the groups of tensors that the learner saves."""
    parts = {"normaliser": groups["normaliser"], "actor": groups["actor"]}
    weights = {f"{part}.{name}": tensor for part, group in parts.items() for name, tensor in group.items()}
    shared = {key: tensor for key, tensor in groups["world_model"].items() if key.startswith(("encoder.", "rssm."))}
    return weights | shared
