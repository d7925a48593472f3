"""One dm_control environment behaves as dm_control does when its own interface is used."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from collector_proc.simulators.dm_control import egl
from collector_proc.simulators.dm_control.environment import (
    SuiteEnvironment,
    SuitePlan,
    environment_seed,
    load_suite,
    renderer_variables,
    run_tick,
)
from collector_proc.simulators.dm_control.tick_buffer import TickBuffer, tick_bytes
from shared.errors import SimulatorError
from shared.stream import ObsSpec, StreamSpec

CHEETAH = SuitePlan("cheetah", "run", seed=3, frame_skip=2, from_pixels=False, grayscale=False, horizon=None)


def tick_for(environment: SuiteEnvironment, num_envs: int = 1) -> TickBuffer:
    spec = StreamSpec(num_envs, environment.obs, environment.action_dim)
    return TickBuffer(spec, mmap.mmap(-1, tick_bytes(spec)))


def started(plan: SuitePlan, index: int = 0) -> tuple[SuiteEnvironment, TickBuffer]:
    environment = SuiteEnvironment(plan, index)
    tick = tick_for(environment, index + 1)
    environment.reset(tick, index)
    return environment, tick


def raw_environment(plan: SuitePlan, index: int = 0) -> Any:
    suite = load_suite(from_pixels=False)
    return suite.load(plan.domain, plan.task, task_kwargs={"random": environment_seed(plan.seed, index)})


def flags(tick: TickBuffer, row: int = 0) -> tuple[bool, bool, bool]:
    return bool(tick.is_first[row]), bool(tick.is_last[row]), bool(tick.is_terminal[row])


@pytest.mark.parametrize(
    ("count", "environ", "replaced"),
    [
        (1, {"MUJOCO_EGL_DEVICE_ID": "1", "TANDEM_SIM_GPU_INDEX": "1"}, True),
        (2, {"MUJOCO_EGL_DEVICE_ID": "1", "TANDEM_SIM_GPU_INDEX": "1"}, False),
        (None, {"MUJOCO_EGL_DEVICE_ID": "1", "TANDEM_SIM_GPU_INDEX": "1"}, False),
        (1, {"MUJOCO_EGL_DEVICE_ID": "3", "TANDEM_SIM_GPU_INDEX": "1"}, False),
        (1, {"MUJOCO_EGL_DEVICE_ID": "1", "TANDEM_SIM_GPU_INDEX": "1", "MUJOCO_GL": "osmesa"}, False),
        (1, {}, False),
    ],
)
def test_a_device_that_launch_chose_and_egl_does_not_have_is_not_used(
    monkeypatch: pytest.MonkeyPatch, count: int | None, environ: dict[str, str], replaced: bool
) -> None:
    """A device that the user chose is used, and if EGL does not have it, dm_control reports it."""
    monkeypatch.setattr(egl, "count_devices", lambda: count)
    variables = renderer_variables(True, environ)
    assert variables["MUJOCO_GL"] == environ.get("MUJOCO_GL", "egl")
    assert variables.get("MUJOCO_EGL_DEVICE_ID") == ("0" if replaced else None)


@pytest.mark.parametrize(("domain", "task", "repeat"), [("cheetah", "run", 2), ("walker", "walk", 3)])
def test_observations_and_rewards_equal_those_of_dm_control(domain: str, task: str, repeat: int) -> None:
    plan = replace(CHEETAH, domain=domain, task=task, frame_skip=repeat)
    environment, tick = started(plan, index=1)
    raw = raw_environment(plan, index=1)
    expected = raw.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (60, environment.action_dim)).astype(np.float32)
    rewarded = 0
    for action in actions:
        flat = np.concatenate([np.ravel(entry) for entry in expected.observation.values()])
        np.testing.assert_array_equal(tick.obs["policy"][1], flat.astype(np.float32))
        tick.action[1] = action
        environment.step(tick, 1)
        reward = 0.0
        for _ in range(repeat):
            expected = raw.step(action)
            reward += expected.reward
        assert tick.reward[1] == np.float32(reward)
        rewarded += reward != 0.0
    assert rewarded > 10


def test_an_episode_ends_inside_an_action_repeat_and_the_next_tick_is_its_reset() -> None:
    plan = replace(CHEETAH, domain="cartpole", task="balance", frame_skip=3)
    environment, tick = started(plan)
    assert (flags(tick), tick.reward[0]) == ((True, False, False), 0.0)
    raw = raw_environment(plan)
    raw.reset()
    frames = []
    for step in range(1, 335):
        environment.step(tick, 0)
        frames = [raw.step(np.zeros(1)) for _ in range(3 if step < 334 else 1)]
        assert tick.reward[0] == np.float32(sum(frame.reward for frame in frames))
        assert flags(tick) == (False, step == 334, False), step  # 1000 frames are 333 whole repeats and one frame
    assert frames[-1].last()
    tick.action[0] = 1.0
    environment.step(tick, 0)
    assert (flags(tick), tick.reward[0]) == ((True, False, False), 0.0)
    np.testing.assert_array_equal(
        tick.obs["policy"][0],
        np.concatenate([np.ravel(v) for v in raw.reset().observation.values()]).astype(np.float32),
    )


def test_the_horizon_cuts_an_episode_as_a_time_out() -> None:
    environment, tick = started(replace(CHEETAH, horizon=3))
    seen = []
    for _ in range(8):
        environment.step(tick, 0)
        seen.append(flags(tick))
    middle, last, first = (False, False, False), (False, True, False), (True, False, False)
    assert seen == [middle, middle, last, first, middle, middle, last, first]


def test_an_episode_that_ends_with_discount_zero_is_terminal() -> None:
    environment, tick = started(replace(CHEETAH, domain="lqr", task="lqr_2_1"))
    physics = environment._env.physics
    with physics.reset_context():
        physics.data.qpos[:] = 1e-9  # nearer to the origin than the task's tolerance of 1e-6
    environment.step(tick, 0)
    assert flags(tick) == (False, True, True)
    environment.step(tick, 0)
    assert flags(tick) == (True, False, False)


def test_a_divergence_ends_the_episode_with_the_last_finite_observation_and_reward_zero() -> None:
    environment, tick = started(CHEETAH)
    environment.step(tick, 0)
    good = tick.obs["policy"][0].copy()
    environment._env.physics.data.qvel[0] = np.nan
    environment.step(tick, 0)
    assert flags(tick) == (False, True, False)
    assert (tick.reward[0], tick.num_diverged[0]) == (0.0, 1)
    np.testing.assert_array_equal(tick.obs["policy"][0], good)
    environment.step(tick, 0)
    assert flags(tick) == (True, False, False)
    environment.step(tick, 0)
    assert flags(tick) == (False, False, False)
    assert np.isfinite(tick.obs["policy"][0]).all()
    assert tick.num_diverged[0] == 1


def test_ten_resets_in_a_row_that_diverge_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, tick = started(CHEETAH)

    def diverge() -> None:
        raise environment._physics_error("bad")

    monkeypatch.setattr(environment._env, "reset", diverge)
    with pytest.raises(SimulatorError, match="the physics diverged at 10 resets in a row; expected"):
        environment.reset(tick, 0)
    assert tick.num_diverged[0] == 10


def test_actions_span_the_range_of_each_actuator() -> None:
    environment, tick = started(replace(CHEETAH, domain="quadruped", task="walk"))
    spec = environment._env.action_spec()
    assert spec.maximum[1] == 1.1 and spec.minimum[2] == -0.8  # the ranges of the actuators differ
    middle = (spec.minimum + spec.maximum) / 2
    for action, ctrl in ((1.0, spec.maximum), (-1.0, spec.minimum), (0.0, middle)):
        tick.action[0] = action
        environment.step(tick, 0)
        np.testing.assert_allclose(environment._env.physics.data.ctrl, ctrl, rtol=0, atol=1e-12)


def test_actions_of_actuators_without_limits_are_not_scaled() -> None:
    environment, tick = started(replace(CHEETAH, domain="lqr", task="lqr_6_2"))
    tick.action[0] = (0.25, -0.5)
    environment.step(tick, 0)
    np.testing.assert_array_equal(environment._env.physics.data.ctrl, (0.25, -0.5))


def test_each_environment_has_its_own_start_states_and_a_seed_repeats_them() -> None:
    starts = {}
    for seed, index in ((3, 0), (3, 1), (4, 0), (4, 1)):
        _, tick = started(replace(CHEETAH, seed=seed), index)
        starts[seed, index] = tuple(tick.obs["policy"][index])
    assert len(set(starts.values())) == 4
    _, again = started(CHEETAH, 1)
    assert tuple(again.obs["policy"][1]) == starts[3, 1]


def test_an_exception_names_the_environment_that_raised_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, tick = started(CHEETAH, index=4)

    def break_down(*_: object) -> None:
        raise KeyError("torso")

    monkeypatch.setattr(environment._env, "step", break_down)
    with pytest.raises(SimulatorError, match="environment 4 failed: KeyError: 'torso'"):
        run_tick([environment], tick, reset=False)


def test_rows_of_a_tick_buffer_do_not_overlap() -> None:
    spec = StreamSpec(3, {"policy": ObsSpec((5,), "float32"), "pixels": ObsSpec((2, 2, 3), "uint8")}, 2)
    memory = mmap.mmap(-1, tick_bytes(spec))
    memory.write(b"\xff" * len(memory))
    tick = TickBuffer(spec, memory)
    views = [
        tick.action,
        *tick.obs.values(),
        tick.reward,
        tick.is_first,
        tick.is_last,
        tick.is_terminal,
        tick.num_diverged,
    ]
    for number, view in enumerate(views):
        view[...] = number % 2 if view.dtype == bool else number
    for number, view in enumerate(views):
        assert view.shape[0] == 3
        assert (view == (number % 2 if view.dtype == bool else number)).all()


def step_randomly(domain: str, task: str) -> None:
    """Make ten agent steps of random actions. Observations are finite and change."""
    environment, tick = started(replace(CHEETAH, domain=domain, task=task))
    rng = np.random.default_rng(0)
    before = tick.obs["policy"].copy()
    for _ in range(10):
        tick.action[0] = rng.uniform(-1, 1, environment.action_dim)
        environment.step(tick, 0)
        assert flags(tick) == (False, False, False)
        assert np.isfinite(tick.obs["policy"]).all() and np.isfinite(tick.reward).all()
    assert tick.num_diverged[0] == 0
    assert (tick.obs["policy"] != before).any()


def test_every_task_of_the_suite_runs_with_state_observations() -> None:
    tasks = load_suite(from_pixels=False).ALL_TASKS
    assert len(tasks) >= 51
    for domain, task in tasks:
        step_randomly(domain, task)
