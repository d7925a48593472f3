"""Train a task with several seeds and keep the curves as one JSON file and one picture beside the published curve.

    python -m benchmarks.learning --config quickstart_dmc --seeds 0 1 2 env.name=cartpole env.task=balance
    python -m benchmarks.learning --config dm_control --seeds 0 env.name=walker env.task=walk --sim-gpu 0 --train-gpu 0
    python -m benchmarks.learning --draw benchmarks/results/learning_quickstart.json

Runs follow one another; `--jobs 2` runs two at a time, with one torch thread each. All further arguments are passed to
launch.py unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.provenance import cpu_name
from benchmarks.published import DREAMER_V1_PIXELS, ENV_FRAMES
from learner_proc.evaluation import read_evaluations
from shared.compose import load_settings

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
COLUMNS = (
    *("wall_s", "env_frames", "agent_steps", "gradient_steps"),
    *("eval_return_mean", "episode_return_mean", "random_return_mean"),
)
EVALUATION_COLUMNS = ("version", "gradient_steps", "agent_steps", "env_frames", "episodes", "mean", "median", "iqm")
EVALUATION_COLUMNS += ("low", "high")


def train(config: str, seed: int, arguments: list[str], runs: Path, *, threads: int | None) -> Path:
    """Run launch.py once and return the run folder. Raises: CalledProcessError if the run fails."""
    folder = runs / f"{config}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [
        sys.executable,
        "launch.py",
        "--config",
        config,
        "--run-dir",
        str(folder),
        *arguments,
        f"env.seed={seed}",
    ]
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with (runs / f"{folder.name}.txt").open("w") as output:
        subprocess.run(command, cwd=REPO, env=env, stdout=output, stderr=subprocess.STDOUT, check=True)
    return folder


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's curve (the rows that have an evaluation), its evaluations, its seed and its summary."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("eval_return_mean") is not None]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "seed": load_settings(folder / "config.yaml").env.seed,
        "curve": {key: [_rounded(row[key]) for row in rows] for key in COLUMNS},
        "evaluations": {
            key: [_rounded(line[f"evaluation_{key}"]) for line in read_evaluations(folder / "evaluations.jsonl")]
            for key in EVALUATION_COLUMNS
        },
        "summary": {
            key: summary[key] for key in ("wall_s", "collect_fps", "updates_per_s", "replay_ratio", "eval_return_mean")
        },
    }


def collect(folders: list[Path], *, name: str, command: str) -> dict[str, Any]:
    """Return curves and provenance of finished runs with the same settings."""
    run = json.loads((folders[0] / "run.json").read_text())
    env = load_settings(folders[0] / "config.yaml").env
    return {
        "name": name,
        "task": f"{env.name}_{env.task}".rstrip("_"),  # only dm_control has name and task
        "observations": "pixels" if env.from_pixels else "state",
        "command": command,
        "git": run["git"],
        "versions": run["versions"],
        "devices": run["devices"],
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "runs": [read_run(folder) for folder in folders],
    }


def draw(result: dict[str, Any], out: Path) -> None:
    """Draw every seed's evaluation return over wall time and env frames, with random play and the published curve."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    random: list[float] = []
    for run in result["runs"]:
        curve = run["curve"]
        random += [value for value in curve["random_return_mean"][-1:] if value is not None]
        label, evaluations = f"seed {run['seed']}", run.get("evaluations") or {}
        if evaluations.get("version"):
            wall_s = np.interp(evaluations["gradient_steps"], curve["gradient_steps"], curve["wall_s"])
            _draw_evaluations(axes[0], wall_s / 60, evaluations, label=label)
            _draw_evaluations(axes[1], np.array(evaluations["env_frames"]) / 1000, evaluations, label=label)
        else:  # a result that is older than evaluations.jsonl: means over episodes of several versions
            axes[0].plot([s / 60 for s in curve["wall_s"]], curve["eval_return_mean"], label=label)
            axes[1].plot([n / 1000 for n in curve["env_frames"]], curve["eval_return_mean"], label=label)
    published = DREAMER_V1_PIXELS.get(result["task"])
    longest = max((run["curve"]["env_frames"] or [0])[-1] for run in result["runs"])
    if published is not None and result["observations"] == "pixels":
        points = [
            (frames / 1000, score) for frames, score in zip(ENV_FRAMES, published, strict=True) if frames <= 2 * longest
        ]
        axes[1].plot(*zip(*points, strict=True), "k--", label="published V1") if points else None
    for axis in axes:
        if random:
            axis.axhline(sum(random) / len(random), color="grey", linewidth=1, label="random actions (prefill)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    axes[0].set_xlabel("wall time, minutes")
    axes[1].set_xlabel("env frames, thousands")
    axes[0].set_ylabel("evaluation return")
    axes[1].legend(frameon=False)
    figure.suptitle(f"{result['task']} from {result['observations']}: {result['name']}")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_evaluations(axis: Any, x: Any, evaluations: dict[str, list[Any]], *, label: str) -> None:
    """Draw the mean of every evaluation, and its interval where it has one. x: where each evaluation is drawn."""
    (line,) = axis.plot(x, evaluations["mean"], label=label, linewidth=1.3)
    low, high = (np.array(evaluations[name], dtype=float) for name in ("low", "high"))
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dm_control", help="a file of configs/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--name", help="name of the result files; default: learning_<config>")
    parser.add_argument("--runs", type=Path, default=REPO / "runs", help="where the run folders go")
    parser.add_argument(
        "--from-runs", type=Path, nargs="+", help="read the curves of these finished runs; train nothing"
    )
    parser.add_argument("--draw", type=Path, help="draw an existing result again; train nothing")
    options, rest = parser.parse_known_args()
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return
    folders = options.from_runs
    if folders is None:
        options.runs.mkdir(parents=True, exist_ok=True)
        threads = 1 if options.jobs > 1 else None
        with ThreadPoolExecutor(options.jobs) as pool:
            folders = list(
                pool.map(lambda s: train(options.config, s, rest, options.runs, threads=threads), options.seeds)
            )
    name = options.name or f"learning_{options.config}"
    argv = [argument for argument in sys.argv[1:] if argument not in ("--runs", str(options.runs))]
    argv = [f"runs/{Path(a).name}" if Path(a).is_dir() else a for a in argv]  # absolute paths may be private
    result = collect(folders, name=name, command="python -m benchmarks.learning " + shlex.join(argv))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
