"""Which options help: train one task with several named sets of settings, each with the same seeds.

    python -m benchmarks.options --config quickstart --sets v1 std slow --seeds 0 1 --name options_pendulum
    python -m benchmarks.options --config quickstart --sets continue no_continue --seeds 0 1 2 env.task=balance
    python -m benchmarks.options --draw benchmarks/results/options_pendulum.json

Sets:
    v1           plain KL; the actor starts with a standard deviation of 5
    kl           v1 with a balanced KL and 0.5 free nats
    std          kl; the actor starts with a standard deviation of 1
    slow         std with a slow critic
    norm         std with returns divided by their percentile range, and an entropy bonus
    all          slow and norm together
    all_quiet    all with less exploration noise
    continue, no_continue    the config unchanged, with and without a continue head

The sets differ in losses and exploration only; network sizes, schedule and learning rates come from the config. All
further arguments are passed to launch.py unchanged.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.learning import REPO, RESULTS, collect, train

_V1 = {
    "optimization.kl_balance": "null",
    "optimization.free_nats": "null",
    "optimization.return_norm": "none",
    "optimization.entropy_scale": "0",
    "optimization.slow_critic_decay": "null",
    "networks.init_std": "5",
    "networks.exploration_noise": "0.3",
}
_KL = _V1 | {"optimization.kl_balance": "0.8", "optimization.free_nats": "0.5"}
_STD = _KL | {"networks.init_std": "1"}
_SLOW = _STD | {"optimization.slow_critic_decay": "0.98"}
_NORM = _STD | {"optimization.return_norm": "percentile", "optimization.entropy_scale": "3e-4"}
_ALL = _NORM | {"optimization.slow_critic_decay": "0.98"}
SETS = {
    "v1": _V1,
    "kl": _KL,
    "std": _STD,
    "slow": _SLOW,
    "norm": _NORM,
    "all": _ALL,
    "all_quiet": _ALL | {"networks.exploration_noise": "0.1"},
    "continue": {"networks.continue_head": "true"},
    "no_continue": {"networks.continue_head": "false"},
}


def final_return(run: dict[str, Any]) -> float:
    """Return the mean evaluation return over the last quarter of a run's gradient steps."""
    steps, returns = run["curve"]["gradient_steps"], run["curve"]["eval_return_mean"]
    return statistics.mean(r for s, r in zip(steps, returns, strict=True) if s >= 0.75 * steps[-1])


def compare(sets: list[str], config: str, seeds: list[int], rest: list[str], runs: Path) -> dict[str, Any]:
    """Train every set with every seed, one after another, and return the curves by set.

    Raises: CalledProcessError if a run fails.
    """
    found: dict[str, Any] = {}
    for name in sets:
        chosen = [f"{key}={value}" for key, value in SETS[name].items()]
        folders = [train(config, seed, [*rest, *chosen], runs / name, threads=1) for seed in seeds]
        found[name] = collect(folders, name=name, command="") | {"settings": SETS[name]}
        returns = ", ".join(f"{final_return(run):.1f}" for run in found[name]["runs"])
        print(f"{name}: evaluation returns in the last quarter: {returns}", flush=True)
    first = next(iter(found.values()))
    shared = {key: first[key] for key in ("task", "observations", "git", "versions", "devices", "hardware")}
    kept = {name: {"settings": one["settings"], "runs": one["runs"]} for name, one in found.items()}
    return shared | {"sets": kept}


def draw(result: dict[str, Any], out: Path) -> None:
    """Draw evaluation returns over gradient steps, with one colour per set and one line per seed."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for index, (name, one) in enumerate(result["sets"].items()):
        for run in one["runs"]:
            curve, label = run["curve"], name if run is one["runs"][0] else None
            axis.plot(curve["gradient_steps"], curve["eval_return_mean"], color=f"C{index}", alpha=0.8, label=label)
    axis.set_xlabel("gradient steps")
    axis.set_ylabel("evaluation return\n(mean of up to 20 episodes)")
    axis.set_title(f"{result['task']} from {result['observations']}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="a file of configs/, which gives sizes and schedule")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS)[:7], help="named sets of settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed and set")
    parser.add_argument("--name", default="options", help="name of the result files")
    parser.add_argument("--runs", type=Path, default=REPO / "runs", help="where the run folders go")
    parser.add_argument("--draw", type=Path, help="draw an existing result again; train nothing")
    options, rest = parser.parse_known_args()
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return
    for name in options.sets:
        (options.runs / name).mkdir(parents=True, exist_ok=True)
    argv = [argument for argument in sys.argv[1:] if argument not in ("--runs", str(options.runs))]
    result = compare(options.sets, options.config, options.seeds, rest, options.runs)
    result = {"name": options.name, "command": "python -m benchmarks.options " + shlex.join(argv)} | result
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
