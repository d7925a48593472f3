"""Forecasts of what runs out, and the measurements behind them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import structlog

from launcher import resources
from launcher.events import Events
from launcher.resources import Forecast, GpuQuery, ResourceWatch, Space, Watched, free_memory, unfilled_bytes
from shared.handover import create_memfd_slab
from tests.processes import DEADLINE_S

HOUR, GB = 3600.0, 10**9


def forecast(free: list[float], every_s: float = 60.0) -> float | None:
    """Return the hours that are left after these measurements."""
    made = Forecast()
    for number, value in enumerate(free):
        made.add(number * every_s, value)
    return made.hours_left()


def test_a_steady_decline_gives_the_hours_that_are_left() -> None:
    assert forecast([100 * GB - n * GB / 60 for n in range(241)]) == pytest.approx(96.0, rel=0.01)  # 1 GB per hour


def test_there_is_no_forecast_without_a_decline_or_from_a_short_time() -> None:
    assert forecast([]) is None and forecast([5.0] * 300) is None
    assert forecast([100.0 + n for n in range(300)]) is None
    assert forecast([100.0 - n for n in range(10)]) is None


def test_files_that_come_and_go_are_no_decline_and_do_not_hide_one() -> None:
    teeth = [10.0 * (n % 30 == 0) + 7.0 * (n % 17) / 17 for n in range(361)]
    assert forecast([1000.0 - tooth for tooth in teeth]) is None
    hours = forecast([1000.0 - tooth - n / 2 for n, tooth in enumerate(teeth)])
    assert hours is not None and 24 < hours < 30, "820 are left, and 30 are used in an hour"


def test_only_the_last_hours_count() -> None:
    assert forecast([1000.0 - min(n, 100) for n in range(700)]) is None


def test_a_warning_comes_hours_before_and_again_when_half_of_the_time_has_passed() -> None:
    watched, warned = Watched("disk", Space(0, 0)), []
    for minute in range(30 * 60):
        watched.measure(minute * 60.0, Space(int(30 * GB - minute * GB / 60), 100 * GB))
        if (text := watched.warning(12.0)) is not None:
            warned.append((round(watched.hours_left or 0), text))
    assert [hours for hours, _ in warned][:3] == [12, 6, 3]
    assert warned[0][1].startswith("12.0 of 100.0 GB of disk are free, and at the present pace none is left in about")


def test_what_is_nearly_full_is_warned_of_once_without_a_slope() -> None:
    watched = Watched("disk", Space(0, 0))
    found = []
    for minute in range(10):
        watched.measure(minute * 60.0, Space(1 * GB, 100 * GB))
        found.append(watched.warning(12.0))
    assert found == ["only 1.0 of 100.0 GB of disk are free"] + [None] * 9


def test_the_watch_measures_once_a_minute_and_reports_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, events, left = [0.0], Events(), iter(range(100, 0, -1))
    monkeypatch.setattr(resources, "measure", lambda run_dir, pid: [("disk", Space(next(left) * GB, 100 * GB))])
    watch = ResourceWatch(
        tmp_path, warn_hours=12.0, gpus=[], events=events, log=structlog.get_logger(), clock=lambda: clock[0]
    )
    for _ in range(120):
        watch.check(os.getpid())
        clock[0] += 30.0
    assert watch.watched["disk"].space.free == 41 * GB
    assert events.last_problem is not None and "none is left in about" in events.last_problem["text"]


def test_the_tightest_cgroup_limits_the_memory_and_files_that_can_be_dropped_are_free(tmp_path: Path) -> None:
    meminfo, own, groups = tmp_path / "meminfo", tmp_path / "own", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable: 1500 kB\n")
    own.write_text("0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    assert free_memory(meminfo, own, groups) == Space(1500 * 1024, 2000 * 1024)
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    (groups / "job" / "memory.max").write_text("900\n")
    (groups / "job" / "memory.current").write_text("800\n")
    (groups / "job" / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert free_memory(meminfo, own, groups) == Space(400, 900)
    own.write_text("5:cpu:/x\n4:memory:/job\n")
    (groups / "memory" / "job").mkdir(parents=True)
    (groups / "memory" / "job" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (groups / "memory" / "job" / "memory.usage_in_bytes").write_text("1")
    assert free_memory(meminfo, own, groups) == Space(1500 * 1024, 2000 * 1024)
    assert free_memory(tmp_path / "nothing", tmp_path / "nothing", groups) is None


def test_the_unfilled_part_of_the_replay_is_not_free() -> None:
    before = unfilled_bytes(os.getpid())
    slab, descriptor = create_memfd_slab(1 << 20)
    assert unfilled_bytes(os.getpid()) == before + (1 << 20)
    slab[: 1 << 19] = 7
    assert unfilled_bytes(os.getpid()) == before + (1 << 19)
    os.close(descriptor)


def test_the_gpus_of_the_run_are_asked_without_waiting() -> None:
    query = GpuQuery(["GPU-a", "GPU-c"], ["printf", "GPU-a, 1000, 2000\\nGPU-b, 5, 6\\nGPU-c, [N/A], 9\\n"])
    end, pause_s = time.monotonic() + DEADLINE_S, 0.05
    assert query.newest() == []
    while not (found := query.newest()):  # a query that has not ended when it is asked again gives no answer
        assert time.monotonic() < end
        time.sleep(pause_s := 2 * pause_s)
    assert found == [("GPU memory (GPU-a)", Space(1000 << 20, 2000 << 20))]
    query.close()
    assert GpuQuery([], ["false"]).newest() == []
    missing = GpuQuery(["GPU-a"], ["/nowhere/nvidia-smi"])
    assert missing.newest() == missing.newest() == []
