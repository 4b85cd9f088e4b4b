"""What a user would write without an SDK: raw aiohttp, a dict for a task, a loop for a wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

VOICES = "/v1/general/custom-voices"
ENDED = ("succeed", "failed")


@asynccontextmanager
async def session_of(base_url: str, api_key: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session for a server; paths are relative to it."""
    async with aiohttp.ClientSession(
        base_url, headers={"Authorization": f"Bearer {api_key}"}
    ) as session:
        yield session


async def create(session: aiohttp.ClientSession, number: int) -> dict[str, Any]:
    """Create a voice; give the whole envelope."""
    body = {
        "voice_name": f"Voice {number}",
        "voice_url": f"https://example.com/{number}.mp3",
        "external_task_id": f"by-hand-{number}",
    }
    async with session.post(VOICES, json=body) as response:
        envelope: dict[str, Any] = await response.json()
        return envelope


async def wait(session: aiohttp.ClientSession, task_id: str, interval: float) -> None:
    """Poll one task until it has ended."""
    while True:
        await asyncio.sleep(interval)
        async with session.get(f"{VOICES}/{task_id}") as response:
            if (await response.json())["data"]["task_status"] in ENDED:
                return


async def page(session: aiohttp.ClientSession, size: int) -> list[dict[str, Any]]:
    """Read the first page of the list."""
    async with session.get(VOICES, params={"pageNum": 1, "pageSize": size}) as response:
        tasks: list[dict[str, Any]] = (await response.json())["data"]
        return tasks


async def clone_all(
    session: aiohttp.ClientSession, voices: int, *, guess: int, interval: float
) -> None:
    """Clone voices, at most *guess* at once; back off as the vendor asks when that was too many."""
    at_once = asyncio.Semaphore(guess)

    async def clone(number: int) -> None:
        async with at_once:
            pause = 1.0
            while (envelope := await create(session, number))["code"] == 1303:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 8.0)
            await wait(session, envelope["data"]["task_id"], interval)

    await asyncio.gather(*(clone(number) for number in range(voices)))
