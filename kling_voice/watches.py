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
        last: The last state that it knows.
        eager: Whether it wants every change, or only the end.
        timeout: Seconds that it waits in all.
        deadline: When that ends, by the event loop's clock.
        news: Changes to take in, in order.
        error: What to raise after that.
        expired: Whether its deadline has come.
    """

    __slots__ = ("_future", "deadline", "eager", "error", "expired", "last", "news", "timeout")

    def __init__(
        self, last: VoiceTask | None, *, eager: bool, timeout: float, deadline: float
    ) -> None:
        self.last = last
        self.eager: bool = eager
        self.timeout: float = timeout
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
        began: When the first one began to wait, by the event loop's clock.
        task: Its last known state.
        waiters: Those who wait for it.
        looks: How often it was looked at.
        looked: When the last look began.
        alone: Whether a list page will not do, so that the next look is a single query.
        stumbled: Whether the last look failed.
        look: The look that it is in the queue for, or that is under way.
        wanted: When it should be looked at again after that.
    """

    __slots__ = (
        "alone",
        "began",
        "ids",
        "look",
        "looked",
        "looks",
        "stumbled",
        "task",
        "waiters",
        "wanted",
    )

    def __init__(self, task_id: str, now: float) -> None:
        self.ids: list[str] = [task_id]
        self.began: float = now
        self.task: VoiceTask | None = None
        self.waiters: dict[Waiter, None] = {}
        self.looks: int = 0
        self.looked: float = -NEVER
        self.alone: bool = False
        self.stumbled: bool = False
        self.look: Look | None = None
        self.wanted: float = NEVER

    def tell(self, task: VoiceTask) -> None:
        """Take in a state, and tell all who wait."""
        self.task = task
        for waiter in self.waiters:
            waiter.tell(task)

    def absorb(self, other: "Watch") -> None:
        """Take over another watch, which has turned out to be of the same task."""
        self.began = min(self.began, other.began)
        self.waiters |= other.waiters
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
    """All the tasks that someone waits for."""

    def __init__(self) -> None:
        self._by_id: dict[str, Watch] = {}  # by either kind of id
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Watch]:
        return iter(list(dict.fromkeys(self._by_id.values())))

    def find(self, *ids: object) -> Watch | None:
        """Give the watch of a task that bears one of some ids, if there is one."""
        for task_id in ids:
            if isinstance(task_id, str) and (watch := self._by_id.get(task_id)) is not None:
                return watch
        return None

    def open(self, task_id: str, now: float) -> Watch:
        """Give the watch of a task, a new one if there is none."""
        watch = self._by_id.get(task_id)
        if watch is None:
            watch = self._by_id[task_id] = Watch(task_id, now)
            self._count += 1
        return watch

    def learn(self, watch: Watch, task: VoiceTask) -> list[Watch]:
        """Note both ids of a watch's task; give other watches that are of the same task."""
        others: dict[Watch, None] = {}
        for task_id in (task.task_id, task.external_task_id):
            if not task_id:  # an empty external id is none; as an id it would make all tasks one
                continue
            other = self._by_id.setdefault(task_id, watch)
            if other is not watch:
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
