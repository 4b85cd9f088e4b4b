"""Batches: how near the account's limit they run, beside an oracle and what a user would write."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing
from heapq import heapify, heapreplace

from attrs import frozen

from benchmarks import byhand
from benchmarks.harness import Figure, Goal, at_least, at_most
from benchmarks.servers import (
    SECRET,
    EmulatorProcess,
    counts,
    emulator_process,
    served_receiver,
)
from kling_voice import KlingVoiceClient, PollingPolicy, VoiceRequest

LOOKS = 20  # of a poll loop at each task, in the task's life
PANEL = "How near to the ideal a batch runs; 200 voices, 20 slots; 1 is the oracle"
SHOWN = "200 voices, 20 slots"
SIZES = ((40, 5), (200, 20), (400, 50))  # voices, and the account's limit


@frozen
class Durations:
    """The life of each task by the number of its create: the same in every run of a seed."""

    mean: float
    spread: float = 0.3
    seed: int = 0

    def __call__(self, number: int) -> float:
        draw = random.Random(f"{self.seed} {number}").uniform(-self.spread, self.spread)
        return self.mean * (1 + draw)


@frozen
class Size:
    """A batch to run.

    Attributes:
        voices: How many.
        limit: The account's tasks in flight.
        durations: How long each task takes.
    """

    voices: int
    limit: int
    durations: Durations

    @property
    def interval(self) -> float:
        """The seconds between two looks at a task."""
        return self.durations.mean / LOOKS

    def oracle(self) -> float:
        """The wall time of who knows the limit and sees every end at once."""
        slots = [0.0] * self.limit
        heapify(slots)
        for number in range(1, self.voices + 1):
            heapreplace(slots, slots[0] + self.durations(number))
        return max(slots)

    def __str__(self) -> str:
        return f"{self.voices} voices, {self.limit} slots"


@frozen
class Run:
    """How a batch went.

    Attributes:
        efficiency: The oracle's wall time divided by this one's.
        refusals: Creates refused with 1303, a voice.
        requests: Requests, a voice.
    """

    efficiency: float
    refusals: float
    requests: float


Contestant = Callable[[EmulatorProcess, Size], Awaitable[None]]


def requests(voices: int) -> Iterator[VoiceRequest]:
    """Make the requests of a batch."""
    for number in range(voices):
        yield VoiceRequest(f"Voice {number}", voice_url=f"https://example.com/{number}.mp3")


async def clone_all(kling: KlingVoiceClient, voices: int) -> None:
    """Clone voices with the client, as a user would."""
    done = 0
    async with aclosing(kling.clone_voices(requests(voices), batch_id="benchmark")) as results:
        async for result in results:
            if result.error is not None:
                raise result.error
            done += 1
    if done != voices:
        raise AssertionError(f"{done} results of {voices} voices")


# --- the contestants ---


async def polled(emulator: EmulatorProcess, size: Size) -> None:
    """The client, polling."""
    policy = PollingPolicy(initial=size.interval, multiplier=1.0, maximum=size.interval)
    async with emulator.client(polling=policy) as kling:
        await clone_all(kling, size.voices)


async def called_back(emulator: EmulatorProcess, size: Size) -> None:
    """The client, with callbacks; polling is there for what gets lost."""
    mean = size.durations.mean
    policy = PollingPolicy(initial=mean, multiplier=1.0, maximum=mean)
    async with (
        served_receiver() as receiver,
        emulator.client(polling=policy, callbacks=receiver) as kling,
    ):
        await clone_all(kling, size.voices)


async def guessed_right(emulator: EmulatorProcess, size: Size) -> None:
    """A semaphore of just the limit, and a poll loop."""
    async with byhand.session_of(emulator.base_url, emulator.api_key) as session:
        await byhand.clone_all(session, size.voices, guess=size.limit, interval=size.interval)


async def guessed_high(emulator: EmulatorProcess, size: Size) -> None:
    """A semaphore of twice the limit, and a poll loop."""
    async with byhand.session_of(emulator.base_url, emulator.api_key) as session:
        await byhand.clone_all(session, size.voices, guess=2 * size.limit, interval=size.interval)


async def guessed_low(emulator: EmulatorProcess, size: Size) -> None:
    """A semaphore of half the limit, and a poll loop."""
    async with byhand.session_of(emulator.base_url, emulator.api_key) as session:
        await byhand.clone_all(session, size.voices, guess=size.limit // 2, interval=size.interval)


CONTESTANTS: Mapping[str, Contestant] = {
    "kling_voice": polled,
    "kling_voice + callbacks": called_back,
    "loops, right guess": guessed_right,
    "loops, guess too high": guessed_high,
    "loops, guess too low": guessed_low,
}
_EFFICIENCY_GOALS: Mapping[str, Goal] = {
    "kling_voice": at_least(0.97),
    "kling_voice + callbacks": at_least(0.99),
}


def run(*, quick: bool) -> list[Figure]:
    """Measure; some ten minutes, or half a minute when quick."""
    mean, rounds = (0.8, 1) if quick else (4.0, 3)
    runs: dict[tuple[str, str], list[Run]] = {}
    for number in range(rounds):
        for name, contestant in CONTESTANTS.items():
            sizes = [Size(*size, Durations(mean, seed=number)) for size in SIZES]
            ended = asyncio.run(_run_side_by_side(contestant, sizes))
            for size, one in zip(sizes, ended, strict=True):
                runs.setdefault((name, str(size)), []).append(one)
    figures: list[Figure] = []
    for (name, account), some in runs.items():
        where = f"{account}: {name}"
        refusals = [one.refusals for one in some]
        figures.append(
            Figure(
                "batches",
                f"oracle's wall time / of {where}",
                [one.efficiency for one in some],
                goal=_EFFICIENCY_GOALS.get(name),
                panel=PANEL if account == SHOWN else None,
                bar=name,
            )
        )
        figures.append(
            Figure("batches", f"requests a voice, {where}", [one.requests for one in some], "")
        )
        if name in _EFFICIENCY_GOALS or any(refusals):
            goal = at_most(0.3) if name in _EFFICIENCY_GOALS else None
            figures.append(Figure("batches", f"refusals a voice, {where}", refusals, "", goal))
    return figures


async def _run_side_by_side(contestant: Contestant, sizes: list[Size]) -> list[Run]:
    """Run the batches of all sizes at the same time, each with an account of its own."""
    with ExitStack() as stack:
        emulators = [
            stack.enter_context(
                emulator_process(
                    concurrency_limit=size.limit,
                    task_seconds=size.durations,
                    webhook_secret=SECRET,
                )
            )
            for size in sizes
        ]
        return await asyncio.gather(
            *(
                _timed(contestant, emulator, size)
                for emulator, size in zip(emulators, sizes, strict=True)
            )
        )


async def _timed(contestant: Contestant, emulator: EmulatorProcess, size: Size) -> Run:
    started = time.monotonic()
    await contestant(emulator, size)
    seconds = time.monotonic() - started
    seen = emulator.ask(counts)
    assert seen.created == size.voices
    return Run(size.oracle() / seconds, seen.refused / size.voices, seen.requests / size.voices)
