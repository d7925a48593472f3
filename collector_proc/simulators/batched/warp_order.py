"""Order the work of a simulator that runs on Warp with the work of torch. This file imports torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def warp_order(device: torch.device) -> Iterator[None]:
    """Run the code inside on torch's default stream, because Warp synchronises its own stream with that one only.

    The default stream first waits for the stream that was current, and that stream afterwards waits for the result.
    """
    if device.type != "cuda":
        yield
        return
    outer, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if outer == default:
        yield
        return
    default.wait_stream(outer)
    with torch.cuda.stream(default):
        yield
    outer.wait_stream(default)
