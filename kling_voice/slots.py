"""The account's task slots, as one client learns them from what the vendor accepts and refuses.

The vendor limits the tasks in flight of an account, shared by all keys and processes, and tells
the limit to nobody: a create beyond it is refused with 1303 and costs nothing. So the window of
creates is opened fast until the first refusal; then each end of a task lets the next create go,
and now and then one more is tried, in case the account has grown or another process has left.

Whoever refills its slots at once would shut out a process that comes later. So a small part of
the slots' time is left to others, in pieces as long as their knocks are apart; a larger part once
their presence has shown. What is left grows with what one holds, what one tries does not: so the
shares of all who are there drift towards each other.
Source: the vendor's page "concurrency-rules", autumn 2026.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable

from kling_voice.errors import ClientClosedError

_log = logging.getLogger("kling_voice")

Uniform = Callable[[float, float], float]

_OPENING = 4  # creates at once before anything is known
_GROWTH = 1.25  # creates that an accepted one lets go while the window opens
_TASK_SECONDS = 10.0  # a task's life before one has ended
_FIRST_PROBE = 2.0  # lives of a task before one more create is tried than fits the window
_LAST_PROBE = 8.0
_GROWN = 1.2  # times the size before: then the account has really more room
_LONGEST_PROBE = 120.0  # seconds, since tasks may be long
_FIRST_BACKOFF = 1.0  # seconds; the vendor asks for an exponential backoff from 1 s
_LONGEST_BACKOFF = 2.0  # after a 1303 with nothing in flight: who knocks seldom is shut out
_LONGEST_SLOWDOWN = 16.0  # after a 1302
_LONGEST_ASKED = 300.0  # seconds that the vendor may ask for at once
_SPREAD = 1.2  # a backoff is up to so many times as long, at random
_LEFT_PIECE = 3.0  # seconds for which a slot is left to others: longer than a backoff
_LEFT_SHARE = 0.002  # of the slots' time
_LEFT_OF_FEW = 0.01  # of the time of one slot, where there are so few that this is more
_CONTESTED_PIECE = 2.0  # lives of a task, since others try one more as seldom as that
_CONTESTED_SHARE = 0.05
_ALONE = 3  # slots in a row that nobody took: the others have gone


class Window:
    """How many slots may be held at once: the decisions, without any waiting.

    Attributes:
        learned: Whether the vendor has ever refused, so that ``size`` is more than a guess.
        contested: Whether others have lately taken slots of the account.
        task_seconds: How long a task lives, smoothed.
    """

    def __init__(self) -> None:
        self.learned: bool = False
        self.contested: bool = False
        self.task_seconds: float = _TASK_SECONDS
        self._room = float(_OPENING)
        self._growing = True
        self._probing = False
        self._settled_at = 0.0  # the last refusal or probe
        self._probe_lives = _FIRST_PROBE
        self._proven = 0  # the size before it was tried to grow; nothing yet
        self._any_ended = False
        self._owed = 0.0  # seconds of a slot's time that are to be left to others
        self._left_until: float | None = None  # one slot is left; then it is seen if it was taken
        self._untaken = 0

    @property
    def size(self) -> int:
        """So many slots may be held."""
        return int(self._room)

    def allows(self, held: int, now: float) -> bool:
        """Tell whether one more slot may be taken when so many are held."""
        if self._left_until is not None and now < self._left_until:
            return held < self.size - 1
        if held < self.size:
            return True
        return held == self.size and self.learned and not self._probing and now >= self._probe_at()

    def wakes_at(self, now: float) -> float:
        """Give the moment at which time alone may allow one more."""
        if self._left_until is not None and now < self._left_until:
            return self._left_until
        return self._probe_at()

    def _probe_at(self) -> float:
        lives = _FIRST_PROBE if self.contested else self._probe_lives
        return self._settled_at + min(_LONGEST_PROBE, lives * self.task_seconds)

    def taken(self, held: int, now: float) -> bool:
        """Note that a slot was taken, so that so many are held.

        Tells whether it will tell of the limit if a create in it is accepted: a refill will not.
        """
        if held > self.size:  # a probe: it widens the window until the vendor has its say
            self._proven = self.size
            self._room = held
            self._probing = True
            self._settled_at = now
        return held > self._proven or (self._left_until is not None and held == self.size)

    def found(self, held: int) -> None:
        """Note that one more task was found to be in flight, so that so many slots are held."""
        self._room = max(self._room, held if self.learned else held + _OPENING)
        self._proven = max(self._proven, held if self.learned else 0)

    def accepted(self, held: int, now: float, *, telling: bool) -> None:
        """Note that the vendor accepted a create, while so many slots are held.

        Args:
            held: So many.
            now: This moment.
            telling: What :meth:`taken` said of the create's slot.
        """
        if not telling:
            return
        if self._left_until is not None and now >= self._left_until:  # nobody has taken it
            self._left_until = None
            self._untaken += 1
            self.contested = self.contested and self._untaken < _ALONE
            return
        if self._probing:
            self._probing = False
            self._growing = True  # there was room for one: look for more at once
        if self._growing and held * 2 > self._room:  # a window that is not used tells nothing
            self._room += _GROWTH

    def refused(self, held: int, now: float) -> None:
        """Note a 1303, when so many slots are held by others than the refused create."""
        left = self._left_until is not None and now >= self._left_until
        settled = self.learned and now - self._settled_at > 1.5 * self.task_seconds
        if held == 0 or left or (settled and not self._probing):  # it was there, and is taken
            self.contested = True
            self._untaken = 0
        if left:
            self._left_until = None
        if self.learned and (self._probing or self._growing):
            if held > _GROWN * self._proven + 1:
                self._probe_lives = _FIRST_PROBE
            else:  # in vain, or into the place of a task whose end was not seen yet
                self._probe_lives = min(_LAST_PROBE, self._probe_lives * 2)
        self._room = self._proven = max(1, held)
        self.learned = True
        self._growing = self._probing = False
        self._settled_at = now

    def abandoned(self) -> None:
        """Note that a create came to nothing that would tell of the limit."""
        self._probing = False

    def ended(self, seconds: float, now: float) -> None:
        """Note the end of a task that lived so long."""
        self.task_seconds += (seconds - self.task_seconds) / (8 if self._any_ended else 1)
        self._any_ended = True
        if not self.learned or self._left_until is not None:
            return
        if self.contested:
            share, piece = _CONTESTED_SHARE, max(_LEFT_PIECE, _CONTESTED_PIECE * self.task_seconds)
        else:
            share, piece = max(_LEFT_SHARE, _LEFT_OF_FEW / self.size), _LEFT_PIECE
        self._owed += seconds * share
        if self._owed >= piece:
            self._owed = 0.0
            self._left_until = now + piece


class _Backoff:
    """Seconds that double with each refusal in a row."""

    def __init__(self, longest: float, uniform: Uniform) -> None:
        self._longest = longest
        self._uniform = uniform
        self.reset()

    def reset(self) -> None:
        """Begin anew, since something was accepted."""
        self._seconds = _FIRST_BACKOFF

    def next(self, asked: float | None) -> float:
        """Give the seconds to wait, which are those that the vendor asks for, if it does."""
        seconds, self._seconds = self._seconds, min(self._longest, self._seconds * 2)
        return min(asked, _LONGEST_ASKED) if asked else seconds * self._uniform(1.0, _SPREAD)


class Slots:
    """The slots of one client: who holds one, who waits for one, and when the next may go.

    Args:
        uniform: Gives a random number between two; for tests.
    """

    def __init__(self, *, uniform: Uniform = random.uniform) -> None:
        self._window = Window()
        self._held = 0
        self._queue: deque[asyncio.Future[bool]] = deque()
        self._resume_at = 0.0
        self._refusals = _Backoff(_LONGEST_BACKOFF, uniform)
        self._slowdowns = _Backoff(_LONGEST_SLOWDOWN, uniform)
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Slots in_flight={self.in_flight} limit={self.limit}>"

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

    async def acquire(self, *, first: bool = False) -> bool:
        """Wait for a slot and take it; gives what :meth:`accepted` will ask for.

        Args:
            first: Go before all others; for a create that was refused after it had its turn.

        Raises:
            ClientClosedError: The client is closed, or was meanwhile.
        """
        if self._closed:
            raise _closed()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if first:
            self._queue.appendleft(future)
        else:
            self._queue.append(future)
        self._grant()
        try:
            return await future
        except asyncio.CancelledError:
            if future in self._queue:
                self._queue.remove(future)
            elif not future.cancelled() and future.exception() is None:
                self.release()  # it was granted in the moment of the cancellation
            raise

    def hold(self) -> None:
        """Take a slot for a task that is in flight already, whatever the window says."""
        self._held += 1
        self._window.found(self._held)
        self._grant()

    def release(self, seconds: float | None = None) -> None:
        """Give a slot back, since its task has ended or its create came to nothing.

        Args:
            seconds: How long the task lived; ``None`` if that is not known.
        """
        if seconds is None:
            self._window.abandoned()
        else:
            self._window.ended(seconds, _now())
        self._held -= 1
        self._grant()

    def accepted(self, telling: bool) -> None:
        """Note that the vendor accepted a create that has its slot.

        Args:
            telling: What :meth:`acquire` gave with the slot.
        """
        self._refusals.reset()
        self._slowdowns.reset()
        self._window.accepted(self._held, _now(), telling=telling)
        self._grant()

    def adopted(self) -> None:
        """Note that a create that has its slot was a duplicate: its task exists already."""
        self._window.abandoned()

    def refused(self, asked: float | None) -> None:
        """Give a slot back after the vendor refused its create with 1303.

        Args:
            asked: Seconds that the vendor asked to wait.
        """
        self._held -= 1
        self._window.refused(self._held, _now())
        if self._held == 0:  # else the next end of a task lets the next create go
            self._pause("Every task slot of the account is taken", self._refusals.next(asked))
        self._grant()

    def slow_down(self, asked: float | None) -> None:
        """Give a slot back after a 1302, and let nobody create for a while.

        Args:
            asked: Seconds that the vendor asked to wait.
        """
        self._held -= 1
        self._window.abandoned()
        if _now() >= self._resume_at or asked:  # many refusals at once are one
            self._pause("The vendor finds the requests too many", self._slowdowns.next(asked))
        self._grant()

    def _pause(self, why: str, seconds: float) -> None:
        _log.info("%s; the next create goes in %.1f s", why, seconds)
        self._resume_at = max(self._resume_at, _now() + seconds)

    def _grant(self) -> None:
        """Let those go first in the queue who may go now; wake up for the others."""
        now = _now()
        while self._queue and now >= self._resume_at and self._window.allows(self._held, now):
            future = self._queue.popleft()
            if not future.done():
                self._held += 1
                future.set_result(self._window.taken(self._held, now))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue:
            wake = self._resume_at if now < self._resume_at else self._window.wakes_at(now)
            if wake > now:
                self._timer = asyncio.get_running_loop().call_at(wake, self._grant)

    def close(self) -> None:
        """End every wait for a slot with :class:`ClientClosedError`."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            future = self._queue.popleft()
            if not future.done():
                future.set_exception(_closed())


def _closed() -> ClientClosedError:
    return ClientClosedError("The client was closed while a create waited for a slot.")


def _now() -> float:
    return asyncio.get_running_loop().time()
