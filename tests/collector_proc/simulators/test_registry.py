"""Laws of the settings that choose a simulator."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from collector_proc.simulators import checks
from collector_proc.simulators.pendulum.simulator import PendulumSimulator
from collector_proc.simulators.registry import build_simulator, check_env
from shared.config import Settings, num_envs
from shared.errors import SettingError

ROOT = Path(__file__).resolve().parents[3]
TORCH_FREE = """
import os, sys
from collector_proc.simulators import registry
from collector_proc.simulators.dm_control import environment, workers
from collector_proc.simulators.pendulum import simulator
from shared.config import Settings
before = dict(os.environ)
registry.check_env(Settings())
assert dict(os.environ) == before
heavy = [name for name in ("torch", "tensordict", "mujoco", "OpenGL", "dm_control") if name in sys.modules]
assert not heavy, heavy
"""


def settings_with(**env: object) -> Settings:
    settings = Settings()
    for name, value in env.items():
        assert hasattr(settings.env, name), name
        setattr(settings.env, name, value)
    return settings


def pendulum_with(**env: object) -> Settings:
    defaults = {"backend": "pendulum", "name": "pendulum", "task": "swingup", "from_pixels": False, "num_envs": 8}
    return settings_with(**{**defaults, **env})


@pytest.mark.parametrize(
    "settings",
    [
        settings_with(),
        settings_with(name="humanoid_CMU", task="stand", from_pixels=False),
        settings_with(grayscale=True),
        pendulum_with(),
    ],
)
def test_settings_that_work_pass(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    check_env(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_with(name="cheeta"), r"env.name=cheeta is no domain.*wanted one of cheetah, .*set env.name"),
        (
            settings_with(name="walker", task="wlak"),
            r"env.task=wlak is no task of walker; wanted one of walk, .*set env.task",
        ),
        (settings_with(num_envs=64), r"env.num_envs=64 .*wanted null.*env.n_parallel_envs.*set env.num_envs=null"),
        (
            settings_with(grayscale=True, from_pixels=False),
            r"env.grayscale=true .*env.from_pixels=false; .*set env.from_pixels=true",
        ),
        (pendulum_with(name="cheetah"), r"env.name=cheetah .*wanted pendulum and one of swingup, balance; set"),
        (pendulum_with(task="run"), r"env.task=run, wanted pendulum and one of swingup, balance; set"),
        (pendulum_with(from_pixels=True), r"met env.from_pixels=true, wanted false; set env.from_pixels=false"),
        (pendulum_with(num_envs=None), r"met env.num_envs=null, wanted at least 1; set env.num_envs=8"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_mend(settings: Settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_env(settings)


IDLE = {
    "action_scale": (2.0, "1.0"),
    "obs_groups": (["policy"], "null"),
    "reward_per_second": (True, "false"),
    "image_low": (-1.0, "0.0"),
    "image_high": (2.0, "1.0"),
    "randomize_start": (False, "true"),
}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("make", [settings_with, pendulum_with])
def test_settings_a_backend_does_not_read_are_refused(make: Callable[..., Settings], name: str) -> None:
    value, mend = IDLE[name]
    with pytest.raises(
        SettingError, match=rf"env\.{name}=.* does nothing with env.backend=\w+; .*set env\.{name}={mend}$"
    ):
        check_env(make(**{name: value}))


@pytest.mark.parametrize("name", ["image_low", "image_high"])
@pytest.mark.parametrize("backend", ["torchrl", "mjlab", "isaaclab"])
def test_a_range_of_images_needs_images(backend: str, name: str) -> None:
    batched = {"backend": backend, "name": "gym:Any", "task": "", "num_envs": 2, "frame_skip": 1, "from_pixels": False}
    with pytest.raises(SettingError, match=rf"env\.{name}=0\.5 does nothing with env.from_pixels=false; wanted"):
        check_env(settings_with(**batched, **{name: 0.5}))


@pytest.mark.parametrize("backend", ["torchrl", "mjlab", "isaaclab", "pendulum"])
def test_batched_simulators_have_no_worker_processes(backend: str) -> None:
    batched = {"backend": backend, "name": "gym:Any", "task": "", "num_envs": 2, "frame_skip": 1, "from_pixels": False}
    settings = settings_with(**batched)
    settings.collector.num_collectors = 2
    with pytest.raises(
        SettingError, match=r"num_collectors=2 does nothing with env.backend=\w+; .*leave it out"
    ) as caught:
        check_env(settings)
    for part in (
        "the number of environments is env.num_envs=2",
        "where the config has it, set collector.num_collectors=7",
    ):
        assert part in str(caught.value)
    assert "from_pixels" not in str(caught.value)
    with pytest.raises(
        SettingError, match=r"env\.n_parallel_envs=2 does nothing .*leave it out: .*env.num_envs=2"
    ) as caught:
        check_env(settings_with(**batched, n_parallel_envs=2))
    assert "from_pixels" not in str(caught.value)


def test_the_look_up_of_mjlabs_tasks_is_told_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def tasks(*_: object) -> list[str]:
        assert said, "the child was asked before anything was said"
        return ["Mjlab-Any"]

    monkeypatch.setattr(checks, "ask_child", tasks)
    monkeypatch.setattr(checks, "_check_importable", lambda *_: None)
    mjlab = {"backend": "mjlab", "name": "Mjlab-Any", "task": "", "num_envs": 2, "frame_skip": 1, "from_pixels": False}
    check_env(settings_with(**mjlab), said.append)
    assert len(said) == 1 and said[0].startswith("looking up mjlab's tasks")


def test_all_settings_that_a_backend_does_not_read_are_told_together() -> None:
    settings = pendulum_with(n_parallel_envs=2, image_low=0.5)
    settings.collector.num_collectors = 2
    with pytest.raises(SettingError) as caught:
        check_env(settings)
    head, *lines = str(caught.value).splitlines()
    assert head == "3 settings cannot work:"
    wanted = ("env.image_low=0.5 ", "env.n_parallel_envs=2 ", "collector.num_collectors=2 ")
    for line, start in zip(lines, wanted, strict=True):
        assert line.strip().startswith(f"{start}does nothing with env.backend=pendulum")


@pytest.mark.parametrize("chosen", ["disabled", "vulkan"])
def test_a_renderer_that_cannot_serve_pixels_is_refused(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", chosen)
    with pytest.raises(
        SettingError, match=rf"MUJOCO_GL={chosen} does not serve env.from_pixels=true; .*set MUJOCO_GL=egl"
    ):
        check_env(settings_with())


def test_a_dm_control_that_does_not_import_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dm_control.py").write_text("raise AttributeError('flex_vertedge')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SettingError, match="does not import: AttributeError: flex_vertedge; wanted"):
        check_env(settings_with())


def test_checking_needs_no_torch_no_renderer_and_leaves_the_environment_alone() -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    variables.pop("MUJOCO_GL", None)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", TORCH_FREE], env=variables, check=True, timeout=60)
    assert time.monotonic() - start < 10  # about one second on a quiet machine


def test_environments_are_counted_as_the_backend_has_them() -> None:
    settings = settings_with(n_parallel_envs=8)
    for workers, expected in ((7, 56), (1, 8), (0, 8)):
        settings.collector.num_collectors = workers
        assert num_envs(settings) == expected
    assert num_envs(pendulum_with(num_envs=64)) == 64
    with pytest.raises(SettingError, match=r"env.num_envs=null .*wanted at least 1; set env.num_envs=8"):
        num_envs(pendulum_with(num_envs=None))


def test_the_settings_choose_the_simulator() -> None:
    simulator = build_simulator(pendulum_with(), seed=0, device="cpu")
    assert isinstance(simulator, PendulumSimulator)
    assert simulator.spec.num_envs == 8
