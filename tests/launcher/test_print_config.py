"""--print-config shows the settings that a run would have, and starts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import launch
from shared.compose import compose, load_settings

NOTHING = {"learner": ("false",), "collector": ("false",)}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert launch.main(["--print-config", *arguments], commands=NOTHING) == 0
    return capsys.readouterr().out


def test_what_is_printed_can_be_used_as_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed(capsys, "--config", "quickstart", "env.seed=7")
    assert not list(tmp_path.iterdir())
    (tmp_path / "printed.yaml").write_text(text)
    assert compose("./printed.yaml") == compose("quickstart", ["env.seed=7"])
    assert _printed(capsys, "--config", "printed.yaml") == text


def test_the_settings_of_a_run_that_would_be_resumed_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(_printed(capsys, "--config", "quickstart", "env.seed=7"))
    (tmp_path / "again.yaml").write_text(_printed(capsys, "--resume", str(tmp_path), "env.frame_skip=3"))
    settings = load_settings(tmp_path / "again.yaml")
    assert (settings.env.seed, settings.env.frame_skip) == (7, 3)


def test_wrong_settings_are_refused_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--print-config", "env.sed=7"], commands=NOTHING) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "env.seed" in captured.err
