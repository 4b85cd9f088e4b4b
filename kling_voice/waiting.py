"""Waiting for tasks: one schedule, shared reads.

Everyone who waits for the same task shares one :class:`_Watch`; watches that fall due together
share one read. A single timer and the reads under way are all that runs: no asyncio task a wait.
"""

import asyncio
import copy
import inspect
import logging
from collections.abc import Awaitable, Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any

from kling_voice import protocol
from kling_voice.errors import (
    ClientClosedError,
    KlingError,
    NotFoundError,
    WaitTimeoutError,
)
from kling_voice.models import TaskStatus, VoiceTask
from kling_voice.schedule import NEVER, ListUse, Schedule, advances
from kling_voice.transport import Transport

log = logging.getLogger("kling_voice")

OnUpdate = Callable[[VoiceTask], Awaitable[None] | None]

NOT_FOUND_GRACE = 10.0  # seconds during which "not found" is taken for a read that lags a write
READS_AT_ONCE = 32  # single queries in flight
_PATIENCE = 10.0  # seconds that one look may take, if the client's timeout allows it so much
_PROMPT_SPACING = 0.5  # seconds between two looks at one task that unproven callbacks bring about


class _Waiter:
    """One call that waits: what it has been told, and what it has still to take in."""

    __slots__ = ("deadline", "eager", "error", "future", "known", "last_look", "news", "watch")

    def __init__(
        self, known: TaskStatus | None, deadline: float, last_look: float, eager: bool
    ) -> None:
        self.known = known
        self.deadline = deadline
        self.last_look = last_look  # no look that serves only this waiter begins later
        self.eager = eager  # wants every change, not only the end
        self.news: list[VoiceTask] = []
        self.error: BaseException | None = None
        self.future: asyncio.Future[None] | None = None
        self.watch: _Watch | None = None

    def tell(self, task: VoiceTask) -> None:
        status = task.task_status
        if status == self.known or not advances(self.known, status):
            return
        self.known = status
        if self.eager or status.is_terminal:
            self.news.append(task)
            self.wake()

    def fail(self, error: BaseException) -> None:
        self.error = copy.copy(error)  # its own one, with a traceback of its own
        self.wake()

    def wake(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


class _Watch:
    """A task that someone waits for."""

    __slots__ = ("alone", "due", "heard", "ids", "look", "looked", "looks", "task", "waiters")

    def __init__(self, task_id: str, now: float) -> None:
        self.ids = [task_id]  # the first one is the one to ask by
        self.task: VoiceTask | None = None
        self.waiters: list[_Waiter] = []
        self.heard = now
        self.looks = 0
        self.looked = -NEVER  # when the last look began
        self.due = NEVER
        self.alone = False  # a page will not do: the next look is a single query
        self.look: _Look | None = None  # the look under way


class _Look:
    """A read under way for some watches; ended when nobody waits for any of them."""

    __slots__ = ("serves", "task")

    def __init__(self, watches: list[_Watch]) -> None:
        self.serves = dict.fromkeys(watches)
        self.task: asyncio.Task[None] | None = None

    def drop(self, watch: _Watch) -> None:
        self.serves.pop(watch, None)
        if not self.serves and self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


class TaskWatcher:
    """All that one client waits for.

    Args:
        transport: Reads through this.
        schedule: When to look.
        grace: Seconds from the beginning of a wait during which "not found" is read lag.
        kept: Gives a state that a callback told before anyone waited for the task, by either id.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: Schedule,
        *,
        grace: float = NOT_FOUND_GRACE,
        kept: Callable[[str], VoiceTask | None] = lambda task_id: None,
    ) -> None:
        self._kept = kept
        self._transport = transport
        self._schedule = schedule
        self._grace = grace
        self._watches: dict[str, _Watch] = {}  # by either id
        self._heap: list[tuple[float, int, _Watch]] = []
        self._order = count()
        self._timer: asyncio.TimerHandle | None = None
        self._looks: set[asyncio.Task[None]] = set()
        self._singles = asyncio.Semaphore(READS_AT_ONCE)
        self._list = ListUse()
        self._hold_until = -NEVER  # the server asked to be left alone until then
        self._read_seconds = 0.1  # how long a look takes, smoothed
        self._told_words: set[str] = set()

    # --- the waiter's side ---

    async def wait(
        self,
        task: VoiceTask | str,
        *,
        timeout: float | None,
        on_update: OnUpdate | None = None,
    ) -> VoiceTask:
        """Wait until the task has ended, and give its last state.

        Raises:
            WaitTimeoutError: It has not ended within *timeout* seconds.
            ClientClosedError: The client was closed.
            KlingError: Looking at it failed for good.
        """
        self._transport.check_open()
        known = task if isinstance(task, VoiceTask) else None
        if known is not None and known.is_done:
            return known
        now = asyncio.get_running_loop().time()
        deadline = last_look = NEVER
        if timeout is not None:
            deadline = now + timeout
            last_look = deadline - min(2 * self._read_seconds, timeout / 4)
        waiter = _Waiter(
            known.task_status if known else None, deadline, last_look, on_update is not None
        )
        self._enter(task, waiter, now)
        try:
            while True:
                while waiter.news:
                    told = waiter.news.pop(0)
                    if on_update is not None:
                        answer = on_update(told)
                        if inspect.isawaitable(answer):
                            await answer
                    if told.is_done:
                        return told
                if waiter.error is not None:
                    raise waiter.error
                if not await self._news(waiter):
                    raise _timeout_error(task, waiter, known, timeout)
        finally:
            self._leave(waiter)

    async def _news(self, waiter: _Waiter) -> bool:
        """Sleep until there is something to take in; ``False`` if the deadline came first."""
        loop = asyncio.get_running_loop()
        waiter.future = loop.create_future()
        timer = None if waiter.deadline == NEVER else loop.call_at(waiter.deadline, waiter.wake)
        try:
            await waiter.future
        finally:
            waiter.future = None
            if timer is not None:
                timer.cancel()
        return bool(waiter.news) or waiter.error is not None

    def _enter(self, task: VoiceTask | str, waiter: _Waiter, now: float) -> None:
        task_id = task.task_id if isinstance(task, VoiceTask) else task
        watch = self._watches.get(task_id)
        if watch is None:
            watch = self._watches[task_id] = _Watch(task_id, now)
        watch.waiters.append(waiter)
        waiter.watch = watch
        if isinstance(task, VoiceTask):
            self._observe(watch, task, certain=False)
        if (kept := self._kept(task_id)) is not None:
            self._observe(watch, kept, certain=False)
        if watch.task is not None:
            waiter.tell(watch.task)
        if watch.look is None and watch.waiters:
            # A state that was just given need not be asked for at once; an id tells nothing.
            due = now if watch.task is None else self._next_look(watch, now)
            self._plan(watch, min(watch.due, due))

    def _leave(self, waiter: _Waiter) -> None:
        watch = waiter.watch
        if watch is not None and waiter in watch.waiters:
            watch.waiters.remove(waiter)
            if not watch.waiters:
                self._forget(watch)

    def close(self) -> None:
        """End every wait with :class:`ClientClosedError`, and every look."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        closed = ClientClosedError("The client was closed while a task was waited for.")
        for watch in list(self._watches.values()):
            self._fail(watch, closed)
        for look in self._looks:
            look.cancel()

    async def closed(self) -> None:
        """Wait until every look has ended; after :meth:`close`."""
        await asyncio.gather(*self._looks, return_exceptions=True)

    # --- what callbacks bring ---

    def deliver(self, task: VoiceTask) -> bool:
        """Take in a state that is surely the vendor's own; ``False`` if nobody waits for it."""
        watch = self._find(task.task_id, task.external_task_id)
        if watch is None:
            return False
        self._observe(watch, task, certain=False)
        return True

    def prompt(self, task_id: str | None, external_task_id: str | None) -> None:
        """Look at a task at once, if someone waits for it; many prompts are one look."""
        watch = self._find(task_id, external_task_id)
        if watch is not None:
            self._prompt(watch)

    def _prompt(self, watch: _Watch) -> None:
        now = asyncio.get_running_loop().time()
        soonest = max(now, watch.looked + min(_PROMPT_SPACING, self._schedule.period))
        if soonest < watch.due:
            self._plan(watch, soonest)

    # --- planning ---

    def _find(self, *ids: object) -> _Watch | None:
        for task_id in ids:
            if isinstance(task_id, str) and (watch := self._watches.get(task_id)) is not None:
                return watch
        return None

    def _next_look(self, watch: _Watch, now: float) -> float:
        lasts = (waiter.last_look for waiter in watch.waiters)
        return self._schedule.next_look(now, watch.looks, lasts)

    def _plan(self, watch: _Watch, due: float) -> None:
        due = max(due, self._hold_until)
        if due == watch.due:
            return
        watch.due = due
        if due != NEVER:
            heappush(self._heap, (due, next(self._order), watch))
            self._arm()

    def _arm(self) -> None:
        """Let the one timer fire at the first look that is due."""
        while self._heap and self._heap[0][2].due != self._heap[0][0]:
            heappop(self._heap)
        first = self._heap[0][0] if self._heap else NEVER
        if self._timer is not None:
            if self._timer.when() <= first:
                return
            self._timer.cancel()
            self._timer = None
        if first != NEVER:
            self._timer = asyncio.get_running_loop().call_at(first, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time() + 0.001  # what is due within the same millisecond
        due: list[_Watch] = []
        while self._heap and self._heap[0][0] <= now:
            moment, _, watch = heappop(self._heap)
            if watch.due != moment:
                continue  # planned anew since
            if watch.look is None:  # else it is planned again when that look ends
                watch.due = NEVER
                due.append(watch)
        self._arm()
        together = [watch for watch in due if not watch.alone]
        if self._list.is_worth(now, len(together)):
            self._start(self._look_at_list, together, now)
            due = [watch for watch in due if watch.alone]
        for watch in due:
            self._start(self._look_alone, [watch], now)

    def _start(
        self, read: Callable[[_Look], Awaitable[None]], watches: list[_Watch], now: float
    ) -> None:
        look = _Look(watches)
        for watch in watches:
            watch.look = look
            watch.looked = now
        look.task = asyncio.create_task(self._run(look, read))
        self._looks.add(look.task)
        look.task.add_done_callback(self._looks.discard)

    # --- looking ---

    async def _run(self, look: _Look, read: Callable[[_Look], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await read(look)
            self._read_seconds += (loop.time() - started - self._read_seconds) / 4
        except Exception as error:  # whatever it is: a waiter must never hang on a look that died
            self._failed(look, error)
        now = loop.time()
        for watch in list(look.serves):
            if watch.look is look:
                watch.look = None
                watch.looks += 1
                overdue, watch.due = watch.due, NEVER
                self._plan(watch, min(overdue, self._next_look(watch, now)))

    def _failed(self, look: _Look, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if protocol.is_transient(error):
            log.warning("Looking at %d task(s) failed, and goes on: %s", len(look.serves), error)
            if (asked := protocol.asked_to_wait(error)) is not None:
                self._hold_until = now + asked
            return
        for watch in list(look.serves):
            if not isinstance(error, NotFoundError) or now - watch.heard > self._grace:
                self._fail(watch, error)

    async def _look_alone(self, look: _Look) -> None:
        async with self._singles:
            for watch in list(look.serves):
                envelope = await self._transport.send(
                    protocol.get_call(watch.ids[0]), timeout=_PATIENCE
                )
                task = protocol.read_task(envelope)
                if watch in look.serves:
                    watch.alone = False
                    self._observe(watch, task, certain=True)

    async def _look_at_list(self, look: _Look) -> None:
        """Look for all of the look's watches in the list's pages; then alone for the rest."""
        loop = asyncio.get_running_loop()
        found, depth, page_num, period = 0, 0, 0, self._schedule.period
        missing: set[_Watch | None] = set(look.serves)
        page_size = self._list.page_size(len(self._watches))
        while True:
            page_num += 1
            try:
                envelope = await self._transport.send(
                    protocol.list_call(protocol.VOICES, page_num, page_size), timeout=_PATIENCE
                )
                items = protocol.read_items(envelope)
            except KlingError as error:
                if protocol.is_page_refused(error) and self._list.refused(page_size):
                    page_num, page_size = 0, self._list.page_size(len(self._watches))
                    continue
                self._list.failed(loop.time(), period, for_good=not protocol.is_transient(error))
                if protocol.is_transient(error) or protocol.concerns_account(error):
                    raise
                log.warning("The list cannot be read; tasks are queried one by one: %s", error)
                break
            here = 0
            for index, item in enumerate(items):
                watch = self._see(item, envelope.request_id)
                if watch in missing:
                    missing.remove(watch)
                    here += 1
                    depth = (page_num - 1) * page_size + index + 1
            found += here
            if not self._list.go_on(here, len(missing), len(items), page_num):
                self._list.learn(loop.time(), period, found=found, pages=page_num, depth=depth)
                break
        for watch in missing:
            if watch is not None and watch.look is look:
                look.serves.pop(watch, None)
                self._start(self._look_alone, [watch], loop.time())

    def _see(self, item: Any, request_id: str | None) -> _Watch | None:
        """Take in one raw item of a list, if someone waits for it; the others are not decoded."""
        if type(item) is not dict:
            return None
        info = item.get("task_info")
        external = info.get("external_task_id") if type(info) is dict else None
        watch = self._find(item.get("task_id"), external)
        if watch is None or watch.alone:
            return None
        if watch.task is None or watch.task.task_status != item.get("task_status"):
            try:
                task = protocol.read_item(item, request_id)
            except KlingError as error:
                log.warning("A task in the list is unreadable, and is queried alone: %s", error)
                return None
            self._observe(watch, task, certain=False)
        return watch

    def _observe(self, watch: _Watch, task: VoiceTask, *, certain: bool) -> None:
        """Take in a state of a watch's task.

        Args:
            watch: Whose state it is.
            task: The state.
            certain: Whether it comes from a single query, the last word on a task's voices.
        """
        for task_id in (task.task_id, task.external_task_id):
            if task_id is None:
                continue
            other = self._watches.setdefault(task_id, watch)
            if other is not watch:
                self._join(watch, other)
            elif task_id not in watch.ids:
                watch.ids.append(task_id)
        if not advances(watch.task.task_status if watch.task else None, task.task_status):
            return
        if task.succeeded and not task.voices and not certain:
            watch.alone = True
            self._plan(watch, asyncio.get_running_loop().time())
            return
        status = task.task_status
        if not (status.is_known or status in self._told_words or len(self._told_words) > 100):
            self._told_words.add(status)
            log.warning("Unknown task status %r: waiting on", str(status)[:40])
        watch.task = task
        for waiter in watch.waiters:
            waiter.tell(task)
        if task.is_done:
            self._forget(watch)

    def _join(self, watch: _Watch, other: _Watch) -> None:
        """Make one watch of two, after it has turned out that both ids are of one task."""
        known = other.task
        waiters, ids = list(other.waiters), list(other.ids)
        self._forget(other)
        for waiter in waiters:
            waiter.watch = watch
            if watch.task is not None:
                waiter.tell(watch.task)
        watch.waiters += waiters
        watch.heard = min(watch.heard, other.heard)
        for task_id in ids:
            self._watches[task_id] = watch
            if task_id not in watch.ids:
                watch.ids.append(task_id)
        if known is not None and (
            watch.task is None or advances(watch.task.task_status, known.task_status)
        ):
            watch.task = known

    def _fail(self, watch: _Watch, error: BaseException) -> None:
        for waiter in watch.waiters:
            waiter.fail(error)
        self._forget(watch)

    def _forget(self, watch: _Watch) -> None:
        for task_id in watch.ids:
            if self._watches.get(task_id) is watch:
                del self._watches[task_id]
        watch.due = NEVER
        watch.waiters = []
        if watch.look is not None:
            watch.look.drop(watch)
            watch.look = None


def _timeout_error(
    task: VoiceTask | str, waiter: _Waiter, known: VoiceTask | None, timeout: float | None
) -> WaitTimeoutError:
    last = waiter.watch.task if waiter.watch is not None and waiter.watch.task else known
    task_id = task.task_id if isinstance(task, VoiceTask) else task
    seen = (
        f"it was last seen as {last.task_status.value!r}. The task goes on at the vendor: wait for"
        " it again, which costs nothing, rather than create it again."
        if last is not None
        else "the vendor did not tell its state. Check the id and the connection, and wait again."
    )
    return WaitTimeoutError(
        f"The wait for task {task_id!r} ended after {timeout:g} s; {seen}", task=last
    )
