"""The recorded return against one worked out by hand, and the windows that do not count."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict

from learner_proc.return_check import ReturnCheck
from shared.config import OptimizationSettings
from shared.model.layers import Normaliser
from shared.model.rssm import Belief, Posterior
from shared.stream import ObsSpec, StreamSpec

B, L = 3, 7
SPEC = StreamSpec(1, {"policy": ObsSpec((1,), "float32")}, 1)


def observe(obs, action, first, noise) -> Posterior:
    deter = obs["policy"]
    return Posterior(Belief(deter, deter * 0), deter, deter)


def batch() -> TensorDict:
    tick = torch.arange(float(L)).expand(B, L)
    false = torch.zeros(B, L, dtype=torch.bool)
    rest = {"action": torch.zeros(B, L, 1), "reward": tick.clone(), "is_first": false, "is_terminal": false.clone()}
    return TensorDict({"obs": {"policy": tick[..., None].clone()}, **rest}, [B, L])


def check() -> ReturnCheck:
    model = SimpleNamespace(rssm=SimpleNamespace(stoch_dim=1), observe=observe)
    settings = OptimizationSettings(gamma=0.5, reward_scale=10.0)
    normaliser = Normaliser(SPEC, enabled=False)
    return ReturnCheck(cast(Any, model), normaliser, cast(Any, lambda features: 100.0 + features.sum(-1)), settings)


def measured(rows: TensorDict) -> torch.Tensor:
    one = check()
    return one(rows, one.features(rows)).values


def test_the_recorded_return_sums_discounted_scaled_rewards_and_the_last_value():
    # from row 4: 40 + 0.5 * 50 + 0.25 * (100 + 6)
    assert measured(batch()).tolist() == pytest.approx([104.0, 40.0 + 25.0 + 26.5])


def test_windows_in_which_an_episode_begins_do_not_count():
    crossed = batch()
    crossed["reward"][1] = 1e6
    crossed["is_first"][1, 5] = True
    crossed["is_first"][2, 0] = True  # an episode that begins in row 0 does not matter
    assert measured(crossed).tolist() == pytest.approx([104.0, 91.5])
    crossed["is_first"][:, 3] = True
    assert measured(crossed).isnan().all()
