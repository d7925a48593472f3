"""Which tasks and presets of the real Isaac Lab 3 the backend accepts, and what it answers to the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.isaac_tiers import DEADLINE_S, REPO

pytestmark = pytest.mark.isaaclab3
TASKS = "tests.isaaclab3.tasks"
LENGTH = "another length of an episode"
ACCEPTED = {
    "Isaac-Cartpole": "Isaac-Cartpole",
    "Isaac-Cartpole-v0": "Isaac-Cartpole",
    "Isaac-Cartpole-Direct-v0": "Isaac-Cartpole-Direct",
    "Isaac-Cartpole-RGB-v0": "Isaac-Cartpole-Camera",
    "Isaac-Ant-v0": "Isaac-Ant",
    "Isaac-Velocity-Flat-Anymal-D-v0": "Isaac-Velocity-Flat-AnymalD",
}
REFUSED = {
    "a near name": (["env.name=Isaac-Cartpol"], ["env.name=Isaac-Cartpol is not a task", "env.name=Isaac-Cartpole"]),
    "experimental": ([f"env.name={TASKS}:Warp-Cartpole-Direct"], ["experimental", "DirectRLEnvWarp", "stable task"]),
    "experimental, with managers": ([f"env.name={TASKS}:Warp-Cartpole"], ["experimental", "ManagerBasedRLEnvWarp"]),
    "needs Isaac Sim": (
        ["env.name=IsaacContrib-Velocity-Flat-AnymalC"],
        ["needs Isaac Sim, which is not installed, for", "PhysX", "[physics=newton_mjwarp]"],
    ),
    "an unknown preset": (
        ["env.isaac_overrides=[physics=bullet]"],
        ["env.isaac_overrides=['physics=bullet'] does not fit Isaac-Cartpole: ", "newton_mjwarp", "overrides=null"],
    ),
    "an unknown field": (
        ["env.isaac_overrides=[env.decimatoin=4]"],
        ["env.isaac_overrides=['env.decimatoin=4'] does not fit Isaac-Cartpole: env.decimatoin is neither"],
    ),
    "a field without its section": (
        ["env.isaac_overrides=[physics=newton_mjwarp,decimation=4]"],
        ["does not fit Isaac-Cartpole: decimation is neither physics", "begins with env."],
    ),
    "no value": (["env.isaac_overrides=[physics]"], ["physics has no '='", "NAME=VALUE"]),
    "a text for a number": (
        ["env.isaac_overrides=[env.decimation=abc]"],
        ["env.decimation=abc is no number, and the task has 2 there"],
    ),
    "the number of environments": (
        ["env.isaac_overrides=[env.scene.num_envs=4]"],
        ["env.scene.num_envs is set by env.num_envs"],
    ),
    "the seed": (["env.isaac_overrides=[env.seed=7]"], ["env.seed is set by env.seed"]),
    "the device": (["env.isaac_overrides=[env.sim.device=cuda:1]"], ["env.sim.device is set by --sim-gpu"]),
    "final observations": (
        ["env.isaac_overrides=[env.compute_final_obs=true]"],
        ["env.compute_final_obs is set by this backend"],
    ),
    "two lengths of an episode": (
        ["env.horizon=50", "env.isaac_overrides=[env.episode_length_s=1]"],
        ["env.episode_length_s is set by env.horizon"],
    ),
    "frame stacks": (
        ["env.name=Isaac-Cartpole-Camera-Direct", "env.from_pixels=true", "env.isaac_overrides=[env.frame_stack=4]"],
        ["env.frame_stack is set by env.from_pixels=true"],
    ),
    "PhysX without Kit": (
        ["env.isaac_overrides=[physics=physx]"],
        ["needs the module ovphysx", "pip install 'isaaclab[ovphysx]==3.0.0'"],
    ),
    "rewards of a direct task per second": (
        ["env.name=Isaac-Cartpole-Direct", "env.reward_per_second=true"],
        ["whose own code decides", "set env.reward_per_second=false"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(isaac_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the answer to each case, all from one process."""
    folder = tmp_path_factory.mktemp("answers")
    cases = {LENGTH: ["env.isaac_overrides=[env.episode_length_s=2]"]}
    cases |= {name: [f"env.name={name}"] for name in ACCEPTED} | {name: case[0] for name, case in REFUSED.items()}
    job = folder / "job.json"
    job.write_text(json.dumps(list(cases.values())))
    command = [sys.executable, str(Path(__file__).with_name("refusals.py")), str(job)]
    done = subprocess.run(command, cwd=folder, env=isaac_env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert [path.name for path in folder.iterdir()] == ["job.json"], "a file was left in the current folder"
    return dict(zip(cases, json.loads(line.removeprefix("ANSWERS")), strict=True))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_task_is_found_by_its_name_in_either_generation(answers: dict[str, str], name: str) -> None:
    assert answers[name] == ACCEPTED[name]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason_and_the_fix(answers: dict[str, str], case: str) -> None:
    answer = answers[case]
    assert answer.startswith("SettingError: ") and all(word in answer for word in REFUSED[case][1]), answer


def test_an_episode_length_may_be_overridden_without_a_horizon(answers: dict[str, str]) -> None:
    assert answers[LENGTH] == "Isaac-Cartpole"


def test_a_run_without_isaac_lab_3_fails_with_how_to_install_it(tmp_path: Path, isaac_env: dict[str, str]) -> None:
    (tmp_path / "hidden" / "isaaclab").mkdir(parents=True)
    (tmp_path / "hidden" / "isaaclab" / "__init__.py").touch()  # it hides an installed isaaclab
    path = os.pathsep.join([str(tmp_path / "hidden"), str(REPO)])
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "isaaclab3", "tests/isaaclab3/test_settings.py"]
    command += ["-k", "near", f"--basetemp={tmp_path / 'inner'}"]
    env = {key: value for key, value in isaac_env.items() if not key.startswith("PYTEST_")} | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1 and "--ignore-requires-python --target FOLDER" in done.stdout, done.stdout
    assert "skipped" not in done.stdout
