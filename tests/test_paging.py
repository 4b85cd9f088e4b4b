"""Reading a list to its end, whatever the server thinks of page sizes."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from cast import LIST, client_of, emulating
from wire import Request, Server, envelope, task

from kling_voice import (
    ApiError,
    ApiKey,
    BadRequestError,
    KlingVoiceClient,
    PolicyError,
    ResponseError,
    RetryPolicy,
)
from kling_voice.emulator import Fault, Faults
from kling_voice.protocol import PRESETS, VOICES


async def ids(kling: KlingVoiceClient, page_size: int = 100) -> list[str]:
    """Give the ids of all tasks that the list shows."""
    return [listed.task_id async for listed in kling.iter_tasks(page_size)]


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 25])
async def test_every_item_comes_once(count: int) -> None:
    """Across the pages, and the empty page after a full one is the end."""
    with emulating() as emulator:
        emulator.preload(count)
        async with client_of(emulator) as kling:
            found = await ids(kling, 10)

        assert len(found) == len(set(found)) == count
        assert emulator.requests[LIST] == -(-count // 10) + 1


@pytest.mark.parametrize(("cap", "sizes"), [(500, [1000, 500]), (100, [1000, 500, 100])])
async def test_a_server_that_refuses_large_pages_is_asked_for_smaller_ones(
    cap: int, sizes: list[int]
) -> None:
    """Only as small as needed, and from the first page on."""
    with emulating(page_cap=cap) as emulator:
        emulator.preload(cap + 1)
        async with client_of(emulator) as kling:
            found = await ids(kling, 1000)

        assert len(set(found)) == len(found) == cap + 1
        assert emulator.requests[LIST] == len(sizes) + 2
        assert emulator.refused[1201] == len(sizes) - 1


async def test_a_server_that_cuts_pages_quietly_is_read_to_the_end() -> None:
    """A page that is not full is not the last one."""
    with emulating(page_cap=30, page_clamp=True) as emulator:
        emulator.preload(100)
        async with client_of(emulator) as kling:
            assert len(set(await ids(kling, 1000))) == 100


async def test_faults_on_the_way_lose_no_page() -> None:
    """Reads are tried again."""
    faults = Faults(rate=0.3, kinds=[Fault.HTML_502, Fault.RESET_AFTER, Fault.TRUNCATED], seed=3)
    with emulating(faults=faults) as emulator:
        emulator.preload(200)
        async with client_of(emulator) as kling:
            assert len(set(await ids(kling, 10))) == 200
        assert faults.injected


async def test_items_that_move_to_the_next_page_are_given_once() -> None:
    """New tasks push the others down while the list is read."""
    with emulating() as emulator:
        emulator.preload(30)
        async with client_of(emulator) as kling:
            found = []
            async for listed in kling.iter_tasks(10):
                found.append(listed.task_id)
                if len(found) in (5, 15):
                    emulator.preload(3)

        assert len(found) == len(set(found)) == 30


def listing(answer: Callable[[int, int], Any]) -> Callable[[Request], bytes]:
    """Answer a list by the number and the size of the page."""

    def answers(request: Request) -> bytes:
        query = dict(pair.split("=") for pair in request.target.partition("?")[2].split("&"))
        told = answer(int(query["pageNum"]), int(query["pageSize"]))
        return told if isinstance(told, bytes) else envelope(told)

    return answers


KEY = ApiKey("a-key")
REFUSED = envelope(code=1201, message="pageSize is invalid", status=400)


@pytest.mark.parametrize(
    ("answer", "error", "asked"),
    [
        (lambda number, size: REFUSED, BadRequestError, [1000, 500, 100, 30]),
        (
            lambda number, size: [task()] if number == 1 else REFUSED,
            BadRequestError,
            [1000, 1000],
        ),
        (
            lambda number, size: envelope(code=1200, message="no", status=400),
            BadRequestError,
            [1000],
        ),
        (
            lambda number, size: envelope(code=1304, message="no", status=429),
            PolicyError,
            [1000],
        ),
        (lambda number, size: {"not": "a list"}, ResponseError, [1000]),
    ],
)
async def test_what_is_not_about_the_page_size_is_raised(
    answer: Callable[[int, int], Any], error: type[ApiError], asked: list[int]
) -> None:
    """A refusal of a later page, or of the smallest one, is an error like any other."""
    async with Server(listing(answer)) as server:
        async with KlingVoiceClient(
            credentials=KEY, base_url=server.base_url, retry=RetryPolicy(attempts=1)
        ) as kling:
            with pytest.raises(error):
                await ids(kling, 1000)

        sizes = [int(request.target.rpartition("=")[2]) for request in server.requests]
        assert sizes == asked


async def test_more_pages_than_the_vendor_numbers_are_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is no page 1001 to ask for."""

    def answers(request: Request) -> bytes:
        return envelope([task(f"t-{len(server.requests)}")])

    async with Server(answers) as server:
        with caplog.at_level(logging.WARNING):
            async with KlingVoiceClient(
                credentials=KEY, base_url=server.base_url, retry=RetryPolicy(attempts=1)
            ) as kling:
                assert len(await ids(kling, 1)) == 1000

        assert len(server.requests) == 1000
        assert "no more than 1000 pages" in caplog.text


async def test_presets_are_paged_alike() -> None:
    """By their own path."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            found = [listed.task_id async for listed in kling.iter_presets(2)]

        assert len(found) == len(set(found)) > 2
        assert emulator.requests[f"GET {PRESETS}"] == -(-len(found) // 2) + 1
        assert emulator.requests[f"GET {VOICES}"] == 0


async def test_nothing_is_read_further_than_it_is_looked_at() -> None:
    """Who stops after the first item has asked for one page."""
    with emulating() as emulator:
        emulator.preload(100)
        async with client_of(emulator) as kling:
            async for _ in kling.iter_tasks(10):
                break

        assert emulator.requests[LIST] == 1
