"""One create, exactly once: the external task id, made before the first byte, is the key.

After a failure that leaves the outcome open, the task is looked up by that id; what is sent again
bears the same id, so that the vendor refuses a second task. A refusal as a duplicate means that
the task exists: it is fetched and given, whichever call or process created it.
Source: the vendor refuses a second ``external_task_id`` with HTTP 400, code 1201, "already exist",
and a refused create costs nothing (observed September 2026).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from kling_voice import protocol
from kling_voice.errors import (
    BadRequestError,
    KlingError,
    NotFoundError,
    ResponseError,
)
from kling_voice.identity import ANY_PREFIX
from kling_voice.models import VoiceTask
from kling_voice.protocol import Call, Envelope
from kling_voice.transport import Transport

_log = logging.getLogger("kling_voice")


_UNSEEN = (
    "If a create with this id was sent in the last seconds, call again with the same id, since"
    " reads may lag; else use another external_task_id."
)
_ANOTHERS = "Use another external_task_id for another voice."
_LOOK_EVERY = 5.0  # seconds, for a task that exists and that reads do not show yet


def new_external_task_id() -> str:
    """Make a random external task id: short, and safe in a URL's path."""
    return f"{ANY_PREFIX}{uuid.uuid4().hex}"


class Creation:
    """One create that is under way; its :meth:`run` may be called again after a failure.

    Args:
        transport: Sends through this.
        call: The create.
        external_task_id: Its idempotency key.
        voice_name: What a task that bears the key must be named; ``None`` if the key is new.
        patience: Seconds for which a task that certainly exists is looked for beyond the client's
            ``RetryPolicy``, since reads may lag behind.

    Attributes:
        external_task_id: Its idempotency key.
        doubtful: Whether an attempt ended without telling if the vendor acted on it.
        adopted: Whether the task existed before: this creation's own create was refused.
    """

    def __init__(
        self,
        transport: Transport,
        call: Call,
        *,
        external_task_id: str,
        voice_name: str | None,
        patience: float = 0.0,
    ) -> None:
        self.external_task_id = external_task_id
        self.doubtful: bool = False
        self.adopted: bool = False
        self._has_left = False  # the attempt's body
        self._unseen = False  # a task that certainly exists is shown by no read yet
        # Nothing else than a custom voice bears an id that was made here.
        self._is_made_here = external_task_id.startswith(ANY_PREFIX)
        self._patience = patience if self._is_made_here else 0.0
        self._transport = transport
        self._call = call
        self._voice_name = voice_name
        self._started = 0.0

    async def run(self, *, again: Callable[[BaseException], bool] | None = None) -> VoiceTask:
        """Create the task, or find the one that bears its external id.

        Args:
            again: Which failures to try again within the client's ``RetryPolicy``; by default all
                that may pass.

        Raises:
            KlingError: The last failure, with ``external_task_id`` and ``outcome``.
        """
        try:
            return await self._run(again or protocol.is_transient)
        except KlingError as error:
            self.mark(error)
            raise
        except asyncio.CancelledError:
            self.warn()
            raise

    def warn(self) -> None:
        """Tell the log the id of a create that is cancelled while its outcome is open."""
        if self.doubtful:
            _log.warning(
                "A create was cancelled in flight; the voice may have been created:"
                " create it again with external_task_id=%r to get it",
                self.external_task_id,
            )

    def mark(self, error: KlingError) -> None:
        """Write into an error what it means for the voice and the money."""
        error.external_task_id = self.external_task_id
        error.outcome = "unknown" if self.doubtful or self._unseen else "not_created"

    async def _run(self, again: Callable[[BaseException], bool]) -> VoiceTask:
        self._started = time.monotonic()
        try:
            return await self._transport.persist(
                self._attempt, again, what=self._call, started=self._started
            )
        except KlingError as error:
            if self.doubtful and protocol.is_transient(error):
                task = await self._find(None)  # the last word: it may be there all the same
                if task is not None:
                    return task
            raise

    async def _attempt(self, number: int, timeout: float | None) -> VoiceTask:
        self._transport.check_open()
        if self.doubtful:
            if (task := await self._find(timeout)) is not None:
                return task
            if timeout is not None:
                timeout = self._transport.time_left(self._started)
        self._has_left = False
        try:
            envelope = await self._transport.send(
                self._call, timeout=timeout, number=number, on_leaving=self._leaves
            )
            return protocol.read_task(envelope)
        except KlingError as error:
            if not protocol.is_duplicate(error):
                self.doubtful = self.doubtful or not protocol.certainly_not_processed(error)
                raise
            refusal = error
        except BaseException:  # cancelled, for one; perhaps while it queued for a connection
            self.doubtful = self.doubtful or self._has_left
            raise
        return await self._adopt(refusal)

    def _leaves(self) -> None:
        self._has_left = True

    async def _find(self, timeout: float | None) -> VoiceTask | None:
        """Look the task up by its external id; ``None`` if that tells nothing for now.

        Raises:
            KlingError: It cannot be looked up, or the id is taken by another voice.
        """
        try:
            envelope = await self._transport.send(
                protocol.get_call(self.external_task_id), timeout=timeout
            )
            return self._ours(protocol.read_task(envelope))
        except KlingError as error:
            if isinstance(error, NotFoundError) or protocol.is_transient(error):
                return None
            raise

    async def _adopt(self, refusal: KlingError) -> VoiceTask:
        """Fetch the task that holds the external id; reads may lag behind the create.

        Raises:
            BadRequestError: What holds the id is no custom voice, or one of another name.
        """
        self.adopted = self.adopted or not self.doubtful
        try:
            envelope = await self._look()
        except NotFoundError:
            self._unseen = self._is_made_here or self._transport.retry.attempts == 1
            holder = "what cannot be read as a custom voice"
            raise self._taken(holder, _UNSEEN, refusal) from None
        except KlingError:
            self.doubtful = True  # the task exists, and what it is could not be learned
            raise
        try:
            task = protocol.read_task(envelope)
        except ResponseError:
            holder = "what cannot be read as a custom voice"
            raise self._taken(holder, _ANOTHERS, refusal) from None
        return self._ours(task)

    async def _look(self) -> Envelope:
        """Query what holds the external id, for as long as reads may lag behind.

        Raises:
            NotFoundError: No query shows it.
            KlingError: It cannot be queried.
        """
        until = time.monotonic() + self._patience
        started = self._started
        while True:
            try:
                return await self._transport.call(
                    protocol.get_call(self.external_task_id),
                    again=lambda error: (
                        isinstance(error, NotFoundError) or protocol.is_transient(error)
                    ),
                    started=started,
                )
            except NotFoundError:
                if (left := until - time.monotonic()) <= 0:
                    raise
            pause = min(_LOOK_EVERY, left)
            started = time.monotonic() + pause
            await self._transport.sleep(pause)

    def _ours(self, task: VoiceTask) -> VoiceTask:
        if protocol.fits(task, self.external_task_id, self._voice_name):
            return task
        if task.external_task_id != self.external_task_id:
            raise self._taken("another task", _UNSEEN)
        self.doubtful = False  # ids are unique: what holds this one is all that was created
        raise self._taken("a task with another voice_name", _ANOTHERS)

    def _taken(self, holder: str, hint: str, refusal: KlingError | None = None) -> BadRequestError:
        told = refusal if isinstance(refusal, BadRequestError) else None
        return BadRequestError(
            f"external_task_id {self.external_task_id!r} is taken by {holder}",
            code=1201,
            http_status=told.http_status if told else 0,
            request_id=told.request_id if told else None,
            # As long as it is open what became of this id, another one could bill twice.
            hint="Reads may lag behind." if self.doubtful or self._unseen else hint,
        )
