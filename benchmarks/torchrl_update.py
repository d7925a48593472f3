"""TorchRL's Dreamer V1 update, built from TorchRL's own modules and losses as its recipe builds it.

Only benchmarks use it. The wiring (keys, distributions, three optimisers with one backward each) follows pytorch/rl,
sota-implementations/dreamer, for state observations. The sizes are the recipe's, or match ours layer by layer.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (TorchRL's annotations do not allow the arguments that its own recipe passes)

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its C extension was built for another torch version; it is not used here
    from torchrl._utils import compile_with_warmup
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs.model_based.dreamer import DreamerEnv
    from torchrl.modules import (
        MLP,
        DreamerActor,
        IndependentNormal,
        RSSMPosterior,
        RSSMPrior,
        RSSMRollout,
        SafeModule,
        SafeProbabilisticModule,
        SafeProbabilisticTensorDictSequential,
        SafeSequential,
        TanhNormal,
        WorldModelWrapper,
    )
    from torchrl.objectives.dreamer import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss

UNIT_NORMAL = {"scale": 1.0, "event_dim": 1}
EAGER_CALLS = 3  # the recipe's losses are compiled after so many calls
MODES = ("eager", "rssm", "losses", "rssm+losses")


@dataclass(frozen=True)
class Sizes:
    """Layers and widths. Depths count hidden layers."""

    obs: int = 48
    action: int = 12
    state: int = 30
    deter: int = 200
    hidden: int = 400
    embed: int = 1024
    encoder_activated: bool = False  # whether an activation follows the encoder's last layer
    decoder_depth: int = 2
    reward_depth: int = 2
    actor_depth: int = 3
    value_depth: int = 3
    horizon: int = 15


RECIPE = Sizes()
# matches our networks layer by layer
OURS = Sizes(embed=400, encoder_activated=True, decoder_depth=3, actor_depth=4)


@dataclass(frozen=True)
class Losses:
    """Detached scalars of one update."""

    kl: Tensor
    obs: Tensor
    reward: Tensor
    actor: Tensor
    value: Tensor


class TorchRLNetworks:
    """TorchRL's modules, wired as in its recipe. With `noise_key` the posterior reads its noise from the batch."""

    def __init__(self, sizes: Sizes, *, compile_rssm: bool = False, noise_key: bool = False) -> None:
        elu, width = nn.ELU, sizes.hidden
        feat = sizes.state + sizes.deter
        action_spec = Bounded(-1.0, 1.0, (sizes.action,))
        self.encoder = MLP(
            sizes.obs,
            sizes.embed,
            depth=2,
            num_cells=width,
            activation_class=elu,
            activate_last_layer=sizes.encoder_activated,
        )
        self.decoder = MLP(feat, sizes.obs, depth=sizes.decoder_depth, num_cells=width, activation_class=elu)
        self.reward = MLP(feat, 1, depth=sizes.reward_depth, num_cells=width, activation_class=elu)
        self.value = MLP(feat, 1, depth=sizes.value_depth, num_cells=width, activation_class=elu)
        self.prior = RSSMPrior(action_spec, sizes.deter, sizes.deter, sizes.state, action_dim=sizes.action)
        self.posterior = RSSMPosterior(sizes.deter, sizes.state, rnn_hidden_dim=sizes.deter, obs_embed_dim=sizes.embed)
        self.actor = DreamerActor(sizes.action, depth=sizes.actor_depth, num_cells=width, activation_class=elu)
        self.actor(torch.zeros(1, sizes.state), torch.zeros(1, sizes.deter))  # its first layer is lazy
        self.world_model = self._world_model(compile_rssm, noise_key)
        self.env = self._env(sizes, action_spec)
        self.actor_module = self._actor_module(sizes, action_spec)
        self.value_module = ProbabilisticTensorDictSequential(
            TensorDictModule(self.value, in_keys=["state", "belief"], out_keys=["loc"]),
            ProbabilisticTensorDictModule(
                in_keys=["loc"],
                out_keys=["state_value"],
                distribution_class=IndependentNormal,
                distribution_kwargs=UNIT_NORMAL,
            ),
        )

    def _world_model(self, compile_rssm: bool, noise_key: bool) -> WorldModelWrapper:
        noise = ["noise"] if noise_key else []
        rollout = RSSMRollout(
            TensorDictModule(
                self.prior,
                in_keys=["state", "belief", "action"],
                out_keys=[("next", "prior_mean"), ("next", "prior_std"), "_", ("next", "belief")],
            ),
            TensorDictModule(
                self.posterior,
                in_keys=[("next", "belief"), ("next", "encoded_latents"), *noise],
                out_keys=[("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")],
            ),
            compile_step=compile_rssm,
        )
        encoder = TensorDictModule(self.encoder, in_keys=[("next", "policy")], out_keys=[("next", "encoded_latents")])
        feat_keys = [("next", "state"), ("next", "belief")]
        decoder = _unit_normal(self.decoder, feat_keys, "loc", ("next", "reco_policy"))
        reward = _unit_normal(self.reward, feat_keys, ("next", "loc"), ("next", "reward"))
        return WorldModelWrapper(TensorDictSequential(encoder, rollout, decoder), reward)

    def _env(self, sizes: Sizes, action_spec: Bounded) -> DreamerEnv:
        feat_keys = ["state", "belief"]
        transition = SafeSequential(
            SafeModule(self.prior, in_keys=[*feat_keys, "action"], out_keys=["_", "_", *feat_keys])
        )
        reward = SafeProbabilisticTensorDictSequential(
            SafeModule(self.reward, in_keys=feat_keys, out_keys=["loc"]),
            SafeProbabilisticModule(
                in_keys=["loc"],
                out_keys=["reward"],
                distribution_class=IndependentNormal,
                distribution_kwargs=UNIT_NORMAL,
            ),
        )
        env = DreamerEnv(
            world_model=WorldModelWrapper(transition, reward),
            prior_shape=torch.Size([sizes.state]),
            belief_shape=torch.Size([sizes.deter]),
        )
        beliefs = {"state": Unbounded((sizes.state,)), "belief": Unbounded((sizes.deter,))}
        env.observation_spec = Composite(**beliefs)
        env.state_spec = Composite(**beliefs)
        env.action_spec = action_spec
        env.reward_spec = Unbounded((1,))
        return env

    def _actor_module(self, sizes: Sizes, action_spec: Bounded) -> Any:
        stats = Composite(loc=Unbounded((sizes.action,)), scale=Unbounded((sizes.action,)))
        return SafeProbabilisticTensorDictSequential(
            SafeModule(self.actor, in_keys=["state", "belief"], out_keys=["loc", "scale"], spec=stats),
            SafeProbabilisticModule(
                in_keys=["loc", "scale"],
                out_keys=["action"],
                default_interaction_type=InteractionType.RANDOM,
                distribution_class=TanhNormal,
                distribution_kwargs={"tanh_loc": True},
                spec=Composite(action=action_spec),
            ),
        )

    def to(self, device: torch.device) -> TorchRLNetworks:
        """Move every module to a device and return the networks."""
        for module in (self.world_model, self.env, self.actor_module, self.value_module):
            module.to(device)
        return self


def _unit_normal(net: nn.Module, in_keys: list, loc: Any, out: Any) -> ProbabilisticTensorDictSequential:
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=in_keys, out_keys=[loc]),
        ProbabilisticTensorDictModule(
            in_keys=[loc], out_keys=[out], distribution_class=IndependentNormal, distribution_kwargs=UNIT_NORMAL
        ),
    )


class TorchRLUpdate:
    """One update of world model, actor and value network, with zero_grad, backward, clip and step for each loss."""

    def __init__(
        self, sizes: Sizes = RECIPE, *, precision: str = "false", mode: str = "eager", device: torch.device
    ) -> None:
        """Compile what `mode` names (one of MODES) with the recipe's settings. `precision` is "false" or "bfloat16"."""
        assert mode in MODES and precision in ("false", "bfloat16"), (mode, precision)
        torch.manual_seed(0)
        self.networks = TorchRLNetworks(sizes, compile_rssm="rssm" in mode).to(device)
        self.device, self.precision = device, precision
        nets = self.networks
        # averages over all entries, as in the recipe for vector observations
        self.model_loss: Any = DreamerModelLoss(nets.world_model, global_average=True)
        self.model_loss.set_keys(pixels="policy", reco_pixels="reco_policy")
        actor_loss = DreamerActorLoss(nets.actor_module, nets.value_module, nets.env, imagination_horizon=sizes.horizon)
        actor_loss.make_value_estimator(gamma=0.99, lmbda=0.95)
        self.actor_loss: Any = actor_loss.to(device)
        self.value_loss: Any = DreamerValueLoss(nets.value_module, gamma=0.99)  # pyright: ignore[reportArgumentType]
        if "losses" in mode:
            self.actor_loss = compile_with_warmup(self.actor_loss, backend="inductor", warmup=EAGER_CALLS)
            self.value_loss = compile_with_warmup(self.value_loss, backend="inductor", warmup=EAGER_CALLS)
        fused = device.type == "cuda"
        self.optimizers = {
            name: (torch.optim.Adam(module.parameters(), lr=lr, fused=fused), list(module.parameters()))
            for name, module, lr in (
                ("model", nets.world_model, 6e-4),
                ("actor", nets.actor_module, 8e-5),
                ("value", nets.value_module, 8e-5),
            )
        }

    def __call__(self, batch: TensorDict) -> Losses:
        """Do one update. Shapes: batch (B, L) in the keys of `to_torchrl`."""
        torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            model, replayed = self.model_loss(batch)
        self._apply("model", model["loss_model_kl"] + model["loss_model_reco"] + model["loss_model_reward"])
        torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            actor, imagined = self.actor_loss(replayed.reshape(-1))
        self._apply("actor", actor["loss_actor"])
        torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            value, _ = self.value_loss(imagined)
        self._apply("value", value["loss_value"])
        parts = (model["loss_model_kl"], model["loss_model_reco"], model["loss_model_reward"])
        return Losses(*(part.detach() for part in (*parts, actor["loss_actor"], value["loss_value"])))

    def _apply(self, name: str, loss: Tensor) -> None:
        optimizer, params = self.optimizers[name]
        optimizer.zero_grad()
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 100.0)
        optimizer.step()

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.precision == "false":
            yield
            return
        with torch.autocast(self.device.type, torch.bfloat16):
            yield


def to_torchrl(batch: TensorDict, sizes: Sizes) -> TensorDict:
    """Return our batch of windows in TorchRL's keys: row t's observation and reward follow action t ("next").

    The stored beliefs are zero, as ours are at the start of a window.
    """
    lead, device = batch.shape, batch.device
    return TensorDict(
        {
            "action": batch["action"],
            "state": torch.zeros(*lead, sizes.state, device=device),
            "belief": torch.zeros(*lead, sizes.deter, device=device),
            "next": TensorDict({"policy": batch["obs", "policy"], "reward": batch["reward"][..., None]}, lead),
        },
        lead,
        device=device,
    )
