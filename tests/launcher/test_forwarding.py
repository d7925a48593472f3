"""Every complete row of metrics.jsonl is forwarded once, in order; summary.json has every key that it should have."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from structlog.typing import FilteringBoundLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from launcher.forwarding import (
    SUMMARY_KEYS,
    FallibleForwarder,
    MetricsTail,
    NoForwarder,
    RowRelay,
    TensorBoardForwarder,
    check_logger,
    last_row,
    open_forwarder,
    scalars,
    summarize,
    wandb_id,
    warning_texts,
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


def test_only_complete_new_rows_are_read(tail: MetricsTail, tmp_path: Path) -> None:
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


def test_a_line_that_is_not_a_row_is_left_out_with_a_warning(
    tail: MetricsTail, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _append(tmp_path, '{"n": 1}\nrubbish\n[3]\n{"n": 4}\n')
    assert tail.new_rows() == [{"n": 1}, {"n": 4}]
    assert "left out lines=2" in capsys.readouterr().err


def test_the_last_row_is_the_last_complete_one(tmp_path: Path) -> None:
    assert last_row(tmp_path / "metrics.jsonl") == {}
    _append(tmp_path, '{"n": 1}\n{"n": 2}\n{"n": 3')
    assert last_row(tmp_path / "metrics.jsonl") == {"n": 2}


def test_a_summary_has_every_key_and_null_for_what_is_not_known() -> None:
    empty = summarize({}, {"exit_reason": "learner died", "launch_s": 2.0})
    assert set(empty) == {*SUMMARY_KEYS, "launch_s"}
    assert {key for key, value in empty.items() if value is not None} == {"exit_reason", "wall_s", "launch_s"}
    full = summarize({"time": 1.0, "wall_s": 9.0, "loss_model": 3.5, "kl": float("nan")}, {"launch_s": 2.0})
    assert (full["wall_s"], full["loss_model"], full["kl"], "time" in full) == (9.0, 3.5, None, False)
    assert json.loads(json.dumps(full, allow_nan=False)) == full


def test_the_paces_of_a_summary_are_means_over_the_launch() -> None:
    row = {"collect_fps": 50.0, "collect_fps_mean": 40.0, "updates_per_s": 9.0, "updates_per_s_mean": 8.0}
    summary = summarize(row, {})
    assert (summary["collect_fps"], summary["updates_per_s"]) == (40.0, 8.0)
    assert summarize({"collect_fps": 50.0}, {})["collect_fps"] == 50.0, "a row of an older version has no mean"


def test_scalars_are_finite_numbers_of_declared_metrics_under_their_tags() -> None:
    row = {"time": 5.0, "gradient_steps": 40, "kl": 1, "transport": "memfd", "value_mean": None, "unknown": 2.0}
    assert scalars(row | {"loss_actor": float("nan")}) == {"model/kl": 1.0}


def test_tensorboard_gets_every_number_at_the_step_and_time_of_its_row(tmp_path: Path) -> None:
    forwarder = TensorBoardForwarder(tmp_path)
    forwarder.add({"time": 1_700_000_000.5, "gradient_steps": 40, "loss_model": 3.5, "transport": "memfd"})
    forwarder.add({"time": 1_700_000_001.5, "gradient_steps": 60, "loss_model": 2.25})
    forwarder.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    found = [(e.step, e.wall_time, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value]
    assert found == [(40, 1_700_000_000.5, "loss/model", 3.5), (60, 1_700_000_001.5, "loss/model", 2.25)]


class _FakeWandb(types.ModuleType):
    """Keeps every call; init raises `failure`."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []
        self._failure = failure

    def init(self, **options: Any) -> _FakeWandb:
        if self._failure:
            raise self._failure
        self.calls.append(options)
        return self

    def log(self, row: dict, *, step: int) -> None:
        self.calls.append((step, row))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.mark.parametrize("within_one_launch", [True, False])
def test_tensorboard_shows_no_step_twice_after_a_resume_from_an_older_checkpoint(
    within_one_launch: bool, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.tensorboard.mkdir()
    forwarder = open_forwarder(Settings(), folder)

    def forward(*rows: tuple[int, float]) -> None:
        for step, loss in rows:
            row = {"gradient_steps": step, "loss_model": loss, "time": 1.7e9 + loss}
            forwarder.add(row)
            with folder.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    forward((100, 1.0), (200, 2.0), (300, 3.0), (350, 3.5))
    if not within_one_launch:
        forwarder.close()
        forwarder = open_forwarder(Settings(), folder)
    folder.metrics.write_text("")  # the learner deletes the rows that the resume undid
    forward((200, 20.0), (300, 30.0), (400, 40.0))
    forwarder.close()
    shown = EventAccumulator(str(folder.tensorboard)).Reload().Scalars("loss/model")
    assert [(event.step, event.value) for event in shown] == [(100, 1.0), (200, 20.0), (300, 30.0), (400, 40.0)]


def _wandb_settings() -> Settings:
    settings = Settings()
    settings.logger.backend, settings.logger.mode, settings.logger.project = "wandb", "offline", "legs"
    return settings


def test_wandb_gets_rows_in_a_run_named_after_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run7").mkdir()
    forwarder = open_forwarder(_wandb_settings(), RunFolder(tmp_path / "run7"))
    forwarder.add({"time": 1.0, "gradient_steps": 40, "loss_model": 3.5})
    forwarder.close()
    options, row, last = wandb.calls
    assert (options["project"], options["mode"], options["name"]) == ("legs", "offline", "run7")
    assert options["dir"] == str(tmp_path / "run7") and options["config"]["env"]["name"] == "cheetah"
    assert (row, last) == ((40, {"loss/model": 3.5}), "finished")


def test_runs_in_folders_of_one_name_are_two_runs_in_wandb_and_a_resume_continues_its_own(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name / "seed0") for name in ("expA", "expB", "older")]
    for folder in folders:
        folder.path.mkdir(parents=True)
    folders[2].metrics.write_text('{"gradient_steps": 5}\n')
    ids = [wandb_id(folder) for folder in folders]
    assert len(set(ids)) == 3 and ids[2] == "seed0", "a run of an older version keeps its id"
    folders[0].metrics.write_text('{"gradient_steps": 5}\n')
    assert [wandb_id(folder) for folder in folders] == ids


def test_a_wandb_that_cannot_start_is_a_setting_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", _FakeWandb(RuntimeError("no API key")))
    with pytest.raises(SettingError, match=r"no API key.*logger\.mode=offline"):
        open_forwarder(_wandb_settings(), RunFolder(tmp_path))


def test_a_missing_wandb_is_a_setting_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"wandb is not installed.*pip install wandb"):
        check_logger(_wandb_settings())
    check_logger(Settings())


class _Keeper(NoForwarder):
    """Keeps the rows that it gets."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def add(self, row: Any) -> None:
        self.rows.append(row)


class _Broken(_Keeper):
    """Raises an error after it has taken a row."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self._failure = failure

    def add(self, row: Any) -> None:
        super().add(row)
        raise self._failure

    def close(self) -> None:
        raise self._failure


@pytest.fixture
def log(tmp_path: Path) -> FilteringBoundLogger:
    (tmp_path / "logs").mkdir()
    return configure(tmp_path, "launch")


def test_a_relay_passes_on_each_new_row_once_and_keeps_the_newest(log: FilteringBoundLogger, tmp_path: Path) -> None:
    _append(tmp_path, '{"n": 1}\n')
    forwarder = _Keeper()
    relay = RowRelay(tmp_path / "metrics.jsonl", forwarder, log)
    assert (relay.newest, relay.forward(), relay.num_rows) == ({"n": 1}, [], 0)
    _append(tmp_path, '{"n": 2}\n{"n": 3}\n')
    assert relay.forward() == forwarder.rows == [{"n": 2}, {"n": 3}]
    assert (relay.newest, relay.num_rows) == ({"n": 3}, 2)


def test_a_backend_that_fails_is_reported_once_and_gets_no_more_rows(
    log: FilteringBoundLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = _Broken(RuntimeError("the service is gone"))
    forwarder = FallibleForwarder(backend, "wandb", log)
    relay = RowRelay(tmp_path / "metrics.jsonl", forwarder, log)
    _append(tmp_path, '{"n": 1}\n{"n": 2}\n')
    assert len(relay.forward()) == relay.num_rows == 2
    forwarder.close()
    assert backend.rows == [{"n": 1}]
    shown = capsys.readouterr().err
    assert shown.count("rows can no longer be sent to wandb; they stay in metrics.jsonl") == 1
    assert "the service is gone" in shown


@pytest.mark.parametrize("failure", [RuntimeError("no network"), KeyboardInterrupt()])
def test_an_error_or_ctrl_c_while_the_last_rows_are_sent_does_not_change_the_end_of_the_run(
    failure: BaseException, log: FilteringBoundLogger
) -> None:
    FallibleForwarder(_Broken(failure), "wandb", log).close()


def test_the_summary_has_each_warning_of_the_learner_once(tmp_path: Path) -> None:
    path = tmp_path / "learner.warnings.jsonl"
    assert warning_texts(path) == []
    lines = [json.dumps({"cause": "c", "text": text}) for text in ("first", "second", "first")]
    path.write_text("\n".join(lines) + '\n{"text": "to')
    assert warning_texts(path) == ["first", "second"]
