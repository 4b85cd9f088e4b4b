"""The one room that talks HTTP: sign, send, read within the deadline, and try again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Self, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp import ClientHandlerType, ClientRequest
from yarl import URL

from kling_voice import protocol
from kling_voice.auth import TokenSource
from kling_voice.deadlines import Deadlines
from kling_voice.errors import (
    ApiError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    KlingError,
    RequestTimeoutError,
    ResponseError,
)
from kling_voice.policies import RetryPolicy
from kling_voice.protocol import Call, Envelope
from kling_voice.redaction import redact

_log = logging.getLogger("kling_voice")

T = TypeVar("T")

ANSWER_CAP = 8 * 1024 * 1024  # bytes; a page of 1,000 tasks has about half of one MiB
_A_DAY = 86_400.0  # seconds
CONNECTIONS = 100  # at once, for a session of our own
_SHOWN = 300  # characters of a foreign exception's text that an error shows
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)


class _Body:
    """A request's body that tells when it is taken to be written to a connection.

    Until then the vendor cannot have acted on the call, whatever became of the connection.
    """

    def __init__(self, value: bytes, attempt: "_Attempt") -> None:
        self._value = value
        self._attempt = attempt

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._attempt.sent:
            raise StopAsyncIteration
        self._attempt.sent = True
        self._attempt.on_leaving()
        return self._value


async def _once(request: ClientRequest, handler: ClientHandlerType) -> aiohttp.ClientResponse:
    """Keep aiohttp from sending a PUT or a DELETE again by itself when a connection breaks."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(f"{error}") from None


class _Attempt:
    """One attempt of a call.

    Attributes:
        call: What is sent.
        number: 1 for the first attempt.
        sent: Whether the vendor may have seen it.
        on_leaving: Called when its body begins to leave.
    """

    __slots__ = ("call", "number", "on_leaving", "sent")

    def __init__(self, call: Call, number: int, on_leaving: Callable[[], None]) -> None:
        self.call = call
        self.number = number
        self.on_leaving = on_leaving
        self.sent = False


class Transport:
    """Sends calls of one account to one host, for as long as the client is open."""

    def __init__(
        self,
        *,
        tokens: TokenSource,
        base_url: str,
        session: aiohttp.ClientSession | None,
        timeout: float,
        retry: RetryPolicy,
        user_agent: str,
    ) -> None:
        self.retry = retry
        self.timeout = timeout
        self._tokens = tokens
        self._base_url = base_url
        self._borrowed = session
        self._session: aiohttp.ClientSession | None = None
        self._proxy: str | None = None
        self._headers = {
            "User-Agent": user_agent,
            "Accept": "application/json",
            "Content-Type": "application/json",
        }
        self._closed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Semaphore(CONNECTIONS)
        self._deadlines = Deadlines()  # of the attempts in flight

    # --- life ---

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed.is_set()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The aiohttp session; after :meth:`check_open` has passed."""
        assert self._session is not None
        return self._session

    def check_open(self) -> None:
        """Refuse to go on after :meth:`close`, and in another event loop than before.

        Raises:
            ClientClosedError: It was closed, or the borrowed session was.
            ConfigurationError: It is used from a second event loop.
        """
        if self._closed.is_set():
            raise ClientClosedError("The client is closed: make a new one.")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "No asyncio event loop is running: call it from asyncio.run(...); trio will not do."
            ) from None
        if self._loop is not loop:
            if self._loop is not None:
                raise ConfigurationError(
                    "This client belongs to another event loop: make one client for each loop."
                )
            self._loop = loop
            self._open_session()
        if self._session is None or self._session.closed:
            raise ClientClosedError("The session that the client was given is closed.")

    def _open_session(self) -> None:
        borrowed = self._borrowed
        if borrowed is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=_NO_TIMEOUT,
            )
        elif borrowed.closed:
            self._session = borrowed
        elif borrowed.trust_env or borrowed.auth is not None:
            # Such a session would read ~/.netrc or add a login of its own to our token. Its
            # connections and traces serve us as well without that.
            self._session = aiohttp.ClientSession(
                connector=borrowed.connector,
                connector_owner=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=borrowed.trace_configs,
                timeout=_NO_TIMEOUT,
            )
        else:
            self._session = borrowed
        if borrowed is None or borrowed.trust_env:
            self._proxy = proxy_for(self._base_url)
        connector = self._session.connector
        if connector is not None and borrowed is not None:
            limits = [limit for limit in (connector.limit, connector.limit_per_host) if limit]
            self._gate = asyncio.Semaphore(min(limits, default=1_000_000))

    async def close(self) -> None:
        """End every call that sleeps or is in flight; a borrowed session stays open."""
        self._closed.set()
        self._deadlines.expire_all()
        session = self._session
        if session is not None and session is not self._borrowed and not session.closed:
            await session.close()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than the client is open.

        Raises:
            ClientClosedError: It was closed meanwhile.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return
        raise ClientClosedError("The client was closed while the call was waiting.")

    # --- one attempt ---

    async def send(
        self,
        call: Call,
        *,
        timeout: float | None = None,
        number: int = 1,
        on_leaving: Callable[[], None] = lambda: None,
    ) -> Envelope:
        """Send *call* once; a token refused for its times is renewed and the call sent again.

        Args:
            call: What to send.
            timeout: Seconds for all of it, the body included, if less than the client's. From the
                second attempt on, queueing for a connection counts: it is what is left of a call.
            number: The attempt's number, for the log.
            on_leaving: Called when the call's body begins to leave: who is cancelled later does not
                know what the vendor made of it.

        Raises:
            KlingError: Any failure.
        """
        self.check_open()
        seconds = self.timeout if timeout is None else min(timeout, self.timeout)
        if seconds <= 0:
            raise RequestTimeoutError(f"{call}: no time is left for another attempt.", sent=False)
        attempt = _Attempt(call, number, on_leaving)
        whole: AbstractContextManager[object] = nullcontext()
        if number > 1 and timeout is not None:
            whole = self._deadlines.within(timeout)
        try:
            with whole:
                async with self._gate:
                    self.check_open()  # it may have been closed while the call queued
                    with self._deadlines.within(seconds):
                        return await self._exchange(attempt)
        except KlingError:
            raise
        except Exception as error:
            failure = self._translate(error, attempt, seconds)
        # Raised out here, the error has no context: aiohttp's own ones hold the request's headers.
        _log.debug("%s attempt %d: %s", call, number, failure)
        raise failure

    async def _exchange(self, attempt: _Attempt) -> Envelope:
        healed = False
        while True:
            started = time.perf_counter()
            token = self._tokens.token()
            told: Envelope | KlingError
            headers: Mapping[str, str] = {}
            try:
                status, headers, raw = await self._roundtrip(attempt, token)
                told = protocol.read_envelope(
                    status, headers, raw, secrets=lambda: self._tokens.secrets
                )
            except (ApiError, ResponseError) as error:
                told, status = error, error.http_status
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug(
                    "%s HTTP %d code %s request_id %s attempt %d %.1f ms",
                    attempt.call,
                    status,
                    0 if isinstance(told, Envelope) else getattr(told, "code", None),
                    getattr(told, "request_id", None),
                    attempt.number,
                    (time.perf_counter() - started) * 1000,
                )
            if isinstance(told, Envelope):
                return told
            if healed or not isinstance(told, ApiError) or not protocol.is_clock_fault(told):
                raise told
            if (why := self._tokens.heal(token, protocol.server_time(headers))) is not None:
                told.hint = why
                raise told
            _log.warning("%s: the token was refused for its times; signing anew", attempt.call)
            healed = True

    async def _roundtrip(
        self, attempt: _Attempt, token: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        call = attempt.call
        body = None
        headers = self._headers | {"Authorization": f"Bearer {token}"}
        attempt.sent = call.body is None
        if call.body is not None:
            body = _Body(call.body, attempt)
            headers["Content-Length"] = str(len(call.body))
        async with self.session.request(
            call.method,
            URL(self._base_url + call.target, encoded=True),
            data=body,
            headers=headers,
            allow_redirects=False,
            raise_for_status=False,
            timeout=_NO_TIMEOUT,
            proxy=self._proxy,
            auto_decompress=True,
            # A create, which is a POST, is never sent again by aiohttp; neither is any other write.
            middlewares=None if call.method in ("GET", "POST") else (_once,),
        ) as response:
            return response.status, response.headers, await read_capped(response, ANSWER_CAP)

    def _translate(self, error: Exception, attempt: _Attempt, seconds: float) -> KlingError:
        if self.closed or (self._session is not None and self._session.closed):
            whose = "client was" if self.closed else "session that the client was given was"
            closed = ClientClosedError(f"The {whose} closed while the call was in flight.")
            closed.sent = attempt.sent
            return closed
        secrets = self._tokens.secrets
        told = translate(error, f"{attempt.call}", seconds, sent=attempt.sent, secrets=secrets)
        if attempt.call.body is not None and isinstance(told, ConnectionFailedError):
            told.sent = attempt.sent  # a lent session may have sent it before it failed to connect
        return told

    async def bounded(self, work: Awaitable[T], what: str, seconds: float | None) -> T:
        """Do something no longer than the client is open, and within so many seconds.

        Raises:
            ClientClosedError: The client was closed meanwhile.
            RequestTimeoutError: The time was up.
        """
        try:
            with self._deadlines.within(_A_DAY if seconds is None else seconds):
                return await work
        except KlingError:
            raise
        except TimeoutError:
            if self.closed:
                raise ClientClosedError(f"{what}: the client was closed.") from None
            raise RequestTimeoutError(f"{what}: not complete within {seconds:.4g} s.") from None

    # --- many attempts ---

    async def call(
        self,
        call: Call,
        *,
        again: Callable[[BaseException], bool] | None = None,
        started: float | None = None,
    ) -> Envelope:
        """Send *call*, and again after a failure that may pass.

        Args:
            call: What to send.
            again: Which failures are worth another attempt; by default a read's transient ones,
                and another call's only when the vendor certainly did not act on it.
            started: When what it is part of began, by ``time.monotonic``; by default now.

        Raises:
            KlingError: The failure of the last attempt.
        """
        if again is None:
            again = protocol.is_transient if call.is_read else _harmless

        def attempt(number: int, timeout: float | None) -> Awaitable[Envelope]:
            return self.send(call, timeout=timeout, number=number)

        return await self.persist(attempt, again, what=call, started=started)

    async def persist(
        self,
        attempt: Callable[[int, float | None], Awaitable[T]],
        again: Callable[[BaseException], bool],
        *,
        what: Call | str,
        started: float | None = None,
    ) -> T:
        """Do something that may fail, and again, within the :class:`RetryPolicy`.

        Args:
            attempt: Does it; given the attempt's number and the seconds that are left for it.
            again: Which failures are worth another attempt.
            what: Its name, for the log.
            started: When what it is part of began, by ``time.monotonic``; by default now.

        Raises:
            Exception: The failure of the last attempt.
        """
        if started is None:
            started = time.monotonic()
        try:
            return await attempt(1, None)  # nearly every call ends here, without retry machinery
        except KlingError as error:
            failures = [error]
        from kling_voice.backoff import retrying  # here, since nearly no call needs tenacity

        def time_left() -> float:
            return self.time_left(started)

        async def once(number: int) -> T:
            if failures:
                raise failures.pop()  # of the attempt above
            return await attempt(number, time_left())

        async for trial in retrying(self.retry, again, time_left, self.sleep, what):
            with trial:
                result = await once(trial.retry_state.attempt_number)
        return result

    def time_left(self, started: float) -> float:
        """Give the seconds that :class:`RetryPolicy` leaves a call that began at *started*."""
        return max(0.0, started + self.retry.max_elapsed - time.monotonic())


def _harmless(error: BaseException) -> bool:
    return protocol.is_transient(error) and protocol.certainly_not_processed(error)


async def read_capped(response: aiohttp.ClientResponse, cap: int) -> bytes:
    """Read a body, unpacked, of at most *cap* bytes.

    Raises:
        ResponseError: It is longer.
    """
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        chunks.append(chunk)
        size += len(chunk)
        if size > cap:
            response.close()
            raise ResponseError(f"it is longer than {cap} bytes", http_status=response.status)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def translate(
    error: Exception, what: str, seconds: float, *, sent: bool, secrets: tuple[str, ...] = ()
) -> KlingError:
    """Tell a foreign exception in this package's terms; the only place that does.

    Args:
        error: What asyncio, aiohttp, ssl or the operating system raised.
        what: The call's name.
        seconds: The attempt's timeout.
        sent: Whether the vendor may have seen the call.
        secrets: Texts that no error may repeat; a broken answer may echo them.
    """
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        sent = False
    if isinstance(error, TimeoutError):
        return RequestTimeoutError(f"{what}: no complete answer within {seconds:.4g} s.", sent=sent)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        sent = False
        why = f"the proxy refused ({error.status} {redact(error.message, *secrets)[:_SHOWN]})"
    elif isinstance(error, aiohttp.ClientResponseError):
        return ResponseError(f"it is not HTTP ({redact(error.message, *secrets)[:_SHOWN]})")
    elif isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = "the server's certificate is not valid for this host"
    elif isinstance(error, aiohttp.ClientPayloadError):
        why = "the answer broke off"
    elif isinstance(error, aiohttp.ClientConnectorError):
        why = f"{redact(str(error), *secrets)[:_SHOWN]}; check the connection, and base_url"
    elif isinstance(error, aiohttp.ServerDisconnectedError):
        why = "the server closed the connection without an answer"
    else:
        why = redact(str(error), *secrets)[:_SHOWN] or type(error).__name__
    return ConnectionFailedError(f"{what}: no usable answer: {why}.", sent=sent)


def proxy_for(url: str) -> str | None:
    """Give the proxy that the environment names for a host; ``~/.netrc`` is never read."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if protocol.is_loopback(host) or proxy_bypass(host):
        return None
    proxy = getproxies().get(parts.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
