"""Suggestions for unknown words, and the answers of child processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from collector_proc.simulators.setting_checks import ask_child, unknown
from shared.config import EnvSettings
from shared.errors import SettingError

ENV = EnvSettings(backend="torchrl", name="my_envs:make")
TASKS = [f"task-{letter}" for letter in "abcdefghij"]


@pytest.mark.parametrize(
    ("word", "valid", "expected"),
    [
        ("tack-c", TASKS[:3], "expected one of task-a, task-b, task-c; set env.name=gym:task-c"),
        ("xyz", TASKS[:3], "expected one of task-a, task-b, task-c; set env.name=gym:NAME with one of them"),
        (
            "xyz",
            TASKS,
            f"expected one of 10 names, such as {', '.join(TASKS[:8])}; set env.name=gym:NAME with one of them",
        ),
        ("xyz", [], "nor any other name; expected one that exists; change env.name"),
    ],
)
def test_only_near_words_are_suggested_and_at_most_eight_are_listed(word: str, valid: list[str], expected: str) -> None:
    assert str(unknown("wrong", word, valid, setting="env.name=gym:{}")).endswith(expected)


def test_a_child_answers_with_the_last_line_that_it_prints() -> None:
    assert ask_child(ENV, ("-c", "print('noise'); print('[1, 2]')"), limit_s=60) == [1, 2]


def test_a_child_finds_the_modules_that_this_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ask_child(ENV, ("-c", "import only_here; print(only_here.VALUE)"), limit_s=60) == 7


@pytest.mark.parametrize(
    ("script", "limit_s", "reason"),
    [
        ("raise ValueError('no such thing')", 60, "ValueError: no such thing"),
        ("import os; os._exit(3)", 60, "exit code 3"),
        ("pass", 60, "ended without an answer"),
        ("import time; time.sleep(60)", 0.2, "took more than 0.2 s"),
    ],
)
def test_a_child_that_gives_no_answer_is_a_setting_error(script: str, limit_s: float, reason: str) -> None:
    with pytest.raises(
        SettingError, match=f"env.name=my_envs:make cannot be looked up .*{reason}; expected this; do that"
    ):
        ask_child(ENV, ("-c", script), limit_s=limit_s, expected="this", fix="do that")
