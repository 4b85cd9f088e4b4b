"""When to look at a waiting task, and how: by a list page or alone. Decisions only, no I/O."""

import random
from collections.abc import Callable, Iterable

from tenacity import AsyncRetrying, RetryCallState, wait_exponential

from kling_voice.models import TaskStatus
from kling_voice.policies import PollingPolicy
from kling_voice.protocol import PAGE_SIZES, PAGES, smaller_page

MERGE = 3  # so many reads due together are one list page; fewer are single queries
NEVER = float("inf")
_SMALLEST_PAGE = PAGE_SIZES[-1]
_ROOM = 1.25  # a page is asked this much larger than what is looked for reached last time
_LONGEST_LIST_REST = 64  # ticks; after so long a useless list is tried again


def advances(known: TaskStatus | None, told: TaskStatus) -> bool:
    """Tell whether *told* can follow *known*: a status never goes backwards, nor leaves an end."""
    return known is None or (not known.is_terminal and _rank(told) >= _rank(known))


def _rank(status: TaskStatus) -> int:
    if status.is_terminal:
        return 2
    return 0 if status is TaskStatus.SUBMITTED else 1


class Schedule:
    """The polling schedule: tenacity's exponential intervals, laid on the client's shared ticks.

    Args:
        policy: The intervals.
        slow: Look only every ``policy.maximum``, since callbacks tell the end.
        uniform: Gives a random number between two; for tests.
    """

    def __init__(
        self,
        policy: PollingPolicy,
        *,
        slow: bool = False,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._interval = wait_exponential(
            multiplier=policy.maximum if slow else policy.initial,
            exp_base=policy.multiplier,
            max=policy.maximum,
        )
        self._state = RetryCallState(AsyncRetrying(), None, (), {})
        self._period = min(policy.initial, policy.maximum)
        self._shift = min(policy.jitter, 0.9) * self._period / 2
        self._uniform = uniform
        self._ticks: dict[int, float] = {}

    @property
    def period(self) -> float:
        """Seconds between two ticks."""
        return self._period

    def interval(self, looks: int) -> float:
        """Give the seconds to wait after so many looks."""
        self._state.attempt_number = looks + 1
        return self._interval(self._state)

    def tick(self, now: float, target: float) -> float:
        """Give the shared tick nearest to *target* that is after *now*.

        Reads that fall due at the same tick are due at the very same moment.
        """
        number = max(round(target / self._period), int(now / self._period))
        while (moment := self._moment(number)) <= now:
            number += 1
        if len(self._ticks) > 1000:
            self._ticks = {n: at for n, at in self._ticks.items() if at > now}
        return moment

    def _moment(self, number: int) -> float:
        if (moment := self._ticks.get(number)) is None:
            moment = number * self._period + self._uniform(-self._shift, self._shift)
            self._ticks[number] = moment
        return moment

    def next_look(self, now: float, looks: int, last_looks: Iterable[float]) -> float:
        """Give the moment of the next look at a task, or :data:`NEVER`.

        Args:
            now: This moment.
            looks: How often it has been looked at.
            last_looks: For each one who waits, the latest moment at which a look can still end
                before the deadline.
        """
        due = self.tick(now, now + self.interval(looks))
        wanted = False
        for last in last_looks:
            if due <= last:
                wanted = True
            elif last > now:
                due, wanted = last, True
        return due if wanted else NEVER


class ListUse:
    """Whether and how to ask the list; learned from what it showed so far."""

    def __init__(self) -> None:
        self.cap = PAGE_SIZES[0]
        self._depth = 0
        self._strikes = 0
        self._failures = 0
        self._rest_until = -NEVER

    def is_worth(self, now: float, due: int) -> bool:
        """Tell whether so many reads that are due now are better answered from the list."""
        return due >= MERGE and now >= self._rest_until

    def page_size(self, waiting: int) -> int:
        """Give the page size that should show all of so many waiting tasks at once."""
        wanted = int(max(waiting, self._depth) * _ROOM)
        return min(self.cap, max(_SMALLEST_PAGE, wanted))

    def refused(self, page_size: int) -> bool:
        """Note that the server refuses this page size; tell whether a smaller one is left."""
        smaller = smaller_page(page_size)
        if smaller is None:
            return False
        self.cap = smaller
        return True

    def go_on(self, found: int, missing: int, items: int, page_num: int) -> bool:
        """Tell whether the next page is worth a request after one that showed *found* of ours."""
        return items > 0 and found >= MERGE - 1 and missing >= MERGE and page_num < PAGES

    def learn(self, now: float, period: float, *, found: int, pages: int, depth: int) -> None:
        """Note how the list served: *found* of ours on so many pages, the deepest at *depth*."""
        self._failures = 0
        if found >= (MERGE - 1) * pages:
            self._strikes = 0
            self._depth = depth
        else:
            self._rest(now, period)

    def failed(self, now: float, period: float, *, for_good: bool) -> None:
        """Note that the list could not be read; a passing failure is forgiven a few times."""
        self._failures += 1
        if for_good or self._failures >= MERGE:
            self._failures = 0
            self._rest(now, period)

    def _rest(self, now: float, period: float) -> None:
        """Leave the list alone, longer each time."""
        self._strikes += 1
        self._rest_until = now + period * min(_LONGEST_LIST_REST, 2**self._strikes)
