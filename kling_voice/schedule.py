"""When to look at a waiting task. Decisions only: no I/O, and no clock but the caller's."""

import random
from collections.abc import Hashable, Iterable
from heapq import heapify, heappop, heappush
from math import floor, inf
from typing import Final, Generic, TypeVar

from kling_voice.models import TaskStatus
from kling_voice.policies import PollingPolicy

NEVER: Final = inf
_BEATS = 8  # a tick; what cannot wait for a tick falls together at these
_LONGEST_BEAT = 0.1  # seconds
_WIDEST_JITTER = 0.9  # of a tick, so that ticks never change places
_GOLDEN = 0.6180339887498949  # its multiples, without their whole parts, are evenly spread
_SLACK = 100  # empty moments that are not worth a clearing up

T = TypeVar("T", bound=Hashable)


def advances(known: TaskStatus | None, told: TaskStatus) -> bool:
    """Tell whether *told* can follow *known*: a status never goes backwards, nor leaves an end."""
    if known is None or known is TaskStatus.SUBMITTED:
        return True
    return told is not TaskStatus.SUBMITTED and not known.is_terminal


class Schedule:
    """The polling schedule: tenacity's exponential intervals, laid on the client's shared ticks.

    Args:
        policy: The intervals.
        slow: Look only every ``policy.maximum``, since callbacks tell the end.
        seed: From 0 to 1, what tells this client's jitter from another's; random if not given.
    """

    def __init__(
        self, policy: PollingPolicy, *, slow: bool = False, seed: float | None = None
    ) -> None:
        # Here, since a program that never makes a client need not load tenacity.
        from tenacity import AsyncRetrying, RetryCallState, wait_exponential

        self._interval = wait_exponential(
            multiplier=policy.maximum if slow else policy.initial,
            exp_base=policy.multiplier,
            max=policy.maximum,
        )
        self._state = RetryCallState(AsyncRetrying(), None, (), {})
        self.period: float = min(policy.initial, policy.maximum)
        """Seconds between two ticks."""
        self.beat: float = min(self.period / _BEATS, _LONGEST_BEAT)
        """Seconds by which a look may be moved to share a read."""
        self._shift = min(policy.jitter, _WIDEST_JITTER) * self.period / 2
        self._seed = random.random() if seed is None else seed

    def interval(self, looks: int) -> float:
        """Give the seconds to wait after so many looks."""
        self._state.attempt_number = looks + 1
        return self._interval(self._state)

    def tick(self, now: float, target: float) -> float:
        """Give the shared tick nearest to *target* that is after *now*.

        Reads that fall due at the same tick are due at the very same moment.
        """
        number = max(round(target / self.period), floor(now / self.period))
        while (moment := self._moment(number)) <= now:
            number += 1
        return moment

    def _moment(self, number: int) -> float:
        # The jitter is a function of the number: to be the same for all, with nothing to remember.
        jitter = 2 * ((number * _GOLDEN + self._seed) % 1) - 1
        return number * self.period + jitter * self._shift

    def last_look(self, deadline: float, timeout: float, margin: float) -> float:
        """Give the latest moment at which a look can still end before the deadline.

        Args:
            deadline: When the wait ends.
            timeout: How long it lasts in all; at least three quarters of it are there to look.
            margin: How long a look may take.
        """
        if deadline == NEVER:
            return NEVER
        last = deadline - min(margin, timeout / 4)
        # Waits that began together end together: a little earlier, one read serves them all.
        return last if timeout < self.period else floor(last / self.beat) * self.beat

    def clip(self, now: float, due: float, last_looks: Iterable[float]) -> float:
        """Give the moment of a look that is due, or :data:`NEVER` if nobody has the time for it.

        Args:
            now: This moment.
            due: When the look is due.
            last_looks: The :meth:`last_look` of each one who waits for it.
        """
        left = [last for last in last_looks if last > now]
        return min(due, *left) if left else NEVER


class Agenda(Generic[T]):
    """Who is due when; each one once."""

    def __init__(self) -> None:
        self._moments: dict[T, float] = {}
        self._due: dict[float, dict[T, None]] = {}
        self._order: list[float] = []  # a heap of moments, some of which have become empty

    def __len__(self) -> int:
        return len(self._moments)

    @property
    def first(self) -> float:
        """The moment when someone is due, or :data:`NEVER`."""
        while self._order and self._order[0] not in self._due:
            heappop(self._order)
        return self._order[0] if self._order else NEVER

    def moment(self, who: T) -> float:
        """Give the moment when *who* is due, or :data:`NEVER`."""
        return self._moments.get(who, NEVER)

    def plan(self, who: T, moment: float) -> None:
        """Let *who* be due at *moment*, and then only; not at all if it is :data:`NEVER`."""
        self.drop(who)
        if moment == NEVER:
            return
        self._moments[who] = moment
        if moment not in self._due:
            self._due[moment] = {}
            heappush(self._order, moment)
            if len(self._order) > 2 * len(self._due) + _SLACK:
                self._order = list(self._due)
                heapify(self._order)
        self._due[moment][who] = None

    def drop(self, who: T) -> None:
        """Let *who* not be due any more."""
        moment = self._moments.pop(who, NEVER)
        if moment != NEVER:
            together = self._due[moment]
            del together[who]
            if not together:
                del self._due[moment]

    def take(self, now: float) -> list[T]:
        """Give all who are due by *now*, and let them not be due any more."""
        taken: list[T] = []
        while self._due and self.first <= now:
            taken += self._due.pop(heappop(self._order))
        for who in taken:
            del self._moments[who]
        return taken
