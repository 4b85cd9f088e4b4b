"""An emulator on a thread of its own, for tests that run any event loop or none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kling_voice.emulator.server import Emulator

__all__ = ["running"]


@contextmanager
def running(emulator: Emulator) -> Iterator[Emulator]:
    """Run an emulator on a thread of its own, with its own event loop.

    What an emulator offers may be used from any thread, so the emulator itself is what it gives:

        with running(Emulator(task_seconds=0.2)) as emulator:
            ...
    """
    started = threading.Event()
    failures: list[BaseException] = []
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with emulator:
            stops.append((asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as failure:
            failures.append(failure)
        finally:
            started.set()

    thread = threading.Thread(target=run, name="kling-emulator", daemon=True)
    thread.start()
    started.wait()
    try:
        if not failures:
            yield emulator
    finally:
        for loop, stop in stops:
            loop.call_soon_threadsafe(stop.set)
        thread.join()
    for failure in failures:
        raise failure
