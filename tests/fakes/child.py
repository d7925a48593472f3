"""Stands for a collector or learner in tests of launch: `child.py BEHAVIOUR --run-dir DIR ...`.

Behaviours are small and event-driven: they wait for files of the run folder (with a deadline), never for time to pass.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from shared.lifetime import ExitCode, StopFlag, die_with_parent, enable_stack_dumps, install_stop_flag
from shared.metrics import CollectorStatus
from shared.progress import Progress
from shared.run_folder import read_run

DEADLINE_S = 30.0
ROW = {
    "time": 1_700_000_000.5,
    "wall_s": 1.0,
    "gradient_steps": 40,
    "agent_steps": 1280,
    "env_frames": 2560,
    "collect_fps": 64.0,
    "updates_per_s": 8.0,
    "replay_ratio_target": 250.0,
    "replay_ratio": 248.0,
    "policy_version": 4,
    "policy_lag_mean": 0.5,
    "episodes": 12,
    "episode_return_mean": 61.5,
    "eval_return_mean": 77.25,
    "nan_skips": 0,
    "transport": "memfd",
    "loss_model": 3.5,
}


def save_checkpoint(run_dir: Path, step: int) -> Path:
    """Write a checkpoint without networks and replay; return its folder."""
    folder = run_dir / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"step": step}))
    (folder.parent / "latest").write_text(folder.name)
    return folder


class Child:
    """One fake process: its progress, its stop flag and its folder."""

    def __init__(self, role: str, run_dir: Path, incarnation: int) -> None:
        self.role, self.run_dir, self.incarnation = role, run_dir, incarnation
        self.progress: Progress = Progress.create(run_dir / f"{role}.progress")
        enable_stack_dumps(run_dir / "crash", role)
        self.stop: StopFlag = install_stop_flag()
        die_with_parent()
        assert Path(read_run(run_dir).socket_dir).is_dir()

    def mark(self, name: str) -> None:
        (self.run_dir / name).write_text(str(self.incarnation))

    def write_row(self, **changes: object) -> None:
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**ROW, **changes}) + "\n")

    def serve(self, until: str | None = None) -> None:
        """Move until asked to stop, or until a file appears."""
        self.progress.phase("training" if self.role == "learner" else "collecting")
        self.mark(f"{self.role}-serves")
        end = time.monotonic() + DEADLINE_S
        while not self.stop.requested and not (until and (self.run_dir / until).exists()):
            assert time.monotonic() < end, f"nobody stopped the fake {self.role} within {DEADLINE_S} s"
            self.progress.advance()
            time.sleep(0.02)

    def stand_still(self) -> None:
        self.progress.phase("training" if self.role == "learner" else "collecting")
        time.sleep(DEADLINE_S)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--incarnation", type=int)
    options = parser.parse_args()
    role = "learner" if options.incarnation is None else "collector"
    child = Child(role, options.run_dir, options.incarnation or 0)
    behaviour, _, argument = options.behaviour.partition(":")
    if behaviour == "finish":
        child.write_row(gradient_steps=20, loss_model=9.0)
        child.write_row()
        return 0
    if behaviour == "serve":
        child.serve(until=argument or None)
        if role == "learner":  # only the learner writes metrics.jsonl
            child.write_row()
        return 0
    if behaviour == "die":
        sys.stderr.write(f"last words of the {role}\n")
        return int(argument or 1)
    if behaviour == "save":
        child.serve()
        save_checkpoint(child.run_dir, 60)
        child.write_row(gradient_steps=60)
        return 0
    if behaviour == "refuse":  # a setting that shows as wrong once the learner trains
        child.serve(until="learner-serves")
        return 2
    if behaviour == "stubborn":
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        child.serve()
        return 0
    if behaviour == "compile":  # a compiler cannot be asked to stop
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.progress.phase("compiling")
        child.mark(f"{role}-serves")
        time.sleep(DEADLINE_S)
        return 0
    if behaviour == "hang":
        child.stand_still()
        return 0
    fault, first_good = behaviour, int(argument)  # die-until:N, collect-until:N, hang-until:N, outgrow-until:N
    if child.incarnation < first_good:
        if fault == "outgrow-until":
            child.progress.phase("collecting")
            child.progress.status(CollectorStatus(320, 64.0, policy_version=0, weights_refused=0, rss_gb=2.5))
            return ExitCode.OUTGROWN
        if fault == "collect-until":
            child.progress.phase("collecting")
        if fault == "hang-until":
            child.stand_still()
        return 1
    child.mark("collector-is-good")
    child.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
