"""Laws of Isaac Lab's tasks, computed without the backend."""

from __future__ import annotations

import math

import torch


def cartpole_reward(obs: torch.Tensor, terminal: torch.Tensor) -> torch.Tensor:
    """Return the cart-pole's reward per second. Shapes: obs (..., 4), terminal (...) to (...)."""
    _, angle, speed, turn = obs.unbind(-1)
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    return 1 - 3 * terminal.float() - angle**2 - 0.01 * speed.abs() - 0.005 * turn.abs()


def shrink(image: torch.Tensor, size: int = 64) -> torch.Tensor:
    """Return an image in which each pixel is the mean of those pixels that it covers, even in part.

    Shapes: (H, W, C) to (size, size, C) float32.
    """
    height, width = image.shape[:2]

    def span(index: int, whole: int) -> slice:
        return slice(index * whole // size, -((-(index + 1) * whole) // size))

    rows = [
        torch.stack([image[span(y, height), span(x, width)].float().mean((0, 1)) for x in range(size)])
        for y in range(size)
    ]
    return torch.stack(rows)
