"""The emulator itself: an HTTP server that answers as the vendor does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from attrs import evolve, field, frozen
from yarl import URL

from kling_voice.auth import AccessKey
from kling_voice.emulator.account import Account, ListOrder, State, Task, TaskView
from kling_voice.emulator.callbacks import Callbacks, CallbackShape
from kling_voice.emulator.clock import Clock
from kling_voice.emulator.codes import CODES, BusinessError
from kling_voice.emulator.faults import ENVELOPES, PROCESSED, Fault, Faults
from kling_voice.emulator.media import (
    Media,
    SampleError,
    content_type,
    fetch_sample,
    require_tinytag,
)
from kling_voice.emulator.shapes import OFFICIAL_VOICES, Shapes, to_json
from kling_voice.emulator.tokens import authenticate
from kling_voice.emulator.validation import read_create, read_delete, read_object, read_paging

__all__ = ["Emulator"]

_VOICES = "/v1/general/custom-voices"
_CALLS = {
    ("POST", _VOICES): "create",
    ("GET", _VOICES): "list",
    ("GET", "/v1/general/presets-voices"): "presets",
    ("POST", "/v1/general/delete-voices"): "delete",
}
_TRIAL_LIFE = 30 * 86400.0
_FETCHES = 16
_GATEWAY_PAGE = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n"
    b"<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>nginx</center>\r\n"
    b"</body>\r\n</html>\r\n"
)
_NOT_TEXT = b'\x1f\x8b\x08\xff\xfe{"code":0,"message":"\xe9\x80'

_log = logging.getLogger("kling_voice.emulator")


@frozen
class _Answer:
    """An HTTP answer before it is put on the wire."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(factory=dict)


class Emulator:
    """The vendor's custom-voice API on this machine, as an async context manager.

    All settings below may be changed at any time where an attribute of that name exists. Every
    attribute and every method that is not a coroutine may be used from any thread.

    Args:
        concurrency_limit: tasks in flight at once; over it a create is refused with 1303.
        task_seconds: a task's whole life, or a function from the number of the create to it.
        faults: what goes wrong on the way.
        webhook_secret: signs the callbacks (`whsec_` and base64).
        fetch_samples: fetch and check each `voice_url`, as the vendor does (extra `emulator`).
        fetch_seconds: how long the fetch of a `voice_url` may take, in real seconds.
        host: the address to listen on.
        port: the port to listen on; 0 picks a free one.
        prefix: a path in front of all others, as behind a gateway.
        time_scale: emulator seconds in a real one; 0: only `advance` moves the tasks.
        clock_skew: how far the server's wall clock is ahead, in seconds.
        fail_when: given the body of a create, answers why its task is to fail, or None.
        read_lag: seconds before queries and lists show a new task.
        list_order: `newest` first, `oldest` first, or `shuffled`.
        page_cap: the largest `pageSize`.
        page_clamp: cut a larger page to the cap quietly, where the vendor refuses it.
        delete_data: whether a delete answers `data`.
        succeed_word: how answers spell the good end.
        callback_shape: `legacy` (the task object) or `new`.
        callback_repeat: the part of callbacks that is delivered twice.
        callback_drop: the part that is never delivered.
        callback_reorder: the part that comes after the task's next one.
        credentials: the access key to accept; made up unless given.
        api_key: the API key to accept; made up unless given.

    Attributes:
        base_url: where the emulator listens, without a slash at the end.
        credentials: the access key that it accepts.
        api_key: the API key that it accepts.
        requests: every request that arrived, by `"METHOD /path/{id}"`.
        refused: every answer with a business code, by that code.
        callbacks: how many callbacks were `sent` (attempts), `delivered`, `failed` for good,
            `repeated`, `dropped` and `reordered`.
        faults: what goes wrong; None: nothing.
        fail_when: as the argument.
        page_cap: as the argument.
    """

    def __init__(
        self,
        *,
        concurrency_limit: int | None = None,
        task_seconds: float | Callable[[int], float] = 9.0,
        faults: Faults | None = None,
        webhook_secret: str | None = None,
        fetch_samples: bool = False,
        fetch_seconds: float = 10.0,
        host: str = "127.0.0.1",
        port: int = 0,
        prefix: str = "",
        time_scale: float = 1.0,
        clock_skew: float = 0.0,
        fail_when: Callable[[Mapping[str, Any]], str | None] | None = None,
        read_lag: float = 0.0,
        list_order: ListOrder = "newest",
        page_cap: int = 1000,
        page_clamp: bool = False,
        delete_data: bool = True,
        succeed_word: str = "succeed",
        callback_shape: CallbackShape = "legacy",
        callback_repeat: float = 0.0,
        callback_drop: float = 0.0,
        callback_reorder: float = 0.0,
        credentials: AccessKey | None = None,
        api_key: str | None = None,
    ) -> None:
        if fetch_samples:
            require_tinytag()
        if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
            raise ValueError(f"prefix begins with a slash and does not end with one: {prefix!r}")
        _check_kind("faults", faults, Faults, "None or Faults, such as Faults(0.2)")
        _check_kind("credentials", credentials, AccessKey, "None or an AccessKey")
        _check_kind("api_key", api_key, str, "None or a string")
        if fail_when is not None and not callable(fail_when):
            raise TypeError(f"fail_when must be None or a function, not {fail_when!r}")
        _check_limit(concurrency_limit)
        _check_life(task_seconds)
        self.credentials: AccessKey = credentials or AccessKey(
            access_key=secrets.token_hex(16), secret_key=secrets.token_hex(16)
        )
        self.api_key: str = api_key or f"api-key-{secrets.token_hex(16)}"
        self.base_url: str = ""
        self.requests: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        self.faults = faults
        self.fail_when = fail_when
        self.page_cap = page_cap
        self._page_clamp = page_clamp
        self._delete_data = delete_data
        self._list_frozen: float | None = None
        self._fetch_samples = fetch_samples
        self._fetch_seconds = fetch_seconds
        self._host, self._port, self._prefix = host, port, prefix
        self._clock = Clock(scale=time_scale, skew=clock_skew)
        self._account = Account(
            clock=self._clock,
            concurrency_limit=concurrency_limit,
            task_seconds=task_seconds,
            read_lag=read_lag,
            list_order=list_order,
        )
        self._shapes = Shapes(self._clock, owner=secrets.token_hex(8), succeed_word=succeed_word)
        self._callbacks = Callbacks(
            clock=self._clock,
            shapes=self._shapes,
            shape=callback_shape,
            secret=webhook_secret,
            repeat=callback_repeat,
            drop=callback_drop,
            reorder=callback_reorder,
        )
        self.callbacks: Counter[str] = self._callbacks.counts
        self._media = Media()
        self._videos: set[str] = set()
        self._checks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._fetching = asyncio.Semaphore(_FETCHES)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, backlog=1024)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        # Kept, so that it comes back there; older versions of aiohttp do not name it in the site.
        self._port = self._runner.addresses[0][1]
        origin = URL.build(scheme="http", host=self._host, port=self._port)
        self.base_url = f"{origin}{self._prefix}"
        self._shapes.base_url = self.base_url
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self._callbacks.start(self._session)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop = None
        self._closing.set()
        await self._callbacks.close()
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await self._session.close()
        await self._runner.cleanup()
        await asyncio.sleep(0)  # closed transports leave the loop in its next turn

    # What a test may look at and change

    @property
    def created(self) -> int:
        """How many tasks were created (preloaded ones do not count)."""
        return self._account.created

    @property
    def tasks(self) -> tuple[TaskView, ...]:
        """All tasks of the account as they are now, the oldest first."""
        return self._account.views()

    @property
    def in_flight(self) -> int:
        """Tasks that have not ended."""
        return self._account.in_flight

    @property
    def max_in_flight(self) -> int:
        """The most tasks that were in flight at once."""
        return self._account.max_in_flight

    @property
    def concurrency_limit(self) -> int | None:
        """Tasks in flight at once; None for no limit."""
        return self._account.concurrency_limit

    @concurrency_limit.setter
    def concurrency_limit(self, limit: int | None) -> None:
        self._account.concurrency_limit = limit

    @property
    def occupied(self) -> int:
        """Slots that another process on the account holds."""
        return self._account.occupied

    @occupied.setter
    def occupied(self, slots: int) -> None:
        self._account.occupied = slots

    @property
    def task_seconds(self) -> float | Callable[[int], float]:
        """The life of the tasks to come."""
        return self._account.task_seconds

    @task_seconds.setter
    def task_seconds(self, seconds: float | Callable[[int], float]) -> None:
        self._account.task_seconds = seconds

    @property
    def read_lag(self) -> float:
        """Seconds before queries and lists show a task to come."""
        return self._account.read_lag

    @read_lag.setter
    def read_lag(self, seconds: float) -> None:
        self._account.read_lag = seconds

    @property
    def list_frozen(self) -> bool:
        """Whether lists show what was when this was set, as a cache in front of them would."""
        return self._list_frozen is not None

    @list_frozen.setter
    def list_frozen(self, frozen: bool) -> None:
        self._list_frozen = self._clock.now() if frozen else None

    @property
    def clock_skew(self) -> float:
        """How far the server's wall clock is ahead, in seconds."""
        return self._clock.skew

    @clock_skew.setter
    def clock_skew(self, seconds: float) -> None:
        self._clock.skew = seconds

    def now(self) -> float:
        """The emulator's clock, which the tasks live by: seconds since it was made."""
        return self._clock.now()

    def advance(self, seconds: float) -> None:
        """Move the emulator's clocks forward; callbacks that fall due are sent."""
        self._clock.advance(seconds)
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._callbacks.wake)

    def preload(self, count: int) -> None:
        """Put finished tasks of someone else on the account, the newest ones at this moment."""
        self._account.preload(count)

    def reserve_external_id(self, external_task_id: str) -> None:
        """Let something that is not a custom voice hold an external id."""
        self._account.reserve_external_id(external_task_id)

    def add_video(self, video_id: str) -> None:
        """Let the account have a video, for `video_id`; without `fetch_samples` any will do."""
        self._videos.add(video_id)

    async def publish(self, path: str | Path, name: str) -> str:
        """Serve a copy of a local file, its extension kept; answers its URL."""
        return f"{self.base_url}{await self._media.publish(path, name)}"

    async def discard(self, url: str) -> None:
        """Serve a published file no more."""
        self._media.discard(url.removeprefix(self.base_url))

    # Requests

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if not path.startswith(f"{self._prefix}/"):
            return self._respond(_Answer(_GATEWAY_PAGE, 404, "text/html"))
        path = path.removeprefix(self._prefix)
        if request.method in ("GET", "HEAD") and path.startswith("/media/"):
            self.requests[f"{request.method} {_media_route(path)}"] += 1
            return self._respond(self._serve_media(path))
        call, argument = _route(request.method, path)
        counted = f"{_VOICES}/{{id}}" if call == "get" else path
        self.requests[f"{request.method} {counted}"] += 1
        faults = self.faults
        if faults is not None and call is not None:
            fault = faults.draw(call)
            if fault is not None:
                return await self._fail(request, call, argument, faults, fault)
        return self._respond(await self._process(request, call, argument))

    async def _process(self, request: web.Request, call: str | None, argument: str) -> _Answer:
        """Do what is asked; whatever goes wrong is an envelope."""
        try:
            given = request.headers.getall("Authorization", [])
            authenticate(given, self.credentials, self.api_key, self._clock.wall())
            if call == "create":
                data = self._create(await _body(request))
            elif call == "get":
                data = self._shapes.queried(self._account.find(argument), self._clock.now())
            elif call == "list":
                data = self._list(request)
            elif call == "presets":
                data = self._presets(request)
            elif call == "delete":
                return self._delete(await _body(request))
            else:
                raise BusinessError(1202)
        except BusinessError as refusal:
            return self._refuse(refusal)
        except Exception:
            _log.exception("The emulator failed on %s %s", request.method, request.path)
            return self._refuse(BusinessError(5000))
        return _success(data)

    # The five calls

    def _create(self, raw: bytes) -> bytes:
        if self._closing.is_set():
            raise BusinessError(5001)  # what would come of the task is looked after no more
        sent = read_object(raw)
        body = read_create(sent)
        failure = self.fail_when(sent) if self.fail_when is not None else None
        task = self._account.create(body, failure=failure, checked=self._fetch_samples)
        answer = self._shapes.created(task)
        self._callbacks.follow(task)
        if self._fetch_samples:
            check = asyncio.create_task(self._check(task))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)
        return answer

    def _list(self, request: web.Request) -> bytes:
        paging = read_paging(request.query, cap=self.page_cap, clamp=self._page_clamp)
        frozen = self._list_frozen
        tasks = self._account.page(paging, until=frozen)
        now = self._clock.now() if frozen is None else frozen
        return _array([self._shapes.queried(task, now) for task in tasks])

    def _presets(self, request: web.Request) -> bytes:
        paging = read_paging(request.query, cap=self.page_cap, clamp=self._page_clamp)
        skipped = (paging.number - 1) * paging.size
        return _array(self._shapes.official()[skipped : skipped + paging.size])

    def _delete(self, raw: bytes) -> _Answer:
        voice_id = read_delete(read_object(raw))
        if voice_id in OFFICIAL_VOICES:
            raise BusinessError(1201, "a voice of the official library cannot be deleted")
        task = self._account.delete(voice_id)
        return _success(self._shapes.deleted(task) if self._delete_data else None)

    # Samples and trials

    async def _check(self, task: Task) -> None:
        """Fetch and judge the sample of a new task, then let it end."""
        failure = None
        try:
            await self._take_sample(task)
        except SampleError as refused:
            failure = str(refused)
        except Exception:
            _log.exception("The emulator failed on the sample of task %s", task.task_id)
            failure = "internal error"
        self._account.check_done(task, failure)
        self._callbacks.follow_end(task)

    async def _take_sample(self, task: Task) -> None:
        if task.body.voice_url is None:
            if task.body.video_id not in self._videos:
                raise SampleError(f"the account has no video {task.body.video_id}")
            return
        async with self._fetching:
            sample = await fetch_sample(
                self._session, task.body.voice_url, seconds=self._fetch_seconds
            )
        self._media.keep_trial(task.task_id, sample)
        task.trial_extension = sample.extension

    def _serve_media(self, path: str) -> _Answer:
        trial_id = path.removeprefix("/media/trials/").partition(".")[0]
        official = trial_id in OFFICIAL_VOICES and path == f"/media/trials/{trial_id}.mp3"
        if official or self._trial_is_kept(trial_id, path):
            content: bytes | None = self._media.trial(trial_id)
        else:
            content = self._media.file(path)
        if content is None:
            return _Answer(b"Not found", 404, "text/plain")
        return _Answer(content, content_type=content_type(path))

    def _trial_is_kept(self, task_id: str, path: str) -> bool:
        task = self._account.task(task_id)
        if task is None or path != task.trial_path:
            return False
        age = self._clock.wall() - task.created_wall
        return task.state(self._clock.now()) is State.SUCCEED and age < _TRIAL_LIFE

    # Faults

    async def _fail(
        self, request: web.Request, call: str, argument: str, faults: Faults, fault: Fault | int
    ) -> web.StreamResponse:
        """Let a request meet a fault."""
        if not isinstance(fault, Fault):
            return self._respond(self._refuse(BusinessError(fault)))
        answer = _Answer(b"")
        if fault in PROCESSED:
            answer = await self._process(request, call, argument)
        if fault in ENVELOPES:
            answer = self._refuse(BusinessError(ENVELOPES[fault]))
            if fault is Fault.RATE_LIMIT_RETRY_AFTER:
                answer = evolve(answer, headers={"Retry-After": faults.retry_after})
        elif fault in (Fault.HTML_502, Fault.HTML_502_AFTER):
            answer = _Answer(_GATEWAY_PAGE, 502, "text/html")
        elif fault is Fault.UNDECODABLE:
            answer = _Answer(_NOT_TEXT)
        elif fault is Fault.DELAY:
            await self._pause(faults.delay_seconds)
        elif fault is Fault.TRUNCATED:
            return await self._send_half(request, answer)
        else:
            if fault in (Fault.STALL, Fault.STALL_AFTER):
                await self._pause(faults.stall_seconds)
            _reset(request)
        return self._respond(answer)

    async def _pause(self, seconds: float | None) -> None:
        """Wait in real time, at most until the emulator closes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    async def _send_half(self, request: web.Request, answer: _Answer) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=self._headers(answer))
        response.content_length = len(answer.body)
        response.force_close()
        with contextlib.suppress(ConnectionError):  # the client has left before
            await response.prepare(request)
            await response.write(answer.body[: len(answer.body) // 2])
        return response

    # Answers

    def _refuse(self, refusal: BusinessError) -> _Answer:
        self.refused[refusal.code] += 1
        envelope = {
            "code": refusal.code,
            "message": refusal.message,
            "request_id": str(uuid.uuid4()),
        }
        return _Answer(to_json(envelope), CODES[refusal.code][0])

    def _headers(self, answer: _Answer) -> dict[str, str]:
        return {
            "Content-Type": answer.content_type,
            "Date": formatdate(self._clock.wall(), usegmt=True),
            **answer.headers,
        }

    def _respond(self, answer: _Answer) -> web.Response:
        return web.Response(body=answer.body, status=answer.status, headers=self._headers(answer))


def _check_kind(name: str, value: object, kind: type, wanted: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def _check_limit(limit: object) -> None:
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"concurrency_limit must be None or a whole number, not {limit!r}")
    if limit < 1:
        raise ValueError(f"concurrency_limit must be 1 or more, not {limit}")


def _check_life(seconds: object) -> None:
    if callable(seconds):
        return
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"task_seconds must be a number or a function, not {seconds!r}")
    if not seconds >= 0:  # nor NaN
        raise ValueError(f"task_seconds must not be negative, got {seconds}")


def _route(method: str, path: str) -> tuple[str | None, str]:
    """The call that a request makes, and the id in its path."""
    if (method, path) in _CALLS:
        return _CALLS[method, path], ""
    parent, _, last = path.rpartition("/")
    if method == "GET" and parent == _VOICES and last:
        return "get", unquote(last)
    return None, ""


def _media_route(path: str) -> str:
    kind = path.split("/")[2]
    return f"/media/{kind}/{{name}}"


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except (web.HTTPRequestEntityTooLarge, web.RequestPayloadError):
        raise BusinessError(1200, "Request body is too large or broken") from None


def _success(data: bytes | None) -> _Answer:
    start = f'{{"code":0,"message":"SUCCEED","request_id":"{uuid.uuid4()}"'.encode()
    return _Answer(start + (b"}" if data is None else b',"data":' + data + b"}"))


def _array(items: list[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"


def _reset(request: web.Request) -> None:
    """Drop the connection with a TCP reset."""
    transport = request.transport
    if transport is None:
        return
    linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()
