"""Starting and stopping: at once, cleanly, and again."""

import asyncio
import time

import aiohttp
import pytest

from kling_voice.emulator import Emulator, Fault, Faults, running

from .support import VOICES, Api, inbox, serving, until


async def test_closing_leaves_nothing_behind() -> None:
    """After a busy life no asyncio task is left, and closing took no time."""
    before = asyncio.all_tasks()
    async with inbox() as box:
        around = asyncio.all_tasks()
        faults = Faults(script={"list": [Fault.STALL], "get": [Fault.DELAY]}, delay_seconds=60)
        async with Emulator(faults=faults) as emu, aiohttp.ClientSession() as session:
            api = Api(emu, session)
            for _ in range(20):
                await api.create(callback_url=box.url)
            stuck = [
                asyncio.create_task(api.call("GET", VOICES)),
                asyncio.create_task(api.get("1")),
            ]
            await until(lambda: emu.requests.total() == 22)
            started = time.monotonic()
            await emu.__aexit__(None, None, None)
            assert time.monotonic() - started < 0.2
            await asyncio.gather(*stuck, return_exceptions=True)
            await asyncio.sleep(0)
            left = {task for task in asyncio.all_tasks() - around if "RequestHandler" in repr(task)}
            assert left == set()
            await emu.__aenter__()
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before


async def test_a_create_that_comes_while_closing_is_5001() -> None:
    """A request whose body arrives too late is told so, and makes nothing."""
    async with serving() as api:
        emu = api.emu
        host, _, port = emu.base_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"voice_name": "Ada", "video_id": "1"}'
        key = f"Authorization: Bearer {emu.api_key}"
        head = f"POST {VOICES} HTTP/1.1\r\nHost: x\r\n{key}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode())
        await until(lambda: emu.requests.total() == 1)
        closing = asyncio.create_task(emu.__aexit__(None, None, None))
        await asyncio.sleep(0)
        writer.write(body)
        assert b'"code":5001' in await reader.read()
        await closing
        assert emu.created == 0
        writer.close()
        await writer.wait_closed()
        await emu.__aenter__()


async def test_an_emulator_may_be_opened_again() -> None:
    """A server that was away comes back at the same address with all it knew."""
    async with serving() as api:
        emu, url = api.emu, api.emu.base_url
        await api.create(external_task_id="mine")
        await emu.__aexit__(None, None, None)
        with pytest.raises(aiohttp.ClientConnectorError):
            await api.get("mine")
        await emu.__aenter__()
        assert emu.base_url == url
        assert (await api.get("mine")).verdict == (200, 0)


async def test_a_port_in_use_is_an_error() -> None:
    """Two emulators cannot listen on one port; the second leaves nothing behind."""
    async with serving() as api:
        port = int(api.emu.base_url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            await Emulator(port=port).__aenter__()


async def test_many_requests_at_once() -> None:
    """Hundreds of connections at once are served, and each create counts."""
    async with serving(concurrency_limit=150) as api:
        replies = await asyncio.gather(*(api.create() for _ in range(300)))
        codes = [reply.envelope["code"] for reply in replies]
        assert (codes.count(0), codes.count(1303)) == (150, 150)
        assert (api.emu.created, api.emu.max_in_flight) == (150, 150)


def test_an_emulator_runs_in_a_thread() -> None:
    """From a test's own thread everything is to hand, whatever event loop the test runs."""

    async def one_voice(emu: Emulator) -> str:
        async with aiohttp.ClientSession() as session:
            api = Api(emu, session)
            url = await emu.publish(__file__, "me")
            async with session.get(url) as response:
                assert b"whatever event loop" in await response.read()
            task_id = (await api.create()).data["task_id"]
            await asyncio.to_thread(emu.advance, 9)
            status = (await api.get(task_id)).data["task_status"]
            assert isinstance(status, str)
            return status

    with running(Emulator()) as emu:
        assert asyncio.run(one_voice(emu)) == "succeed"
        assert asyncio.run(one_voice(emu)) == "succeed"
        assert (emu.created, emu.in_flight, len(emu.tasks)) == (2, 0, 2)
    emu.advance(1)  # harmless when it is over


def test_a_thread_tells_why_it_cannot_run() -> None:
    """A port in use fails where the emulator was to run, not in its thread."""
    with running(Emulator()) as emu:
        port = int(emu.base_url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"), running(Emulator(port=port)):
            pytest.fail("it runs")


def test_a_failing_test_closes_its_emulator() -> None:
    """An exception in the body passes through, and the thread ends."""
    with pytest.raises(KeyError), running(Emulator()) as emu:
        raise KeyError
    with pytest.raises(aiohttp.ClientConnectorError):
        asyncio.run(refused(emu.base_url))


async def refused(url: str) -> None:
    """Try to reach someone who is gone."""
    async with aiohttp.ClientSession() as session, session.get(url):
        pass
