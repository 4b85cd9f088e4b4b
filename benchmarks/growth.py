"""The cost of a voice as the batch grows from 100 to 100,000."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from benchmarks.batches import Durations, requests
from benchmarks.harness import Figure, at_most, in_fresh_process
from benchmarks.servers import emulator_process
from kling_voice import ApiKey, KlingVoiceClient, PollingPolicy

LIMIT = 50
TASK_SECONDS = 0.1
INTERVAL = TASK_SECONDS / 4
SAMPLE = 2000  # voices at least, for one value: small batches are repeated


def run(*, quick: bool) -> list[Figure]:
    """Measure; some ten minutes, or half a minute when quick."""
    sizes, rounds = ((100, 1000, 5000), 1) if quick else ((100, 1000, 10_000, 100_000), 2)
    with emulator_process(
        concurrency_limit=LIMIT, task_seconds=Durations(TASK_SECONDS)
    ) as emulator:
        costs = in_fresh_process(_measure, emulator.base_url, emulator.api_key, sizes, rounds)
    spread = [max(one) / min(one) for one in zip(*costs.values(), strict=True)]
    growth = [last / first for first, last in zip(costs[sizes[0]], costs[sizes[-1]], strict=True)]
    return [
        Figure(
            "growth",
            f"CPU a voice, batch of {sizes[-1]:,} / of {sizes[0]:,}",
            growth,
            goal=at_most(1.15),
        ),
        Figure(
            "growth",
            "CPU a voice, the dearest size of batch / the cheapest",
            spread,
            goal=at_most(1.15),
        ),
        *(
            Figure("growth", f"CPU a voice, batch of {size:,}", values, "µs")
            for size, values in costs.items()
        ),
    ]


def _measure(
    base_url: str, api_key: str, sizes: tuple[int, ...], rounds: int
) -> dict[int, list[float]]:
    return asyncio.run(_costs(base_url, api_key, sizes, rounds))


async def _costs(
    base_url: str, api_key: str, sizes: tuple[int, ...], rounds: int
) -> dict[int, list[float]]:
    costs: dict[int, list[float]] = {size: [] for size in sizes}
    policy = PollingPolicy(initial=INTERVAL, multiplier=1.0, maximum=INTERVAL)
    async with KlingVoiceClient(ApiKey(api_key), base_url=base_url, polling=policy) as kling:
        await _clone(kling, SAMPLE)  # connections, and the account's limit
        for _ in range(rounds):
            for size, values in costs.items():
                batches = max(1, SAMPLE // size)
                before = time.process_time()
                for _ in range(batches):
                    await _clone(kling, size)
                spent = time.process_time() - before
                values.append(1e6 * spent / (batches * size))
    return costs


async def _clone(kling: KlingVoiceClient, voices: int) -> None:
    async with aclosing(kling.clone_voices(requests(voices))) as results:
        async for result in results:
            if result.error is not None:
                raise result.error
