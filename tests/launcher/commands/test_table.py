"""The first word of the command line chooses a command, and no other command line changes its meaning."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from launcher.commands.table import COMMANDS, find_command

REPO = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], ["env.seed=3"], ["--config", "settings"], ["+env.wind=1"], ["~env.name"], ["env.name"]],
    ids=" ".join,
)
def test_a_command_line_whose_first_word_is_no_command_trains(argv: list[str]) -> None:
    assert find_command(argv) is None


@pytest.mark.parametrize(
    ("word", "fix"),
    [("setings", "; write settings\n"), ("prob", "; write probe\n"), ("train", "; to train, leave it out, and give")],
)
def test_an_unknown_command_is_refused_with_the_nearest_one(
    word: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main([word, "env.seed=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {word!r} is neither a command nor a setting; expected one of") and fix in error


def test_the_help_of_training_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    text = capsys.readouterr().out
    for word, command in COMMANDS.items():
        assert f"  {word}" in text and command.description in text


@pytest.mark.parametrize("word", COMMANDS)
def test_the_help_of_a_command_shows_an_example(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.main([word, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  python launch.py {word}" in capsys.readouterr().out


def test_choosing_a_command_imports_no_other_one() -> None:
    names = [command.module for command in COMMANDS.values()]
    script = (
        "import sys, launch\n"
        "assert launch.main(['settings', 'env.seed']) == 0\n"
        f"print(*(name for name in {names!r} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "launcher.commands.settings"


def test_every_command_has_a_module_with_a_main() -> None:
    for command in COMMANDS.values():
        assert callable(importlib.import_module(command.module).main)
