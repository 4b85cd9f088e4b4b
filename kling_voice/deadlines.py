"""Deadlines of calls in flight: one timer for all of them.

``asyncio.timeout`` sets and cancels a timer for each block, though nearly every call ends long
before its deadline. Here the timer is set for the first deadline only, and set again when it
fires: hardly ever.
"""

import asyncio
from types import TracebackType
from typing import Self


class Deadlines:
    """Ends the calls whose time is up, and all of them when the client closes."""

    def __init__(self) -> None:
        self._running: dict[_Deadline, float] = {}  # until when, by the event loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._fires = 0.0  # when the timer does: not every event loop's handles can tell

    def within(self, seconds: float) -> "_Deadline":
        """Give a context whose block ends with ``TimeoutError`` after so many seconds."""
        return _Deadline(self, seconds)

    def expire_all(self) -> None:
        """End every block now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for deadline in self._running:
            deadline.expire()

    def begin(self, deadline: "_Deadline", seconds: float) -> None:
        """Take a block in."""
        loop = asyncio.get_running_loop()
        moment = self._running[deadline] = loop.time() + seconds
        if self._timer is None or moment < self._fires:
            self._set_timer(moment)

    def end(self, deadline: "_Deadline") -> None:
        """Let a block go; the timer stays, and fires for nothing, once."""
        del self._running[deadline]

    def _set_timer(self, moment: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(moment, self._fire)
        self._fires = moment

    def _fire(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer = None
        for deadline, moment in self._running.items():
            if moment <= now:
                deadline.expire()
        later = [moment for moment in self._running.values() if moment > now]
        if later:
            self._set_timer(min(later))


class _Deadline:
    """One block; it tells its own end from a cancellation as ``asyncio.timeout`` does."""

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_seconds", "_task")

    def __init__(self, deadlines: Deadlines, seconds: float) -> None:
        self._deadlines = deadlines
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._deadlines.begin(self, self._seconds)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._deadlines.end(self)
        if not self._expired:
            return
        # Someone else may have cancelled the task in the same moment: that goes first.
        ours = self._task.uncancel() <= self._cancelling
        if ours and isinstance(exc, asyncio.CancelledError):
            raise TimeoutError from exc

    def expire(self) -> None:
        """End the block: cancel the task that runs it."""
        if not self._expired:
            self._expired = True
            self._task.cancel()
