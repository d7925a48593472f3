"""Growing memory is measured, shared memory is not counted, and measuring takes little time."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import memory
from shared.memory import Memory, MemoryMeter, is_out_of_memory, own_rss_bytes, total_bytes

MB = 1_000_000


def fill(page: mmap.mmap) -> None:
    """Write every byte, without a second copy of them on the heap."""
    for _ in range(len(page) // MB):
        page.write(b"\1" * MB)


def test_private_memory_is_counted_and_shared_memory_is_not() -> None:
    before = own_rss_bytes()
    # a mapping, because the heap may have free pages already
    with mmap.mmap(-1, 200 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        fill(held)
        grown = own_rss_bytes()
        assert grown - before == pytest.approx(200 * MB, rel=0.1)
        descriptor = os.memfd_create("replay")
        os.ftruncate(descriptor, 200 * MB)
        with mmap.mmap(descriptor, 200 * MB) as page:
            fill(page)
            assert own_rss_bytes() - grown < 20 * MB, "filling the replay must not count"
        os.close(descriptor)


def test_the_memory_of_worker_processes_is_counted() -> None:
    script = "import sys; held = b'x' * 100_000_000; sys.stdout.write('up\\n'); sys.stdout.flush(); sys.stdin.read()"
    before = own_rss_bytes()
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "up\n"
        grown = own_rss_bytes() - before
        worker.communicate()
    assert 90 * MB < grown < 150 * MB


def forked(own_rss: str) -> list[float]:
    """Return the MB that a process of 200 MB counts: alone, with a forked child, after that child has written 50 MB."""
    script = f"""
import os, sys
from pathlib import Path
from shared import memory
{own_rss}
held = bytearray(b"x") * 200_000_000
seen = [memory.own_rss_bytes()]
up, asked, wrote = os.pipe(), os.pipe(), os.pipe()
if os.fork() == 0:
    os.write(up[1], b"1"), os.read(asked[0], 1)
    held[:50_000_000] = bytes(50_000_000)
    os.write(wrote[1], b"1"), os.read(asked[0], 1)
    os._exit(0)
os.read(up[0], 1)
seen.append(memory.own_rss_bytes())
os.write(asked[1], b"1"), os.read(wrote[0], 1)
seen.append(memory.own_rss_bytes())
os.write(asked[1], b"1"), os.wait()
print(*seen)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    return [int(number) / MB for number in done.stdout.split()]


def test_pages_that_a_forked_worker_has_not_written_are_counted_once() -> None:
    alone, beside_child, written = forked("")
    assert alone > 200 and beside_child - alone < 20
    assert 50 <= written - beside_child < 120, "only the pages that the child wrote count twice"


def test_without_smaps_rollup_a_page_of_two_processes_counts_twice() -> None:
    alone, beside_child, _ = forked("memory.ROLLUP = 'no_such_file'")
    assert alone > 200 and beside_child - alone > 180


def test_memory_is_measured_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], 0

    def measure(device: str) -> Memory:
        nonlocal asked
        asked += 1
        return Memory(asked)

    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    meter = MemoryMeter("cpu", measure=measure)
    seen = []
    for clock[0] in (0.0, 0.5, 1.0, 1.1, 2.0, 2.2):
        seen.append(meter.read().rss_bytes)
    assert seen == [1, 1, 1, 2, 2, 3]
    assert [meter.read(now=True).rss_bytes, meter.read().rss_bytes] == [4, 4], "`now` measures in any case"


def test_measuring_takes_at_most_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked_at = [0.0], []

    def measure(device: str) -> Memory:
        asked_at.append(clock[0])
        clock[0] += 0.5  # the time that a large process takes
        return Memory(1)

    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    meter = MemoryMeter("cpu", measure=measure)
    for clock[0] in (2.0, 50.0, 51.0, 60.0, 101.0, 102.0):
        meter.read()
    assert asked_at == [0.0, 51.0, 102.0]


@pytest.mark.parametrize("whole_device", [True, False])
def test_the_driver_is_asked_only_if_the_memory_of_the_whole_device_is_measured(
    monkeypatch: pytest.MonkeyPatch, whole_device: bool
) -> None:
    asked = []

    def mem_get_info(device: str) -> tuple[int, int]:
        asked.append(device)
        return 30 * MB, 80 * MB

    monkeypatch.setattr("torch.cuda.mem_get_info", mem_get_info)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 7 * MB)
    found = MemoryMeter("cuda:0", whole_device=whole_device).read()
    assert (found.gpu_bytes, found.device_bytes) == (7 * MB, 50 * MB if whole_device else 0)
    assert asked == ["cuda:0"] * whole_device


@pytest.mark.gpu
def test_measuring_the_memory_of_a_gpu_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(memory, "EVERY_S", 0.0)
    monkeypatch.setattr(memory, "REST", 0)
    held, meter, done = (
        torch.zeros(64 * MB, dtype=torch.uint8, device="cuda:0"),
        MemoryMeter("cuda:0"),
        torch.cuda.Event(),
    )
    torch.cuda._sleep(1)  # loads the kernel, which may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: about 2 s
    done.record()
    found = meter.read()
    assert not done.query(), "the kernel that started earlier still runs"
    torch.cuda.synchronize()
    assert held.numel() <= found.gpu_bytes <= found.device_bytes


def test_the_memory_of_a_machine_counts_its_swap_and_the_limit_of_its_container(tmp_path: Path) -> None:
    meminfo, groups, own = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own"
    groups.mkdir()
    assert total_bytes(meminfo, groups, own) is None
    meminfo.write_text("MemTotal:   1000 kB\nMemFree:  10 kB\nSwapTotal:   24 kB\n")
    assert total_bytes(meminfo, groups, own) == 1024 * 1024
    (groups / "memory.max").write_text("max\n")
    assert total_bytes(meminfo, groups, own) == 1024 * 1024
    (groups / "memory.max").write_text("5000\n")
    assert total_bytes(meminfo, groups, own) == 5000


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [
        ("0::/slurm/job_7/step_0\n", "", "memory.max"),
        ("4:memory:/slurm/job_7/step_0\n", "memory", "memory.limit_in_bytes"),
    ],
    ids=["version 2", "version 1"],
)
@pytest.mark.parametrize("level", ["slurm", "slurm/job_7/step_0"])
def test_the_limits_of_all_control_groups_above_a_process_count(
    level: str, line: str, folder: str, name: str, tmp_path: Path
) -> None:
    meminfo, groups, own = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own"
    meminfo.write_text("MemTotal:   1000 kB\n")
    own.write_text("1:cpu:/slurm\n" + line)
    limited, other = groups / folder / level, groups / folder / "another"
    for path, limit in ((limited, 7000), (other, 5)):
        path.mkdir(parents=True)
        (path / name).write_text(f"{limit}\n")
    assert total_bytes(meminfo, groups, own) == 7000


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes."), True),
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_an_error_of_missing_memory_is_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
