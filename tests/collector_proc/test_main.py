"""The exit code of a collector that ends with an error."""

from __future__ import annotations

import pytest

from collector_proc.__main__ import exit_code
from shared.errors import HandoverError, SettingError, SimulatorError, TransportError
from shared.lifetime import ExitCode


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
