"""Renders environment 0 of the suite, for films, also where the policy observes state vectors. Torch-free at import."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from collector_proc.simulators.dm_control.environment import renderer_variables
from collector_proc.simulators.dm_control.simulator import load_triton

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector_proc.simulators.dm_control.simulator import DmControlSimulator


def prepare() -> None:
    """Choose the renderer. Call it before the simulator is built, because dm_control reads the choice at its import."""
    os.environ.update(renderer_variables(from_pixels=True))
    load_triton()


class Camera:
    """Pictures of environment 0. step_s: the simulated time between two agent steps."""

    def __init__(self, simulator: DmControlSimulator, size: int) -> None:
        """size: at most 480 for most tasks. Raises: SimulatorError if the renderer does not start."""
        environment = simulator.first_environment
        self.step_s = environment.step_s
        self._camera = environment.make_camera(size)

    def frame(self) -> NDArray:
        """Return the picture of the current state, (size, size, 3) uint8."""
        return self._camera.render()
