"""The cells of the scans against the cells that they replace: the same results and gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from learner_proc import products, scan
from learner_proc.cells import ImagineScan, ObserveScan
from learner_proc.imagination import Imagination, ImaginedStep, frozen_view
from learner_proc.scan import unroll
from shared.config import NetworkSettings
from shared.model.policy import Actor
from shared.model.rssm import RSSM, Belief, Posterior

N, T, A, S, D, EMBED = 4, 5, 2, 3, 6, 7
FORMS = ["as on a CPU", "as on a GPU", "each step apart"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of the products; in the last one, no weight gradient joins steps and a call has two steps."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(products, "splits_products", lambda x: True)
    if request.param == "each step apart":
        monkeypatch.setattr(products, "CACHED_ROWS", 1)
        monkeypatch.setattr(scan, "STEPS_PER_CALL", 2)


def uncompiled(function: Callable) -> Callable:
    return function


def networks() -> tuple[RSSM, Actor]:
    """Networks whose biases are not zero, so that a forgotten one shows."""
    torch.manual_seed(0)
    settings = NetworkSettings(state_dim=S, rssm_hidden_dim=D, hidden_dim=8, init_std=1.0)
    rssm, actor = RSSM(EMBED, A, settings), Actor(S + D, A, settings)
    for param in [*rssm.parameters(), *actor.parameters()]:
        if param.dim() == 1:
            torch.nn.init.normal_(param)
    return rssm, actor


def recorded(rssm: RSSM) -> tuple[Belief, tuple[Tensor, ...]]:
    """A belief and inputs of T steps, in which episodes begin in the middle."""
    is_first = torch.zeros(T, N, 1, dtype=torch.bool)
    is_first[2, 1] = is_first[0, 2] = is_first[4, 2] = True
    share = torch.randn(T, N, D, requires_grad=True)
    belief = Belief(torch.randn(N, D), torch.randn(N, S))
    return belief, (torch.randn(T, N, A), share, is_first, torch.randn(T, N, S))


def loss_of(posterior: Posterior) -> Tensor:
    weights = torch.Generator().manual_seed(1)
    tensors = (*posterior.belief, posterior.mean, posterior.std)
    return sum(((x * torch.randn(x.shape, generator=weights)).sum() for x in tensors), torch.zeros(()))


@pytest.mark.usefixtures("form")
def test_an_observing_scan_has_the_results_and_gradients_of_the_posterior_step() -> None:
    rssm, _ = networks()
    belief, inputs = recorded(rssm)
    expected = unroll(rssm.posterior_step, belief, inputs)
    found = ObserveScan(rssm, dtype=torch.float32, compiled=uncompiled)(belief, inputs)
    for mine, other in zip((*found.belief, *found[1:]), (*expected.belief, *expected[1:]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    learned = (rssm.input, rssm.gru.input, rssm.gru.recurrent, rssm.posterior_deter, rssm.posterior_out)
    params = [inputs[1], *(param for layer in learned for param in layer.parameters())]
    grads = [torch.autograd.grad(loss_of(posterior), params) for posterior in (found, expected)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_last_episode_reaches_the_next_one() -> None:
    rssm, _ = networks()
    _, (action, share, is_first, noise) = recorded(rssm)
    is_first[0], action[0] = True, torch.nan
    belief = Belief(torch.full((N, D), torch.nan), torch.full((N, S), torch.nan))
    found = ObserveScan(rssm, dtype=torch.float32, compiled=uncompiled)(belief, (action, share, is_first, noise))
    assert all(part.isfinite().all() for part in found.belief)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_an_imagining_scan_has_the_results_and_gradients_of_the_imagined_step(entropy_gradient: bool) -> None:
    rssm, actor = networks()
    imagination = Imagination(frozen_view(rssm), actor, entropy_gradient=entropy_gradient)
    belief, noises = Belief(torch.randn(N, D), torch.randn(N, S)), (torch.randn(T, N, A), torch.randn(T, N, S))
    scans = (ImagineScan(imagination, dtype=torch.float32, compiled=uncompiled), partial(unroll, imagination.step))
    steps: list[ImaginedStep] = [scan(belief, noises) for scan in scans]
    found, expected = ((*step.belief, step.action_mean, step.action_std) for step in steps)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert mine.requires_grad == other.requires_grad
    grads = []
    for step in steps:
        loss = step.belief.deter.square().sum() + step.belief.stoch.square().sum()
        loss = loss + (step.action_std.log().sum() if entropy_gradient else 0.0)
        grads.append(torch.autograd.grad(loss, list(actor.parameters())))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_products_in_bfloat16_stay_close_to_float32() -> None:
    rssm, _ = networks()
    rows = scan.FEW_ROWS
    share, noise = torch.randn(T, rows, D), torch.randn(T, rows, S)
    inputs = (torch.randn(T, rows, A), share, torch.zeros(T, rows, 1, dtype=torch.bool), noise)
    exact, rounded = (
        ObserveScan(rssm, dtype=dtype, compiled=uncompiled)(rssm.initial(rows), inputs)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.belief.deter.dtype == torch.float32 and not torch.equal(rounded.mean, exact.mean)
    torch.testing.assert_close(rounded.belief.deter, exact.belief.deter, rtol=0.05, atol=0.05)
