"""How the parts of a gradient step pass through torch.compile. No other file of the learner calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from shared.config import CompileSettings

# Fewer kernels. Without padded strides, a product reads an activation of (B, L, hidden) as rows, without a copy. The
# parts of a joined tensor are written in place by the kernel that computes them, instead of by one more kernel.
GPU_OPTIONS = {"comprehensive_padding": False, "max_pointwise_cat_inputs": 1, "max_complex_pointwise_cat_inputs": 1}

Function = TypeVar("Function", bound=Callable[..., Any])


def compiler(settings: CompileSettings, device: torch.device) -> Callable[[Function], Function]:
    """Return a function that wraps others in torch.compile as the settings ask, or that returns them as they are."""
    if not settings.enabled:
        return lambda function: function
    options: dict[str, Any] | None = None
    if settings.backend == "inductor":
        import torch._inductor.config as inductor
        from torch.hub import tqdm  # pyright: ignore[reportPrivateImportUsage]

        # Leave no thread or process behind: neither a pool of compile workers nor the monitor of a hidden progress bar.
        inductor.compile_threads = 1
        tqdm.monitor_interval = 0
        # On the CPU, a tenth of a step with small networks was Python between kernels. A CUDA graph has no such time.
        chosen = {"cpp_wrapper": device.type == "cpu", **(GPU_OPTIONS if device.type == "cuda" else {})}
        options = {name: value for name, value in chosen.items() if hasattr(inductor, name)}

    def compiled(function: Function) -> Function:
        made = torch.compile(function, fullgraph=True, dynamic=False, backend=settings.backend, options=options)
        return cast(Function, made)

    return compiled
