"""Many voices: a stream of requests in, a stream of results out, resumable from nothing.

With a batch id every request has a derived external id, so that the vendor's own account is the
journal: what exists already is found there, by list pages or by a create that is refused as a
duplicate, and is never created again.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Iterable
from typing import Any

from kling_voice import protocol
from kling_voice.cloning import Cloner, failure_of, voice_of
from kling_voice.creating import new_external_task_id
from kling_voice.errors import ClientClosedError, InvalidRequestError, KlingError, WaitTimeoutError
from kling_voice.identity import batch_prefix, default_key, derived_id, nth_id, seen_digest
from kling_voice.models import CloneResult, VoiceRequest, VoiceTask
from kling_voice.paging import pages
from kling_voice.transport import Transport
from kling_voice.waiting import OnUpdate

log = logging.getLogger("kling_voice")

LOOK_AHEAD = 8  # requests taken from the source that have no slot yet
SCAN_ITEMS = 30_000  # of the list, read before a resumed batch begins
_SCAN_BLANK_ITEMS = 3_000  # of the list in a row without a task of the batch end the scan
_SCAN_PAGE = 1000

Requests = Iterable[VoiceRequest] | AsyncIterable[VoiceRequest]


class Batch:
    """One run of ``clone_voices``.

    Args:
        transport: Reads the list through this.
        cloner: Clones through this.
        batch_id: What the external ids are derived from; ``None`` for random ones.
        concurrency: The caller's own cap on tasks in flight; ``None`` for the account's limit.
        retry_failed: How often a task that ended as failed is tried again.
        timeout: Seconds from an accepted create to the task's end; ``None`` for ever.
        on_update: Told of each change of each task's status.
    """

    def __init__(
        self,
        transport: Transport,
        cloner: Cloner,
        *,
        batch_id: str | None,
        concurrency: int | None,
        retry_failed: int,
        timeout: float | None,
        on_update: OnUpdate | None,
    ) -> None:
        self._transport = transport
        self._cloner = cloner
        self._batch_id = batch_id
        self._own_cap = None if concurrency is None else asyncio.Semaphore(concurrency)
        self._retry_failed = retry_failed
        self._timeout = timeout
        self._on_update = None if on_update is None else self._guard(on_update)
        self._ahead = asyncio.Semaphore(LOOK_AHEAD)
        self._seen: set[bytes] = set()
        self._existing: dict[str, Any] = {}  # raw items of the list, by external id
        self._results: asyncio.Queue[CloneResult | None] = asyncio.Queue()
        self._room = asyncio.Event()  # the consumer keeps up
        self._room.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._feeder: asyncio.Task[None] | None = None
        self._last_error: BaseException | None = None  # raised when all taken ones are reported
        self._fatal: BaseException | None = None  # raised at once

    async def run(self, requests: Requests) -> AsyncGenerator[CloneResult, None]:
        """Clone the voices; gives each result as it comes.

        Raises:
            KlingError: An error that concerns the whole account, or the client was closed.
        """
        self._feeder = self._start(self._feed(requests))
        try:
            while True:
                result = await self._next()
                if result is None:
                    break
                yield result
            if self._last_error is not None:
                raise self._last_error
        finally:
            running = list(self._tasks)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _next(self) -> CloneResult | None:
        """Give the next result; ``None`` after the last one."""
        if self._results.qsize() <= self._cloner.slots.window:
            self._room.set()
        result = await self._results.get()
        if self._fatal is not None:
            raise self._fatal
        return result

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._cloner.start(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if self._cloner.closed:
                self._stop(ClientClosedError("The client was closed while a batch was running."))
        elif (error := task.exception()) is not None:
            self._stop(error)
        if not self._tasks:
            self._results.put_nowait(None)

    def _stop(self, error: BaseException) -> None:
        """End the run with *error*, whatever is still to come."""
        if self._fatal is None:
            self._fatal = error
            self._results.put_nowait(None)

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

    async def _feed(self, requests: Requests) -> None:
        if self._batch_id is not None:
            await self._scan(batch_prefix(self._batch_id))
        source = _each(requests)
        try:
            while True:
                await self._room.wait()
                await self._ahead.acquire()
                if self._own_cap is not None:
                    await self._own_cap.acquire()
                if self._last_error is not None:
                    return
                try:
                    request = await anext(source)
                except StopAsyncIteration:
                    return
                except Exception as error:  # the caller's own; what was taken is reported first
                    self._last_error = error
                    return
                self._start(self._clone(request))
        finally:
            await source.aclose()

    async def _scan(self, prefix: str) -> None:
        """Find what an earlier run has created, as far as the front of the list shows it."""
        read = blank = 0
        try:
            async for envelope in pages(self._transport, protocol.VOICES, _SCAN_PAGE):
                items = protocol.read_items(envelope)
                read += len(items)
                blank += len(items)
                for item in items:
                    info = item.get("task_info") if type(item) is dict else None
                    external = info.get("external_task_id") if type(info) is dict else None
                    if type(external) is str and external.startswith(prefix):
                        self._existing[external] = item
                        blank = 0
                if read >= SCAN_ITEMS or blank >= _SCAN_BLANK_ITEMS:
                    return
        except KlingError as error:
            if protocol.concerns_account(error):
                raise
            # Slower, and just as correct: what exists is refused as a duplicate and adopted.
            log.warning("The list could not be read; the batch goes on without it: %s", error)

    # --- one request ---

    async def _clone(self, request: VoiceRequest) -> None:
        permit = _Permit(self._ahead)
        try:
            result = await self._result(request, permit)
        finally:
            permit.give_back()
            if self._own_cap is not None:
                self._own_cap.release()
        if result.error is not None and protocol.concerns_account(result.error):
            self._last_error = self._last_error or result.error
            if self._feeder is not None:
                self._feeder.cancel()  # it may wait for a source that gives nothing more
        self._results.put_nowait(result)
        if self._results.qsize() > max(LOOK_AHEAD, self._cloner.slots.window):
            self._room.clear()

    async def _result(self, request: VoiceRequest, permit: "_Permit") -> CloneResult:
        task: VoiceTask | None = None
        try:
            if not isinstance(request, VoiceRequest):
                raise InvalidRequestError(
                    f"requests must give VoiceRequest objects, not {type(request).__name__}.",
                    field="requests",
                )
            external_task_id = await self._identify(request)
            self._cloner.check(request, external_task_id)
            for attempt in range(self._retry_failed + 1):
                task = await self._cloner.clone(
                    request,
                    nth_id(external_task_id, attempt),
                    timeout=self._timeout,
                    on_update=self._on_update,
                    known=self._known(nth_id(external_task_id, attempt), request),
                    on_slot=permit.give_back,
                )
                if not task.failed:
                    return CloneResult(request, task, voice_of(task), None)
            assert task is not None
            return CloneResult(request, task, None, failure_of(task))
        except ClientClosedError:
            raise
        except Exception as error:
            last = error.task if isinstance(error, WaitTimeoutError) else None
            return CloneResult(request, last or task, None, error)

    async def _identify(self, request: VoiceRequest) -> str:
        """Give the request's external id.

        Raises:
            InvalidRequestError: The batch has had a request of this key or id.
        """
        if request.external_task_id is not None:
            external_task_id = protocol.check_id(request.external_task_id, "external_task_id")
            field = "external_task_id"
        elif self._batch_id is None:
            return new_external_task_id()
        else:
            key = request.key
            if key is None:
                key = (
                    await asyncio.to_thread(default_key, request)
                    if request.voice_file
                    else (default_key(request))
                )
            elif not isinstance(key, str) or not key:
                raise InvalidRequestError("key must be a non-empty string.", field="key")
            external_task_id = derived_id(self._batch_id, key)
            field = "key"
        if self._batch_id is not None:
            digest = seen_digest(external_task_id)
            if digest in self._seen:
                raise InvalidRequestError(
                    f"The batch has had a request with this {field} already (the default key is"
                    " made of the name and the source); nothing was created for this one.",
                    field=field,
                )
            self._seen.add(digest)
        return external_task_id

    def _known(self, external_task_id: str, request: VoiceRequest) -> VoiceTask | None:
        item = self._existing.pop(external_task_id, None)
        if item is None:
            return None
        try:
            task = protocol.read_item(item, None)
        except KlingError:
            return None  # the create will be refused and the task queried, which tells more
        if task.succeeded and not task.voices:
            return None
        return task if protocol.fits(task, external_task_id, request.voice_name) else None


class _Permit:
    """A place among those taken from the source that have no slot yet; given back once."""

    def __init__(self, ahead: asyncio.Semaphore) -> None:
        self._ahead: asyncio.Semaphore | None = ahead

    def give_back(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.release()


async def _each(requests: Requests) -> AsyncGenerator[VoiceRequest, None]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
