"""The RSSM against TorchRL's modules, and what happens where an episode begins."""

import inspect
from types import ModuleType

import pytest
import torch

from shared.config import NetworkSettings
from shared.model.rssm import RSSM, Belief, feat

E_DIM, A, S, D = 6, 2, 3, 5


@pytest.fixture
def rssm() -> RSSM:
    torch.manual_seed(0)
    rssm = RSSM(E_DIM, A, NetworkSettings(state_dim=S, rssm_hidden_dim=D))
    for name, param in rssm.named_parameters():
        if name.endswith("bias"):  # biases start at zero, so a forgotten bias would not show
            torch.nn.init.normal_(param, std=0.3)
    return rssm


def random_belief(num: int) -> Belief:
    return Belief(torch.randn(num, D), torch.randn(num, S))


@pytest.fixture
def torchrl_rssm() -> ModuleType:
    """TorchRL's RSSM modules. Before 0.11 their layers have no sizes, so weights cannot be copied into them."""
    modules = pytest.importorskip("torchrl.modules.models.model_based")
    if "action_dim" not in inspect.signature(modules.RSSMPrior).parameters:
        pytest.skip("the RSSM takes the sizes of its layers from TorchRL 0.11 on")
    return modules


def test_a_feature_is_stoch_then_deter():
    belief = Belief(torch.full((1, D), 1.0), torch.full((1, S), 2.0))
    assert feat(belief).tolist() == [[2.0] * S + [1.0] * D]


def test_the_prior_agrees_with_torchrl_where_both_follow_the_paper(rssm: RSSM, torchrl_rssm: ModuleType):
    sizes = {"hidden_dim": D, "rnn_hidden_dim": D, "state_dim": S, "action_dim": A}
    oracle = torchrl_rssm.RSSMPrior(torch.zeros(A), **sizes, scale_lb=1e-6)
    pairs = [
        (oracle.action_state_projector[0], rssm.input),
        (oracle.rnn_to_prior_projector[0], rssm.prior_hidden),
        (oracle.rnn_to_prior_projector[2], rssm.prior_out),
    ]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    ih, hh = rssm.gru.input, rssm.gru.recurrent
    oracle.rnn.load_state_dict({"weight_ih": ih.weight, "weight_hh": hh.weight, "bias_ih": ih.bias, "bias_hh": hh.bias})
    belief, action, noise = random_belief(4), torch.randn(4, A), torch.randn(4, S)
    mean, std, _, deter = oracle(belief.stoch, belief.deter, action)
    ours = rssm.prior_step(belief, action, noise)
    torch.testing.assert_close(ours.deter, deter, rtol=1e-5, atol=1e-6)
    # TorchRL limits the std from below; the original agent adds 0.1 to the same softplus.
    torch.testing.assert_close(ours.stoch, mean + (std + 0.1) * noise, rtol=1e-5, atol=1e-5)


def test_the_posterior_agrees_with_torchrl_on_joined_belief_and_embedding(rssm: RSSM, torchrl_rssm: ModuleType):
    sizes = {"hidden_dim": D, "rnn_hidden_dim": D, "state_dim": S, "obs_embed_dim": E_DIM}
    oracle = torchrl_rssm.RSSMPosterior(**sizes, scale_lb=1e-6)
    with torch.no_grad():
        oracle.obs_rnn_to_post_projector[0].weight.copy_(
            torch.cat([rssm.posterior_deter.weight, rssm.posterior_embed.weight], 1)
        )
        oracle.obs_rnn_to_post_projector[0].bias.copy_(rssm.posterior_embed.bias.normal_())
    oracle.obs_rnn_to_post_projector[2].load_state_dict(rssm.posterior_out.state_dict())
    belief, action, embed, noise = random_belief(4), torch.randn(4, A), torch.randn(4, E_DIM), torch.randn(4, S)
    ours = rssm.posterior_step(belief, action, rssm.embed_share(embed), torch.zeros(4, 1, dtype=torch.bool), noise)
    mean, std, _ = oracle(rssm.transition(belief, action), embed)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.std, std + 0.1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.belief.stoch, mean + (std + 0.1) * noise, rtol=1e-5, atol=1e-5)


def test_the_first_step_of_an_episode_is_an_ordinary_step_from_zero_belief_and_zero_action(rssm: RSSM):
    share, noise = rssm.embed_share(torch.randn(3, E_DIM)), torch.randn(3, S)
    first = torch.tensor([[True], [False], [True]])
    belief, action = random_belief(3), torch.randn(3, A)
    mixed = rssm.posterior_step(belief, action, share, first, noise)
    blank = rssm.posterior_step(rssm.initial(3), torch.zeros(3, A), share, torch.zeros_like(first), noise)
    carried = rssm.posterior_step(belief, action, share, torch.zeros_like(first), noise)
    for part, zeroed, kept in zip(mixed.belief, blank.belief, carried.belief, strict=True):
        torch.testing.assert_close(part[::2], zeroed[::2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part[1], kept[1], rtol=1e-6, atol=1e-6)
    assert blank.belief.deter.abs().sum() > 0  # the GRU has made a step, so deter is not zero


def test_a_nan_belief_ends_with_its_episode(rssm: RSSM):
    nan = Belief(torch.full((2, D), torch.nan), torch.full((2, S), torch.nan))
    first = torch.tensor([[True], [False]])
    share = rssm.embed_share(torch.randn(2, E_DIM))
    deter = rssm.posterior_step(nan, torch.full((2, A), torch.nan), share, first, torch.randn(2, S)).belief.deter
    assert torch.isfinite(deter[0]).all() and torch.isnan(deter[1]).all()


def test_the_std_of_prior_and_posterior_is_always_above_a_tenth(rssm: RSSM):
    with torch.no_grad():
        rssm.prior_out.bias.fill_(-8.0)
    _, std = rssm.prior(torch.randn(4, D))
    assert (std > 0.1).all() and (std < 0.11).all()
    std.sum().backward()
    assert rssm.prior_out.bias.grad is not None and rssm.prior_out.bias.grad[S:].abs().min() > 0  # a sum, not a clamp


def test_beliefs_are_float32_under_autocast(rssm: RSSM):
    with torch.autocast("cpu", torch.bfloat16):
        belief = rssm.prior_step(random_belief(2), torch.randn(2, A), torch.randn(2, S))
    assert belief.deter.dtype == belief.stoch.dtype == torch.float32
