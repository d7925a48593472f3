"""How much collecting and learning slow each other down: one real run in which each side is paused in turn.

    python -m benchmarks.end_to_end [--json PATH] [--quick] [--presets quickstart] [--no-pin] [key=value ...]

launch.py starts both processes as usual, each bound to half of the cores if there are at least two.
optimization.replay_ratio=null lets both run as fast as they can. Three phases take turns: both; the learner alone
(SIGSTOP stops the collector, the replay does not change); the collector alone (the learner makes no gradient steps, but
receives commits and sends grants). Overlap is the pace in the phase "both" divided by the pace alone, turn by turn.
Measured per CPU second it is meaningful on a machine with other users, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import launch
from benchmarks.provenance import REPO, document, save
from benchmarks.timing import row, show, spread
from shared.progress import read

START_S = 900.0  # deadline of the first gradient steps; a preset for a GPU compiles first
SETTLE_S = 0.5  # after a change of phase: pending chunks arrive and caches warm up
PHASES = ("both", "learner", "collector")
SHOWN = (
    ("learner", "steps_per_s", "gradient steps/s"),
    ("learner", "steps_per_cpu_s", "gradient steps/cpu s"),
    ("collector", "frames_per_s", "agent steps/s"),
)
FREE = (
    "optimization.replay_ratio=null",
    "optimization.total_optim_steps=100000000",
    "optimization.log_every=1000",
    "checkpoint.every_s=100000",
    "checkpoint.replay=false",
    "logger.backend=none",
)
PRESETS: dict[str, tuple[str, ...]] = {
    # Chunks of 64 ticks: collecting two must take longer than a gradient step, or the collector waits for grants.
    "quickstart": ("--config", "quickstart", "collector.frames_per_batch=512", "replay_buffer.buffer_size=102400"),
    "quickstart, 256 envs": (
        *("--config", "quickstart", "env.num_envs=256", "collector.frames_per_batch=8192", "collector.eval_envs=16"),
        *("collector.init_random_frames=65536", "replay_buffer.buffer_size=1000000"),
    ),
    "gpu": (
        *("--config", "quickstart", "env.num_envs=4096", "collector.frames_per_batch=204800", "collector.eval_envs=64"),
        *("collector.init_random_frames=409600", "replay_buffer.buffer_size=10000000", "networks.state_dim=30"),
        *("networks.rssm_hidden_dim=200", "networks.hidden_dim=400", "replay_buffer.batch_size=50000"),
        *("replay_buffer.batch_length=50", "optimization.autocast=bfloat16", "optimization.compile.enabled=true"),
    ),
}


class Run:
    """One run of launch.py in a temporary folder, whose phase can be changed. Use it as a context manager."""

    def __init__(self, arguments: list[str], cores: dict[str, str] | None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="tandem-benchmark-")
        self.run_dir = Path(self._temporary.name) / "run"
        command = [sys.executable, "-m", "benchmarks.end_to_end", "--launch"]
        command += [cores["collector"], cores["learner"]] if cores else ["", ""]
        self._output = (Path(self._temporary.name) / "launch.out").open("w+")
        self._launch = subprocess.Popen(
            [*command, "--run-dir", str(self.run_dir), *arguments],
            cwd=REPO, stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Run:
        try:
            self._await(lambda: (self._row() or (0.0, 0.0))[1] >= 20, START_S, "20 gradient steps")
        except BaseException:
            self.close()  # __exit__ is not called when __enter__ raises
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run in any phase: a stopped collector is continued first."""
        with contextlib.suppress(OSError):
            self._switch("both")
        self._launch.terminate()
        try:
            self._launch.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            self._launch.kill()
            self._launch.wait()
        self._output.close()
        self._temporary.cleanup()

    def measure(self, phase: str, seconds: float) -> dict[str, float]:
        """Measure gradient steps and agent steps in one turn of a phase, per second and per CPU second."""
        self._switch(phase)
        paused = float(phase == "collector")
        self._await(lambda: self._row()[4] == paused, 60.0, f"the learner to notice the phase {phase!r}")
        time.sleep(SETTLE_S)
        first, cpu = self._last_row(), self._collector_cpu_s()
        began = time.monotonic()
        time.sleep(seconds)
        last, used = self._last_row(), self._collector_cpu_s() - cpu
        passed, steps, frames, busy, _ = (after - before for after, before in zip(last, first, strict=True))
        return {
            "steps_per_s": steps / passed,
            "frames_per_s": frames / passed,
            "steps_per_cpu_s": steps / max(busy, 1e-3),
            "frames_per_cpu_s": frames / max(used, 1e-2),
            "learner_cores": busy / passed,
            "collector_cores": used / (time.monotonic() - began),
        }

    def _switch(self, phase: str) -> None:
        (self.run_dir / "no_steps").touch() if phase == "collector" else self._remove_pause()
        with contextlib.suppress(OSError, ProcessLookupError):
            os.killpg(self._collector(), signal.SIGSTOP if phase == "learner" else signal.SIGCONT)

    def _remove_pause(self) -> None:
        (self.run_dir / "no_steps").unlink(missing_ok=True)

    def _collector(self) -> int:
        return read(self.run_dir / "collector.progress").pid

    def _collector_cpu_s(self) -> float:
        """Return the CPU seconds of the collector and of the workers in its process group."""
        group, ticks = self._collector(), 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12]) if int(fields[2]) == group else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def _row(self) -> tuple[float, ...]:
        """Return the newest complete line of the learner's ledger, or () if there is none yet."""
        path = self.run_dir / "ledger.txt"
        if not path.exists():
            return ()
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 400))
            lines = file.read().rpartition(b"\n")[0].splitlines()
        return tuple(map(float, lines[-1].split())) if lines else ()

    def _last_row(self) -> tuple[float, ...]:
        """Return the next line of the ledger. Raises: RuntimeError if the learner writes nothing for a minute."""
        before = time.monotonic()
        self._await(lambda: self._row()[0] >= before, 60.0, "a line of the learner's ledger")
        return self._row()

    def _await(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self._launch.poll() is not None or time.monotonic() > end:
                self._output.seek(0)
                raise RuntimeError(f"{what} did not come; launch.py printed:\n{self._output.read()[-3000:]}")
            time.sleep(0.02)


def core_shares() -> dict[str, str] | None:
    """Return the cores of each process in taskset's form, half of the available ones each; None with fewer than two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or shutil.which("taskset") is None:
        return None
    half = len(cores) // 2
    return {"collector": ",".join(map(str, cores[:half])), "learner": ",".join(map(str, cores[half:]))}


def measure(preset: str, overrides: list[str], *, turns: int, seconds: float, pin: bool) -> dict[str, Any]:
    """Measure the paces of the three phases and the overlap for one preset."""
    cores = core_shares() if pin else None
    found: dict[str, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    with Run([*PRESETS[preset], *FREE, *overrides], cores) as run:
        for _ in range(turns):
            for phase in PHASES:
                found[phase].append(run.measure(phase, seconds))
    result: dict[str, Any] = {"pinned": cores, "seconds": seconds, "turns": turns}
    for phase, rows in found.items():
        result[phase] = {key: spread([one[key] for one in rows]) for key in rows[0]}
    result["overlap"] = {
        side: {key: _shares(found["both"], found[side], key) for key in (f"{unit}_per_s", f"{unit}_per_cpu_s")}
        for side, unit in (("learner", "steps"), ("collector", "frames"))
    }
    return result


def _shares(both: list[dict[str, float]], alone: list[dict[str, float]], key: str) -> dict[str, float]:
    return spread([together[key] / one[key] for together, one in zip(both, alone, strict=True)])


def run(
    *,
    quick: bool = False,
    device: str = "cpu",
    presets: tuple[str, ...] = (),
    overrides: tuple[str, ...] = (),
    pin: bool = True,
) -> dict[str, Any]:
    """Measure the presets, by default those that suit the device. launch.py chooses the GPUs itself."""
    gpu = device.startswith("cuda")
    chosen = presets or ("quickstart",) if quick else presets or (tuple(PRESETS) if gpu else tuple(PRESETS)[:2])
    found, lines = {}, []
    for preset in chosen:
        turns, seconds = (1, 1.0) if quick else (5, 4.0)
        figures = found[preset] = measure(preset, list(overrides), turns=turns, seconds=seconds, pin=pin)
        for side, key, unit in SHOWN:
            together, alone = figures["both"][key]["median"], figures[side][key]["median"]
            share = figures["overlap"][side][key]["median"]
            bar = ">= 0.9x" if key == "steps_per_s" and figures["pinned"] else ""
            lines.append(
                row(f"{side}, together against alone, {preset}", together, unit, peer=alone, times=share, bar=bar)
            )
    left_out = {} if gpu or quick else {"preset gpu": "no CUDA device"}
    return {"presets": found, "left_out": left_out, "rows": lines}


def _launch(arguments: list[str]) -> int:
    """Run launch.py with the paced learner and with each process bound to its cores.

    The arguments are COLLECTOR_CORES LEARNER_CORES and then those of launch.py.
    """
    modules = {"collector": "collector_proc", "learner": "benchmarks.paced_learner"}
    commands: dict[str, tuple[str, ...]] = {role: (sys.executable, "-m", name) for role, name in modules.items()}
    for role, cores in zip(("collector", "learner"), arguments[:2], strict=True):
        if cores:
            threads = 1 if role == "collector" else cores.count(",") + 1
            commands[role] = ("env", f"OMP_NUM_THREADS={threads}", "taskset", "-c", cores, *commands[role])
    return launch.main(arguments[2:], commands=commands)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--launch"]:
        sys.exit(_launch(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="one short turn, to check that it runs")
    parser.add_argument(
        "--presets", nargs="+", choices=sorted(PRESETS), default=(), help="default: those that suit the machine"
    )
    parser.add_argument("--no-pin", action="store_true", help="do not bind the processes to cores")
    options, overrides = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = run(
        quick=options.quick,
        device=device,
        presets=tuple(options.presets),
        overrides=tuple(overrides),
        pin=not options.no_pin,
    )
    save(options.json, document("end_to_end", result))
    show("end to end", result["rows"])
    for what, why in result["left_out"].items():
        print(f"left out: {what}: {why}")


if __name__ == "__main__":
    main()
