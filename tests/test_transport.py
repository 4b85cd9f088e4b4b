"""HTTP as it is: timeouts, retries, foreign exceptions, borrowed sessions, the end of it all."""

import asyncio
import gzip
import logging
import os
import re
import ssl
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from attrs import frozen
from multidict import CIMultiDict, CIMultiDictProxy
from wire import (
    BRISK,
    CERTIFICATE,
    ONCE,
    Answer,
    MakeClient,
    Request,
    Server,
    drip,
    envelope,
    response,
    stall,
    task,
)
from yarl import URL

from kling_voice import ApiKey, KlingVoiceClient, RetryPolicy
from kling_voice.emulator import Emulator
from kling_voice.errors import (
    ApiError,
    ClientClosedError,
    ConcurrencyLimitError,
    ConfigurationError,
    ConnectionFailedError,
    KlingError,
    RateLimitError,
    RequestTimeoutError,
    ResponseError,
    ServerError,
)
from kling_voice.protocol import get_call
from kling_voice.transport import ANSWER_CAP, CONNECTIONS, proxy_for, translate

OK = envelope(task())
SAMPLE = "https://example.com/a.mp3"


@frozen
class Nowhere:
    """A server that is not there; by default a port of this machine where nobody listens."""

    base_url: str = "http://127.0.0.1:9"


async def timed(work: Awaitable[object]) -> tuple[float, KlingError]:
    """Await what must fail; gives the seconds it took and the error."""
    started = time.monotonic()
    with pytest.raises(KlingError) as caught:
        await work
    return time.monotonic() - started, caught.value


# --- foreign exceptions ---

KEY = ConnectionKey("host.example", 443, True, True, None, None, None)
INFO = aiohttp.RequestInfo(URL("https://host.example"), "GET", CIMultiDictProxy(CIMultiDict()))
REFUSED = ConnectionRefusedError(111, "Connect call failed")

FOREIGN: list[tuple[Exception, type[KlingError], bool]] = [
    # what is raised, what becomes of it, whether the vendor may have seen the request
    (TimeoutError(), RequestTimeoutError, True),
    (aiohttp.ServerTimeoutError(), RequestTimeoutError, True),
    (aiohttp.SocketTimeoutError(), RequestTimeoutError, True),
    (aiohttp.ConnectionTimeoutError(), RequestTimeoutError, False),
    (aiohttp.ClientConnectorError(KEY, REFUSED), ConnectionFailedError, False),
    (aiohttp.ClientConnectorDNSError(KEY, OSError("no name")), ConnectionFailedError, False),
    (aiohttp.ClientProxyConnectionError(KEY, REFUSED), ConnectionFailedError, False),
    (aiohttp.ClientSSLError(KEY, OSError("tls")), ConnectionFailedError, False),
    (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError("tls")), ConnectionFailedError, False),
    (
        aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("expired")),
        ConnectionFailedError,
        False,
    ),
    (aiohttp.ClientHttpProxyError(INFO, (), status=407), ConnectionFailedError, False),
    (aiohttp.ServerDisconnectedError(), ConnectionFailedError, True),
    (aiohttp.ClientOSError(104, "Connection reset by peer"), ConnectionFailedError, True),
    (aiohttp.ClientConnectionResetError("closing"), ConnectionFailedError, True),
    (aiohttp.ClientConnectionError("Connector is closed."), ConnectionFailedError, True),
    (aiohttp.ServerFingerprintMismatch(b"a", b"b", "h", 1), ConnectionFailedError, True),
    (aiohttp.ClientPayloadError("incomplete"), ConnectionFailedError, True),
    (aiohttp.InvalidURL("https://"), ConnectionFailedError, True),
    (aiohttp.NonHttpUrlClientError("ftp://x"), ConnectionFailedError, True),
    (aiohttp.ClientError(), ConnectionFailedError, True),
    (aiohttp.ClientResponseError(INFO, (), status=400, message="bad"), ResponseError, True),
    (aiohttp.http_exceptions.BadHttpMessage("bad"), ConnectionFailedError, True),
    (ConnectionResetError(), ConnectionFailedError, True),
    (BrokenPipeError(), ConnectionFailedError, True),
    (OSError("odd"), ConnectionFailedError, True),
    (ssl.SSLError("odd"), ConnectionFailedError, True),
    (UnicodeError("label too long"), ConnectionFailedError, True),
    (ValueError("odd"), ConnectionFailedError, True),
    (RuntimeError("Session is closed"), ConnectionFailedError, True),
    (zlib.error("odd"), ConnectionFailedError, True),
]


@pytest.mark.parametrize(
    ("foreign", "kind", "sent"), FOREIGN, ids=[type(error).__name__ for error, _, _ in FOREIGN]
)
def test_foreign_exceptions(foreign: Exception, kind: type[KlingError], sent: bool) -> None:
    """Each foreign exception becomes one of ours, which says whether anything was sent."""
    told = translate(foreign, "GET /x", 30.0, sent=True)
    assert type(told) is kind
    assert "host.example:443" not in str(told) or not sent
    if isinstance(told, ConnectionFailedError):
        assert told.sent is sent
        assert str(told).startswith("GET /x: no ")
        assert str(told).endswith(".")


async def test_an_attempt_that_has_no_time_left_is_not_made(
    make_client: MakeClient,
) -> None:
    """It certainly was not sent."""
    async with Server([OK]) as server:
        transport = make_client(server)._transport
        with pytest.raises(RequestTimeoutError, match="no time is left") as caught:
            await transport.send(get_call("t"), timeout=0.0)
        assert not caught.value.sent
        assert server.requests == []


async def test_nobody_listens(make_client: MakeClient) -> None:
    """A refused connection is a ConnectionFailedError that certainly was not sent."""
    _, error = await timed(make_client(Nowhere()).create_voice("Ada", voice_url=SAMPLE))
    assert type(error) is ConnectionFailedError
    assert not error.sent
    assert error.outcome == "not_created"


async def test_no_such_host(make_client: MakeClient) -> None:
    """A host without an address is a ConnectionFailedError that certainly was not sent."""
    client = make_client(Nowhere("https://no-such-host.invalid"), timeout=3.0, retry=ONCE)
    _, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
    assert isinstance(error, ConnectionFailedError)
    assert error.outcome == "not_created"


async def test_a_certificate_that_nobody_trusts(make_client: MakeClient) -> None:
    """A wrong certificate is told as that, and not one byte of the request goes out."""
    async with Server([OK], tls=True) as server:
        _, error = await timed(make_client(server).create_voice("Ada", voice_url=SAMPLE))
        assert isinstance(error, ConnectionFailedError)
        assert "certificate" in str(error)
        assert error.outcome == "not_created"
        assert server.requests == []


async def test_a_server_without_tls(make_client: MakeClient) -> None:
    """A server that does not speak TLS gets no request."""
    seen = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(1000))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = make_client(Nowhere(f"https://127.0.0.1:{port}"))
        _, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
        assert type(error) is ConnectionFailedError
        assert error.outcome == "not_created"
        assert len(seen) == BRISK.attempts
        assert not any(b"voice" in data or b"Bearer" in data for data in seen)


async def test_a_handshake_that_hangs(make_client: MakeClient) -> None:
    """A timeout before the connection stands is certain not to have created anything."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = make_client(Nowhere(f"https://127.0.0.1:{port}"), timeout=0.05, retry=ONCE)
        _, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
        assert isinstance(error, RequestTimeoutError)
        assert not error.sent
        assert error.outcome == "not_created"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", ConnectionFailedError),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ResponseError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", ResponseError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", ResponseError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", KlingError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", ResponseError),
        (response(b"<html>", 502, {"Content-Type": "text/html"}), ResponseError),
        (response(b""), ResponseError),
        (response(b"", 204), ResponseError),
        (response(b"not gzip", 200, {"Content-Encoding": "gzip"}), KlingError),
        (
            response(gzip.compress(b"{}", mtime=0)[:-9], 200, {"Content-Encoding": "gzip"}),
            KlingError,
        ),
    ],
    ids=repr,
)
async def test_odd_answers(make_client: MakeClient, answer: bytes, kind: type[KlingError]) -> None:
    """Whatever a server writes, only our errors come out, and a create says that it is open."""
    async with Server([answer]) as server:
        client = make_client(server, retry=RetryPolicy(attempts=2, initial=0.001))
        for work in (client.get_task("t-1"), client.create_voice("Ada", voice_url=SAMPLE)):
            _, error = await timed(work)
            assert isinstance(error, kind)
            assert isinstance(error, ConnectionFailedError | ResponseError)
        assert error.outcome == "unknown"


async def break_off(writer: asyncio.StreamWriter) -> None:
    """Close the connection in the middle of the body."""
    writer.write(response(b'{"code":0', length=100))
    await writer.drain()
    writer.close()


async def test_an_answer_that_breaks_off(make_client: MakeClient) -> None:
    """A body shorter than its length is a ConnectionFailedError, and a read is sent again."""
    async with Server([break_off, OK]) as server:
        assert (await make_client(server).get_task("t-1")).task_id == "t-1"
    async with Server([break_off]) as server:
        _, error = await timed(make_client(server, retry=ONCE).get_task("t-1"))
        assert type(error) is ConnectionFailedError


async def test_errors_hold_no_foreign_ones(make_client: MakeClient) -> None:
    """No error keeps a foreign one alive: aiohttp's hold the request's headers, token and all."""
    for answers in ([b""], [response(b"<html>")], [b"garbage\r\n\r\n"]):
        async with Server(answers) as server:
            client = make_client(server, retry=RetryPolicy(attempts=2, initial=0.001))
            _, error = await timed(client.get_task("t-1"))
            assert error.__cause__ is None
            assert isinstance(error.__context__, KlingError | None)


# --- timeouts ---


async def test_timeout_covers_the_body(make_client: MakeClient) -> None:
    """An answer that drips byte by byte ends at the timeout, not when it is through."""
    async with Server([drip(b" " * 1000, 0.02)]) as server:
        client = make_client(server, timeout=0.15, retry=ONCE)
        seconds, error = await timed(client.get_task("t-1"))
        assert type(error) is RequestTimeoutError
        assert isinstance(error, TimeoutError)
        assert error.sent
        assert "0.15 s" in str(error)
        assert 0.14 < seconds < 5


async def test_timeout_is_not_multiplied(make_client: MakeClient) -> None:
    """However many attempts are allowed, all of them together keep within ``max_elapsed``."""
    async with Server([stall]) as server:
        retry = RetryPolicy(attempts=50, initial=0.001, maximum=0.01, max_elapsed=0.4)
        seconds, error = await timed(make_client(server, timeout=0.15, retry=retry).list_tasks())
        assert isinstance(error, RequestTimeoutError)
        assert 0.3 < seconds < 3  # not 50 times 0.15
        assert 2 <= len(server.requests) <= 4


async def test_only_the_first_attempt_outlasts_the_budget(make_client: MakeClient) -> None:
    """With no time for retries there is one attempt, with all of its own timeout."""
    async with Server([stall]) as server:
        client = make_client(server, timeout=0.2, retry=RetryPolicy(max_elapsed=0))
        seconds, _ = await timed(client.get_task("t-1"))
        assert 0.19 < seconds < 3
        assert len(server.requests) == 1


async def test_a_create_keeps_within_its_time(make_client: MakeClient) -> None:
    """A create that stalls at every step is bounded, too: the budget, and one last look."""
    async with Server([stall]) as server:
        retry = RetryPolicy(attempts=50, initial=0.001, maximum=0.01, max_elapsed=0.4)
        client = make_client(server, timeout=0.15, retry=retry)
        seconds, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
        assert error.outcome == "unknown"
        assert seconds < 3


async def test_an_adoption_keeps_within_its_time(make_client: MakeClient) -> None:
    """Fetching what holds a taken id is part of the create, and has no time of its own."""
    later = envelope(code=1302, message="x", status=429, headers={"Retry-After": "0.8"})
    taken = envelope(code=1201, message="already exists", status=400)

    async with Server([later, taken, envelope(code=5000, status=500)]) as server:
        retry = RetryPolicy(attempts=1000, initial=0.001, maximum=0.01, max_elapsed=1.0)
        client = make_client(server, retry=retry)
        seconds, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
        assert isinstance(error, ServerError | RequestTimeoutError)
        assert error.outcome == "unknown"
        assert seconds < 1.6


# --- retries ---


async def test_reads_are_tried_again(make_client: MakeClient) -> None:
    """A read outlives every kind of failure that may pass, one after the other."""
    answers = [
        b"",
        envelope(code=5000, message="x", status=500),
        response(b"<html>", 502),
        envelope(code=1302, message="x", status=429),
        envelope(code=1303, message="x", status=429),
        response(b'{"code":'),
        OK,
    ]
    async with Server(answers) as server:
        client = make_client(server, retry=RetryPolicy(attempts=9, initial=0.001, maximum=0.01))
        assert (await client.get_task("t-1")).task_id == "t-1"
        assert len(server.requests) == len(answers)
        assert len({request.target for request in server.requests}) == 1


async def test_attempts_count_the_first(make_client: MakeClient) -> None:
    """``attempts`` is how often a call is sent in all, and the last failure is what is raised."""
    for attempts in (1, 2, 4):
        async with Server([envelope(code=5000 + attempts % 3, message="x", status=500)]) as server:
            client = make_client(server, retry=RetryPolicy(attempts=attempts, initial=0.001))
            _, error = await timed(client.get_task("t-1"))
            assert isinstance(error, ServerError)
            assert error.code == 5000 + attempts % 3
            assert len(server.requests) == attempts


@pytest.mark.parametrize(
    ("code", "status"),
    [
        *((code, 429) for code in (1100, 1101, 1102, 1150, 1304)),
        *((code, 400) for code in (1200, 1201, 1300, 1301, 4000)),
        (1103, 403),
        (1202, 404),
        (1203, 404),
        (1000, 401),
    ],
)
async def test_what_is_never_tried_again(make_client: MakeClient, code: int, status: int) -> None:
    """Billing, policy, bad requests and keys are final: one request, though it was HTTP 429."""
    refusal = envelope(code=code, message="no", status=status, headers={"Retry-After": "0"})
    async with Server([refusal]) as server:
        client = make_client(server)
        calls = [
            client.get_task("t-1"),
            client.list_tasks(),
            client.create_voice("Ada", voice_url=SAMPLE),
            client.delete_voice("v-1"),
            client.request("POST", "/v1/x"),
        ]
        for number, work in enumerate(calls, start=1):
            _, error = await timed(work)
            assert isinstance(error, ApiError)
            assert error.code == code
            assert error.retry_after == 0.0
            assert len(server.requests) == number


async def test_retry_after_is_honoured(make_client: MakeClient) -> None:
    """The wait that the server asks for is kept, on refusals and on gateways' pages alike."""
    for refusal in (
        envelope(code=1302, message="x", status=429, headers={"Retry-After": "0.2"}),
        response(b"<html>", 503, {"Retry-After": "0.2"}),
    ):
        async with Server([refusal, OK]) as server:
            started = time.monotonic()
            await make_client(server).get_task("t-1")
            assert 0.2 <= time.monotonic() - started < 4


async def test_too_long_a_retry_after_raises_at_once(make_client: MakeClient) -> None:
    """A wait beyond the budget is not begun: the refusal is raised with what was asked."""
    refusal = envelope(code=1302, message="x", status=429, headers={"Retry-After": "3600"})
    async with Server([refusal]) as server:
        for work in (
            make_client(server).list_tasks(),
            make_client(server).create_voice("Ada", voice_url=SAMPLE),
        ):
            seconds, error = await timed(work)
            assert isinstance(error, RateLimitError)
            assert error.retry_after == 3600.0
            assert seconds < 5
        assert len(server.requests) == 2


async def test_waits_grow_and_differ(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Waits are drawn anew each time, under a bound that doubles up to the maximum."""
    retry = RetryPolicy(attempts=8, initial=0.005, maximum=0.02)
    async with Server([envelope(code=5000, message="x", status=500)]) as server:
        client = make_client(server, retry=retry)
        runs = []
        for _ in range(3):
            caplog.clear()
            await timed(client.get_task("t-1"))
            lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            assert len(lines) == 7
            assert all("attempt" in line and "5000" in line for line in lines)
            runs.append([float(re.findall(r"in ([\d.]+) s", line)[0]) for line in lines])
    bounds = [0.005, 0.01, 0.02, 0.02, 0.02, 0.02, 0.02]
    for run in runs:
        assert all(wait <= bound + 0.005 for wait, bound in zip(run, bounds, strict=True))
    assert len({tuple(run) for run in runs}) > 1


async def test_waits_for_a_slot_are_firm(make_client: MakeClient) -> None:
    """After 1302 and 1303 there is no quick second try: the vendor asks for a growing wait."""
    for code in (1302, 1303):
        async with Server([envelope(code=code, message="x", status=429)]) as server:
            retry = RetryPolicy(attempts=3, initial=0.05, maximum=1.0)
            seconds, error = await timed(
                make_client(server, retry=retry).create_voice("Ada", voice_url=SAMPLE)
            )
            assert isinstance(error, RateLimitError | ConcurrencyLimitError)
            assert 0.1 + 0.2 <= seconds < 4
            assert error.outcome == "not_created"


async def test_retry_state_is_not_shared(make_client: MakeClient) -> None:
    """Each of many calls at once has all of its attempts, and gets the answer of its own id."""
    seen: Counter[str] = Counter()

    def answer(request: Request) -> Answer:
        seen[request.target] += 1
        if seen[request.target] < BRISK.attempts:
            return envelope(code=5000, message="x", status=500)
        return envelope(task(request.target.rpartition("/")[2]))

    async with Server(answer) as server:
        client = make_client(server)
        ids = [f"t-{number}" for number in range(40)]
        tasks = await asyncio.gather(*(client.get_task(task_id) for task_id in ids))
        assert [task.task_id for task in tasks] == ids
        assert set(seen.values()) == {BRISK.attempts}


async def test_calls_one_after_the_other_start_anew(make_client: MakeClient) -> None:
    """A call that used up its attempts leaves the next one on the same client all of its own."""
    failures = [envelope(code=5000, message="x", status=500)] * BRISK.attempts
    async with Server([*failures, *failures[1:], OK]) as server:
        client = make_client(server)
        await timed(client.get_task("t-1"))
        assert (await client.get_task("t-1")).task_id == "t-1"


# --- request() and other writes ---


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("body", [None, {"a": 1}])
@pytest.mark.parametrize(
    ("answer", "again"),
    [
        (envelope(code=1302, message="x", status=429), True),
        (envelope(code=1303, message="x", status=429), True),
        (envelope(code=1201, message="x", status=400), False),
        (envelope(code=5000, message="x", status=500), False),
        (envelope(code=408, message="x", status=408), False),
        (response(b"<html>", 502), False),
        (response(b"{"), False),
        (break_off, False),
        (b"", False),
        (stall, False),
    ],
    ids=["1302", "1303", "1201", "5000", "408", "html", "json", "broken", "closed", "stall"],
)
async def test_writes_are_sent_again_only_when_harmless(
    make_client: MakeClient, method: str, body: object, answer: Answer, again: bool
) -> None:
    """A write goes out again, by us or aiohttp, only if the vendor surely did not act on it."""
    async with Server([envelope({"warm": 1}), answer, envelope({"done": 1})]) as server:
        client = make_client(server, timeout=0.2 if answer is stall else 5.0)
        await client.request("GET", "/v1/warm")  # the connection that is used is an old one
        if again:
            assert await client.request(method, "/v1/x", json=body) == {"done": 1}
            assert len(server.requests) == 3
        else:
            with pytest.raises(KlingError):
                await client.request(method, "/v1/x", json=body)
            assert len(server.requests) == 2


async def test_a_write_to_nobody_is_tried_again(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that was never made is harmless for every method."""
    for method in ("POST", "DELETE"):
        caplog.clear()
        _, error = await timed(make_client(Nowhere()).request(method, "/x", json={}))
        assert isinstance(error, ConnectionFailedError)
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 4


async def test_request_sends_and_reads(make_client: MakeClient) -> None:
    """``request`` sends method, path, query and body as given, and gives the data."""
    async with Server([envelope([1, {"a": None}])]) as server:
        client = make_client(Nowhere(f"{server.base_url}/prefix/"))
        data = await client.request("patch", "/v1/ü", params={"q": "x y"}, json={"ä": "ö"})
        assert data == [1, {"a": None}]
        (request,) = server.requests
        assert (request.method, request.target) == ("PATCH", "/prefix/v1/%C3%BC?q=x+y")
        assert request.body == '{"ä":"ö"}'.encode()
        assert request.headers["content-length"] == str(len(request.body))
        assert "transfer-encoding" not in request.headers


async def test_a_large_body_goes_out_whole(make_client: MakeClient) -> None:
    """A body of megabytes is sent without a warning, and whole."""
    async with Server([envelope()]) as server:
        text = "声" * 1_000_000
        assert await make_client(server).request("POST", "/v1/x", json=text) is None
        assert server.requests[0].body == f'"{text}"'.encode()


# --- answers ---


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(make_client: MakeClient, status: int) -> None:
    """No redirect is followed, to another host or the same: the token would go along."""
    async with Server([OK]) as other:
        redirect = response(b"", status, {"Location": f"{other.base_url}/v1/elsewhere"})
        async with Server([redirect]) as server:
            client = make_client(server, retry=RetryPolicy(attempts=2, initial=0.001))
            for work in (client.get_task("t-1"), client.create_voice("Ada", voice_url=SAMPLE)):
                _, error = await timed(work)
                assert isinstance(error, ResponseError)
                assert error.http_status == status
                assert "redirect" in str(error)
        assert other.requests == []
        assert {request.target.split("/")[1] for request in server.requests} == {"v1"}


@pytest.mark.parametrize(
    "answer",
    [
        response(b" " * (ANSWER_CAP + 1)),
        response(b"", length=10**15) + b" " * (ANSWER_CAP + 1),
        response(gzip.compress(b" " * (4 * ANSWER_CAP)), 200, {"Content-Encoding": "gzip"}),
        response(zlib.compress(b" " * (4 * ANSWER_CAP)), 200, {"Content-Encoding": "deflate"}),
    ],
    ids=["long", "endless", "gzip bomb", "deflate bomb"],
)
async def test_answers_have_a_cap(make_client: MakeClient, answer: bytes) -> None:
    """An answer that is too long, packed or not, is a ResponseError that says so."""
    async with Server([answer]) as server:
        _, error = await timed(make_client(server, retry=ONCE).get_task("t-1"))
        assert isinstance(error, ResponseError)
        assert "longer than" in str(error)
        assert error.http_status == 200


async def test_packed_answers_are_read(make_client: MakeClient) -> None:
    """Answers come packed if the server likes."""
    body = OK.partition(b"\r\n\r\n")[2]
    async with Server([response(gzip.compress(body), 200, {"Content-Encoding": "gzip"})]) as server:
        assert (await make_client(server).get_task("t-1")).task_id == "t-1"
        assert "gzip" in server.requests[0].headers["accept-encoding"]


# --- borrowed sessions ---


async def test_a_borrowed_session_is_not_closed(make_client: MakeClient) -> None:
    """Closing the client leaves a borrowed session open and as it was."""
    async with Server([OK]) as server, aiohttp.ClientSession() as session:
        client = make_client(server, session=session)
        await client.get_task("t-1")
        await client.close()
        assert not session.closed
        async with session.get(server.base_url) as answer:
            assert answer.status == 200
        with pytest.raises(ClientClosedError):
            await client.get_task("t-1")


async def test_a_borrowed_sessions_defaults_do_not_disturb(make_client: MakeClient) -> None:
    """Whatever a borrowed session does by default, our requests and our errors are our own."""
    refusal = envelope(code=1201, message="no", status=400)
    packed = response(
        gzip.compress(OK.partition(b"\r\n\r\n")[2]), 200, {"Content-Encoding": "gzip"}
    )
    async with (
        Server([drip(OK.partition(b"\r\n\r\n")[2], 0.001), refusal, packed]) as server,
        aiohttp.ClientSession(
            base_url="https://elsewhere.invalid/",
            headers={"Authorization": "Basic xyz", "User-Agent": "mine", "Content-Type": "a/b"},
            timeout=aiohttp.ClientTimeout(total=0.001, sock_read=0.001),
            raise_for_status=True,
            auto_decompress=False,
        ) as session,
    ):
        client = make_client(server, session=session)
        assert (await client.get_task("t-1")).task_id == "t-1"
        _, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
        assert isinstance(error, ApiError)
        assert error.outcome == "not_created"
        assert (await client.get_task("t-1")).task_id == "t-1"
        for request in server.requests:
            assert request.headers["authorization"].startswith("Bearer eyJ")
            assert request.headers["user-agent"].startswith("kling-voice/")
            assert request.headers["content-type"] == "application/json"
        assert session.headers["Authorization"] == "Basic xyz"
        assert session.timeout.total == 0.001


async def test_a_borrowed_session_that_logs_in(make_client: MakeClient) -> None:
    """A borrowed session with a login of its own neither sends it with our calls nor loses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions would rather have a header
        borrowed = aiohttp.ClientSession(auth=aiohttp.BasicAuth("user", "5ecret"))
    async with Server([OK]) as server, borrowed as session:
        await make_client(server, session=session).get_task("t-1")
        assert server.requests[0].headers["authorization"].startswith("Bearer eyJ")
        async with session.get(server.base_url):
            assert server.requests[1].headers["authorization"].startswith("Basic ")
        assert not session.closed


@pytest.mark.parametrize("trust_env", [False, True])
async def test_netrc_is_never_read(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trust_env: bool
) -> None:
    """A ~/.netrc with a login for the very host changes nothing, whatever the session trusts."""
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login user password 5ecret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    async with Server([OK]) as server, aiohttp.ClientSession(trust_env=trust_env) as session:
        await make_client(server, session=session).get_task("t-1")
        await make_client(server).get_task("t-1")
        for request in server.requests:
            assert request.headers["authorization"].startswith("Bearer eyJ")


async def test_a_borrowed_sessions_connections_are_used(make_client: MakeClient) -> None:
    """A borrowed session's connector serves us, limits and all, whatever it trusts."""
    for trust_env in (False, True):
        async with (
            Server(lambda _: slow(0.05)) as server,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=50, limit_per_host=3), trust_env=trust_env
            ) as session,
        ):
            client = make_client(server, session=session, timeout=0.45)
            await asyncio.gather(*(client.get_task("t-1") for _ in range(30)))
            assert server.connections <= 3


async def test_a_closed_borrowed_session_is_told(make_client: MakeClient) -> None:
    """A borrowed session that its owner has closed is a ClientClosedError, not a riddle."""
    async with Server([OK]) as server:
        session = aiohttp.ClientSession()
        client = make_client(server, session=session)
        await client.get_task("t-1")
        await session.close()
        for work in (client.get_task("t-1"), client.create_voice("Ada", voice_url=SAMPLE)):
            with pytest.raises(ClientClosedError, match="session"):
                await work
        with pytest.raises(ClientClosedError, match="session"):
            await make_client(server, session=session).get_task("t-1")


# --- proxies ---


async def test_https_goes_through_the_environments_proxy(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an https host the environment's proxy is asked, and it learns the host and no more."""
    async with Server([response(b"no", 403)]) as proxy:
        for spelled in (proxy.base_url, proxy.base_url.removeprefix("http://")):
            monkeypatch.setenv("https_proxy", spelled)
            client = make_client(Nowhere("https://api.example.invalid"), retry=ONCE)
            _, error = await timed(client.create_voice("Ada", voice_url=SAMPLE))
            assert isinstance(error, ConnectionFailedError)
            assert "proxy" in str(error)
            assert error.outcome == "not_created"
        for request in proxy.requests:
            assert (request.method, request.target) == ("CONNECT", "api.example.invalid:443")
            assert "authorization" not in request.headers
            assert not any("eyJ" in text for text in request.headers.values())


async def test_loopback_never_goes_through_a_proxy(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on this machine is asked directly, whatever the environment says."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with Server([OK]) as server, aiohttp.ClientSession(trust_env=True) as session:
        await make_client(server).get_task("t-1")
        await make_client(server, session=session).get_task("t-1")
        assert len(server.requests) == 2


def test_which_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy goes by the scheme; ``no_proxy`` is heard; a bare host and port is http."""
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", "internal.example")
    assert proxy_for("https://api.example") == "http://proxy.example:3128"
    assert proxy_for("https://api.internal.example/v1") is None
    assert proxy_for("http://127.0.0.1:8080") is None
    assert proxy_for("https://localhost") is None
    monkeypatch.delenv("https_proxy")
    assert proxy_for("https://api.example") is None


async def test_a_proxys_login_is_not_told(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The login in a proxy's URL shows up in no error and no log."""
    caplog.set_level(logging.DEBUG)
    for port in (9, 99999):
        monkeypatch.setenv("https_proxy", f"http://user:5ecret@127.0.0.1:{port}")
        _, error = await timed(make_client(Nowhere("https://api.example.invalid")).list_tasks())
        assert isinstance(error, ConnectionFailedError)
        assert "5ecret" not in f"{error}{error!r}{caplog.text}"


# --- many at once, and the end ---


def slow(seconds: float) -> Answer:
    """Answer a task after a while."""

    async def write(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        writer.write(OK)
        await writer.drain()

    return write


async def test_hundreds_of_tasks_at_once(make_client: MakeClient) -> None:
    """Hundreds of tasks use one client, over no more connections than it may have."""
    async with Server(lambda _: slow(0.05)) as server:
        client = make_client(server)
        await asyncio.gather(
            *(client.get_task(f"t-{number}") for number in range(2 * CONNECTIONS)),
            *(client.create_voice("Ada", voice_url=SAMPLE) for _ in range(CONNECTIONS)),
        )
        assert server.connections <= CONNECTIONS
        assert len(server.requests) == 3 * CONNECTIONS


async def test_queueing_costs_no_timeout(make_client: MakeClient) -> None:
    """What waits for a connection to come free loses nothing of its timeout meanwhile."""
    async with (
        Server(lambda _: slow(0.1)) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=5)) as session,
    ):
        client = make_client(server, session=session, timeout=0.8, retry=ONCE)
        started = time.monotonic()
        await asyncio.gather(*(client.get_task(f"t-{number}") for number in range(50)))
        assert time.monotonic() - started > 0.9


async def test_queueing_counts_for_another_attempt(make_client: MakeClient) -> None:
    """A later attempt queues no longer than ``max_elapsed`` allows, and is not sent after that."""
    broken = envelope(code=5000, status=500)
    async with (
        Server([broken, slow(3.0)]) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session,
    ):
        retry = RetryPolicy(attempts=2, initial=0.001, max_elapsed=0.3)
        client = make_client(server, session=session, retry=retry)
        failing = asyncio.create_task(timed(client.get_task("t-1")))
        await asyncio.sleep(0)
        other = asyncio.create_task(client.get_task("t-2"))
        seconds, error = await failing
        assert type(error) is RequestTimeoutError
        assert not error.sent
        assert 0.29 < seconds < 2
        assert len(server.requests) == 2
        other.cancel()


async def test_use_after_close(make_client: MakeClient, emulator: Emulator) -> None:
    """Every call of a closed client is a ClientClosedError; closing again does nothing."""
    for used in (True, False):
        client = make_client(emulator)
        if used:
            await client.list_tasks()
        await client.close()
        await client.close()
        calls: list[Awaitable[object]] = [
            client.create_voice("Ada", voice_url=SAMPLE),
            client.get_task("t-1"),
            client.list_tasks(),
            client.list_presets(),
            anext(client.iter_tasks()),
            client.delete_voice("v-1"),
            client.request("GET", "/x"),
            client.wait_for_task("t-1"),
            client.clone_voice("Ada", voice_url=SAMPLE),
        ]
        for work in calls:
            with pytest.raises(ClientClosedError):
                await work
        with pytest.raises(ClientClosedError):
            async with client:
                pass


@pytest.mark.parametrize("borrowed", [False, True])
@pytest.mark.parametrize(
    "answers",
    [
        [envelope(code=1302, message="x", status=429, headers={"Retry-After": "9"})],
        [stall],
        [drip(b" " * 10_000, 0.05)],
    ],
    ids=["sleeping", "in flight", "reading"],
)
async def test_close_ends_what_is_under_way(
    make_client: MakeClient, answers: list[Answer], borrowed: bool
) -> None:
    """Closing ends calls that sleep, queue or are in flight at once, with ClientClosedError."""
    async with Server(answers) as server, aiohttp.ClientSession() as session:
        patient = RetryPolicy()  # its calls sleep for Retry-After, however late the answers come
        client = make_client(
            server, session=session if borrowed else None, timeout=20.0, retry=patient
        )
        calls = [
            *(asyncio.create_task(client.get_task("t-1")) for _ in range(CONNECTIONS + 20)),
            asyncio.create_task(client.create_voice("Ada", voice_url=SAMPLE)),
        ]
        sent = len(calls) if b"1302" in repr(answers).encode() else CONNECTIONS
        await server.arrived(sent)
        await asyncio.sleep(0.05)
        started = time.monotonic()
        await client.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - started < 5
        assert {type(result) for result in results} == {ClientClosedError}
        assert len(server.requests) == sent
        assert session.closed is False


async def test_close_tells_a_create_its_outcome(make_client: MakeClient) -> None:
    """A create that was in flight at the close says that it may have been processed."""
    async with Server([stall]) as server:
        client = make_client(server)
        create = client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
        call = asyncio.create_task(create)
        await server.arrived(1)
        await client.close()
        with pytest.raises(ClientClosedError) as caught:
            await call
        assert (caught.value.outcome, caught.value.external_task_id) == ("unknown", "mine")


def test_no_loop_is_told() -> None:
    """A client that another async library runs says what it needs, and leaves nothing behind."""
    call = KlingVoiceClient(ApiKey("key")).get_task("t-1")
    with pytest.raises(ConfigurationError, match="asyncio"):
        call.send(None)


async def test_a_second_loop_is_told(make_client: MakeClient, emulator: Emulator) -> None:
    """A client that is used from another event loop says so, and goes on in its own."""
    client = make_client(emulator)
    await client.list_tasks()

    async def elsewhere() -> None:
        await client.list_tasks()

    with pytest.raises(ConfigurationError, match="event loop"):
        await asyncio.to_thread(asyncio.run, elsewhere())
    assert await client.list_tasks() == []


def test_made_outside_of_a_loop() -> None:
    """A client can be made where no loop runs, and is used in the first one that comes."""
    client = KlingVoiceClient(ApiKey("key"), base_url=Nowhere().base_url, retry=ONCE)

    async def use() -> None:
        async with client:
            await client.list_tasks()

    with pytest.raises(ConnectionFailedError):
        asyncio.run(use())


async def test_cancelled_calls_leave_nothing_behind(make_client: MakeClient) -> None:
    """A cancelled call stops at once, and its connection is not given to the next one."""
    async with Server([stall, OK]) as server:
        client = make_client(server)
        call = asyncio.create_task(client.get_task("t-1"))
        await server.arrived(1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await client.get_task("t-1")).task_id == "t-1"
        assert server.connections == 2


SCRIPT = """
    import asyncio, gc, logging
    from kling_voice import KlingVoiceClient, KlingError, RetryPolicy
    from kling_voice.emulator import Emulator, Faults

    logging.disable(logging.WARNING)  # retries, and callbacks that debugging makes slow
    faults = Faults(0.3, delay_seconds=0.01, retry_after=0)

    async def main():
        async with Emulator(task_seconds=0.1, faults=faults) as emulator:
            options = dict(
                credentials=emulator.credentials, base_url=emulator.base_url, timeout=2.0,
                retry=RetryPolicy(attempts=5, initial=0.001, maximum=0.01),
            )
            async with KlingVoiceClient(**options) as client:
                source = dict(voice_url="https://example.com/a.mp3")
                await asyncio.gather(
                    *(client.create_voice("Ada", **source) for _ in range(20)),
                    *(client.list_tasks() for _ in range(20)),
                    client.clone_voice("Bob", **source),
                    return_exceptions=True,
                )
                async for _ in client.iter_tasks():
                    break
                left = asyncio.create_task(client.wait_for_task("nothing"))
                await asyncio.sleep(0.01)
            try:
                await left
            except KlingError:
                pass
            KlingVoiceClient(**options)  # never used, never closed
        print("through")

    asyncio.run(main(), debug=True)
    gc.collect()
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that takes every warning for an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_no_warning_at_exit() -> None:
    """A program that ends leaves no warning and no unclosed thing, in asyncio's debug mode."""
    done = run(SCRIPT)
    assert (done.stdout, done.stderr, done.returncode) == ("through\n", "", 0)


async def test_no_warning_at_exit_over_tls() -> None:
    """The same over TLS, whose connections take longer to close."""
    script = """
        import asyncio, gc, logging
        from kling_voice import ApiKey, KlingVoiceClient

        logging.disable(logging.WARNING)  # callbacks that debugging makes slow

        async def main(url):
            async with KlingVoiceClient(ApiKey("key"), base_url=url) as client:
                await asyncio.gather(*(client.get_task("t-1") for _ in range(5)))
            print("through")

        asyncio.run(main({url!r}), debug=True)
        gc.collect()
    """
    async with Server([OK], tls=True) as server:
        filled = script.format(url=server.base_url)
        done = await asyncio.to_thread(run, filled, SSL_CERT_FILE=str(CERTIFICATE))
        assert (done.stdout, done.stderr, done.returncode) == ("through\n", "", 0)
        assert len(server.requests) == 5
