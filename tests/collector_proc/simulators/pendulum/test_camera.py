"""Pictures of the pendulum show its angle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from collector_proc.simulators.pendulum.camera import RED, ROD_LENGTH, Camera
from collector_proc.simulators.pendulum.simulator import PendulumSimulator
from shared.config import Settings


@pytest.mark.parametrize(
    ("theta", "column", "row"),
    [(0.0, 0.5, 0.5 - ROD_LENGTH), (math.pi / 2, 0.5 + ROD_LENGTH, 0.5), (math.pi, 0.5, 0.5 + ROD_LENGTH)],
)
def test_the_bob_is_drawn_at_its_angle(theta: float, column: float, row: float) -> None:
    settings = Settings()
    settings.env.num_envs, settings.env.task = 2, "swingup"
    simulator = PendulumSimulator(settings, seed=0, device="cpu")
    simulator.state[0, 0] = theta
    picture = Camera(simulator, 100).frame()
    assert picture.shape == (100, 100, 3) and picture.dtype == np.uint8
    rows, columns = (picture == RED).all(-1).nonzero()
    assert (columns.mean(), rows.mean()) == pytest.approx((100 * column - 0.5, 100 * row - 0.5), abs=0.2)
