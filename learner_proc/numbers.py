"""Numbers measured on the device, kept together with the metrics that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics import Metric


@dataclass(frozen=True)
class Numbers:
    """One vector on the device and the metric of each of its entries, in the same order.

    Shapes: values (len(metrics),) float32, detached.
    """

    metrics: tuple[Metric, ...]
    values: Tensor

    @staticmethod
    def of(named: Mapping[Metric, Tensor]) -> Numbers:
        """Join one scalar tensor per metric into one vector, with one kernel and without a host synchronisation."""
        return Numbers(tuple(named), torch.stack([value.detach().float() for value in named.values()]))

    @staticmethod
    def join(parts: Sequence[Numbers]) -> Numbers:
        """Join several vectors into one. A metric must not occur twice."""
        metrics = tuple(metric for part in parts for metric in part.metrics)
        assert len(set(metrics)) == len(metrics), metrics
        return Numbers(metrics, torch.cat([part.values for part in parts]))

    def to(self, device: torch.device) -> Numbers:
        """Return the same numbers on a device. Does not synchronise."""
        return Numbers(self.metrics, self.values.to(device, non_blocking=True))

    def to_host(self) -> dict[Metric, float]:
        """Return all numbers by their metric. Waits for the device."""
        return dict(zip(self.metrics, self.values.tolist(), strict=True))
