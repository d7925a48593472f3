"""The acting step as one CUDA graph: the host launches one graph per tick instead of about a hundred small kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.model.capture import capture
from shared.model.rssm import Belief

if TYPE_CHECKING:
    from shared.stream import StreamSpec

Act = Callable[[dict[str, Tensor], Belief, Tensor, Tensor], tuple[Tensor, Belief]]


def captured(
    step: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Callable[[], object]:
    """Return a function that launches the step as one CUDA graph. Runs the step several times first.

    generators: those that the step draws from.
    """
    launch, _ = capture(step, device, shared_process=True, generators=generators)
    return launch


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
