"""A reader of a progress file sees the writer's newest whole snapshot, also if the writer is killed while it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.config import DeadlineSettings
from shared.metrics import CollectorStatus, read_status
from shared.progress import MAX_REFUSAL_BYTES, MAX_STATUS_BYTES, Progress, Snapshot, overdue_s, read
from tests.processes import DEADLINE_S, wait_for_file

STATUS = CollectorStatus(agent_steps=3000, fps=12.5, policy_version=7, weights_refused=0, rss_gb=1.25)


def test_a_reader_sees_the_writers_latest_snapshot(tmp_path: Path) -> None:
    before = time.monotonic()
    progress = Progress.create(tmp_path / "p")
    assert read(tmp_path / "p").phase == "starting"
    progress.phase("collecting")
    progress.advance()
    progress.status(STATUS)
    seen = read(tmp_path / "p")
    assert (seen.phase, seen.counter, seen.pid) == ("collecting", 2, os.getpid())
    assert seen.status == dataclasses.asdict(STATUS)
    assert read_status(CollectorStatus, seen.status) == STATUS
    assert before <= seen.phase_since <= seen.changed_at <= time.monotonic()


def test_a_new_status_does_not_count_as_progress(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    first = read(tmp_path / "p")
    progress.status(STATUS)
    second = read(tmp_path / "p")
    assert (second.counter, second.changed_at) == (first.counter, first.changed_at)


def test_a_torn_slot_is_never_shown_but_the_slot_before_it(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    progress.phase("training")  # generation 2: slot 0
    progress.advance()  # generation 3: slot 1
    progress.status(STATUS)  # generation 4: slot 0
    whole = (tmp_path / "p").read_bytes()
    for cut in (0, 5, 20, 60, 85):  # a writer killed after `cut` bytes of generation 4
        torn = bytearray(whole)
        torn[cut:400] = b"\xa5" * (400 - cut)
        (tmp_path / "torn").write_bytes(torn)
        seen = read(tmp_path / "torn")
        assert (seen.generation, seen.status) == (3, {})
    assert (read(tmp_path / "p").generation, read(tmp_path / "p").status) == (4, dataclasses.asdict(STATUS))


def test_a_reader_beside_a_busy_writer_sees_only_whole_snapshots_in_order(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from shared.progress import Progress\n"
        "from shared.metrics import CollectorStatus\n"
        "p = Progress.create(Path(sys.argv[1])); p.phase('training'); n = 0\n"
        "while True:\n"
        "    n += 1; p.status(CollectorStatus(n, n, n, n, n, n)); p.refuse(str(n) * (n % 200)); p.advance()\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "p")])
    try:
        wait_for_file(tmp_path / "p")
        generations, end = [], time.monotonic() + DEADLINE_S
        while len(set(generations)) < 300:
            assert time.monotonic() < end, f"only {len(set(generations))} snapshots seen within {DEADLINE_S} s"
            seen = read(tmp_path / "p")
            generations.append(seen.generation)
            assert len(set(seen.status.values())) <= 1
            n = seen.status.get("agent_steps", 0)
            assert seen.refusal in (str(n) * (n % 200), str(n - 1) * ((n - 1) % 200))
        assert generations == sorted(generations)
    finally:
        writer.kill()  # probably in the middle of a write
        writer.wait(DEADLINE_S)
    assert read(tmp_path / "p").generation >= generations[-1]


def test_a_file_that_is_no_progress_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(bytes(8192))
    with pytest.raises(ValueError, match="no whole progress slot in 8192 bytes"):
        read(tmp_path / "p")


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    with pytest.raises(ValueError, match="unknown phase 'dreaming'; expected one of starting, "):
        progress.phase("dreaming")


def test_a_status_that_does_not_fit_its_slot_is_refused(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    empty = json.dumps(dataclasses.asdict(CollectorStatus(0, 0, 0, 0, 0, 0)))
    longest = 10 ** (MAX_STATUS_BYTES - len(empty) + 1)
    progress.status(CollectorStatus(longest // 10, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match=f"takes {MAX_STATUS_BYTES + 1} bytes with 6 fields; expected at most"):
        progress.status(CollectorStatus(longest, 0, 0, 0, 0, 0))
    assert read(tmp_path / "p").status["agent_steps"] == longest // 10


def test_a_refusal_and_a_status_fit_one_page_at_their_longest(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    progress.status(STATUS)
    progress.refuse("x" * MAX_REFUSAL_BYTES)
    progress.advance()
    seen = read(tmp_path / "p")
    assert seen.refusal == "x" * MAX_REFUSAL_BYTES and seen.status == dataclasses.asdict(STATUS)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("env.name=nope", "env.name=nope"),
        ("x" * (MAX_REFUSAL_BYTES + 5000), "x" * MAX_REFUSAL_BYTES),
        ("x" * (MAX_REFUSAL_BYTES - 1) + "é", "x" * (MAX_REFUSAL_BYTES - 1)),
        ("x" * (MAX_REFUSAL_BYTES - 3) + "\N{GRINNING FACE}", "x" * (MAX_REFUSAL_BYTES - 3)),
        ("é" * MAX_REFUSAL_BYTES, "é" * (MAX_REFUSAL_BYTES // 2)),
        ("no file \udcff here", "no file ? here"),  # a path that is not UTF-8
    ],
)
def test_a_long_refusal_is_cut_between_two_characters(reason: str, shown: str, tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")
    assert read(tmp_path / "p").refusal == ""
    progress.refuse(reason)
    assert read(tmp_path / "p").refusal == shown


def test_a_refusal_torn_while_it_is_written_is_not_shown(tmp_path: Path) -> None:
    progress = Progress.create(tmp_path / "p")  # generation 1: slot 1
    progress.refuse("no GPU" * 100)  # generation 2: slot 0
    torn = bytearray((tmp_path / "p").read_bytes())
    torn[300:400] = bytes(100)
    (tmp_path / "torn").write_bytes(torn)
    assert (read(tmp_path / "torn").generation, read(tmp_path / "torn").refusal) == (1, "")


def test_a_process_is_overdue_once_it_stands_still_longer_than_its_phase_allows() -> None:
    seen = Snapshot(phase="compiling", counter=3, changed_at=100.0, phase_since=90.0, pid=1, generation=1)
    deadlines = DeadlineSettings(compile_s=50.0, step_s=1.0)
    assert overdue_s(seen, deadlines, now=149.0, watched_since=0.0) is None
    assert overdue_s(seen, deadlines, now=152.0, watched_since=0.0) == 2.0


def test_time_in_which_the_watcher_was_suspended_does_not_count() -> None:
    seen = Snapshot(phase="compiling", counter=3, changed_at=100.0, phase_since=90.0, pid=1, generation=1)
    assert overdue_s(seen, DeadlineSettings(compile_s=50.0), now=152.0, watched_since=140.0) is None
