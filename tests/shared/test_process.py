"""The start of a process of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.compose import save_settings
from shared.config import Settings
from shared.progress import read

REPO = Path(__file__).parents[2]
SCRIPT = """
import os, pathlib, signal, sys
from shared.lifetime import StopRequested
from shared.process import start_process
process = start_process(pathlib.Path(sys.argv[1]), "collector")
assert process.run.run_id == "r1" and process.settings.env.seed == 7 and "torch" not in sys.modules
process.log.info("started")
process.alive()
os.kill(os.getpid(), signal.SIGTERM)
try:
    process.alive()
except StopRequested:
    process.log.info("stopped")
"""


def test_a_process_reads_its_run_and_opens_its_log_progress_file_and_stack_dumps(tmp_path):
    settings = Settings()
    settings.env.seed = 7
    save_settings(settings, tmp_path / "config.yaml")
    (tmp_path / "run.json").write_text('{"run_id": "r1", "socket_dir": "/tmp/none"}')
    for folder in ("logs", "crash"):
        (tmp_path / folder).mkdir()
    env = {name: value for name, value in os.environ.items() if name != "TANDEM_LAUNCH_PID"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=REPO, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "logs" / "collector.jsonl").read_text().splitlines()
    assert '"started"' in lines[0] and '"stopped"' in lines[1], "the second `alive` raised StopRequested"
    assert read(tmp_path / "collector.progress").phase == "starting"
    assert (tmp_path / "crash" / "collector.stacks").exists()


@pytest.mark.parametrize("role", ["collector", "learner"])
@pytest.mark.parametrize("folder", ["nowhere", "empty", "no-logs", "file"])
def test_a_wrong_run_dir_is_explained_in_one_line(folder, role, tmp_path):
    run = tmp_path / folder
    if folder == "file":
        run.write_text("")
    elif folder != "nowhere":
        run.mkdir()
    if folder == "no-logs":
        save_settings(Settings(), run / "config.yaml")
        (run / "run.json").write_text('{"run_id": "r1", "socket_dir": "/tmp/none"}')
    command = [sys.executable, "-m", f"{role}_proc", "--run-dir", str(run)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
