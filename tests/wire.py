"""What the tests share: quick retries, and a server for bytes that no honest server would send."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from attrs import frozen

from kling_voice import KlingVoiceClient, RetryPolicy

MakeClient = Callable[..., KlingVoiceClient]
BRISK = RetryPolicy(attempts=5, initial=0.001, maximum=0.01, max_elapsed=10.0)
ONCE = RetryPolicy(attempts=1)


def patience(*faults: object) -> float:
    """Give a timeout: short where a fault stalls, long elsewhere, since machines can be busy."""
    return 0.25 if {"stall", "stall_after"} & {str(fault) for fault in faults} else 5.0


CERTIFICATE = Path(__file__).with_name("localhost.pem")  # for localhost, trusted by nobody

Write = Callable[[asyncio.StreamWriter], Awaitable[None]]
Answer = bytes | Write


@frozen
class Request:
    """A request as it came: the target still encoded, the headers' names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


def response(
    body: bytes = b"",
    status: int = 200,
    headers: dict[str, str] | None = None,
    *,
    length: int | None = None,
) -> bytes:
    """Write an HTTP response; ``length`` may lie about the body's."""
    fields = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body) if length is None else length),
        **(headers or {}),
    }
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def envelope(
    data: object = None,
    *,
    code: int = 0,
    message: str = "SUCCEED",
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> bytes:
    """Write the vendor's envelope as an HTTP response."""
    document: dict[str, object] = {"code": code, "message": message, "request_id": "req-1"}
    if data is not None:
        document["data"] = data
    return response(json.dumps(document).encode(), status, headers)


def task(task_id: str = "t-1", status: str = "submitted", **fields: object) -> dict[str, object]:
    """Make a task object as the vendor sends it."""
    return {"task_id": task_id, "task_status": status, **fields}


class Server:
    """Answers each request with bytes of the test's choice.

    Args:
        answers: One for each request, the last one for all further ones; or a function of the
            request. Empty bytes close the connection; a coroutine function writes for itself.
        tls: Whether it speaks TLS, with a certificate that nobody trusts.

    Attributes:
        base_url: Where it listens.
        requests: What has come, in order.
        connections: How many connections were made.
    """

    def __init__(
        self, answers: Sequence[Answer] | Callable[[Request], Answer], *, tls: bool = False
    ) -> None:
        self.base_url = ""
        self._tls = tls
        self.requests: list[Request] = []
        self.connections = 0
        self._came = asyncio.Event()
        self._answers = answers
        self._writers: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        context = None
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=context)
        port = self._server.sockets[0].getsockname()[1]
        self.base_url = f"https://localhost:{port}" if self._tls else f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def arrived(self, count: int) -> None:
        """Wait until so many requests have come."""
        while len(self.requests) < count:
            self._came.clear()
            await self._came.wait()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        handler = asyncio.create_task(self._serve(reader, writer))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await _read(reader)
                self.requests.append(request)
                self._came.set()
                answer = self._answer(request)
                if not isinstance(answer, bytes):
                    await answer(writer)
                elif answer:
                    writer.write(answer)
                    await writer.drain()
                else:
                    return
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    def _answer(self, request: Request) -> Answer:
        if callable(self._answers):
            return self._answers(request)
        return self._answers[min(len(self.requests), len(self._answers)) - 1]


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, text = line.partition(":")
        headers[name.lower()] = text.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, target, headers, body)


async def stall(writer: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.sleep(60)


def drip(body: bytes, seconds: float) -> Write:
    """Answer one byte at a time, so that each one comes soon and the last one late."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(response(length=len(body)))
        for number in range(len(body)):
            writer.write(body[number : number + 1])
            await writer.drain()
            await asyncio.sleep(seconds)

    return write
