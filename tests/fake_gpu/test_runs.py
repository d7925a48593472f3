"""Whole runs of launch.py on fake GPUs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared.progress import read
from tests.fake_gpu.commands import DEADLINE_S, ROOT, environment, need_cuda_build, run
from tests.processes import wait_until_gone

need_cuda_build()
pytestmark = pytest.mark.fake_gpu

SMALL = (
    "env.num_envs=4",
    "collector.init_random_frames=160",
    "replay_buffer.buffer_size=2000",
    "replay_buffer.batch_size=40",
    "replay_buffer.batch_length=10",
    "optimization.log_every=5",
)
TWO_GPUS = ("--sim-gpu", "0", "--train-gpu", "1")


def launch(run_dir: Path, *arguments: str, **switches: str) -> tuple[int, str]:
    """Run launch.py to its end; return its exit code and its output with that of both processes."""
    command = ["launch.py", "--config", "quickstart", "--run-dir", str(run_dir), *arguments]
    code, output = run(*command, switches=switches)
    logs = [path.read_text() for path in sorted(run_dir.glob("logs/*.out"))]
    return code, "\n".join([output, *logs])


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def event(run_dir: Path, role: str, name: str) -> dict[str, Any]:
    """Return the first log line of this name."""
    lines = (run_dir / "logs" / f"{role}.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if line["event"] == name)


@pytest.mark.parametrize(("sim", "train"), [(0, 1), (1, 0), (0, 0)])
def test_a_run_finishes_and_each_process_uses_its_own_gpu(tmp_path: Path, sim: int, train: int) -> None:
    gpus = ("--sim-gpu", str(sim), "--train-gpu", str(train))
    code, output = launch(tmp_path / "run", *gpus, *SMALL, "optimization.total_optim_steps=20")
    assert code == 0, output
    result = summary(tmp_path / "run")
    assert result["exit_reason"] == "finished" and result["transport"] == "cuda_ipc" and result["nan_skips"] == 0
    assert "Producer process" not in output, "torch warns of memory that the collector still maps"
    replay = event(tmp_path / "run", "learner", "replay allocated")
    assert f"GPU-fa6e000{train}" in replay["memory"] and replay["trains_on"] == replay["memory"]
    assert f"GPU-fa6e000{sim}" in event(tmp_path / "run", "collector", "collecting")["acts_on"]


@pytest.mark.parametrize(
    ("settings", "transport"),
    [
        (["collector.mode=lockstep"], "cuda_ipc"),
        (["replay_buffer.gpu_storage=false"], "memfd"),
        (["replay_buffer.checksum=true", "optimization.autocast=bfloat16"], "cuda_ipc"),
        (["optimization.compile.cudagraphs=false"], "cuda_ipc"),
    ],
)
def test_a_run_finishes_with_these_settings(tmp_path: Path, settings: list[str], transport: str) -> None:
    code, output = launch(tmp_path / "run", *TWO_GPUS, *SMALL, *settings, "optimization.total_optim_steps=10")
    assert code == 0, output
    result = summary(tmp_path / "run")
    assert result["transport"] == transport and result["nan_skips"] == 0, result


def test_a_run_from_pixels_finishes(tmp_path: Path) -> None:
    pixels = ["env.name=cartpole", "env.task=balance", "collector.num_collectors=0", "env.from_pixels=true"]
    small = ["env.n_parallel_envs=2", "collector.frames_per_batch=20", "collector.eval_envs=0"]
    small += ["networks.rssm_hidden_dim=16", "networks.hidden_dim=16", "optimization.compile.enabled=false"]
    config = ["--config", "dm_control", "--run-dir", str(tmp_path / "run")]
    settings = [setting for setting in SMALL if not setting.startswith("env.")]
    code, output = run(
        "launch.py", *config, *pixels, *small, *settings, "optimization.total_optim_steps=3", switches={}
    )
    assert code == 0, output
    assert summary(tmp_path / "run")["nan_skips"] == 0


@pytest.mark.parametrize("broken", ["FAKE_GPU_IPC_EXPORT", "FAKE_GPU_IPC_IMPORT"])
def test_without_cuda_ipc_a_run_falls_back_to_pinned_memory_with_one_warning(tmp_path: Path, broken: str) -> None:
    code, output = launch(tmp_path / "run", *TWO_GPUS, *SMALL, "optimization.total_optim_steps=10", **{broken: "0"})
    assert code == 0, output
    assert summary(tmp_path / "run")["transport"] == "memfd"
    warnings = [line for line in (tmp_path / "run/logs/learner.jsonl").read_text().splitlines() if '"warning"' in line]
    assert len([line for line in warnings if "gpu_storage" in line]) == 1, warnings


@pytest.mark.parametrize(
    ("switches", "settings", "names"),
    [
        ({"FAKE_GPU_DRIVER": "0"}, [], "nvidia-smi"),
        ({"FAKE_GPU_IPC_EXPORT": "0"}, ["replay_buffer.gpu_storage=true"], "replay_buffer.gpu_storage"),
        ({"FAKE_GPU_IPC_IMPORT": "0"}, ["replay_buffer.gpu_storage=true"], "replay_buffer.gpu_storage"),
        ({"FAKE_GPU_COMPUTE_MODE": "Exclusive_Process"}, [], "nvidia-smi -i"),
        ({"FAKE_GPU_COMPUTE_MODE": "Prohibited"}, [], "nvidia-smi -i"),
        ({"FAKE_GPU_CAPABILITY": "7.5"}, ["optimization.autocast=bfloat16"], "optimization.autocast=float16"),
        ({"FAKE_GPU_COUNT": "1"}, [], "--train-gpu"),
        ({"CUDA_VISIBLE_DEVICES": ""}, [], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_to_fix_it(
    tmp_path: Path, switches: dict[str, str], settings: list[str], names: str
) -> None:
    code, output = launch(tmp_path / "run", *TWO_GPUS, *SMALL, *settings, **switches)
    assert code == 2, output
    assert names in output and "Traceback" not in output, output


@pytest.mark.parametrize(
    "switches", [{"FAKE_GPU_P2P": "0"}, {"FAKE_GPU_SLOW_EVENTS": "3"}, {"FAKE_GPU_STREAM_SEED": "4"}]
)
def test_a_run_finishes_without_peer_access_or_with_late_work(tmp_path: Path, switches: dict[str, str]) -> None:
    code, output = launch(tmp_path / "run", *TWO_GPUS, *SMALL, "optimization.total_optim_steps=10", **switches)
    assert code == 0, output
    result = summary(tmp_path / "run")
    assert result["transport"] == "cuda_ipc" and result["nan_skips"] == 0, result


def test_a_killed_collector_is_replaced_and_sigterm_saves_a_run_that_goes_on_on_one_gpu(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["launch.py", "--config", "quickstart", "--run-dir", str(run_dir), *TWO_GPUS, *SMALL]
    command += ["optimization.total_optim_steps=100000"]
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment({}), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            steps = wait_for_more_steps(run_dir, process, 3)
            collector = read(run_dir / "collector.progress").pid
            os.kill(collector, signal.SIGKILL)
            wait_until_gone(collector)
            wait_for_more_steps(run_dir, process, steps + 5)
            wait_for_another_collector(run_dir, process, collector)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=DEADLINE_S)
        finally:
            process.kill()  # launch's children end with it
            process.wait()
    assert process.returncode == 143, (tmp_path / "output").read_text()
    assert summary(run_dir)["collector_restarts"] == 1
    saved = int((run_dir / "checkpoints" / "latest").read_text())
    resume = ["launch.py", "--resume", str(run_dir), f"optimization.total_optim_steps={saved + 5}"]
    code, output = run(*resume, switches={"FAKE_GPU_COUNT": "1"})
    assert code == 0, output
    assert summary(run_dir)["gradient_steps"] == saved + 5


def wait_for_more_steps(run_dir: Path, process: subprocess.Popen[bytes], steps: int) -> int:
    """Return the number of gradient steps once there are at least so many."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        if (run_dir / "learner.progress").exists():
            done = read(run_dir / "learner.progress").status.get("gradient_steps", 0)
            if done >= steps:
                return done
        time.sleep(0.1)
    raise AssertionError(f"no {steps} gradient steps; see {run_dir.parent / 'output'}")


def wait_for_another_collector(run_dir: Path, process: subprocess.Popen[bytes], pid: int) -> None:
    """Return once another collector than this one collects."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        snapshot = read(run_dir / "collector.progress")
        if snapshot.pid != pid and snapshot.phase == "collecting":
            return
        time.sleep(0.1)
    raise AssertionError(f"no other collector collects; see {run_dir.parent / 'output'}")


FAULTS = {
    "FAKE_GPU_P2P": ["0", "1"],
    "FAKE_GPU_IPC_EXPORT": ["0", "1", "1", "1"],
    "FAKE_GPU_IPC_IMPORT": ["0", "1", "1", "1"],
    "FAKE_GPU_SLOW_EVENTS": ["0", "2", "20"],
    "FAKE_GPU_HOST_REGISTER": ["0", "1", "1", "1"],
    "FAKE_GPU_COUNT": ["1", "2", "2", "2"],
    "FAKE_GPU_DRIVER": ["0", "1", "1", "1", "1", "1", "1"],
    "FAKE_GPU_CAPABILITY": ["7.5", "8.0", "9.0", "9.0"],
    "FAKE_GPU_COMPUTE_MODE": ["Default", "Default", "Default", "Exclusive_Process"],
    "FAKE_GPU_MEMORY_GB": ["1", "80"],
}


@pytest.mark.parametrize("seed", range(20))
def test_a_run_with_random_faults_trains_or_is_refused_with_a_sentence(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    switches = {name: draw.choice(values) for name, values in FAULTS.items()}
    if draw.random() < 0.3:
        switches["FAKE_GPU_STREAM_SEED"] = str(seed)
    settings = [f"optimization.autocast={draw.choice(['bfloat16', 'false'])}"]
    settings += [f"replay_buffer.gpu_storage={draw.choice(['null', 'null', 'true', 'false'])}"]
    gpus = TWO_GPUS if draw.random() < 0.5 else ()
    code, output = launch(tmp_path / "run", *gpus, *SMALL, *settings, "optimization.total_optim_steps=5", **switches)
    described = f"{switches} {settings} {gpus}\n{output}"
    ipc = "0" not in (switches["FAKE_GPU_IPC_EXPORT"], switches["FAKE_GPU_IPC_IMPORT"])
    may_be_refused = (
        switches["FAKE_GPU_DRIVER"] == "0"
        or switches["FAKE_GPU_COMPUTE_MODE"] != "Default"
        or (gpus == TWO_GPUS and switches["FAKE_GPU_COUNT"] == "1")
        or ("optimization.autocast=bfloat16" in settings and switches["FAKE_GPU_CAPABILITY"] == "7.5")
        or ("replay_buffer.gpu_storage=true" in settings and not ipc)
        or switches["FAKE_GPU_HOST_REGISTER"] == "0"
    )
    if code == 0:
        result = summary(tmp_path / "run")
        assert result["exit_reason"] == "finished" and result["nan_skips"] == 0, described
    else:
        assert may_be_refused, described
        assert code == 2 and "; expected " in output and "Traceback" not in output, described
