"""The real collector with Isaac Lab. It also records what it streamed, and the simulator's state before each reset.

Run as `python truthful_collector.py --run-dir DIR ...`, like `python -m collector_proc`. It writes DIR/truth.pt: the
rows of the first NUM_KEPT environments on arrival, and (tick, environments, states) before every reset inside a step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import collector_proc.__main__ as entry
from collector_proc.simulators import ending

NUM_KEPT = 256


class Truthful:
    """A simulator that records every arrival before it returns it."""

    def __init__(self, simulator: Any, path: Path) -> None:
        self._simulator, self._path, self._tick = simulator, path, 0
        self.spec, self.device, self.frames_per_step = simulator.spec, simulator.device, simulator.frames_per_step
        self._rows: list[dict[str, Any]] = []
        self._resets: list[tuple[int, Any, Any]] = []
        inner = simulator._terminal._reset_idx

        def reset_idx(env_ids: Any) -> Any:
            import torch

            data = next(iter(simulator._env.scene.articulations.values())).data
            state = torch.cat([data.joint_pos, data.joint_vel], -1)
            self._resets.append((self._tick, env_ids.clone(), state[env_ids].clone()))
            return inner(env_ids)

        simulator._terminal._reset_idx = reset_idx

    @property
    def num_diverged(self) -> int:
        return self._simulator.num_diverged

    def reset(self) -> Any:
        return self._keep(self._simulator.reset())

    def step(self, action: Any) -> Any:
        self._tick += 1
        return self._keep(self._simulator.step(action))

    def close(self) -> None:
        import torch

        rows = {name: torch.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        torch.save({"rows": rows, "resets": self._resets}, self._path)
        self._simulator.close()

    def _keep(self, arrival: Any) -> Any:
        names = ("reward", "is_first", "is_last", "is_terminal")
        row = {name: getattr(arrival, name)[:NUM_KEPT].clone() for name in names}
        self._rows.append(row | {"policy": arrival.obs["policy"][:NUM_KEPT].clone()})
        return arrival


def main() -> int:
    """Run the collector."""
    path = Path(sys.argv[sys.argv.index("--run-dir") + 1]) / "truth.pt"
    build = entry.build_simulator
    entry.build_simulator = lambda *args, **kwargs: Truthful(build(*args, **kwargs), path)
    return entry.main()


if __name__ == "__main__":
    ending.run(main)
