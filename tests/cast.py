"""What the tests of cloning and of batches share: quick clients, requests, and a sample host."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kling_voice import CloneResult, KlingVoiceClient, PollingPolicy, RetryPolicy, VoiceRequest
from kling_voice import slots as slots_module
from kling_voice.emulator import Emulator, recordings, running

CREATE = "POST /v1/general/custom-voices"
LIST = "GET /v1/general/custom-voices"
QUERY = "GET /v1/general/custom-voices/{id}"
ADA = recordings()["ada.mp3"]


def emulating(**options: Any) -> AbstractContextManager[Emulator]:
    """Run an emulator of quick tasks on a thread of its own."""
    return running(Emulator(**{"task_seconds": 0.05, **options}))


def client_of(emulator: Emulator, **options: Any) -> KlingVoiceClient:
    """Make a client that is as quick as the emulator's tasks."""
    return KlingVoiceClient(
        **{
            "credentials": emulator.credentials,
            "base_url": emulator.base_url,
            "timeout": 5.0,
            "retry": RetryPolicy(attempts=8, initial=0.005, maximum=0.05, max_elapsed=20.0),
            "polling": PollingPolicy(initial=0.01, multiplier=1.0, maximum=0.01),
            **options,
        }
    )


def url(number: object) -> str:
    """Give the URL of a recording."""
    return f"https://example.com/{number}.mp3"


def requests(count: int, *, start: int = 0, **fields: Any) -> list[VoiceRequest]:
    """Make requests of different voices."""
    return [
        VoiceRequest(f"Voice {number}", voice_url=url(number), **fields)
        for number in range(start, start + count)
    ]


async def all_of(stream: Any) -> list[CloneResult]:
    """Take a batch's results to the end."""
    async with aclosing(stream) as results:
        return [result async for result in results]


def names(results: Iterable[CloneResult]) -> list[str]:
    """Give the names of the voices that were made, in order."""
    return sorted(result.voice.voice_name or "" for result in results if result.voice is not None)


def expected(count: int, *, start: int = 0) -> list[str]:
    """Give the names that the results of :func:`requests` have."""
    return sorted(request.voice_name for request in requests(count, start=start))


def assert_each_once(emulator: Emulator, count: int) -> None:
    """Check by the vendor's books that so many voices were created, and none twice."""
    made = Counter(task.voice_name for task in emulator.tasks if task.number)
    assert made == Counter(expected(count))
    assert emulator.created == count


@asynccontextmanager
async def nothing_left(kling: KlingVoiceClient) -> AsyncIterator[None]:
    """Check that what happens inside leaves no asyncio task, no complaint and no slot held."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before
    assert not left, left
    gc.collect()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before == set()
    assert complaints == []
    assert kling.slots.in_flight == 0


async def until(condition: Callable[[], object]) -> None:
    """Wait for what other tasks bring about."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("It has not come about.")


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoffs that are as quick as the emulator's tasks."""
    monkeypatch.setattr(slots_module, "_FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(slots_module, "_LONGEST_BACKOFF", 0.05)
    monkeypatch.setattr(slots_module, "_LONGEST_SLOWDOWN", 0.1)
    monkeypatch.setattr(slots_module, "_LEFT_PIECE", 0.06)


class Shelf:
    """A sample host that remembers what it was asked for.

    Attributes:
        events: ``("publish" | "discard", name or URL)``, in order.
        shown: The URLs that can be fetched.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.shown: set[str] = set()

    async def publish(self, path: Path, name: str) -> str:
        """Note it."""
        await asyncio.sleep(0)
        link = f"https://shelf.example/{name}{path.suffix}"
        self.events.append(("publish", name))
        self.shown.add(link)
        return link

    async def discard(self, url: str) -> None:
        """Note it."""
        await asyncio.sleep(0)
        self.events.append(("discard", url))
        self.shown.discard(url)

    @property
    def published(self) -> list[str]:
        """The names that were published."""
        return [what for event, what in self.events if event == "publish"]

    @property
    def discarded(self) -> list[str]:
        """The URLs that were discarded."""
        return [what for event, what in self.events if event == "discard"]
