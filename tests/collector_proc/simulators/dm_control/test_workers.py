"""Worker processes: their deaths, deadlines and error messages, and that they leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from collector_proc.simulators.dm_control import workers
from collector_proc.simulators.dm_control.environment import SuitePlan
from collector_proc.simulators.dm_control.workers import WorkerPool
from shared.errors import SimulatorError
from shared.lifetime import StopRequested, install_stop_flag
from tests.processes import wait_for_file

ROOT = Path(__file__).resolve().parents[4]
CHEETAH = SuitePlan("cheetah", "run", seed=3, frame_skip=2, from_pixels=False, grayscale=False, horizon=None)
STEP_S = 60.0
COLLECTOR = """
import signal
from collector_proc.simulators.dm_control.environment import SuitePlan
from collector_proc.simulators.dm_control.workers import WorkerPool
plan = SuitePlan("cartpole", "balance", seed=0, frame_skip=2, from_pixels=False, grayscale=False, horizon=None)
pool = WorkerPool(plan, num_workers=2, num_envs=1, start_s=60, step_s=60)
print(*pool.pids, flush=True)
signal.pause()
"""


def pool_of(
    num_workers: int, plan: SuitePlan = CHEETAH, *, step_s: float = STEP_S, start_s: float = 60.0
) -> WorkerPool:
    return WorkerPool(plan, num_workers=num_workers, num_envs=2, start_s=start_s, step_s=step_s)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_killed_worker_raises_an_error_that_names_it_before_the_deadline() -> None:
    pool = pool_of(2)
    try:
        pool.run(reset=True)
        os.kill(pool.pids[1], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(SimulatorError, match=r"worker 1 \(environments 2\.\.3\).*died with exit code -9 after"):
            for _ in range(1000):
                pool.run(reset=False)
        assert time.monotonic() - start < STEP_S
    finally:
        pool.close()


def test_a_worker_killed_within_a_tick_raises_an_error_before_the_deadline() -> None:
    pool = pool_of(1)
    try:
        pool.run(reset=True)
        os.kill(pool.pids[0], signal.SIGSTOP)  # so that it has the command, but no answer is sent, when it dies
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {pool.pids[0]}"])
        start = time.monotonic()
        with pytest.raises(SimulatorError, match="died with exit code -9 after 1 ticks"):
            pool.run(reset=False)
        assert time.monotonic() - start < STEP_S
        killer.wait()
    finally:
        pool.close()


def test_a_worker_that_hangs_is_named_at_the_deadline_and_close_ends_it() -> None:
    pool = pool_of(2, step_s=0.5)
    pids = pool.pids
    try:
        pool.run(reset=True)
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(
            SimulatorError, match=r"worker 0 .* did not step within 0.5 s; expected .* 1 of 2 .* deadlines.step_s"
        ):
            pool.run(reset=False)
    finally:
        start = time.monotonic()
        pool.close()
    assert time.monotonic() - start < STEP_S
    assert all(gone(pid) for pid in pids)


def test_the_message_of_a_workers_exception_reaches_the_collector() -> None:
    plan = SuitePlan("cheetah", "fly", seed=3, frame_skip=2, from_pixels=False, grayscale=False, horizon=None)
    with pytest.raises(SimulatorError, match=r"worker \d .*Level 'fly' does not exist in domain 'cheetah'"):
        pool_of(2, plan)


def test_an_exception_in_a_tick_names_the_worker_and_the_environment() -> None:
    broken: object = "2"  # with it, an environment fails at its first step
    plan = SuitePlan("cheetah", "run", 3, broken, False, False, None)  # type: ignore[arg-type]
    pool = pool_of(2, plan)
    try:
        pool.run(reset=True)
        with pytest.raises(SimulatorError, match=r"worker \d .* failed: environment [02] failed: TypeError"):
            pool.run(reset=False)
    finally:
        pool.close()


def test_workers_that_start_too_slowly_raise_an_error_that_names_the_setting() -> None:
    with pytest.raises(SimulatorError, match=r"did not build its environments within 0.01 s; .*deadlines.start_s"):
        pool_of(1, start_s=0.01)


def test_a_request_to_stop_kills_workers_that_still_build_their_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dm_control.py").write_text(
        "import os, pathlib, time\n"
        "new = pathlib.Path(__file__).with_name('new'); new.write_text(str(os.getpid()))\n"
        "new.rename(new.with_name('pid')); time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # its workers import this dm_control
    monkeypatch.setattr(workers, "CLOSE_S", 60.0)  # so that the test would not end if the workers got time to end

    def ask_to_stop() -> None:
        wait_for_file(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGTERM)

    flag, asking = install_stop_flag(), threading.Thread(target=ask_to_stop)
    try:
        asking.start()
        start = time.monotonic()
        with pytest.raises(StopRequested), flag.interrupting():
            pool_of(1, start_s=300.0)
        assert time.monotonic() - start < 60.0 and gone(int((tmp_path / "pid").read_text()))
    finally:
        asking.join()
        flag.restore()


def test_the_error_about_a_renderer_that_cannot_start_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")  # dm_control then fails as it does without the library
    plan = SuitePlan("cheetah", "run", 3, 2, from_pixels=True, grayscale=False, horizon=None)
    with pytest.raises(
        SimulatorError, match=r"renderer cannot start.*MUJOCO_GL osmesa.*libosmesa6.*env.from_pixels=false"
    ):
        pool_of(1, plan)


def test_images_without_a_renderer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    plan = SuitePlan("cheetah", "run", 3, 2, from_pixels=True, grayscale=False, horizon=None)
    with pytest.raises(SimulatorError, match=r"no renderer for images.*MUJOCO_GL=egl"):
        pool_of(1, plan)


def test_close_leaves_no_process_no_file_and_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    pool = pool_of(2)
    pids = pool.pids
    pool.run(reset=True)
    for pid in [*pids, os.getpid()]:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "memfd:tandem-tick" in maps
        assert "/dev/shm" not in maps or pid == os.getpid()  # other tests in this process may map files there
    pool.close()
    pool.close()  # a second call has no effect
    assert len(pids) == 2 and all(gone(pid) for pid in pids)
    del pool
    assert set(os.listdir("/proc/self/fd")) <= before
    assert "memfd:tandem-tick" not in Path("/proc/self/maps").read_text()


def test_workers_die_with_a_collector_that_is_killed() -> None:
    collector = subprocess.Popen([sys.executable, "-c", COLLECTOR], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert collector.stdout is not None
    pids = [int(word) for word in collector.stdout.readline().split()]
    assert len(pids) == 2
    handles = [os.pidfd_open(pid) for pid in pids]
    collector.kill()
    collector.wait()
    collector.stdout.close()
    for handle in handles:
        assert select.select([handle], [], [], 30.0)[0], "a worker still runs 30 s after its collector was killed"
        os.close(handle)


def test_workers_ignore_interrupt_and_terminate_signals() -> None:
    pool = pool_of(1)
    try:
        pool.run(reset=True)
        os.kill(pool.pids[0], signal.SIGINT)
        os.kill(pool.pids[0], signal.SIGTERM)
        for _ in range(5):
            pool.run(reset=False)
        assert np.isfinite(pool.tick.obs["policy"]).all()
    finally:
        pool.close()


def test_a_worker_has_one_thread_and_does_not_import_torch() -> None:
    pool = pool_of(1)
    try:
        pool.run(reset=True)
        pool.run(reset=False)
        status = Path(f"/proc/{pool.pids[0]}/status").read_text()
        assert "Threads:\t1\n" in status
        assert "libtorch" not in Path(f"/proc/{pool.pids[0]}/maps").read_text()
    finally:
        pool.close()
