"""The Slurm example saves, requeues and continues a run. Stand-ins for `tandem` and `scontrol` record its calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "slurm.sbatch"
# Runs until SIGUSR1, then ends as a launch that has saved a checkpoint. The next attempt ends at once.
TANDEM = """#!/usr/bin/env bash
echo "$@" >> calls
[ -e started ] && exit 0
trap 'exit 138' USR1
touch started
for _ in $(seq 600); do sleep 0.1; done
"""


def _start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], cwd=folder, env=environ)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _wait_for(path: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {timeout_s} s"
        time.sleep(0.02)


def test_a_job_near_its_time_limit_saves_requeues_and_continues(tmp_path: Path) -> None:
    _program(tmp_path / "tandem", TANDEM)
    _program(tmp_path / "scontrol", '#!/usr/bin/env bash\necho "$@" >> requeued\n')
    first = _start(tmp_path, "--config", "quickstart")
    try:
        _wait_for(tmp_path / "started")
        first.send_signal(signal.SIGUSR1)
        assert first.wait(timeout=300) == 138
    finally:
        first.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert _start(tmp_path, "--config", "quickstart").wait(timeout=300) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--run-dir runs/slurm-7 --resume auto --config quickstart"] * 2
    assert (tmp_path / "requeued").read_text() == "requeue 7\n", "a finished job must not be requeued"


def test_a_job_whose_run_fails_is_not_requeued(tmp_path: Path) -> None:
    _program(tmp_path / "tandem", "#!/usr/bin/env bash\nexit 1\n")
    _program(tmp_path / "scontrol", "#!/usr/bin/env bash\ntouch requeued\n")
    assert _start(tmp_path, "env.seed=3").wait(timeout=300) == 1
    assert not (tmp_path / "requeued").exists()
