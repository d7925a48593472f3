"""Every command that README and docs show either runs here, or carries a mark that names what it needs.

A mark is a comment directly above the block of commands:

    <!-- run: optimization.total_optim_steps=20 -->    each command runs, with these words added
    <!-- run slowly: ... -->                           the same, among the slow tests
    <!-- needs: 2 GPUs -->                             it cannot run here, or would take too long
    <!-- installs packages -->                         .ci/run installs the project itself
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.commands.table import find_command
from launcher.options import parse_options
from shared.compose import compose
from shared.geometry import check_settings
from tests.docs.pages import PAGES, REPO, Block, blocks, inline_code

LIMIT_S = 300.0
PROGRAMS = ("python", "tandem", "mkdocs", "sbatch", "docker", "tensorboard")
INSTALLERS = ("pip install", "apt install", "python3 -m venv")
INLINE = ("python launch.py ", "tandem ")  # how a launch command in the text begins
ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)")
QUICK = ["--config", "quickstart", "optimization.total_optim_steps=20", "optimization.log_every=10"]


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables that a command sets in front, and the command itself."""
    variables: dict[str, str] = {}
    while words and (found := ASSIGNMENT.fullmatch(words[0])):
        variables[found[1]], words = found[2], words[1:]
    return variables, words


def _program(words: list[str]) -> str:
    """Return what a command runs: `launch.py`, the module behind `python -m`, or another program."""
    _, words = _split(words)
    if words[0] != "python":
        return "launch.py" if words[0] == "tandem" else words[0]
    return words[2] if words[1] == "-m" else words[1]


def _trains(words: list[str]) -> bool:
    """Return whether a command starts a run."""
    _, command = _split(words)
    arguments = command[1 if command[0] == "tandem" else 2 :]
    return _program(words) == "launch.py" and find_command(arguments) is None


def _launches() -> list[tuple[str, list[str]]]:
    commands = [(block.place, words) for block in blocks() for words in block.commands]
    found = [(place, _split(words)[1]) for place, words in commands if _program(words) == "launch.py"]
    texts = [(page.name, code) for page in PAGES for code in inline_code(page)]
    return found + [(place, shlex.split(code)) for place, code in texts if code.startswith(INLINE)]


def _to_run(mark: str) -> list[Block]:
    """Return the blocks with this mark; of blocks that are alike, the first."""
    chosen = {block.text + block.detail: block for block in reversed(blocks()) if block.mark == mark}
    return list(reversed(chosen.values()))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, for the commands that look at runs/NAME."""
    folder = tmp_path_factory.mktemp("runs") / "NAME"
    _execute(["python", "launch.py", *QUICK, "--run-dir", str(folder)])
    return folder


def _execute(words: list[str]) -> None:
    variables, words = _split(words)
    command = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]
    environ = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")} | variables
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


def _run_block(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    added = shlex.split(block.detail.replace("TMP", str(tmp_path)))
    for number, words in enumerate(block.commands):
        if "runs/NAME" in words:
            words = [str(request.getfixturevalue("finished_run")) if word == "runs/NAME" else word for word in words]
        words = words + added
        if _trains(words) and not {"--resume", "--run-dir", "--print-config"} & set(words):
            words += ["--run-dir", str(tmp_path / f"run-{number}")]
        _execute(words)


@pytest.mark.parametrize("block", _to_run("run"), ids=lambda block: block.place)
def test_a_command_on_a_page_runs(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _run_block(block, request, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", _to_run("run slowly"), ids=lambda block: block.place)
def test_a_slow_command_on_a_page_runs(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _run_block(block, request, tmp_path)


def test_every_block_of_commands_carries_a_mark() -> None:
    unmarked = [block.place for block in blocks() if block.mark is None]
    assert not unmarked, f"these blocks need a mark, see the top of this file: {unmarked}"
    vague = [block.place for block in blocks() if block.mark == "needs" and not block.detail]
    assert not vague, f"these marks do not say what is needed: {vague}"


def test_a_block_that_installs_does_nothing_else() -> None:
    for block in blocks():
        installs = [any(part in " ".join(words) for part in INSTALLERS) for words in block.commands]
        assert (block.mark == "installs packages") <= all(installs), block.place


def test_every_command_in_the_text_stands_in_a_marked_block_too() -> None:
    shown = {_program(words) for block in blocks() for words in block.commands}
    for page in PAGES:
        for code in inline_code(page):
            words = shlex.split(code) if code.startswith(PROGRAMS) else []
            if len(words) > 1 and not code.startswith(INSTALLERS):
                assert _program(words) in shown, f"{page.name} shows {code!r} in its text and in no marked block"


@pytest.mark.parametrize(("place", "words"), _launches(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_launch_command_has_options_and_settings_that_exist(place: str, words: list[str]) -> None:
    arguments = words[1 if words[0] == "tandem" else 2 :]
    if find_command(arguments) is not None:
        return  # tests/launcher/commands/ runs an example of each command
    options = parse_options(arguments)
    settings = compose(options.config or "dm_control", options.overrides)
    check_settings(settings)


def test_every_module_that_a_command_runs_exists() -> None:
    for block in blocks():
        for words in block.commands:
            _, command = _split(words)
            if command[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(command[2]) is not None, f"{block.place}: no module {command[2]}"
