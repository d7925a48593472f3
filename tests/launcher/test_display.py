"""The user sees how far, how fast and how well a run goes, and the phase of each process that has no status yet."""

from __future__ import annotations

import errno
import io
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from launcher.display import Display, collector_line, duration, learner_line
from shared.metrics import CollectorStatus, LearnerStatus
from shared.progress import Snapshot

LEARNER = LearnerStatus(
    gradient_steps=12_000,
    agent_steps=204_800,
    total_optim_steps=100_000,
    updates_per_s=0.1,
    replay_ratio=498.7,
    replay_ratio_target=500.0,
    policy_lag_mean=1.25,
    episode_return_mean=61.5,
    eval_return_mean=77.25,
)
COLLECTOR = CollectorStatus(agent_steps=204_800, fps=1234.5, policy_version=7, weights_refused=0, rss_gb=1.5)
ROW = {"updates_per_s": 40.0, "loss_model": 12.345, "loss_actor": -3.0, "loss_value": 0.5, "gradient_steps": 11_900}


def _snapshot(phase: str, since: float, status: LearnerStatus | CollectorStatus | None = None) -> Snapshot:
    numbers = asdict(status) if status is not None else {}
    return Snapshot(phase, 5, changed_at=since, phase_since=since, pid=1, generation=9, status=numbers)


def test_a_process_without_a_status_shows_its_phase_and_how_long_it_lasts() -> None:
    assert learner_line(_snapshot("compiling", 100.0), {}, now=112.0) == "learner    compiling 12 s"
    assert (
        collector_line(_snapshot("simulator", 100.0), None, now=165.4, restarts=0) == "collector  simulator 1 min 05 s"
    )
    assert learner_line(_snapshot("starting", 1.0), {}, now=1.0) == "learner    starting 0 s"


def test_the_learners_line_has_steps_pace_ratio_losses_and_the_time_left() -> None:
    assert learner_line(_snapshot("training", 0.0, LEARNER), ROW, now=60.0) == (
        "learner    step 12,000/100,000  40.0 updates/s  ratio 499/500  ETA 36 min 40 s  "
        "loss model 12.3 actor -3 value 0.5"
    )


def test_before_the_first_row_the_pace_is_that_of_the_status_and_there_are_no_losses() -> None:
    line = learner_line(_snapshot("training", 0.0, LEARNER), {}, now=60.0)
    assert "0.1 updates/s" in line and "loss" not in line
    stopped = replace(LEARNER, updates_per_s=0.0)
    assert "ETA" not in learner_line(_snapshot("training", 0.0, stopped), {}, now=60.0)


def test_a_learner_that_does_not_train_shows_its_phase_beside_the_numbers() -> None:
    free = replace(LEARNER, replay_ratio_target=None)
    line = learner_line(_snapshot("saving", 57.0, free), {}, now=60.0)
    assert "ratio 499/free" in line and line.endswith("saving 3 s")


def test_the_collectors_line_has_steps_pace_lag_and_returns() -> None:
    collecting = _snapshot("collecting", 0.0, COLLECTOR)
    assert collector_line(collecting, LEARNER, now=9.0, restarts=0) == (
        "collector  204,800 agent steps  1234 steps/s  lag 1.2  return 61.5  eval 77.2"
    )
    assert collector_line(collecting, None, now=9.0, restarts=0).endswith("1234 steps/s")


def test_restarts_and_unusable_weights_are_shown_once_there_are_any() -> None:
    refused = _snapshot("collecting", 0.0, replace(COLLECTOR, weights_refused=3))
    line = collector_line(refused, None, now=9.0, restarts=2)
    assert line.endswith("1234 steps/s  unusable weights 3  restarts 2")


@pytest.mark.parametrize(
    ("ratio", "target", "expected"),
    [
        (8.0, 64.0, "while the learner catches up to the replay ratio"),
        (63.0, 64.0, "waiting for the learner 40 s"),
        (8.0, None, "waiting for the learner 40 s"),
    ],
)
def test_a_waiting_collector_shows_why_it_waits(ratio: float, target: float | None, expected: str) -> None:
    learner = replace(LEARNER, replay_ratio=ratio, replay_ratio_target=target)
    line = collector_line(_snapshot("waiting", 0.0, COLLECTOR), learner, now=40.0, restarts=0)
    assert line.endswith(f"eval 77.2  {expected}")


def test_durations_use_the_two_largest_units() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599, 3600, 90_000)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "25 h 00 min",
    ]


def test_without_a_terminal_a_plain_line_is_printed_only_now_and_then() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=40))
    display.start()
    for _ in range(3):
        display.show(_snapshot("compiling", 0.0), _snapshot("starting", 0.0), {}, restarts=0)
    display.stop()
    assert out.getvalue().count("\n") == 1 and " | collector starting " in out.getvalue()
    assert out.getvalue().startswith("[0 s] learner compiling ") and "\x1b" not in out.getvalue()


def test_a_narrow_terminal_shows_the_whole_line() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=50))
    display.start()
    display.show(
        _snapshot("training", 0.0, LEARNER),
        _snapshot("starting", 0.0),
        {"loss_model": 12.5, "loss_value": 0.25},
        restarts=0,
    )
    display.stop()
    assert "0.25" in out.getvalue()


def test_on_a_terminal_both_lines_are_drawn_in_place() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=60))
    display.start()
    display.show(_snapshot("compiling", 0.0), _snapshot("starting", 0.0), {}, restarts=0)
    display.stop()
    assert "learner    compiling" in out.getvalue() and "collector  starting" in out.getvalue()
    assert "\x1b[" in out.getvalue()


class _DeadOutput(io.StringIO):
    """Raises an error at each write, as a closed terminal, a dead pipe and a full disk do."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self._failure = failure

    def write(self, text: str) -> int:
        raise self._failure


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "closed"), BrokenPipeError(), ValueError("closed file")])
def test_a_display_that_cannot_be_written_to_raises_no_error(
    failure: Exception, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For a broken pipe rich replaces the file of sys.stdout by /dev/null. It must not be pytest's own.
    monkeypatch.setattr(sys, "stdout", (tmp_path / "stdout").open("w"))
    display = Display(Console(file=_DeadOutput(failure), force_terminal=terminal))
    display.print_line("run folder: runs/x")
    display.start()
    display.show(_snapshot("training", 0.0, LEARNER), _snapshot("starting", 0.0), {}, restarts=0)
    display.print_line("stopping")
    display.stop()


def test_a_line_that_stdout_cannot_encode_does_not_end_the_display() -> None:
    raw = io.BytesIO()
    display = Display(Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True)))
    display.print_line("learner> \N{GREEK SMALL LETTER ALPHA}")
    display.print_line("the next line")
    assert b"the next line" in raw.getvalue()
