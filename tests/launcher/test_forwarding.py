"""Rows leave metrics.jsonl whole, once and in order; summary.json keeps every promise."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from launcher.forwarding import (
    SUMMARY_KEYS,
    MetricsTail,
    TensorBoardForwarder,
    check_logger,
    last_row,
    open_forwarder,
    scalars,
    summarize,
)
from shared.config import Settings
from shared.errors import SettingError
from shared.logs import configure
from shared.run_folder import RunFolder


@pytest.fixture
def tail(tmp_path: Path) -> MetricsTail:
    (tmp_path / "logs").mkdir()
    return MetricsTail(tmp_path / "metrics.jsonl", configure(tmp_path, "launch"))


def _append(path: Path, text: str) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_only_whole_new_rows_are_read(tail: MetricsTail, tmp_path: Path) -> None:
    assert tail.new_rows() == []
    _append(tmp_path, '{"n": 1}\n{"n": 2}\n{"n"')
    assert tail.new_rows() == [{"n": 1}, {"n": 2}]
    assert tail.new_rows() == []
    _append(tmp_path, ": 3}\n")
    assert tail.new_rows() == [{"n": 3}]


def test_a_resumed_runs_older_rows_are_not_forwarded_again(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    _append(tmp_path, '{"n": 1}\n')
    tail = MetricsTail(tmp_path / "metrics.jsonl", configure(tmp_path, "launch"))
    _append(tmp_path, '{"n": 2}\n')
    assert tail.new_rows() == [{"n": 2}]


def test_a_line_that_is_no_row_is_left_out_and_said(
    tail: MetricsTail, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _append(tmp_path, '{"n": 1}\nrubbish\n[3]\n{"n": 4}\n')
    assert tail.new_rows() == [{"n": 1}, {"n": 4}]
    assert "left out rows=2" in capsys.readouterr().err


def test_the_last_row_is_the_last_whole_one(tmp_path: Path) -> None:
    assert last_row(tmp_path / "metrics.jsonl") == {}
    _append(tmp_path, '{"n": 1}\n{"n": 2}\n{"n": 3')
    assert last_row(tmp_path / "metrics.jsonl") == {"n": 2}


def test_a_summary_has_every_promised_key_and_null_where_nothing_is_known() -> None:
    empty = summarize({}, {"exit_reason": "learner died", "launch_s": 2.0})
    assert set(empty) == {*SUMMARY_KEYS, "launch_s"}
    assert {key for key, value in empty.items() if value is not None} == {"exit_reason", "wall_s", "launch_s"}
    full = summarize({"time": 1.0, "wall_s": 9.0, "loss_model": 3.5, "kl": float("nan")}, {"launch_s": 2.0})
    assert (full["wall_s"], full["loss_model"], full["kl"], "time" in full) == (9.0, 3.5, None, False)
    assert json.loads(json.dumps(full, allow_nan=False)) == full


def test_only_finite_or_not_numbers_are_scalars() -> None:
    row = {"time": 5.0, "gradient_steps": 40, "loss": 1, "transport": "memfd", "none": None, "flag": True}
    assert scalars(row) == {"loss": 1.0}


def test_tensorboard_gets_every_number_at_its_step_and_time(tmp_path: Path) -> None:
    forwarder = TensorBoardForwarder(tmp_path)
    forwarder.add({"time": 1_700_000_000.5, "gradient_steps": 40, "loss_model": 3.5, "transport": "memfd"})
    forwarder.add({"time": 1_700_000_001.5, "gradient_steps": 60, "loss_model": 2.25})
    forwarder.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    found = [(e.step, e.wall_time, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value]
    assert found == [(40, 1_700_000_000.5, "loss_model", 3.5), (60, 1_700_000_001.5, "loss_model", 2.25)]


class _FakeWandb(types.ModuleType):
    """Keeps what it was told; `failure` is raised by init."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("wandb")
        self.told: list[Any] = []
        self._failure = failure

    def init(self, **options: Any) -> _FakeWandb:
        if self._failure:
            raise self._failure
        self.told.append(options)
        return self

    def log(self, row: dict, *, step: int) -> None:
        self.told.append((step, row))

    def finish(self) -> None:
        self.told.append("finished")


def _wandb_settings() -> Settings:
    settings = Settings()
    settings.logger.backend, settings.logger.mode, settings.logger.project = "wandb", "offline", "legs"
    return settings


def test_wandb_gets_rows_in_a_run_named_after_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    forwarder = open_forwarder(_wandb_settings(), RunFolder(tmp_path / "run7"))
    forwarder.add({"time": 1.0, "gradient_steps": 40, "loss_model": 3.5})
    forwarder.close()
    options, row, last = wandb.told
    assert (options["project"], options["mode"], options["id"], options["name"]) == ("legs", "offline", "run7", "run7")
    assert options["dir"] == str(tmp_path / "run7") and options["config"]["env"]["name"] == "cheetah"
    assert (row, last) == ((40, {"loss_model": 3.5}), "finished")


def test_a_wandb_that_cannot_start_is_a_setting_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", _FakeWandb(RuntimeError("no API key")))
    with pytest.raises(SettingError, match=r"no API key.*logger\.mode=offline"):
        open_forwarder(_wandb_settings(), RunFolder(tmp_path))


def test_a_missing_wandb_is_noticed_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"wandb is not installed.*\.\[wandb\]"):
        check_logger(_wandb_settings())
    check_logger(Settings())
