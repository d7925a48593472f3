"""The memory limit collector.max_rss_gb: a collector that exceeds it ends, and launch starts the next one."""

from __future__ import annotations

from shared.errors import SettingError, SimulatorError
from shared.memory import MemoryMeter


class MemoryLimit:
    """Compares the memory of this process and its workers with the limit, once per chunk.

    limit_gb: None means no limit. incarnation: how many collectors of this run came before.
    """

    def __init__(self, meter: MemoryMeter, limit_gb: float | None, *, incarnation: int) -> None:
        self._meter, self._limit_gb, self._incarnation = meter, limit_gb, incarnation
        self._was_below = False  # after some chunk, the memory was within the limit
        self.held_gb = 0.0  # at the last check
        self.exceeded = False

    def check(self) -> bool:
        """Return whether this process is within the limit.

        Raises: an error if it exceeds the limit after its first chunk, because the next collector would do the same.
        This is a SettingError for the first collector of a run. It is a SimulatorError for a later one, because an
        earlier collector was within the limit.
        """
        # At the first check, measure again: an older measurement may be from before the first chunk's work.
        self.held_gb = self._meter.read(now=not self._was_below).rss_bytes / 1e9
        if self._limit_gb is None or self.held_gb <= self._limit_gb:
            self._was_below = True
            return True
        if not self._was_below:
            error = SettingError if self._incarnation == 0 else SimulatorError
            raise error(
                f"collector.max_rss_gb={self._limit_gb:g} is below the {self.held_gb:.2f} GB that the collector and "
                "its workers hold after one chunk; expected a limit with room to grow; "
                f"set collector.max_rss_gb={2 * self.held_gb:.1f}, or null for no limit"
            )
        self.exceeded = True
        return False
