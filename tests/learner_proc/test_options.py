"""The options that the original algorithm lacks: each has its documented effect in a whole gradient step."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from tensordict import TensorDict

from learner_proc.gradient_step import GradientStep
from learner_proc.imagination import Imagination, Imagined
from shared import metrics
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, Settings
from shared.metrics import Metric
from shared.model.layers import Normaliser, symlog
from shared.model.rssm import Belief, feat
from shared.stream import ObsSpec, StreamSpec

B, L, A, HORIZON = 3, 5, 2, 4
SPEC = StreamSpec(1, {"policy": ObsSpec((4,), "float32")}, A)


def make(cont: bool = False, symlog: bool = False, **optimization: Any) -> GradientStep:
    networks = NetworkSettings(
        state_dim=3, rssm_hidden_dim=6, hidden_dim=8, continue_head=cont, init_std=1.0, symlog_obs=symlog
    )
    defaults = {"autocast": "false", "imagination_horizon": HORIZON, "compile": CompileSettings(enabled=False)}
    settings = Settings(networks=networks, optimization=OptimizationSettings(**defaults | optimization))
    torch.manual_seed(0)
    return GradientStep(SPEC, settings, device=torch.device("cpu"))


def make_batch() -> TensorDict:
    torch.manual_seed(1)
    obs = TensorDict({"policy": torch.randn(B, L, 4)}, [B, L])
    flags = {name: torch.rand(B, L) < 0.3 for name in ("is_first", "is_last", "is_terminal")}
    fields = {"action": torch.rand(B, L, A) * 2 - 1, "reward": torch.randn(B, L), **flags}
    return TensorDict({"obs": obs, **fields}, [B, L])


def run(step: GradientStep, num_steps: int, batch: TensorDict | None = None) -> list[dict[Metric, float]]:
    fixed = make_batch() if batch is None else batch
    torch.manual_seed(7)
    return [step(fixed).to_host() for _ in range(num_steps)]


def starts_of(step: GradientStep, num_steps: int) -> list[torch.Tensor]:
    """Run steps and return the features (N, F) that each of them starts to imagine from."""
    chosen: list[torch.Tensor] = []
    imagine = Imagination.imagine

    def recorded(self: Imagination, start: Belief, *noise: torch.Tensor, **rest: Any) -> Imagined:
        chosen.append(feat(start))
        return imagine(self, start, *noise, **rest)

    with patch.object(Imagination, "imagine", recorded):
        run(step, num_steps)
    return chosen


def test_without_a_number_of_starts_every_belief_is_a_start():
    (starts,) = starts_of(make(), 1)
    assert starts.shape == (B * L, 9) and len(starts.unique(dim=0)) == B * L


def test_imagination_starts_from_a_new_random_subset_of_the_beliefs():
    (every,), (first, second) = starts_of(make(), 1), starts_of(make(imagination_starts=6, world_model_lr=0.0), 2)
    for some in (first, second):
        assert some.shape == (6, 9) and len(some.unique(dim=0)) == 6
    indices = [(row == every).all(1).nonzero().item() for row in first]
    assert indices != sorted(indices) and not torch.equal(first, second)


def test_an_entropy_bonus_increases_the_entropy_of_the_actor():
    plain, bonus = (make(actor_lr=1e-2, entropy_scale=scale) for scale in (0.0, 10.0))
    without, with_bonus = (run(step, 30)[-1][metrics.ACTOR_ENTROPY] for step in (plain, bonus))
    gain = with_bonus - without
    assert gain > 0.05, gain


@pytest.mark.parametrize("actor_gradient", ["reinforce", "mix"])
def test_the_kind_of_gradient_changes_what_the_actor_learns_and_nothing_else(actor_gradient):
    found = []
    for kind in ("dynamics", actor_gradient):
        step = make(actor_gradient=kind)
        numbers = run(step, 1)[0]
        found.append((numbers, step.state_dict()))
    (plain, before), (other, after) = found
    for group in ("world_model", "critic", "normaliser", "adam_model", "adam_value"):
        assert all(torch.equal(before[group][name], tensor) for name, tensor in after[group].items()), group
    assert not torch.equal(before["actor"]["layers.0.weight"], after["actor"]["layers.0.weight"])
    for metric in (metrics.LOSS_MODEL, metrics.LOSS_VALUE, metrics.IMAGINED_RETURN, metrics.ACTOR_ENTROPY):
        assert plain[metric] == other[metric], metric
    assert plain[metrics.GRAD_NORM_ACTOR] != other[metrics.GRAD_NORM_ACTOR]


def test_the_slow_critic_follows_the_critic_inside_the_step():
    step = make(slow_critic_decay=0.75, value_lr=1e-2)
    before = step.state_dict()
    # at first the slow critic is a copy
    assert all(torch.equal(tensor, before["critic"][k]) for k, tensor in before["slow_critic"].items())
    run(step, 1)
    after = step.state_dict()
    expected = {k: 0.75 * slow + 0.25 * after["critic"][k] for k, slow in before["slow_critic"].items()}
    torch.testing.assert_close(after["slow_critic"], expected, rtol=1e-5, atol=1e-7)
    assert all(
        not torch.equal(after[group]["layers.0.weight"], before[group]["layers.0.weight"])
        for group in ("critic", "slow_critic")
    )


def test_a_restored_return_scale_divides_the_loss_and_the_gradient_of_the_actor():
    plain, scaled = make(return_norm="none"), make(return_norm="percentile")
    state = scaled.state_dict()
    state["return_scale"] = {"range": torch.tensor(400.0), "weight": torch.tensor(1.0)}
    scaled.load_state_dict(state)
    first, second = run(plain, 1)[0], run(scaled, 1)[0]
    scale = second[metrics.RETURN_SCALE]
    assert 390.0 < scale < 400.0 and first[metrics.RETURN_SCALE] == 1.0
    for metric in (metrics.LOSS_ACTOR, metrics.GRAD_NORM_ACTOR):
        assert second[metric] == pytest.approx(first[metric] / scale, rel=1e-4)
    assert second[metrics.LOSS_VALUE] == first[metrics.LOSS_VALUE]


def test_symlogged_observations_are_what_encoder_and_decoder_see():
    step, twin = make(symlog=True), make()
    twin.policy.normaliser = Normaliser(SPEC, enabled=False)
    far, small = make_batch(), make_batch()
    far["obs", "policy"].mul_(1000)
    small["obs", "policy"] = symlog(far["obs", "policy"])
    assert run(step, 1, far)[0][metrics.LOSS_OBS] == run(twin, 1, small)[0][metrics.LOSS_OBS]


def test_the_v1_step_has_no_state_beside_networks_normaliser_and_optimisers():
    groups = {"normaliser", "world_model", "actor", "critic", "adam_model", "adam_actor", "adam_value"}
    assert set(make().state_dict()) == groups
    assert set(make(slow_critic_decay=0.9, return_norm="percentile").state_dict()) == groups | {
        "slow_critic",
        "return_scale",
    }
