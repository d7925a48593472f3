"""A plugin of pytest that turns torch's stream sanitizer on. It must be turned on after the fake GPU's operators."""

from __future__ import annotations

from torch.cuda._sanitizer import enable_cuda_sanitizer

enable_cuda_sanitizer()
