"""The vector of dm_control environments, without and with workers, with state vectors and with images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from collector_proc.simulators.dm_control.simulator import DmControlSimulator
from collector_proc.simulators.registry import build_simulator
from shared.config import Settings
from shared.geometry import count_envs

ROOT = Path(__file__).resolve().parents[4]
# dm_control chooses its renderer once per process, so the expected images are made in another process.
RENDER = """
import sys, numpy as np
from collector_proc.simulators.dm_control.environment import environment_seed
from dm_control import suite
domain, task, camera, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
frames = []
for index in (0, 1):
    env = suite.load(domain, task, task_kwargs={"random": environment_seed(7, index)})
    env.reset()
    frames.append([env.physics.render(64, 64, camera_id=camera)])
    for action in np.linspace(-1, 1, 3):
        env.step(np.full(env.action_spec().shape, action))
        frames[-1].append(env.physics.render(64, 64, camera_id=camera))
np.save(path, np.stack(frames, 1))
"""


def settings_for(
    *, workers: int, envs: int, domain: str = "cheetah", task: str = "run", pixels: bool = False
) -> Settings:
    settings = Settings()
    settings.env.name, settings.env.task, settings.env.from_pixels = domain, task, pixels
    settings.env.n_parallel_envs, settings.collector.num_collectors = envs, workers
    settings.deadlines.start_s, settings.deadlines.step_s = 120.0, 60.0
    return settings


@pytest.fixture(scope="module")
def egl() -> dict[str, str]:
    """Return the environment variables of a child process that renders with EGL. Skip the test if EGL does not work."""
    environ = {**os.environ, "MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT)}
    probe = subprocess.run(
        [sys.executable, "-c", "from dm_control import suite"], env=environ, capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"no EGL here: {probe.stderr.strip().splitlines()[-1]}")
    return environ


def test_rendering_starts_although_egl_has_fewer_devices_than_nvidia_smi(egl) -> None:
    chosen = {"MUJOCO_EGL_DEVICE_ID": "99", "TANDEM_SIM_GPU_INDEX": "99"}
    code = "from collector_proc.simulators.dm_control.environment import load_suite; load_suite(from_pixels=True)"
    done = subprocess.run([sys.executable, "-c", code], env={**egl, **chosen}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rollout(settings: Settings, num_ticks: int) -> list[np.ndarray]:
    """Return one array per tick with all fields of the arrival. The actions do not depend on the number of workers."""
    simulator = build_simulator(settings, seed=7, device="cpu")
    rng = np.random.default_rng(1)
    try:
        arrivals, arrival = [], simulator.reset()
        for _ in range(num_ticks):
            fields = [arrival.obs["policy"], arrival.reward, arrival.is_first, arrival.is_last, arrival.is_terminal]
            arrivals.append(np.concatenate([field.numpy().reshape(-1).astype(np.float32) for field in fields]))
            action = rng.uniform(-1, 1, (simulator.spec.num_envs, simulator.spec.action_dim))
            arrival = simulator.step(torch.from_numpy(action.astype(np.float32)))
        return arrivals
    finally:
        simulator.close()


def test_environments_in_workers_and_in_this_process_give_the_same_arrivals() -> None:
    alone, pooled = settings_for(workers=0, envs=4), settings_for(workers=2, envs=2)
    alone.env.horizon = pooled.env.horizon = 5
    assert count_envs(alone) == count_envs(pooled) == 4
    first, second = rollout(alone, 14), rollout(pooled, 14)
    assert len(first) == 14
    np.testing.assert_array_equal(np.stack(first), np.stack(second))


def test_each_environment_has_its_own_start_and_executes_its_own_action() -> None:
    simulator = DmControlSimulator(settings_for(workers=2, envs=2, domain="cartpole", task="balance"), seed=0)
    try:
        start = simulator.reset().obs["policy"].clone()
        assert len({tuple(row) for row in start.tolist()}) == 4
        arrival = simulator.step(torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]))
        pushed = arrival.obs["policy"][:, 3] - start[:, 3]  # position of the cart, cosine, sine, its velocity, ...
        assert (torch.sign(pushed) == torch.tensor([-1.0, 1.0, -1.0, 1.0])).all()
    finally:
        simulator.close()


def test_the_flags_of_arrivals_follow_the_interface() -> None:
    settings = settings_for(workers=1, envs=2)
    settings.env.horizon = 2
    simulator = DmControlSimulator(settings, seed=0)
    try:
        seen, arrival = [], simulator.reset()
        for _ in range(5):
            seen.append((arrival.is_first.tolist(), arrival.is_last.tolist(), (arrival.reward == 0).tolist()))
            arrival = simulator.step(torch.full((2, 6), 0.7))
        both, none = [True, True], [False, False]
        assert seen == [
            (both, none, both),
            (none, none, none),
            (none, both, none),
            (both, none, both),
            (none, none, none),
        ]
        assert (simulator.device, simulator.frames_per_step, simulator.num_diverged) == ("cpu", 2, 0)
        assert not arrival.is_terminal.any()
        assert {name: tuple(entry.shape) for name, entry in arrival.obs.items()} == {"policy": (2, 17)}
    finally:
        simulator.close()


def test_a_reset_within_episodes_begins_a_new_one_in_every_environment() -> None:
    simulator = DmControlSimulator(settings_for(workers=1, envs=2), seed=0)
    try:
        start = simulator.reset().obs["policy"].clone()
        assert not simulator.step(torch.ones(2, 6)).is_first.any()
        arrival = simulator.reset()
        assert arrival.is_first.all() and (arrival.reward == 0).all()
        assert (arrival.obs["policy"] != start).any(dim=1).all()
        assert not simulator.step(torch.ones(2, 6)).is_first.any()
    finally:
        simulator.close()


@pytest.mark.parametrize(("domain", "task", "camera"), [("cheetah", "run", 0), ("quadruped", "walk", 2)])
def test_images_equal_those_that_dm_control_renders(
    domain: str, task: str, camera: int, egl: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "frames.npy"
    subprocess.run(
        [sys.executable, "-c", RENDER, domain, task, str(camera), str(path)], env=egl, check=True, timeout=300
    )
    expected = np.load(path)  # (ticks, environments, height, width, channels)
    settings = settings_for(workers=1, envs=2, domain=domain, task=task, pixels=True)
    settings.env.frame_skip = 1
    images = []
    simulator = DmControlSimulator(settings, seed=7)
    try:
        spec = simulator.spec
        assert spec.obs["pixels"].shape == (64, 64, 3) and list(spec.obs) == ["pixels"]
        low, high = action_range(domain, task)
        images.append(simulator.reset().obs["pixels"].numpy().copy())
        for action in np.linspace(-1, 1, 3):
            normalised = (2 * action - low - high) / (high - low)
            batch = torch.from_numpy(np.stack([normalised] * 2).astype(np.float32))
            images.append(simulator.step(batch).obs["pixels"].numpy().copy())
    finally:
        simulator.close()
    assert np.ptp(expected) > 50 and (expected[0] != expected[-1]).any()
    difference = np.abs(np.stack(images).astype(int) - expected)
    assert difference.max() <= 1  # the simulator gets the actions as float32


def action_range(domain: str, task: str) -> tuple[np.ndarray, np.ndarray]:
    from collector_proc.simulators.dm_control.environment import load_suite

    spec = load_suite(from_pixels=False).load(domain, task).action_spec()
    return spec.minimum, spec.maximum


def test_a_gray_image_is_the_brightness_of_the_colour_image(egl: dict[str, str]) -> None:
    frames = {}
    for grayscale in (False, True):
        settings = settings_for(workers=1, envs=1, pixels=True)
        settings.env.grayscale = grayscale
        simulator = DmControlSimulator(settings, seed=7)
        try:
            frames[grayscale] = simulator.reset().obs["pixels"][0].numpy().astype(float)
        finally:
            simulator.close()
    assert frames[True].shape == (64, 64, 1)
    red, green, blue = np.moveaxis(frames[False], -1, 0)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    np.testing.assert_allclose(frames[True][..., 0], expected, rtol=0, atol=0.5 + 1e-9)
