"""Many voices: a stream of requests in, a stream of results out, resumable from nothing.

With a batch id every request has a derived external id, so that the vendor's own account is the
journal: what exists already is found there, by list pages or by a create that is refused as a
duplicate, and is never created again.
"""

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

from kling_voice import protocol
from kling_voice.cloning import Cloner, failure_of, voice_of
from kling_voice.errors import (
    ClientClosedError,
    InvalidRequestError,
    KlingError,
    PermissionDeniedError,
    SampleError,
    WaitTimeoutError,
)
from kling_voice.identity import (
    ANY_PREFIX,
    batch_prefix,
    default_key,
    derived_id,
    nth_id,
    seen_digest,
)
from kling_voice.models import CloneResult, VoiceRequest, VoiceTask
from kling_voice.paging import pages
from kling_voice.transport import Transport
from kling_voice.waiting import OnUpdate

_log = logging.getLogger("kling_voice")

LOOK_AHEAD = 8  # requests taken from the source that have no slot yet
SCAN_ITEMS = 30_000  # of the list, read before a resumed batch begins
_SCAN_REQUESTS = 60  # since pages may be small
_SCAN_BLANK_ITEMS = 3_000  # of the list in a row without a task of the batch end the scan
_SCAN_PAGE = 1000
_SHOWN_IDS = 20  # that one line of the log tells

Requests = Iterable[VoiceRequest] | AsyncIterable[VoiceRequest]


class Batch:
    """One run of ``clone_voices``.

    Args:
        transport: Reads the list through this.
        cloner: Clones through this.
        requests: The source.
        batch_id: What the external ids are derived from; ``None`` for random ones.
        concurrency: The caller's own cap on tasks in flight; ``None`` for the account's limit.
        retry_failed: How often a task that ended as failed is tried again.
        timeout: Seconds from an accepted create to the task's end; ``None`` for ever.
        on_update: Told of each change of each task's status.

    Raises:
        InvalidRequestError: ``requests`` is not iterable.
    """

    def __init__(
        self,
        transport: Transport,
        cloner: Cloner,
        requests: Requests,
        *,
        batch_id: str | None,
        concurrency: int | None,
        retry_failed: int,
        timeout: float | None,
        on_update: OnUpdate | None,
    ) -> None:
        if isinstance(requests, str | bytes) or not isinstance(requests, Iterable | AsyncIterable):
            raise InvalidRequestError(
                "requests must be an iterable or an async iterable of VoiceRequest, not"
                f" {type(requests).__name__}.",
                field="requests",
            )
        self._transport = transport
        self._cloner = cloner
        self._requests = requests
        self._batch_id = batch_id
        self._concurrency = None if concurrency is None else asyncio.Semaphore(concurrency)
        self._retry_failed = retry_failed
        self._timeout = timeout
        self._on_update = None if on_update is None else self._guard(on_update)
        self._ahead = asyncio.Semaphore(LOOK_AHEAD)
        self._seen: set[bytes] = set()
        self._existing: dict[str, str] = {}  # items of the list as JSON, by external id
        self._results: asyncio.Queue[CloneResult | None] = asyncio.Queue()
        self._room = asyncio.Event()  # the consumer keeps up
        self._room.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._late: set[asyncio.Task[None]] = set()  # they hold slots whose results are given
        self._feeder: asyncio.Task[None] | None = None
        self._over = False  # the source is read no further
        self._last_error: BaseException | None = None  # raised when all taken ones are reported
        self._fatal: BaseException | None = None  # raised after the results that have come by then
        self._untold: dict[str, None] = {}  # task ids whose results were not given yet

    async def run(self) -> AsyncGenerator[CloneResult, None]:
        """Clone the voices; gives each result as it comes.

        Raises:
            KlingError: An error that concerns the whole account, or the client was closed.
            Exception: What the source or ``on_update`` raised.
        """
        self._transport.check_open()
        self._feeder = self._start(self._feed())
        try:
            while (result := await self._next()) is not None:
                yield result
            if self._last_error is not None:
                raise self._last_error
        finally:
            self._over = True
            self._tell_of_untold()
            running = [*self._tasks, *self._late]
            self._give_up()
            await asyncio.gather(*running, return_exceptions=True)

    async def _next(self) -> CloneResult | None:
        """Give the next result; ``None`` after the last one."""
        if self._results.qsize() <= self._cloner.slots.window:
            self._room.set()
        result = await self._results.get()
        if result is None:
            if self._fatal is not None:
                raise self._fatal
        elif result.task is not None:
            self._untold.pop(result.task.task_id, None)
        return result

    def _tell_of_untold(self) -> None:
        """Tell the log of voices that were paid for, and whose results nobody has got."""
        if not self._untold:
            return
        left = f"A batch was left with {len(self._untold)} voices in flight, or done and not given"
        if self._batch_id is not None:
            _log.info("%s; run it again with its batch_id to get them", left)
            return
        ids = list(self._untold)
        shown = ", ".join(map(repr, ids[:_SHOWN_IDS]))
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        _log.warning(
            "%s; without a batch_id no other run finds them, but get_task(task_id) does: %s%s",
            left,
            shown,
            more,
        )

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._cloner.start(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            if (error := task.exception()) is not None:
                self._stop(error)
        elif self._cloner.closed:
            self._stop(ClientClosedError("The client was closed while a batch was running."))
        elif task is not self._feeder or self._last_error is None:
            # Not by the batch, unless it is being left; its results must not get lost silently.
            self._stop(KlingError("A part of the batch was cancelled from outside; run it again."))
        if not self._tasks:
            self._results.put_nowait(None)

    def _stop(self, error: BaseException) -> None:
        """End the run with *error*, whatever is still to come."""
        self._over = True
        if self._fatal is None:
            self._fatal = error
            self._results.put_nowait(None)  # behind what has ended before, which is given first
            self._give_up()

    def _give_up(self) -> None:
        """Cancel all that runs, each once: a second time would end what withdraws a recording."""
        for task in [*self._tasks, *self._late]:
            if task is not asyncio.current_task() and not task.cancelling():
                task.cancel()

    def _guard(self, on_update: OnUpdate) -> OnUpdate:
        """Let an exception in the caller's ``on_update`` end the run, not one voice of it."""

        async def guarded(task: VoiceTask) -> None:
            try:
                answer = on_update(task)
                if inspect.isawaitable(answer):
                    await answer
            except Exception as error:
                self._stop(error)
                raise

        return guarded

    # --- the source's side ---

    async def _feed(self) -> None:
        if self._batch_id is not None:
            await self._scan(batch_prefix(self._batch_id))
        async with aclosing(_each(self._requests)) as source:
            while True:
                await self._room.wait()
                await self._ahead.acquire()
                if self._concurrency is not None:
                    await self._concurrency.acquire()
                try:
                    request = await anext(source)
                except StopAsyncIteration:
                    return
                except Exception as error:  # the caller's own; what was taken is reported first
                    self._last_error = self._last_error or error
                    return
                if self._over:  # and the source has swallowed the cancellation
                    return
                self._start(self._clone(request))

    async def _scan(self, prefix: str) -> None:
        """Find what an earlier run has created, as far as the front of the list shows it."""
        read = blank = requests = 0
        try:
            async with aclosing(pages(self._transport, protocol.VOICES, _SCAN_PAGE)) as listed:
                async for envelope in listed:
                    items = protocol.read_items(envelope)
                    requests += 1
                    read += len(items)
                    blank = 0 if self._keep(items, prefix) else blank + len(items)
                    if (
                        read >= SCAN_ITEMS
                        or requests >= _SCAN_REQUESTS
                        or blank >= _SCAN_BLANK_ITEMS
                    ):
                        return
        except KlingError as error:
            if (
                protocol.concerns_account(error) and not isinstance(error, PermissionDeniedError)
            ) or isinstance(error, ClientClosedError):
                raise  # a permission may be missing for the list alone
            # Slower, and just as correct: what exists is refused as a duplicate and adopted.
            _log.warning("The list could not be read; the batch goes on without it: %s", error)

    def _keep(self, items: list[Any], prefix: str) -> bool:
        """Keep the items that may be of the batch; tell whether any surely is."""
        ours = False
        for item in items:
            info = item.get("task_info") if type(item) is dict else None
            external = info.get("external_task_id") if type(info) is dict else None
            if type(external) is not str:
                continue
            if external.startswith(prefix):
                ours = True
            elif external.startswith(ANY_PREFIX):
                continue  # of another batch; what is left may have been given by the caller
            self._existing[external] = json.dumps(item)  # a third of the memory of the objects
        return ours

    # --- one request ---

    async def _clone(self, request: VoiceRequest) -> None:
        taken = _Taken(self._ahead, self._concurrency)
        try:
            result = await self._result(request, taken)
        finally:
            taken.over()
        if result.error is not None and protocol.concerns_account(result.error):
            self._last_error = self._last_error or result.error
            self._over = True
            assert self._feeder is not None  # it has started this
            self._feeder.cancel()  # it may wait for a source that gives nothing more
        self._results.put_nowait(result)
        if self._results.qsize() > max(LOOK_AHEAD, self._cloner.slots.window):
            self._room.clear()

    async def _result(self, request: VoiceRequest, taken: "_Taken") -> CloneResult:
        task: VoiceTask | None = None
        seen: list[VoiceTask] = []  # as created, of the attempt that goes on

        def has_task(made: VoiceTask) -> None:
            seen.append(made)
            self._untold[made.task_id] = None

        try:
            if not isinstance(request, VoiceRequest):
                raise InvalidRequestError(
                    f"requests must give VoiceRequest objects, not {type(request).__name__}.",
                    field="requests",
                )
            if request.voice_file is not None:  # before it is read; the others are as they are sent
                self._cloner.check(request, request.external_task_id)
            external_task_id = await self._identify(request)
            for attempt in range(self._retry_failed + 1):
                if task is not None:  # it has failed
                    self._untold.pop(task.task_id, None)
                    external_task_id = external_task_id or task.external_task_id
                this_id = external_task_id and nth_id(external_task_id, attempt)
                task = await self._cloner.clone(
                    request,
                    this_id,
                    timeout=self._timeout,
                    on_update=self._on_update,
                    known=self._known(this_id, request),
                    on_slot=taken.has_slot,
                    on_task=has_task,
                    on_late=lambda holding: self._outlasts(holding, taken),
                )
                seen.clear()
                if not task.failed:
                    return CloneResult(request, task, voice_of(task), None)
            assert task is not None
            return CloneResult(request, task, None, failure_of(task))
        except ClientClosedError:
            raise
        except (InvalidRequestError, SampleError) as error:
            if not seen:  # else it is another's, such as on_update's
                error.outcome = "not_created"
            return CloneResult(request, seen[-1] if seen else task, None, error)
        except Exception as error:
            last = error.task if isinstance(error, WaitTimeoutError) else None
            return CloneResult(request, last or (seen[-1] if seen else task), None, error)

    def _outlasts(self, holding: asyncio.Task[None], taken: "_Taken") -> None:
        self._late.add(holding)
        holding.add_done_callback(self._late.discard)
        taken.outlasts(holding)

    async def _identify(self, request: VoiceRequest) -> str | None:
        """Give the request's external id; ``None`` if any will do.

        Raises:
            InvalidRequestError: The batch has had a request of this key or id.
        """
        if request.external_task_id is not None:
            external_task_id = protocol.check_id(request.external_task_id, "external_task_id")
            field = "external_task_id"
        elif self._batch_id is None:
            return None
        else:
            external_task_id = derived_id(self._batch_id, await self._key(request))
            field = "key"
        if self._batch_id is not None:
            digest = seen_digest(external_task_id)
            if digest in self._seen:
                raise InvalidRequestError(
                    f"The batch has had a request with this {field} already (the default key is"
                    " made of the name and the source).",
                    field=field,
                )
            self._seen.add(digest)
        return external_task_id

    async def _key(self, request: VoiceRequest) -> str:
        if request.key is None:
            if request.voice_file is None:
                return default_key(request)
            return await asyncio.to_thread(default_key, request)
        if not isinstance(request.key, str) or not request.key:
            raise InvalidRequestError("key must be a non-empty string.", field="key")
        return request.key

    def _known(self, external_task_id: str | None, request: VoiceRequest) -> VoiceTask | None:
        item = self._existing.pop(external_task_id, None) if external_task_id else None
        if external_task_id is None or item is None or not isinstance(request.voice_name, str):
            return None
        try:
            task = protocol.read_item(json.loads(item), None)
        except KlingError:
            return None  # the create will be refused and the task queried, which tells more
        if task.succeeded and not task.voices:
            return None
        return task if protocol.fits(task, external_task_id, request.voice_name) else None


class _Taken:
    """A request taken from the source: what it uses up of the batch's bounds, given back once."""

    def __init__(self, ahead: asyncio.Semaphore, concurrency: asyncio.Semaphore | None) -> None:
        self._ahead: asyncio.Semaphore | None = ahead
        self._concurrency = concurrency

    def has_slot(self) -> None:
        """Its task has a slot, so that another request may be looked at."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.release()

    def outlasts(self, holding: asyncio.Task[None]) -> None:
        """Its task goes on beyond its wait, and counts for as long as its slot is held."""
        concurrency, self._concurrency = self._concurrency, None
        if concurrency is not None:
            holding.add_done_callback(lambda _: concurrency.release())

    def over(self) -> None:
        """It has its result."""
        self.has_slot()
        concurrency, self._concurrency = self._concurrency, None
        if concurrency is not None:
            concurrency.release()


async def _each(requests: Requests) -> AsyncGenerator[VoiceRequest, None]:
    """Give the source's requests; a generator behind it is closed when this one is."""
    if isinstance(requests, AsyncIterable):
        later = aiter(requests)
        try:
            async for request in later:
                yield request
        finally:
            if inspect.isasyncgen(later):
                await later.aclose()
    else:
        now = iter(requests)
        try:
            for request in now:
                yield request
        finally:
            if inspect.isgenerator(now):
                now.close()
