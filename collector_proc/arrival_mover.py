"""Moves the arrivals of a simulator in host memory to the GPU that the policy acts on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from collector_proc.simulators.base import Arrival


class ArrivalMover:
    """Moves arrivals to the acting device through page-locked host memory, so that the host need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._page_locked: dict[str, Tensor] = {}  # one buffer per entry of an arrival

    def move(self, arrival: Arrival) -> Arrival:
        """Return the arrival on the acting device; if it is there already, return it as it is.

        Call this once per tick, and only after the previous action has reached the host: by then the copies of the
        previous arrival are complete, and the page-locked buffers may be overwritten.
        """
        if arrival.reward.device.type == self._device.type:
            return arrival
        assert self._device.type == "cuda", (arrival.reward.device, self._device)
        flags = {name: getattr(arrival, name) for name in ("reward", "is_first", "is_last", "is_terminal")}
        flags |= {} if arrival.diverged is None else {"diverged": arrival.diverged}
        acting = None if arrival.acting_obs is None else self._move_all("acting_obs.", arrival.acting_obs)
        return replace(arrival, obs=self._move_all("obs.", arrival.obs), acting_obs=acting, **self._move_all("", flags))

    def _move_all(self, prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._move_entry(prefix + name, entry) for name, entry in entries.items()}

    def _move_entry(self, name: str, entry: Tensor) -> Tensor:
        if name not in self._page_locked:
            self._page_locked[name] = torch.empty_like(entry, pin_memory=True)
        return self._page_locked[name].copy_(entry).to(self._device, non_blocking=True)
