"""Renders environment 0 with mjlab's own renderer, for films. Import it before the simulator is built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shared.errors import SimulatorError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector_proc.simulators.mjlab.simulator import MjlabSimulator


def prepare() -> None:
    """Choose the renderer. Call it before the simulator is built, because MuJoCo reads the choice at its import."""
    os.environ.setdefault("MUJOCO_GL", "egl")


class Camera:
    """Pictures of environment 0 from the viewpoint of the task. step_s: the time between two agent steps."""

    def __init__(self, simulator: MjlabSimulator, size: int) -> None:
        """Raises: SimulatorError if the renderer does not start."""
        from mjlab.viewer.offscreen_renderer import OffscreenRenderer

        self._env: Any = simulator.environment
        self.step_s = float(self._env.step_dt)
        viewer = self._env.cfg.viewer
        viewer.width, viewer.height = size, size
        try:
            self._renderer = OffscreenRenderer(model=self._env.sim.mj_model, cfg=viewer, scene=self._env.scene)
            self._renderer.initialize()
        except Exception as error:  # drivers raise many kinds of exceptions
            raise SimulatorError(
                f"mjlab's renderer cannot start with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error!r:.300}; expected "
                "a working OpenGL library; install libegl1 libegl-mesa0 libgl1-mesa-dri for MUJOCO_GL=egl"
            ) from error

    def frame(self) -> NDArray:
        """Return the picture of the current state, (size, size, 3) uint8."""
        self._renderer.update(self._env.sim.data)
        return self._renderer.render()
