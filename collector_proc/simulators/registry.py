"""The table of simulator backends. A new backend is a folder and one row here. Torch-free.

A backend's folder holds these modules:

    checks.py      check(settings, report): refuses settings that cannot work; imports neither torch nor a simulator's
                   library
    simulator.py   a class that follows `base.Simulator`
    camera.py      may be missing: prepare(), and a class Camera(simulator, size) with frame() and step_s, for films

No backend is imported until the settings choose it, or choose one that uses it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from collector_proc.simulators.setting_checks import (
    ENV_COUNTS,
    IMAGE_RANGE,
    refuse_env_count,
    refuse_ignored,
    refuse_image_range,
    unknown,
)
from shared.errors import SettingError, SimulatorError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from collector_proc.simulators.base import Simulator, SimulatorClass
    from shared.config import Settings

# Settings that choose among the spaces, rewards and first episodes of a task. A backend that fixes them ignores these.
ISAAC_LAB = ("env.isaac_overrides",)
TASK_CHOICES = (
    *("env.action_scale", "env.action_bounds", "env.obs_groups", *IMAGE_RANGE),
    *("env.reward_per_second", "env.randomize_start"),
    *ISAAC_LAB,
)


@dataclass(frozen=True)
class Backend:
    """What is known about a simulator backend before any of its code is imported.

    package: the folder with `checks` and `simulator`, as a module path. simulator: the class in `simulator`.
    ignores: the keys of settings that it does not read; any value but the default is then refused. They include
    ENV_COUNTS if env.num_envs is the number of environments, and TASK_CHOICES if its tasks leave nothing to choose.
    horizon_may_be_refused: some tasks of this backend cannot end at env.horizon, so the probe does not set one.
    starts_once: a process can start it only once, so a new round of lockstep resets it but does not seed it again.
    """

    package: str
    simulator: str
    ignores: tuple[str, ...] = ()
    horizon_may_be_refused: bool = False
    starts_once: bool = False

    @property
    def one_batch(self) -> bool:
        """Whether env.num_envs is the number of environments. Otherwise, worker processes have some each."""
        return set(ENV_COUNTS) <= set(self.ignores)


BACKENDS = {
    "dm_control": Backend("collector_proc.simulators.dm_control", "DmControlSimulator", TASK_CHOICES),
    "pendulum": Backend("collector_proc.simulators.pendulum", "PendulumSimulator", (*TASK_CHOICES, *ENV_COUNTS)),
    "torchrl": Backend(
        "collector_proc.simulators.torchrl",
        "TorchrlSimulator",
        ("env.action_bounds", "env.randomize_start", *ENV_COUNTS, *ISAAC_LAB),
        horizon_may_be_refused=True,
    ),
    "mjlab": Backend(
        "collector_proc.simulators.mjlab", "MjlabSimulator", (*ENV_COUNTS, *ISAAC_LAB), horizon_may_be_refused=True
    ),
    "isaaclab": Backend(
        "collector_proc.simulators.isaaclab",
        "IsaacLabSimulator",
        ENV_COUNTS,
        horizon_may_be_refused=True,
        starts_once=True,
    ),
}


# Names that users try, and what is called so here.
OTHER_NAMES = dict.fromkeys(("gym", "gymnasium", "mujoco"), "env.backend=torchrl env.name=gym:ID") | {
    "dmc": "env.backend=dm_control",
    "isaac": "env.backend=isaaclab",
    "isaacgym": "env.backend=isaaclab",
    "isaacsim": "env.backend=isaaclab",
    "brax": "env.backend=torchrl env.name=brax:ID",
}


def find_backend(name: str) -> Backend:
    """Return the backend that env.backend names. Raises: SettingError if there is none."""
    if name in OTHER_NAMES:
        raise SettingError(
            f"env.backend={name} is not a simulator backend; expected one of {', '.join(BACKENDS)}; "
            f"set {OTHER_NAMES[name]}"
        )
    if name not in BACKENDS:
        raise unknown(f"env.backend={name} is not a simulator backend", name, BACKENDS, setting="env.backend={}")
    return BACKENDS[name]


def check_env(settings: Settings, report: Callable[[str], None] = lambda line: None) -> None:
    """Refuse environment settings that cannot work, before anything is started. Needs no torch and no renderer.

    report: is called with one line of text before each check that takes long.
    Raises: SettingError.
    """
    env, backend = settings.env, find_backend(settings.env.backend)
    if env.grayscale and not env.from_pixels:
        raise SettingError(
            "env.grayscale=true has no effect with env.from_pixels=false; expected env.from_pixels=true; "
            "set env.from_pixels=true or env.grayscale=false"
        )
    refuse_ignored(settings, backend.ignores)
    refuse_image_range(env)
    refuse_env_count(env, one_batch=backend.one_batch)
    importlib.import_module(f"{backend.package}.checks").check(settings, report)


def build_simulator(settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> Simulator:
    """Build the simulator that the settings choose. They must have passed `check_env`.

    device: where the simulator should run. Not every backend can run there: read the `device` of the result.
    crash_dir: the folder into which simulators that can do so write states that are not finite.
    Raises: SimulatorError if the simulator does not start, SettingError if only the running simulator shows that a
    setting cannot work.
    """
    backend = find_backend(settings.env.backend)
    module = importlib.import_module(f"{backend.package}.simulator")
    make: SimulatorClass = getattr(module, backend.simulator)
    try:
        return make(settings, seed=seed, device=device, crash_dir=crash_dir)
    except SystemExit as asked:
        raise SimulatorError(
            f"the code of {settings.env.name} called sys.exit({asked.code!r}) while the simulator started; expected a "
            "simulator that starts, or an error that explains why not; look at logs/collector.out"
        ) from asked
