"""The isaaclab backend with tier A: a fake Isaac Lab that changes the process as Kit does. No real Isaac Sim runs here.

The fake's observation "policy" (E, 4) holds the environment, the episode, the age in steps and the last action. The
reward of a step is 0.02 times the age. Even environments terminate at age 5 + env; all others time out after 10 steps.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collector_proc.simulators.isaaclab.checks import is_isaac_lab_3
from collector_proc.simulators.isaaclab.kit import simulator_device
from collector_proc.simulators.registry import check_env
from shared.compose import compose
from shared.errors import SettingError
from shared.lifetime import SIM_GPU_INDEX
from tests.fakes.isaac_tiers import TIER_A, drive, environment

WHOLE = "env.randomize_start=false"
TASKS = ["Fake-Manager-v0", "Fake-Direct-v0", "Fake-Final-v0", "Fake-Bounded-v0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return 30 ticks of 4 environments that start at age 0. Each task runs only once."""
    return functools.cache(lambda task: drive(tmp_path_factory.mktemp("whole"), "A", task, WHOLE, num_envs=4))


@pytest.mark.parametrize("task", TASKS)
def test_a_row_that_ends_an_episode_holds_its_true_last_observation(whole: Callable, task: str) -> None:
    seen = whole(task)
    assert not seen["error"]
    policy, acting, last = (seen["rows"][key] for key in ("obs.policy", "acting.policy", "is_last"))
    ends = {env: last[:, env].nonzero().flatten().tolist() for env in range(4)}
    assert ends == {0: [5, 10, 15, 20, 25, 30], 1: [10, 20, 30], 2: [7, 14, 21, 28], 3: [10, 20, 30]}
    for env, ticks in ends.items():
        length = ticks[0]
        for number, tick in enumerate(ticks, 1):
            assert policy[tick, env, :3].tolist() == [env, number, length]
            assert acting[tick, env].tolist() == [env, number + 1, 0, 0], "the policy acts on the new episode"
            torch.testing.assert_close(seen["truth"][tick][env], policy[tick, env], rtol=0, atol=0)
    torch.testing.assert_close(policy[~last], acting[~last], rtol=0, atol=0)


def test_flags_and_rewards_of_a_simulator_that_resets_inside_its_step(whole: Callable) -> None:
    rows = whole("Fake-Manager-v0")["rows"]
    first, last = rows["is_first"], rows["is_last"]
    assert first[0].all() and not rows["reward"][0].any()
    assert torch.equal(first[1:], last[:-1]), "a row is first if and only if the row before it was last"
    ends = last.nonzero()
    even = ends[:, 1] % 2 == 0
    terminal = rows["is_terminal"][ends[:, 0], ends[:, 1]]
    assert torch.equal(terminal, even), "odd environments only time out; both ends at once count as terminated"
    assert not rows["is_terminal"][~last].any()
    torch.testing.assert_close(rows["reward"][1:], 0.02 * rows["obs.policy"][1:, :, 2], rtol=1e-6, atol=0)
    assert (rows["reward"][1:][first[1:]] > 0).all(), "the first row of an episode keeps its true reward"


@pytest.mark.parametrize("task", ["Fake-Manager-v0", "Fake-Direct-v0", "Fake-Final-v0"])
def test_arrivals_own_their_memory(whole: Callable, task: str) -> None:
    seen = whole(task)
    for name, entry in seen["rows"].items():
        torch.testing.assert_close(
            seen["kept"][name], entry, rtol=0, atol=0, msg=f"{name} was overwritten by later steps"
        )


def test_what_the_launcher_changes_in_the_process_is_restored(tmp_path: Path) -> None:
    record = tmp_path / "record"
    seen = drive(tmp_path, "A", "Fake-Manager-v0", ticks=1, FAKE_RECORD=str(record))
    assert seen["facts"] == {
        "argv": True,
        "stdout": True,
        "handler": True,
        "fatal": [True, True],
        "gc": True,
        "launcher lives": True,
    }
    (call,) = [json.loads(line) for line in record.read_text().splitlines()]
    assert not call["torch"], "torch was imported before AppLauncher"
    assert len(call["argv"]) == 1, "Kit would have parsed our arguments"
    assert call["kwargs"] == {"headless": True, "device": "cpu", "enable_cameras": False, "multi_gpu": False}
    assert call["environ"]["OMNI_KIT_ACCEPT_EULA"] == "YES"


def test_the_launcher_stays_alive_if_the_simulator_cannot_be_built(tmp_path: Path) -> None:
    seen = drive(tmp_path, "A", "Fake-Discrete-v0", ticks=1)
    assert seen["error"] and seen["facts"]["launcher lives"], (
        "without a reference to the launcher, Kit closes and ends the process"
    )


def test_a_launcher_that_exits_raises_an_error_that_names_the_licence(tmp_path: Path) -> None:
    error = drive(tmp_path, "A", "Fake-Manager-v0", ticks=1, FAKE_EXIT="55")["error"]
    assert error.startswith("SimulatorError: ") and "code 55" in error and "OMNI_KIT_ACCEPT_EULA=YES" in error


def test_the_users_own_licence_setting_is_kept(tmp_path: Path) -> None:
    record = tmp_path / "record"
    drive(tmp_path, "A", "Fake-Manager-v0", ticks=1, FAKE_RECORD=str(record), OMNI_KIT_ACCEPT_EULA="NO")
    assert json.loads(record.read_text())["environ"]["OMNI_KIT_ACCEPT_EULA"] == "NO"


def test_a_close_that_hangs_ends_the_process_with_the_right_code_and_all_stacks(tmp_path: Path) -> None:
    seen = drive(tmp_path, "A", "Fake-Manager-v0", ticks=1, FAKE_HANG_CLOSE="1")  # drive() checks the code
    assert "closing the simulator took more than 1 s; ending with code 3" in seen["stderr"]
    assert "isaaclab_tasks.py" in seen["stderr"] and "in close" in seen["stderr"]


@pytest.mark.parametrize("task", ["Fake-Manager-v0", "Fake-Direct-v0"])
def test_an_environment_that_diverges_is_zeroed_reset_counted_and_written_to_disk(tmp_path: Path, task: str) -> None:
    seen = drive(tmp_path, "A", task, WHOLE, num_envs=4, ticks=12, FAKE_NAN="4:1")
    rows = seen["rows"]
    assert all(entry.isfinite().all() for entry in rows.values())
    assert rows["obs.policy"][4, 1].tolist() == [0, 0, 0, 0] and rows["reward"][4, 1] == 0
    assert rows["acting.policy"][4, 1].tolist() == [0, 0, 0, 0]
    assert rows["is_first"][4, 1] and rows["is_last"][4, 1] and not rows["is_terminal"][4, 1]
    assert rows["is_first"][5, 1] and not rows["is_last"][5, 1]
    assert rows["obs.policy"][5, 1, :3].tolist() == [1, 2, 1], "it was reset: a new episode at its first step"
    assert rows["obs.policy"][4, 0, :3].tolist() == [0, 1, 4], "the other environments are unchanged"
    assert seen["num_diverged"] == 1
    (dump,) = tmp_path.glob("diverged-*.npz")
    written = np.load(dump)
    assert written["env"].tolist() == [1] and np.isnan(written["obs.policy"][0, 2])


def test_first_training_episodes_end_at_different_times_but_evaluation_ones_are_whole(tmp_path: Path) -> None:
    overrides = ["collector.eval_envs=4"]
    rows = drive(tmp_path, "A", "Fake-Manager-v0", *overrides, num_envs=40, ticks=10)["rows"]
    odd = torch.arange(1, 40, 2)  # they only time out
    first_end = rows["is_last"][:, odd].int().argmax(0)
    evaluating = torch.isin(odd, torch.tensor([9, 19, 29, 39]))
    assert (first_end[evaluating] == 10).all()
    assert first_end[~evaluating].unique().numel() >= 5


@pytest.mark.parametrize(("overrides", "ends_the_task"), [((), True), (("env.horizon=7",), False)])
def test_a_time_out_of_a_task_with_a_finite_horizon_is_terminal(
    tmp_path: Path, overrides: tuple[str, ...], ends_the_task: bool
) -> None:
    rows = drive(tmp_path, "A", "Fake-Finite-v0", WHOLE, *overrides, num_envs=4, ticks=11)["rows"]
    timed_out = rows["is_last"][:, 1::2]  # odd environments never terminate
    assert timed_out.any() and bool(rows["is_terminal"][:, 1::2][timed_out].all()) is ends_the_task
    assert not rows["is_terminal"][~rows["is_last"]].any()


def test_a_task_that_draws_ages_itself_starts_at_age_0_without_randomize_start(tmp_path: Path) -> None:
    rows = drive(tmp_path, "A", "Fake-Spread-v0", WHOLE, num_envs=8, ticks=10)["rows"]
    assert rows["is_last"][:, 1::2].int().argmax(0).tolist() == [10] * 4


def test_a_second_reset_starts_every_episode_again(whole: Callable) -> None:
    again = whole("Fake-Manager-v0")["again"]
    assert again["is_first"].all() and not again["is_last"].any() and not again["reward"].any()
    assert again["obs.policy"][:, 2].tolist() == [0, 0, 0, 0]
    assert torch.equal(again["obs.policy"], again["acting.policy"])


def test_a_task_of_another_package_is_found_by_module_and_id(tmp_path: Path) -> None:
    seen = drive(tmp_path, "A", "foreign_tasks:Foreign-Manager-v0", WHOLE, ticks=3)
    assert not seen["error"] and seen["rows"]["obs.policy"][3, 1, :3].tolist() == [1, 1, 3]


@pytest.mark.parametrize("name", ["Fake-Manager", "FakeManager-v3", "foreign_tasks:Foreign-Manager"])
def test_a_task_is_found_by_its_name_in_the_other_generation(tmp_path: Path, name: str) -> None:
    seen = drive(tmp_path, "A", name, WHOLE, ticks=3)
    assert not seen["error"] and seen["rows"]["obs.policy"][3, 1, :3].tolist() == [1, 1, 3]


def test_float_images_are_checked_after_the_first_blank_frame(tmp_path: Path) -> None:
    seen = drive(tmp_path, "A", "Fake-Float-v0", "env.from_pixels=true", "env.image_low=-1", WHOLE, ticks=3)
    assert not seen["error"] and seen["rows"]["obs.pixels"][0, 0].unique().numel() > 1


def test_rewards_per_second_are_divided_by_the_agent_step(tmp_path: Path) -> None:
    rows = drive(tmp_path, "A", "Fake-Manager-v0", "env.reward_per_second=true", ticks=12)["rows"]
    torch.testing.assert_close(rows["reward"][1:], rows["obs.policy"][1:, :, 2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("task", ["Fake-Manager-v0", "Fake-Direct-v0", "Fake-Late-v0"])
def test_a_horizon_ends_episodes_as_time_outs(tmp_path: Path, task: str) -> None:
    rows = drive(tmp_path, "A", task, WHOLE, "env.horizon=4", ticks=12)["rows"]
    assert rows["is_last"].nonzero()[:, 0].unique().tolist() == [4, 8, 12]
    assert not rows["is_terminal"].any()


@pytest.mark.parametrize(
    ("task", "overrides", "largest"),
    [
        ("Fake-Manager-v0", ["env.action_scale=3"], 3.0),
        ("Fake-Bounded-v0", [], 4.0),
    ],
)
def test_actions_reach_the_simulator_in_its_own_range(
    tmp_path: Path, task: str, overrides: list[str], largest: float
) -> None:
    action = drive(tmp_path, "A", task, *overrides, num_envs=64)["rows"]["obs.policy"][1:, :, 3]
    lowest = 0.0 if task == "Fake-Bounded-v0" else -largest
    assert lowest <= action.min() < lowest + 0.05 * largest and 0.95 * largest < action.max() <= largest


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(tmp_path: Path) -> None:
    runs = [drive(tmp_path, "A", "Fake-Manager-v0", f"env.seed={seed}", num_envs=32)["rows"] for seed in (3, 3, 4)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["is_last"], runs[2]["is_last"])


def test_groups_of_terms_become_flat_entries(tmp_path: Path) -> None:
    seen = drive(tmp_path, "A", "Fake-Groups-v0", "env.obs_groups=[policy,critic]", ticks=3)
    assert seen["spec"]["obs"] == {
        "critic_age": {"shape": [1], "dtype": "float32"},
        "critic_matrix": {"shape": [4], "dtype": "float32"},
        "policy": {"shape": [4], "dtype": "float32"},
    }
    rows = seen["rows"]
    torch.testing.assert_close(rows["obs.critic_matrix"], rows["obs.policy"], rtol=0, atol=0)
    torch.testing.assert_close(rows["obs.critic_age"][..., 0], rows["obs.policy"][..., 2], rtol=0, atol=0)


def test_cameras_stream_small_images_of_this_episode(tmp_path: Path) -> None:
    record = tmp_path / "record"
    seen = drive(tmp_path, "A", "Fake-Camera-v0", "env.from_pixels=true", WHOLE, ticks=12, FAKE_RECORD=str(record))
    assert json.loads(record.read_text())["kwargs"]["enable_cameras"] is True
    assert seen["spec"]["obs"] == {"pixels": {"shape": [64, 64, 3], "dtype": "uint8"}}
    pixels = seen["rows"]["obs.pixels"]
    assert pixels[:6, 1, 30, 30, 0].tolist() == [0, 20, 40, 60, 80, 100], "bytes; each step of age adds 20"
    assert pixels[10, 1, 30, 30, 0] == 200, "the last image of the episode"
    assert seen["rows"]["acting.pixels"][10, 1, 30, 30, 0] == 0, "the first image of the next episode"


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        ("Fake-Manger-v0", [], ["env.name=Fake-Manger-v0", "Fake-Manager-v0"]),
        ("Fake-Discrete-v0", [], ["Discrete(3)", "continuous"]),
        ("Fake-Manager-v0", ["env.obs_groups=[polcy]"], ["polcy", "env.obs_groups=[policy]"]),
        ("Fake-Manager-v0", ["env.from_pixels=true"], ["env.from_pixels=true", "set env.from_pixels=false"]),
        ("Fake-Camera-v0", [], ["env.from_pixels=false", "set env.from_pixels=true"]),
        ("Fake-Bounded-v0", ["env.action_scale=2"], ["env.action_scale=2", "set env.action_scale=1"]),
        ("Fake-Endless-v0", ["env.horizon=5"], ["env.horizon=5", "['old', 'time_out']", "set env.horizon=null"]),
        ("Fake-Ageless-v0", ["env.horizon=5"], ["env.horizon=5", "AgelessEnv", "set env.horizon=null"]),
        ("Fake-Agents-v0", [], ["env.name=Fake-Agents-v0", "several agents", "left", "right"]),
        ("Fake-Direct-v0", ["env.reward_per_second=true"], ["direct task", "set env.reward_per_second=false"]),
        ("Fake-Float-v0", ["env.from_pixels=true"], ["env.image_low=0.0", "-1 and 1"]),
        ("CartPole-v1", [], ["env.name=CartPole-v1 is not a task of this Isaac Lab"]),
        ("no_such_package:Foreign-v0", [], ["module no_such_package", "PYTHONPATH"]),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused_with_the_fix(
    tmp_path: Path, task: str, overrides: list[str], words: list[str]
) -> None:
    error = drive(tmp_path, "A", task, *overrides, ticks=1)["error"]
    assert error.startswith("SettingError: ") and all(word in error for word in words), error


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("env.frame_skip=2", "set env.frame_skip=1"),
        ("env.task=run", "set env.task=''"),
        ("env.isaac_overrides=[physics=newton_mjwarp]", "install isaaclab==3.0.0"),
        ("env.num_envs=null", "set env.num_envs=8"),
        ("env.image_low=2", "set env.image_low=0"),
        ("env.grayscale=true", "set env.from_pixels=true"),
        ("env.n_parallel_envs=4", "set env.n_parallel_envs=8"),
        ("collector.num_collectors=2", "set collector.num_collectors=7"),
    ],
)
def test_settings_that_do_not_apply_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, override: str, fix: str
) -> None:
    monkeypatch.syspath_prepend(str(TIER_A))
    check_env(compose("isaaclab"))
    with pytest.raises(SettingError) as caught:
        check_env(compose("isaaclab", [override]))
    assert override.split("=")[0] in str(caught.value) and fix in str(caught.value)


def test_a_missing_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SettingError,
        match=r"module isaaclab.*isaaclab==3\.0\.0 \(Python 3\.12.*2\.3 \(Python 3\.11",
    ):
        check_env(compose("isaaclab"))


@pytest.mark.parametrize(
    ("cameras", "device", "index", "named", "mask"),
    [
        (False, "cuda:0", "1", "cuda:0", "GPU-b,GPU-a"),
        (True, "cuda:0", "1", "cuda:1", None),
        (True, "cuda:0", "0", "cuda:0", "GPU-b,GPU-a"),
        (True, "cpu", "1", "cpu", "GPU-b,GPU-a"),
    ],
)
def test_only_cameras_on_a_gpu_other_than_the_first_remove_the_gpu_mask(
    monkeypatch: pytest.MonkeyPatch, cameras: bool, device: str, index: str, named: str, mask: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    monkeypatch.setenv(SIM_GPU_INDEX, index)
    assert simulator_device(device, cameras=cameras) == named
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == mask


def fake_package(monkeypatch: pytest.MonkeyPatch, root: Path, *files: str) -> None:
    """Put packages on the path that must not be imported, with these files."""
    monkeypatch.syspath_prepend(str(TIER_A))
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
        (root / Path(file).parts[0] / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(root))


def test_isaac_lab_3_is_recognised_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overrides = ["env.isaac_overrides=[physics=newton_mjwarp]"]
    fake_package(monkeypatch, tmp_path, "isaaclab/app/sim_launcher.py")
    assert is_isaac_lab_3()
    check_env(compose("isaaclab", overrides))


def test_a_pre_release_of_isaac_lab_3_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, tmp_path, "isaaclab_tasks/utils/sim_launcher.py")
    with pytest.raises(SettingError, match=r"a pre-release of Isaac Lab 3 in .*expected isaaclab 3\.0\.0 or 2\.3"):
        check_env(compose("isaaclab"))


FATAL = """
import os, signal
from collector_proc.simulators.isaaclab.kit import start_kit
start_kit(device="cpu", cameras=False)
os.kill(os.getpid(), signal.{name})
"""


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_fatal_signal_dumps_the_stacks_and_ends_the_process_instead_of_looping(name: str) -> None:
    command = [sys.executable, "-c", FATAL.format(name=name)]
    done = subprocess.run(command, env=environment("A"), capture_output=True, text=True, timeout=300)
    assert done.returncode == -getattr(signal, name) and "Fatal Python error" in done.stderr
