"""Suggestions for words that a user may have misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SUGGESTIONS = 8
CUTOFF = 0.6  # of difflib's similarity, from 0 (nothing in common) to 1 (equal)


def nearest(word: str, valid: Iterable[str], *, cutoff: float = CUTOFF) -> list[str]:
    """Return the valid words that are similar to `word`, the most similar first; empty if none is similar enough."""
    return difflib.get_close_matches(word, sorted(set(valid)), n=MAX_SUGGESTIONS, cutoff=cutoff)
