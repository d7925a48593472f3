"""The report of a run: what it needs, and which rows and numbers it shows."""

from __future__ import annotations

import pytest
import torch

from learner_proc import run_report
from learner_proc.run_report import PANELS, main, write_report
from learner_proc.startup import allocate_replay, build_gradient_step
from learner_proc.world_model import VECTOR_FREE_NATS
from shared.compose import save_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.geometry import Geometry
from shared.metrics import METRICS
from tests.fakes.scripted_collector import SPEC


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


@pytest.mark.parametrize(("setting", "drawn"), [(None, VECTOR_FREE_NATS), (0.5, 0.5)])
def test_the_curve_of_the_kl_shows_the_free_nats_that_the_model_uses(process, monkeypatch, setting, drawn):
    """If the setting is null, the model chooses the free nats by the kind of its observations."""
    axes = pytest.importorskip("matplotlib.axes")
    process.settings.optimization.free_nats = setting
    device, lines = torch.device("cpu"), []
    replay, _ = allocate_replay(SPEC, process.settings, Geometry.of(process.settings), device=device)
    for _ in range(4):
        replay.commit(replay.grant())
    step = build_gradient_step(SPEC, process.settings, device=device)
    monkeypatch.setattr(run_report, "open_run", lambda _: (process.settings, step, replay))
    draw = axes.Axes.axhline

    def axhline(self, y, **options):
        lines.append((options.get("label"), y))
        return draw(self, y, **options)

    monkeypatch.setattr(axes.Axes, "axhline", axhline)
    (process.run_dir / "metrics.jsonl").write_text('{"gradient_steps": 5, "loss_model": 2.0, "kl": 1.5}\n')
    write_report(process.run_dir)
    assert [y for label, y in lines if label == "free nats"] == [drawn]
