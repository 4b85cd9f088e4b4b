"""What the SDK adds to one GET: `get_task` beside raw aiohttp and beside the peers' SDKs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import aiohttp
import openai
import runwayml
from replicate.client import Client as ReplicateClient

from benchmarks.answers import ID, TASK
from benchmarks.harness import Figure, Side, at_most, cpu_in_turn, ratios
from benchmarks.servers import answering_process
from kling_voice import ApiKey, KlingVoiceClient

PANEL = "What one GET costs; µs of CPU, the answer decoded"
KEY = "a-key-that-opens-nothing"

RUNWAY_TASK = {
    "id": ID,
    "status": "SUCCEEDED",
    "createdAt": "2026-11-21T12:00:00.000Z",
    "cost": {"credits": 5},
    "output": ["https://cdn.example.com/outputs/829877301929783311.mp4?sign=0"],
}
REPLICATE_PREDICTION = {
    "id": ID,
    "model": "example/voice",
    "version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
    "status": "succeeded",
    "input": {"text": "Ada"},
    "output": "https://cdn.example.com/outputs/829877301929783311.mp3?sign=0",
    "logs": "",
    "error": None,
    "metrics": {"predict_time": 8.3},
    "created_at": "2026-11-21T12:00:00.000Z",
    "started_at": "2026-11-21T12:00:01.000Z",
    "completed_at": "2026-11-21T12:00:09.000Z",
    "urls": {"get": f"https://api.example.com/v1/predictions/{ID}"},
}
OPENAI_BATCH = {
    "id": ID,
    "object": "batch",
    "endpoint": "/v1/responses",
    "input_file_id": "file-1",
    "output_file_id": "file-2",
    "completion_window": "24h",
    "status": "completed",
    "created_at": 1781080778,
    "completed_at": 1781080787,
    "request_counts": {"total": 1, "completed": 1, "failed": 0},
}
TASK_PATH = f"/v1/general/custom-voices/{ID}"
ANSWERS = {
    TASK_PATH: json.dumps(TASK).encode(),
    f"/v1/tasks/{ID}": json.dumps(RUNWAY_TASK).encode(),
    f"/v1/predictions/{ID}": json.dumps(REPLICATE_PREDICTION).encode(),
    f"/v1/batches/{ID}": json.dumps(OPENAI_BATCH).encode(),
}


def run(*, quick: bool) -> list[Figure]:
    """Measure; some 10 s, or two when quick."""
    calls, rounds = (150, 5) if quick else (500, 15)
    with answering_process(ANSWERS) as url:
        spent = asyncio.run(_measure(url, calls, rounds))
    micros = {name: [1e6 * seconds / calls for seconds in values] for name, values in spent.items()}
    ours = micros["kling_voice"]
    figures = [
        Figure(
            "overhead",
            "CPU of get_task / of raw aiohttp + json.loads",
            ratios(ours, micros["aiohttp"]),
            goal=at_most(1.25),
        )
    ]
    figures += [
        Figure(
            "overhead",
            f"CPU of get_task / of one GET by the {sdk} SDK",
            ratios(ours, micros[sdk]),
            goal=at_most(1 / 8),
        )
        for sdk in ("runwayml", "replicate", "openai")
    ]
    figures += [
        Figure("overhead", f"CPU of one GET: {name}", values, "µs", panel=PANEL, bar=name)
        for name, values in micros.items()
    ]
    return figures


async def _measure(url: str, calls: int, rounds: int) -> dict[str, list[float]]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        KlingVoiceClient(ApiKey(KEY), base_url=url) as kling,
        runwayml.AsyncRunwayML(api_key=KEY, base_url=url) as runway,
        openai.AsyncOpenAI(api_key=KEY, base_url=f"{url}/v1") as open_ai,
    ):
        replicate = ReplicateClient(api_token=KEY, base_url=url)

        async def raw() -> object:
            async with session.get(url + TASK_PATH) as response:
                return json.loads(await response.read())

        sides: dict[str, Callable[[], Awaitable[object]]] = {
            "aiohttp": raw,
            "kling_voice": lambda: kling.get_task(ID),
            "runwayml": lambda: runway.tasks.retrieve(ID),
            "replicate": lambda: replicate.predictions.async_get(ID),
            "openai": lambda: open_ai.batches.retrieve(ID),
        }
        return await cpu_in_turn(
            {name: _often(side, calls) for name, side in sides.items()}, rounds
        )


def _often(call: Callable[[], Awaitable[object]], times: int) -> Side:
    async def repeat() -> None:
        for _ in range(times):
            await call()

    return repeat
