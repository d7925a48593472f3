"""Print facts about the `isaaclab` of one tier as JSON: `isaac_facts.py TASK`. They must be equal on both tiers.

These are the facts that the backend relies on. The script drives one environment, because a process can have only one.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import signal
import sys
from typing import Any

STEPS = 200


class Tee:
    """A replaced stdout, as a test runner may have."""

    def write(self, text: str) -> int:
        return os.write(1, text.encode())

    def flush(self) -> None:
        """There is no buffer."""


def main() -> None:
    task = sys.argv[1]
    before = sys.stdout = Tee()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT)}
    sys.argv = sys.argv[:1]
    from isaaclab.app import AppLauncher  # pyright: ignore[reportMissingImports]

    AppLauncher(headless=True, device="cpu", enable_cameras=False, multi_gpu=False)
    facts: dict[str, Any] = {
        "launcher loads torch": "torch" in sys.modules,
        "stdout is replaced": sys.stdout is not before,
        "handlers are taken": [signal.getsignal(s) is not handler for s, handler in handlers.items()],
        "launcher": parameters(AppLauncher.__init__),
    }
    gc.enable()
    import gymnasium
    import isaaclab_tasks  # noqa: F401  # pyright: ignore[reportMissingImports]
    from isaaclab_tasks.utils import parse_env_cfg  # pyright: ignore[reportMissingImports]

    facts["parse_env_cfg"] = parameters(parse_env_cfg)
    cfg = parse_env_cfg(task, device="cpu", num_envs=64)
    cfg.seed = 0
    cfg.episode_length_s = 19.5 * cfg.sim.dt * cfg.decimation
    env: Any = gymnasium.make(task, cfg=cfg).unwrapped
    facts |= {f"{name}": parameters(getattr(type(env), name)) for name in ("reset", "step", "_reset_idx", "close")}
    names = "episode_length_buf max_episode_length step_dt num_envs device single_action_space extras cfg scene sim"
    facts["attributes"] = {name: hasattr(env, name) for name in (*names.split(), "observation_manager")}
    facts["observes by itself"] = hasattr(env, "_get_observations")
    facts["resets outside a step"] = [hasattr(env.scene, "write_data_to_sim"), hasattr(env.sim, "forward")]
    facts["final observations"] = hasattr(cfg, "compute_final_obs")
    facts["configured"] = [hasattr(cfg, name) for name in ("seed", "episode_length_s", "decimation")]
    facts |= stepping(env)
    before.write("FACTS" + json.dumps(facts) + "\n")


def parameters(function: Any) -> list[str]:
    """Return the names of a function's parameters that the backend may rely on."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "use_fabric")]


def stepping(env: Any) -> dict[str, Any]:
    """Return what `step` returns, and how later steps change it."""
    import torch

    obs, _ = env.reset()
    oldest, reset_idx = [], env._reset_idx

    def recorded(env_ids: Any) -> Any:
        oldest.append(int(env.episode_length_buf[env_ids].max()))
        return reset_idx(env_ids)

    env._reset_idx = recorded
    facts: dict[str, Any] = {"groups": sorted(obs), "box": str(type(env.single_action_space).__name__)}
    facts["unbounded"] = not bool(torch.as_tensor(env.single_action_space.low).isfinite().any())
    generator = torch.Generator().manual_seed(0)
    flags, rewards, stale, ages, kinds = set(), set(), [], set(), set()
    for _ in range(STEPS):
        width = env.single_action_space.shape[0]
        obs, reward, terminated, time_out, extras = env.step(torch.rand(64, width, generator=generator) * 2 - 1)
        flags.add((terminated.data_ptr(), time_out.data_ptr()))
        rewards.add(reward.data_ptr())
        done = terminated | time_out
        if not done.any():
            stale.append("log" in extras)
        ages |= set(env.episode_length_buf[done].tolist())
        kinds.add(str((reward.dtype, terminated.dtype, time_out.dtype, obs["policy"].dtype)))
    facts["flags keep their memory"] = len(flags) == 1
    facts["ages of ended episodes when step returns"] = sorted(ages)
    facts["steps before the limit at which episodes time out"] = int(env.max_episode_length) - max(oldest)
    facts["dtypes"] = sorted(kinds)
    if hasattr(env, "observation_manager"):  # in direct environments, this depends on the task
        facts["rewards keep their memory"] = len(rewards) == 1
        facts["log outlives its tick"] = any(stale)
    return facts


if __name__ == "__main__":
    main()
