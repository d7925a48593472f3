"""A module whose import fails."""

from __future__ import annotations

make = undefined  # noqa: F821 # pyright: ignore[reportUndefinedVariable]
