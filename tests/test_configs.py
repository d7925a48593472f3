"""Every file of configs/ can be composed, and its sizes fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner_proc.pacing import make_pacing
from shared.compose import compose
from shared.geometry import Geometry, check_settings

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_composes_and_its_sizes_fit(name: str) -> None:
    settings = compose(name, [])
    check_settings(settings)


@pytest.mark.parametrize("name", ["dm_control", "v1"])
def test_dm_control_has_the_papers_number_of_gradient_steps(name: str) -> None:
    settings = compose(name, [])
    ratio, geometry = settings.optimization.replay_ratio, Geometry.of(settings)
    assert ratio is not None and ratio / geometry.frames_per_step == 0.2, "gradient steps for each agent step"
    assert make_pacing(settings, geometry).pretrained == 100 * geometry.frames_per_step


def test_v1_fills_its_replay_with_five_whole_random_episodes() -> None:
    geometry = Geometry.of(compose("v1", []))
    assert geometry.num_replayed == 5 and geometry.prefill_chunks * geometry.ticks_per_chunk == 501
    assert geometry.replayed_prefill == geometry.prefill_frames * 5 // 6 == 2505, "500 agent steps and a reset each"


@pytest.mark.parametrize("name", ["isaaclab", "mjlab"])
def test_robots_learn_with_a_kl_of_each_step_for_prior_and_posterior(name: str) -> None:
    settings = compose(name, [])
    options = settings.optimization
    assert options.kl_balance is not None and options.replay_ratio is not None
    prior, posterior = options.kl_scale * options.kl_balance, options.kl_scale * (1 - options.kl_balance)
    assert (round(prior, 2), round(posterior, 2)) == (1.0, 0.1)
    assert (options.free_nats, options.free_nats_per, options.imagination_horizon) == (1.0, "step", 15)
    assert (options.return_norm, options.slow_critic_decay, options.gamma) == ("percentile", 0.98, 0.997)
    assert 16 <= options.replay_ratio <= 32
