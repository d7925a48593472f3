"""One environment of the dm_control suite: actions in [-1, 1] in, one arrival in a TickBuffer out. Torch-free.

MUJOCO_GL is read once, when dm_control is imported, so the import itself lives in `load_suite` and chooses the
renderer: what the user set, else EGL for pixels and none for state vectors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import SimulatorError
from shared.stream import ObsSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector_proc.simulators.dm_control.tick_buffer import TickBuffer

IMAGE_SIZE = 64
UNLIMITED = 1e10  # mujoco's mjMAXVAL: the range dm_control reports for an actuator without limits
MAX_RESET_ATTEMPTS = 10
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
GL_MEND = (
    "install libegl1 libegl-mesa0 libgl1-mesa-dri for MUJOCO_GL=egl, or libosmesa6 for MUJOCO_GL=osmesa "
    "(glfw needs a display), or observe state vectors with env.from_pixels=false"
)
NO_RENDERER = ("off", "disable", "disabled", "false", "0")


@dataclass(frozen=True)
class SuitePlan:
    """What every environment of the vector has in common; plain values, so that it travels to a worker as JSON."""

    domain: str
    task: str
    seed: int
    frame_skip: int
    from_pixels: bool
    grayscale: bool
    horizon: int | None


def renderer_variables(from_pixels: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables dm_control must be imported under: the user's MUJOCO_GL, else egl or disabled."""
    return {"MUJOCO_GL": environ.get("MUJOCO_GL") or ("egl" if from_pixels else "disabled")}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def load_suite(*, from_pixels: bool) -> ModuleType:
    """`dm_control.suite`, imported with a renderer that serves the observations.

    Raises: SimulatorError if dm_control is not installed or its renderer cannot start.
    """
    variables = renderer_variables(from_pixels)
    try:
        with _environment(variables):
            from dm_control import _render, suite
    except ModuleNotFoundError as error:
        if error.name in ("dm_control", "mujoco"):
            raise SimulatorError(
                f"no module {error.name}: env.backend=dm_control needs dm_control and mujoco; pip install both"
            ) from error
        raise
    except Exception as error:  # PyOpenGL reports a missing library as ImportError, AttributeError or its own errors
        if not from_pixels and variables["MUJOCO_GL"] in NO_RENDERER:
            raise SimulatorError(
                f"dm_control does not import: {error!r}; wanted a dm_control and mujoco that fit each other; "
                "reinstall the pair pinned in pyproject.toml"
            ) from error
        raise _renderer_error(error) from error
    if from_pixels and _render.BACKEND in (None, *NO_RENDERER):
        raise SimulatorError(
            f"no renderer for pixels: dm_control runs with MUJOCO_GL={_render.BACKEND}, wanted egl, osmesa or glfw; "
            "start again with MUJOCO_GL=egl"
        )
    return suite


def _renderer_error(cause: Exception) -> SimulatorError:
    chosen = os.environ.get("MUJOCO_GL") or "unset (egl)"
    return SimulatorError(
        f"the renderer cannot start: {cause!r:.300} with MUJOCO_GL {chosen}; wanted a working OpenGL library; {GL_MEND}"
    )


def environment_seed(seed: int, index: int) -> int:
    """A 32-bit seed of environment `index`'s own stream, the same however environments are spread over workers."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


class SuiteEnvironment:
    """Environment `index` of the vector. `reset` and `step` write row `row` of a TickBuffer.

    A physics divergence ends the episode as a time-out with reward 0 and the last good observation, and is counted.
    """

    def __init__(self, plan: SuitePlan, index: int) -> None:
        suite = load_suite(from_pixels=plan.from_pixels)
        from dm_control.rl.control import PhysicsError

        self._physics_error = PhysicsError
        self._plan, self.index = plan, index
        self._env: Any = suite.load(plan.domain, plan.task, task_kwargs={"random": environment_seed(plan.seed, index)})
        self._scale, self._center = _action_map(self._env.action_spec())
        self._camera = self._make_camera() if plan.from_pixels else None
        if self._camera is None:
            # quadruped-escape asks for a GL context at every reset, to redraw its terrain: answer that there is none
            self._env.physics._make_rendering_contexts = lambda: None
        self._steps, self._over = 0, True

    @property
    def action_dim(self) -> int:
        return self._scale.size

    @property
    def obs(self) -> dict[str, ObsSpec]:
        if self._plan.from_pixels:
            return {"pixels": ObsSpec((IMAGE_SIZE, IMAGE_SIZE, 1 if self._plan.grayscale else 3), "uint8")}
        size = sum(int(np.prod(entry.shape)) for entry in self._env.observation_spec().values())
        return {"policy": ObsSpec((size,), "float32")}

    def reset(self, tick: TickBuffer, row: int) -> None:
        """Start an episode.

        Raises: SimulatorError if the physics of ten fresh episodes in a row diverge.
        """
        for _ in range(MAX_RESET_ATTEMPTS):
            try:
                self._observe(self._env.reset(), tick, row)
                break
            except self._physics_error:
                tick.num_diverged[row] += 1
        else:
            raise SimulatorError(
                f"physics diverged at {MAX_RESET_ATTEMPTS} resets in a row, "
                "wanted a finite start; check the task and its model"
            )
        self._steps, self._over = 0, False
        _write_flags(tick, row, first=True, last=False, terminal=False, reward=0.0)

    def step(self, tick: TickBuffer, row: int) -> None:
        """One agent step with the row's action, or a reset where the previous arrival was the last of its episode."""
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

    def close(self) -> None:
        self._env.physics.free()

    def _repeat(self, action: NDArray) -> tuple[float, Any]:
        """The summed reward of up to frame_skip simulator steps and the last time step. Raises: PhysicsError."""
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
        """Write the observation into the tick; untouched if the new one is not finite. Raises: PhysicsError."""
        if self._camera is not None:
            image = self._camera.render()
            tick.obs["pixels"][row] = _luminance(image) if self._plan.grayscale else image
            return
        vector = _flatten(list(time_step.observation.values()))
        if not np.isfinite(vector).all():
            raise self._physics_error("observation is not finite")
        tick.obs["policy"][row] = vector

    def _make_camera(self) -> Any:
        """One camera for the life of the environment: physics.render would build a scene of its own for every frame."""
        from dm_control.mujoco.engine import Camera

        camera_id = 2 if self._plan.domain == "quadruped" else 0
        try:
            camera = Camera(self._env.physics, IMAGE_SIZE, IMAGE_SIZE, camera_id=camera_id)
            camera.render()
        except Exception as error:  # drivers fail in their own ways, and some only at the first frame
            raise _renderer_error(error) from error
        return camera


def _write_flags(tick: TickBuffer, row: int, *, first: bool, last: bool, terminal: bool, reward: float) -> None:
    tick.is_first[row], tick.is_last[row], tick.is_terminal[row], tick.reward[row] = first, last, terminal, reward


def _flatten(entries: Sequence[Any]) -> NDArray:
    """Scalars and arrays, in the order given, as one float32 vector."""
    return np.concatenate([np.ravel(entry) for entry in entries]).astype(np.float32)


def _luminance(image: NDArray) -> NDArray:
    """(height, width, 1) uint8 of an RGB image."""
    return np.rint(image @ LUMINANCE).astype(np.uint8)[..., None]


def _action_map(action_spec: Any) -> tuple[NDArray, NDArray]:
    """Scale and centre that map [-1, 1] onto each actuator's range; actuators without limits take it as it is."""
    low, high = np.broadcast_arrays(action_spec.minimum, action_spec.maximum)
    limited = (np.abs(low) < UNLIMITED) & (np.abs(high) < UNLIMITED)
    return np.where(limited, (high - low) / 2, 1.0), np.where(limited, (high + low) / 2, 0.0)


def run_tick(environments: Sequence[SuiteEnvironment], tick: TickBuffer, *, reset: bool) -> None:
    """Reset or step every environment; each writes the row of its own index.

    Raises: SimulatorError naming the environment.
    """
    for environment in environments:
        try:
            environment.reset(tick, environment.index) if reset else environment.step(tick, environment.index)
        except Exception as error:
            raise SimulatorError(f"environment {environment.index} failed: {type(error).__name__}: {error}") from error
