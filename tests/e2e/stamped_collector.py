"""The real collector with a pendulum whose rows are stamped with their incarnation, environment and tick.

Run as `python stamped_collector.py --run-dir DIR --incarnation N`, like `python -m collector_proc`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import collector_proc.__main__ as entry
from shared.stream import ObsSpec, StreamSpec


class Stamped:
    """A pendulum with one more observation entry, "stamp" (E, 3): incarnation, environment, tick."""

    def __init__(self, simulator, incarnation: int) -> None:
        self._simulator, self._incarnation, self._tick = simulator, incarnation, -1
        obs = simulator.spec.obs | {"stamp": ObsSpec((3,), "float32")}
        self.spec = StreamSpec(simulator.spec.num_envs, obs, simulator.spec.action_dim)
        self.device, self.frames_per_step = simulator.device, simulator.frames_per_step
        self.num_diverged = 0

    def reset(self):
        return self._stamp(self._simulator.reset())

    def step(self, action):
        return self._stamp(self._simulator.step(action))

    def close(self) -> None:
        self._simulator.close()

    def _stamp(self, arrival):
        import torch

        self._tick += 1
        stamp = torch.empty(self.spec.num_envs, 3)
        stamp[:, 0], stamp[:, 1], stamp[:, 2] = self._incarnation, torch.arange(self.spec.num_envs), self._tick
        return replace(arrival, obs={**arrival.obs, "stamp": stamp})


def main() -> int:
    """Run the collector."""
    incarnation = int(sys.argv[sys.argv.index("--incarnation") + 1])
    build = entry.build_simulator
    entry.build_simulator = lambda *args, **kwargs: Stamped(build(*args, **kwargs), incarnation)
    return entry.main()


if __name__ == "__main__":
    sys.exit(main())
