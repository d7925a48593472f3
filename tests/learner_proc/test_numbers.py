"""Numbers keep each value beside its metric."""

import pytest
import torch

from learner_proc.numbers import Numbers
from shared.metrics import KL, LOSS_ACTOR, LOSS_MODEL


def test_every_number_keeps_its_metric_when_vectors_are_joined():
    losses = Numbers.of({LOSS_MODEL: torch.tensor(1.5), LOSS_ACTOR: torch.tensor(True)})
    joined = Numbers.join([losses, Numbers.of({KL: torch.tensor(3)})])
    assert joined.to_host() == {LOSS_MODEL: 1.5, LOSS_ACTOR: 1.0, KL: 3.0}


def test_numbers_are_detached_float32():
    values = Numbers.of({KL: torch.ones((), dtype=torch.float64, requires_grad=True)}).values
    assert values.dtype == torch.float32 and not values.requires_grad


def test_a_metric_must_not_occur_twice():
    twice = Numbers.of({KL: torch.tensor(3.0)})
    with pytest.raises(AssertionError):
        Numbers.join([twice, twice])
