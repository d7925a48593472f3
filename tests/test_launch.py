"""launch.main with fake children: it refuses bad settings, reports each kind of end, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch
from launcher.forwarding import SUMMARY_KEYS
from launcher.run_folder import create_run_folder, open_run_folder
from shared.socket_folder import make_socket_dir
from tests.fakes.child import ROW, save_checkpoint
from tests.processes import exit_code_after_its_terminal_closes

FAKES = Path(__file__).resolve().parent / "fakes"
REPO = FAKES.parent.parent
DEADLINE_S = 150.0
QUICK = ["--config", "quickstart", "logger.backend=none", "deadlines.stop_s=20", "deadlines.save_s=40"]
QUICK.append("optimization.total_optim_steps=40")  # the fake learner writes a row of step 40


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are created below tmp_path, and no GPU of this machine is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def _commands(learner: str, collector: str) -> dict[str, tuple[str, ...]]:
    child = str(FAKES / "child.py")
    return {"learner": (sys.executable, child, learner), "collector": (sys.executable, child, collector)}


def _launch(run: Path, learner: str, collector: str, *settings: str) -> int:
    return launch.main([*QUICK, "--run-dir", str(run), *settings], commands=_commands(learner, collector))


def _summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def _events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "launch.jsonl").read_text().splitlines()]


def _assert_nothing_is_left(run: Path) -> None:
    """No process of the run and no socket folder."""
    pids = [event["pid"] for event in _events(run) if event["event"] == "started"]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(run.parent.glob("tandem-*"))


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["env.nmae=walker"], ["env.nmae", "env.name"]),
    "key without its section": (["batch_size=300"], ["batch_size", "replay_buffer.batch_size"]),
    "key of TorchRL's recipe": (["replay_buffer.prefetch=16"], ["replay_buffer.prefetch", "nothing is prefetched"]),
    "recipe section": (["profiling.enabled=true"], ["profiling.enabled", "py-spy"]),
    "section as key": (["env=cheetah"], ["env is a section", "env.backend"]),
    "wrong type": (["env.seed=abc"], ["env.seed", "abc", "whole number"]),
    "float for a count": (["optimization.total_optim_steps=1e5"], ["total_optim_steps", "100000.0"]),
    "out of bounds": (["optimization.gamma=1.5"], ["optimization.gamma=1.5", "at most 1.0"]),
    "not a number": (["optimization.grad_clip=nan"], ["optimization.grad_clip=nan", "finite"]),
    "wrong choice": (["logger.backend=wandbb"], ["logger.backend=wandbb", "logger.backend=wandb"]),
    "no key=value": (["walker"], ["'walker'", "key=value"]),
    "sweep": (["env.seed=1,2"], ["env.seed=1,2", "one value"]),
    "added key": (["+env.wind=1"], ["+env.wind=1", "adds"]),
    "unknown config": (["--config", "quickstrat"], ["'quickstrat'", "--config quickstart"]),
    "unknown option": (["--sim-gpus", "1"], ["--sim-gpus", "--help"]),
    "option without value": (["--config"], ["--config", "--help"]),
    "GPU that is no number": (["--sim-gpu", "first"], ["--sim-gpu", "'first'"]),
    "negative GPU": (["--train-gpu", "-1"], ["--train-gpu -1", "expected at least one GPU"]),
    "all columns evaluate": (["collector.eval_envs=8"], ["collector.eval_envs=8", "fewer than 8"]),
    "broken windows": (["replay_buffer.batch_size=500"], ["batch_size=500", "batch_size=496"]),
    "ring too short": (["replay_buffer.buffer_size=300"], ["buffer_size=300", "at least 320"]),
    "prefill too short": (["collector.init_random_frames=1", "replay_buffer.batch_length=32"], ["at least 256"]),
    "prefill above the ring": (["replay_buffer.buffer_size=900"], ["init_random_frames=1600", "buffer_size=900"]),
    "more starts than beliefs": (["optimization.imagination_starts=300"], ["imagination_starts=300", "at most 256"]),
    "lockstep without a ratio": (
        ["collector.mode=lockstep", "optimization.replay_ratio=null"],
        ["collector.mode=lockstep", "replay_ratio=64"],
    ),
    "wrong task": (["env.task=swngup"], ["env.task", "swingup"]),
    "images of nothing": (["env.grayscale=true"], ["env.grayscale=true", "env.from_pixels"]),
    "resume of nothing": (["--resume", "nowhere"], ["nowhere", "config.yaml"]),
    "resume into another folder": (["--resume", "nowhere", "--run-dir", "b"], ["--resume nowhere", "--run-dir"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_command_line_that_cannot_work_is_refused_before_anything_starts(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, parts = REFUSED[case]
    config = [] if "--config" in arguments or "--resume" in arguments else ["--config", "quickstart"]
    touch = ("touch", str(tmp_path / "started"))
    assert launch.main([*config, *arguments], commands={"learner": touch, "collector": touch}) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    for part in parts:
        assert part in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_leaves_a_complete_summary_and_nothing_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve", "replay_buffer.buffer_size=99990") == 0
    summary = _summary(run)
    assert set(SUMMARY_KEYS) <= set(summary)
    assert {key: summary[key] for key in ROW if key in SUMMARY_KEYS and key != "wall_s"} == {
        key: value for key, value in ROW.items() if key in SUMMARY_KEYS and key != "wall_s"
    }
    assert (summary["exit_reason"], summary["collector_restarts"]) == ("finished", 0)
    assert summary["devices"] == {"sim": "cpu", "train": "cpu"} and 0 < summary["wall_s"] < DEADLINE_S
    output = capsys.readouterr().out
    assert f"run folder: {run}" in output.replace("\n", "")
    assert "no GPU found: simulator and learner both run on the CPU" in output
    assert "buffer_size=99990 becomes 99920" in output and "Ctrl-C saves" in output
    _assert_nothing_is_left(run)


def test_a_learner_that_ends_before_the_last_gradient_step_makes_launch_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    one_start = ("optimization.total_optim_steps=100", "supervision.max_learner_restarts=0")
    assert _launch(run, "save:collector-serves", "serve", *one_start) == 1
    assert (
        "ended by itself after 60 of 100 gradient steps, probably because of a signal" in _summary(run)["exit_reason"]
    )
    assert "a checkpoint of step 60 is saved; continue with:" in capsys.readouterr().out


def test_a_checkpoint_of_step_0_is_not_offered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _launch(tmp_path / "run", "save:collector-serves", "serve", "optimization.total_optim_steps=100") == 1
    save_checkpoint(tmp_path / "run", 0)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000060")
    capsys.readouterr()
    assert launch.main(["--resume", str(tmp_path / "run")], commands=_commands("die:3", "serve")) == 1
    assert "a checkpoint of step" not in capsys.readouterr().out


def test_float16_on_the_cpu_gives_a_warning_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _launch(tmp_path / "run", "finish", "serve", "optimization.autocast=float16") == 0
    assert "optimization.autocast=float16 on the CPU is many times slower" in capsys.readouterr().out


def test_rows_reach_tensorboard(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve", "logger.backend=tensorboard") == 0
    (file,) = (run / "tb").glob("events.out.tfevents.*")
    assert b"loss/model" in file.read_bytes()


def test_the_death_of_a_learner_is_shown_with_the_end_of_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _launch(run, "die:3", "serve") == 1
    assert _summary(run)["exit_reason"].startswith("learner died (exit code 3: last output of the learner) twice, and ")
    printed = capsys.readouterr()
    assert "last output of the learner" in printed.out and "learner died (exit code 3)" in printed.err
    _assert_nothing_is_left(run)


def test_the_exit_code_of_a_learner_that_refuses_its_settings_is_2(tmp_path: Path) -> None:
    assert _launch(tmp_path / "run", "die:2", "serve") == 2


def test_a_collector_that_dies_is_restarted_and_the_restarts_are_counted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "serve:collector-is-good", "die-until:2") == 0
    assert (run / "collector-is-good").read_text() == "2"
    assert _summary(run)["collector_restarts"] == 2
    started = [event for event in _events(run) if event["event"] == "started"]
    assert [event["role"] for event in started] == ["learner", "collector", "collector", "collector"]
    assert [event["command"][-1] for event in started[1:]] == ["0", "1", "2"]


def test_a_death_beyond_max_restarts_ends_the_run_after_the_learner_has_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "serve", "die:9", "collector.max_restarts=1") == 1
    summary = _summary(run)
    died = "collector died 2 times (the last time: exit code 9, after the output: last output of the collector)"
    assert summary["exit_reason"].startswith(died)
    assert summary["collector_restarts"] == 1
    assert summary["gradient_steps"] == 40, "the row that the learner wrote when it was asked to end"
    _assert_nothing_is_left(run)


def test_deaths_are_forgotten_after_healthy_after_s_of_collecting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    forgetful = ("collector.max_restarts=1", "collector.healthy_after_s=0")
    assert _launch(run, "serve:collector-is-good", "collect-until:3", *forgetful) == 0
    assert _summary(run)["collector_restarts"] == 3


def test_a_collector_that_used_too_much_memory_after_useful_work_is_restarted_and_counts_as_no_death(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    settings = ("collector.max_restarts=0", "collector.max_rss_gb=2", "collector.healthy_after_s=0")
    assert _launch(run, "serve:collector-is-good", "outgrow-until:2", *settings) == 0
    assert _summary(run)["collector_restarts"] == 2
    assert not [event for event in _events(run) if "died" in event["event"]]
    warned = [event for event in _events(run) if "used more memory" in event["event"]]
    assert [(event["level"], event["used_gb"], event["limit_gb"]) for event in warned] == [("warning", 2.5, 2.0)] * 2


def test_collectors_that_use_too_much_memory_at_once_use_up_the_restart_budget(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("collector.max_restarts=1", "collector.max_rss_gb=2")
    assert _launch(run, "serve", "outgrow-until:9", *settings) == 1
    summary = _summary(run)
    for part in (
        "collector died 2 times (the last time: it used 2.50 GB, more than collector.max_rss_gb=2, before",
        "set collector.max_rss_gb=5.0, or null",
        "expected at most collector.max_restarts=1 such deaths",
    ):
        assert part in summary["exit_reason"]
    assert summary["collector_restarts"] == 1
    _assert_nothing_is_left(run)


def test_without_a_memory_limit_the_exit_code_for_too_much_memory_is_a_death(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("collector.max_restarts=1", "collector.healthy_after_s=1000")
    assert _launch(run, "serve", "outgrow-until:9", *settings) == 1
    assert _summary(run)["exit_reason"].startswith("collector died 2 times (the last time: exit code 75)")


def test_a_collector_that_refuses_its_settings_ends_the_run_after_the_learner_has_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "save", "refuse") == 2
    summary = _summary(run)
    reason = "the collector cannot start or continue: no reason was reported; see logs/collector.out"
    assert summary["exit_reason"] == reason
    assert (summary["collector_restarts"], summary["gradient_steps"]) == (0, 60)
    assert (run / "checkpoints" / "latest").read_text() == "00000060"
    _assert_nothing_is_left(run)


@pytest.mark.parametrize(("learner", "collector", "kept"), [("die:2", "serve", "3"), ("save", "refuse", "5")])
def test_a_refused_resume_keeps_its_overrides_only_if_it_trained_with_them(
    tmp_path: Path, learner: str, collector: str, kept: str
) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve", "optimization.log_every=3") == 0
    save_checkpoint(run, 20)
    (run / "learner-serves").unlink(missing_ok=True)
    resume, before = ["--resume", str(run), "optimization.log_every=5"], _summary(run)
    assert launch.main(resume, commands=_commands(learner, collector)) == 2
    assert f"log_every: {kept}\n" in (run / "config.yaml").read_text()
    trained = kept == "5"
    assert (_summary(run) == before) is not trained, "a resume that trained nothing leaves the run unchanged"
    assert json.loads((run / "run.json").read_text())["num_resumes"] == int(trained)


def test_a_refused_resume_of_a_crashed_run_restores_the_settings(tmp_path: Path) -> None:
    """The metrics rows that are newer than the checkpoint come from the crashed launch, not from the resume."""
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve", "optimization.log_every=3") == 0
    save_checkpoint(run, 10)  # the last row is of step 40
    (run / "learner-serves").unlink(missing_ok=True)
    before = _summary(run)
    resume = ["--resume", str(run), "optimization.log_every=5"]
    assert launch.main(resume, commands=_commands("die:2", "serve")) == 2
    assert "log_every: 3\n" in (run / "config.yaml").read_text() and _summary(run) == before


def test_a_hung_collector_writes_its_stacks_and_is_killed_and_restarted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "serve:collector-is-good", "hang-until:1", "deadlines.step_s=3") == 0
    assert _summary(run)["collector_restarts"] == 1
    assert "stand_still" in (run / "crash" / "collector.stacks").read_text()
    hangs = [event for event in _events(run) if "hung in phase collecting" in event["event"]]
    assert hangs and hangs[0]["level"] == "error"


def test_a_hung_learner_that_may_not_be_restarted_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "hang", "serve", "deadlines.step_s=3", "supervision.max_learner_restarts=0") == 1
    assert _summary(run)["exit_reason"].startswith("learner died (hung in phase training: no progress for ")
    assert "stand_still" in (run / "crash" / "learner.stacks").read_text()
    _assert_nothing_is_left(run)


def test_a_collector_that_ignores_sigterm_is_killed_at_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "serve:collector-serves", "stubborn", "deadlines.stop_s=1") == 0
    stopped = [event for event in _events(run) if event["event"] == "collector stopped"]
    assert [event["how"] for event in stopped] == ["SIGKILL"]


def _start(run: Path, learner: str, *settings: str) -> subprocess.Popen[str]:
    """Start launch as a separate process and return it once both children serve."""
    command = [
        sys.executable,
        str(FAKES / "launch_with.py"),
        learner,
        "serve",
        *QUICK,
        "--run-dir",
        str(run),
        *settings,
    ]
    env = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(run.parent)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + DEADLINE_S
    while not all((run / f"{role}-serves").exists() for role in ("learner", "collector")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_run_after_the_learner_has_saved(signum: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "serve")
    process.send_signal(signum)
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 128 + signum, output
    summary = _summary(run)
    assert (summary["exit_reason"], summary["gradient_steps"]) == (f"interrupted by {signum.name}", 40)
    _assert_nothing_is_left(run)


def test_a_closed_terminal_ends_the_run_after_the_learner_has_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = exit_code_after_its_terminal_closes(
        [sys.executable, str(FAKES / "launch_with.py"), "save", "serve", *QUICK, "--run-dir", str(run)],
        is_ready=lambda: all((run / f"{role}-serves").exists() for role in ("learner", "collector")),
        seconds=DEADLINE_S,
        PYTHONPATH=str(REPO),
        TMPDIR=str(tmp_path),
    )
    assert code == 129
    assert _summary(run)["exit_reason"] == "interrupted by SIGHUP"
    assert (run / "checkpoints" / "latest").read_text() == "00000060"
    _assert_nothing_is_left(run)


def test_a_run_goes_on_when_the_program_that_reads_its_output_has_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "save")
    assert process.stdout
    process.stdout.close()
    collector = next(event["pid"] for event in _events(run) if event.get("role") == "collector")
    os.kill(collector, signal.SIGKILL)  # launch reports this death on the dead pipe
    end = time.monotonic() + DEADLINE_S
    while not any(event["event"] == "the collector was restarted" for event in _events(run)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=DEADLINE_S) == 143
    assert (run / "checkpoints" / "latest").read_text() == "00000060"
    _assert_nothing_is_left(run)


@pytest.mark.parametrize("redirection", ["> /dev/full 2>&1", ">&- 2>&-"])
def test_a_run_finishes_although_its_output_cannot_be_written(redirection: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, str(FAKES / "launch_with.py"), "finish", "serve", *QUICK, "--run-dir", str(run)]
    env = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", "-c", f"{shlex.join(command)} {redirection}"], env=env, timeout=DEADLINE_S)
    assert done.returncode == 0
    assert _summary(run)["exit_reason"] == "finished"


class _BrokenForwarder:
    """A logging backend that fails at each row and is interrupted by Ctrl-C while it sends the last ones."""

    def add(self, row: object) -> None:
        raise RuntimeError("the service is gone")

    def close(self) -> None:
        raise KeyboardInterrupt


def test_a_logging_backend_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.run.open_forwarder", lambda settings, folder: _BrokenForwarder())
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve") == 0
    assert (_summary(run)["exit_reason"], _summary(run)["gradient_steps"]) == ("finished", 40)
    assert "rows can no longer be sent to none" in capsys.readouterr().err


def test_an_error_of_launch_itself_lets_the_learner_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def fail(watch: object) -> None:
        if (run / "learner-serves").exists():
            raise RuntimeError("a defect")

    monkeypatch.setattr("launcher.watch.Watch._check_collector", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        _launch(run, "save", "serve")
    assert _summary(run)["exit_reason"] == "launch failed: RuntimeError('a defect')"
    assert (run / "checkpoints" / "latest").read_text() == "00000060"
    _assert_nothing_is_left(run)


def test_a_run_whose_folder_is_deleted_ends_with_that_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "serve")
    shutil.rmtree(run)
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 1
    assert f"the run folder {run} was deleted" in output.replace("\n", "") and "Traceback" not in output
    assert not run.exists()


def test_the_resume_of_a_copy_leaves_the_sockets_of_the_original_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve") == 0
    save_checkpoint(run, 20)
    sockets = make_socket_dir()
    described = json.loads((run / "run.json").read_text()) | {"socket_dir": str(sockets)}
    (run / "run.json").write_text(json.dumps(described))
    shutil.copytree(run, tmp_path / "copy")
    for folder, kept in ((tmp_path / "copy", True), (run, False)):
        assert launch.main(["--resume", str(folder)], commands=_commands("finish", "serve")) == 0
        assert sockets.exists() == kept


@pytest.mark.parametrize("precious", ["results", "tandem-results"])
def test_a_resume_removes_no_folder_that_is_not_a_folder_of_sockets(precious: str, tmp_path: Path) -> None:
    run, named = tmp_path / "run", tmp_path / precious
    assert _launch(run, "finish", "serve") == 0
    save_checkpoint(run, 20)
    named.mkdir(mode=0o700)
    (named / "results.csv").write_text("1, 2, 3")
    described = json.loads((run / "run.json").read_text()) | {"socket_dir": str(named)}
    (run / "run.json").write_text(json.dumps(described))
    assert launch.main(["--resume", str(run)], commands=_commands("finish", "serve")) == 0
    assert (named / "results.csv").read_text() == "1, 2, 3"


def test_other_users_can_neither_read_nor_write_the_files_of_a_run(tmp_path: Path) -> None:
    run, before = tmp_path / "run", os.umask(0)
    try:
        assert _launch(run, "finish", "serve") == 0
    finally:
        os.umask(before)
    assert (run / "run.json").is_file() and (run / "logs").is_dir()
    assert [path for path in (run, *run.rglob("*")) if path.stat().st_mode & 0o077] == []


def test_an_interrupt_before_training_ends_the_run_within_seconds_even_if_the_learner_compiles(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "compile", "deadlines.save_s=600", "deadlines.compile_s=600")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 143, output
    assert _summary(run)["exit_reason"] == "interrupted by SIGTERM before training began"
    _assert_nothing_is_left(run)


def test_a_second_interrupt_kills_both_processes_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "stubborn", "deadlines.save_s=600", "deadlines.step_s=600")
    process.send_signal(signal.SIGINT)
    assert process.stdout
    while "a second Ctrl-C kills both" not in (line := process.stdout.readline()):
        assert line, "launch ended before it reported that it is stopping"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=DEADLINE_S) == 130
    assert "killed by a second signal" in _summary(run)["exit_reason"]
    _assert_nothing_is_left(run)


def test_a_learner_that_ignores_the_request_to_end_is_killed_after_its_deadline(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "stubborn", "deadlines.save_s=1")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143
    assert "did not end within deadlines.save_s=1 s" in _summary(run)["exit_reason"]


def test_both_processes_end_when_launch_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(run, "serve")
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    pids = [event["pid"] for event in _events(run) if event["event"] == "started"]
    assert len(pids) == 2
    end = time.monotonic() + DEADLINE_S
    while any(Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in _status(pid) for pid in pids):
        assert time.monotonic() < end, f"{pids} still run after launch was killed"
        time.sleep(0.02)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


def test_a_second_launch_in_a_running_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = create_run_folder(tmp_path / "run")
    try:
        assert _launch(tmp_path / "run", "finish", "serve") == 2
        assert f"in use by the launch with pid {os.getpid()}" in capsys.readouterr().err
    finally:
        lock.release()


def test_a_resume_takes_the_lock_before_the_checks_that_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve") == 0
    save_checkpoint(run, 20)
    checked: list[object] = []
    monkeypatch.setattr("launcher.settings.check_env", lambda *arguments: checked.append(arguments))
    lock = open_run_folder(run)
    try:
        assert launch.main(["--resume", str(run)], commands=_commands("finish", "serve")) == 2
        assert f"in use by the launch with pid {os.getpid()}" in capsys.readouterr().err
        assert not checked
    finally:
        lock.release()


def test_a_refused_resume_releases_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve") == 0
    save_checkpoint(run, 20)
    assert launch.main(["--resume", str(run), "env.nmae=x"], commands=_commands("finish", "serve")) == 2
    open_run_folder(run).release()


def test_a_resumed_run_keeps_its_settings_and_starts_the_learner_with_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "finish", "serve", "env.seed=7") == 0
    save_checkpoint(run, 20)
    commands = _commands("finish", "serve")
    assert launch.main(["--resume", str(run), "optimization.log_every=3"], commands=commands) == 0
    started = [event for event in _events(run) if event["event"] == "started" and event["role"] == "learner"]
    assert ["--resume" in event["command"] for event in started] == [False, True]
    config = (run / "config.yaml").read_text()
    assert "seed: 7" in config and "log_every: 3" in config
    described = json.loads((run / "run.json").read_text())
    assert described["num_resumes"] == 1
    assert ["--resume" in one["argv"] for one in described["launches"]] == [False, True], (
        "the command line of the first launch is kept"
    )


def _finished_run(run: Path) -> None:
    """Make a run that can be resumed."""
    assert _launch(run, "finish", "serve") == 0
    save_checkpoint(run, 20)


def _requeue(run: Path, *settings: str, learner: str = "finish") -> int:
    """Start the command line that is the same at every start of a job."""
    words = [*QUICK, "--run-dir", str(run), "--resume", "auto", *settings]
    return launch.main(words, commands=_commands(learner, "serve"))


def test_a_requeued_command_line_begins_continues_and_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _requeue(run) == 0
    assert _requeue(run, "env.seed=4") == 0, "an attempt that saved no checkpoint is begun again"
    assert "seed: 0\n" in (run / "earlier-1" / "config.yaml").read_text()
    save_checkpoint(run, 20)
    capsys.readouterr()
    assert _requeue(run, "env.seed=4") == 0
    assert "continuing from step 20" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["num_resumes"] == 1
    save_checkpoint(run, 40)
    before = _summary(run)
    assert _requeue(run, "env.seed=4") == 0, "all steps were done"
    assert "nothing is left to do: " in capsys.readouterr().out and _summary(run) == before


def test_a_requeued_command_line_hides_no_loss_and_takes_no_foreign_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    (run / "checkpoints" / "00000020" / "state.pt").write_text("cut")
    assert _requeue(run) == 2
    assert "00000020 is damaged: state.pt has 3 bytes" in capsys.readouterr().err
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").touch()
    assert _requeue(foreign) == 2
    assert "is not empty: it contains chapter.tex" in capsys.readouterr().err
    assert (foreign / "chapter.tex").exists()


def _resume(run: Path, *settings: str) -> int:
    return launch.main(["--resume", str(run), *settings], commands=_commands("finish", "serve"))


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_resume_without_a_readable_run_json_starts_with_a_warning(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    (run / "run.json").unlink()
    if content is not None:
        (run / "run.json").write_text(content)
    assert _resume(run) == 0
    assert "launch warning: run.json is damaged" in capsys.readouterr().err
    described = json.loads((run / "run.json").read_text())
    assert described["run_id"] and described["num_resumes"] == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "learner.progress.partial", "summary.json", "run.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    capsys.readouterr()
    assert _resume(run) == 2
    printed = capsys.readouterr()
    assert "error: " in printed.err + printed.out and "Traceback" not in printed.err + printed.out


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_file_of_bytes_that_are_no_text_does_not_prevent_a_resume(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    (run / name).write_bytes(b"\xff\xfe\x00\n")
    assert _resume(run) == 0


def test_a_resume_shows_changed_settings_and_refuses_those_that_contradict_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    assert _resume(run, "optimization.log_every=7", "env.task=swingup") == 0
    output = capsys.readouterr().out
    assert re.search(r"changed: optimization\.log_every=\d+ -> 7\n", output) and output.count("changed:") == 1
    assert _resume(run, "networks.activation=relu", "env.task=balance") == 2
    shown = capsys.readouterr().err
    assert "networks.activation=relu changes the meaning" in shown and "env.task=balance changes the meaning" in shown


def test_a_resume_of_a_run_from_before_a_setting_existed_takes_its_default_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    config = run / "config.yaml"
    old = [line for line in config.read_text().splitlines(keepends=True) if "healthy_after_s" not in line]
    config.write_text("".join(old))
    assert _resume(run) == 0
    line = "was written before these settings existed; they take their defaults: collector.healthy_after_s=3600.0"
    assert capsys.readouterr().out.count(line) == 1
    assert "healthy_after_s: 3600.0" in config.read_text()


def test_a_damaged_checkpoint_is_skipped_with_a_line_and_the_one_before_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    (save_checkpoint(run, 30) / "state.pt").write_text("cut")
    assert _resume(run) == 0
    output = capsys.readouterr().out.replace("\n", "")
    assert f"skipping the damaged checkpoint {run}/checkpoints/00000030: state.pt has 3 bytes; expected 8" in output
    assert "continuing from step 20" in output


def test_without_a_whole_checkpoint_a_resume_names_the_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _finished_run(run)
    (run / "checkpoints" / "00000020" / "state.pt").unlink()
    assert _resume(run) == 2
    assert "00000020 is damaged: state.pt is missing" in capsys.readouterr().err


def test_a_collector_that_ends_by_itself_with_exit_code_0_is_reported_as_such(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _launch(run, "serve", "serve:learner-serves", "collector.max_restarts=0") == 1
    assert "exit code 0, although no process asked it to end" in _summary(run)["exit_reason"]
