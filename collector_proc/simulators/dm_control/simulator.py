"""Backend `dm_control`: every task of the suite, stepped in worker processes or in the collector's process.

The observation is "policy", the task's observation dictionary flattened in its own order, or "pixels", a 64x64 image.
Arrivals are views of the tick's memory on the CPU, and valid until the next call.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
from typing import TYPE_CHECKING

from collector_proc.simulators.base import ActionRange, Arrival
from collector_proc.simulators.dm_control.environment import SuiteEnvironment, SuitePlan, run_tick
from collector_proc.simulators.dm_control.tick_buffer import TickBuffer, tick_bytes
from collector_proc.simulators.dm_control.workers import WorkerPool
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from shared.config import Settings


class LocalPool:
    """The environments of a WorkerPool without workers: they are stepped one after the other in this process."""

    def __init__(self, plan: SuitePlan, *, num_envs: int) -> None:
        if plan.from_pixels:
            load_triton()
        self._environments = [SuiteEnvironment(plan, index) for index in range(num_envs)]
        self.spec = StreamSpec(num_envs, self._environments[0].obs, self._environments[0].action_dim)
        self.tick = TickBuffer(self.spec, mmap.mmap(-1, tick_bytes(self.spec)))
        self.first_environment = self._environments[0]

    def run(self, *, reset: bool) -> None:
        """Step or reset every environment. Raises: SimulatorError."""
        run_tick(self._environments, self.tick, reset=reset)

    def close(self) -> None:
        """Free every environment."""
        for environment in self._environments:
            environment.close()
        self._environments.clear()


def load_triton() -> None:
    """Load Triton, which torch loads later, before the renderer.

    Mesa's software renderer and Triton each bring a version of LLVM. If Mesa's is loaded first, Triton crashes the
    process. The workers of a WorkerPool do not use torch, so only this process is affected.
    """
    with contextlib.suppress(ImportError):  # builds of torch for the CPU have no Triton
        importlib.import_module("triton._C.libtriton")


class DmControlSimulator:
    """max(1, collector.num_collectors) x env.n_parallel_envs environments, each with its own random numbers.

    The environments are on the CPU, even if the policy runs on a GPU.
    """

    device = "cpu"

    def __init__(self, settings: Settings, *, seed: int, device: str = "cpu", crash_dir: Path | None = None) -> None:
        """device and crash_dir have no effect: MuJoCo has no other device, and states that diverge are not written.

        Raises: SimulatorError if a worker or an environment does not start.
        """
        import torch

        env, workers = settings.env, settings.collector.num_collectors
        plan = SuitePlan(env.name, env.task, seed, env.frame_skip, env.from_pixels, env.grayscale, env.horizon)
        deadlines = settings.deadlines
        self._pool = (
            WorkerPool(
                plan,
                num_workers=workers,
                num_envs=env.n_parallel_envs,
                start_s=deadlines.start_s,
                step_s=deadlines.step_s,
            )
            if workers
            else LocalPool(plan, num_envs=env.n_parallel_envs)
        )
        self.spec, self.frames_per_step = self._pool.spec, env.frame_skip
        tick = self._pool.tick
        self._action = torch.from_numpy(tick.action)
        self._arrival = Arrival(
            obs={name: torch.from_numpy(entry) for name, entry in tick.obs.items()},
            reward=torch.from_numpy(tick.reward),
            is_first=torch.from_numpy(tick.is_first),
            is_last=torch.from_numpy(tick.is_last),
            is_terminal=torch.from_numpy(tick.is_terminal),
        )

    @property
    def first_environment(self) -> SuiteEnvironment:
        """Environment 0. No worker process may have it."""
        assert isinstance(self._pool, LocalPool), "collector.num_collectors is not 0"
        return self._pool.first_environment

    @property
    def action_range(self) -> ActionRange | None:
        """The actuators' values of the actions -1 and 1, or None if worker processes have the environments."""
        return self._pool.first_environment.action_range if isinstance(self._pool, LocalPool) else None

    @property
    def num_diverged(self) -> int:
        """The number of times that the physics diverged, in a step or at a reset."""
        return int(self._pool.tick.num_diverged.sum())

    def reset(self) -> Arrival:
        """Begin a new episode in every environment. Raises: SimulatorError."""
        self._pool.run(reset=True)
        return self._arrival

    def step(self, action: Tensor) -> Arrival:
        """Make one agent step in every environment. Shapes: action (E, A) in [-1, 1]. Raises: SimulatorError."""
        assert action.shape == self._action.shape, action.shape
        self._action.copy_(action.detach())
        self._pool.run(reset=False)
        return self._arrival

    def close(self) -> None:
        """End the workers and free every environment."""
        self._pool.close()
