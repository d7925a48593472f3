"""The share of actions at a limit, against samples."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from learner_proc.saturation import SaturationCheck, saturated_share
from shared.metrics import SATURATED


def test_the_share_is_that_of_samples_beyond_the_limit():
    mean, std = torch.tensor([0.0, 2.0, -5.0, 0.0]), torch.tensor([1.0, 0.5, 0.1, 5.0])
    samples = torch.tanh(mean + std * torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)))
    expected = (samples.abs() > 0.97).float().mean(0)
    torch.testing.assert_close(saturated_share(mean, std), expected, rtol=0.0, atol=0.005)


def test_each_dimension_has_its_share():
    def actor(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([features * 0, features], -1), torch.full((*features.shape[:-1], 2), 1e-3)

    check = SaturationCheck(cast(Any, type("Fake", (), {"action_dim": 2, "__call__": staticmethod(actor)})()))
    numbers = check(torch.tensor([[[5.0], [-5.0]], [[0.0], [5.0]]]))  # dimension 1: three of four at a limit
    assert numbers.metrics == check.metrics == (SATURATED.member(0), SATURATED.member(1))
    assert numbers.values.tolist() == pytest.approx([0.0, 0.75])
