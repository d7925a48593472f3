"""The policy: how actions are chosen, with noise and in evaluation."""

import math

import pytest
import torch

from shared.config import NetworkSettings
from shared.model.policy import Actor, Policy
from shared.model.rssm import Belief, feat
from shared.stream import ObsSpec, StreamSpec

E, A = 4, 2
SPEC = StreamSpec(E, {"policy": ObsSpec((3,), "float32")}, A)
NONE, ALL = torch.zeros(E, dtype=torch.bool), torch.ones(E, dtype=torch.bool)


def make_policy(init_std: float = 5.0) -> Policy:
    torch.manual_seed(0)
    return Policy(SPEC, NetworkSettings(state_dim=3, rssm_hidden_dim=5, hidden_dim=7, init_std=init_std))


def act(policy: Policy, obs, belief, action, reset, *, noise_std=0.3):
    return policy.explore({"policy": obs}, belief, action, reset, noise_std=noise_std)


def evaluate(policy: Policy, *, eval_action: str) -> tuple[torch.Tensor, Belief]:
    """Return the actions and the beliefs after one observation."""
    start, obs = policy.initial_belief(E), {"policy": torch.randn(E, 3)}
    return policy.evaluate(obs, start, torch.zeros(E, A), ALL, eval_action=eval_action)


@pytest.mark.parametrize("init_std", [0.01, 1.0, 5.0, 1000.0])
def test_the_actor_starts_at_its_initial_std(init_std):
    torch.manual_seed(0)
    _, std = Actor(4, A, NetworkSettings(hidden_dim=8, init_std=init_std))(torch.zeros(3, 4))
    torch.testing.assert_close(std, torch.full((3, A), init_std + 1e-4), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("floor", [1e-4, 0.1, 1.0])
def test_the_std_never_falls_below_its_floor_which_does_not_change_the_initial_std(floor):
    actor = Actor(4, A, NetworkSettings(hidden_dim=8, init_std=1.0, actor_min_std=floor))
    _, std = actor.stats(torch.zeros(3), torch.tensor([0.0, -1e3, 5.0]))
    torch.testing.assert_close(std[:2], torch.tensor([1.0 + 1e-4, floor]), rtol=1e-4, atol=0.0)
    assert std[2] > std[0]


def test_the_mean_before_the_tanh_stays_within_five():
    actor = Actor(4, A, NetworkSettings(hidden_dim=8))
    mean, _ = actor(torch.randn(100, 4) * 1e4)
    assert 4.9 < mean.abs().max() <= 5.0


def test_mean_evaluation_takes_tanh_of_the_mean_without_noise():
    policy = make_policy()
    action, belief = evaluate(policy, eval_action="mean")
    torch.testing.assert_close(action, torch.tanh(policy.actor(feat(belief))[0]), rtol=1e-6, atol=1e-6)


def test_mode_evaluation_takes_the_most_likely_sample_without_noise():
    policy = make_policy(init_std=0.001)
    action, belief = evaluate(policy, eval_action="mode")
    torch.testing.assert_close(action, torch.tanh(policy.actor(feat(belief))[0]), rtol=0.0, atol=0.01)


# Without noise, what remains comes from the sampled belief.
@pytest.mark.parametrize(("noise_std", "low", "high"), [(0.5, 0.3, 0.6), (0.0, 0.0, 0.25)])
def test_training_actions_are_samples_plus_noise_and_are_clipped(noise_std, low, high):
    policy = make_policy(init_std=0.001)
    start, obs = policy.initial_belief(E), torch.randn(E, 3)
    actions = torch.stack([
        act(policy, obs, start, torch.zeros(E, A), ALL, noise_std=noise_std)[0] for _ in range(300)
    ])  # fmt: skip
    assert actions.abs().max() <= 1.0 and actions.dtype == torch.float32
    spread = actions.std(0).mean(1)
    assert (spread > low).all() and (spread < high).all(), spread


def test_without_exploration_noise_a_training_action_is_a_sample_of_the_actor():
    policy = make_policy(init_std=5.0)
    actions = torch.stack([
        act(policy, torch.zeros(E, 3), policy.initial_belief(E), torch.zeros(E, A), ALL, noise_std=0.0)[0]
        for _ in range(100)
    ])  # fmt: skip
    assert (actions.abs() > 0.9).float().mean() > 0.6  # with a std of 5 before the tanh, most actions are near -1 or 1
    assert actions.mean().abs() < 0.2


def test_reset_rows_lose_belief_and_action_and_other_rows_keep_them():
    policy, obs, reset = make_policy(), torch.randn(E, 3), torch.tensor([True, False, True, False])
    carried = Belief(torch.randn(E, 5), torch.randn(E, 3))
    deter = act(policy, obs, carried, torch.randn(E, A), reset)[1].deter
    again = act(policy, obs, Belief(carried.deter * 7, carried.stoch - 3), torch.randn(E, A), reset)[1].deter
    assert torch.equal(deter[reset], again[reset])
    assert not torch.isclose(deter[~reset], again[~reset]).any()


def test_acting_normalises_vectors():
    plain, shifted = make_policy(), make_policy()
    shifted.normaliser.update({"policy": torch.tensor([[9.0, 9.0, 9.0], [11.0, 11.0, 11.0]])})  # mean 10, std 1
    obs, actions = torch.randn(E, 3), []
    for policy, shift in ((plain, 0.0), (shifted, 10.0)):
        torch.manual_seed(1)
        start = policy.initial_belief(E)
        actions.append(act(policy, obs + shift, start, torch.zeros(E, A), ALL)[0])
    torch.testing.assert_close(actions[0], actions[1], rtol=1e-4, atol=1e-4)


def test_parameters_and_buffers_of_the_policy_are_all_that_acting_needs():
    policy = make_policy()
    names = {name.split(".")[0] for name in policy.state_dict()}
    assert names == {"normaliser", "encoder", "rssm", "actor"}
    assert all(tensor.dtype == torch.float32 for tensor in policy.state_dict().values())
    assert math.isfinite(sum(t.sum().item() for t in policy.state_dict().values()))


def test_acting_builds_no_graph():
    policy = make_policy()
    action, belief = act(policy, torch.randn(E, 3), policy.initial_belief(E), torch.zeros(E, A), NONE)
    assert not action.requires_grad and not belief.deter.requires_grad
