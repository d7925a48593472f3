"""Whole runs through launch.py with real processes: they end, stop when asked, resume, and survive dead collectors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.show_frames import sample_frames
from launcher.forwarding import SUMMARY_KEYS
from learner_proc.checkpoint import load_newest
from learner_proc.diagnostics import HORIZONS
from learner_proc.pacing import make_pacing
from learner_proc.run_report import write_report
from shared.compose import load_settings
from shared.geometry import Geometry
from shared.metrics import FAMILIES, METRICS
from shared.progress import read
from shared.run_folder import RunFolder
from tests.processes import exit_code_after_its_terminal_closes

REPO = Path(__file__).parents[2]
TINY = [
    "networks.state_dim=4",
    "networks.rssm_hidden_dim=16",
    "networks.hidden_dim=16",
    "networks.encoder_channels=4",
    "replay_buffer.batch_size=64",
    "replay_buffer.batch_length=8",
    "optimization.log_every=5",
    "optimization.autocast=false",
    "optimization.compile.enabled=false",
]
PENDULUM = ["--config", "quickstart", *TINY]
DMC = [
    "collector.num_collectors=1",
    "env.n_parallel_envs=2",
    "collector.frames_per_batch=40",
    "collector.init_random_frames=80",
]


def start(run_dir: Path, *arguments: str, mujoco_gl: str | None = None) -> subprocess.Popen:
    where = ["--run-dir", str(run_dir)] if "--resume" not in arguments else []
    command = [sys.executable, str(REPO / "launch.py"), *where, *arguments]
    env = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    env |= {"MUJOCO_GL": mujoco_gl} if mujoco_gl else {}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
        env=env,
        # If the tests run under nohup, they ignore SIGHUP, and so would a run that they start.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def finish(launch: subprocess.Popen, seconds: float = 600.0) -> str:
    try:
        return launch.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        launch.kill()
        raise


def wait_for_steps(run_dir: Path, steps: int, launch: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and launch.poll() is None:
        if (run_dir / "learner.progress").exists():
            status = read(run_dir / "learner.progress").status
            if status.get("gradient_steps", 0) >= steps:
                return
        time.sleep(0.05)
    pytest.fail(f"no {steps} gradient steps; launch wrote:\n{finish(launch, 5)}")


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_a_run_ends_and_leaves_a_complete_folder(tmp_path):
    run_dir = tmp_path / "run"
    launch = start(run_dir, *PENDULUM, "optimization.total_optim_steps=40")
    output = finish(launch)
    assert launch.returncode == 0, output
    assert "no GPU found" in output or torch.cuda.is_available()
    result = summary(run_dir)
    assert set(SUMMARY_KEYS) <= set(result)
    assert result["exit_reason"] == "finished" and result["gradient_steps"] == 40
    assert result["transport"] == ("memfd" if not torch.cuda.is_available() else "cuda_ipc")
    assert result["collect_fps"] > 0 and result["updates_per_s"] > 0 and result["nan_skips"] == 0
    assert result["env_frames"] == 2 * result["agent_steps"] > 0
    assert result["warnings"] == []
    assert [row["gradient_steps"] for row in rows(run_dir)] == list(range(5, 41, 5))
    assert all(row["loss_model"] is not None and row["kl"] >= 0 for row in rows(run_dir))
    open_loop = [family.member("policy", horizon).name for family in FAMILIES for horizon in HORIZONS]
    assert all(list(row) == [*METRICS, *open_loop, "saturated_action_0"] for row in rows(run_dir))
    assert (run_dir / "checkpoints" / "latest").read_text() == "00000040"
    assert any((run_dir / "tb").iterdir())
    for line in (run_dir / "logs" / "learner.jsonl").read_text().splitlines():
        assert {"event", "level", "timestamp", "process"} <= json.loads(line).keys()
    assert not Path(json.loads((run_dir / "run.json").read_text())["socket_dir"]).exists()
    pictures = {path.name for path in write_report(run_dir).parent.glob("*.png")}
    assert pictures == {"curves.png", "open_loop_error.png", "open_loop_policy.png"}


def test_a_warning_is_on_the_screen_in_the_log_and_in_the_summary(tmp_path):
    run_dir, word = tmp_path / "run", "networks.continue_head=true"
    output = finish(start(run_dir, *PENDULUM, "env.task=balance", "optimization.total_optim_steps=20"))
    assert output.count(word) == 1 and "warning: " in output, output
    assert (run_dir / "logs" / "learner.jsonl").read_text().count(word) == 1
    assert [word in text for text in summary(run_dir)["warnings"]] == [True]


def test_sigterm_saves_and_a_resume_continues_from_there(tmp_path):
    run_dir = tmp_path / "run"
    launch = start(run_dir, *PENDULUM, "optimization.total_optim_steps=100000")
    wait_for_steps(run_dir, 20, launch)
    launch.send_signal(signal.SIGTERM)
    output = finish(launch)
    assert launch.returncode == 143, output
    first = summary(run_dir)
    saved = int((run_dir / "checkpoints" / "latest").read_text())
    assert first["exit_reason"] == "interrupted by SIGTERM" and first["gradient_steps"] == saved >= 20

    launch = start(run_dir, "--resume", str(run_dir), f"optimization.total_optim_steps={saved + 10}")
    output = finish(launch)
    assert launch.returncode == 0, output
    second = summary(run_dir)
    assert second["gradient_steps"] == saved + 10
    assert second["agent_steps"] > first["agent_steps"] and second["policy_version"] > first["policy_version"]
    events = [json.loads(line) for line in (run_dir / "logs" / "learner.jsonl").read_text().splitlines()]
    assert any(event["event"] == "replay restored" and event["rows"] > 0 for event in events)
    steps = [row["gradient_steps"] for row in rows(run_dir)]
    assert steps == sorted(steps), "the rows of the second part follow those of the first"


def test_killed_collectors_are_replaced_while_the_learner_continues(tmp_path):
    run_dir = tmp_path / "run"
    # With this low ratio the learner waits for data, so a collector that is killed has the newest weights already.
    launch = start(run_dir, *PENDULUM, "optimization.total_optim_steps=100000", "optimization.replay_ratio=0.25")
    wait_for_steps(run_dir, 10, launch)
    learner, collector = (read(run_dir / f"{role}.progress").pid for role in ("learner", "collector"))
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (learner, collector)]
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert scores == [own, max(own, 500)], "if memory runs out, the kernel kills the collector first"
    for _ in range(4):
        os.kill(read(run_dir / "collector.progress").pid, signal.SIGKILL)
        before = read(run_dir / "learner.progress").status["agent_steps"]
        end = time.monotonic() + 300
        while read(run_dir / "learner.progress").status["agent_steps"] <= before + 2000:
            assert time.monotonic() < end and launch.poll() is None, "the next incarnation commits chunks"
            time.sleep(0.1)
    assert read(run_dir / "learner.progress").pid == learner
    launch.send_signal(signal.SIGINT)
    output = finish(launch)
    assert launch.returncode == 130 and "collector died (SIGKILL)" in output, output
    assert summary(run_dir)["collector_restarts"] == 4


def test_dm_control_trains_from_state_and_from_pixels(tmp_path):
    state = start(
        tmp_path / "state",
        *TINY,
        *DMC,
        "env.name=walker",
        "env.task=walk",
        "env.from_pixels=false",
        "optimization.total_optim_steps=10",
    )
    output = finish(state)
    assert state.returncode == 0, output
    pixels = start(tmp_path / "pixels", *TINY, *DMC, "optimization.total_optim_steps=2", "collector.num_collectors=0")
    output = finish(pixels)
    assert pixels.returncode == 0, output
    frames = sample_frames(tmp_path / "pixels", windows=4, steps=8)  # (4, 8, 64, 64, 3)
    assert frames.dtype == torch.uint8 and frames.shape[2:] == (64, 64, 3)
    assert frames.float().std() > 10, "the images are not blank"
    assert (frames[:, 1:] != frames[:, :-1]).any(), "the images change"
    assert (write_report(tmp_path / "pixels").parent / "open_loop_pixels.png").exists()


def without_times(rows: list[dict]) -> list[dict]:
    measured = ("_per_s", "_fps", "_rss_gb", "_gpu_gb", "_gpu_used_gb")
    timed = ("time", "wall_s", "startup_s", "transport_bytes_per_s")
    return [
        {k: v for k, v in row.items() if k not in timed and not any(part in k for part in measured)} for row in rows
    ]


def test_two_lockstep_runs_with_one_seed_have_identical_metrics(tmp_path):
    made = []
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        launch = start(
            tmp_path / name,
            *PENDULUM,
            "collector.mode=lockstep",
            f"env.seed={seed}",
            "optimization.total_optim_steps=60",
            "optimization.replay_ratio=2",
        )
        output = finish(launch)
        assert launch.returncode == 0, output
        made.append(without_times(rows(tmp_path / name)))
    assert len(made[0]) == 12 and made[0] == made[1]
    assert made[0] != made[2], "a different seed gives a different run"
    assert made[0][-1]["policy_version"] > 1 and made[0][-1]["policy_lag_mean"] == 0


def test_a_refused_resume_leaves_the_run_resumable(tmp_path):
    run_dir = tmp_path / "run"
    launch = start(run_dir, *PENDULUM, "optimization.total_optim_steps=10", "optimization.pretrain_steps=3")
    output = finish(launch)
    assert launch.returncode == 0, output
    config, first_summary = (run_dir / "config.yaml").read_text(), summary(run_dir)
    launch = start(run_dir, "--resume", str(run_dir))
    assert "has made 10 of optimization.total_optim_steps=10 gradient" in finish(launch) and launch.returncode == 2
    assert summary(run_dir) == first_summary, "a finished run keeps its summary"
    for change, part in (
        ("networks.hidden_dim=24", "changes the meaning of the checkpoint"),
        ("env.num_envs=4", "start a new run"),
    ):
        launch = start(run_dir, "--resume", str(run_dir), change, "optimization.total_optim_steps=15")
        output = finish(launch)
        assert launch.returncode == 2 and part in output and "Traceback" not in output, output
        assert (run_dir / "config.yaml").read_text() == config
    launch = start(run_dir, "--resume", str(run_dir), "optimization.total_optim_steps=15")
    output = finish(launch)
    assert launch.returncode == 0 and summary(run_dir)["gradient_steps"] == 15, output
    last, batch_size = rows(run_dir)[-1], load_settings(run_dir / "config.yaml").replay_buffer.batch_size
    counters = load_newest(RunFolder(run_dir).checkpoints)[1]["counters"]
    settings = load_settings(run_dir / "config.yaml")
    pretrained = make_pacing(settings, Geometry.of(settings)).pretrained
    collected = last["agent_steps"] - counters["prefill_steps"]
    assert 0 < pretrained < 15 * batch_size and collected > 0
    assert last["replay_ratio"] == pytest.approx((15 * batch_size - pretrained) / collected), (
        "the ratio is that of the whole run since its prefill"
    )


def test_ctrl_c_during_start_up_ends_the_run(tmp_path):
    launch = start(tmp_path / "run", *PENDULUM)
    end = time.monotonic() + 300
    while not (tmp_path / "run" / "collector.progress").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    launch.send_signal(signal.SIGINT)
    output = finish(launch)
    assert launch.returncode == 130, output
    assert summary(tmp_path / "run")["exit_reason"] == "interrupted by SIGINT before training began"


def test_a_closed_terminal_saves_the_run(tmp_path):
    run_dir = tmp_path / "run"

    def has_trained() -> bool:
        progress = run_dir / "learner.progress"
        return progress.exists() and read(progress).status.get("gradient_steps", 0) >= 10

    command = [sys.executable, str(REPO / "launch.py"), "--run-dir", str(run_dir), *PENDULUM]
    command += ["optimization.total_optim_steps=100000"]
    assert exit_code_after_its_terminal_closes(command, is_ready=has_trained, seconds=300) == 129
    assert summary(run_dir)["gradient_steps"] == int((run_dir / "checkpoints" / "latest").read_text()) >= 10


def test_a_simulator_that_cannot_start_is_not_restarted(tmp_path):
    command = ["env.name=cartpole", "env.task=balance", "collector.num_collectors=0", *TINY]
    launch = start(tmp_path / "run", *command, mujoco_gl="glfw")
    output = finish(launch)
    assert launch.returncode == 2 and "MUJOCO_GL" in output, output
    assert summary(tmp_path / "run")["collector_restarts"] == 0
