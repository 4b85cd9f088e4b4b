"""Waiting: requests a wait, the delay to notice an end, memory and CPU of many waits."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable

import psutil
from attrs import frozen

from benchmarks import byhand
from benchmarks.harness import Figure, at_most, in_fresh_process, percentile, ratios
from benchmarks.servers import (
    SECRET,
    EmulatorProcess,
    counts,
    emulator_process,
    ends,
    served_receiver,
)
from kling_voice import ApiKey, KlingVoiceClient, PollingPolicy

TASK_SECONDS = 3.0
TICK = 0.25
PANEL = "Requests a wait; 1,000 tasks of 3 s, looked at every 0.25 s"
EVERY_TICK = PollingPolicy(initial=TICK, multiplier=1.0, maximum=TICK)
RARELY = PollingPolicy(initial=20.0, multiplier=1.0, maximum=20.0)

CreateAndWait = Callable[[int], Awaitable[str]]


@frozen
class Waits:
    """How a crowd of waits went.

    Attributes:
        gets_each: Queries and lists a wait.
        delay: The 95th percentile of the seconds from a task's end to the caller's return.
        server_share: How much of one core the server used.
    """

    gets_each: float
    delay: float
    server_share: float


def run(*, quick: bool) -> list[Figure]:
    """Measure; some two minutes, or half a minute when quick."""
    waits, rounds = (300, 1) if quick else (1000, 5)
    shared, naive, called = [], [], []
    for _ in range(rounds):
        shared.append(asyncio.run(_polled(waits)))
        naive.append(asyncio.run(_naive(waits)))
        called.append(asyncio.run(_called_back(waits)))
    crowd, crowd_rounds = (2000, 1) if quick else (10_000, 3)
    crowds = [_crowd(crowd) for _ in range(crowd_rounds)]
    gets = [one.gets_each for one in shared]
    naive_gets = [one.gets_each for one in naive]
    server = max(one.server_share for one in naive)
    return [
        Figure(
            "waiting",
            f"GETs a wait, {waits:,} tasks of 3 s polled every 0.25 s",
            gets,
            "",
            at_most(0.12),
            panel=PANEL,
            bar="kling_voice",
        ),
        Figure("waiting", "GETs a wait / of the naive loop", ratios(gets, naive_gets)),
        Figure(
            "waiting",
            "GETs a wait: the naive loop",
            naive_gets,
            "",
            panel=PANEL,
            bar="a loop for each",
        ),
        Figure(
            "waiting",
            "p95 of the delay from a task's end to the return",
            [one.delay / TICK for one in shared],
            "ticks",
            at_most(1.5),
        ),
        Figure(
            "waiting",
            "p95 of the delay: the naive loop",
            [one.delay / TICK for one in naive],
            "ticks",
            note=f"the server was at {server:.0%} of a core",
        ),
        Figure(
            "waiting",
            "p95 of the delay with callbacks, polling 20 s apart",
            [1e3 * one.delay for one in called],
            "ms",
            at_most(100),
            note=f"the server was at {max(one.server_share for one in called):.0%} of a core",
        ),
        Figure(
            "waiting",
            f"memory of each of {crowd:,} waits",
            [memory / 1024 for memory, _ in crowds],
            "KiB",
            at_most(8),
        ),
        Figure(
            "waiting",
            f"CPU of {crowd:,} waits at once, polled every 0.25 s",
            [cores for _, cores in crowds],
            "cores",
            at_most(1),
        ),
    ]


# --- delays and requests ---


async def _polled(waits: int) -> Waits:
    with emulator_process(task_seconds=TASK_SECONDS) as emulator:
        async with emulator.client(polling=EVERY_TICK) as kling:
            return await _measure(emulator, waits, _create_and_wait(kling))


async def _naive(waits: int) -> Waits:
    with emulator_process(task_seconds=TASK_SECONDS) as emulator:
        async with byhand.session_of(emulator.base_url, emulator.api_key) as session:

            async def create_and_wait(number: int) -> str:
                task_id: str = (await byhand.create(session, number))["data"]["task_id"]
                await byhand.wait(session, task_id, TICK)
                return task_id

            return await _measure(emulator, waits, create_and_wait)


async def _called_back(waits: int) -> Waits:
    with emulator_process(task_seconds=TASK_SECONDS, webhook_secret=SECRET) as emulator:
        async with (
            served_receiver() as receiver,
            emulator.client(polling=RARELY, callbacks=receiver) as kling,
        ):
            return await _measure(emulator, waits, _create_and_wait(kling))


def _create_and_wait(kling: KlingVoiceClient) -> CreateAndWait:
    async def create_and_wait(number: int) -> str:
        task = await kling.create_voice(
            f"Voice {number}", voice_url=f"https://example.com/{number}.mp3"
        )
        return (await kling.wait_for_task(task)).task_id

    return create_and_wait


async def _measure(emulator: EmulatorProcess, waits: int, create_and_wait: CreateAndWait) -> Waits:
    returned: dict[str, float] = {}

    async def one(number: int) -> None:
        task_id = await create_and_wait(number)
        returned[task_id] = time.monotonic()

    before, started = emulator.ask(counts), time.monotonic()
    await asyncio.gather(*(one(number) for number in range(waits)))
    seconds = time.monotonic() - started
    seen = emulator.ask(counts) - before
    ended = emulator.ask(ends)
    delays = [moment - ended[task_id] for task_id, moment in returned.items()]
    return Waits(seen.gets / waits, percentile(delays, 0.95), seen.cpu_seconds / seconds)


# --- memory and CPU ---


def _crowd(waits: int) -> tuple[float, float]:
    """Give the bytes of a wait, and the cores that all waits use."""
    with emulator_process(task_seconds=3600.0) as emulator:
        ids = asyncio.run(_create(emulator, waits))
        return in_fresh_process(_wait_in_crowd, emulator.base_url, emulator.api_key, ids)


async def _create(emulator: EmulatorProcess, tasks: int) -> list[str]:
    async with byhand.session_of(emulator.base_url, emulator.api_key) as session:
        envelopes = await asyncio.gather(
            *(byhand.create(session, number) for number in range(tasks))
        )
    return [envelope["data"]["task_id"] for envelope in envelopes]


def _wait_in_crowd(base_url: str, api_key: str, ids: list[str]) -> tuple[float, float]:
    return asyncio.run(_wait(base_url, api_key, ids))


async def _wait(base_url: str, api_key: str, ids: list[str]) -> tuple[float, float]:
    process = psutil.Process()
    async with KlingVoiceClient(ApiKey(api_key), base_url=base_url, polling=EVERY_TICK) as kling:
        for _ in range(3):
            await kling.list_tasks(1, 1000)  # what one page takes is not the waits' memory
        gc.collect()
        before = process.memory_info().rss
        waits = [asyncio.create_task(kling.wait_for_task(task_id)) for task_id in ids]
        await asyncio.sleep(20 * TICK)  # all have been looked at, and the first rush is over
        gc.collect()
        memory = process.memory_info().rss - before
        cores = await _cores(20 * TICK)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    return memory / len(ids), cores


async def _cores(seconds: float) -> float:
    started, before = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - before) / (time.monotonic() - started)
