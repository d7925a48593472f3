"""The report of a run: what it needs, and which rows and numbers it shows."""

from __future__ import annotations

import pytest

from learner_proc.run_report import PANELS, write_report
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
