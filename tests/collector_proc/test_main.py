"""The start of the simulator, and the exit code of a collector that ends with an error."""

from __future__ import annotations

import argparse
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


ANY_ERROR = [SettingError("x"), SimulatorError("x"), HandoverError("x"), KeyError("x"), MemoryError(), SystemExit(0)]


@pytest.mark.parametrize("error", ANY_ERROR)
@pytest.mark.parametrize("simulator_started", [False, True])
def test_any_error_before_the_first_chunk_of_a_run_refuses_the_run(error, simulator_started):
    code = exit_code(error, simulator_started=simulator_started, is_first_chunk=True)
    assert code == ExitCode.REFUSED


@pytest.mark.parametrize("is_first_chunk", [False, True])
def test_an_error_of_the_connection_may_be_the_fault_of_the_learner(is_first_chunk):
    assert exit_code(TransportError("x"), simulator_started=True, is_first_chunk=is_first_chunk) == ExitCode.FAILED


@pytest.mark.parametrize("error", ANY_ERROR)
def test_if_a_later_collector_cannot_start_another_one_may_try(error):
    assert exit_code(error, simulator_started=False, is_first_chunk=False) == ExitCode.FAILED


@pytest.mark.parametrize("error", ANY_ERROR)
def test_after_the_first_chunk_only_a_wrong_setting_refuses_the_run(error):
    expected = ExitCode.REFUSED if isinstance(error, SettingError) else ExitCode.FAILED
    assert exit_code(error, simulator_started=True, is_first_chunk=False) == expected


@pytest.mark.parametrize(
    ("error", "incarnation", "code"),
    [
        (ZeroDivisionError("the mass is 0"), 0, ExitCode.REFUSED),
        (SystemExit(0), 0, ExitCode.REFUSED),
        (ZeroDivisionError("the mass is 0"), 1, ExitCode.FAILED),
        (SystemExit(0), 1, ExitCode.FAILED),
    ],
)
def test_anything_that_a_simulator_raises_ends_the_collector_with_the_reason(
    error, incarnation, code, monkeypatch, capsys, stop
):
    def build(*arguments, **options):
        raise error

    monkeypatch.setattr(collector, "build_simulator", build)
    monkeypatch.setattr(collector, "die_first_when_memory_ends", lambda: None)
    progress = FakeProgress()
    arguments = argparse.Namespace(incarnation=incarnation, device="cpu")
    assert collector.run_collector(fake_process(Settings(), progress, stop), arguments) == code
    assert progress.reason.startswith(f"{type(error).__name__}: {error} (") and "in build)" in progress.reason
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_the_users_code_is_reported_with_its_kind_and_its_line():
    with pytest.raises(KeyError) as raised:
        {}["speed"]
    text = collector.describe_error(raised.value)
    assert (
        text.startswith("KeyError: 'speed' (")
        and "test_main.py:" in text
        and text.endswith(", in test_an_error_of_the_users_code_is_reported_with_its_kind_and_its_line)")
    )
