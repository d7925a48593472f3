"""What happened to a run: restarts, warnings and the end. They are kept for summary.json, status and the hook."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

KEPT = 50  # events that are remembered in detail


class Events:
    """Remembers the events of one launch and passes each of them on. `on_event` must return at once."""

    def __init__(self, on_event: Callable[[Mapping[str, Any]], None] = lambda event: None) -> None:
        self._on_event = on_event
        self._causes: dict[str, Counter[str]] = {"learner": Counter(), "collector": Counter()}
        self.newest: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.last_problem: dict[str, Any] | None = None

    def restart(self, role: str, cause: str, *, step: int | None = None, planned: bool = False) -> None:
        """A process has ended and another one takes its place. planned: it did not fail."""
        self._causes[role][cause] += 1
        self._add(
            "restart", f"{role}: {cause}", problem=not planned, role=role, cause=cause, planned=planned, step=step
        )

    def warning(self, text: str) -> None:
        """Something needs the user's attention."""
        self._add("warning", text, problem=True)

    def end(self, text: str, *, exit_code: int) -> None:
        """The run has ended."""
        self._add("end", text, problem=False, exit_code=exit_code)

    def causes(self, role: str) -> dict[str, int]:
        """Return how often a process was replaced for each cause, the most frequent first."""
        return dict(self._causes[role].most_common(KEPT))

    def _add(self, kind: str, text: str, *, problem: bool, **facts: Any) -> None:
        event = {"time": round(time.time(), 3), "event": kind, "text": text} | facts
        self.newest.append(event)
        if problem:
            self.last_problem = event
        self._on_event(event)
