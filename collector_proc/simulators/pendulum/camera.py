"""Draws the pendulum of environment 0, for films. Torch-free at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from collector_proc.simulators.pendulum.simulator import FRAME_S

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector_proc.simulators.pendulum.simulator import PendulumSimulator

ROD_LENGTH, ROD_WIDTH, BOB_RADIUS = 0.36, 0.012, 0.06  # shares of the picture
WHITE, GREY, RED = (250, 250, 250), (90, 90, 90), (190, 50, 40)


def prepare() -> None:
    """Nothing needs to be prepared before the simulator is built."""


class Camera:
    """Pictures of environment 0. step_s: the simulated time between two agent steps."""

    def __init__(self, simulator: PendulumSimulator, size: int) -> None:
        self._simulator = simulator
        self.step_s = FRAME_S * simulator.frames_per_step
        places = (np.arange(size) + 0.5) / size - 0.5
        self._x, self._y = np.meshgrid(places, -places)  # the centre is (0, 0), up is positive

    def frame(self) -> NDArray:
        """Return the picture of the current state, (size, size, 3) uint8. An angle of 0 is upright."""
        theta = float(self._simulator.state[0, 0])
        x, y = np.sin(theta), np.cos(theta)
        along = np.clip(self._x * x + self._y * y, 0.0, ROD_LENGTH)  # the nearest point of the rod
        rod = np.hypot(self._x - along * x, self._y - along * y) < ROD_WIDTH
        bob = np.hypot(self._x - ROD_LENGTH * x, self._y - ROD_LENGTH * y) < BOB_RADIUS
        picture = np.full((*self._x.shape, 3), WHITE, np.uint8)
        picture[rod], picture[bob] = GREY, RED
        return picture
