"""The report of a run: what it needs, and which rows and numbers it shows."""

from __future__ import annotations

import pytest

from learner_proc.run_report import PANELS, main, write_report
from shared.compose import save_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.metrics import METRICS


def test_a_run_without_a_gradient_step_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"has no row of a gradient step; expected .*log_every"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"gradient_steps": 0, "loss_model": null}\n')
    with pytest.raises(SettingError, match="has no row of a gradient step"):
        write_report(tmp_path)


def test_every_curve_is_of_a_declared_metric():
    assert all(METRICS[metric.name] is metric for panel in PANELS.values() for metric in panel)


@pytest.mark.parametrize("problem", ["half a line", "no checkpoint", "a file", "nowhere"])
def test_a_run_that_cannot_be_shown_is_explained_in_one_line(tmp_path, monkeypatch, capsys, problem):
    run = tmp_path / "run"
    if problem == "a file":
        run.write_text("")
    elif problem != "nowhere":
        run.mkdir()
        row = '{"gradient_steps": 5, "loss_model": 2.0}\n'
        (run / "metrics.jsonl").write_bytes(row.encode() + b"\xff\n" + row[:20].encode())
        save_settings(Settings(), run / "config.yaml")
    if problem == "half a line":
        (run / "report").write_text("")  # the report cannot be written
    monkeypatch.setattr("sys.argv", ["run_report", str(run)])
    assert main() == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert ("no whole checkpoint" in shown) == (problem == "no checkpoint")
