"""The example in the help of every command works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from launcher.commands.table import COMMANDS

REPO = Path(__file__).resolve().parents[3]
ALONE = ("probe",)  # it must run before torch is imported


def _example(word: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit):
        launch.main([word, "--help"])
    found = re.search(r"^example:\n  python launch\.py (.*)", capsys.readouterr().out, re.MULTILINE)
    assert found is not None, f"the help of {word} has no example"
    return shlex.split(found[1])


@pytest.mark.parametrize("word", COMMANDS)
def test_the_example_of_a_command_works(
    word: str, run_dir: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if word == "export":
        request.getfixturevalue("export_packages")
    if word == "play":
        pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not installed")
    arguments = _example(word, capsys)
    assert arguments[0] == word
    assert run_dir.samefile("runs/NAME"), "an example names this run"
    if word in ALONE:
        environ = {**os.environ, "PYTHONPATH": str(REPO)}
        command = [sys.executable, str(REPO / "launch.py"), *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert launch.main(arguments) == 0, capsys.readouterr().err
