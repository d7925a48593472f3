"""The lines a user sees say how far, how fast and how well, and the phase while there is nothing else to say."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from launcher.display import Display, collector_line, duration, learner_line
from shared.progress import Snapshot


def _snapshot(phase: str, since: float, **status: Any) -> Snapshot:
    return Snapshot(phase, 5, changed_at=since, phase_since=since, pid=1, generation=9, status=status)


def test_a_phase_is_shown_with_its_age_until_there_are_numbers() -> None:
    assert learner_line(_snapshot("compiling", 100.0), {}, now=112.0) == "learner    compiling 12 s"
    assert collector_line(_snapshot("simulator", 100.0), {}, now=165.4, restarts=0) == "collector  simulator 1 min 05 s"
    assert learner_line(None, {}, now=1.0) == "learner    starting"


def test_the_learners_line_has_steps_pace_ratio_losses_and_the_time_left() -> None:
    status = {
        "gradient_steps": 12_000,
        "total_optim_steps": 100_000,
        "updates_per_s": 0.1,  # of the moment since the last row; the row's whole window counts
        "replay_ratio": 498.7,
        "replay_ratio_target": 500.0,
    }
    row = {"updates_per_s": 40.0, "loss_model": 12.345, "loss_actor": -3.0, "loss_value": 0.5, "gradient_steps": 11_900}
    assert learner_line(_snapshot("training", 0.0, **status), row, now=60.0) == (
        "learner    step 12,000/100,000  40.0 updates/s  ratio 499/500  ETA 36 min 40 s  loss model 12.3 actor -3 value 0.5"
    )
    free = {**status, "replay_ratio_target": None}
    line = learner_line(_snapshot("saving", 57.0, **free), {}, now=60.0)
    assert "ratio 499/free" in line and line.endswith("saving 3 s")


def test_the_collectors_line_has_steps_pace_lag_returns_and_restarts() -> None:
    seen = _snapshot("collecting", 0.0, agent_steps=204_800, fps=1234.5, return_mean=None)
    learner = {"policy_lag_mean": 1.25, "episode_return_mean": 61.5, "eval_return_mean": 77.25}
    assert collector_line(seen, learner, now=9.0, restarts=0) == (
        "collector  204,800 agent steps  1234 steps/s  lag 1.2  return 61.5  eval 77.2"
    )
    assert collector_line(seen, {}, now=9.0, restarts=2).endswith("1234 steps/s  restarts 2")


def test_a_collector_that_waits_says_why_while_the_learner_catches_up() -> None:
    seen = _snapshot("waiting", 0.0, agent_steps=1584)
    line = collector_line(seen, {"replay_ratio": 8.0, "replay_ratio_target": 64.0}, now=40.0, restarts=0)
    assert line.endswith("1,584 agent steps  while the learner catches up to the replay ratio")
    for learner in ({"replay_ratio": 63.0, "replay_ratio_target": 64.0}, {"replay_ratio_target": None}):
        assert collector_line(seen, learner, now=40.0, restarts=0).endswith("waiting for the learner 40 s")


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599, 3600, 90_000)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "25 h 00 min",
    ]


def test_away_from_a_terminal_lines_are_plain_and_rare() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=40))
    display.start()
    for _ in range(3):
        display.show(_snapshot("compiling", 0.0), None, {}, restarts=0)
    display.stop()
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[0 s] learner compiling ") and lines[0].endswith(" | collector starting")


def test_a_narrow_terminal_shows_the_whole_line() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=50))
    display.start()
    status = {"gradient_steps": 1200, "total_optim_steps": 3000, "loss_model": 12.5, "loss_value": 0.25}
    display.show(_snapshot("training", 0.0, **status), None, {}, restarts=0)
    display.stop()
    assert "0.25" in out.getvalue()


def test_on_a_terminal_both_lines_are_drawn_in_place() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=60))
    display.start()
    display.show(_snapshot("compiling", 0.0), None, {}, restarts=0)
    display.stop()
    assert "learner    compiling" in out.getvalue() and "collector  starting" in out.getvalue()
    assert "\x1b[" in out.getvalue()
