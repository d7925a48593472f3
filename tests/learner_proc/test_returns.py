"""The lambda-return against values worked out by hand and against TorchRL."""

import copy

import pytest
import torch

from learner_proc.returns import ReturnScale, lambda_return, trajectory_weight

REWARD = torch.tensor([[1.0, 2.0, 3.0]])
VALUE = torch.tensor([[10.0, 20.0, 30.0]])


def test_golden_returns_without_termination():
    discount = torch.full((1, 3), 0.9)
    returns = lambda_return(REWARD, discount, VALUE, lam=0.5)
    weight = trajectory_weight(discount, torch.ones(1))
    torch.testing.assert_close(returns, torch.tensor([[23.05, 29.0]]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(weight, torch.tensor([[1.0, 0.9]]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(-(weight * returns).mean(), torch.tensor(-24.575), rtol=1e-6, atol=0.0)


def test_golden_returns_stop_where_the_task_ends():
    returns = lambda_return(REWARD, torch.tensor([[0.9, 0.0, 0.9]]), VALUE, lam=0.5)
    torch.testing.assert_close(returns, torch.tensor([[10.9, 2.0]]), rtol=1e-6, atol=0.0)


def test_the_last_reward_is_not_used():
    discount = torch.full((1, 3), 0.9)
    changed = REWARD + torch.tensor([[0.0, 0.0, 1000.0]])
    assert torch.equal(
        lambda_return(changed, discount, VALUE, lam=0.5), lambda_return(REWARD, discount, VALUE, lam=0.5)
    )


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_the_lambda_return_equals_that_of_torchrl(lam):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    torch.manual_seed(0)
    reward, value = torch.randn(2, 6, 8)
    # TorchRL combines a reward with the value of the next step; here done is always False and gamma is one number
    oracle = functional.td_lambda_return_estimate(
        0.97, lam, value[:, 1:, None], reward[:, :-1, None], torch.zeros(6, 7, 1, dtype=torch.bool), time_dim=-2
    )
    ours = lambda_return(reward, torch.full((6, 8), 0.97), value, lam=lam)
    torch.testing.assert_close(ours, oracle.squeeze(-1), rtol=1e-4, atol=1e-5)


def test_the_lambda_return_is_the_mixture_of_all_n_step_returns():
    torch.manual_seed(0)
    reward, value, discount, lam, steps = torch.randn(1, 5), torch.randn(1, 5), torch.rand(1, 5), 0.7, 5
    r, v, c = reward[0].tolist(), value[0].tolist(), discount[0].tolist()

    def n_step(i: int, n: int) -> float:
        total, gate = 0.0, 1.0
        for j in range(i, i + n):
            total, gate = total + gate * r[j], gate * c[j]
        return total + gate * v[i + n]

    expected = []
    for i in range(steps - 1):
        last = steps - 1 - i
        mix = sum((1 - lam) * lam ** (n - 1) * n_step(i, n) for n in range(1, last))
        expected.append(mix + lam ** (last - 1) * n_step(i, last))
    torch.testing.assert_close(
        lambda_return(reward, discount, value, lam=lam), torch.tensor([expected]), rtol=1e-4, atol=1e-5
    )


def test_the_lambda_return_has_gradients_for_reward_discount_and_value():
    parts = [torch.rand(2, 4, requires_grad=True) for _ in range(3)]
    grads = torch.autograd.grad(lambda_return(*parts, lam=0.9).sum(), parts)
    assert all(grad[:, :-1].abs().min() > 0 for grad in grads[:2]) and grads[2][:, 1:].abs().min() > 0


def test_the_weight_falls_with_the_probability_of_an_end_and_is_zero_from_a_terminal_start():
    discount = torch.tensor([[0.5, 0.1, 0.7, 0.9], [0.5, 0.1, 0.7, 0.9]], requires_grad=True)
    weight = trajectory_weight(discount, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(weight, torch.tensor([[1.0, 0.5, 0.05], [0.0, 0.0, 0.0]]), rtol=1e-6, atol=0.0)
    assert not weight.requires_grad


@pytest.mark.parametrize("lam", [-0.1, 1.1])
def test_a_lambda_outside_zero_to_one_is_refused(lam):
    with pytest.raises(ValueError, match="lmbda"):
        lambda_return(REWARD, REWARD, VALUE, lam=lam)


def test_the_return_scale_is_the_running_range_of_the_5th_to_95th_percentile_but_at_least_one():
    scale = ReturnScale()
    returns = torch.arange(101.0).flip(0).view(1, 101)  # the 5th percentile is 5, the 95th is 95
    assert scale(returns).item() == pytest.approx(90.0)
    assert scale(returns * 2 + 7).item() == pytest.approx((0.99 * 90 + 180) / 1.99)
    assert ReturnScale()(returns / 1000).item() == 1.0


def test_outliers_beyond_the_percentiles_do_not_move_the_return_scale():
    returns = torch.arange(101.0)
    returns[0], returns[100] = -1e6, 1e6
    assert ReturnScale()(returns).item() == pytest.approx(90.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_returns_that_are_not_finite_leave_the_return_scale_as_it_was(bad):
    scale, returns = ReturnScale(), torch.arange(101.0)
    expected, before = scale(returns), copy.deepcopy(scale.state_dict())
    returns[50] = bad
    assert scale(returns).item() == expected.item() and scale.state_dict() == before
