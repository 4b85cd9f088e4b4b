"""Trial recordings: whole or not at all, without credentials, with clear errors."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

import aiohttp
import pytest
from aiohttp import web

from kling_voice.emulator import Emulator
from kling_voice.errors import (
    ConnectionFailedError,
    InvalidRequestError,
    KlingError,
    NotFoundError,
    RequestTimeoutError,
    ResponseError,
)
from kling_voice.models import Voice
from kling_voice.trials import download, is_worth_retrying, trial_url

CONTENT = bytes(range(256)) * 4000
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session that adds a token, a cookie and a login to whatever it sends."""
    jar = aiohttp.CookieJar(unsafe=True)
    jar.update_cookies({"session": "cookie"})
    async with aiohttp.ClientSession(
        headers={"Authorization": "Bearer token"}, cookie_jar=jar
    ) as borrowed:
        yield borrowed


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A function that serves a handler on loopback and gives a URL of it."""
    runners: list[web.AppRunner] = []

    async def start(
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> str:
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/trial.mp3?sign=a%2Fb&x=1"

    yield start
    for runner in runners:
        await runner.cleanup()


async def whole(request: web.Request) -> web.StreamResponse:
    """Answer the file."""
    return web.Response(body=CONTENT, content_type="audio/mpeg")


def left(folder: Path) -> list[str]:
    """Give the names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


async def refused(session: aiohttp.ClientSession, url: str, folder: Path) -> KlingError:
    """Let a download fail, and give its error; the file that was there must be untouched."""
    target = folder / "t.mp3"
    target.write_bytes(b"before")
    with pytest.raises(KlingError) as caught:
        await download(session, url, target, timeout=0.5, cap=2_000_000)
    assert left(folder) == ["t.mp3"]
    assert target.read_bytes() == b"before"
    assert "sign" not in str(caught.value)
    return caught.value


async def test_download(session: aiohttp.ClientSession, serve: Serve, tmp_path: Path) -> None:
    """The file is the answer's bytes, replaces what was there, and nothing else is left."""
    (tmp_path / "t.mp3").write_bytes(b"before")
    done = await download(session, await serve(whole), str(tmp_path / "t.mp3"), timeout=5)
    assert done == tmp_path / "t.mp3"
    assert done.read_bytes() == CONTENT
    assert left(tmp_path) == ["t.mp3"]


async def test_usual_permissions(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path
) -> None:
    """The file has the permissions that any new file gets."""
    (tmp_path / "other").touch()
    done = await download(session, await serve(whole), tmp_path / "t.mp3", timeout=5)
    assert done.stat().st_mode == (tmp_path / "other").stat().st_mode


async def test_nothing_identifies_the_caller(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path
) -> None:
    """No token and no cookie of the session goes along; the URL goes as it is."""
    seen: list[web.Request] = []

    async def look(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        return await whole(request)

    await download(session, await serve(look), tmp_path / "t.mp3", timeout=5)
    assert "Authorization" not in seen[0].headers
    assert "Cookie" not in seen[0].headers
    assert seen[0].raw_path == "/trial.mp3?sign=a%2Fb&x=1"
    assert not session.closed


async def test_from_the_emulator(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """A preset voice's trial can be fetched."""
    async with Emulator() as emulator:
        voice = Voice("1", trial_url=f"{emulator.base_url}/media/trials/829000000000000001.mp3")
        done = await download(session, trial_url(voice), tmp_path / "t.mp3", timeout=5)
    assert done.stat().st_size > 10_000


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_expired(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path, status: int
) -> None:
    """A file that is gone is a NotFoundError which tells how long files live."""

    async def gone(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="<Error>AccessDenied</Error>")

    error = await refused(session, await serve(gone), tmp_path)
    assert isinstance(error, NotFoundError)
    assert error.http_status == status
    assert "30 days" in str(error)
    assert not is_worth_retrying(error)


@pytest.mark.parametrize(
    ("answer", "why", "again"),
    [
        (lambda: web.Response(status=502, text="<html>"), "not the trial recording", True),
        (lambda: web.Response(status=429), "not the trial recording", True),
        (lambda: web.Response(status=302), "not the trial recording", False),
        (lambda: web.Response(status=206, body=CONTENT), "not the trial recording", False),
        (lambda: web.Response(text="<html>", content_type="text/html"), "an HTML page", False),
        (lambda: web.Response(body=b""), "it is empty", False),
        (lambda: web.Response(body=CONTENT * 2), "longer than 2000000 bytes", False),
    ],
    ids=["502", "429", "302", "206", "page", "empty", "too long"],
)
async def test_something_else(
    session: aiohttp.ClientSession,
    serve: Serve,
    tmp_path: Path,
    answer: Callable[[], web.Response],
    why: str,
    again: bool,
) -> None:
    """What is not the file is a ResponseError, and leaves nothing behind."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return answer()

    error = await refused(session, await serve(handler), tmp_path)
    assert isinstance(error, ResponseError)
    assert why in str(error)
    assert is_worth_retrying(error) is again


async def test_a_bomb(session: aiohttp.ClientSession, serve: Serve, tmp_path: Path) -> None:
    """The cap counts unpacked bytes."""

    async def bomb(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=bytes(50_000_000), zlib_executor_size=10**9)
        response.enable_compression()
        return response

    assert "longer than" in str(await refused(session, await serve(bomb), tmp_path))


async def test_broken_off(session: aiohttp.ClientSession, serve: Serve, tmp_path: Path) -> None:
    """An answer that breaks off is a ConnectionFailedError worth another try."""

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(CONTENT)
        await response.prepare(request)
        await response.write(CONTENT[:1000])
        assert request.transport is not None
        request.transport.close()
        return response

    error = await refused(session, await serve(half), tmp_path)
    assert isinstance(error, ConnectionFailedError)
    assert "broke off" in str(error)
    assert is_worth_retrying(error)


async def test_nobody_there(
    session: aiohttp.ClientSession, unused_tcp_port: int, tmp_path: Path
) -> None:
    """A refused connection is a ConnectionFailedError that shows no signature."""
    url = f"http://127.0.0.1:{unused_tcp_port}/t.mp3?sign=1"
    assert isinstance(await refused(session, url, tmp_path), ConnectionFailedError)


@pytest.mark.parametrize("first", [0, 1000], ids=["at once", "midway"])
async def test_stall(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path, first: int
) -> None:
    """A server that falls silent, before its answer or in it, is a timeout."""

    async def stall(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if first:
            await response.prepare(request)
            await response.write(CONTENT[:first])
        await asyncio.sleep(5)
        return response

    error = await refused(session, await serve(stall), tmp_path)
    assert isinstance(error, RequestTimeoutError)


async def test_slow_but_steady(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path
) -> None:
    """A download longer than the timeout goes on while bytes come, but not for ever."""

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(int(request.query["drops"])):
            await response.write(b"drop")
            await asyncio.sleep(0.05)
        return response

    url = (await serve(drip)).partition("?")[0]
    done = await download(session, f"{url}?drops=10", tmp_path / "t.mp3", timeout=0.2)
    assert done.read_bytes() == b"drop" * 10
    with pytest.raises(RequestTimeoutError):
        await download(session, f"{url}?drops=1000", tmp_path / "t.mp3", timeout=0.1)


async def test_cancelled(session: aiohttp.ClientSession, serve: Serve, tmp_path: Path) -> None:
    """A cancelled download leaves nothing behind, and goes on being cancelled."""
    begun = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(CONTENT)
        begun.set()
        await asyncio.sleep(5)
        return response

    url = await serve(slow)
    job = asyncio.create_task(download(session, url, tmp_path / "t.mp3", timeout=5))
    await begun.wait()
    await asyncio.sleep(0.05)
    assert len(left(tmp_path)) == 1
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert left(tmp_path) == []


async def test_redirects(session: aiohttp.ClientSession, serve: Serve, tmp_path: Path) -> None:
    """A few redirects are followed, relative ones too, and still nothing identifies the caller."""
    seen: list[web.Request] = []

    async def hop(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        if len(seen) < 4:
            location = f"/elsewhere/{len(seen)}?sign=%2F{len(seen)}"
            return web.Response(status=302 + len(seen) % 2, headers={"Location": location})
        return await whole(request)

    done = await download(session, await serve(hop), tmp_path / "t.mp3", timeout=5)
    assert done.read_bytes() == CONTENT
    assert seen[-1].raw_path == "/elsewhere/3?sign=%2F3"
    assert not any("Authorization" in request.headers for request in seen)


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("/again", "more than 5 times"),
        ("http://example.com/t.mp3?sign=1", "not https"),
        ("file:///etc/passwd", "not https"),
        ("ftp://127.0.0.1/t", "not https"),
        ("https://", "not https"),
        ("http://[", "not https"),
    ],
)
async def test_bad_redirects(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path, location: str, why: str
) -> None:
    """A redirect without end, or to what is not https, is a ResponseError."""

    async def hop(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    error = await refused(session, await serve(hop), tmp_path)
    assert isinstance(error, ResponseError)
    assert why in str(error)


async def test_proxy(session: aiohttp.ClientSession, serve: Serve, tmp_path: Path) -> None:
    """The request goes through the proxy that is given for its URL."""
    seen: list[str] = []

    async def relay(request: web.Request) -> web.StreamResponse:
        seen.append(str(request.url))
        return await whole(request)

    relay_url = await serve(relay)
    url = "http://127.0.0.1:9/trial.mp3"
    await download(session, url, tmp_path / "t.mp3", timeout=5, proxy=lambda url: relay_url)
    assert seen == [url]


def place(folder: Path, kind: str) -> Path:
    """Give a path that cannot be written."""
    return {
        "folder": folder,
        "no folder": folder / "none" / "t.mp3",
        "in a file": folder / "file" / "t.mp3",
        "null byte": folder / "a\0b",
        "root": Path("/"),
        "endless": folder / ("a" * 5000),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["folder", "no folder", "in a file", "null byte", "root", "endless"]
)
async def test_bad_path(session: aiohttp.ClientSession, tmp_path: Path, kind: str) -> None:
    """A path that cannot be written is refused, before anything is fetched where possible."""
    (tmp_path / "file").touch()
    async with Emulator() as emulator:
        url = f"{emulator.base_url}/media/recordings/ada.mp3"
        with pytest.raises(InvalidRequestError) as caught:
            await download(session, url, place(tmp_path, kind), timeout=5)
        assert kind == "endless" or not emulator.requests
    assert caught.value.field == "path"
    assert left(tmp_path) == ["file"]


def open_full(target: Path) -> tuple[Path, BinaryIO]:
    """Open a file that cannot take a byte, in place of the temporary one."""
    part = target.with_name("part")
    part.touch()
    return part, open("/dev/full", "wb")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
async def test_disk_full(
    session: aiohttp.ClientSession, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up is an InvalidRequestError of "path" that says so."""
    monkeypatch.setattr("kling_voice.trials._open_part", open_full)
    with pytest.raises(InvalidRequestError, match="No space left"):
        await download(session, await serve(whole), tmp_path / "t.mp3", timeout=5)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "url", [None, "", "http://example.com/t.mp3?sign=1", "file:///t.mp3", "t.mp3", "https://"]
)
def test_no_usable_trial_url(url: str | None) -> None:
    """A voice without a trial_url, or one that is not https, is refused by its field."""
    with pytest.raises(InvalidRequestError) as caught:
        trial_url(Voice("1", trial_url=url))
    assert caught.value.field == "voice"
    assert "sign" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://example.com/t.mp3?sign=1", "http://127.0.0.1:1/t.mp3"])
def test_usable_trial_url(url: str) -> None:
    """An https URL is good, and so is one of this machine."""
    assert trial_url(Voice("1", trial_url=url)) == url
