"""The pace of Isaac Lab 3 on the CPU: the bare simulator, with policy, with stream, and a whole training beside PPO.

    python -m benchmarks.isaaclab [--json PATH] [--quick] [--envs 16 64 256 1024] [--task Isaac-Cartpole]

For each number of environments, three loops take turns, as in `benchmarks.collector`: the simulator under random
actions, the simulator with the acting policy, and a real collector that streams. Then launch.py trains with the preset
`isaaclab_cartpole`, and rsl_rl's PPO trains on the same task with Isaac Lab's own settings, each in its own process and
one after the other. Both paces are agent steps per second. They do not compare like with like: our training has two
processes with one torch thread each, and the preset's replay ratio limits its pace; PPO has one process and one thread.

Isaac Lab 3 and its assets must be installed, as docs/isaaclab.md describes. The extras `isaaclab3` and `test` bring
rsl_rl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.collector import Case, measure
from benchmarks.provenance import REPO, document, save
from benchmarks.timing import row, show
from collector_proc.simulators.isaaclab.checks import is_isaac_lab_3
from shared.metrics import AGENT_STEPS, GRADIENT_STEPS

PRESET, TASK = "isaaclab_cartpole", "Isaac-Cartpole"
ENVS = (16, 64, 256, 1024)
TICKS_PER_CHUNK = 10
LIMIT_S = 900.0  # a first start compiles Warp's kernels


def run(*, quick: bool = False, device: str = "cpu", envs: tuple[int, ...] = ENVS, task: str = TASK) -> dict[str, Any]:
    """Measure every number of environments. Raises: RuntimeError if Isaac Lab 3 is not installed."""
    if not is_isaac_lab_3():
        raise RuntimeError("Isaac Lab 3 is not installed; expected isaaclab 3.0.0; see docs/isaaclab.md")
    seconds, repetitions = (0.3, 1) if quick else (3.0, 3)
    figures, lines = {}, []
    for number in envs[:1] if quick else envs:
        # Isaac Lab allows one simulator per process, so each measurement has a process of its own.
        found = {
            "loops": _in_child("loops", task, number, device, repetitions, seconds),
            "whole_system": whole_system(task, number, quick=quick),
            "ppo": _in_child("ppo", task, number, device, 2 if quick else 20),
        }
        figures[str(number)] = found
        lines += _rows(task, number, found)
    return {"device": device, "task": task, "envs": figures, "rows": lines}


def whole_system(task: str, envs: int, *, quick: bool) -> dict[str, float]:
    """Train with launch.py; return agent steps and gradient steps per second after the start."""
    rows = 4 if quick else 20
    with tempfile.TemporaryDirectory(prefix="tandem-benchmark-") as folder:
        run_dir = Path(folder) / "run"
        frames = envs * TICKS_PER_CHUNK
        settings = [
            *(f"env.name={task}", f"env.num_envs={envs}", "collector.eval_envs=4"),
            *(f"collector.frames_per_batch={frames}", f"collector.init_random_frames={4 * frames}"),
            *(f"replay_buffer.buffer_size={200 * frames}", "optimization.log_every=10"),
            *(f"optimization.total_optim_steps={10 * rows}", "optimization.pretrain_steps=0", "logger.backend=none"),
        ]
        _call([sys.executable, "launch.py", "--config", PRESET, "--run-dir", str(run_dir), *settings])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[len(lines) // 4], lines[-1]
    passed = last["time"] - first["time"]
    return {
        "agent_steps_per_s": (last[AGENT_STEPS.name] - first[AGENT_STEPS.name]) / passed,
        "gradient_steps_per_s": (last[GRADIENT_STEPS.name] - first[GRADIENT_STEPS.name]) / passed,
    }


def loops(task: str, envs: int, device: str, repetitions: int, seconds: float) -> dict[str, Any]:
    """Return what `benchmarks.collector` measures: bare, policy and stream, in turns."""
    case = Case(PRESET, (f"env.name={task}", f"env.num_envs={envs}", "collector.eval_envs=4"), envs)
    return measure(case, device=device, repetitions=repetitions, seconds=seconds)


def ppo(task: str, envs: int, device: str, iterations: int) -> dict[str, float]:
    """Train with rsl_rl's PPO as Isaac Lab sets it up for this task; return its agent steps per second."""
    import gymnasium
    import isaaclab_tasks  # noqa: F401  # pyright: ignore[reportMissingImports] # registers the tasks
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper  # pyright: ignore[reportMissingImports]
    from isaaclab_rl.rsl_rl.utils import (  # pyright: ignore[reportMissingImports]
        check_rsl_rl_version,
        create_rsl_rl_runner,
        handle_deprecated_rsl_rl_cfg,
    )
    from isaaclab_tasks.utils.hydra import resolve_task_config  # pyright: ignore[reportMissingImports]

    cfg, agent = resolve_task_config(task, "rsl_rl_cfg_entry_point", overrides=[])
    cfg.scene.num_envs, cfg.sim.device = envs, device
    env: Any = RslRlVecEnvWrapper(gymnasium.make(task, cfg=cfg), clip_actions=agent.clip_actions)
    agent.device = device
    runner = create_rsl_rl_runner(env, handle_deprecated_rsl_rl_cfg(agent, check_rsl_rl_version()))
    runner.learn(num_learning_iterations=2)  # compiles kernels
    began = time.perf_counter()
    runner.learn(num_learning_iterations=iterations)
    passed = time.perf_counter() - began
    return {"agent_steps_per_s": iterations * agent.num_steps_per_env * envs / passed}


def _in_child(name: str, *arguments: Any) -> dict[str, Any]:
    """Run one of the functions of this file in a process of its own, and return its result."""
    with tempfile.TemporaryDirectory(prefix="tandem-benchmark-") as folder:
        result = Path(folder) / "result.json"
        job = json.dumps([name, *arguments])
        _call([sys.executable, "-m", "benchmarks.isaaclab", "--job", job, "--json", str(result)])
        return json.loads(result.read_text())


def _call(command: list[str]) -> None:
    """Run a command. Raises: RuntimeError with the end of its output if it fails."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} ended with code {done.returncode}: {done.stderr[-3000:]}")


def _rows(task: str, envs: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    label, bare = f"{task}, {envs:,} envs", found["loops"]["bare"]["ticks_per_s"]["median"] * envs
    lines = [row(f"{label}, bare simulator", bare, "agent steps/s")]
    for loop, words in (("policy", "with policy"), ("stream", "with policy and stream")):
        figures = found["loops"][loop]
        pace, share = figures["ticks_per_s"]["median"] * envs, figures["share_of_bare"]["median"]
        lines.append(row(f"{label}, {words}, against bare", pace, "agent steps/s", peer=bare, times=share))
    system, peer = (found[name]["agent_steps_per_s"] for name in ("whole_system", "ppo"))
    lines.append(row(f"{label}, whole system against PPO", system, "agent steps/s", peer=peer, times=system / peer))
    steps = found["whole_system"]["gradient_steps_per_s"]
    return [*lines, row(f"{label}, gradient steps of the whole system", steps, "gradient steps/s")]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--envs", type=int, nargs="+", default=list(ENVS), help="numbers of environments")
    parser.add_argument("--task", default=TASK, help="a task that has settings for rsl_rl")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.job:
        name, *arguments = json.loads(options.job)
        options.json.write_text(json.dumps({"loops": loops, "ppo": ppo}[name](*arguments)))
        return
    result = run(quick=options.quick, envs=tuple(options.envs), task=options.task)
    save(options.json, document("isaaclab", result))
    show("isaaclab", result["rows"])


if __name__ == "__main__":
    main()
