"""Run one Isaac Lab simulator in a process of its own, where torch must not be imported before the simulator is built.

Call: `isaac_driver.py JOB.json RESULT.pt`. The job holds config, overrides and ticks. It may hold `nan` and
`native_from`, which `drive` describes, and `close_s`, the time that closing may take. The result holds the exception,
the arrivals as they were returned and as they are after the last tick, the true state before every reset, and facts
about the process and the task.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from pathlib import Path
from typing import Any

from collector_proc.simulators import ending
from collector_proc.simulators.registry import build_simulator, check_env
from shared.compose import compose


def main() -> int:
    job, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    settings = compose(job["config"], job["overrides"])
    before = {"argv": list(sys.argv), "stdout": sys.stdout, "handler": signal.getsignal(signal.SIGTERM)}
    error, outcome = "", {}
    assert "torch" not in sys.modules
    try:
        check_env(settings)
        simulator: Any = build_simulator(settings, seed=settings.env.seed, device="cpu", crash_dir=result.parent)
        outcome = drive(simulator, job["ticks"], job.get("nan"), job.get("native_from"))
    except Exception as caught:
        error, simulator = f"{type(caught).__name__}: {caught}", None
    import torch

    gc_enabled = gc.isenabled()
    gc.collect()

    facts = {
        "argv": sys.argv == before["argv"],
        "stdout": sys.stdout is before["stdout"],
        "handler": signal.getsignal(signal.SIGTERM) is before["handler"],
        "fatal": [signal.getsignal(signum) == signal.SIG_DFL for signum in (signal.SIGSEGV, signal.SIGABRT)],
        "gc": gc_enabled,
        "launcher lives": any(type(thing).__name__ == "AppLauncher" for thing in gc.get_objects()),
    }
    torch.save({"error": error, "facts": facts, **outcome}, result)
    if simulator is not None:
        with ending.closing_deadline(job.get("close_s", 1.0), 3):
            simulator.close()
    return 7  # the process must end with this code, although Kit's exit hooks would change it


def drive(simulator: Any, num_ticks: int, nan: list[int] | None, native_from: int | None) -> dict[str, Any]:
    """Run `num_ticks` ticks.

    nan: (tick, environment): before that tick, NaN is written into that environment's physics.
    native_from: from that tick on, Isaac Lab 3 also reports final observations in its own way, which are recorded.
    """
    import torch

    truth, native = record_truth(simulator), {}
    generator = torch.Generator().manual_seed(11)
    arrivals = [simulator.reset()]
    copies, truths = [copy(arrivals[0])], [{}]
    for tick in range(1, num_ticks + 1):
        if nan is not None and tick == nan[0]:
            break_physics(simulator._env, nan[1])
        if tick == native_from:
            simulator._env.cfg.compute_final_obs = True
        action = torch.rand(simulator.spec.num_envs, simulator.spec.action_dim, generator=generator) * 2 - 1
        truth.clear()
        arrivals.append(simulator.step(action.to(simulator.device)))
        copies.append(copy(arrivals[-1]))
        truths.append(dict(truth))
        if native_from is not None and tick >= native_from and truth:
            native[tick] = simulator._env.extras["final_obs"]["policy"].clone()
    kept = [copy(arrival) for arrival in arrivals]
    again = copy(simulator.reset())
    return {
        "spec": simulator.spec.to_dict(),
        "rows": stack(copies),
        "kept": stack(kept),
        "truth": truths,
        "native": native,
        "task": {name: getattr(simulator._env, name) for name in ("step_dt", "max_episode_length")},
        "again": again,
        "num_diverged": simulator.num_diverged,
    }


def record_truth(simulator: Any) -> dict[int, Any]:
    """Return a dict that maps each environment to its state just before a reset, read without the adapter."""
    env, truth = simulator._env, {}
    inner = simulator._terminal._reset_idx

    def reset_idx(env_ids: Any) -> Any:
        state = raw_state(env)
        # Isaac Lab 3 names all environments by a slice.
        for index in range(env.num_envs)[env_ids] if isinstance(env_ids, slice) else env_ids.tolist():
            truth.setdefault(index, state[index].clone())
        return inner(env_ids)

    simulator._terminal._reset_idx = reset_idx
    return truth


def raw_state(env: Any) -> Any:
    """Return what the simulator holds: joint positions and speeds; with Isaac Lab 3 also the height, or the images."""
    import torch

    if hasattr(env, "state"):
        return env.state
    sensors = getattr(env.scene, "sensors", {})
    if "tiled_camera" in sensors:
        return sensors["tiled_camera"].data.output["rgb"].torch
    data = next(iter(env.scene.articulations.values())).data
    if hasattr(data.joint_pos, "torch"):
        return torch.cat([data.joint_pos.torch, data.joint_vel.torch, data.root_pos_w.torch[:, 2:]], -1)
    return torch.cat([data.joint_pos, data.joint_vel], -1)


def break_physics(env: Any, index: int) -> None:
    """Write NaN into the physics of one environment."""
    if hasattr(env, "state"):
        env.state[index, 2] = float("nan")
        return
    positions = next(iter(env.scene.articulations.values())).data.joint_pos
    getattr(positions, "torch", positions)[index] = float("nan")


def copy(arrival: Any) -> dict[str, Any]:
    fields = {name: getattr(arrival, name).clone() for name in ("reward", "is_first", "is_last", "is_terminal")}
    fields |= {f"obs.{name}": entry.clone() for name, entry in arrival.obs.items()}
    return fields | {f"acting.{name}": entry.clone() for name, entry in arrival.acting_obs.items()}


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


if __name__ == "__main__":
    ending.run(main)
