"""A batch over several machines by Dask, which needs nothing from us but pieces that pickle."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from cast import assert_each_once, emulating, expected, names, requests

from kling_voice import CloneResult, KlingVoiceClient, VoiceRequest
from kling_voice.emulator import Emulator

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("default")  # Dask's own warnings are not ours to mend

# --- the lines of the README ---


def clone(part: list[VoiceRequest]) -> list[CloneResult]:
    """Clone a part of the batch; runs on a worker."""

    async def run() -> list[CloneResult]:
        async with KlingVoiceClient() as kling:
            results = kling.clone_voices(part, batch_id="spring-cast")
            return [result async for result in results]

    return asyncio.run(run())


def clone_everywhere(dask: Any, cast: list[VoiceRequest]) -> Iterator[CloneResult]:
    """Spread the batch over all workers; gives the results as the parts are done."""
    parts = [cast[n::12] for n in range(12)]
    for _, results in distributed.as_completed(dask.map(clone, parts), with_results=True):
        yield from results


# --- and what becomes of them ---


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """An account of eight slots, named by the environment that the workers inherit."""
    with emulating(concurrency_limit=8, task_seconds=0.4) as emulator:
        monkeypatch.setenv("KLING_BASE_URL", emulator.base_url)
        monkeypatch.setenv("KLING_ACCESS_KEY", emulator.credentials.access_key)
        monkeypatch.setenv("KLING_SECRET_KEY", emulator.credentials.secret_key)
        yield emulator


@pytest.fixture
def dask(emulator: Emulator) -> Iterator[Any]:
    """A real scheduler, and three worker processes."""
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_a_batch_is_spread_over_processes_one_of_which_is_killed(
    emulator: Emulator, dask: Any
) -> None:
    """Each voice is created once, within the one limit, and all results come back."""
    stream = clone_everywhere(dask, requests(36))
    pids = dask.run(os.getpid)
    results = [next(stream)]
    os.kill(next(iter(pids.values())), signal.SIGKILL)
    killed_at = emulator.created
    results += stream

    assert killed_at < 36
    assert names(results) == expected(36)
    assert_each_once(emulator, 36)
    assert emulator.max_in_flight <= 8
    assert set(dask.run(os.getpid).values()) - set(pids.values())
