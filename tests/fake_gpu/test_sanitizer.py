"""torch's stream sanitizer finds no unordered access in a tick of the collector and in a step of the learner."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_gpu.commands import need_cuda_build, run

need_cuda_build()
pytestmark = pytest.mark.fake_gpu

RACE = """
import pytest, torch

@pytest.mark.gpu
@pytest.mark.parametrize("waits", [True, False])
def test_two_streams_write_one_tensor(waits):
    a, stream = torch.rand(1000, device="cuda"), torch.cuda.Stream()
    if waits:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.mul(a, 5, out=a)
"""
SANITIZED = ("-m", "pytest", "-q", "-n0", "-m", "gpu", "-p", "tests.fake_gpu.sanitizer")


def test_the_sanitizer_finds_a_wait_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "test_race.py").write_text(RACE)
    code, output = run(*SANITIZED, str(tmp_path / "test_race.py"), switches={})
    assert code == 1 and "1 failed, 1 passed" in output and "CUDASanitizerErrors" in output, output


def test_the_sanitizer_finds_nothing_in_a_tick_and_in_a_step() -> None:
    tests = [
        "tests/collector_proc/test_copies.py::test_on_a_gpu_no_tick_waits_for_the_device",
        "tests/collector_proc/test_weights_receiver.py",
        "tests/learner_proc/test_learn.py",
        "tests/learner_proc/test_publisher.py",
    ]
    code, output = run(*SANITIZED, *tests, switches={})
    assert code == 0 and " passed" in output and " skipped" not in output, output
