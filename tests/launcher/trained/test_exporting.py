"""Exported files compute what the live policy computes, and the ONNX file runs with numpy and onnxruntime alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collector_proc.simulators.base import ActionRange
from collector_proc.simulators.registry import build_simulator
from launcher.trained import exporting
from launcher.trained.episodes import play_episodes
from launcher.trained.exporting import TOLERANCE, export_policy, largest_difference, random_obs
from launcher.trained.policy import TrainedPolicy, load_policy
from launcher.trained.recurrent import RecurrentPolicy, obs_input
from shared.compose import compose
from shared.errors import SettingError
from shared.run_folder import RunFolder
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.saved_run import SMALL, save_run

RANGE = ActionRange((-2.0, 0.0), (2.0, 5.0))
OBS = {"arm state": ObsSpec((3,), "float32"), "pixels": ObsSpec((64, 64, 3), "uint8")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, export_packages: None) -> tuple[TrainedPolicy, Path]:
    """A policy that observes an image and a vector, and the folder of its files."""
    folder = RunFolder(tmp_path_factory.mktemp("export") / "run")
    save_run(folder, compose("quickstart", SMALL), StreamSpec(2, OBS, 2), steps=(10,))
    trained = load_policy(folder.path)
    export_policy(trained, RANGE, folder.path / "export")
    return trained, folder.path / "export"


def _session(folder: Path) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    return onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "policy.json").read_text())


def test_the_json_describes_the_inputs_and_outputs_of_the_onnx_file(exported: tuple[TrainedPolicy, Path]) -> None:
    _, folder = exported
    facts, session = _facts(folder), _session(folder)
    types = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(bool)": "bool"}
    for ports, described in ((session.get_inputs(), facts["inputs"]), (session.get_outputs(), facts["outputs"])):
        assert [port.name for port in ports] == [entry["name"] for entry in described]
        assert [types[port.type] for port in ports] == [entry["type"] for entry in described]
        assert [port.shape[1:] for port in ports] == [entry["shape"][1:] for entry in described]
        assert all(isinstance(port.shape[0], str) for port in ports), "the size of the batch is open"
    names = [entry["name"] for entry in facts["inputs"]]
    assert names == ["obs_arm_state", "obs_pixels", "belief", "reset", "noise"]
    assert facts["outputs"][0]["low"] == [-2.0, 0.0] and facts["outputs"][0]["high"] == [2.0, 5.0]
    assert set(facts["largest_difference"]) == {"policy.onnx", "policy.pt2", "policy.safetensors"}


def test_every_name_is_an_identifier_of_cpp() -> None:
    for name in ("policy", "arm state", "a-b", "größe", "0"):
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", obs_input(name))


@pytest.mark.parametrize("fault", ["no reset", "no noise", "other action", "not a number"])
def test_the_check_sees_a_file_that_computes_something_else(fault: str, exported: tuple[TrainedPolicy, Path]) -> None:
    trained, _ = exported
    module = RecurrentPolicy(trained, RANGE)

    def run(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        *obs, belief, reset, noise = inputs
        belief = belief.nan_to_num(0.0)
        if fault == "no reset":
            reset = torch.zeros_like(reset)
        if fault == "no noise":
            noise = torch.zeros_like(noise)
        action, belief = module(*obs, belief, reset, noise)
        if fault == "not a number":
            belief[0, 0] = torch.nan
        return action * (1.01 if fault == "other action" else 1.0), belief

    with torch.no_grad():
        assert largest_difference(trained, module, lambda inputs: module(*inputs)) < 1e-5
        assert largest_difference(trained, module, run) > TOLERANCE


def test_a_file_that_fails_the_check_is_not_kept_and_the_files_before_it_stay(
    run_dir: Path, export_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_dir / "export"
    out.mkdir()
    (out / "policy.onnx").write_text("earlier")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(SettingError, match=r"policy\.safetensors differs by .* from the live policy within 100 steps"):
        export_policy(load_policy(run_dir), None, out)
    assert [path.name for path in out.iterdir()] == ["policy.onnx"]
    assert not list(run_dir.glob(".*"))


def test_a_missing_package_is_named_with_the_extra_that_has_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SettingError, match=r"the package onnx cannot be imported.*-e '\.\[export\]'"):
        export_policy(load_policy(run_dir), None, run_dir / "export")


def test_the_runner_needs_numpy_and_onnxruntime_only(exported: tuple[TrainedPolicy, Path], tmp_path: Path) -> None:
    trained, folder = exported
    assert len((folder / "run_policy.py").read_text().splitlines()) <= 45
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("numpy", "onnxruntime"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).parent
        for path in (source, source.with_name(f"{name}.libs")):  # wheels keep shared libraries there
            if path.is_dir():
                (packages / path.name).symlink_to(path)
    obs = random_obs(trained, 1, torch.Generator().manual_seed(3))
    for name, entry in obs.items():
        np.save(tmp_path / f"{name}.npy", entry[0].numpy())
    script = (
        f"import sys; sys.path[:0] = [{str(packages)!r}, {str(folder)!r}]\n"
        "import numpy as np\n"
        "from run_policy import Policy\n"
        f"obs = {{name: np.load({str(tmp_path)!r} + f'/{{name}}.npy') for name in {sorted(obs)!r}}}\n"
        f"policy = Policy({str(folder)!r})\n"
        "actions = [policy.act(obs, reset=step in (0, 2)) for step in range(4)]\n"
        "assert not {'torch', 'onnx', 'launcher'} & set(sys.modules)\n"
        "print(*(value for action in actions for value in action))\n"
    )
    # -S and -I: neither the packages of this environment nor PYTHONPATH can be imported.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    actions = torch.tensor([float(value) for value in done.stdout.split()]).view(4, 2)
    module, belief, expected = RecurrentPolicy(trained, RANGE), torch.zeros(1, 22), []
    for step in range(4):
        inputs = [*(obs[name] for name in module.entries), belief, torch.tensor([step in (0, 2)]), torch.zeros(1, 4)]
        action, belief = module(*inputs)
        expected.append(action[0])
    torch.testing.assert_close(actions, torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actions[:2], actions[2:], rtol=0, atol=0)


class Seeded(TrainedPolicy):
    """The live policy with the same noise at the same step of every evaluation."""

    num_steps = 0

    def act(self, obs: Mapping[str, Any], reset: Any = None) -> torch.Tensor:
        torch.manual_seed(self.num_steps)
        self.num_steps += 1
        return super().act(obs, reset)


class Exported(Seeded):
    """The ONNX file in place of the networks. Actions are divided by the pendulum's torque, 2 N m."""

    session: Any
    next_belief = np.zeros((20, 21), np.float32)

    def act(self, obs: Mapping[str, Any], reset: Any = None) -> torch.Tensor:
        torch.manual_seed(self.num_steps)
        self.num_steps += 1
        inputs = {"obs_policy": obs["policy"].numpy(), "belief": self.next_belief, "reset": reset.numpy()}
        inputs["noise"] = torch.randn(20, 4).numpy()
        action, self.next_belief = self.session.run(["action", "next_belief"], inputs)
        return torch.from_numpy(action) / 2


def test_the_exported_policy_earns_the_returns_of_the_live_one(run_dir: Path, exported_run: Path) -> None:
    settings = compose("quickstart", [*SMALL, "env.horizon=20", "env.num_envs=20"])
    returns = []
    for kind in (Seeded, Exported):
        policy = kind(**vars(load_policy(run_dir, "best")))
        vars(policy)["session"] = _session(exported_run)
        episodes = play_episodes(build_simulator(settings, seed=1, device="cpu"), policy, 20)
        returns.append([episode.total for episode in episodes])
    assert len(set(returns[0])) == 20, "the start states differ"
    assert returns[1] == pytest.approx(returns[0], abs=1e-3)
