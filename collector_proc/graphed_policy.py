"""The acting step as one CUDA graph: the host launches one graph per tick instead of about a hundred small kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.model.rssm import Belief

if TYPE_CHECKING:
    from shared.stream import StreamSpec

Act = Callable[[dict[str, Tensor], Belief, Tensor, Tensor], tuple[Tensor, Belief]]
WARM_UPS = 3  # steps before capture: everything that is made lazily is there after two


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """The step as one CUDA graph, launched on whatever stream is current then. Runs the step a few times first."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    gc.collect()
    gc.disable()  # a finaliser that frees memory of the GPU would break the capture
    try:
        # thread_local: a simulator's own threads may allocate while this one captures
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    finally:
        gc.enable()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


class GraphedPolicy:
    """Runs `Policy.act` on fixed memory: it copies the inputs into buffers and updates `belief` in place.

    Weights that are adopted in place are used from the next call on. The constructor runs the step several times, and
    leaves the belief and the random states as they were.

    capture: turns a step into a function that runs it; the default captures a CUDA graph.
    """

    def __init__(
        self,
        act: Act,
        spec: StreamSpec,
        belief: Belief,
        *,
        capture: Callable[[Callable[[], None], torch.device], Callable[[], object]] = captured,
    ) -> None:
        device = belief.deter.device
        self._act, self._belief = act, belief
        self._obs = {
            name: torch.zeros(spec.num_envs, *entry.shape, dtype=getattr(torch, entry.dtype), device=device)
            for name, entry in spec.obs.items()
        }
        self._prev_action = torch.zeros(spec.num_envs, spec.action_dim, device=device)
        self._reset = torch.ones(spec.num_envs, dtype=torch.bool, device=device)
        self._action = torch.zeros_like(self._prev_action)
        initial = [part.clone() for part in belief]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._launch = capture(self._step, device)
        for part, value in zip(belief, initial, strict=True):
            part.copy_(value)

    def __call__(self, obs: dict[str, Tensor], prev_action: Tensor, reset: Tensor) -> Tensor:
        """Return the actions to execute (E, A), valid until the next call. The host does not block.

        Shapes: as in `Policy.act`.
        """
        for name, entry in self._obs.items():
            entry.copy_(obs[name], non_blocking=True)
        self._prev_action.copy_(prev_action, non_blocking=True)
        self._reset.copy_(reset, non_blocking=True)
        self._launch()
        return self._action

    def _step(self) -> None:
        action, belief = self._act(self._obs, self._belief, self._prev_action, self._reset)
        self._action.copy_(action)
        for part, new in zip(self._belief, belief, strict=True):
            part.copy_(new)
