"""One update of world model, actor and critic: three losses from the same parameters, then three Adam steps.

It computes what `learner_proc.plain_step` computes, faster. Cells are unrolled by `learner_proc.scan`, heads are
evaluated by `learner_proc.slopes`, and both pass through `learner_proc.compiling`. docs/faster.md explains why.

Nothing here waits for the device. Skipping a bad step, changing a loss scale and gathering metrics all happen on the
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learner_proc import snapshot
from learner_proc.behavior import ActorLoss, Behavior, CriticLoss
from learner_proc.behavior_gradients import BehaviorGradients
from learner_proc.cells import ImagineScan, ObserveScan
from learner_proc.compiling import compiler
from learner_proc.heads import CRITIC_LAYERS, ScalarHead
from learner_proc.imagination import Imagination, Imagined, entropy_and_std, frozen_view, random_subset
from learner_proc.numbers import Numbers
from learner_proc.optimiser import Optimiser
from learner_proc.snapshot import Groups
from learner_proc.world_model import ModelLoss, WorldModel
from shared import metrics
from shared.metrics import Metric
from shared.model.policy import Policy
from shared.model.rssm import Belief

if TYPE_CHECKING:
    from tensordict import TensorDict

    from shared.config import Settings
    from shared.stream import StreamSpec

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "false": None}
NORMALISER = "normaliser"  # the group of the running statistics in a snapshot
SCALE_GROUP = "loss_scale_"  # groups of a snapshot that only float16 has, so a run may resume in another precision


class GradientStep:
    """The learner's algorithm: owns every network and optimiser, and turns one batch into one update."""

    policy: Policy

    def __init__(self, spec: StreamSpec, settings: Settings, *, device: torch.device) -> None:
        """Create networks and optimisers on `device` from torch's global generator.

        Raises: ValueError if an observation entry is neither a 64x64 image nor a vector.
        """
        networks, optimization = settings.networks, settings.optimization
        self.spec, self._device, self._options = spec, device, optimization
        self.policy = Policy(spec, networks).to(device)
        self.world_model = WorldModel(spec, settings, self.policy).to(device)
        self.critic = ScalarHead(self.policy.rssm.feat_dim, CRITIC_LAYERS, networks).to(device)
        rates = {"model": optimization.world_model_lr, "actor": optimization.actor_lr, "value": optimization.value_lr}
        modules = {"model": self.world_model, "actor": self.policy.actor, "value": self.critic}
        self._dtype = AUTOCAST_DTYPES[optimization.autocast]
        compiled, dtype = compiler(optimization.compile, device), self._dtype or torch.float32
        adam = {"eps": optimization.adam_eps, "clip": optimization.grad_clip, "compiled": compiled}
        scaled = optimization.autocast == "float16"
        self._optimisers = {
            name: Optimiser(list(module.parameters()), lr=rates[name], scaled=scaled, **adam)
            for name, module in modules.items()
        }
        self._normalise, self._summarise = compiled(self.policy.normaliser), compiled(entropy_and_std)
        self._embed, self._model_loss = compiled(self.world_model.embed), compiled(self.world_model.loss)
        frozen_rssm = frozen_view(self.policy.rssm)
        self._imagination = Imagination(
            frozen_rssm,
            self.policy.actor,
            entropy_gradient=optimization.entropy_scale > 0,
            log_prob=optimization.actor_gradient != "dynamics",
        )
        self._observe_scan = ObserveScan(self.policy.rssm, dtype=dtype, compiled=compiled)
        self._imagine_scan = ImagineScan(self._imagination, dtype=dtype, compiled=compiled)
        self._behavior = Behavior(self.world_model.reward, self.world_model.cont, self.critic, optimization)
        self._behavior_gradients = BehaviorGradients(self._behavior, self._optimisers, dtype=dtype, compiled=compiled)

    def __call__(self, batch: TensorDict) -> Numbers:
        """Update world model, actor and critic once, and return what the step measured. Does not synchronise.

        Shapes: batch [B, L] in the arrival layout of `shared.stream`.
        """
        autocast = torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None, cache_enabled=False)
        # Disable autograd's threads: a compiled backward runs Python code, and the learner must have one Python thread.
        with autocast, torch.autograd.set_multithreading_enabled(False):
            model, beliefs = self._learn_model(batch)
            start, terminal = self._choose_starts(beliefs, batch["is_terminal"].reshape(-1))
            imagined = self._imagine(start)
            behavior = self._behavior_gradients(imagined, terminal, start)
            # Take all gradients before any update, so that all of them are computed with the same parameters.
            optimiser = self._optimisers["model"]
            model_grads = list(torch.autograd.grad(optimiser.scaled(model.total), optimiser.params))
        grads = {"model": model_grads, "actor": behavior.actor_grads, "value": behavior.critic_grads}
        applied = {name: self._optimisers[name].apply(grads[name]) for name in grads}
        self._behavior.update_slow_critic(applied["value"][1])
        losses = _loss_numbers(model, imagined, behavior.actor, behavior.critic)
        return Numbers.of(losses | _gradient_numbers(applied, self._options.grad_clip))

    def _learn_model(self, batch: TensorDict) -> tuple[ModelLoss, Belief]:
        """Return the world model's loss and its posterior beliefs (B * L, ...), detached, as starts of imagination."""
        num_sequences, length = batch["reward"].shape
        obs = self._normalise({name: batch["obs", name] for name in sorted(self.spec.obs)})
        noise = torch.randn(length, num_sequences, self.policy.rssm.stoch_dim, device=self._device)
        posterior = self.world_model.observe(
            obs, batch["action"], batch["is_first"], noise, scan=self._observe_scan, embed=self._embed
        )
        loss = self._model_loss(obs, posterior, batch["reward"], batch["is_terminal"])
        return loss, Belief(*(part.detach().flatten(0, 1) for part in posterior.belief))

    def _choose_starts(self, beliefs: Belief, terminal: Tensor) -> tuple[Belief, Tensor]:
        """Return N of the beliefs and their terminal flags: all of them, or a new random subset."""
        count = self._options.imagination_starts
        if count is None:
            return beliefs, terminal
        chosen = random_subset(terminal.shape[0], count, self._device)
        return Belief(*(part[chosen] for part in beliefs)), terminal[chosen]

    def _imagine(self, start: Belief) -> Imagined:
        lead = (self._options.imagination_horizon, start.deter.shape[0])
        action_noise = torch.randn(*lead, self.spec.action_dim, device=self._device)
        noise = torch.randn(*lead, self.policy.rssm.stoch_dim, device=self._device)
        return self._imagination.imagine(start, action_noise, noise, scan=self._imagine_scan, summarise=self._summarise)

    def observe_statistics(self, obs: dict[str, Tensor]) -> None:
        """Update the normaliser with new rows (K, E, *shape). Each row must be given once; images are ignored."""
        self.policy.normaliser.update(obs)

    def tensors(self) -> Groups:
        """Return every tensor of the learner's state, in named groups: the live tensors, not copies."""
        modules: dict[str, nn.Module] = {
            NORMALISER: self.policy.normaliser,
            "world_model": self.world_model,
            "actor": self.policy.actor,
            "critic": self.critic,
        } | self._behavior.state()
        groups = {name: dict(module.state_dict()) for name, module in modules.items()}
        groups |= {f"adam_{name}": optimiser.tensors() for name, optimiser in self._optimisers.items()}
        scales = {f"{SCALE_GROUP}{name}": optimiser.loss_scale for name, optimiser in self._optimisers.items()}
        return groups | {name: vars(scale) for name, scale in scales.items() if scale is not None}

    def state_dict(self) -> Groups:
        """Return a copy of parameters, normaliser, optimisers and loss scales. Later steps do not change it."""
        return snapshot.copied(self.tensors())

    def load_state_dict(self, state: Groups) -> None:
        """Copy a saved state into place, at the same addresses. Loss scales are copied if both sides have them.

        Raises: ValueError if other names or shapes differ from this learner's; nothing is copied then.
        """
        snapshot.restore(self.tensors(), state, optional=SCALE_GROUP)

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of each part; `model` is the sum of the world model's parts."""
        world_model = self.world_model
        parts: dict[str, nn.Module] = {
            "encoder": world_model.encoder,
            "decoder": world_model.decoder,
            "rssm": world_model.rssm,
            "reward": world_model.reward,
        }
        if world_model.cont is not None:
            parts["cont"] = world_model.cont
        parts |= {"model": world_model, "actor": self.policy.actor, "critic": self.critic}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _loss_numbers(model: ModelLoss, imagined: Imagined, actor: ActorLoss, critic: CriticLoss) -> dict[Metric, Tensor]:
    return {
        metrics.LOSS_MODEL: model.total,
        metrics.LOSS_OBS: model.obs,
        metrics.LOSS_REWARD: model.reward,
        metrics.LOSS_CONT: model.cont,
        metrics.KL: model.kl,
        metrics.KL_FREE: model.kl_free,
        metrics.LOSS_ACTOR: actor.total,
        metrics.LOSS_VALUE: critic.total,
        metrics.IMAGINED_RETURN: actor.target.mean(),
        metrics.IMAGINED_REWARD: actor.reward_mean,
        metrics.RETURN_SCALE: actor.return_scale,
        metrics.VALUE_MEAN: actor.value_mean,
        metrics.VALUE_BIAS: critic.bias,
        metrics.ACTOR_STD: imagined.actor_std,
        metrics.ACTOR_ENTROPY: imagined.entropy.detach().mean(),
    }


def _gradient_numbers(applied: dict[str, tuple[Tensor, Tensor]], clip: float) -> dict[Metric, Tensor]:
    """Shapes: applied holds, for each optimiser, the gradient norm () and whether the update was skipped, () bool."""
    norms = {name: norm for name, (norm, _) in applied.items()}
    return {
        metrics.GRAD_NORM_MODEL: norms["model"],
        metrics.GRAD_NORM_ACTOR: norms["actor"],
        metrics.GRAD_NORM_VALUE: norms["value"],
        metrics.CLIPPED_MODEL: norms["model"] > clip,
        metrics.CLIPPED_ACTOR: norms["actor"] > clip,
        metrics.CLIPPED_VALUE: norms["value"] > clip,
        metrics.SKIPPED: torch.stack([skipped for _, skipped in applied.values()]).any(),
    }
