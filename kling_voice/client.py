"""KlingVoiceClient: the vendor's calls, and what is built of them."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from kling_voice import protocol
from kling_voice._version import __version__
from kling_voice.auth import (
    AccessKey,
    ApiKey,
    Credentials,
    TokenSource,
    credentials_from_environment,
)
from kling_voice.batch import Batch, Requests
from kling_voice.callbacks import CallbackReceiver
from kling_voice.cloning import Cloner, failure_of, voice_of
from kling_voice.errors import (
    BadRequestError,
    ConfigurationError,
    InvalidRequestError,
    KlingError,
    NotFoundError,
)
from kling_voice.hosting import Hosting
from kling_voice.models import CloneResult, Voice, VoiceRequest, VoiceTask
from kling_voice.paging import pages
from kling_voice.policies import PollingPolicy, RetryPolicy
from kling_voice.redaction import brief
from kling_voice.samples import SampleHost
from kling_voice.schedule import Schedule
from kling_voice.slots import Slots
from kling_voice.transport import Transport, proxy_for
from kling_voice.trials import download, is_worth_retrying, trial_url
from kling_voice.waiting import OnUpdate, TaskWatcher

_log = logging.getLogger("kling_voice")

_LONGEST = 1e9  # seconds, 31 years: more would be more than an event loop's clock can add


class KlingVoiceClient:
    """A client of the Kling AI custom-voice API, for one account and one event loop.

    Use it as an async context manager, or call :meth:`close` when done. All its methods may be
    awaited from many tasks at once.

    Example::

        async with KlingVoiceClient() as kling:
            voice = await kling.clone_voice("Ada", voice_url="https://example.com/ada.mp3")
            print(voice.voice_id, voice.trial_url)

    Args:
        credentials: An :class:`ApiKey` or an :class:`AccessKey`. ``None`` reads
            ``KLING_API_KEY``, else ``KLING_ACCESS_KEY`` with ``KLING_SECRET_KEY``.
        base_url: Where the vendor, or a gateway in front of it, is found; it may have a path.
            ``None`` reads ``KLING_BASE_URL``, else ``https://api-singapore.klingai.com``; inside
            China it is ``https://api-beijing.klingai.com``.
        session: An aiohttp session to use; it is never closed. ``None`` makes one, whose proxies
            come from the environment.
        timeout: Seconds that one attempt of one request may take in all, the body included.
        retry: How a failed request is tried again.
        polling: How often a task that someone waits for is looked at.
        callbacks: A :class:`CallbackReceiver`: creates carry its ``public_url``, and waits end the
            moment a genuine callback arrives.
        sample_host: Where ``voice_file`` recordings are published for the vendor to fetch.

    Raises:
        ConfigurationError: Credentials are missing, or a setting is not usable.
    """

    def __init__(
        self,
        credentials: Credentials | None = None,
        *,
        base_url: str | None = None,
        session: aiohttp.ClientSession | None = None,
        timeout: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),
        polling: PollingPolicy = PollingPolicy(),
        callbacks: CallbackReceiver | None = None,
        sample_host: SampleHost | None = None,
    ) -> None:
        if credentials is None:
            credentials = credentials_from_environment(os.environ)
        elif not isinstance(credentials, ApiKey | AccessKey):
            raise ConfigurationError(
                f"credentials must be an ApiKey or an AccessKey, not {type(credentials).__name__}."
            )
        if not _is_seconds(timeout) or timeout == 0:
            raise ConfigurationError("timeout must be a number of seconds greater than 0.")
        _check_kind("retry", retry, RetryPolicy)
        _check_kind("polling", polling, PollingPolicy)
        if session is not None:
            _check_kind("session", session, aiohttp.ClientSession)
        if callbacks is not None:
            _check_kind("callbacks", callbacks, CallbackReceiver)
        if isinstance(sample_host, type):
            raise ConfigurationError(
                f"sample_host must be an object, not the class {sample_host.__name__} itself."
            )
        if sample_host is not None and not (
            callable(getattr(sample_host, "publish", None))
            and callable(getattr(sample_host, "discard", None))
        ):
            raise ConfigurationError(
                "sample_host must have publish and discard, as ObjectStoreHost('s3://bucket/prefix')"
                f" has; {type(sample_host).__name__} has not."
            )
        if base_url is None:
            base_url = os.environ.get("KLING_BASE_URL") or protocol.DEFAULT_BASE_URL
        self._base_url = protocol.base_url(base_url)
        self._transport = Transport(
            tokens=TokenSource(credentials),
            base_url=self._base_url,
            session=session,
            timeout=min(timeout, _LONGEST),
            retry=retry,
            user_agent=f"kling-voice/{__version__}",
        )
        schedule = Schedule(polling, slow=callbacks is not None)
        if callbacks is None:
            self._watcher = TaskWatcher(self._transport, schedule)
        else:
            self._watcher = TaskWatcher(
                self._transport, schedule, kept=callbacks.kept, attach=callbacks.attach
            )
        self._callbacks = callbacks
        self._cloner = Cloner(
            self._transport,
            self._watcher,
            Hosting(sample_host),
            callback_url=callbacks.public_url if callbacks is not None else None,
        )

    def __repr__(self) -> str:
        state = "closed" if self._transport.closed else "open"
        return f"<KlingVoiceClient {self._base_url} {state}>"

    async def __aenter__(self) -> Self:
        self._transport.check_open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every wait and batch with :class:`ClientClosedError`, and close the connections.

        What the vendor has accepted goes on there. A borrowed session stays open. Calling it again
        does nothing.
        """
        if self._callbacks is not None:
            self._callbacks.detach(self._watcher)
        self._watcher.close()
        try:
            await self._cloner.close()
        finally:  # a batch that ends may cancel who closes the client in its on_update
            await self._transport.close()
        await self._watcher.closed()

    @property
    def slots(self) -> Slots:
        """The account's task slots as this client knows them: ``in_flight`` and ``limit``."""
        return self._cloner.slots

    # --- the vendor's calls ---

    async def create_voice(
        self,
        voice_name: str,
        *,
        voice_url: str | None = None,
        video_id: str | None = None,
        voice_file: str | os.PathLike[str] | None = None,
        callback_url: str | None = None,
        external_task_id: str | None = None,
    ) -> VoiceTask:
        """Create a custom voice, exactly once, and return its task without waiting for it.

        It is idempotent per ``external_task_id``: if a task of that id exists, it is returned, so
        that calling again after any failure is safe. Only the name can be compared with what
        exists, and only once that task has succeeded; the source cannot.

        Args:
            voice_name: 1 to 20 characters.
            voice_url: A public URL of an ``.mp3``/``.wav`` audio or ``.mp4``/``.mov`` video: one
                clean human voice, 5 to 30 s. Give exactly one source.
            video_id: A video made earlier on the account, by the V2.6 model with sound on, the
                Avatar API or the Lip-Sync API.
            voice_file: A local recording; needs the client's ``sample_host``. It is discarded
                there when a wait of this client sees the task's end.
            callback_url: Where the vendor reports changes; by default the receiver's public URL.
            external_task_id: The idempotency key, unique within the account; made if not given.

        Raises:
            InvalidRequestError: An argument was refused before anything was sent.
            SampleError: The vendor would refuse the local recording.
            KlingError: The create failed; ``.outcome`` says whether a voice may have been created,
                and ``.external_task_id`` is the id to call again with.
        """
        with _nothing_sent(external_task_id):
            self._transport.check_open()
        request = VoiceRequest(
            voice_name, voice_url, video_id, voice_file, callback_url, external_task_id
        )
        return await self._cloner.create(request)

    async def get_task(self, task_id: str) -> VoiceTask:
        """Query one task.

        Args:
            task_id: A ``task_id`` or an ``external_task_id``.

        Raises:
            InvalidRequestError: The id is empty, ``.`` or ``..``.
            NotFoundError: The vendor does not know the id.
            KlingError: No readable answer came.
        """
        return protocol.read_task(await self._transport.call(protocol.get_call(task_id)))

    async def list_tasks(self, page_num: int = 1, page_size: int = 30) -> list[VoiceTask]:
        """List one page of the account's tasks; in practice the newest come first.

        Args:
            page_num: 1 to 1000.
            page_size: 1 to 1000; some servers refuse more than 500.

        Raises:
            InvalidRequestError: A number is out of its range.
            KlingError: No readable answer came.
        """
        return await self._list(protocol.VOICES, page_num, page_size)

    async def list_presets(self, page_num: int = 1, page_size: int = 30) -> list[VoiceTask]:
        """List one page of the vendor's official voices, each as a task with its voice.

        Args:
            page_num: 1 to 1000.
            page_size: 1 to 1000; some servers refuse more than 500.

        Raises:
            InvalidRequestError: A number is out of its range.
            KlingError: No readable answer came.
        """
        return await self._list(protocol.PRESETS, page_num, page_size)

    async def _list(self, path: str, page_num: int, page_size: int) -> list[VoiceTask]:
        call = protocol.list_call(path, page_num, page_size)
        return protocol.read_tasks(await self._transport.call(call))

    def iter_tasks(self, page_size: int = 100) -> AsyncGenerator[VoiceTask, None]:
        """Iterate over all of the account's tasks, page by page, each task once.

        Args:
            page_size: Tasks a request, 1 to 1000; where the server refuses so many, fewer.

        Raises:
            InvalidRequestError: ``page_size`` is out of its range.
            KlingError: A page could not be read.
        """
        return self._iterate(protocol.VOICES, page_size)

    def iter_presets(self, page_size: int = 100) -> AsyncGenerator[VoiceTask, None]:
        """Iterate over all of the vendor's official voices, page by page.

        Args:
            page_size: Voices a request, 1 to 1000; where the server refuses so many, fewer.

        Raises:
            InvalidRequestError: ``page_size`` is out of its range.
            KlingError: A page could not be read.
        """
        return self._iterate(protocol.PRESETS, page_size)

    async def _iterate(self, path: str, page_size: int) -> AsyncGenerator[VoiceTask, None]:
        seen: set[str] = set()  # new tasks push old ones onto the next page, to be seen again
        async for envelope in pages(self._transport, path, page_size):
            for task in protocol.read_tasks(envelope):
                if task.task_id not in seen:
                    seen.add(task.task_id)
                    yield task

    async def delete_voice(self, voice_id: str) -> None:
        """Delete a custom voice; the official ones cannot be deleted.

        Args:
            voice_id: The ``voice_id`` of a :class:`Voice`.

        Raises:
            InvalidRequestError: The id is empty.
            BadRequestError: There is no such voice, or it was deleted before.
            KlingError: No readable answer came; deleting again does no harm.
        """
        doubtful = False

        def again(error: BaseException) -> bool:
            nonlocal doubtful
            if not protocol.is_transient(error):
                return False  # the last word says nothing of what came before it
            doubtful = doubtful or not protocol.certainly_not_processed(error)
            return True

        try:
            await self._transport.call(protocol.delete_call(voice_id), again=again)
        except (BadRequestError, NotFoundError) as error:
            if not (doubtful and protocol.says_deleted(error)):
                raise
            # An earlier attempt of this call was processed after all.

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, object] | None = None,
        json: object = None,
    ) -> Any:
        """Make any other signed call of the vendor's and return its envelope's ``data``.

        A ``GET`` is retried freely; anything else only when it was certainly not processed.

        Args:
            method: The HTTP method.
            path: The path behind ``base_url``, beginning with ``/``.
            params: The query.
            json: The body.

        Raises:
            InvalidRequestError: An argument cannot be sent.
            KlingError: The call failed.
        """
        call = protocol.other_call(method, path, params, json)
        return (await self._transport.call(call)).data

    # --- what is built of them ---

    async def wait_for_task(
        self,
        task: VoiceTask | str,
        *,
        timeout: float | None = 600.0,
        on_update: OnUpdate | None = None,
        raise_on_failure: bool = True,
    ) -> VoiceTask:
        """Wait until a task has ended, and return it in its last state.

        All waits of a client share their requests: a thousand waiting tasks cost about one list
        request a tick. Failures that pass never end a wait.

        Args:
            task: A :class:`VoiceTask`, a ``task_id`` or an ``external_task_id``.
            timeout: Seconds; ``None`` waits for ever. The task itself has no deadline.
            on_update: A function or coroutine function, called with the task at each change of its
                status; an exception in it reaches the caller.
            raise_on_failure: Whether a task that ended as failed raises, or is returned.

        Raises:
            InvalidRequestError: An argument is not usable.
            TaskFailedError: The task ended as failed.
            WaitTimeoutError: It has not ended in time; it goes on, and may be waited for again.
            NotFoundError: The vendor has not known the task for 10 s.
            ClientClosedError: The client was closed meanwhile.
            KlingError: The task cannot be looked at, for good.
        """
        if not isinstance(task, VoiceTask):
            protocol.check_id(task, "task")
        _check_timeout(timeout)
        _check_on_update(on_update)
        ended = await self._cloner.wait(task, timeout=timeout, on_update=on_update)
        if ended.failed and raise_on_failure:
            raise failure_of(ended)
        return ended

    async def clone_voice(
        self,
        voice_name: str,
        *,
        voice_url: str | None = None,
        video_id: str | None = None,
        voice_file: str | os.PathLike[str] | None = None,
        callback_url: str | None = None,
        external_task_id: str | None = None,
        timeout: float | None = 600.0,
        on_update: OnUpdate | None = None,
    ) -> Voice:
        """Clone a voice: wait for a slot of the account, create, wait for the end, exactly once.

        Call it as often at once as you like: the client keeps within the account's limit of tasks
        in flight, which it learns by itself.

        Args:
            voice_name: As for :meth:`create_voice`, like all the sources and ids.
            voice_url: A public URL of the recording. Give exactly one source.
            video_id: A video made earlier on the account.
            voice_file: A local recording; needs the client's ``sample_host``.
            callback_url: Where the vendor reports changes.
            external_task_id: The idempotency key; made if not given.
            timeout: Seconds from the accepted create to the end; ``None`` for ever.
            on_update: Called with the task at each change of its status.

        Raises:
            InvalidRequestError: An argument was refused before anything was sent.
            SampleError: The vendor would refuse the local recording.
            TaskFailedError: The task ended as failed.
            WaitTimeoutError: The task has not ended in time; ``.task`` is its last state.
            KlingError: The create failed; ``.outcome`` says whether a voice may have been created.
        """
        with _nothing_sent(external_task_id):
            self._transport.check_open()
            _check_timeout(timeout)
            _check_on_update(on_update)
        request = VoiceRequest(
            voice_name, voice_url, video_id, voice_file, callback_url, external_task_id
        )
        self._cloner.check(request, external_task_id)
        created: list[VoiceTask] = []
        try:
            task = await self._cloner.clone(
                request,
                external_task_id,
                timeout=timeout,
                on_update=on_update,
                on_task=created.append,
            )
        except BaseException as error:
            if created and not isinstance(error, KlingError):
                _tell_of(created[0], error)
            raise
        return voice_of(task)

    def clone_voices(
        self,
        requests: Requests,
        *,
        batch_id: str | None = None,
        concurrency: int | None = None,
        retry_failed: int = 0,
        timeout: float | None = 600.0,
        on_update: OnUpdate | None = None,
    ) -> AsyncGenerator[CloneResult, None]:
        """Clone many voices; gives each result as it comes, in no particular order.

        With a ``batch_id`` the run can be killed at any moment and started again, or run on
        several machines at once: each voice is created once, and every run gets all results.
        Without one the ids are random, and the run cannot be resumed.

        Example::

            async with aclosing(kling.clone_voices(requests, batch_id="cast")) as results:
                async for result in results:
                    print(result.request.voice_name, result.voice or result.error)

        Args:
            requests: :class:`VoiceRequest` objects from an iterable or an async iterable, endless
                if you like; read a few ahead of the account's slots.
            batch_id: Any name that stays the same when the batch is run again.
            concurrency: Your own cap on this batch's tasks in flight; the account's limit is
                learned, and need not be given.
            retry_failed: How often a task that ended as failed is tried again, each time as a new
                task.
            timeout: Seconds from a voice's accepted create to its end; ``None`` for ever.
            on_update: Called with a task at each change of its status; an exception in it ends the
                batch.

        Raises:
            InvalidRequestError: An argument is not usable.
            AuthenticationError: After the results of the requests already taken, as are
                :class:`AccountError`, :class:`PermissionDeniedError` and a :class:`PolicyError`
                1304: they concern the whole account.
            ClientClosedError: The client was closed meanwhile.
        """
        _check_timeout(timeout)
        _check_on_update(on_update)
        if batch_id is not None and (not isinstance(batch_id, str) or not batch_id):
            raise InvalidRequestError("batch_id must be a non-empty string.", field="batch_id")
        _check_count(concurrency, "concurrency", 1)
        _check_count(retry_failed, "retry_failed", 0)
        batch = Batch(
            self._transport,
            self._cloner,
            requests,
            batch_id=batch_id,
            concurrency=concurrency,
            retry_failed=retry_failed,
            timeout=timeout,
            on_update=on_update,
        )
        return batch.run()

    async def download_trial(self, voice: Voice, path: str | os.PathLike[str]) -> Path:
        """Download a voice's trial recording to a file, and return its path.

        It is written beside the target and then renamed, so that no half file is ever seen. No
        credentials are sent. The vendor deletes the files after 30 days.

        Args:
            voice: A voice with a ``trial_url``.
            path: The file to write; an existing one is replaced.

        Raises:
            InvalidRequestError: The voice has no ``trial_url``, or the path cannot be written.
            NotFoundError: The URL has expired.
            ResponseError: The URL answers with something else than the file.
            ConnectionFailedError: No answer came.
        """
        self._transport.check_open()
        if not isinstance(voice, Voice):
            raise InvalidRequestError(
                f"voice must be a Voice, not {type(voice).__name__}.", field="voice"
            )
        if not isinstance(path, str | os.PathLike):
            raise InvalidRequestError(
                f"path must be a path, not {type(path).__name__}.", field="path"
            )
        url, what = trial_url(voice), "A trial's download"

        def attempt(number: int, timeout: float | None) -> Awaitable[Path]:
            work = download(
                self._transport.session,
                url,
                path,
                timeout=self._transport.timeout,
                proxy=proxy_for,
            )
            return self._transport.bounded(work, what, timeout)

        return await self._transport.persist(attempt, is_worth_retrying, what=what)


@contextmanager
def _nothing_sent(external_task_id: str | None) -> Iterator[None]:
    """Write into an error of a create that nothing was created."""
    try:
        yield
    except KlingError as error:
        error.external_task_id, error.outcome = external_task_id, "not_created"
        raise


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")


def _is_seconds(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    )


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not _is_seconds(timeout):
        raise InvalidRequestError(
            f"timeout must be None or a number of seconds, not {brief(timeout)}.", field="timeout"
        )


def _check_on_update(on_update: OnUpdate | None) -> None:
    if on_update is not None and not callable(on_update):
        raise InvalidRequestError(
            f"on_update must be a function, not {type(on_update).__name__}.", field="on_update"
        )


def _tell_of(task: VoiceTask, error: BaseException) -> None:
    """Tell which task goes on when the wait for it ends by what is not ours."""
    goes_on = f"The voice's task goes on: wait_for_task({task.task_id!r}) gives its end."
    if isinstance(error, asyncio.CancelledError):
        _log.warning("clone_voice was cancelled. %s", goes_on)
    else:
        error.add_note(goes_on)


def _check_count(value: int | None, field: str, minimum: int) -> None:
    if value is None and field == "concurrency":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InvalidRequestError(
            f"{field} must be a whole number of at least {minimum}, not {brief(value)}.",
            field=field,
        )
