"""Servers: the emulator and one of stored answers, in processes of their own; a receiver here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

from aiohttp import web
from attrs import frozen

from benchmarks.harness import SPAWN
from kling_voice import AccessKey, CallbackReceiver, KlingVoiceClient
from kling_voice.emulator import Emulator, running

P = ParamSpec("P")
T = TypeVar("T")

SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
"""The webhook secret of the emulators that send callbacks; the one in the vendor's example."""


# --- the emulator ---


@frozen
class EmulatorProcess:
    """An emulator in a process of its own.

    Attributes:
        base_url: Where it listens.
        credentials: The access key that it accepts.
        api_key: The API key that it accepts.
    """

    base_url: str
    credentials: AccessKey
    api_key: str
    _pipe: Connection

    def ask(
        self, question: Callable[Concatenate[Emulator, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a module's function with the emulator, over there, and give what it returns."""
        self._pipe.send((question, args, kwargs))
        answer: T = self._pipe.recv()
        return answer

    def client(self, **options: Any) -> KlingVoiceClient:
        """Make a client of it."""
        return KlingVoiceClient(self.credentials, base_url=self.base_url, **options)


@contextmanager
def emulator_process(**options: Any) -> Iterator[EmulatorProcess]:
    """Run an emulator in a process of its own.

    Args:
        options: The arguments of ``Emulator``; they must pickle.
    """
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve_emulator, args=(theirs, options), daemon=True)
    process.start()
    try:
        base_url, credentials, api_key = ours.recv()
        yield EmulatorProcess(base_url, credentials, api_key, pipe=ours)
    finally:
        ours.send(None)
        process.join()


def _serve_emulator(pipe: Connection, options: Mapping[str, Any]) -> None:
    with running(Emulator(**options)) as emulator:
        pipe.send((emulator.base_url, emulator.credentials, emulator.api_key))
        while (asked := pipe.recv()) is not None:
            question, args, kwargs = asked
            pipe.send(question(emulator, *args, **kwargs))


@frozen
class Counts:
    """What an emulator has seen so far.

    Attributes:
        gets: Queries and lists.
        requests: All requests.
        created: Tasks.
        refused: Creates that were refused with 1303.
        cpu_seconds: What its process has used.
    """

    gets: int
    requests: int
    created: int
    refused: int
    cpu_seconds: float

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(
            self.gets - earlier.gets,
            self.requests - earlier.requests,
            self.created - earlier.created,
            self.refused - earlier.refused,
            self.cpu_seconds - earlier.cpu_seconds,
        )


def counts(emulator: Emulator) -> Counts:
    """Count what has happened; for :meth:`EmulatorProcess.ask`."""
    requests = emulator.requests.copy()
    return Counts(
        gets=sum(count for name, count in requests.items() if name.startswith("GET ")),
        requests=requests.total(),
        created=emulator.created,
        refused=emulator.refused[1303],
        cpu_seconds=time.process_time(),
    )


def ends(emulator: Emulator) -> dict[str, float]:
    """Tell when each task ends, by ``time.monotonic``, which all processes share."""
    offset = time.monotonic() - emulator.now()
    return {task.task_id: task.ends + offset for task in emulator.tasks}


# --- callbacks ---


@asynccontextmanager
async def served_receiver() -> AsyncIterator[CallbackReceiver]:
    """Serve a receiver on this machine."""
    receivers: list[CallbackReceiver] = []

    async def handle(request: web.Request) -> web.Response:
        return await receivers[0].aiohttp_handler(request)

    app = web.Application()
    app.router.add_post("/kling", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        receivers.append(
            CallbackReceiver(SECRET, public_url=f"http://127.0.0.1:{runner.addresses[0][1]}/kling")
        )
        yield receivers[0]
    finally:
        await runner.cleanup()


# --- stored answers ---


@contextmanager
def answering_process(answers: Mapping[str, bytes]) -> Iterator[str]:
    """Run a server that does nothing but repeat JSON answers, and give its URL.

    Args:
        answers: The bodies, by the path that they are asked for with.
    """
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve_answers, args=(theirs, dict(answers)), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve_answers(pipe: Connection, answers: Mapping[str, bytes]) -> None:
    asyncio.run(_answer_for_ever(pipe, answers))


async def _answer_for_ever(pipe: Connection, answers: Mapping[str, bytes]) -> None:
    whole = {path.encode(): _answer(body) for path, body in answers.items()}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Repeater(whole), "127.0.0.1", 0)
    pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


def _answer(body: bytes) -> bytes:
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Date: Sat, 21 Nov 2026 12:00:00 GMT\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Repeater(asyncio.Protocol):
    """Answers each request that has no body by its path; keeps the connection open."""

    def __init__(self, answers: Mapping[bytes, bytes]) -> None:
        self._answers = answers
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        *heads, self._received = (self._received + data).split(b"\r\n\r\n")
        for head in heads:
            self._transport.write(self._answers[head.split(b" ", 2)[1]])
