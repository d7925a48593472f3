"""Which simulators there are: check the settings that choose one, build it. Torch-free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from collector_proc.simulators.checks import check_isaaclab, check_mjlab, check_torchrl, nearest, refuse_idle
from collector_proc.simulators.dm_control.environment import NO_RENDERER
from collector_proc.simulators.pendulum.simulator import TASKS
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from collector_proc.simulators.base import Simulator
    from shared.config import EnvSettings, Settings

LIST_TASKS = "import json; from dm_control import suite; print(json.dumps(suite.ALL_TASKS))"
LIST_TASKS_S = 60.0
RENDERERS = ("egl", "osmesa", "glfw")


def check_env(settings: Settings, say: Callable[[str], None] = lambda line: None) -> None:
    """Refuse environment settings that cannot work, before anything is started; needs no torch and no renderer.

    say: is told what takes long, before it begins.
    Raises: SettingError.
    """
    env = settings.env
    if env.grayscale and not env.from_pixels:
        raise SettingError(
            "env.grayscale=true has no image to act on: env.from_pixels=false; "
            "wanted both or neither; set env.from_pixels=true"
        )
    refuse_idle(settings)
    if env.backend == "dm_control":
        _check_dm_control(env)
    elif env.backend == "pendulum":
        _check_pendulum(env)
    elif env.backend == "torchrl":
        check_torchrl(env, suite_tasks=_suite_tasks() if env.name.startswith("dm_control:") else ())
    elif env.backend == "mjlab":
        check_mjlab(env, say)
    else:
        check_isaaclab(env)


def build_simulator(settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> Simulator:
    """The simulator the settings choose. dm_control lives on the CPU whatever `device` says: ask the result's `device`.

    crash_dir: where states that diverged are written, by simulators that can.
    Raises: SettingError for settings that `check_env` refuses, SimulatorError if the simulator does not start.
    """
    if settings.env.backend == "dm_control":
        from collector_proc.simulators.dm_control.simulator import DmControlSimulator

        return DmControlSimulator(settings, seed=seed)
    if settings.env.backend == "torchrl":  # as for dm_control, a name that does not exist shows when it is built
        from collector_proc.simulators.torchrl.simulator import TorchrlSimulator

        return TorchrlSimulator(settings, seed=seed, device=device, crash_dir=crash_dir)
    if settings.env.backend == "mjlab":
        from collector_proc.simulators.mjlab.simulator import MjlabSimulator

        return MjlabSimulator(settings, seed=seed, device=device, crash_dir=crash_dir)
    check_env(settings)
    if settings.env.backend == "isaaclab":
        from collector_proc.simulators.isaaclab.simulator import IsaacLabSimulator

        return IsaacLabSimulator(settings, seed=seed, device=device, crash_dir=crash_dir)
    from collector_proc.simulators.pendulum.simulator import PendulumSimulator

    return PendulumSimulator(settings, seed=seed, device=device)


def _check_pendulum(env: EnvSettings) -> None:
    if env.name != "pendulum" or env.task not in TASKS:
        raise SettingError(
            f"env.backend=pendulum has other tasks: met env.name={env.name} env.task={env.task}, wanted pendulum and one "
            f"of {', '.join(TASKS)}; set env.name=pendulum env.task={nearest(env.task, TASKS).split(',')[0]}"
        )
    if env.from_pixels:
        raise SettingError(
            "env.backend=pendulum has no images: met env.from_pixels=true, wanted false; set env.from_pixels=false"
        )
    if env.num_envs is None:
        raise SettingError(
            "env.backend=pendulum steps one batch: met env.num_envs=null, wanted at least 1; set env.num_envs=8 "
            "(env.n_parallel_envs and collector.num_collectors are for dm_control)"
        )


def _check_dm_control(env: EnvSettings) -> None:
    if env.num_envs is not None:
        raise SettingError(
            f"env.num_envs={env.num_envs} is for batched simulators: env.backend=dm_control wanted null, it has "
            "collector.num_collectors x env.n_parallel_envs environments; set env.num_envs=null and those two"
        )
    _check_renderer(env)
    tasks = _suite_tasks()
    domains = sorted({domain for domain, _ in tasks})
    if env.name not in domains:
        raise SettingError(
            f"env.name={env.name} is no domain of dm_control; "
            f"wanted one of {nearest(env.name, domains)}; set env.name to it"
        )
    in_domain = [task for domain, task in tasks if domain == env.name]
    if env.task not in in_domain:
        raise SettingError(
            f"env.task={env.task} is no task of {env.name}; "
            f"wanted one of {nearest(env.task, in_domain)}; set env.task to it"
        )


def _check_renderer(env: EnvSettings) -> None:
    chosen = os.environ.get("MUJOCO_GL")
    allowed = RENDERERS if env.from_pixels else (*RENDERERS, *NO_RENDERER)
    if chosen and chosen not in allowed:
        wanted = ", ".join(RENDERERS)
        raise SettingError(
            f"MUJOCO_GL={chosen} does not serve env.from_pixels={str(env.from_pixels).lower()}; "
            f"wanted one of {wanted}; set MUJOCO_GL=egl or unset it"
        )


def _suite_tasks() -> list[tuple[str, str]]:
    """Every (domain, task), asked of a child process: an import here would fix this process's renderer for good."""
    variables = {**os.environ, "MUJOCO_GL": "disabled"}
    command = [sys.executable, "-c", LIST_TASKS]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIST_TASKS_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        stderr = error.stderr.decode() if isinstance(error.stderr, bytes) else error.stderr
        last_words = (stderr or str(error)).strip().splitlines()[-1]
        raise SettingError(
            f"env.backend=dm_control does not import: {last_words}; wanted dm_control and a mujoco that fits it; "
            "install the pair pinned in pyproject.toml or choose env.backend=pendulum"
        ) from error
    return [(domain, task) for domain, task in json.loads(done.stdout.splitlines()[-1])]
