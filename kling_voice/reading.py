"""How to ask for the states of tasks: patience, pauses, and the use of the list. No I/O."""

from collections.abc import Callable
from math import inf
from typing import Final

from kling_voice.models import TaskStatus
from kling_voice.protocol import PAGE_SIZES, smaller_page
from kling_voice.schedule import advances

MERGE: Final = 3  # so many tasks that are due together are worth a list page
ITEMS: Final = 50  # so many listed tasks cost about as much as one single query
_ROOM = 1.25  # a page is asked this much larger than it needed to be last time
_DEEPER = 4  # and this much after it was of no use
_MEMORY = 16  # ticks for which it is remembered how deep the awaited tasks were
_FORGIVEN = 1  # passing failures of the list in a row
_LONGEST_REST = 64  # ticks; after so long a useless list is tried again
_LISTS_PER_CALL = 4  # so rarely is it checked that lists are not frozen,
_SHOWN_PER_WITNESS = 100  # by one single query for so many tasks that they show unchanged
_BEHIND = 5.0  # seconds that a list may be behind what was told otherwise, and still be of use
_WITNESSES = 1024  # states that were told otherwise

_FIRST_GUESS = 0.1  # seconds that a read takes
_SHORTEST_PATIENCE = 3.0  # seconds
_LONGEST_PATIENCE = 10.0
_SMALLEST_MARGIN = 0.05

_FAILURES = 8  # passing ones in a row, and the vendor is left alone for a while
_LONGEST_PAUSE = 60.0  # seconds that the vendor may ask for


class Patience:
    """How long to wait for a read, learned from how long the others took."""

    def __init__(self) -> None:
        self._usual = _FIRST_GUESS

    @property
    def limit(self) -> float:
        """Seconds after which a read is given up: a stalled one blinds those who wait for it."""
        return min(_LONGEST_PATIENCE, max(_SHORTEST_PATIENCE, 10 * self._usual))

    @property
    def margin(self) -> float:
        """Seconds within which a read should surely end."""
        return min(self.limit, max(_SMALLEST_MARGIN, 2 * self._usual))

    def took(self, seconds: float) -> None:
        """Note how long a read took."""
        self._usual += (seconds - self._usual) / 4

    def gave_up(self) -> None:
        """Note that a read was given up: perhaps it was only slow."""
        self._usual += (self.limit - self._usual) / 8


class Pauses:
    """When to ask nothing at all, since the vendor is in trouble or has asked for it.

    Args:
        interval: Gives the length of the n-th pause (from 0) in a row, in seconds.
    """

    def __init__(self, interval: Callable[[int], float]) -> None:
        self.until: float = -inf
        """The moment when asking may go on."""
        self.failures: int = 0
        """Passing failures since the last answer."""
        self._interval = interval

    def answered(self) -> None:
        """Note that the vendor answers."""
        self.failures = 0

    def failed(self, now: float, *, asked: float | None, limited: bool) -> None:
        """Note a failure that passes.

        Args:
            now: This moment.
            asked: The seconds that the answer asks to wait, if it does.
            limited: Whether it was "too many requests".
        """
        self.failures += 1
        forgiven = 0 if limited else _FAILURES - 1
        if asked is not None:
            self._pause(now, min(asked, _LONGEST_PAUSE))
        elif self.failures > forgiven:
            self._pause(now, self._interval(self.failures - forgiven - 1))

    def _pause(self, now: float, seconds: float) -> None:
        self.until = max(self.until, now + seconds)


class Witnesses:
    """What was told otherwise than by the list: a list that goes on denying it is frozen.

    A cache or a proxy may answer a list for ever with what it was once.
    """

    def __init__(self) -> None:
        self._told: dict[str, tuple[TaskStatus, float]] = {}  # by task_id, the oldest first
        self._uncalled = _LISTS_PER_CALL  # lists since witnesses were called

    def note(self, task_id: str, status: TaskStatus, now: float) -> None:
        """Note a state that a query or a callback told; the first one proves nothing."""
        if status is TaskStatus.SUBMITTED:
            return
        known = self._told.get(task_id)
        if known is not None and (known[0] == status or not advances(known[0], status)):
            return
        self._told.pop(task_id, None)
        if len(self._told) >= _WITNESSES:
            del self._told[next(iter(self._told))]
        self._told[task_id] = status, now

    def call(self, unchanged: int) -> int:
        """Tell how many of so many tasks that a list shows unchanged are to be queried alone."""
        self._uncalled += unchanged > 0
        if self._uncalled <= _LISTS_PER_CALL:
            return 0
        self._uncalled = 1
        return -(-unchanged // _SHOWN_PER_WITNESS)

    def refute(self, task_id: object, status: object, asked: float) -> bool:
        """Tell whether a list that was asked for at that moment shows what was long over then.

        Args:
            task_id: A raw item's.
            status: A raw item's.
            asked: When the list was asked for.
        """
        known = self._told.get(task_id) if type(task_id) is str else None
        if known is None or asked - known[1] <= _BEHIND:
            return False
        over_then = status == TaskStatus.PROCESSING and known[0].is_terminal
        return over_then or status == TaskStatus.SUBMITTED


class ListUse:
    """Whether and how to ask the list; learned from what it showed so far.

    The order of the list is not documented: all that counts is how far from its front the awaited
    tasks are. A page is worth its price if one task in :data:`ITEMS` on it is waited for.
    """

    def __init__(self, period: float) -> None:
        self._period = period  # seconds between two ticks
        self._cap = PAGE_SIZES[0]
        self._depth = 0  # so many tasks had to be read last time
        self._known_until = -inf
        self._strikes = 0
        self._failures = 0
        self._rests_until = -inf

    def is_worth(self, now: float, due: int, awaited: int) -> bool:
        """Tell whether so many tasks that are due are better read from the list."""
        if now >= self._known_until:
            self._depth = 0
        return now >= self._rests_until and due >= MERGE and due * ITEMS >= self.page_size(awaited)

    def page_size(self, awaited: int) -> int:
        """Give the page size that should show all of so many awaited tasks at once."""
        needed = max(awaited, self._depth)
        return min(self._cap, max(PAGE_SIZES[-1], int(needed * _ROOM)))

    def refused(self, page_size: int) -> bool:
        """Note that the server refuses this page size; tell whether a smaller one is left."""
        smaller = smaller_page(page_size)
        self._cap = smaller or PAGE_SIZES[0]  # if none will do, size was not the reason
        return smaller is not None

    def go_on(self, *, found: int, items: int, read: int, missing: int) -> bool:
        """Tell whether another page is worth a request.

        Args:
            found: Awaited tasks on this page.
            items: All tasks on this page.
            read: All tasks on all pages so far.
            missing: Tasks that are due and have not been shown yet.
        """
        promising = read < self._depth or found * ITEMS >= items
        return items > 0 and promising and missing >= MERGE and missing * ITEMS >= items

    def learn(self, now: float, *, found: int, items: int, depth: int) -> None:
        """Note how the list served.

        Args:
            now: This moment.
            found: Awaited tasks that it showed.
            items: All tasks that it showed.
            depth: How many it showed until the last awaited one.
        """
        self._failures = 0
        if found > 0 and found * ITEMS >= items:
            self._strikes = 0
            self._remember(now, depth)
        else:
            self._remember(self._rest(now), items * _DEEPER)

    def failed(self, now: float, *, for_good: bool) -> None:
        """Note that the list could not be read; once, a passing failure is forgiven."""
        self._failures += 1
        if for_good or self._failures > _FORGIVEN:
            self._failures = 0
            self._rest(now)

    def _remember(self, since: float, depth: int) -> None:
        self._depth = depth
        self._known_until = since + self._period * _MEMORY

    def _rest(self, now: float) -> float:
        """Leave the list alone, longer each time; tell until when."""
        self._strikes += 1
        self._rests_until = now + self._period * min(_LONGEST_REST, 2**self._strikes)
        return self._rests_until
