"""One environment of the dm_control suite. It reads actions from a TickBuffer and writes arrivals into it. Torch-free.

dm_control reads MUJOCO_GL once, when it is imported. Therefore only `load_suite` imports it, with the renderer that the
user chose, or else with EGL for images and no renderer for state vectors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from collector_proc.simulators.base import ActionRange
from collector_proc.simulators.dm_control import egl
from shared.errors import SimulatorError
from shared.lifetime import SIM_GPU_INDEX
from shared.stream import ObsSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector_proc.simulators.dm_control.tick_buffer import TickBuffer

IMAGE_SIZE = 64
UNLIMITED = 1e10  # MuJoCo's mjMAXVAL: dm_control reports it as the limit of an actuator without limits
MAX_RESET_ATTEMPTS = 10
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
GL_FIX = (
    "install libegl1 libegl-mesa0 libgl1-mesa-dri for MUJOCO_GL=egl, or libosmesa6 for MUJOCO_GL=osmesa "
    "(glfw needs a display), or observe state vectors with env.from_pixels=false"
)
EGL_DEVICE = "MUJOCO_EGL_DEVICE_ID"
NO_RENDERER = ("off", "disable", "disabled", "false", "0")


@dataclass(frozen=True)
class SuitePlan:
    """The settings that all environments share. The values are plain, so that they can be sent to a worker as JSON."""

    domain: str
    task: str
    seed: int
    frame_skip: int
    from_pixels: bool
    grayscale: bool
    horizon: int | None


def renderer_variables(from_pixels: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables that dm_control needs at its import: the user's MUJOCO_GL, or a fitting one.

    Launch sets MUJOCO_EGL_DEVICE_ID to the simulator's GPU as nvidia-smi counts it. If EGL shows fewer devices than
    that, its first device is used instead.
    """
    variables = {"MUJOCO_GL": environ.get("MUJOCO_GL") or ("egl" if from_pixels else "disabled")}
    index = environ.get(EGL_DEVICE, "")
    if variables["MUJOCO_GL"] == "egl" and index.isdecimal() and index == environ.get(SIM_GPU_INDEX):
        count = egl.count_devices()
        if count is not None and int(index) >= count:
            variables[EGL_DEVICE] = "0"
    return variables


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the code inside, and restore them afterwards."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def load_suite(*, from_pixels: bool) -> ModuleType:
    """Import `dm_control.suite` with a renderer if the observations are images, and return it.

    Raises: SimulatorError if dm_control is not installed or its renderer cannot start.
    """
    variables = renderer_variables(from_pixels)
    try:
        with _environment(variables):
            from dm_control import _render, suite
    except ModuleNotFoundError as error:
        if error.name in ("dm_control", "mujoco"):
            raise SimulatorError(
                f"there is no module {error.name}; expected dm_control and mujoco for env.backend=dm_control; "
                "pip install both"
            ) from error
        raise
    except Exception as error:  # PyOpenGL reports a missing library as ImportError, AttributeError or its own errors
        if not from_pixels and variables["MUJOCO_GL"] in NO_RENDERER:
            raise SimulatorError(
                f"dm_control cannot be imported: {error!r}; expected versions of dm_control and mujoco that fit; "
                "reinstall the pair pinned in pyproject.toml"
            ) from error
        raise _renderer_error(error) from error
    if from_pixels and _render.BACKEND in (None, *NO_RENDERER):
        raise SimulatorError(
            f"dm_control has no renderer for images: it was imported with MUJOCO_GL={_render.BACKEND}; expected egl, "
            "osmesa or glfw; start again with MUJOCO_GL=egl"
        )
    return suite


def _renderer_error(cause: Exception) -> SimulatorError:
    chosen = os.environ.get("MUJOCO_GL") or "unset (egl)"
    return SimulatorError(
        f"the renderer cannot start with MUJOCO_GL {chosen}: {cause!r:.300}; expected a working OpenGL library; "
        f"{GL_FIX}"
    )


def environment_seed(seed: int, index: int) -> int:
    """Return the 32-bit seed of environment `index`. It does not depend on the number of workers."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


class SuiteEnvironment:
    """Environment `index` of the vector. `reset` and `step` write row `row` of a TickBuffer.

    If the physics diverge, the episode ends as a time-out with reward 0 and the last finite observation, and the row's
    `num_diverged` is increased.
    """

    def __init__(self, plan: SuitePlan, index: int) -> None:
        suite = load_suite(from_pixels=plan.from_pixels)
        from dm_control.rl.control import PhysicsError

        self._physics_error = PhysicsError
        self._plan, self.index = plan, index
        self._env: Any = suite.load(plan.domain, plan.task, task_kwargs={"random": environment_seed(plan.seed, index)})
        self._scale, self._center = _action_map(self._env.action_spec())
        self._camera = self.make_camera(IMAGE_SIZE) if plan.from_pixels else None
        if self._camera is None:
            # quadruped-escape asks for the GL contexts at every reset, to draw its terrain again: there are none.
            self._env.physics._make_rendering_contexts = lambda: None
        self._steps, self._over = 0, True

    @property
    def action_dim(self) -> int:
        """Return the number of action values."""
        return self._scale.size

    @property
    def step_s(self) -> float:
        """The simulated time of an agent step."""
        return self._env.control_timestep() * self._plan.frame_skip

    @property
    def action_range(self) -> ActionRange:
        """The actuators' values of the actions -1 and 1."""
        bounds = (self._center - self._scale, self._center + self._scale)
        return ActionRange(*(tuple(bound.ravel().tolist()) for bound in bounds))

    @property
    def obs(self) -> dict[str, ObsSpec]:
        """Return what the environment observes: either one image or one vector."""
        if self._plan.from_pixels:
            return {"pixels": ObsSpec((IMAGE_SIZE, IMAGE_SIZE, 1 if self._plan.grayscale else 3), "uint8")}
        size = sum(int(np.prod(entry.shape)) for entry in self._env.observation_spec().values())
        return {"policy": ObsSpec((size,), "float32")}

    def reset(self, tick: TickBuffer, row: int) -> None:
        """Begin an episode.

        Raises: SimulatorError if the physics diverge in ten new episodes in a row.
        """
        for _ in range(MAX_RESET_ATTEMPTS):
            try:
                self._observe(self._env.reset(), tick, row)
                break
            except self._physics_error:
                tick.num_diverged[row] += 1
        else:
            raise SimulatorError(
                f"the physics diverged at {MAX_RESET_ATTEMPTS} resets in a row; expected a finite start; "
                "check the task and its model"
            )
        self._steps, self._over = 0, False
        _write_flags(tick, row, first=True, last=False, terminal=False, reward=0.0)

    def step(self, tick: TickBuffer, row: int) -> None:
        """Make one agent step with the row's action, or reset if the previous arrival was the last of its episode."""
        if self._over:
            self.reset(tick, row)
            return
        self._steps += 1
        try:
            reward, time_step = self._repeat(self._center + self._scale * tick.action[row])
            self._observe(time_step, tick, row)
        except self._physics_error:
            tick.num_diverged[row] += 1
            self._over = True
            _write_flags(tick, row, first=False, last=True, terminal=False, reward=0.0)
            return
        terminal = time_step.last() and time_step.discount == 0.0
        self._over = time_step.last() or self._steps == self._plan.horizon
        _write_flags(tick, row, first=False, last=self._over, terminal=terminal, reward=reward)

    def make_camera(self, size: int) -> Any:
        """Return a camera to keep: physics.render would build a new scene for every frame.

        Without images, dm_control must have been imported with a renderer.
        Raises: SimulatorError if the renderer does not start.
        """
        from dm_control.mujoco.engine import Camera

        vars(self._env.physics).pop("_make_rendering_contexts", None)  # what __init__ has put there, without images
        camera_id = 2 if self._plan.domain == "quadruped" else 0
        try:
            camera = Camera(self._env.physics, size, size, camera_id=camera_id)
            camera.render()
        except Exception as error:  # drivers raise many kinds of exceptions, some of them only at the first frame
            raise _renderer_error(error) from error
        return camera

    def close(self) -> None:
        """Free the physics."""
        self._env.physics.free()

    def _repeat(self, action: NDArray) -> tuple[float, Any]:
        """Make frame_skip simulator steps, or fewer if the episode ends. Return their reward and the last time step.

        Raises: PhysicsError.
        """
        time_step = self._env.step(action)
        reward = time_step.reward
        for _ in range(self._plan.frame_skip - 1):
            if time_step.last():
                break
            time_step = self._env.step(action)
            reward += time_step.reward
        if not np.isfinite(reward):
            raise self._physics_error(f"reward {reward}")
        return reward, time_step

    def _observe(self, time_step: Any, tick: TickBuffer, row: int) -> None:
        """Write the observation into the tick, unless it is not finite. Raises: PhysicsError."""
        if self._camera is not None:
            image = self._camera.render()
            tick.obs["pixels"][row] = _luminance(image) if self._plan.grayscale else image
            return
        vector = _flatten(list(time_step.observation.values()))
        if not np.isfinite(vector).all():
            raise self._physics_error("observation is not finite")
        tick.obs["policy"][row] = vector


def _write_flags(tick: TickBuffer, row: int, *, first: bool, last: bool, terminal: bool, reward: float) -> None:
    tick.is_first[row], tick.is_last[row], tick.is_terminal[row], tick.reward[row] = first, last, terminal, reward


def _flatten(entries: Sequence[Any]) -> NDArray:
    """Return scalars and arrays, in the given order, as one float32 vector."""
    return np.concatenate([np.ravel(entry) for entry in entries]).astype(np.float32)


def _luminance(image: NDArray) -> NDArray:
    """Return the brightness of an RGB image as (height, width, 1) uint8."""
    return np.rint(image @ LUMINANCE).astype(np.uint8)[..., None]


def _action_map(action_spec: Any) -> tuple[NDArray, NDArray]:
    """Return the scale and the centre that map [-1, 1] to each actuator's range. Without limits they are 1 and 0."""
    low, high = np.broadcast_arrays(action_spec.minimum, action_spec.maximum)
    limited = (np.abs(low) < UNLIMITED) & (np.abs(high) < UNLIMITED)
    return np.where(limited, (high - low) / 2, 1.0), np.where(limited, (high + low) / 2, 0.0)


def run_tick(environments: Sequence[SuiteEnvironment], tick: TickBuffer, *, reset: bool) -> None:
    """Reset or step every environment. Each writes the row of its own index.

    Raises: SimulatorError that names the environment.
    """
    for environment in environments:
        try:
            if reset:
                environment.reset(tick, environment.index)
            else:
                environment.step(tick, environment.index)
        except Exception as error:
            raise SimulatorError(f"environment {environment.index} failed: {type(error).__name__}: {error}") from error
