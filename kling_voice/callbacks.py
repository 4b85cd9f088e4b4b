"""Callbacks: take them in, and deliver what they tell to those who wait.

The vendor POSTs JSON to a task's ``callback_url`` when its state changes; such callbacks repeat,
come out of order, or never come. With a webhook secret each one is verified, and what it tells
ends waits at once. Without one it proves nothing, and only prompts a look at a task that someone
waits for.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol

from attrs import evolve

from kling_voice import protocol
from kling_voice.errors import (
    CallbackError,
    CallbackReason,
    ConfigurationError,
    InvalidRequestError,
)
from kling_voice.models import VoiceTask
from kling_voice.redaction import mask_url
from kling_voice.schedule import advances
from kling_voice.webhooks import (
    BODY_CAP,
    Verifier,
    check_body,
    read_ids,
    read_task,
    too_large,
    unreadable,
)

if TYPE_CHECKING:
    from aiohttp import web

_log = logging.getLogger("kling_voice")

REMEMBERED: Final = 8192  # webhook-ids; after 5 minutes the signature's age refuses a repeat, too
KEPT: Final = 4096  # tasks whose last state is kept, the most recently told ones

_QUIET: Final = 60.0  # seconds from one warning to the next: anyone may send forged callbacks

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_Answer = tuple[int, str]

_TAKEN: Final[_Answer] = (200, "OK")
_NOT_POST: Final[_Answer] = (405, "Callbacks come by POST.")
_REFUSED: Final[Mapping[CallbackReason, _Answer]] = {
    "not_authentic": (401, "The callback is not authentic."),
    "unreadable": (400, "The callback is not readable."),
    "too_large": (413, "The callback is too large."),
}


class Watcher(Protocol):
    """Who waits for tasks: a client's :class:`~kling_voice.waiting.TaskWatcher`."""

    def deliver(self, task: VoiceTask) -> bool:
        """Take in a state that is surely the vendor's own; ``False`` if nobody waits for it."""

    def prompt(self, task_id: str | None, external_task_id: str | None) -> None:
        """Look at a task at once, if someone waits for it."""


class CallbackReceiver:
    """Takes the vendor's callbacks in, and ends the waits of the clients it was given to.

    Route the vendor's POSTs to :attr:`aiohttp_handler` or :attr:`asgi_app`, or hand the raw body
    and the headers to :meth:`receive`, and give the receiver to clients as ``callbacks=``. One
    receiver serves any number of clients of one account, in any event loops and threads.

    Args:
        secret: The account's webhook secret, with or without its ``whsec_``. ``None`` reads
            ``KLING_WEBHOOK_SECRET``; where that is not set either, callbacks are not believed.
        public_url: Where the vendor reaches this receiver: creates of the clients that it is
            given to carry it as their ``callback_url``, unless they name one. ``None``: each
            create names its own.

    Raises:
        ConfigurationError: The secret is empty or not base64, or ``public_url`` is not an http(s)
            URL.
    """

    def __init__(self, secret: str | None = None, *, public_url: str | None = None) -> None:
        if secret is None:
            secret = os.environ.get("KLING_WEBHOOK_SECRET")
        self._verifier = None if secret is None else Verifier(secret)
        if public_url is not None:
            try:
                protocol.check_url(public_url, "public_url")
            except InvalidRequestError as error:
                raise ConfigurationError(str(error)) from None
        self._public_url = public_url
        self._asgi_app = _AsgiApp(self._answer)
        self._lock = threading.Lock()  # guards all that follows; held for moments only
        self._watchers: dict[Watcher, asyncio.AbstractEventLoop] = {}
        self._received: dict[str, None] = {}  # webhook-ids, the oldest first
        self._kept: dict[str, VoiceTask] = {}  # by task_id, the one not told of longest first
        self._task_ids: dict[str, str] = {}  # of the kept tasks, by external_task_id
        self._warned: dict[CallbackReason, float] = {}  # when, by the monotonic clock
        self._refused: Counter[CallbackReason] = Counter()  # and how many since then

    def __repr__(self) -> str:
        secret = "None" if self._verifier is None else "'***'"
        return f"CallbackReceiver(secret={secret}, public_url={mask_url(self._public_url)})"

    @property
    def public_url(self) -> str | None:
        """Where the vendor reaches this receiver, or ``None``."""
        return self._public_url

    def parse(self, body: bytes, headers: Mapping[str, str]) -> VoiceTask:
        """Verify a callback, and read the state of the task that it tells.

        Both of the vendor's shapes are read. The newer one's form of deductions is not
        documented, so from it they are ``None``.

        Args:
            body: The raw body, byte for byte as it arrived: JSON encoded anew does not verify.
            headers: The request's headers; names in any case.

        Raises:
            CallbackError: Anything is wrong with it: ``.reason`` is ``"not_authentic"`` (forged,
                altered, not signed, or more than 5 minutes old or ahead), ``"unreadable"`` (not
                a task) or ``"too_large"`` (more than 256 KiB).
            ConfigurationError: The receiver has no secret to verify with.
        """
        if self._verifier is None:
            raise ConfigurationError(
                "A callback can only be parsed with the account's webhook secret: set"
                " KLING_WEBHOOK_SECRET, or pass CallbackReceiver(secret)."
            )
        _, text = self._verifier.verify(check_body(body), headers)
        return read_task(text)

    async def receive(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Take a callback in, and let those who wait for its task know.

        With a secret it is verified and read as by :meth:`parse`. A repeated or outdated one is
        dropped; one that comes before anybody waits is kept for the wait that begins later; one
        of a task that nobody knows is fine. Without a secret nothing that it says is believed:
        the task that it names is looked at at once, if someone waits for it.

        It may be called in another event loop or thread than the clients': a sync web framework
        calls ``asyncio.run(receiver.receive(body, headers))``.

        Args:
            body: The raw body, byte for byte as it arrived.
            headers: The request's headers; names in any case.

        Raises:
            CallbackError: It is not authentic, not readable, or too large: answer the vendor with
                401, 400 or 413.
        """
        body = check_body(body)
        if self._verifier is None:
            task_id, external_task_id = read_ids(body)
            self._tell(lambda watcher: watcher.prompt(task_id, external_task_id))
            return
        webhook_id, text = self._verifier.verify(body, headers)
        task = read_task(text)
        with self._lock:
            news = self._keep(task) if self._remember(webhook_id) else None
        if news is not None:
            self._tell(lambda watcher: watcher.deliver(news))

    # --- for clients ---

    def attach(self, watcher: Watcher) -> None:
        """Deliver to *watcher* from now on.

        Call it in the event loop that the watcher lives in: it is told there, whichever loop or
        thread :meth:`receive` is called in.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            self._watchers[watcher] = loop

    def detach(self, watcher: Watcher) -> None:
        """Deliver to *watcher* no longer; harmless if it is not attached."""
        with self._lock:
            self._watchers.pop(watcher, None)

    def kept(self, task_id: str) -> VoiceTask | None:
        """Give the newest state of a task that verified callbacks told, or ``None``.

        To be asked when a wait begins, since callbacks may overtake the answer to the create. The
        4,096 tasks told of last are kept. A success may come without its voices: the newer shape
        may leave them out, and the task has to be queried then.

        Args:
            task_id: A ``task_id`` or an ``external_task_id``.
        """
        with self._lock:
            return self._kept.get(task_id) or self._kept.get(self._task_ids.get(task_id, ""))

    # --- on the web ---

    async def aiohttp_handler(self, request: "web.Request") -> "web.Response":
        """Answer a callback in an aiohttp server.

        ::

            app.router.add_post("/kling", receiver.aiohttp_handler)

        It answers 200; 401 if the callback is not authentic, 400 if it is not readable, 413 if it
        is longer than 256 KiB, whatever the application's own limit is; 405 if it is no POST.
        """
        from aiohttp import web  # here, since only servers need that half of aiohttp

        status, text = await self._answer(
            request.method, request.headers, lambda: _read_aiohttp(request)
        )
        return web.Response(status=status, text=text, headers=_allow(status))

    @property
    def asgi_app(self) -> "_AsgiApp":
        """An ASGI 3 application that answers callbacks as :meth:`aiohttp_handler` does.

        ::

            from starlette.routing import Route  # FastAPI, Starlette

            app.routes.append(Route("/kling", receiver.asgi_app, methods=["POST"]))

        It answers at any path that it is put at, and may run alone: ``uvicorn module:variable``.
        Where it is mounted instead, with ``app.mount("/kling", ...)``, ``public_url`` must end
        with a slash: routers redirect what lacks it, and that is not to be relied on in webhooks.
        """
        return self._asgi_app

    async def _answer(
        self, method: str, headers: Mapping[str, str], read: Callable[[], Awaitable[bytes]]
    ) -> _Answer:
        if method != "POST":
            return _NOT_POST
        try:
            await self.receive(await read(), headers)
        except CallbackError as error:
            self._warn(error)
            return _REFUSED[error.reason]
        return _TAKEN

    def _warn(self, error: CallbackError) -> None:
        """Tell the log why a callback was refused; for each reason once a minute, with a count."""
        now, reason = time.monotonic(), error.reason
        with self._lock:
            loud = now - self._warned.get(reason, -inf) >= _QUIET
            others = self._refused.pop(reason, 0) if loud else 0
            if loud:
                self._warned[reason] = now
            else:
                self._refused[reason] += 1
        if others:
            _log.warning("%s (%d others since the last warning.)", error, others)
        else:
            _log.log(logging.WARNING if loud else logging.DEBUG, "%s", error)

    # --- memory ---

    def _remember(self, webhook_id: str) -> bool:
        """Note the id of a verified callback; ``False`` if it was noted before."""
        if webhook_id in self._received:
            return False
        if len(self._received) >= REMEMBERED:
            del self._received[next(iter(self._received))]
        self._received[webhook_id] = None
        return True

    def _keep(self, task: VoiceTask) -> VoiceTask | None:
        """Keep a task's state and give it; ``None`` if the one that is kept already is as new."""
        known = self._kept.pop(task.task_id, None)  # put in again, it is the last one
        if known is not None and not _is_newer(task, known):
            self._kept[known.task_id] = known
            return None
        if known is not None and task.external_task_id is None:
            task = evolve(task, task_info=known.task_info)
        full = known is None and len(self._kept) >= KEPT
        gone = self._kept.pop(next(iter(self._kept))) if full else known
        if gone is not None and self._task_ids.get(gone.external_task_id or "") == gone.task_id:
            del self._task_ids[gone.external_task_id or ""]
        self._kept[task.task_id] = task
        if task.external_task_id is not None:
            self._task_ids[task.external_task_id] = task.task_id
        return task

    def _tell(self, news: Callable[[Watcher], object]) -> None:
        """Call *news* with each watcher, in that one's own event loop."""
        with self._lock:
            watchers = list(self._watchers.items())
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:  # an ASGI server may run on trio, which no client lives in
            here = None
        for watcher, loop in watchers:
            if loop is here:
                try:
                    news(watcher)
                except Exception:  # a bug in one client is not to cost the others their callback
                    _log.exception("A client failed to take a callback in.")
            else:
                with contextlib.suppress(RuntimeError):  # that loop has been closed
                    loop.call_soon_threadsafe(news, watcher)


def _is_newer(told: VoiceTask, known: VoiceTask) -> bool:
    """Tell whether a state is news after the known one of the same task."""
    if known.is_done:  # the newer shape may tell a success before its voices
        return told.succeeded and known.succeeded and bool(told.voices) and not known.voices
    if not advances(known.task_status, told.task_status):
        return False
    if not advances(told.task_status, known.task_status):
        return True  # a step forward, whatever the clocks said
    if told.updated_at is None or known.updated_at is None:
        return True
    return told.updated_at >= known.updated_at


# --- the web, either way ---


def _allow(status: int) -> dict[str, str]:
    return {"Allow": "POST"} if status == _NOT_POST[0] else {}


async def _read_aiohttp(request: "web.Request") -> bytes:
    """Read a body of at most :data:`BODY_CAP` bytes, unpacked.

    Raises:
        CallbackError: It is longer, or broke off.
    """
    if request.content.at_eof():
        return await request.read()  # empty, or what a middleware has read already
    body = bytearray()
    try:
        while chunk := await request.content.readany():
            body += chunk
            if len(body) > BODY_CAP:
                break
    except Exception as error:  # aiohttp has many ways to say that a body is broken
        why = f"its body broke off ({type(error).__name__})"
    else:
        return check_body(bytes(body))
    raise unreadable(why)


async def _read_asgi(receive: _Receive) -> bytes:
    """Read a body of at most :data:`BODY_CAP` bytes.

    Raises:
        CallbackError: It is longer.
        ConnectionResetError: The client has gone.
    """
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionResetError
        body += message.get("body", b"")
        if len(body) > BODY_CAP:
            raise too_large()
        more = message.get("more_body", False)
    return bytes(body)


class _AsgiApp:
    """The ASGI application of a receiver.

    An object rather than a method: servers and routers take functions and objects for ASGI
    applications, and bound methods for something else.
    """

    def __init__(
        self,
        answer: Callable[
            [str, Mapping[str, str], Callable[[], Awaitable[bytes]]], Awaitable[_Answer]
        ],
    ) -> None:
        self._answer = answer

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer one request, or the server's ``lifespan``; refuse websockets."""
        if scope["type"] == "http":
            with contextlib.suppress(ConnectionError):  # nobody is left to answer to
                await self._handle(scope, receive, send)
        elif scope["type"] == "lifespan":
            stage = ""
            while stage != "lifespan.shutdown":
                stage = (await receive())["type"]
                await send({"type": f"{stage}.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            raise NotImplementedError(f"Callbacks come by HTTP, not by {scope['type']!r}.")

    async def _handle(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        status, text = await self._answer(scope["method"], headers, lambda: _read_asgi(receive))
        body = text.encode()
        told = {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(body)),
            **_allow(status),
        }
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (name.lower().encode(), value.encode()) for name, value in told.items()
                ],
            }
        )
        await send({"type": "http.response.body", "body": body})
