"""The account's task slots, as one client learns them from what the vendor accepts and refuses.

The vendor limits the tasks in flight of an account, shared by all keys and processes, and tells
the limit to nobody: a create beyond it is refused with 1303 and costs nothing. So the window of
creates is opened fast until the first refusal; then each end of a task lets the next create go,
and now and then one more is tried, in case the account has grown or another process has left.
Source: the vendor's page "concurrency-rules", autumn 2026.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable

from kling_voice.errors import ClientClosedError

log = logging.getLogger("kling_voice")

_OPENING = 4  # creates at once before anything is known
_FIRST_PROBE = 2  # ends of tasks, for each slot, before one more is tried
_LAST_PROBE = 32
_PROBE_SECONDS = 10.0  # time passing may let one try too: our own tasks may be long
_LONGEST_PROBE_SECONDS = 120.0
_FIRST_BACKOFF = 1.0  # the vendor asks for an exponential backoff from 1 s
_LONGEST_BACKOFF = 8.0
_COURTESY_EVERY = 8  # ends of tasks, for each slot, between two pauses for the sake of others
_COURTESY_SHARE = 0.15  # of a task's life
_LONGEST_COURTESY = 1.2  # seconds


class Window:
    """How many slots may be held at once: the decisions, without any waiting.

    Attributes:
        size: So many may be held.
        learned: Whether the vendor has ever refused, so that ``size`` is more than a guess.
    """

    def __init__(self) -> None:
        self.size = _OPENING
        self.learned = False
        self._growing = True
        self._probing = False
        self._ends = 0  # since the last probe or refusal
        self._probe_ends = _FIRST_PROBE
        self._probe_seconds = _PROBE_SECONDS
        self._probed_at = 0.0
        self._ends_since_courtesy = 0

    def allows(self, held: int, now: float) -> bool:
        """Tell whether one more slot may be taken when so many are held."""
        return held < self.size or (held == self.size and self._may_probe(now))

    def probe_at(self) -> float:
        """Give the moment from which time alone allows a probe."""
        return self._probed_at + self._probe_seconds

    def _may_probe(self, now: float) -> bool:
        if not self.learned or self._probing:
            return False
        return self._ends >= self._probe_ends * self.size or now >= self.probe_at()

    def taken(self, held: int, now: float) -> None:
        """Note that a slot was taken, so that so many are held."""
        if held > self.size:  # a probe: it widens the window until the vendor has its say
            self.size = held
            self._probing = True
            self._ends = 0
            self._probed_at = now

    def accepted(self, held: int) -> None:
        """Note that the vendor accepted a create, while so many slots are held."""
        if self._probing:
            self._probing = False
            self._growing = True  # there was room for one: look for more at once
            self._probe_ends = max(_FIRST_PROBE, self._probe_ends // 2)
            self._probe_seconds = _PROBE_SECONDS
        if self._growing and held * 2 > self.size:  # a window that is not used tells nothing
            self.size += 1

    def refused(self, held: int, now: float) -> None:
        """Note a 1303, when so many slots are held by others than the refused create."""
        if self._probing or not self._growing:
            self._probe_ends = min(_LAST_PROBE, self._probe_ends * 2)
            self._probe_seconds = min(_LONGEST_PROBE_SECONDS, self._probe_seconds * 2)
        self.size = max(1, held)
        self.learned = True
        self._growing = self._probing = False
        self._ends = 0
        self._probed_at = now

    def abandoned(self) -> None:
        """Note that a create came to nothing, for reasons that tell nothing of the limit."""
        self._probing = False

    def ended(self) -> bool:
        """Note the end of a task; tell whether it is time for a pause for the sake of others."""
        self._ends += 1
        self._ends_since_courtesy += 1
        if self.learned and self._ends_since_courtesy >= _COURTESY_EVERY * self.size:
            self._ends_since_courtesy = 0
            return True
        return False


class Slots:
    """The slots of one client: who holds one, who waits for one, and when the next may go.

    Args:
        uniform: Gives a random number between two; for tests.
    """

    def __init__(self, *, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._window = Window()
        self._held = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._resume_at = 0.0
        self._backoff = _FIRST_BACKOFF
        self._task_seconds = 0.0  # smoothed
        self._timer: asyncio.TimerHandle | None = None
        self._uniform = uniform

    @property
    def limit(self) -> int | None:
        """The account's limit as learned so far; ``None`` before the first refusal."""
        return self._window.size if self._window.learned else None

    @property
    def window(self) -> int:
        """How many tasks may be in flight at the moment."""
        return self._window.size

    @property
    def in_flight(self) -> int:
        """Slots held by this client: its tasks in flight and its creates under way."""
        return self._held

    async def acquire(self, *, first: bool = False) -> None:
        """Wait for a slot and take it.

        Args:
            first: Go before all others; for a create that was refused after it had its turn.
        """
        future = asyncio.get_running_loop().create_future()
        if first:
            self._queue.appendleft(future)
        else:
            self._queue.append(future)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give_back()  # it was granted in the moment of the cancellation
            elif future in self._queue:
                self._queue.remove(future)
            raise

    def hold(self) -> None:
        """Take a slot for a task that is in flight already, whatever the window says."""
        self._held += 1

    def release(self, seconds: float | None = None) -> None:
        """Give a slot back, since its task has ended or was never created.

        Args:
            seconds: How long the task lived; ``None`` if it was never created.
        """
        if seconds is None:
            self._window.abandoned()
        else:
            self._task_seconds += (seconds - self._task_seconds) / (8 if self._task_seconds else 1)
            if self._window.ended():
                self._pause(min(_LONGEST_COURTESY, _COURTESY_SHARE * self._task_seconds))
        self._give_back()

    def _give_back(self) -> None:
        self._held -= 1
        self._grant()

    def accepted(self) -> None:
        """Note that the vendor accepted a create that has its slot."""
        self._backoff = _FIRST_BACKOFF
        self._window.accepted(self._held)
        self._grant()

    def refused(self, asked: float | None) -> None:
        """Give a slot back after the vendor refused its create with 1303.

        Args:
            asked: Seconds that the vendor asked to wait.
        """
        self._held -= 1
        self._window.refused(self._held, _now())
        if self._held == 0:
            self._back_off(asked)
        self._grant()

    def slow_down(self, asked: float | None) -> None:
        """Give a slot back after a 1302, and let nobody create for a while."""
        self._held -= 1
        self._back_off(asked)
        self._grant()

    def _back_off(self, asked: float | None) -> None:
        if asked is None:
            asked = self._backoff * self._uniform(1.0, 1.25)
            self._backoff = min(_LONGEST_BACKOFF, self._backoff * 2)
        log.info("The account's slots are taken; the next create goes in %.1f s", asked)
        self._pause(asked)

    def _pause(self, seconds: float) -> None:
        self._resume_at = max(self._resume_at, _now() + seconds)

    def _grant(self) -> None:
        """Let those go first in the queue who may go now; wake up for the others."""
        now = _now()
        while self._queue and now >= self._resume_at and self._window.allows(self._held, now):
            future = self._queue.popleft()
            if not future.done():
                self._held += 1
                self._window.taken(self._held, now)
                future.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue:
            wake = self._resume_at if now < self._resume_at else self._window.probe_at()
            if wake > now:
                self._timer = asyncio.get_running_loop().call_at(wake, self._grant)

    def close(self) -> None:
        """End every wait for a slot with :class:`ClientClosedError`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            future = self._queue.popleft()
            if not future.done():
                future.set_exception(
                    ClientClosedError("The client was closed while a create waited for a slot.")
                )


def _now() -> float:
    return asyncio.get_running_loop().time()
