"""The cost of the torchrl and mjlab adapters per tick, beside the bare simulator and torchrl's own step.

    python -m benchmarks.adapters --json adapters.json

The cases take turns in one process with one thread. A tick steps every environment once and resets those that ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import document, save
from benchmarks.timing import interleave, row, show
from collector_proc.simulators.base import Simulator
from collector_proc.simulators.registry import build_simulator
from shared.config import Settings

TICKS = 50  # per repetition
GYM = [("Pendulum-v1", 1), ("Pendulum-v1", 8), ("HalfCheetah-v5", 1), ("HalfCheetah-v5", 8)]
MJLAB = ("Mjlab-Cartpole-Balance", 64)


def simulator(backend: str, name: str, num_envs: int) -> Simulator:
    """Build a simulator of the collector for one task, on the CPU and without an action repeat."""
    settings = Settings()
    settings.env.backend, settings.env.name, settings.env.task = backend, name, ""
    settings.env.num_envs, settings.env.from_pixels, settings.env.frame_skip = num_envs, False, 1
    settings.env.randomize_start = False
    return build_simulator(settings, seed=0, device="cpu")


def ours(backend: str, name: str, num_envs: int) -> Callable[[], None]:
    """Return a function that does one tick of the collector's simulator."""
    stepped = simulator(backend, name, num_envs)
    stepped.reset()
    action = torch.rand(num_envs, stepped.spec.action_dim) * 2 - 1
    return lambda: _discard(stepped.step(action))


def bare_gymnasium(name: str, num_envs: int) -> Callable[[], None]:
    """Return a function that does one tick of gymnasium alone, without tensors and flags."""
    import gymnasium

    envs = [gymnasium.make(name) for _ in range(num_envs)]
    actions = [env.action_space.sample() for env in envs]
    for env in envs:
        env.reset(seed=0)

    def tick() -> None:
        for env, action in zip(envs, actions, strict=True):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return tick


def torchrl_alone(name: str, num_envs: int) -> Callable[[], None]:
    """Return a function that steps and resets torchrl's GymEnv as torchrl's collectors do."""
    from torchrl.envs import GymEnv

    envs = [GymEnv(name) for _ in range(num_envs)]
    roots = [env.reset() for env in envs]
    actions = [env.action_spec.rand() for env in envs]

    def tick() -> None:
        for index, env in enumerate(envs):
            roots[index].set("action", actions[index])
            _, roots[index] = env.step_and_maybe_reset(roots[index])

    return tick


def bare_mjlab(name: str, num_envs: int) -> Callable[[], None]:
    """Return a function that does one tick of mjlab alone, which resets inside its own step."""
    import mjlab.tasks  # noqa: F401  registers every task
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.tasks.registry import load_env_cfg

    cfg = load_env_cfg(name)
    cfg.scene.num_envs, cfg.seed = num_envs, 0
    env = ManagerBasedRlEnv(cfg, device="cpu")
    env.reset()
    action = torch.rand(num_envs, env.action_manager.total_action_dim) * 2 - 1
    return lambda: _discard(env.step(action))


def _discard(_: Any) -> None:
    """Drop the result of a tick; only its time counts."""


def measure(cases: dict[str, Callable[[], None]], *, repetitions: int) -> dict[str, float]:
    """Return the CPU time of a tick in microseconds, as the median over the repetitions."""

    def many(tick: Callable[[], None]) -> Callable[[], None]:
        def ticks() -> None:
            for _ in range(TICKS):
                tick()

        return ticks

    samples = interleave({name: many(tick) for name, tick in cases.items()}, repetitions=repetitions)
    return {name: round(found.describe()["cpu_ms_median"] * 1e3 / TICKS, 1) for name, found in samples.items()}


def run(*, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Measure every task that is installed, on the CPU; with `quick`, one task for a few seconds."""
    assert device == "cpu", device  # the adapters' own work runs on the CPU
    torch.set_num_threads(1)
    repetitions, figures = 3 if quick else 15, {}
    for name, num_envs in GYM[:1] if quick else GYM:
        cases = {
            "ours": ours("torchrl", f"gym:{name}", num_envs)
        }  # built first, because it prevents torchrl from importing isaaclab
        cases |= {"bare": bare_gymnasium(name, num_envs), "torchrl": torchrl_alone(name, num_envs)}
        figures[f"gym:{name} x {num_envs}"] = measure(cases, repetitions=repetitions)
    if not quick and importlib.util.find_spec("mjlab") is not None:
        cases = {"ours": ours("mjlab", *MJLAB), "bare": bare_mjlab(*MJLAB)}
        figures[f"{MJLAB[0]} x {MJLAB[1]}"] = measure(cases, repetitions=repetitions)
    rows = [
        row(f"{case}, over {other}", us["ours"], "us cpu/tick", peer=us[other], times=us[other] / us["ours"])
        for case, us in figures.items()
        for other in us
        if other != "ours"
    ]
    return {"cpu_us_per_tick": figures, "rows": rows}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures and their provenance to this file")
    parser.add_argument("--quick", action="store_true", help="one task, a few seconds")
    options = parser.parse_args()
    os.environ.setdefault("MUJOCO_GL", "disabled")  # state vectors only; read once, when mujoco is first imported
    figures = run(quick=options.quick)
    save(options.json, document("adapters", figures))
    show("one tick of all environments", figures["rows"])


if __name__ == "__main__":
    main()
