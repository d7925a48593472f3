"""The settings that choose a simulator: which are accepted, which are refused, and what they build."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from collector_proc.simulators.mjlab import checks as mjlab_checks
from collector_proc.simulators.pendulum.simulator import PendulumSimulator
from collector_proc.simulators.registry import BACKENDS, build_simulator, check_env
from shared.config import Settings
from shared.errors import SettingError, SimulatorError

ROOT = Path(__file__).resolve().parents[3]
LIGHT = """
import importlib, os, sys
from collector_proc.simulators import registry
from shared.config import Settings
before = dict(os.environ)
registry.check_env(Settings())
assert dict(os.environ) == before
for backend in registry.BACKENDS.values():
    importlib.import_module(f"{backend.package}.checks")
heavy = [name for name in ("torch", "tensordict", "mujoco", "OpenGL", "dm_control", "gymnasium") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.fixture(autouse=True)
def _no_renderer_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset MUJOCO_GL, which simulators that other tests build in this process leave behind."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)


def settings_with(**env: object) -> Settings:
    settings = Settings()
    for name, value in env.items():
        assert hasattr(settings.env, name), name
        setattr(settings.env, name, value)
    return settings


def pendulum_with(**env: object) -> Settings:
    defaults = {"backend": "pendulum", "name": "pendulum", "task": "swingup", "from_pixels": False, "num_envs": 8}
    return settings_with(**{**defaults, **env})


def batched_with(backend: str, **env: object) -> Settings:
    defaults = {"name": "gym:Any", "task": "", "num_envs": 2, "frame_skip": 1, "from_pixels": False}
    return settings_with(backend=backend, **{**defaults, **env})


@pytest.mark.parametrize(
    "settings",
    [
        settings_with(),
        settings_with(name="humanoid_CMU", task="stand", from_pixels=False),
        settings_with(grayscale=True),
        pendulum_with(),
    ],
)
def test_settings_that_work_are_accepted(settings: Settings) -> None:
    check_env(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            settings_with(backend="dm_contrl"),
            r"env.backend=dm_contrl is not a .*; expected one of dm_control, .*, torchrl; set env.backend=dm_control$",
        ),
        (
            settings_with(backend="zzz"),
            r"env.backend=zzz is not a .*; expected one of dm_control, .*, torchrl; set env.backend=NAME with one of",
        ),
        (
            settings_with(name="cheeta"),
            r"env.name=cheeta is not a domain.*; expected one of \d+ names, such as cheetah; set env.name=cheetah$",
        ),
        (
            settings_with(name="zzz"),
            r"env.name=zzz is not a domain.*; expected one of \d+ names, such as acrobot, .*; set env.name=NAME with",
        ),
        (
            settings_with(name="walker", task="wlak"),
            r"env.task=wlak is not a task of walker; expected one of run, stand, walk; set env.task=walk$",
        ),
        (settings_with(num_envs=64), r"env.num_envs=64 .*env.n_parallel_envs.*; expected null; set env.num_envs=null"),
        (
            settings_with(grayscale=True, from_pixels=False),
            r"env.grayscale=true .*; expected env.from_pixels=true; set env.from_pixels=true or env.grayscale=false$",
        ),
        (
            pendulum_with(name="cheetah"),
            r"env.name=cheetah .*; expected env.name=pendulum and .*swingup, balance.*; set",
        ),
        (pendulum_with(task="run"), r"env.task=run is not a task .*; expected .* one of swingup, balance .*; set"),
        (pendulum_with(from_pixels=True), r"env.from_pixels=true .*; expected false; set env.from_pixels=false"),
        (pendulum_with(num_envs=None), r"env.num_envs=null .* at least 1; set env.num_envs=8"),
        (
            batched_with("isaaclab", image_low=2.0, from_pixels=True),
            r"env.image_low=2.0 is not below env.image_high=1.0;",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_fix(settings: Settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_env(settings)


IGNORED = {
    "action_scale": (2.0, "1.0"),
    "action_bounds": ("joint_limits", '"task"'),
    "obs_groups": (["policy"], "null"),
    "reward_per_second": (True, "false"),
    "image_low": (-1.0, "0.0"),
    "image_high": (2.0, "1.0"),
    "randomize_start": (False, "true"),
}


@pytest.mark.parametrize("name", IGNORED)
@pytest.mark.parametrize("make", [settings_with, pendulum_with])
def test_a_setting_that_the_backend_ignores_is_refused(make: Callable[..., Settings], name: str) -> None:
    value, default = IGNORED[name]
    message = rf"env\.{name}=.* has no effect with env.backend=\w+; .*set env\.{name}={default}$"
    with pytest.raises(SettingError, match=message):
        check_env(make(**{name: value}))


@pytest.mark.parametrize("name", ["image_low", "image_high"])
@pytest.mark.parametrize("backend", ["torchrl", "mjlab", "isaaclab"])
def test_an_image_range_without_images_is_refused(backend: str, name: str) -> None:
    with pytest.raises(SettingError, match=rf"env\.{name}=0\.5 has no effect with env.from_pixels=false; expected"):
        check_env(batched_with(backend, **{name: 0.5}))


@pytest.mark.parametrize("backend", ["torchrl", "mjlab", "isaaclab", "pendulum"])
def test_a_simulator_that_steps_one_batch_refuses_counts_of_worker_processes(backend: str) -> None:
    settings = batched_with(backend)
    settings.collector.num_collectors = 2
    for wrong, key, default in (
        (settings, "collector.num_collectors", 7),
        (batched_with(backend, n_parallel_envs=2), "env.n_parallel_envs", 8),
    ):
        message = rf"^{key}=2 has no effect with env.backend={backend}; expected its default, {default}; leave it out"
        with pytest.raises(SettingError, match=message) as caught:
            check_env(wrong)
        assert "; leave it out: env.num_envs is the number of environments; where" in str(caught.value)
        assert f"where the config has it, set {key}={default}" in str(caught.value)
        assert "from_pixels" not in str(caught.value)


def test_all_ignored_settings_are_refused_in_one_error() -> None:
    settings = pendulum_with(n_parallel_envs=2, image_low=0.5)
    settings.collector.num_collectors = 2
    with pytest.raises(SettingError) as caught:
        check_env(settings)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("3 settings cannot work")
    expected = ("env.image_low=0.5 ", "env.n_parallel_envs=2 ", "collector.num_collectors=2 ")
    for line, start in zip(lines, expected, strict=True):
        assert line.strip().startswith(f"{start}has no effect with env.backend=pendulum")


def test_the_look_up_of_mjlabs_tasks_is_reported_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def list_tasks(*_: object, **__: object) -> list[str]:
        assert lines, "the child process was started before the report"
        return ["Mjlab-Any"]

    monkeypatch.setattr(mjlab_checks, "ask_child", list_tasks)
    monkeypatch.setattr(mjlab_checks, "check_installed", lambda *_: None)
    check_env(batched_with("mjlab", name="Mjlab-Any"), lines.append)
    assert len(lines) == 1 and lines[0].startswith("looking up mjlab's tasks")


@pytest.mark.parametrize("chosen", ["disabled", "vulkan"])
def test_a_renderer_that_cannot_draw_images_is_refused(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", chosen)
    message = rf"MUJOCO_GL={chosen} cannot be used with env.from_pixels=true; expected one of egl, .*set MUJOCO_GL=egl"
    with pytest.raises(SettingError, match=message):
        check_env(settings_with())


def test_a_dm_control_that_does_not_import_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dm_control.py").write_text("raise AttributeError('flex_vertedge')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SettingError, match=r"cannot be looked up .*: AttributeError: flex_vertedge; expected"):
        check_env(settings_with())


def test_checks_import_no_simulator_and_leave_the_process_as_it_was() -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    variables.pop("MUJOCO_GL", None)
    subprocess.run([sys.executable, "-c", LIGHT], env=variables, check=True, timeout=300)


def test_the_settings_choose_the_simulator() -> None:
    simulator = build_simulator(pendulum_with(), seed=0, device="cpu")
    assert isinstance(simulator, PendulumSimulator)
    assert simulator.spec.num_envs == 8


def test_every_row_names_settings_that_exist() -> None:
    for backend in BACKENDS.values():
        for key in backend.ignores:
            section, _, name = key.partition(".")
            assert hasattr(getattr(Settings(), section), name), key


def test_a_simulator_that_exits_while_it_starts_is_an_error_that_names_the_cause(monkeypatch):
    def leave(*arguments, **options):
        raise SystemExit(0)

    monkeypatch.setattr("collector_proc.simulators.pendulum.simulator.PendulumSimulator", leave)
    with pytest.raises(SimulatorError, match=r"called sys\.exit\(0\) while the simulator started; expected"):
        build_simulator(pendulum_with(), seed=0, device="cpu")
