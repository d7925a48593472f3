"""Losses of actor and critic: golden values, gradients, and the effect of the end of a task."""

from typing import Any

import pytest
import torch

from learner_proc.behavior import ActorLoss, Behavior, CriticLoss
from learner_proc.heads import ScalarHead
from shared.config import NetworkSettings, OptimizationSettings

N, H, F = 4, 3, 6
NO_END = torch.zeros(N, dtype=torch.bool)
NO_BONUS = torch.zeros(N, H)


class Column(torch.nn.Module):
    """A head whose output is one number of the feature, so that rewards, values and discounts are known."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.scale = index, torch.nn.Parameter(torch.ones(()))

    def forward(self, feat: torch.Tensor) -> torch.Tensor:
        return feat[..., self.index] * self.scale


def golden(cont: bool = False) -> tuple[Behavior, torch.Tensor]:
    heads = Column(0), Column(2) if cont else None, Column(1)
    behavior = Behavior(*heads, OptimizationSettings(gamma=0.9, lmbda=0.5))  # type: ignore[arg-type]
    logit = torch.logit(torch.tensor([0.9, 1e-12, 0.9]))
    return behavior, torch.stack([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]), logit], -1)[None]


def networks(cont: bool) -> tuple[Behavior, list[ScalarHead]]:
    torch.manual_seed(0)
    settings = NetworkSettings(hidden_dim=8)
    heads = [ScalarHead(F, layers, settings) for layers in (2, 3, 3)]
    return Behavior(heads[0], heads[1] if cont else None, heads[2], OptimizationSettings()), heads


def actor_loss(behavior: Behavior, features: torch.Tensor, terminal: torch.Tensor, entropy: torch.Tensor) -> ActorLoss:
    outputs = {name: head(features) for name, head in behavior.heads().items()}
    return behavior.actor_loss(**outputs, start_terminal=terminal, entropy=entropy)


def critic_loss(behavior: Behavior, features: torch.Tensor, actor: ActorLoss) -> CriticLoss:
    return behavior.critic_loss(behavior.critic(features[:, :-1].detach()), actor.target, actor.weight)


def test_golden_actor_and_critic_losses():
    behavior, features = golden()
    actor = actor_loss(behavior, features, torch.zeros(1, dtype=torch.bool), NO_BONUS[:1])
    torch.testing.assert_close(actor.total, torch.tensor(-24.575), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(actor.target, torch.tensor([[23.05, 29.0]]), rtol=1e-6, atol=0.0)
    assert (actor.reward_mean.item(), actor.value_mean.item()) == (2.0, 20.0)
    # the mean over two steps of 0.5 * 13.05^2 and 0.9 * 0.5 * 9^2, plus half log two pi times the weights 1 and 0.9
    critic = critic_loss(behavior, features, actor).total
    torch.testing.assert_close(critic, torch.tensor((85.15125 + 36.45 + 1.9 * 0.9189385) / 2), rtol=1e-6, atol=0.0)


def test_nothing_after_a_predicted_end_counts():
    behavior, features = golden(cont=True)
    actor = actor_loss(behavior, features, torch.zeros(1, dtype=torch.bool), NO_BONUS[:1])
    torch.testing.assert_close(actor.target, torch.tensor([[10.9, 2.0]]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(actor.weight, torch.tensor([[1.0, 0.9]]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("cont", "weight"), [(True, 0.0), (False, 1.0)])
def test_with_a_continue_head_a_start_where_the_task_ended_has_no_weight(cont, weight):
    behavior, features = golden(cont)
    actor = actor_loss(behavior, features, torch.ones(1, dtype=torch.bool), NO_BONUS[:1])
    assert actor.weight[0, 0].item() == weight
    assert (critic_loss(behavior, features, actor).total == 0).item() == (weight == 0)


@pytest.mark.parametrize("cont", [False, True])
def test_the_actor_loss_has_a_gradient_for_the_features_and_for_no_head(cont):
    behavior, heads = networks(cont)
    features = torch.randn(N, H, F, requires_grad=True)
    actor_loss(behavior, features, NO_END, NO_BONUS).total.backward()
    assert features.grad is not None and features.grad.any(-1).all()
    assert all(p.grad is None for head in heads for p in head.parameters())


@pytest.mark.parametrize("cont", [False, True])
def test_the_critic_loss_has_a_gradient_for_the_critic_alone(cont):
    behavior, (reward, cont_head, critic) = networks(cont)
    features = torch.randn(N, H, F, requires_grad=True)
    actor = actor_loss(behavior, features, NO_END, NO_BONUS)
    critic_loss(behavior, features, actor).total.backward()
    assert features.grad is None
    assert all(p.grad is None for head in (reward, cont_head) for p in head.parameters())
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters())


def test_the_actor_loss_has_the_gradient_that_the_original_heads_give():
    behavior, (reward, _, critic) = networks(cont=False)
    features = torch.randn(N, H, F, requires_grad=True)
    (ours,) = torch.autograd.grad(actor_loss(behavior, features, NO_END, NO_BONUS).total, features)
    r, v = reward(features), critic(features)
    second = r[:, 1] + 0.99 * v[:, 2]
    first = r[:, 0] + 0.99 * (0.05 * v[:, 1] + 0.95 * second)
    (oracle,) = torch.autograd.grad(-(first + 0.99 * second).mean() / 2, features)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-7)


def with_options(**options: Any) -> tuple[Behavior, torch.Tensor]:
    """Return a behaviour with options, and features with the rewards 1, 2, 3 and the values 10, 20, 30."""
    behavior = Behavior(Column(0), None, Column(1), OptimizationSettings(gamma=0.9, lmbda=0.5, **options))  # type: ignore[arg-type]
    return behavior, golden()[1]


def columns(behavior: Behavior) -> tuple[Column, Column]:
    """Return the critic and the slow critic."""
    live, slow = behavior.critic, behavior.slow_critic
    assert isinstance(live, Column) and isinstance(slow, Column)
    return live, slow


def test_the_entropy_of_an_action_has_the_weight_of_the_step_it_leads_to():
    behavior, features = with_options(entropy_scale=0.1)
    entropy = torch.tensor([[2.0, 3.0, 5.0]], requires_grad=True)
    actor = actor_loss(behavior, features, NO_END[:1], entropy)
    torch.testing.assert_close(actor.total, torch.tensor(-24.575 - 0.1 * (2.0 + 0.9 * 3.0) / 2), rtol=1e-6, atol=0.0)
    # The critic learns returns without the bonus.
    torch.testing.assert_close(actor.target, torch.tensor([[23.05, 29.0]]), rtol=1e-6, atol=0.0)
    (grad,) = torch.autograd.grad(actor.total, entropy)
    torch.testing.assert_close(grad, torch.tensor([[-0.05, -0.045, 0.0]]), rtol=1e-6, atol=0.0)


def test_returns_use_the_slow_critic_and_the_critic_itself_is_trained():
    behavior, features = with_options(slow_critic_decay=0.75)
    live, slow = columns(behavior)
    with torch.no_grad():
        live.scale.fill_(5.0)
    actor = actor_loss(behavior, features, NO_END[:1], NO_BONUS[:1])
    torch.testing.assert_close(actor.target, torch.tensor([[23.05, 29.0]]), rtol=1e-6, atol=0.0)
    critic = critic_loss(behavior, features, actor)
    critic.total.backward()
    assert live.scale.grad is not None and slow.scale.grad is None
    # 50 and 100 against 23.05 and 29, weighted by 1 and 0.9
    assert critic.bias.item() == pytest.approx((26.95 + 0.9 * 71.0) / 1.9, rel=1e-5)


def test_the_slow_critic_moves_towards_the_critic_unless_the_step_was_skipped():
    behavior, _ = with_options(slow_critic_decay=0.75)
    live, slow = columns(behavior)
    with torch.no_grad():
        live.scale.fill_(5.0)
    for skipped, expected in ((True, 1.0), (False, 2.0), (False, 2.75)):
        behavior.update_slow_critic(torch.tensor(skipped))
        assert slow.scale.item() == pytest.approx(expected)
    assert live.scale.item() == 5.0


def test_percentile_normalisation_divides_the_actors_returns_and_not_the_critics_target():
    behavior, features = with_options(return_norm="percentile")
    actor = actor_loss(behavior, features, NO_END[:1], NO_BONUS[:1])
    # With two returns, the percentiles are these two: 29 - 23.05.
    assert actor.return_scale.item() == pytest.approx(5.95)
    torch.testing.assert_close(actor.total, torch.tensor(-24.575 / 5.95), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(actor.target, torch.tensor([[23.05, 29.0]]), rtol=1e-6, atol=0.0)


def test_without_options_there_is_no_additional_state_and_returns_are_not_scaled():
    behavior, features = golden()
    assert behavior.state() == {}
    assert actor_loss(behavior, features, NO_END[:1], torch.full((1, H), 7.0)).return_scale.item() == 1.0
    options = with_options(slow_critic_decay=0.9, return_norm="percentile")[0]
    assert sorted(options.state()) == ["return_scale", "slow_critic"]


def test_value_bias_is_the_weighted_mean_of_value_minus_return():
    behavior, features = golden()
    actor = actor_loss(behavior, features, NO_END[:1], NO_BONUS[:1])
    bias = critic_loss(behavior, features, actor).bias
    assert bias.item() == pytest.approx((10 - 23.05 + 0.9 * (20 - 29)) / 1.9, rel=1e-5)
    assert not bias.requires_grad


@pytest.mark.parametrize(("actor_gradient", "share"), [("reinforce", 1.0), ("mix", 0.9)])
def test_the_score_function_weighs_each_log_density_with_return_minus_the_value_before_it(actor_gradient, share):
    """The golden returns are 23.05 and 29; the values before the actions are 7 (of the start) and 10."""
    behavior, features = golden()
    behavior.actor_gradient = actor_gradient
    log_prob = torch.tensor([[0.5, -2.0, 9.0]], requires_grad=True)
    outputs = {name: head(features) for name, head in behavior.heads().items()}
    score = {"log_prob": log_prob, "start_value": torch.tensor([7.0])}
    actor = behavior.actor_loss(**outputs, start_terminal=NO_END[:1], entropy=NO_BONUS[:1], **score)
    advantage, weight = (23.05 - 7, 29.0 - 10), (1.0, 0.9)
    expected = -sum(w * a * p for w, a, p in zip(weight, advantage, (0.5, -2.0), strict=True)) / 2
    total = share * expected + (1 - share) * -24.575
    torch.testing.assert_close(actor.total, torch.tensor(total), rtol=1e-5, atol=0.0)
    (grad,) = torch.autograd.grad(actor.total, log_prob)
    slopes = [-share * w * a / 2 for w, a in zip(weight, advantage, strict=True)]
    assert grad[0].tolist() == pytest.approx([*slopes, 0.0], rel=1e-5), "the last action has no return"
