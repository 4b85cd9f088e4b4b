"""Waiting for tasks: one schedule, shared reads.

Everyone who waits for the same task shares one :class:`~kling_voice.watches.Watch`; watches that
fall due together share one read. A single timer and the reads under way are all that runs: there
is no asyncio task for a wait.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from heapq import nlargest
from operator import attrgetter
from typing import Any, Final, Protocol

from kling_voice import protocol
from kling_voice.errors import (
    ClientClosedError,
    ConcurrencyLimitError,
    KlingError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ResponseError,
    WaitTimeoutError,
)
from kling_voice.models import VoiceTask
from kling_voice.protocol import Call, Envelope
from kling_voice.reading import ListUse, Patience, Pauses, Witnesses
from kling_voice.schedule import NEVER, Agenda, Schedule
from kling_voice.watches import Look, Waiter, Watch, Watches, follows

_log = logging.getLogger("kling_voice")

OnUpdate = Callable[[VoiceTask], Awaitable[None] | None]

NOT_FOUND_GRACE: Final = 10.0  # seconds for which "not found" is taken for a read that lags
READS_AT_ONCE: Final = 32  # single queries in flight
_PROMPT_SPACING = 0.5  # seconds between two looks at one task that unproven callbacks bring about
_SAME_MOMENT = 0.001  # seconds
_LONGEST = 1e9  # seconds, 31 years; a longer wait has no deadline
_CONFIRMS = 8  # looks at a told success before its voices are asked for no more often than usual
_LISTED = 6  # looks in a row for which a list is believed without a check
_WORDS_TOLD = 100  # unknown statuses; a vendor who makes up more is not told of


class Sender(Protocol):
    """What a watcher needs of :class:`kling_voice.transport.Transport`."""

    def check_open(self) -> None:
        """Refuse to go on after the client was closed."""

    async def send(self, call: Call, *, timeout: float | None = None) -> Envelope:
        """Send a call once."""


class TaskWatcher:
    """All that one client waits for.

    Args:
        transport: Reads through this.
        schedule: When to look.
        grace: Seconds from the last sight of a task, or from the beginning of a wait, during which
            "not found" is read lag.
        kept: Gives a state that a callback told before anyone waited for the task, by either id.
        attach: Lets callbacks reach the watcher from now on, in the running event loop.
    """

    def __init__(
        self,
        transport: Sender,
        schedule: Schedule,
        *,
        grace: float = NOT_FOUND_GRACE,
        kept: Callable[[str], VoiceTask | None] = lambda task_id: None,
        attach: Callable[["TaskWatcher"], None] = lambda watcher: None,
    ) -> None:
        self._transport = transport
        self._schedule = schedule
        self._grace = grace
        self._kept = kept
        self._attach = attach
        self._watches = Watches()
        # An awaited task is in the agenda, or has its look: in the queue, or under way. It has
        # neither when nobody who waits for it has the time for another look.
        self._agenda: Agenda[Watch] = Agenda()
        self._queue: deque[Look] = deque()  # of single queries
        self._looks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._fires = NEVER  # when the timer does: not every event loop's handles can tell
        self._fired = -NEVER  # when looks began the last time
        self._singles: set[asyncio.Task[None]] = set()  # those of them that are single queries
        self._single_patience = Patience()
        self._list_patience = Patience()
        self._pauses = Pauses(schedule.interval)
        self._list = ListUse(schedule.period)
        self._witnesses = Witnesses()
        self._told_words: set[str] = set()
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nothing is under way."""
        return not (self._watches or self._agenda or self._queue or self._looks or self._timer)

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
            InvalidRequestError: The id cannot be asked for.
            KlingError: Looking at it failed for good.
        """
        self._transport.check_open()
        if self._closed:
            raise ClientClosedError("The client is closed: make a new one.")
        known = task if isinstance(task, VoiceTask) else None
        if known is not None and known.is_done:
            return known
        task_id = task.task_id if isinstance(task, VoiceTask) else task
        protocol.check_id(task_id, "task")
        # Here, where the loop is surely the client's own and the client open; and before what was
        # kept is asked for, so that no callback is missed between the two.
        self._attach(self)
        waiter = self._enter(task_id, known, timeout, eager=on_update is not None)
        expiry: asyncio.TimerHandle | None = None
        try:
            if waiter.deadline != NEVER:
                loop = asyncio.get_running_loop()
                expiry = loop.call_at(waiter.deadline, self._expire, waiter)
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
                if waiter.expired:
                    raise _timeout_error(task_id, waiter)
                await waiter.woken()
        finally:
            if expiry is not None:
                expiry.cancel()
            self._leave(waiter)
            waiter.error = None  # its traceback holds the waiter

    def _enter(
        self, task_id: str, known: VoiceTask | None, timeout: float | None, *, eager: bool
    ) -> Waiter:
        now = _now()
        seconds = NEVER if timeout is None or timeout > _LONGEST else timeout
        waiter = Waiter(known, eager=eager, timeout=seconds, began=now, deadline=now + seconds)
        watch = self._watches.open(task_id, now, certain=known is not None)
        watch.join(waiter)
        if watch.task is not None:
            waiter.tell(watch.task)
        if known is not None:
            self._observe(watch, known)
        self._recall(watch, task_id)
        if waiter not in watch.waiters:
            return waiter  # what was kept is the end
        # A state that was just given need not be asked for at once. A mere id tells nothing, and
        # what was kept may be old.
        if known is None and not watch.looks and watch.look is None:
            due = self._soon(now)
        else:
            due = self._schedule.tick(now, now + self._schedule.interval(watch.looks))
        self._want(watch, self._schedule.clip(now, due, [self._last_look(waiter)]))
        return waiter

    def _recall(self, watch: Watch, task_id: str) -> None:
        """Take in what callbacks told of a watch's task before anyone waited for this id of it."""
        told = self._kept(task_id)
        if told is not None and not watch.is_of_another(told.task_id):
            self._observe(watch, told)

    def _leave(self, waiter: Waiter) -> None:
        watch = waiter.watch
        if waiter in watch.waiters:
            del watch.waiters[waiter]
            if not watch.waiters:
                self._forget(watch)

    def _expire(self, waiter: Waiter) -> None:
        self._leave(waiter)  # even while it is busy with its on_update
        waiter.expire()

    def close(self) -> None:
        """End every wait with :class:`ClientClosedError`, and every look."""
        self._closed = True
        closed = ClientClosedError("The client was closed while a task was waited for.")
        for watch in self._watches:
            self._fail(watch, closed)

    async def closed(self) -> None:
        """Wait until every look has ended; after :meth:`close`."""
        await asyncio.gather(*self._looks, return_exceptions=True)

    # --- what callbacks bring ---

    def deliver(self, task: VoiceTask) -> bool:
        """Take in a state that is surely the vendor's own; ``False`` if nobody waits for it."""
        watch = self._watches.find(task.task_id, task.external_task_id)
        if watch is None:
            return False
        self._observe(watch, task)
        return True

    def prompt(self, task_id: str | None, external_task_id: str | None) -> None:
        """Look at a task soon, if someone waits for it; many prompts are one look."""
        watch = self._watches.find(task_id, external_task_id)
        if watch is not None:
            spacing = min(_PROMPT_SPACING, self._schedule.period)
            watch.urgent = True
            self._want(watch, max(self._soon(_now()), watch.looked + spacing))

    # --- when to look ---

    def _soon(self, now: float) -> float:
        """Give the moment of a look that is wanted now: a beat is shared, as a tick is."""
        beat = self._schedule.beat
        if self._agenda.first <= now + beat:
            return self._agenda.first
        return max(now, self._fired + beat)

    def _last_look(self, waiter: Waiter) -> float:
        margin = max(self._single_patience.margin, self._list_patience.margin)
        return self._schedule.last_look(waiter.deadline, waiter.timeout, margin)

    def _next_look(self, watch: Watch, now: float, *, hurry: bool = False) -> float:
        interval = self._schedule.period if hurry else self._schedule.interval(watch.looks)
        due = self._schedule.tick(now, now + interval)
        return self._schedule.clip(now, due, map(self._last_look, watch.waiters))

    def _want(self, watch: Watch, moment: float) -> None:
        """Let a watch be looked at by *moment*, or earlier if that is planned."""
        if watch.look is not None:
            watch.wanted = min(watch.wanted, moment)
        elif moment < self._agenda.moment(watch):
            self._plan(watch, moment)

    def _plan(self, watch: Watch, moment: float) -> None:
        self._agenda.plan(watch, moment)
        self._arm()

    def _arm(self) -> None:
        """Let the one timer fire when the first look is due."""
        first = self._agenda.first
        if first != NEVER:
            first = max(first, self._pauses.until)
        if self._timer is not None:
            if self._fires == first:
                return
            self._timer.cancel()
            self._timer = None
        if first != NEVER:
            self._timer = asyncio.get_running_loop().call_at(first, self._fire)
            self._fires = first

    def _fire(self) -> None:
        self._timer = None
        now = _now()
        if now >= self._pauses.until:
            self._fired = now
            due = self._agenda.take(now + _SAME_MOMENT)
            together = [watch for watch in due if not watch.alone]
            if self._list.is_worth(now, len(together), len(self._watches)):
                self._begin(Look(together, now), self._look_at_list)
                due = [watch for watch in due if watch.alone]
            self._queue.extend(Look([watch], now) for watch in due)
            self._pump()
        self._arm()

    def _pump(self) -> None:
        """Begin with the single queries in the queue, so many at once as may be."""
        paused = _now() < self._pauses.until
        while self._queue and (paused or len(self._singles) < READS_AT_ONCE):
            look = self._queue.popleft()
            for watch in list(look.serves):  # none, if nobody waits any more
                if paused:
                    look.release(watch)
                    self._want(watch, self._pauses.until)
                else:
                    self._singles.add(self._begin(look, self._look_alone))

    def _begin(
        self, look: Look, read: Callable[[Look], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        look.task = asyncio.create_task(read(look))
        self._looks.add(look.task)
        look.task.add_done_callback(partial(self._ended, look))
        return look.task

    def _ended(self, look: Look, task: asyncio.Task[None]) -> None:
        """Go on after a look, whatever became of it: nobody must hang on one that died."""
        look.task = None  # else its exception's traceback holds the look, and the look the task
        self._looks.discard(task)
        self._singles.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(look, error)
        stumbled = error is not None and not isinstance(error, NotFoundError)
        for watch in list(look.serves):
            self._looked(look, watch, stumbled=stumbled)
        self._pump()

    def _failed(self, look: Look, error: BaseException) -> None:
        if protocol.is_transient(error):
            is_new = self._pauses.failures <= 1 and not all(w.stumbled for w in look.serves)
            _log.log(
                logging.WARNING if is_new else logging.DEBUG,
                "Looking at %d task(s) failed, and goes on: %s",
                len(look.serves),
                error,
            )
            return
        for watch in list(look.serves):
            if isinstance(error, NotFoundError):
                self._miss(watch, error)
            else:
                self._fail(watch, error)

    def _looked(self, look: Look, watch: Watch, *, stumbled: bool = False) -> None:
        """Plan the next look at a watch after this one."""
        look.release(watch)
        now = _now()
        watch.confirms += watch.alone
        # A failure is made up for at the next tick, but only once. A success whose voices do not
        # show yet is asked for at the next ticks, too.
        hurry = watch.confirms <= _CONFIRMS if watch.alone else stumbled and not watch.stumbled
        watch.looks += not hurry
        watch.stumbled = stumbled
        due = min(watch.wanted, self._next_look(watch, now, hurry=hurry))
        if stumbled and due == NEVER:  # it was the last look, and there may be time for another
            due = self._schedule.tick(now, now + self._schedule.period)
        watch.wanted = NEVER
        self._plan(watch, due)

    # --- looking ---

    async def _read(self, call: Call, patience: Patience) -> Envelope:
        started = _now()
        try:
            envelope = await self._transport.send(call, timeout=patience.limit)
        except KlingError as error:
            if not protocol.is_transient(error):
                self._pauses.answered()
            else:
                self._pauses.failed(
                    _now(),
                    asked=protocol.asked_to_wait(error),
                    limited=isinstance(error, RateLimitError | ConcurrencyLimitError),
                )
            if isinstance(error, RequestTimeoutError):
                patience.gave_up()
            raise
        patience.took(_now() - started)
        self._pauses.answered()
        return envelope

    async def _look_alone(self, look: Look) -> None:
        (watch,) = look.serves
        envelope = await self._read(protocol.get_call(watch.ids[0]), self._single_patience)
        task = protocol.read_task(envelope)
        if watch.is_of_another(task.task_id):
            raise ResponseError(
                f"the query for task {watch.ids[0]} gave task {task.task_id}", http_status=200
            )
        watch.listed = 0
        self._observe(watch, task, certain=True)

    async def _look_at_list(self, look: Look) -> None:
        """Look for the look's watches in the list's pages; then let the rest be queried alone."""
        page_num = items = found = depth = 0
        first: object = None
        shown: list[Watch] = []
        page_size = self._list.page_size(len(self._watches))
        while True:
            page_num += 1
            asked = _now()
            try:
                envelope = await self._read(
                    protocol.list_call(protocol.VOICES, page_num, page_size), self._list_patience
                )
                page = protocol.read_items(envelope)
            except KlingError as error:
                refused = protocol.is_page_refused(error)
                if refused and page_num == 1 and self._list.refused(page_size):
                    page_num, page_size = 0, self._list.page_size(len(self._watches))
                    continue
                if not (refused and page_num > 1):
                    if not self._is_lists_own(error):
                        raise
                    _log.warning("The list cannot be read; tasks are queried alone: %s", error)
                    break
                page = []  # beyond the last page
            before, first = first, _first_id(page)
            if first is not None and first == before:
                page = []  # it is the same page: the server gives no other
            if any(self._is_refuted(item, asked) for item in page):
                _log.warning("The list shows what is long over; tasks are queried alone.")
                self._list.failed(_now(), for_good=True)
                for watch in [each for each in shown if each.waiters]:
                    self._want(watch, _now())
                break
            here = 0
            for item in page:
                items += 1
                if (seen := self._see(item, envelope.request_id, look)) is not None:
                    shown.append(seen)
                    here += 1
                    depth = items
            found += here
            missing = len(look.serves)
            if not self._list.go_on(found=here, items=len(page), read=items, missing=missing):
                self._list.learn(_now(), found=found, items=items, depth=depth)
                self._check(shown)
                break
        for watch in list(look.serves):
            look.release(watch)
            self._queue.append(Look([watch], _now()))

    def _check(self, shown: list[Watch]) -> None:
        """Query a few of the tasks that the list shows alone: it may be a cache's, and frozen."""
        idle = [
            watch
            for watch in shown
            if watch.waiters and watch.look is None and watch.listed >= _LISTED
        ]
        for watch in nlargest(self._witnesses.call(len(idle)), idle, key=attrgetter("listed")):
            self._agenda.drop(watch)
            self._queue.append(Look([watch], _now()))

    def _is_refuted(self, item: Any, asked: float) -> bool:
        return type(item) is dict and self._witnesses.refute(
            item.get("task_id"), item.get("task_status"), asked
        )

    def _is_lists_own(self, error: KlingError) -> bool:
        """Note a failure of the list; tell whether it says nothing of single queries."""
        transient = protocol.is_transient(error)
        self._list.failed(_now(), for_good=not transient)
        if transient:
            return False
        # A permission may be missing for the list alone; the other matters are the account's.
        return isinstance(error, PermissionDeniedError) or not protocol.concerns_account(error)

    def _see(self, item: Any, request_id: str | None, look: Look) -> Watch | None:
        """Take in one raw item of a list, if someone waits for it; the others are not decoded."""
        if type(item) is not dict:
            return None
        info = item.get("task_info")
        external = info.get("external_task_id") if type(info) is dict else None
        watch = self._watches.find(item.get("task_id"), external)
        if watch is None or watch.alone:
            return None
        watch.seen = _now()
        watch.listed += 1
        if watch.task is None or watch.task.task_status != item.get("task_status"):
            try:
                task = protocol.read_item(item, request_id)
            except KlingError as error:
                _log.debug("A task in the list is unreadable, and is queried alone: %s", error)
                return None
            self._observe(watch, task, listed=True)
        if watch.look is look:
            self._looked(look, watch)
        elif watch.look is None and watch.waiters and not watch.alone:
            self._sighted(watch)
        return watch

    def _sighted(self, watch: Watch) -> None:
        """Take the sight of a watch for its next look, if that is due before long.

        So those that have waited for long come to share their looks, however rare these are.
        """
        now, interval = _now(), self._schedule.interval(watch.looks)
        if not watch.urgent and self._agenda.moment(watch) - now <= interval / 2:
            watch.looks += 1
            self._plan(watch, self._next_look(watch, now))

    # --- taking in ---

    def _observe(
        self, watch: Watch, task: VoiceTask, *, certain: bool = False, listed: bool = False
    ) -> None:
        """Take in a state of a watch's task.

        Args:
            watch: Whose state it is.
            task: The state.
            certain: Whether it comes from a single query, the last word on a task's voices.
            listed: Whether it comes from the list.
        """
        watch.seen = _now()
        watch.missed = False
        if not listed:
            self._witnesses.note(task.task_id, task.task_status, watch.seen)
        is_met = task.task_id not in watch.ids  # it was waited for by its external id so far
        for other in self._watches.learn(watch, task):
            self._let_go(other)
            self._watches.merge(watch, other)
            if watch.look is None:  # the other one's look is gone with it
                self._want(watch, self._next_look(watch, _now()))
        if not follows(watch.task, task):
            return
        if task.succeeded and not task.voices and not certain:
            watch.alone = True
            self._want(watch, _now())
            return
        self._note(task)
        watch.tell(task)
        if task.is_done:
            self._forget(watch)
        elif is_met:
            self._recall(watch, task.task_id)

    def _note(self, task: VoiceTask) -> None:
        """Tell the log of a status that this version does not know; once."""
        word = task.task_status
        if word.is_known or word in self._told_words or len(self._told_words) == _WORDS_TOLD:
            return
        self._told_words.add(word)
        _log.warning("Unknown task status %r: waiting on", word.value[:40])

    def _fail(self, watch: Watch, error: BaseException) -> None:
        for waiter in watch.waiters:
            waiter.fail(error)
        self._forget(watch)

    def _miss(self, watch: Watch, error: NotFoundError) -> None:
        """End the waits for a task that was not found, but for those that have just begun."""
        watch.missed = True
        for waiter in list(watch.waiters):
            if watch.looked - max(watch.seen, waiter.began) > self._grace:
                waiter.fail(error)
                self._leave(waiter)

    def _forget(self, watch: Watch) -> None:
        self._let_go(watch)
        self._watches.remove(watch)
        watch.waiters = {}

    def _let_go(self, watch: Watch) -> None:
        """Let there be no look at a watch any more."""
        self._agenda.drop(watch)
        if watch.look is not None:
            watch.look.drop(watch)
        self._arm()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _first_id(page: list[Any]) -> object:
    """Give the ``task_id`` that a raw page of the list begins with, or ``None``."""
    return page[0].get("task_id") if page and type(page[0]) is dict else None


def _timeout_error(task_id: str, waiter: Waiter) -> WaitTimeoutError:
    last = waiter.last
    if last is not None:
        seen = (
            f"it was last seen as {last.task_status.value!r}. The task goes on at the vendor: wait"
            " for it again, which costs nothing, rather than create it again."
        )
    elif waiter.watch.missed:
        seen = "the vendor does not know it (1203). Check the id and the account."
    else:
        seen = "the vendor did not tell its state. Check the connection, and wait again."
    return WaitTimeoutError(
        f"The wait for task {task_id!r} ended after {waiter.timeout:g} s; {seen}", task=last
    )
