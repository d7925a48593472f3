"""Every kind of fault in every phase of each process: the run goes on or ends by name, and nothing is left behind.

`python -m pytest -n0 -s -m slow tests/e2e/test_kill_matrix.py` runs all cells and prints the table of docs/runs.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import is_alive, wait_until_gone

REPO = Path(__file__).parents[2]
LAUNCH = """
import sys, launch
from launcher.children import COMMANDS
role = sys.argv[1]
commands = {**COMMANDS, role: (sys.executable, "tests/e2e/faulty.py", *sys.argv[1:5])}
sys.exit(launch.main(sys.argv[5:], commands=commands))
"""
STEPS = 400
SETTINGS = [
    "--config", "quickstart", "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16",
    "replay_buffer.batch_size=64", "replay_buffer.batch_length=8", "optimization.log_every=10", "logger.backend=none",
    "optimization.replay_ratio=16", "collector.init_random_frames=160", "checkpoint.every_s=1",
    f"optimization.total_optim_steps={STEPS}", "deadlines.stop_s=20",
]  # fmt: skip
# A process that is stopped is found after these times. Other faults need no deadline, and this machine may be slow.
SHORT = [f"deadlines.{name}=60" for name in ("start_s", "compile_s", "step_s", "save_s")]
LIMIT_S = 900.0
FAULTS = ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGSTOP", "exception", "exit-0")
COLLECTOR = ("starting", "simulator", "hello", "self-test", "collecting", "sending", "adopting", "stopping")
LEARNER = ("starting", "hello", "compiling", "prefill", "training", "saving", "saved", "stopping")
LAUNCH_FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")  # faults of launch itself
LAUNCH_PLACES = ("starting", "compiling", "training", "saving")  # of the learner


class Cell(NamedTuple):
    """One fault of one process at one place."""

    role: str
    target: str
    fault: str
    place: str

    @property
    def process(self) -> str:
        return self.role if self.target == "self" else "launch"

    @property
    def expected_code(self) -> int:
        """The exit code of the launch in which the fault happens."""
        if self.process == "launch":
            number = signal.Signals[self.fault]
            return -number if self.fault == "SIGKILL" else 128 + number
        # Nothing shows that the task can work at all, so an error before the first chunk is no accident.
        refused = self.process == "collector" and self.fault == "exception" and self.place in COLLECTOR[1:6]
        return 2 if refused else 0


CELLS = [
    *(Cell("collector", "self", fault, place) for place in COLLECTOR for fault in FAULTS),
    *(Cell("learner", "self", fault, place) for place in LEARNER for fault in FAULTS),
    *(Cell("learner", "launch", fault, place) for place in LAUNCH_PLACES for fault in LAUNCH_FAULTS),
]
results: dict[Cell, str] = {}


def run_cell(cell: Cell, folder: Path) -> str:
    """Run a cell and check what must be true of it. Return what happened, for the table."""
    run = folder / "run"
    settings = [*SETTINGS, *SHORT] if cell.fault == "SIGSTOP" else SETTINGS
    command = [sys.executable, "-c", LAUNCH, *cell, "--run-dir", str(run), "--resume", "auto", *settings]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO), "TMPDIR": str(folder)}
    first = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    output = first.stdout + first.stderr
    assert (folder / "struck").exists(), f"there was no fault\n{output}"
    assert first.returncode == cell.expected_code, output
    assert_no_process_is_left(run)
    outcome = "goes on"
    if first.returncode == 2:
        assert "a fault of the test" in summary(run)["exit_reason"]
        return "ends and names the error (exit code 2)"
    if first.returncode != 0:
        saved = any((run / "checkpoints").glob("*/manifest.json"))
        again = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        assert again.returncode == 0, again.stdout + again.stderr
        outcome = f"ends with {cell.fault}; the next launch {'continues' if saved else 'begins'} it"
    found = summary(run)
    assert (found["exit_reason"].partition(";")[0], found["gradient_steps"]) == ("finished", STEPS)
    restarts = found["learner_restarts"] if cell.process == "learner" else found["collector_restarts"]
    if cell.process != "launch":
        assert restarts <= 1
        outcome = "goes on, restarted" if restarts else "goes on"
    assert_no_process_is_left(run)
    assert not list(folder.glob("tandem-*")), "the folder of the sockets is removed"
    return outcome


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def assert_no_process_is_left(run: Path) -> None:
    """Check that every process of the run ends, also those whose parent was killed."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(str(run)) in command and is_alive(int(path.parent.name)):
            wait_until_gone(int(path.parent.name))


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    """Print the results as a table when all cells have run."""
    yield
    for process in dict.fromkeys(cell.process for cell in results):
        cells = [cell for cell in results if cell.process == process]
        faults = sorted({cell.fault for cell in cells}, key=[*FAULTS, *LAUNCH_FAULTS].index)
        lines = [["place", *faults], ["---"] * (1 + len(faults))]
        for place in dict.fromkeys(cell.place for cell in cells):
            by_fault = {cell.fault: results[cell] for cell in cells if cell.place == place}
            lines.append([place, *(by_fault.get(fault, "") for fault in faults)])
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        sys.__stdout__.write(f"\n{process}:\n\n{text}\n")  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_fault_is_survived_or_named(cell: Cell, tmp_path: Path) -> None:
    results[cell] = "FAILED"
    results[cell] = run_cell(cell, tmp_path)


def test_a_learner_that_is_killed_after_its_first_checkpoint_is_replaced_from_it(tmp_path: Path) -> None:
    assert run_cell(Cell("learner", "self", "SIGKILL", "saved"), tmp_path) == "goes on, restarted"
    events = [json.loads(line) for line in (tmp_path / "run" / "logs" / "launch.jsonl").read_text().splitlines()]
    restarted = [event["event"] for event in events if event["event"].startswith("the learner was restarted from step")]
    assert len(restarted) == 1
