"""Faults: what each kind does on the wire, whether it was processed, and when it strikes."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from kling_voice.emulator import ALL, CALLS, TRANSIENT, Fault, Faults

from .support import PRESETS, VOICES, Api, Reply, serving, until

SENDERS: dict[str, Callable[[Api], Awaitable[Reply]]] = {
    "create": lambda api: api.create(external_task_id="mine"),
    "get": lambda api: api.get("first"),
    "list": lambda api: api.call("GET", VOICES),
    "presets": lambda api: api.call("GET", PRESETS),
    "delete": lambda api: api.delete(api.emu.tasks[0].voice_id),
}

ENVELOPES = {
    Fault.ERROR_500_BEFORE: (500, 5000),
    Fault.ERROR_500_AFTER: (500, 5000),
    Fault.ERROR_503_BEFORE: (503, 5001),
    Fault.ERROR_503_AFTER: (503, 5001),
    Fault.ERROR_504_BEFORE: (504, 5002),
    Fault.ERROR_504_AFTER: (504, 5002),
    Fault.RATE_LIMIT: (429, 1302),
    Fault.RATE_LIMIT_RETRY_AFTER: (429, 1302),
    Fault.CONCURRENCY: (429, 1303),
    Fault.TOKEN_REFUSED: (401, 1004),
}
LOST = (Fault.RESET_BEFORE, Fault.RESET_AFTER, Fault.STALL, Fault.STALL_AFTER)
PROCESSED = (
    Fault.RESET_AFTER,
    Fault.DELAY,
    Fault.STALL_AFTER,
    Fault.ERROR_500_AFTER,
    Fault.ERROR_503_AFTER,
    Fault.ERROR_504_AFTER,
    Fault.HTML_502_AFTER,
    Fault.TRUNCATED,
    Fault.UNDECODABLE,
)


async def meets(send: Callable[[], Awaitable[Reply]], fault: Fault) -> None:
    """Send a request and assert that this fault is what comes of it."""
    if fault in LOST:
        with pytest.raises(aiohttp.ClientOSError, match="reset by peer"):
            await send()
    elif fault is Fault.TRUNCATED:
        with pytest.raises(aiohttp.ClientPayloadError):
            await send()
    elif fault in (Fault.HTML_502, Fault.HTML_502_AFTER):
        reply = await send()
        assert (reply.status, reply.headers["Content-Type"]) == (502, "text/html")
        assert b"<html>" in reply.body
    elif fault is Fault.UNDECODABLE:
        reply = await send()
        assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
        with pytest.raises(UnicodeDecodeError):
            json.loads(reply.body)
    elif fault is Fault.DELAY:
        started = time.monotonic()
        assert (await send()).verdict == (200, 0)
        assert time.monotonic() - started >= 0.05
    else:
        reply = await send()
        assert reply.verdict == ENVELOPES[fault]
        assert ("Retry-After" in reply.headers) == (fault is Fault.RATE_LIMIT_RETRY_AFTER)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", Fault)
async def test_each_fault_on_each_call(fault: Fault, call: str) -> None:
    """The scripted request meets its fault, processed or not; the next one does not."""
    # aiohttp itself sends a GET again, once, when its connection is lost.
    struck = 2 if fault in LOST and call in ("get", "list", "presets") else 1
    faults = Faults(script={call: [fault] * struck}, delay_seconds=0.05, stall_seconds=0.02)
    async with serving() as api:
        await api.voice(external_task_id="first")
        api.emu.faults = faults
        await meets(lambda: SENDERS[call](api), fault)
        assert faults.injected == {fault: struck}
        assert api.emu.created == (2 if call == "create" and fault in PROCESSED else 1)
        assert api.emu.tasks[0].deleted == (call == "delete" and fault in PROCESSED)
        after = await SENDERS[call](api)
        repeated = call in ("create", "delete") and fault in PROCESSED
        assert after.verdict == ((400, 1201) if repeated else (200, 0))
        assert faults.injected == {fault: struck}
        assert sum(api.emu.requests.values()) == 3 + struck


async def test_a_reset_is_a_tcp_reset() -> None:
    """The connection does not end politely: the peer's read fails."""
    async with serving(faults=Faults(script={"list": [Fault.RESET_BEFORE]})) as api:
        host, _, port = api.emu.base_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {VOICES} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_a_truncated_answer_is_half_of_one() -> None:
    """The length announced is that of the whole; what comes is the first half of it."""
    async with serving() as api:
        api.emu.preload(3)
        whole = len((await api.call("GET", VOICES)).body)
        host, _, port = api.emu.base_url.removeprefix("http://").partition(":")
        api.emu.faults = Faults(script={"list": [Fault.TRUNCATED]})
        reader, writer = await asyncio.open_connection(host, int(port))
        key = f"Authorization: Bearer {api.emu.api_key}"
        writer.write(f"GET {VOICES} HTTP/1.1\r\nHost: x\r\n{key}\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert (length, len(body)) == (whole, whole // 2)
        writer.close()


async def test_a_stall_lasts_until_the_emulator_closes() -> None:
    """Without stall_seconds nothing is ever answered; closing ends it at once."""
    async with serving(faults=Faults(script={"list": [Fault.STALL]})) as api:
        stalled = asyncio.create_task(api.call("GET", VOICES))
        await until(lambda: bool(api.emu.requests))
        assert not stalled.done()
    with pytest.raises(aiohttp.ClientError):
        await stalled


async def test_a_client_may_leave_a_stall() -> None:
    """A client that gives up harms nobody."""
    faults = Faults(script={"create": [Fault.STALL_AFTER], "list": [Fault.RESET_BEFORE]})
    async with serving(faults=faults) as api:
        with pytest.raises(TimeoutError):
            await api.call(
                "POST",
                VOICES,
                json={"voice_name": "Ada", "video_id": "1"},
                timeout=0.05,
            )
        assert api.emu.created == 1
        assert (await api.get(api.emu.tasks[0].task_id)).verdict == (200, 0)


async def test_retry_after_is_settable() -> None:
    """The header of a rate limit says what a test wants, even nonsense."""
    settings: list[tuple[float | str, str]] = [(1, "1"), (0.5, "0.5"), ("soon", "soon")]
    for given, sent in settings:
        faults = Faults(script={"list": {1: "rate_limit_retry_after"}}, retry_after=given)
        async with serving(faults=faults) as api:
            assert (await api.call("GET", VOICES)).headers["Retry-After"] == sent


@pytest.mark.parametrize("code", [1000, 1100, 1101, 1102, 1103, 1300, 1301, 1304, 5001])
async def test_any_business_code_can_be_scripted(code: int) -> None:
    """A code in place of a kind is answered unprocessed, by its HTTP status."""
    async with serving(faults=Faults(script={"create": [None, code]})) as api:
        assert (await api.create()).verdict == (200, 0)
        reply = await api.create()
        assert reply.envelope["code"] == code
        status = {1000: 401, 1103: 403, 1300: 400, 1301: 400, 5001: 503}.get(code, 429)
        assert reply.status == status
        assert api.emu.created == 1
        assert api.emu.refused == {code: 1}


async def test_the_script_names_requests_by_number() -> None:
    """The third create meets its fault, whatever other calls come in between."""
    async with serving(faults=Faults(script={"create": {3: Fault.ERROR_503_AFTER}})) as api:
        for _ in range(2):
            assert (await api.create()).verdict == (200, 0)
            await api.page()
        assert (await api.create()).verdict == (503, 5001)
        assert (await api.create()).verdict == (200, 0)
        assert api.emu.created == 4


def draws(faults: Faults, call: str, count: int) -> list[Fault | int | None]:
    """The next faults of a call."""
    return [faults.draw(call) for _ in range(count)]


def test_a_rate_is_seeded_and_repeatable() -> None:
    """The same seed gives the same sequence for a call, however calls interleave."""
    one, two, other = Faults(0.3, seed=7), Faults(0.3, seed=7), Faults(0.3, seed=8)
    sequence = draws(one, "create", 1000)
    draws(two, "get", 100)
    assert draws(two, "create", 1000) == sequence
    assert draws(other, "create", 1000) != sequence
    struck = [fault for fault in sequence if fault is not None]
    assert 250 < len(struck) < 350
    assert set(struck) == set(TRANSIENT)
    assert sum(one.injected.values()) == len(struck)


def test_kinds_and_calls_narrow_a_rate() -> None:
    """A rate strikes only the calls named, with the kinds named; the script comes on top."""
    faults = Faults(1.0, kinds=["stall", 1101], calls=["get"], script={"get": {2: 1304}})
    assert draws(faults, "list", 3) == [None] * 3
    assert draws(faults, "get", 2)[1] == 1304
    assert set(draws(faults, "get", 50)) == {Fault.STALL, 1101}
    assert draws(Faults(1.0, kinds=[]), "get", 2) == [None, None]


def test_the_kinds_that_need_no_patience() -> None:
    """TRANSIENT is all but stalls and refused tokens."""
    assert set(ALL) - set(TRANSIENT) == {Fault.STALL, Fault.STALL_AFTER, Fault.TOKEN_REFUSED}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rate": 1.5}, "rate"),
        ({"calls": ["creat"]}, "creat"),
        ({"script": {"querry": [None]}}, "querry"),
        ({"script": {"get": ["no_such_kind"]}}, "no_such_kind"),
        ({"script": {"get": {0: "stall"}}}, "script: the requests of 'get' are numbered from 1"),
        ({"script": {"get": {"1": "stall"}}}, "script: .* not '1'"),
        ({"kinds": [7]}, "7"),
    ],
)
def test_misspelled_faults_are_refused(options: dict[str, Any], told: str) -> None:
    """A script that could never strike fails where it is written."""
    with pytest.raises(ValueError, match=told):
        Faults(**options)
