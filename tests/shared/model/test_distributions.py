"""The plain functions against torch.distributions."""

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from shared.model.distributions import (
    bernoulli_nll,
    gaussian_kl,
    tanh_normal_entropy,
    tanh_normal_log_prob,
    tanh_normal_mode,
    unit_gaussian_nll,
)


def test_gaussian_kl_is_summed_over_the_last_dimension_in_the_direction_posterior_to_prior():
    torch.manual_seed(0)
    mean, prior_mean = torch.randn(2, 4, 3, 5)
    std, prior_std = torch.rand(2, 4, 3, 5) + 0.1
    oracle = kl_divergence(Independent(Normal(mean, std), 1), Independent(Normal(prior_mean, prior_std), 1))
    torch.testing.assert_close(gaussian_kl(mean, std, prior_mean, prior_std), oracle, rtol=1e-5, atol=1e-5)


def test_gaussian_kl_of_one_dimension_worked_by_hand():
    # ln(2/1) + (1 + 3^2) / (2 * 4) - 1/2
    kl = gaussian_kl(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]))
    torch.testing.assert_close(kl, torch.tensor(0.693147 + 1.25 - 0.5), rtol=1e-5, atol=1e-6)


def test_unit_gaussian_nll_sums_event_dimensions_only():
    torch.manual_seed(0)
    target, mean = torch.randn(2, 3, 4, 5, 6)
    for dims in (0, 1, 3):
        oracle = -Independent(Normal(mean, 1.0), dims).log_prob(target)
        torch.testing.assert_close(unit_gaussian_nll(target, mean, event_dims=dims), oracle, rtol=1e-5, atol=1e-4)


def test_bernoulli_nll_accepts_targets_between_zero_and_one():
    logit, target = torch.tensor([-30.0, -1.0, 0.5, 30.0]), torch.tensor([0.0, 0.99, 0.0, 0.99])
    oracle = -Bernoulli(logits=logit, validate_args=False).log_prob(target)
    torch.testing.assert_close(bernoulli_nll(logit, target), oracle, rtol=1e-5, atol=1e-6)


def test_tanh_normal_log_prob_is_the_density_in_action_space():
    torch.manual_seed(0)
    mean, std = torch.randn(7, 3), torch.rand(7, 3) + 0.2
    raw = mean + std * torch.randn(7, 3)
    oracle = Independent(TransformedDistribution(Normal(mean, std), [TanhTransform(cache_size=1)]), 1)
    torch.testing.assert_close(
        tanh_normal_log_prob(raw, mean, std), oracle.log_prob(torch.tanh(raw)), rtol=1e-4, atol=1e-4
    )


def test_the_mode_is_chosen_for_each_row_separately():
    torch.manual_seed(0)
    mean = torch.tensor([[-2.0, 2.0], [0.0, 0.0], [2.0, -2.0]])
    mode = tanh_normal_mode(mean, torch.full_like(mean, 0.01))
    torch.testing.assert_close(mode, torch.tanh(mean), rtol=0.0, atol=0.05)


def test_the_mode_of_a_wide_tanh_normal_is_near_one_end_and_not_tanh_of_the_mean():
    torch.manual_seed(0)
    mode = tanh_normal_mode(torch.full((50, 1), 0.3), torch.full((50, 1), 5.0))
    assert (mode.abs() > 0.99).all(), mode.abs().min()


def test_the_entropy_estimate_of_a_tanh_normal_is_right_on_average():
    torch.manual_seed(0)
    mean, std = torch.tensor([[0.3, -1.0]]), torch.tensor([[0.5, 1.5]])
    estimate = tanh_normal_entropy(mean, std, torch.randn(200_000, 2)).mean()
    density = TransformedDistribution(Normal(mean[0], std[0]), [TanhTransform(cache_size=1)])
    grid = torch.linspace(-1 + 1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)[:, None]
    log_prob = density.log_prob(grid.float()).double()
    exact = -(log_prob.exp() * log_prob).mean(0).sum() * 2
    torch.testing.assert_close(estimate.double(), exact, rtol=0.0, atol=0.02)


def test_more_entropy_needs_a_smaller_std_for_a_wide_actor_and_a_larger_one_for_a_narrow_actor():
    torch.manual_seed(0)
    for width, sign in ((5.0, -1.0), (0.2, 1.0)):  # 0.87 is the width closest to uniform actions
        std = torch.full((1, 1), width, requires_grad=True)
        (grad,) = torch.autograd.grad(tanh_normal_entropy(torch.zeros(1, 1), std, torch.randn(5000, 1)).mean(), std)
        assert grad.sign().item() == sign


def test_the_entropy_of_a_saturated_action_is_finite_and_has_a_gradient():
    mean = torch.tensor([[30.0]], requires_grad=True)
    entropy = tanh_normal_entropy(mean, torch.ones(1, 1), torch.zeros(1, 1))
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0.9189385 + 2 * (0.6931472 - 30), rel=1e-5)
    assert mean.grad is not None and mean.grad.item() == pytest.approx(-2.0)
