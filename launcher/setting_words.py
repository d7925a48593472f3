"""The type, the bounds and the value of a setting as text. Torch-free."""

from __future__ import annotations

import json
import re
from dataclasses import Field
from typing import Any

SMALLEST = 1e-5  # a minimum below this stands for "above 0"


def type_of(field: Field[Any]) -> str:
    """Return the type of a setting, such as "int or null"."""
    text = {"Any": "float or list[float]"}.get(str(field.type), str(field.type))
    optional = re.fullmatch(r"Optional\[(.*)\]", text)
    return f"{optional[1]} or null" if optional else text


def bounds_of(field: Field[Any]) -> str:
    """Return the choices or the bounds of a setting; empty if it has none."""
    low, high, choices = (field.metadata[name] for name in ("minimum", "maximum", "choices"))
    if choices:
        return f"one of {', '.join(choices)}"
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if low is not None and 0 < low < SMALLEST:
        return "above 0"
    return f"at least {low:g}" if low is not None else ""


def value_in_words(value: Any) -> str:
    """Return the value of a setting as YAML has it; a list or an empty text as JSON has it."""
    return value if isinstance(value, str) and value else json.dumps(value)
