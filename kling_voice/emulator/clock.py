"""The emulator's time: a clock for the tasks' lives, and a wall clock for what it tells."""

from __future__ import annotations

import threading
import time

__all__ = ["Clock"]


class Clock:
    """Two clocks that `advance` moves together; safe to use from any thread.

    Attributes:
        scale: emulator seconds in a real one, for the tasks' lives; 0 stops all but `advance`.
        skew: how far the wall clock is ahead of the real one, in seconds.
    """

    def __init__(self, *, scale: float = 1.0, skew: float = 0.0) -> None:
        if scale < 0:
            raise ValueError(f"time_scale must not be negative, got {scale}")
        self.scale = scale
        self.skew = skew
        self._started = time.monotonic()
        self._advanced = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """Emulator seconds since the start: the tasks live by this clock."""
        return (time.monotonic() - self._started) * self.scale + self._advanced

    def wall(self) -> float:
        """Unix seconds as the server believes them to be.

        The scale leaves this clock alone: a token signed by a client whose clock is right stays
        acceptable however fast the tasks live.
        """
        return time.time() + self.skew + self._advanced

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        if seconds < 0:
            raise ValueError(f"time only goes forward, got {seconds} seconds")
        with self._lock:
            self._advanced += seconds

    def real_seconds(self, seconds: float) -> float | None:
        """Real seconds in which so many emulator seconds pass; None if they never do."""
        return seconds / self.scale if self.scale else None

    def wall_at(self, earlier: float, earlier_wall: float, moment: float) -> float:
        """The wall clock at a past moment, from what it was at an earlier one."""
        span = moment - earlier
        return min(earlier_wall + (span / self.scale if self.scale else span), self.wall())
