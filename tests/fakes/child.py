"""A fake collector or learner for tests of launch: `child.py BEHAVIOUR --run-dir DIR ...`.

    BEHAVIOUR          what the process does
    finish             (learner) writes two metrics rows and ends
    serve[:FILE]       makes progress until it is asked to stop, or until FILE appears in the run folder
    save[:FILE]        (learner) serves, then saves a checkpoint
    save-late:FILE     (learner) serves until it is asked to end, and saves once FILE appears in the run folder
    lives:HOW,N        (learner) each of the first N learners fails as HOW states; the next one finishes
                           progress   it makes 10 gradient steps more than the one before, saves, and dies
                           same       it makes 10 gradient steps, saves, and dies
                           hang       it makes 10 gradient steps more, saves, and hangs
                           stopped    it makes 10 gradient steps more, saves, and ends with exit code 0
                           unsaved    it dies before it saves
    repeat[:TEXT]      (collector) waits until the learner serves, then fails with this error
    die[:CODE]         ends at once with this exit code
    refuse             (collector) waits until the learner serves, then ends with ExitCode.REFUSED
    stubborn           serves and ignores the signals that ask it to end
    compile            (learner) stays in the phase "compiling" and ignores SIGTERM, as a compiler does
    hang               makes no progress
    die-until:N        each of the first N incarnations ends with exit code 1; the next one serves
    collect-until:N    the same, but they reach the phase "collecting" first
    hang-until:N       the same, but they hang
    outgrow-until:N    the same, but they end because of their memory, with ExitCode.OUTGROWN

The behaviours wait for files in the run folder, with a deadline, and never for time to pass.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from shared.checkpoints import Manifest, StoredFile, file_crc32, write_manifest
from shared.lifetime import (
    ExitCode,
    SaveFlag,
    StopFlag,
    die_with_parent,
    enable_stack_dumps,
    install_stop_flag,
)
from shared.metrics import CollectorStatus, LearnerStatus
from shared.progress import Progress
from shared.run_folder import read_run

DEADLINE_S = 100.0
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
    """Write a checkpoint that looks whole, without networks and replay; return its folder."""
    folder = run_dir / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.pt").write_text("networks")
    stored = StoredFile(8, file_crc32(folder / "state.pt"))
    write_manifest(folder, Manifest(step=step, serial=step, files={"state.pt": stored}))
    (folder.parent / "latest").write_text(folder.name)
    return folder


class Child:
    """One fake process with its progress file, its stop flag and its run folder."""

    def __init__(self, role: str, run_dir: Path, incarnation: int) -> None:
        self.role, self.run_dir, self.incarnation = role, run_dir, incarnation
        self.progress: Progress = Progress.create(run_dir / f"{role}.progress")
        enable_stack_dumps(run_dir / "crash", role)
        self.stop: StopFlag = install_stop_flag()
        self.save = SaveFlag()
        self.save.install()
        die_with_parent()
        assert Path(read_run(run_dir).socket_dir).is_dir()

    def behave(self, behaviour: str, argument: str) -> int:
        """Do what the behaviour stands for and return the exit code."""
        if behaviour.endswith("-until"):
            return self._fail(behaviour) if self.incarnation < int(argument) else self._work()
        if behaviour == "finish":
            self._write_row(gradient_steps=20, loss_model=9.0)
            self._write_row()
        elif behaviour == "serve":
            self._serve(until=argument or None)
            if self.role == "learner":  # only the learner writes metrics.jsonl
                self._write_row()
        elif behaviour == "save":
            self._serve(until=argument or None)
            save_checkpoint(self.run_dir, 60)
            self._write_row(gradient_steps=60)
        elif behaviour == "stubborn":
            self._ignore(signal.SIGTERM, signal.SIGINT)
            self._serve()
        elif behaviour == "compile":
            self._ignore(signal.SIGTERM)
            self.progress.phase("compiling")
            self._mark(f"{self.role}-serves")
            time.sleep(DEADLINE_S)
        elif behaviour == "save-late":
            self._serve()
            self._mark("learner-was-asked")
            while not (self.run_dir / argument).exists():
                time.sleep(0.01)
            save_checkpoint(self.run_dir, 60)
        elif behaviour == "lives":
            return self._live(*argument.split(","))
        elif behaviour == "repeat":
            self._serve(until="learner-serves")
            self.progress.refuse(f"{argument} at row {self.incarnation}")
            return ExitCode.FAILED
        elif behaviour == "hang":
            self._stand_still()
        elif behaviour == "refuse":
            self._serve(until="learner-serves")
            return ExitCode.REFUSED
        elif behaviour == "die":
            sys.stderr.write(f"last output of the {self.role}\n")
            return int(argument or 1)
        return ExitCode.FINISHED

    def _live(self, how: str, num_failing: str) -> int:
        """Fail as a learner whose number is below `num_failing`, or finish."""
        count = self.run_dir / "learner-lives"
        life = int(count.read_text()) if count.exists() else 0
        self._mark("learner-lives", str(life + 1))
        if life >= int(num_failing):
            return self.behave("finish", "")
        step = 10 if how == "same" else 10 * (life + 1)
        self.progress.phase("training")
        self.progress.status(LearnerStatus(step, 100, 40, 1.0, 1.0, None, None, None, None))
        if how != "unsaved":
            save_checkpoint(self.run_dir, step)
        self._mark("learner-serves")
        if how == "hang":
            self._stand_still()
        sys.stderr.write(f"last output of learner {life}\n")
        return ExitCode.FINISHED if how == "stopped" else ExitCode.FAILED

    def _fail(self, behaviour: str) -> int:
        """Fail as one of the first incarnations of a behaviour that ends with "-until"."""
        if behaviour == "outgrow-until":
            self.progress.phase("collecting")
            self.progress.status(CollectorStatus(320, 64.0, policy_version=0, weights_refused=0, rss_gb=2.5))
            return ExitCode.OUTGROWN
        if behaviour == "collect-until":
            self.progress.phase("collecting")
        if behaviour == "hang-until":
            self._stand_still()
        return ExitCode.FAILED

    def _work(self) -> int:
        """Serve as the first incarnation that does not fail."""
        self._mark("collector-is-good")
        self._serve()
        return ExitCode.FINISHED

    def _serve(self, until: str | None = None) -> None:
        """Make progress until asked to stop, or until a file appears in the run folder."""
        self.progress.phase("training" if self.role == "learner" else "collecting")
        self._mark(f"{self.role}-serves")
        end = time.monotonic() + DEADLINE_S
        while not self.stop.requested and not (until and (self.run_dir / until).exists()):
            assert time.monotonic() < end, f"the fake {self.role} was not stopped within {DEADLINE_S} s"
            self.progress.advance()
            if self.save.take() and self.role == "learner":
                save_checkpoint(self.run_dir, 50)
            time.sleep(0.02)

    def _stand_still(self) -> None:
        self.progress.phase("training" if self.role == "learner" else "collecting")
        time.sleep(DEADLINE_S)

    def _ignore(self, *signums: signal.Signals) -> None:
        for signum in signums:
            signal.signal(signum, signal.SIG_IGN)

    def _mark(self, name: str, content: str = "") -> None:
        """Write a file into the run folder, for which a test or the other process waits."""
        (self.run_dir / name).write_text(content or str(self.incarnation))

    def _write_row(self, **changes: object) -> None:
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**ROW, **changes}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--incarnation", type=int)
    options = parser.parse_args()
    role = "learner" if options.incarnation is None else "collector"
    behaviour, _, argument = options.behaviour.partition(":")
    return Child(role, options.run_dir, options.incarnation or 0).behave(behaviour, argument)


if __name__ == "__main__":
    sys.exit(main())
