"""The start of the simulator, and the exit code of a collector that ends with an error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from collector_proc import __main__ as collector
from collector_proc.__main__ import exit_code, start_simulator
from shared.config import Settings
from shared.errors import HandoverError, SettingError, SimulatorError, TransportError
from shared.lifetime import ExitCode, StopFlag, StopRequested, install_stop_flag
from tests.fakes.fake_process import FakeProgress, fake_process


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    flag = install_stop_flag()
    yield flag
    flag.restore()


@pytest.mark.parametrize("wraps", [False, True])
def test_a_request_to_stop_interrupts_the_start_of_the_simulator(monkeypatch, stop, wraps):
    """Backends turn every exception of a simulator's library into a SimulatorError."""
    steps = []

    def build(*arguments, **options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("the start continues")
        except Exception as error:
            if wraps:
                raise SimulatorError("it does not start") from error
            raise

    monkeypatch.setattr(collector, "build_simulator", build)
    with pytest.raises(StopRequested):
        start_simulator(fake_process(Settings(), FakeProgress(), stop), seed=0, device="cpu")
    assert not steps


def test_a_simulator_that_fails_without_a_request_to_stop_raises_its_own_error(monkeypatch, stop):
    def build(*arguments, **options):
        raise SimulatorError("it does not start")

    monkeypatch.setattr(collector, "build_simulator", build)
    with pytest.raises(SimulatorError, match="it does not start"):
        start_simulator(fake_process(Settings(), FakeProgress(), stop), seed=0, device="cpu")


def test_after_the_start_signals_set_the_flag_although_the_simulator_replaced_the_handlers(monkeypatch, stop):
    monkeypatch.setattr(collector, "build_simulator", lambda *_, **__: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    start_simulator(fake_process(Settings(), FakeProgress(), stop), seed=0, device="cpu")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


@pytest.mark.parametrize("error", [SettingError("x"), SimulatorError("x")])
def test_if_the_simulator_fails_at_the_first_start_of_a_run_the_run_is_refused(error):
    assert exit_code(error, simulator_started=False, incarnation=0) == ExitCode.REFUSED


@pytest.mark.parametrize("error", [SettingError("x"), SimulatorError("x")])
def test_if_it_fails_at_a_later_start_another_collector_may_try(error):
    assert exit_code(error, simulator_started=False, incarnation=1) == ExitCode.FAILED


@pytest.mark.parametrize("incarnation", [0, 1])
def test_after_the_simulator_has_started_only_a_wrong_setting_refuses_the_run(incarnation):
    assert exit_code(SettingError("x"), simulator_started=True, incarnation=incarnation) == ExitCode.REFUSED
    for error in (SimulatorError("x"), TransportError("x")):
        assert exit_code(error, simulator_started=True, incarnation=incarnation) == ExitCode.FAILED


@pytest.mark.parametrize(("incarnation", "code"), [(0, ExitCode.REFUSED), (1, ExitCode.FAILED)])
def test_a_replay_that_cannot_be_shared_refuses_the_run_at_the_first_start(incarnation, code):
    assert exit_code(HandoverError("x"), simulator_started=True, incarnation=incarnation) == code
