"""Draw how both processes scale: pace and memory over the batch size and over the number of environments.

python -m benchmarks.learner --scaling --json benchmarks/results/learner.json
python -m benchmarks.collector --scaling --json benchmarks/results/collector.json
python -m benchmarks.scaling benchmarks/results/learner.json benchmarks/results/collector.json --out scaling.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(learner: dict[str, Any], collector: dict[str, Any], out: Path) -> None:
    """Draw the results of `benchmarks.learner --scaling` and `benchmarks.collector --scaling`."""
    steps = [row for row in learner["runtime"]["scaling"]["rows"] if "failed" not in row]
    ticks = collector["runtime"]["scaling"]
    frames, envs = [row["frames"] for row in steps], [int(count) for count in ticks]
    streams = [ticks[str(count)]["stream"] for count in envs]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), sharex="col")
    panels = [
        (axes[0, 0], frames, [row["frames_per_s"] for row in steps], "replayed frames/s"),
        (axes[1, 0], frames, [row["peak_gib"] for row in steps], "learner, peak GiB"),
        (
            axes[0, 1],
            envs,
            [n * s["ticks_per_s"]["median"] for n, s in zip(envs, streams, strict=True)],
            "agent steps/s",
        ),
        (axes[1, 1], envs, [s["collector_gib"]["median"] for s in streams], "collector, GiB"),
    ]
    for axis, x, y, label in panels:
        axis.plot(x, y, "o-")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.15 * max(y))
        axis.set_ylabel(label)
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    for row in steps:
        label = f"{row['steps_per_s']:.3g}/s"
        axes[0, 0].annotate(label, (row["frames"], row["frames_per_s"]), (0, 6), textcoords="offset points", fontsize=8)
    axes[0, 0].set_title(f"gradient step, {learner['runtime']['scaling']['variant']} (labels: steps/s)", fontsize=10)
    axes[0, 1].set_title("pendulum with policy and stream", fontsize=10)
    axes[1, 0].set_xlabel("frames in a batch")
    axes[1, 1].set_xlabel("environments")
    figure.suptitle(hardware(learner), fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def hardware(document: dict[str, Any]) -> str:
    """Return a short description of the machine."""
    runtime, found = document["runtime"], document["hardware"]
    if runtime["device"] != "cpu":
        return ", ".join(str(gpu) for gpu in found["gpus"])
    return f"{found['cpu']}, {runtime['threads']} thread per process"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learner", type=Path, help="the result of benchmarks.learner --scaling --json")
    parser.add_argument("collector", type=Path, help="the result of benchmarks.collector --scaling --json")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    options = parser.parse_args()
    draw(json.loads(options.learner.read_text()), json.loads(options.collector.read_text()), options.out)


if __name__ == "__main__":
    main()
