"""A policy is loaded from a checkpoint alone, and acts as the collector's policy does without noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.trained.policy import load_policy, stream_of
from shared.compose import compose
from shared.errors import SettingError
from shared.model.policy import Policy
from shared.stream import ObsSpec, StreamSpec


def test_the_stream_is_read_from_the_shapes_of_the_weights() -> None:
    obs = {
        "policy": ObsSpec((5,), "float32"),
        "critic": ObsSpec((7,), "float32"),
        "pixels": ObsSpec((64, 64, 3), "uint8"),
        "grey": ObsSpec((64, 64, 1), "uint8"),
    }
    spec = StreamSpec(1, obs, 6)
    small = ["networks.hidden_dim=8", "networks.rssm_hidden_dim=8", "networks.encoder_channels=2"]
    networks = compose("quickstart", small).networks
    assert stream_of(Policy(spec, networks).state_dict()) == spec


def test_each_checkpoint_gives_its_own_policy(run_dir: Path) -> None:
    obs = {"policy": np.ones((2, 3), np.float32)}
    actions = {}
    for choice in ("10", "20", "latest"):
        torch.manual_seed(0)
        actions[choice] = load_policy(run_dir, choice).act(obs, reset=[True, True])
    assert torch.equal(actions["20"], actions["latest"])
    assert not torch.equal(actions["10"], actions["20"])
    assert actions["20"].shape == (2, 1) and actions["20"].abs().max() <= 1


def test_a_reset_forgets_the_belief_of_its_row_only(run_dir: Path) -> None:
    policy = load_policy(run_dir)
    obs = {"policy": torch.randn(2, 3)}
    for _ in range(3):
        policy.act(obs)
    assert policy.belief is not None
    kept, used = policy.belief, policy.action
    assert used is not None
    policy.act(obs, reset=[True, False])
    deter = policy.belief.deter
    blank = load_policy(run_dir)
    blank.act(obs, reset=[True, True])
    assert blank.belief is not None
    torch.testing.assert_close(deter[0], blank.belief.deter[0], rtol=0, atol=0)
    after = policy.policy.rssm.transition(kept, used)
    torch.testing.assert_close(deter[1], after[1], rtol=0, atol=0)


def test_another_number_of_rows_begins_new_episodes(run_dir: Path) -> None:
    policy = load_policy(run_dir)
    policy.act({"policy": torch.zeros(3, 3)})
    assert policy.act({"policy": torch.zeros(5, 3)}).shape == (5, 1)


def test_networks_of_other_settings_are_refused_in_one_sentence(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("rssm_hidden_dim: 16", "rssm_hidden_dim: 24"))
    with pytest.raises(SettingError, match=r"the policy in .*00000020 cannot be loaded: .*; expected the networks"):
        load_policy(run_dir)
