"""Raw HTTP for these tests: nothing here knows the client that the emulator is for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO
from urllib.parse import quote

import aiohttp
import jwt
from aiohttp import web
from attrs import define, field, frozen

from kling_voice.emulator import Emulator

VOICES = "/v1/general/custom-voices"
PRESETS = "/v1/general/presets-voices"
DELETE = "/v1/general/delete-voices"
SAMPLE = "https://example.com/voice.mp3"


@frozen
class Reply:
    """An answer, read to its end.

    Attributes:
        status: of HTTP.
        headers: of HTTP.
        body: its bytes.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def envelope(self) -> dict[str, Any]:
        """The whole JSON object."""
        envelope = json.loads(self.body)
        assert isinstance(envelope, dict)
        return envelope

    @property
    def verdict(self) -> tuple[int, int]:
        """The HTTP status and the business code."""
        return self.status, self.envelope["code"]

    @property
    def message(self) -> str:
        """The envelope's message."""
        message = self.envelope["message"]
        assert isinstance(message, str)
        return message

    @property
    def data(self) -> Any:
        """The envelope's data, of a success."""
        assert self.verdict == (200, 0), self.body
        return self.envelope["data"]

    @property
    def date(self) -> float:
        """Unix seconds of the Date header."""
        return parsedate_to_datetime(self.headers["Date"]).timestamp()


@frozen
class Api:
    """An emulator and how to call it.

    Attributes:
        emu: the emulator.
        session: for calls that are not of the API.
    """

    emu: Emulator
    session: aiohttp.ClientSession

    async def call(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        body: bytes | BinaryIO | None = None,
        authorization: str | None = "",
        timeout: float = 5.0,
    ) -> Reply:
        """Send one request, with the API key unless another authorization (or none) is given."""
        if authorization == "":
            authorization = f"Bearer {self.emu.api_key}"
        headers = {} if authorization is None else {"Authorization": authorization}
        async with self.session.request(
            method,
            self.emu.base_url + path,
            data=body,
            json=json,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout),
        ) as response:
            return Reply(response.status, dict(response.headers), await response.read())

    async def create(self, voice_name: object = "Ada", **fields: object) -> Reply:
        """Create a voice, from a URL unless a source is given."""
        source = {} if {"voice_url", "video_id"} & {*fields} else {"voice_url": SAMPLE}
        return await self.call("POST", VOICES, json={"voice_name": voice_name, **source, **fields})

    async def get(self, any_id: str) -> Reply:
        """Query a task by either kind of id."""
        return await self.call("GET", f"{VOICES}/{quote(any_id, safe='')}")

    async def page(self, query: str = "") -> list[dict[str, Any]]:
        """A page of the list."""
        data = (await self.call("GET", VOICES + query)).data
        assert isinstance(data, list)
        return data

    async def delete(self, voice_id: object) -> Reply:
        """Delete a voice."""
        return await self.call("POST", DELETE, json={"voice_id": voice_id})

    async def voice(self, **fields: object) -> dict[str, Any]:
        """Create a voice and let it succeed at once; answers the task as a query shows it."""
        task_id = (await self.create(**fields)).data["task_id"]
        self.emu.advance(10)
        task = (await self.get(task_id)).data
        assert isinstance(task, dict)
        return task


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Api]:
    """An emulator with these options, each request on a connection of its own.

    Its clock stands still but for `advance`, unless a time scale is given.
    """
    async with Emulator(**{"time_scale": 0.0, **options}) as emu:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Api(emu, session)


async def until(condition: Callable[[], bool]) -> None:
    """Wait, in real time, for what another task brings about."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError("it did not come about in 5 s")


def token(emu: Emulator, *, key: str | None = None, alg: str = "HS256", **claims: object) -> str:
    """The Authorization header of a JWT as the vendor documents it, with changed claims."""
    now = time.time()
    standard = {"iss": emu.credentials.access_key, "exp": now + 1800, "nbf": now - 5}
    changed = {name: value for name, value in {**standard, **claims}.items() if value is not None}
    payload = json.dumps(changed).encode()
    signed = jwt.PyJWS().encode(payload, key or emu.credentials.secret_key, algorithm=alg)
    return f"Bearer {signed}"


@define(eq=False)
class Inbox:
    """A receiver of callbacks.

    Attributes:
        url: where it listens.
        received: headers and body of each callback, in the order of their coming.
        answer: the status that the n-th callback (from 1) is answered with.
    """

    url: str = ""
    answer: Callable[[int], int] = lambda number: 200
    received: list[tuple[Mapping[str, str], bytes]] = field(factory=list)
    _arrived: asyncio.Condition = field(factory=asyncio.Condition)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The callbacks' JSON."""
        return [json.loads(body) for _, body in self.received]

    async def until(self, count: int) -> None:
        """Wait until so many have come."""
        async with asyncio.timeout(5), self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) >= count)

    async def receive(self, request: web.Request) -> web.Response:
        """Take one callback."""
        self.received.append((dict(request.headers), await request.read()))
        async with self._arrived:
            self._arrived.notify_all()
        return web.Response(status=self.answer(len(self.received)))


@asynccontextmanager
async def inbox(answer: Callable[[int], int] = lambda number: 200) -> AsyncIterator[Inbox]:
    """A receiver of callbacks that listens."""
    box = Inbox(answer=answer)
    async with serving_app("/hook", box.receive) as base_url:
        box.url = f"{base_url}/hook"
        yield box


@asynccontextmanager
async def serving_app(
    path: str, handler: Callable[[web.Request], Any], method: str = "*"
) -> AsyncIterator[str]:
    """A web server with one handler; gives its base URL."""
    app = web.Application()
    app.router.add_route(method, path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
