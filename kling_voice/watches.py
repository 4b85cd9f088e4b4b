"""Who waits for which task, and what is known of it. State only: no I/O, no clock."""

import asyncio
import copy
from collections.abc import Iterator

from kling_voice.errors import KlingError
from kling_voice.models import VoiceTask
from kling_voice.schedule import NEVER, advances


def follows(known: VoiceTask | None, told: VoiceTask) -> bool:
    """Tell whether a state is not older than the known one: a task never goes backwards."""
    if known is None:
        return True
    if not advances(known.task_status, told.task_status):
        return False
    if not advances(told.task_status, known.task_status):
        return True  # a step forward, whatever the clocks say
    if known.updated_at is None or told.updated_at is None:
        return True
    return told.updated_at >= known.updated_at


class Waiter:
    """One call that waits: what it knows, and what it has still to take in.

    Attributes:
        watch: What it waits with.
        last: The last state that it knows.
        eager: Whether it wants every change, or only the end.
        timeout: Seconds that it waits in all.
        began: When it began, by the event loop's clock.
        deadline: When it ends, by that clock.
        news: Changes to take in, in order.
        error: What to raise after that.
        expired: Whether its deadline has come.
    """

    __slots__ = (
        "_future",
        "began",
        "deadline",
        "eager",
        "error",
        "expired",
        "last",
        "news",
        "timeout",
        "watch",
    )

    watch: "Watch"

    def __init__(
        self,
        last: VoiceTask | None,
        *,
        eager: bool,
        timeout: float,
        deadline: float,
        began: float = 0.0,
    ) -> None:
        self.last = last
        self.eager: bool = eager
        self.timeout: float = timeout
        self.began: float = began
        self.deadline: float = deadline
        self.news: list[VoiceTask] = []
        self.error: BaseException | None = None
        self.expired: bool = False
        self._future: asyncio.Future[None] | None = None

    def tell(self, task: VoiceTask) -> None:
        """Take in a state, unless it is a step back."""
        if not follows(self.last, task):
            return
        known, self.last = self.last, task
        changes = known is None or known.task_status != task.task_status
        if changes and (self.eager or task.is_done):
            self.news.append(task)
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Let the call raise *error*, or a copy of it with a traceback of its own."""
        self.error = copy.copy(error) if isinstance(error, KlingError) else error
        self._wake()

    def expire(self) -> None:
        """Let the call take in what has come so far, and end."""
        self.expired = True
        self._wake()

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def woken(self) -> None:
        """Sleep until there is something to take in."""
        self._future = asyncio.get_running_loop().create_future()
        try:
            await self._future
        finally:
            self._future = None


class Watch:
    """A task that someone waits for.

    Attributes:
        ids: What it is known by; the first one is the one to ask by.
        seen: When its task was last told of, at first when the first one began to wait; by the
            event loop's clock.
        task: Its last known state.
        waiters: Those who wait for it.
        looks: How often it was looked at.
        looked: When the last look began.
        alone: Whether its task is said to have succeeded, so that a single query is to show its
            voices: a list page will not do.
        confirms: How often it was looked at for that.
        listed: How often in a row the list alone told of it, and no change.
        urgent: Whether a callback asks for a look; another one's list may be older than that.
        stumbled: Whether the last look failed.
        missed: Whether the vendor did not know it when it was last asked.
        look: The look that it is in the queue for, or that is under way.
        wanted: When it should be looked at again after that.
    """

    __slots__ = (
        "alone",
        "confirms",
        "ids",
        "listed",
        "look",
        "looked",
        "looks",
        "missed",
        "seen",
        "stumbled",
        "task",
        "urgent",
        "waiters",
        "wanted",
    )

    def __init__(self, task_id: str, now: float) -> None:
        self.ids: list[str] = [task_id]
        self.seen: float = now
        self.task: VoiceTask | None = None
        self.waiters: dict[Waiter, None] = {}
        self.looks: int = 0
        self.looked: float = -NEVER
        self.alone: bool = False
        self.confirms: int = 0
        self.listed: int = 0
        self.urgent: bool = False
        self.stumbled: bool = False
        self.missed: bool = False
        self.look: Look | None = None
        self.wanted: float = NEVER

    def join(self, waiter: Waiter) -> None:
        """Let someone wait for it."""
        self.waiters[waiter] = None
        waiter.watch = self

    def is_of_another(self, task_id: object) -> bool:
        """Tell whether it is surely not of the task with this ``task_id``."""
        known = self.task.task_id if self.task is not None else None
        return bool(known and task_id) and known != task_id

    def tell(self, task: VoiceTask) -> None:
        """Take in a state, and tell all who wait."""
        self.task = task
        self.listed = 0
        for waiter in self.waiters:
            waiter.tell(task)

    def absorb(self, other: "Watch") -> None:
        """Take over another watch, which has turned out to be of the same task."""
        self.seen = max(self.seen, other.seen)
        for waiter in other.waiters:
            self.join(waiter)
        if other.task is not None and follows(self.task, other.task):
            self.tell(other.task)
        elif self.task is not None:
            self.tell(self.task)


class Look:
    """A read for some watches; it ends when nobody waits for any of them.

    Attributes:
        serves: The watches that it has not answered yet.
        task: The asyncio task, once it has begun.
    """

    __slots__ = ("serves", "task")

    def __init__(self, watches: list[Watch], now: float) -> None:
        self.serves: dict[Watch, None] = dict.fromkeys(watches)
        self.task: asyncio.Task[None] | None = None
        for watch in watches:
            watch.look = self
            watch.looked = now
            watch.urgent = False

    def release(self, watch: Watch) -> None:
        """Serve a watch no longer."""
        del self.serves[watch]
        watch.look = None

    def drop(self, watch: Watch) -> None:
        """Serve a watch no longer, since nobody waits for it; the last one ends the read."""
        self.release(watch)
        if not self.serves and self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


class Watches:
    """All the tasks that someone waits for.

    One task's external id may be another's ``task_id``: then the id is the other one's, and what is
    of the one task never goes to the watch of the other.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, Watch] = {}  # by either kind of id
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Watch]:
        return iter(list(dict.fromkeys(self._by_id.values())))

    def find(self, task_id: object, external_task_id: object = None) -> Watch | None:
        """Give the watch of the task that bears these ids, if there is one."""
        for one in (task_id, external_task_id):
            if (
                isinstance(one, str)
                and (watch := self._by_id.get(one)) is not None
                and not watch.is_of_another(task_id)
            ):
                return watch
        return None

    def open(self, task_id: str, now: float, *, certain: bool = False) -> Watch:
        """Give the watch of a task, a new one if there is none.

        Args:
            task_id: Either id of it.
            now: This moment.
            certain: Whether that is its ``task_id``.
        """
        if certain:
            self._claim(task_id)
        watch = self._by_id.get(task_id)
        if watch is None:
            watch = self._by_id[task_id] = Watch(task_id, now)
            self._count += 1
        return watch

    def _claim(self, task_id: str) -> None:
        """Take a ``task_id`` from the watch of a task whose external id is the same."""
        watch = self._by_id.get(task_id)
        if watch is not None and watch.is_of_another(task_id):
            watch.ids.remove(task_id)
            del self._by_id[task_id]

    def learn(self, watch: Watch, task: VoiceTask) -> list[Watch]:
        """Note both ids of a watch's task; give other watches that are of the same task."""
        self._claim(task.task_id)
        others: dict[Watch, None] = {}
        for task_id in (task.task_id, task.external_task_id):
            if not task_id:  # an empty external id is none; as an id it would make all tasks one
                continue
            other = self._by_id.setdefault(task_id, watch)
            if other is not watch:
                if not other.is_of_another(task.task_id):
                    others[other] = None
            elif task_id not in watch.ids:
                watch.ids.append(task_id)
        return list(others)

    def remove(self, watch: Watch) -> None:
        """Forget a watch."""
        for task_id in watch.ids:
            del self._by_id[task_id]
        self._count -= 1

    def merge(self, watch: Watch, other: Watch) -> None:
        """Make one watch of two."""
        self.remove(other)
        for task_id in other.ids:
            self._by_id[task_id] = watch
        watch.ids += other.ids
        watch.absorb(other)
