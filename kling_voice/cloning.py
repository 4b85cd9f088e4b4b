"""One voice, from the request to the end of its task: slot, recording, create, wait.

The slots, the recordings and the background waits of one client live here, shared by every
``clone_voice`` and every batch of it.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

from kling_voice import protocol
from kling_voice.creating import Creation, new_external_task_id
from kling_voice.errors import (
    ClientClosedError,
    ConcurrencyLimitError,
    InvalidRequestError,
    KlingError,
    RateLimitError,
    ResponseError,
    TaskFailedError,
    WaitTimeoutError,
)
from kling_voice.hosting import Hosting
from kling_voice.models import Voice, VoiceRequest, VoiceTask
from kling_voice.protocol import Call
from kling_voice.slots import Slots
from kling_voice.transport import Transport
from kling_voice.waiting import OnUpdate, TaskWatcher

_log = logging.getLogger("kling_voice")

_LAG = 60.0  # seconds for which a task that exists and that reads do not show is looked for
_UPLOADS_AHEAD = 8  # recordings that are being published, or are and have no slot yet


class Cloner:
    """Clones voices for one client.

    Args:
        transport: Sends through this.
        watcher: Waits through this.
        hosting: Publishes recordings through this.
        callback_url: What creates carry if their request names none.
    """

    def __init__(
        self,
        transport: Transport,
        watcher: TaskWatcher,
        hosting: Hosting,
        *,
        callback_url: str | None = None,
    ) -> None:
        self.slots: Slots = Slots()
        self.hosting = hosting
        self._transport = transport
        self._watcher = watcher
        self._callback_url = callback_url
        self._uploads = asyncio.Semaphore(_UPLOADS_AHEAD)
        self._background: set[asyncio.Task[None]] = set()
        self.closed: bool = False

    # --- the pieces ---

    def check(self, request: VoiceRequest, external_task_id: str | None = None) -> None:
        """Refuse a request that cannot be sent, before anything is done for it.

        Args:
            request: What to clone.
            external_task_id: Its idempotency key; ``None`` if one is still to be made.

        Raises:
            InvalidRequestError: An argument is one that the vendor would refuse.
        """
        self._call(request, external_task_id, None)

    def _call(
        self, request: VoiceRequest, external_task_id: str | None, hosted: str | None
    ) -> Call:
        try:
            return self._built(request, external_task_id, hosted)
        except InvalidRequestError as error:
            error.external_task_id, error.outcome = external_task_id, "not_created"
            raise

    def _built(
        self, request: VoiceRequest, external_task_id: str | None, hosted: str | None
    ) -> Call:
        voice_url = request.voice_url
        if request.voice_file is not None:
            if voice_url is not None or request.video_id is not None:
                raise InvalidRequestError(
                    "Give exactly one of voice_url, video_id and voice_file, not several.",
                    field="source",
                )
            if not isinstance(request.voice_file, str | os.PathLike):
                raise InvalidRequestError(
                    f"voice_file must be a path, not {type(request.voice_file).__name__}.",
                    field="voice_file",
                )
            voice_url = hosted or "https://checked.before.it.is.published.invalid/"
        return protocol.create_call(
            request.voice_name,
            external_task_id="new" if external_task_id is None else external_task_id,
            voice_url=voice_url,
            video_id=request.video_id,
            callback_url=(
                self._callback_url if request.callback_url is None else request.callback_url
            ),
        )

    async def create(self, request: VoiceRequest) -> VoiceTask:
        """Create a task without a slot, within the client's ``RetryPolicy``.

        Raises:
            KlingError: The create failed; ``outcome`` tells what that means.
        """
        external_task_id = request.external_task_id
        self.check(request, external_task_id)
        if (found := await self._before_upload(request, external_task_id)) is not None:
            return found
        own_id = external_task_id or new_external_task_id()
        hosted = await self._publish(request, own_id)
        creation = self._creation(request, own_id, hosted, new=external_task_id is None)
        try:
            return await creation.run()
        except (KlingError, asyncio.CancelledError):
            await self._withdraw(creation, hosted)
            raise

    async def _before_upload(
        self, request: VoiceRequest, external_task_id: str | None
    ) -> VoiceTask | None:
        """Find the task of a recording that need not be published, since the task exists.

        Raises:
            KlingError: The account may not do anything.
        """
        if request.voice_file is None or external_task_id is None:
            return None  # a create that is refused as a duplicate is cheaper than a query before
        try:
            envelope = await self._transport.call(protocol.get_call(external_task_id))
            task = protocol.read_task(envelope)
        except KlingError as error:
            if protocol.concerns_account(error) or isinstance(error, ClientClosedError):
                error.external_task_id, error.outcome = external_task_id, "not_created"
                raise
            return None  # there is none, or the create will tell
        return task if protocol.fits(task, external_task_id, request.voice_name) else None

    async def _publish(self, request: VoiceRequest, external_task_id: str) -> str | None:
        if request.voice_file is None:
            return None
        try:
            return await self.hosting.publish(request.voice_file, external_task_id)
        except KlingError as error:
            error.external_task_id, error.outcome = external_task_id, "not_created"
            raise

    async def _withdraw(self, creation: Creation, hosted: str | None) -> None:
        """Discard the recording of a create of which the vendor has certainly made nothing."""
        if hosted is not None and not creation.doubtful:
            await self.hosting.discard(creation.external_task_id, hosted)

    async def wait(
        self, task: VoiceTask | str, *, timeout: float | None, on_update: OnUpdate | None
    ) -> VoiceTask:
        """Wait for a task's end, and discard the recording that this client published for it.

        Raises:
            KlingError: The wait failed, or ended before the task.
        """
        ended = await self._watcher.wait(task, timeout=timeout, on_update=on_update)
        await self.hosting.discard(ended.external_task_id)
        return ended

    # --- all of it ---

    async def clone(
        self,
        request: VoiceRequest,
        external_task_id: str | None,
        *,
        timeout: float | None,
        on_update: OnUpdate | None = None,
        known: VoiceTask | None = None,
        on_slot: Callable[[], None] = lambda: None,
        on_task: Callable[[VoiceTask], None] = lambda task: None,
        on_late: Callable[[asyncio.Task[None]], None] = lambda holding: None,
    ) -> VoiceTask:
        """Create the task in a slot of the account and wait for its end.

        Args:
            request: What to clone; one with a ``voice_file`` is already checked.
            external_task_id: Its idempotency key; ``None`` makes one.
            timeout: Seconds from the accepted create to the end; ``None`` for ever.
            on_update: Told of each change of the task's status.
            known: The task, if it exists already: nothing is created or published then.
            on_slot: Called when the task has its slot.
            on_task: Given the task when it is there, and before its end is waited for.
            on_late: Given what holds the slot of a task that outlasts its wait.

        Raises:
            KlingError: The create or the wait failed.
        """
        task = known or await self._before_upload(request, external_task_id)
        new = external_task_id is None
        external_task_id = external_task_id or new_external_task_id()
        if task is None:
            patience = _LAG if timeout is None else min(_LAG, timeout)
            task = await self._create_in_slot(
                request, external_task_id, on_slot, new=new, patience=patience
            )
        elif task.is_done:
            await self.hosting.discard(external_task_id)
            return task
        else:
            self.slots.hold()
            on_slot()
        on_task(task)
        began = asyncio.get_running_loop().time()
        try:
            ended = await self._watcher.wait(task, timeout=timeout, on_update=on_update)
        except WaitTimeoutError as error:
            error.external_task_id = external_task_id
            if self.closed:
                self.slots.release()
            else:
                on_late(self._hold_on(task, began, timeout))
            raise
        except BaseException as error:
            self.slots.release()
            if isinstance(error, KlingError) and error.outcome is None:
                # The task exists, and whether it becomes a voice is open.
                error.external_task_id, error.outcome = external_task_id, "unknown"
            raise
        # The slot comes before anything else: the next create waits for it.
        self.slots.release(None if task.is_done else asyncio.get_running_loop().time() - began)
        await self.hosting.discard(external_task_id)
        return ended

    def _hold_on(self, task: VoiceTask, began: float, timeout: float | None) -> asyncio.Task[None]:
        """Hold the slot of a task that outlasts its wait, at most for one further timeout."""

        async def outlast() -> None:
            await self.wait(task, timeout=timeout, on_update=None)

        def over(holding: asyncio.Task[None]) -> None:
            if holding.cancelled() or (error := holding.exception()) is not None:
                self.slots.release()
                if not holding.cancelled():
                    _log.debug("Task %s is no longer watched: %s", task.task_id, error)
            else:
                self.slots.release(holding.get_loop().time() - began)

        holding = self.start(outlast())
        holding.add_done_callback(over)
        return holding

    async def _create_in_slot(
        self,
        request: VoiceRequest,
        external_task_id: str,
        on_slot: Callable[[], None],
        *,
        new: bool,
        patience: float,
    ) -> VoiceTask:
        if request.voice_file is None:
            hosted = None
            creation = self._creation(request, external_task_id, None, new=new, patience=patience)
            telling = await self._acquire(creation, hosted)
        else:
            async with self._uploads:
                hosted = await self._publish(request, external_task_id)
                creation = self._creation(
                    request, external_task_id, hosted, new=new, patience=patience
                )
                telling = await self._acquire(creation, hosted)
        on_slot()
        while True:
            # From here on a slot is held, until the answer says else.
            try:
                task = await creation.run(again=_not_for_slots)
            except ConcurrencyLimitError as error:
                self.slots.refused(error.retry_after)
            except BaseException as error:
                if isinstance(error, RateLimitError) and _passes(error):
                    self.slots.slow_down(error.retry_after)
                else:
                    self.slots.release()
                    await self._withdraw(creation, hosted)
                    raise
            else:
                if creation.adopted:
                    self.slots.adopted()
                else:
                    self.slots.accepted(telling)
                return task
            telling = await self._acquire(creation, hosted, first=True)

    async def _acquire(
        self, creation: Creation, hosted: str | None, *, first: bool = False
    ) -> bool:
        try:
            return await self.slots.acquire(first=first)
        except BaseException as error:
            if isinstance(error, KlingError):
                creation.mark(error)
            else:
                creation.warn()
            await self._withdraw(creation, hosted)
            raise

    def _creation(
        self,
        request: VoiceRequest,
        external_task_id: str,
        hosted: str | None,
        *,
        new: bool,
        patience: float = 0.0,
    ) -> Creation:
        return Creation(
            self._transport,
            self._call(request, external_task_id, hosted),
            external_task_id=external_task_id,
            voice_name=None if new else request.voice_name,
            patience=patience,
        )

    # --- the background ---

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that ends, at the latest, with the client.

        Raises:
            ClientClosedError: The client is closed.
        """
        if self.closed:
            work.close()
            raise ClientClosedError("The client was closed while a voice was being cloned.")
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def close(self) -> None:
        """End everything that runs in the background; tell what stays at the sample host."""
        self.closed = True
        self.slots.close()
        running = [task for task in self._background if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.hosting.close()


def _not_for_slots(error: BaseException) -> bool:
    """Tell whether a create's failure is to be tried again with its slot still held."""
    return protocol.is_transient(error) and not _passes(error)


def _passes(error: BaseException) -> bool:
    """Tell whether a create that was refused like this has only to wait, for however long.

    A 429 with a code of the vendor's that is not known here may be a quota that lasts all day.
    """
    return isinstance(error, ConcurrencyLimitError) or (
        isinstance(error, RateLimitError) and (error.code == 1302 or not 1000 <= error.code < 2000)
    )


def voice_of(task: VoiceTask) -> Voice:
    """Give the voice of an ended task.

    Raises:
        TaskFailedError: The task failed.
        ResponseError: The vendor says that it succeeded, and shows no voice.
    """
    if task.failed:
        raise failure_of(task)
    if task.voice is None:
        raise ResponseError(
            f"task {task.task_id} succeeded, but no voice is shown; query it again", http_status=200
        )
    return task.voice


def failure_of(task: VoiceTask) -> TaskFailedError:
    """Give the error that tells of a failed task."""
    error = TaskFailedError(
        f"Task {task.task_id} failed: {task.task_status_msg or 'the vendor gives no reason'}."
        " Nothing is deducted for a failed task; mend the cause and create it under a new"
        " external_task_id.",
        task=task,
    )
    error.external_task_id = task.external_task_id
    return error
