"""One update of world model, actor and critic: three losses from the same parameters, then three Adam steps.

Nothing here waits for the device: bad steps are skipped, loss scales move and metrics are gathered on it. The only home
of torch.compile: the cells and heads are compiled, Python unrolls time around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner_proc.behavior import ActorLoss, Behavior, CriticLoss
from learner_proc.heads import CRITIC_LAYERS, ScalarHead
from learner_proc.imagination import Dreamer, Imagined, frozen_twin, random_subset
from learner_proc.numbers import Numbers
from learner_proc.optimiser import Optimiser
from learner_proc.scan import Scan
from learner_proc.slopes import HeadReader
from learner_proc.world_model import ModelLoss, WorldModel
from shared import metrics
from shared.metrics import Metric
from shared.model.policy import Policy
from shared.model.rssm import Belief

if TYPE_CHECKING:
    from tensordict import TensorDict

    from shared.config import CompileSettings, Settings
    from shared.stream import StreamSpec

Function = TypeVar("Function", bound=Callable[..., Any])

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "false": None}
SCALE_GROUP = "loss_scale_"  # of a snapshot: there with float16 alone, so that a run may resume in another precision


class GradientStep:
    """The learner's algorithm: owns every network and optimiser, turns one batch into one update."""

    policy: Policy

    def __init__(self, spec: StreamSpec, settings: Settings, *, device: torch.device) -> None:
        """Builds networks and optimisers on `device` from torch's global generator.

        Raises: ValueError if an observation entry is neither a 64x64 image nor a vector.
        """
        networks, optimization = settings.networks, settings.optimization
        self.spec = spec
        self.policy = Policy(spec, networks).to(device)
        self.world_model = WorldModel(spec, settings, self.policy).to(device)
        self.critic = ScalarHead(self.policy.rssm.feat_dim, CRITIC_LAYERS, networks).to(device)
        twin, bonus = frozen_twin(self.policy.rssm), optimization.entropy_scale > 0
        self._dreamer = Dreamer(twin, self.policy.actor, entropy_gradient=bonus)
        self._behavior = Behavior(self.world_model.reward, self.world_model.cont, self.critic, optimization)
        self._horizon, self._action_dim = optimization.imagination_horizon, spec.action_dim
        self._num_starts, self._grad_clip = optimization.imagination_starts, optimization.grad_clip
        self._obs_names = sorted(spec.obs)
        self._device, self._dtype = device, AUTOCAST_DTYPES[optimization.autocast]
        self._updaters = {
            "model": self._updater(self.world_model, optimization.world_model_lr, settings),
            "actor": self._updater(self.policy.actor, optimization.actor_lr, settings),
            "value": self._updater(self.critic, optimization.value_lr, settings),
        }
        compiled = compiler(optimization.compile, device)
        rssm, actor, dtype = self.policy.rssm, dense_layers(self.policy.actor), self._dtype or torch.float32
        observing = [rssm.input, rssm.gru.input, rssm.gru.recurrent, rssm.posterior_deter, rssm.posterior_out]
        dreaming = [*actor, twin.input, twin.gru.input, twin.gru.recurrent, twin.prior_hidden, twin.prior_out]
        self._observing = Scan(rssm.posterior_step, observing, learned=observing, dtype=dtype, compiled=compiled)
        self._dreaming = Scan(self._dreamer.step, dreaming, learned=actor, dtype=dtype, compiled=compiled)
        self._embed, self._model_loss = compiled(self.world_model.embed), compiled(self.world_model.loss)
        self._actor_loss, self._critic_loss = compiled(self._behavior.actor_loss), compiled(self._behavior.critic_loss)
        self._heads = HeadReader(dtype, compiled=compiled)

    @staticmethod
    def _updater(module: nn.Module, lr: float, settings: Settings) -> Optimiser:
        optimization = settings.optimization
        scaled = optimization.autocast == "float16"
        params = list(module.parameters())
        return Optimiser(params, lr=lr, eps=optimization.adam_eps, clip=optimization.grad_clip, scaled=scaled)

    def __call__(self, batch: TensorDict) -> Numbers:
        """Update world model, actor and critic once, and return what the step measured.

        Shapes: batch [B, L] in the arrival layout of `shared.stream`. Does not synchronise.
        """
        # without the second a GPU's backward runs in a thread of its own, and compiled backwards are Python: law 3
        autocast = torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None, cache_enabled=False)
        with autocast, torch.autograd.set_multithreading_enabled(False):
            model, beliefs = self._learn_model(batch)
            start, terminal = self._choose_starts(beliefs, batch["is_terminal"].reshape(-1))
            imagined = self._imagine(start)
            actor, actor_grads, critic, critic_grads = self._learn_behavior(imagined, terminal)
            # all gradients before any update: the three losses belong to the same parameters
            updater = self._updaters["model"]
            model_grads = list(torch.autograd.grad(updater.scaled(model.total), updater.params))
        grads = {"model": model_grads, "actor": actor_grads, "value": critic_grads}
        applied = {name: self._updaters[name].apply(grads[name]) for name in grads}
        self._behavior.update_slow_critic(applied["value"][1])
        losses = _loss_numbers(model, imagined, actor, critic)
        return Numbers.of(losses | _gradient_numbers(applied, self._grad_clip))

    def _learn_model(self, batch: TensorDict) -> tuple[ModelLoss, Belief]:
        """The world model's loss, and its posterior beliefs (B * L, ...), detached, as starts of imagination."""
        num_sequences, length = batch["reward"].shape
        obs = self.policy.normaliser({name: batch["obs", name] for name in self._obs_names})
        noise = torch.randn(length, num_sequences, self.policy.rssm.stoch_dim, device=self._device)
        posterior = self.world_model.observe(
            obs,
            batch["action"],
            batch["is_first"],
            noise,
            scan=self._observing,
            embed=self._embed,
        )
        loss = self._model_loss(obs, posterior, batch["reward"], batch["is_terminal"])
        return loss, Belief(*(part.detach().flatten(0, 1) for part in posterior.belief))

    def _choose_starts(self, beliefs: Belief, terminal: Tensor) -> tuple[Belief, Tensor]:
        """N of the beliefs and their terminal flags: all, or a new random subset of them."""
        if self._num_starts is None:
            return beliefs, terminal
        chosen = random_subset(terminal.shape[0], self._num_starts, self._device)
        return Belief(*(part[chosen] for part in beliefs)), terminal[chosen]

    def _imagine(self, start: Belief) -> Imagined:
        lead = (self._horizon, start.deter.shape[0])
        action_noise = torch.randn(*lead, self._action_dim, device=self._device)
        noise = torch.randn(*lead, self.policy.rssm.stoch_dim, device=self._device)
        return self._dreamer.imagine(start, action_noise, noise, scan=self._dreaming)

    def _learn_behavior(
        self, imagined: Imagined, terminal: Tensor
    ) -> tuple[ActorLoss, list[Tensor], CriticLoss, list[Tensor]]:
        """Both behaviour losses and their gradients, by one reading of each head on the imagined features."""
        actor_updater, critic_updater = self._updaters["actor"], self._updaters["value"]
        behavior, lead, feat = self._behavior, imagined.feat.shape[:2], imagined.feat.detach().flatten(0, 1)
        heads = behavior.heads()
        shared = behavior.slow_critic is None  # one reading of the critic serves both losses
        readings = [
            self._heads.read(head.layers, feat, learned=shared and name == "value") for name, head in heads.items()
        ]
        said = {name: one.value.view(lead).requires_grad_() for name, one in zip(heads, readings, strict=True)}
        actor = self._actor_loss(**said, start_terminal=terminal, entropy=imagined.entropy)
        # through the heads to the features, then through the imagined steps to the actor
        asked = [*said.values(), *([imagined.entropy] if imagined.entropy.requires_grad else [])]
        grads = torch.autograd.grad(actor_updater.scaled(actor.total), asked)
        feat_grad = self._heads.feat_gradient(readings, [grad.reshape(-1) for grad in grads[: len(readings)]])
        ends = [imagined.feat, imagined.entropy][: 1 + len(grads) - len(readings)]
        actor_grads = torch.autograd.grad(
            ends, actor_updater.params, [feat_grad.view_as(imagined.feat), *grads[len(readings) :]]
        )
        # the critic's own loss: of the same reading, unless a slow copy of it was read
        own = readings[list(heads).index("value")]
        if not shared:
            own = self._heads.read(self.critic.layers, feat, learned=True)
        value = own.value.view(lead)[:, :-1].detach().requires_grad_()
        critic = self._critic_loss(value, actor.target, actor.weight)
        (value_grad,) = torch.autograd.grad(critic_updater.scaled(critic.total), value)
        padded = F.pad(value_grad, (0, 1)).flatten()  # the last step has no target
        critic_grads = self._heads.weight_gradients(own, padded)
        return actor, list(actor_grads), critic, critic_grads

    def observe_statistics(self, obs: dict[str, Tensor]) -> None:
        """Take newly committed rows (K, E, *shape) into the normaliser, once each; nothing without vectors."""
        self.policy.normaliser.update(obs)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that makes up the learner's state, the live ones, in named groups."""
        modules: dict[str, nn.Module] = {
            "normaliser": self.policy.normaliser,
            "world_model": self.world_model,
            "actor": self.policy.actor,
            "critic": self.critic,
        } | self._behavior.state()
        groups = {name: dict(module.state_dict()) for name, module in modules.items()}
        groups |= {f"adam_{name}": updater.tensors() for name, updater in self._updaters.items()}
        scales = {f"{SCALE_GROUP}{name}": updater.loss_scale for name, updater in self._updaters.items()}
        return groups | {name: vars(scale) for name, scale in scales.items() if scale is not None}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """A snapshot of parameters, normaliser, optimisers and loss scales; later steps do not change it."""
        return {group: {k: v.clone() for k, v in tensors.items()} for group, tensors in self._tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy a snapshot into place; every address stays, so compiled code and graphs stay valid.

        Loss scales are taken over where both sides have them. Raises: ValueError if other names or shapes differ from
        this learner's; nothing is copied then.
        """
        live = self._tensors()
        both = live.keys() & state.keys()
        live, state = (
            {name: group for name, group in groups.items() if name in both or not name.startswith(SCALE_GROUP)}
            for groups in (live, state)
        )
        expected = {(group, k): tuple(v.shape) for group, tensors in live.items() for k, v in tensors.items()}
        found = {(group, k): tuple(v.shape) for group, tensors in state.items() for k, v in tensors.items()}
        if expected != found:
            group, name = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise ValueError(
                f"the saved learner does not fit: {group}/{name} has shape {found.get((group, name))}, "
                f"wanted {expected.get((group, name))}; resume with the settings the checkpoint was made with"
            )
        for group, tensors in live.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[group][name])

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of every part; `model` is the sum of the world model's parts."""
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
    """Shapes: applied holds the gradient norm () and whether the step was skipped, () bool, of each optimiser."""
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


def dense_layers(module: nn.Module) -> list[nn.Linear]:
    """Its linear layers in the order of their names, which is that of their use in a stack."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def compiler(settings: CompileSettings, device: torch.device) -> Callable[[Function], Function]:
    """What every cell and head passes through: torch.compile as set, or nothing."""
    if not settings.enabled:
        return lambda function: function
    options: dict[str, Any] | None = None
    if settings.backend == "inductor":
        import torch._inductor.config as inductor
        from torch.hub import tqdm  # pyright: ignore[reportPrivateImportUsage]

        inductor.compile_threads = 1  # a pool of compile workers would outlive the compilation
        tqdm.monitor_interval = 0  # and so would the thread that watches inductor's hidden progress bar
        # with small networks on the CPU a tenth of the step was Python between kernels; a graph has none
        options = {"cpp_wrapper": device.type == "cpu"}

    def compiled(function: Function) -> Function:
        made = torch.compile(function, fullgraph=True, dynamic=False, backend=settings.backend, options=options)
        return cast(Function, made)

    return compiled
