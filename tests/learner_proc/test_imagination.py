"""Imagination: prior steps under the actor, and where gradients go."""

from functools import partial

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from learner_proc.imagination import Imagination, Imagined, frozen_view, random_subset
from learner_proc.scan import unroll
from shared.config import NetworkSettings
from shared.model.policy import Actor
from shared.model.rssm import RSSM, Belief, feat

N, H, A, S, D = 4, 5, 2, 3, 6


@pytest.fixture
def parts() -> tuple[RSSM, Actor]:
    torch.manual_seed(0)
    networks = NetworkSettings(state_dim=S, rssm_hidden_dim=D, hidden_dim=8, init_std=1.0)
    return RSSM(4, A, networks), Actor(S + D, A, networks)


def noises() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(H, N, A), torch.randn(H, N, S)


def start(requires_grad: bool = False) -> Belief:
    torch.manual_seed(2)
    return Belief(torch.randn(N, D, requires_grad=requires_grad), torch.randn(N, S, requires_grad=requires_grad))


def imagine(imagination: Imagination, begin: Belief, action_noise: torch.Tensor, noise: torch.Tensor) -> Imagined:
    return imagination.imagine(begin, action_noise, noise, scan=partial(unroll, imagination.step))


def test_imagination_is_h_prior_steps_under_the_actor_without_the_start(parts):
    rssm, actor = parts
    action_noise, noise = noises()
    imagined = imagine(Imagination(frozen_view(rssm), actor), start(), action_noise, noise)
    belief, features, stds = start(), [], []
    for i in range(H):
        mean, std = actor(feat(belief))
        belief = rssm.prior_step(belief, torch.tanh(mean + std * action_noise[i]), noise[i])
        features.append(feat(belief))
        stds.append(std)
    assert imagined.feat.shape == (N, H, S + D)
    torch.testing.assert_close(imagined.feat, torch.stack(features, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(imagined.actor_std, torch.stack(stds).mean(), rtol=1e-5, atol=1e-6)


def test_a_frozen_view_shares_storage_and_requires_no_gradient(parts):
    rssm, _ = parts
    view = frozen_view(rssm)
    for mine, original in zip(view.parameters(), rssm.parameters(), strict=True):
        assert mine.data_ptr() == original.data_ptr() and not mine.requires_grad and original.requires_grad
    with torch.no_grad():
        rssm.input.weight.fill_(3.25)
    assert (view.input.weight == 3.25).all()


def test_imagination_gives_gradient_to_the_actor_alone(parts):
    rssm, actor = parts
    begin = start(requires_grad=True)
    imagine(Imagination(frozen_view(rssm), actor), begin, *noises()).feat.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in actor.parameters())
    assert all(p.grad is None for p in [*rssm.parameters(), begin.deter, begin.stoch])


def test_the_actors_input_is_detached(parts):
    """The hook reads whether the actor's input requires a gradient, in every imagined step."""
    rssm, actor = parts
    imagination = Imagination(frozen_view(rssm), actor)
    seen = []
    actor.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    imagine(imagination, start(), *noises())
    assert seen == [False] * H


def test_the_gradient_of_an_early_action_passes_through_the_chain_of_states(parts):
    rssm, actor = parts
    action_noise, noise = noises()
    action_noise.requires_grad_()
    features = imagine(Imagination(frozen_view(rssm), actor), start(), action_noise, noise).feat
    (grad,) = torch.autograd.grad(features[:, -1].sum(), action_noise)
    assert grad.flatten(1).any(1).all()


def test_a_random_subset_has_distinct_numbers_with_equal_probability():
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(1000):
        chosen = random_subset(10, 3, torch.device("cpu"))
        assert chosen.shape == (3,) and len(set(chosen.tolist())) == 3
        counts[chosen] += 1
    assert counts.sum() == 3000 and (counts - 300).abs().max() < 60, counts  # 4 standard deviations


def test_a_subset_larger_than_the_whole_is_refused():
    with pytest.raises(AssertionError, match=r"\(11, 10\)"):
        random_subset(10, 11, torch.device("cpu"))


def test_the_entropy_of_a_step_is_minus_the_log_density_of_the_action_that_led_there(parts):
    rssm, actor = parts
    action_noise, noise = noises()
    imagined = imagine(Imagination(frozen_view(rssm), actor), start(), action_noise, noise)
    beliefs = torch.cat([feat(start())[:, None], imagined.feat], 1)
    for i in range(H):
        mean, std = actor(beliefs[:, i])
        density = TransformedDistribution(Normal(mean, std), [TanhTransform(cache_size=1)])
        expected = -density.log_prob(torch.tanh(mean + std * action_noise[i])).sum(-1)
        torch.testing.assert_close(imagined.entropy[:, i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_entropy_has_a_gradient_for_the_actor_only_with_a_bonus(parts, gradient):
    rssm, actor = parts
    entropy = imagine(Imagination(frozen_view(rssm), actor, entropy_gradient=gradient), start(), *noises()).entropy
    assert entropy.requires_grad == gradient
    if gradient:
        entropy[:, 0].sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in actor.parameters())
