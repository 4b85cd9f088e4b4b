"""Long streams of voices: speed beside raw aiohttp by hand, and memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from statistics import mean

import psutil
from attrs import frozen

from benchmarks import byhand
from benchmarks.batches import Durations, requests
from benchmarks.harness import Figure, at_least, at_most, in_fresh_process, ratios
from benchmarks.servers import counts, emulator_process
from kling_voice import ApiKey, KlingVoiceClient, PollingPolicy

LIMIT = 300
TASK_SECONDS = 0.2  # so short that neither the slots nor the tasks hold anyone up
INTERVAL = TASK_SECONDS / 4
STRETCHES = 5  # of a stream, each looked at by itself; the first one is the start

Stream = Callable[[str, str, int], AsyncIterator[None]]


@frozen
class Flow:
    """How a stream went in one process, stretch by stretch.

    Attributes:
        voices: How many a stretch had.
        seconds: The wall time of each stretch.
        cpu_seconds: The CPU time of each stretch.
        memory: The bytes that the process held after each stretch.
    """

    voices: int
    seconds: list[float]
    cpu_seconds: list[float]
    memory: list[int]

    @property
    def per_second(self) -> float:
        """Voices a second, after the start."""
        return self.voices / mean(self.seconds[1:])

    @property
    def per_cpu_second(self) -> float:
        """Voices a CPU second, after the start."""
        return self.voices / mean(self.cpu_seconds[1:])

    @property
    def evenness(self) -> float:
        """The rate of the slowest stretch after the start, divided by the fastest one's."""
        return min(self.seconds[1:]) / max(self.seconds[1:])

    @property
    def growth(self) -> int:
        """The bytes that the process gained after the start."""
        return max(self.memory[1:]) - self.memory[0]


def run(*, quick: bool) -> list[Figure]:
    """Measure; some three minutes, or a quarter of a minute when quick."""
    voices, rounds = (4000, 1) if quick else (20_000, 3)
    ours: list[Flow] = []
    hand: list[Flow] = []
    share = 0.0
    for _ in range(rounds):
        for stream, flows in ((_by_hand, hand), (_by_client, ours)):
            with emulator_process(
                concurrency_limit=LIMIT, task_seconds=Durations(TASK_SECONDS)
            ) as emulator:
                before = emulator.ask(counts).cpu_seconds
                flow = in_fresh_process(
                    _measure, stream, emulator.base_url, emulator.api_key, voices
                )
                flows.append(flow)
                used = emulator.ask(counts).cpu_seconds - before
                share = max(share, used / sum(flow.seconds))
    note = f"the server was at {share:.0%} of a core"
    speed = [flow.per_second for flow in ours]
    hand_speed = [flow.per_second for flow in hand]
    thrift = [flow.per_cpu_second for flow in ours]
    hand_thrift = [flow.per_cpu_second for flow in hand]
    total = f"{voices:,} voices"
    return [
        Figure(
            "streams",
            "voices a CPU second / by hand with raw aiohttp",
            ratios(thrift, hand_thrift),
            goal=at_least(0.6),
        ),
        Figure(
            "streams",
            "voices a second / by hand with raw aiohttp",
            ratios(speed, hand_speed),
            goal=at_least(0.6),
            note=note,
        ),
        Figure("streams", f"voices a second, {total}", speed, "/s", note=note),
        Figure("streams", f"voices a second, {total}: by hand", hand_speed, "/s", note=note),
        Figure("streams", f"CPU a voice, {total}", [1e6 / one for one in thrift], "µs"),
        Figure(
            "streams", f"CPU a voice, {total}: by hand", [1e6 / one for one in hand_thrift], "µs"
        ),
        Figure(
            "streams",
            f"memory gained after the first fifth of {total}",
            [flow.growth / 2**20 for flow in ours],
            "MiB",
            at_most(25),
        ),
        Figure(
            "streams",
            f"rate of the slowest fifth of {total} / of the fastest",
            [flow.evenness for flow in ours],
            goal=at_least(0.85),
        ),
    ]


def _measure(stream: Stream, base_url: str, api_key: str, voices: int) -> Flow:
    return asyncio.run(_flow(stream(base_url, api_key, voices), voices))


async def _flow(stream: AsyncIterator[None], voices: int) -> Flow:
    stretch = voices // STRETCHES
    flow = Flow(stretch, [], [], [])
    process = psutil.Process()
    done = 0
    moment, cpu = time.monotonic(), time.process_time()
    async for _ in stream:
        done += 1
        if done % stretch == 0:
            flow.seconds.append(time.monotonic() - moment)
            flow.cpu_seconds.append(time.process_time() - cpu)
            flow.memory.append(process.memory_info().rss)
            moment, cpu = time.monotonic(), time.process_time()
    if done != voices:
        raise AssertionError(f"{done} results of {voices} voices")
    return flow


async def _by_client(base_url: str, api_key: str, voices: int) -> AsyncIterator[None]:
    policy = PollingPolicy(initial=INTERVAL, multiplier=1.0, maximum=INTERVAL)
    async with (
        KlingVoiceClient(ApiKey(api_key), base_url=base_url, polling=policy) as kling,
        aclosing(kling.clone_voices(requests(voices), batch_id="benchmark")) as results,
    ):
        async for result in results:
            if result.error is not None:
                raise result.error
            yield


async def _by_hand(base_url: str, api_key: str, voices: int) -> AsyncIterator[None]:
    """The same requests: a create a voice, and a list page whenever the client would read one."""
    async with byhand.session_of(base_url, api_key) as session:
        waiting: dict[str, asyncio.Future[None]] = {}
        numbers = iter(range(voices))
        results: asyncio.Queue[None] = asyncio.Queue()

        async def clone() -> None:
            for number in numbers:
                task_id = (await byhand.create(session, number))["data"]["task_id"]
                waiting[task_id] = asyncio.get_running_loop().create_future()
                await waiting[task_id]
                results.put_nowait(None)

        async def look() -> None:
            page_size = 30
            clock = asyncio.get_running_loop().time
            tick = clock()
            while True:
                tick = max(tick + INTERVAL, clock())
                await asyncio.sleep(tick - clock())
                oldest = next(iter(waiting), None)
                shown = await byhand.page(session, page_size)
                if oldest is not None and all(task["task_id"] != oldest for task in shown):
                    page_size = min(1000, 3 * page_size // 2)
                for task in shown:
                    if task["task_status"] in byhand.ENDED and task["task_id"] in waiting:
                        waiting.pop(task["task_id"]).set_result(None)

        async with asyncio.TaskGroup() as group:
            looking = group.create_task(look())
            cloning = [group.create_task(clone()) for _ in range(LIMIT)]
            for _ in range(voices):
                await results.get()
                yield
            await asyncio.gather(*cloning)
            looking.cancel()
