"""Check that the compared updates compute the same losses, as far as both define them alike.

TorchRL's modules get our weights, the same posterior noise, and our lower bound of standard deviations (softplus + 0.1,
where TorchRL clamps softplus at 0.1). Then three losses are the same mathematics: reconstruction, reward and KL; so is
the gradient of their sum. TorchRL's squared error is twice our negative log-likelihood minus a constant, and its
reconstruction loss is a sum over the batch; both differences are removed here. The behaviour losses are not compared,
because TorchRL sums one-step returns of sampled rewards and values over the horizon.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_cases import OBS_DIM, OBS_NAME, our_step, settings_for, synthetic_batch
from benchmarks.torchrl_update import DreamerModelLoss, Sizes, TorchRLNetworks, to_torchrl
from learner_proc.gradient_step import GradientStep
from shared import metrics
from shared.model.distributions import HALF_LOG_TAU
from shared.model.rssm import MIN_STOCH_STD

RTOL = 1e-4  # the two sides sum float32 values in different orders
FRAMES = 100
SEED = 1
# One rounding to bfloat16 (8 bits) is an error of 0.4 %. Losses average many of them, gradient norms fewer.
FAST_RTOL = {
    metrics.LOSS_MODEL: 0.01,
    metrics.LOSS_VALUE: 0.02,
    metrics.LOSS_ACTOR: 0.05,
    metrics.GRAD_NORM_MODEL: 0.03,
    metrics.GRAD_NORM_ACTOR: 0.1,
    metrics.GRAD_NORM_VALUE: 0.05,
}


class SoftplusPlusFloor(nn.Module):
    """Turns a layer's output into mean and standard deviation with our lower bound."""

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation."""
        mean, raw_std = raw.chunk(2, -1)
        return mean, F.softplus(raw_std) + MIN_STOCH_STD


def with_torchrl(*, device: torch.device, tiny: bool = False, frames: int = FRAMES) -> dict[str, Any]:
    """Compare our losses with TorchRL's in float32, and return both values and the relative difference of each.

    TorchRL's values are converted to our units. Our side is a whole gradient step, as in training; the first random
    numbers that it draws are the posterior's noise (L, B, S).
    """
    settings = settings_for(frames, tiny=tiny)
    settings.optimization.free_nats = 0.0
    step = our_step(settings, device=device)
    batch = synthetic_batch(frames, device=device)
    torch.manual_seed(SEED)
    noise = torch.randn(batch.shape[1], batch.shape[0], step.policy.rssm.stoch_dim, device=device)
    theirs = _their_terms(step, batch, noise)  # copies our weights, so it runs before the step changes them
    torch.manual_seed(SEED)
    numbers = step(batch).to_host()
    ours = {
        "reconstruction": numbers[metrics.LOSS_OBS] - OBS_DIM * HALF_LOG_TAU,
        "reward": numbers[metrics.LOSS_REWARD] - HALF_LOG_TAU,
        "kl": numbers[metrics.KL],
        "gradient norm": numbers[metrics.GRAD_NORM_MODEL],
    }
    return {"frames": frames, "terms": [_term(name, ours[name], theirs[name], RTOL) for name in ours]}


def fast_against_plain(
    *, device: torch.device, compiled: bool = True, tiny: bool = False, frames: int = FRAMES
) -> dict[str, Any]:
    """Compare our compiled bfloat16 losses with uncompiled float32, on the same weights, batch and noise."""
    batch = synthetic_batch(frames, device=device)
    results = []
    for precision, fast in (("false", False), ("bfloat16", compiled)):
        step = our_step(settings_for(frames, precision=precision, compiled=fast, tiny=tiny), device=device)
        torch.manual_seed(SEED)
        results.append(step(batch).to_host())
    plain, fast = results
    terms = [_term(metric.name, plain[metric], fast[metric], rtol) for metric, rtol in FAST_RTOL.items()]
    return {"frames": frames, "compiled": compiled, "terms": terms}


def _term(name: str, ours: float, other: float, tolerance: float) -> dict[str, Any]:
    difference = abs(ours - other) / max(abs(ours), 1e-12)
    agrees = difference <= tolerance
    return {
        "name": name,
        "ours": ours,
        "other": other,
        "difference": difference,
        "tolerance": tolerance,
        "agrees": agrees,
    }


def _their_terms(step: GradientStep, batch: Any, noise: Tensor) -> dict[str, float]:
    sizes = sizes_of(step)
    networks = TorchRLNetworks(sizes, noise_key=True)
    copy_weights(step, networks)
    networks.prior.rnn_to_prior_projector[-1] = SoftplusPlusFloor()
    networks.posterior.obs_rnn_to_post_projector[-1] = SoftplusPlusFloor()
    networks.to(noise.device)
    loss = DreamerModelLoss(networks.world_model, free_nats=0, delayed_clamp=True)
    loss.set_keys(pixels="policy", reco_pixels="reco_policy")
    data = to_torchrl(batch, sizes).set("noise", noise.transpose(0, 1))
    found, _ = loss(data)
    reconstruction = 0.5 * found["loss_model_reco"].sum() / batch.numel()
    reward, kl = 0.5 * found["loss_model_reward"].sum(), found["loss_model_kl"].sum()
    total = reconstruction + reward + kl
    grads = torch.autograd.grad(total, list(networks.world_model.parameters()))
    return {
        "reconstruction": reconstruction.item(),
        "reward": reward.item(),
        "kl": kl.item(),
        "gradient norm": torch.nn.utils.get_total_norm(grads).item(),
    }


def sizes_of(step: GradientStep) -> Sizes:
    """Return the sizes that TorchRL's networks need to match a gradient step on vector observations."""
    rssm, encoder, spec = step.policy.rssm, step.policy.encoder, step.spec
    hidden = step.critic.layers[0].out_features
    assert isinstance(hidden, int)
    return Sizes(
        obs=spec.obs[OBS_NAME].shape[0],
        action=spec.action_dim,
        state=rssm.stoch_dim,
        deter=rssm.deter_dim,
        hidden=hidden,
        embed=encoder.embed_dim,
        encoder_activated=True,
        decoder_depth=3,
        actor_depth=4,
    )


@torch.no_grad()
def copy_weights(step: GradientStep, networks: TorchRLNetworks) -> None:
    """Copy our weights into TorchRL's modules, layer by layer, and check every shape."""
    rssm, model, theirs = step.policy.rssm, step.world_model, networks
    _copy_linears(step.policy.encoder, theirs.encoder)
    _copy_linears(model.decoder, theirs.decoder)
    _copy_linears(model.reward, theirs.reward)
    _copy_linears(step.policy.actor, theirs.actor)
    _copy_linears(step.critic, theirs.value)
    _copy_linears(nn.Sequential(rssm.input), theirs.prior.action_state_projector)
    _copy_linears(nn.Sequential(rssm.prior_hidden, rssm.prior_out), theirs.prior.rnn_to_prior_projector)
    joint = nn.Linear(rssm.deter_dim + rssm.posterior_embed.in_features, rssm.deter_dim)
    joint.weight.copy_(torch.cat([rssm.posterior_deter.weight, rssm.posterior_embed.weight], 1))
    joint.bias.copy_(rssm.posterior_embed.bias)
    _copy_linears(nn.Sequential(joint, copy.deepcopy(rssm.posterior_out)), theirs.posterior)
    cell = theirs.prior.rnn
    for name, layer in (("ih", rssm.gru.input), ("hh", rssm.gru.recurrent)):
        getattr(cell, f"weight_{name}").copy_(layer.weight)
        getattr(cell, f"bias_{name}").copy_(layer.bias)


def _copy_linears(source: nn.Module, target: nn.Module) -> None:
    """Copy every linear layer in order; both sides must have the same number of layers and the same shapes."""
    pairs = zip(*([m for m in side.modules() if isinstance(m, nn.Linear)] for side in (source, target)), strict=True)
    for ours, theirs in pairs:
        assert ours.weight.shape == theirs.weight.shape, (ours.weight.shape, theirs.weight.shape)
        theirs.load_state_dict(ours.state_dict())
