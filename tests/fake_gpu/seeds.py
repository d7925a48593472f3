"""A plugin of pytest that runs each test in `--seeds` different orders of the streams' work. See README.md."""

from __future__ import annotations

import pytest

from tests.fake_gpu import streams


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --seeds."""
    parser.addoption("--seeds", type=int, default=1, help="run each test in this many orders of the streams")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let each test run once for each seed."""
    metafunc.parametrize("stream_order", range(int(metafunc.config.getoption("--seeds") or 1)), indirect=True)


@pytest.fixture(autouse=True)
def stream_order(request: pytest.FixtureRequest) -> None:
    """Draw the order of the streams' work from the test's seed."""
    assert streams.deferred(), "expected FAKE_GPU_STREAM_SEED, which makes queues of the streams; set it to any number"
    streams.reseed(request.param)
