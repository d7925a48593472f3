"""Progress is seen whole, children end in order, and nobody outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.child_process import ChildProcess
from shared.config import DeadlineSettings
from shared.lifetime import StopFlag, install_stop_flag
from shared.progress import MAX_STATUS_BYTES, Progress, Snapshot, overdue_s, read

DEADLINE_S = 20.0


def _child(tmp_path: Path, script: str, *args: str, name: str = "child") -> ChildProcess:
    return ChildProcess(
        name,
        [sys.executable, "-c", script, *args],
        output=tmp_path / f"{name}.out",
        env=dict(os.environ),
        cwd=Path.cwd(),
    )


def _wait_for(path: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear within {DEADLINE_S} s"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until_gone(pid: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while _alive(pid):
        assert time.monotonic() < end, f"pid {pid} still lives after {DEADLINE_S} s"
        time.sleep(0.01)


def test_a_reader_sees_the_writers_latest_account(tmp_path: Path) -> None:
    before = time.monotonic()
    progress = Progress.create(tmp_path / "p")
    assert read(tmp_path / "p").phase == "starting"
    progress.phase("collecting")
    progress.advance()
    progress.status({"fps": 12.5, "name": "é"})
    seen = read(tmp_path / "p")
    assert (seen.phase, seen.counter, seen.pid) == ("collecting", 2, os.getpid())
    assert seen.status == {"fps": 12.5, "name": "é"}
    assert before <= seen.phase_since <= seen.changed_at <= time.monotonic()


def test_numbers_alone_are_no_progress(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    first = read(tmp_path / "p")
    progress.status({"fps": 1.0})
    second = read(tmp_path / "p")
    assert (second.counter, second.changed_at) == (first.counter, first.changed_at)


def test_a_torn_slot_is_never_shown_the_slot_before_it_is(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    progress.phase("training")  # generation 2: slot 0
    progress.advance()  # generation 3: slot 1
    progress.status({"step": 3})  # generation 4: slot 0
    whole = (tmp_path / "p").read_bytes()
    for cut in (0, 5, 20, 60, 85):  # a writer killed after `cut` bytes of generation 4
        torn = bytearray(whole)
        torn[cut:200] = b"\xa5" * (200 - cut)
        (tmp_path / "torn").write_bytes(torn)
        seen = read(tmp_path / "torn")
        assert (seen.generation, seen.status) == (3, {})
    assert (read(tmp_path / "p").generation, read(tmp_path / "p").status) == (4, {"step": 3})


def test_a_reader_beside_a_busy_writer_sees_only_whole_accounts_in_order(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from shared.progress import Progress\n"
        "p = Progress.create(Path(sys.argv[1])); p.phase('training'); n = 0\n"
        "while True:\n"
        "    n += 1; p.status({'n': n, 'copy': [n] * (n % 200)}); p.advance()\n"
    )
    writer = _child(tmp_path, script, str(tmp_path / "p"))
    try:
        _wait_for(tmp_path / "p")
        generations, end = [], time.monotonic() + DEADLINE_S
        while len(set(generations)) < 300:
            assert time.monotonic() < end, f"only {len(set(generations))} accounts seen within {DEADLINE_S} s"
            seen = read(tmp_path / "p")
            generations.append(seen.generation)
            if "n" in seen.status:
                assert seen.status["copy"] == [seen.status["n"]] * (seen.status["n"] % 200)
        assert generations == sorted(generations)
    finally:
        writer.kill()
    assert read(tmp_path / "p").generation >= generations[-1]  # killed in the middle of a write


def test_a_file_that_is_no_progress_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(bytes(8192))
    with pytest.raises(ValueError, match="no whole progress slot in 8192 bytes"):
        read(tmp_path / "p")


def test_unknown_phases_and_oversized_numbers_are_refused(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    with pytest.raises(ValueError, match="unknown phase 'dreaming'"):
        progress.phase("dreaming")
    with pytest.raises(ValueError, match=f"at most {MAX_STATUS_BYTES}"):
        progress.status({"text": "x" * MAX_STATUS_BYTES})
    progress.status({"text": "x" * (MAX_STATUS_BYTES - 12)})
    assert len(read(tmp_path / "p").status["text"]) == MAX_STATUS_BYTES - 12


def test_a_process_is_overdue_once_it_stood_still_longer_than_its_phase_allows() -> None:
    seen = Snapshot(phase="compiling", counter=3, changed_at=100.0, phase_since=90.0, pid=1, generation=1)
    deadlines = DeadlineSettings(compile_s=50.0, step_s=1.0)
    assert overdue_s(seen, deadlines, now=149.0, watched_since=0.0) is None
    assert overdue_s(seen, deadlines, now=152.0, watched_since=0.0) == 2.0
    # The watcher itself slept until 140: the process gets its time from there.
    assert overdue_s(seen, deadlines, now=152.0, watched_since=140.0) is None


def test_a_child_that_ignores_sigterm_is_killed_after_its_deadline(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[2]).touch())\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while True: time.sleep(1)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "up"), str(tmp_path / "asked"))
    _wait_for(tmp_path / "up")
    began = time.monotonic()
    assert child.stop(0.3) == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - began < DEADLINE_S
    assert (tmp_path / "asked").exists()  # it was asked first


def test_a_child_that_listens_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from shared.lifetime import install_stop_flag\n"
        "flag = install_stop_flag(); pathlib.Path(sys.argv[1]).touch()\n"
        "while not flag.requested: time.sleep(0.01)\n"
        "sys.exit(7)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "up"))
    _wait_for(tmp_path / "up")
    assert child.stop(DEADLINE_S) == 7


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_the_whole_group_dies_with_its_leader(how: str, tmp_path: Path) -> None:
    script = (
        "import pathlib, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1] + '.new').write_text(str(worker.pid))\n"
        "pathlib.Path(sys.argv[1] + '.new').rename(sys.argv[1])\n"
        "time.sleep(60 if sys.argv[2] == 'kill' else 0)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "worker"), how)
    _wait_for(tmp_path / "worker")
    worker = int((tmp_path / "worker").read_text())
    if how == "kill":
        assert _alive(worker)
        child.kill()
    else:
        assert child.wait(DEADLINE_S) == 0
    _wait_until_gone(worker)


def test_patience_ends_early_when_told_to_hurry(tmp_path: Path) -> None:
    script = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)\n"
    child = _child(tmp_path, script)
    began = time.monotonic()
    assert child.stop(60.0, hurry=lambda: time.monotonic() > began + 0.1) is not None
    assert time.monotonic() - began < DEADLINE_S


def test_the_last_lines_of_a_childs_output_are_kept(tmp_path: Path) -> None:
    child = _child(tmp_path, "for n in range(100): print(n)")
    assert child.wait(DEADLINE_S) == 0
    assert child.last_output(3) == ["97", "98", "99"]


def test_a_stack_dump_names_where_a_process_stands(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from shared.lifetime import enable_stack_dumps\n"
        "enable_stack_dumps(pathlib.Path(sys.argv[1]), 'learner')\n"
        "def stuck_in_here():\n    pathlib.Path(sys.argv[2]).touch(); time.sleep(60)\n"
        "stuck_in_here()\n"
    )
    child = _child(tmp_path, script, str(tmp_path), str(tmp_path / "up"))
    _wait_for(tmp_path / "up")
    child.dump_stacks()
    child.kill()
    assert "stuck_in_here" in (tmp_path / "learner.stacks").read_text()


def test_a_process_dies_with_its_parent(tmp_path: Path) -> None:
    orphan = (
        "import os, pathlib, sys, time; from shared.lifetime import die_with_parent\n"
        "die_with_parent(); pathlib.Path(sys.argv[1] + '.new').write_text(str(os.getpid()))\n"
        "pathlib.Path(sys.argv[1] + '.new').rename(sys.argv[1]); time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        "env = os.environ | {'TANDEM_LAUNCH_PID': str(os.getpid())}\n"
        "subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], env=env, start_new_session=True); time.sleep(60)\n"
    )
    started = subprocess.Popen([sys.executable, "-c", parent, orphan, str(tmp_path / "pid")])
    _wait_for(tmp_path / "pid")
    pid = int((tmp_path / "pid").read_text())
    assert _alive(pid)
    started.kill()
    started.wait(DEADLINE_S)
    _wait_until_gone(pid)


def test_a_process_whose_parent_is_gone_already_does_not_start() -> None:
    script = "from shared.lifetime import die_with_parent; die_with_parent(); raise RuntimeError('it went on')"
    env = os.environ | {"TANDEM_LAUNCH_PID": "1"}
    answer = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert answer.returncode == 1
    assert "launch (pid 1) ended before" in answer.stderr


def test_a_process_that_offers_itself_is_killed_for_memory_before_others() -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    script = (
        "import pathlib, sys; from shared.lifetime import die_first_when_memory_ends\n"
        "score = pathlib.Path('/proc/self/oom_score_adj')\n"
        "for before in (None, '700'):\n"
        "    before and score.write_text(before); die_first_when_memory_ends(); print(int(score.read_text()))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    assert answer.stdout.split() == [str(max(own, 500)), "700"], "raised, and never lowered"


def test_a_stop_flag_can_be_taken_back_from_a_simulator_that_stole_the_signals() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started this in the background
    flag: StopFlag = install_stop_flag()
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a simulator does
        os.kill(os.getpid(), signal.SIGTERM)
        assert not flag.requested
        flag.install()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (flag.requested, flag.signum, flag.count) == (True, signal.SIGTERM, 2)
    finally:
        flag.restore()
    assert signal.getsignal(signal.SIGINT) is before
