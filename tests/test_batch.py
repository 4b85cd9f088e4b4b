"""Batches: every voice once, resumable from nothing, streamed, and nothing left behind."""

import asyncio
import contextlib
import gc
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cast import (
    ADA,
    LIST,
    QUERY,
    Shelf,
    all_of,
    assert_each_once,
    client_of,
    emulating,
    expected,
    names,
    nothing_left,
    requests,
    until,
    url,
)
from cast import brisk as brisk

from kling_voice import (
    AccountError,
    AuthenticationError,
    BadRequestError,
    CallbackReceiver,
    ClientClosedError,
    CloneResult,
    ConfigurationError,
    InvalidRequestError,
    KlingError,
    KlingVoiceClient,
    PermissionDeniedError,
    PolicyError,
    PollingPolicy,
    RetryPolicy,
    SampleError,
    ServerError,
    TaskFailedError,
    VoiceRequest,
    VoiceTask,
    WaitTimeoutError,
)
from kling_voice import batch as batch_module
from kling_voice.emulator import ALL, Emulator, Fault, Faults
from kling_voice.identity import batch_prefix, default_key, derived_id

HOURLY = PollingPolicy(initial=3600.0, maximum=3600.0)
PATIENT = RetryPolicy(attempts=30, initial=0.002, maximum=0.02, max_elapsed=60.0)


@asynccontextmanager
async def served(secret: str) -> AsyncIterator[CallbackReceiver]:
    """Serve a receiver of callbacks."""
    app = web.Application()
    runner = web.AppRunner(app, access_log=None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        receiver = CallbackReceiver(secret, public_url=f"http://127.0.0.1:{port}/kling")
        app.router.add_post("/kling", receiver.aiohttp_handler)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        try:
            yield receiver
        finally:
            await runner.cleanup()


# --- every voice, once ---


async def test_each_request_has_its_result() -> None:
    """With the request itself, the task, and the voice; nothing is created twice."""
    asked = requests(25)
    with emulating(concurrency_limit=5) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            results = await all_of(kling.clone_voices(asked))

        assert_each_once(emulator, 25)
    assert sorted(id(result.request) for result in results) == sorted(map(id, asked))
    for result in results:
        assert result.error is None
        assert result.task is not None
        assert result.task.voice == result.voice
        assert result.voice is not None
        assert result.voice.voice_name == result.request.voice_name


async def test_an_empty_batch_has_no_results() -> None:
    """And creates nothing."""
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            assert await all_of(kling.clone_voices([])) == []
            assert await all_of(kling.clone_voices([], batch_id="empty")) == []

        assert emulator.created == 0


async def test_a_batch_that_is_never_begun_does_nothing() -> None:
    """Not even a request is taken from the source."""
    source = iter(requests(3))
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            stream = kling.clone_voices(source)
            await stream.aclose()

        assert not emulator.requests
    assert len(list(source)) == 3


@pytest.mark.parametrize("seed", range(3))
async def test_faults_on_a_fifth_of_all_requests_lose_and_double_nothing(
    seed: int, brisk: None
) -> None:
    """Faults of all kinds on all calls, stalled connections and refused tokens included."""
    now_and_then = dict.fromkeys(range(5, 500, 40), Fault.TOKEN_REFUSED)  # twice is for good
    faults = Faults(
        0.2,
        kinds=[kind for kind in ALL if kind is not Fault.TOKEN_REFUSED],
        script={"create": now_and_then, "list": now_and_then},
        seed=seed,
        delay_seconds=0.02,
        retry_after=0,
    )
    with emulating(concurrency_limit=10, faults=faults) as emulator:
        async with (
            client_of(emulator, retry=PATIENT, timeout=0.25) as kling,
            nothing_left(kling),
        ):
            results = await all_of(kling.clone_voices(requests(80), batch_id="faults"))

        assert names(results) == expected(80)
        assert_each_once(emulator, 80)
        assert sum(faults.injected.values()) > 25


async def test_read_lag_neither_loses_nor_doubles_anything() -> None:
    """A task that reads do not show yet exists all the same."""
    faults = Faults(0.3, kinds=[Fault.RESET_AFTER, Fault.ERROR_500_AFTER], calls=["create"])
    with emulating(read_lag=0.05, faults=faults) as emulator:
        async with client_of(emulator, retry=PATIENT) as kling:
            results = await all_of(kling.clone_voices(requests(20), batch_id="lag"))

        assert names(results) == expected(20)
        assert_each_once(emulator, 20)


async def test_a_batch_is_driven_by_callbacks() -> None:
    """With a poll in an hour, the ends come by callback alone, and refill the slots."""
    secret = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
    with emulating(concurrency_limit=5, webhook_secret=secret) as emulator:
        async with (
            served(secret) as receiver,
            client_of(emulator, callbacks=receiver, polling=HOURLY) as kling,
            asyncio.timeout(30),
        ):
            results = await all_of(kling.clone_voices(requests(30)))

        assert names(results) == expected(30)
        assert emulator.requests[QUERY] + emulator.requests[LIST] == 0


async def test_the_limit_is_kept_and_few_creates_are_refused() -> None:
    """No more are in flight than the account allows, and fewer are refused than made."""
    with emulating(concurrency_limit=5, task_seconds=0.35) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            await all_of(kling.clone_voices(requests(60)))
            assert kling.slots.limit is not None

        assert emulator.max_in_flight == 5
        assert emulator.refused[1303] < 60  # the figure is test_slots.py's, whose clock is driven


async def test_a_batch_uses_what_another_process_leaves() -> None:
    """Slots that somebody else holds and gives up in the middle are found."""
    with emulating(concurrency_limit=10, task_seconds=0.08) as emulator:
        emulator.occupied = 8
        async with client_of(emulator) as kling:
            seen = 0
            async with aclosing(kling.clone_voices(requests(150))) as results:
                async for _ in results:
                    seen += 1
                    if seen == 15:
                        assert emulator.max_in_flight == 2
                        emulator.occupied = 0
                    elif seen == 110:
                        emulator.occupied = 8

        assert emulator.max_in_flight == 10
        assert_each_once(emulator, 150)


async def test_two_clients_share_an_account() -> None:
    """The second comes in the middle; both get all their voices, and the limit is kept."""
    with emulating(concurrency_limit=6, task_seconds=0.1) as emulator:
        async with client_of(emulator) as first, client_of(emulator) as second:
            one = asyncio.create_task(all_of(first.clone_voices(requests(80))))
            await until(lambda: emulator.created >= 10)
            two = asyncio.create_task(all_of(second.clone_voices(requests(30, start=80))))
            assert names(await one) == expected(80)
            assert names(await two) == expected(30, start=80)

        assert_each_once(emulator, 110)
        assert emulator.max_in_flight == 6


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_concurrency_caps_one_batch(concurrency: int) -> None:
    """And no other one of the same client."""
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            await all_of(kling.clone_voices(requests(9), concurrency=concurrency))
            assert emulator.max_in_flight == concurrency
            await asyncio.gather(
                all_of(kling.clone_voices(requests(6), concurrency=concurrency)),
                all_of(kling.clone_voices(requests(40), concurrency=20)),
            )

        assert emulator.max_in_flight > concurrency


async def test_a_task_that_outlasts_its_wait_counts_for_the_cap() -> None:
    """For as long as its slot is held: the cap is on tasks in flight, not on waits."""
    with emulating(task_seconds=0.3) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            results = await all_of(kling.clone_voices(requests(4), concurrency=1, timeout=0.2))

        assert emulator.max_in_flight == 1
    assert all(isinstance(result.error, WaitTimeoutError) for result in results)


async def test_leaving_gives_up_the_slots_of_tasks_that_outlast_their_waits() -> None:
    """No asyncio task stays behind for them."""
    with emulating(time_scale=0.0) as emulator:
        async with (
            client_of(emulator) as kling,
            nothing_left(kling),
            aclosing(kling.clone_voices(requests(3), timeout=0.2)) as results,
        ):
            result = await anext(results)
            assert isinstance(result.error, WaitTimeoutError)
            assert result.task is not None
            assert kling.slots.in_flight == 3


# --- resumed from nothing ---


async def test_a_finished_batch_run_again_costs_a_handful_of_list_requests() -> None:
    """And gives the same voices."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            first = await all_of(kling.clone_voices(requests(40), batch_id="cast"))
        await asyncio.sleep(0.05)  # a last look of the first client may still be on its way
        before = Counter(emulator.requests)
        async with client_of(emulator) as kling, nothing_left(kling):
            second = await all_of(kling.clone_voices(requests(40), batch_id="cast"))

        assert emulator.requests - before == {LIST: 2}
        assert_each_once(emulator, 40)

    def voices(results: list[CloneResult]) -> dict[str, Any]:
        return {result.request.voice_name: result.voice for result in results}

    assert voices(first) == voices(second)


async def test_ids_are_derived_from_the_batch_and_the_key() -> None:
    """The default key is the name and the source; an explicit key and an explicit id win."""
    asked = [
        VoiceRequest("Ada", voice_url=url(1)),
        VoiceRequest("Bob", voice_url=url(1), key="bob"),
        VoiceRequest("Cyd", video_id="871", external_task_id="mine", key="unused"),
    ]
    with emulating() as emulator:
        emulator.add_video("871")
        async with client_of(emulator) as kling:
            await all_of(kling.clone_voices(asked, batch_id="cast"))

        ids = {task.voice_name: task.external_task_id for task in emulator.tasks}
    assert ids == {
        "Ada": derived_id("cast", default_key(asked[0])),
        "Bob": derived_id("cast", "bob"),
        "Cyd": "mine",
    }


async def test_a_key_makes_urls_that_rotate_the_same_request() -> None:
    """Without one, another URL is another voice."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            for key, day, created in (("ada", 1, 1), ("ada", 2, 1), (None, 1, 2), (None, 2, 3)):
                link = f"https://example.com/ada.mp3?signature={day}"
                rotating = [VoiceRequest("Ada", voice_url=link, key=key)]
                (result,) = await all_of(kling.clone_voices(rotating, batch_id="cast"))
                assert result.voice is not None
                assert emulator.created == created


async def test_another_batch_creates_voices_of_its_own() -> None:
    """The same requests under another batch id are other voices, and random without one."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            for batch_id in ("one", "two", None, None):
                await all_of(kling.clone_voices(requests(3), batch_id=batch_id))

        assert emulator.created == 12


async def test_a_run_that_was_left_in_the_middle_is_finished_by_the_next() -> None:
    """What was in flight is waited for; what is done is not asked for again."""
    with emulating(concurrency_limit=4) as emulator:
        for stop in (3, 10, 17):
            async with (
                client_of(emulator) as kling,
                nothing_left(kling),
                aclosing(kling.clone_voices(requests(30), batch_id="c")) as results,
            ):
                async for number, _ in enumerated(results):
                    if number == stop:
                        break
        async with client_of(emulator) as kling:
            assert names(await all_of(kling.clone_voices(requests(30), batch_id="c"))) == expected(
                30
            )

        assert_each_once(emulator, 30)


async def test_tasks_found_in_flight_hold_slots_and_leave_the_others_usable() -> None:
    """Resuming with eight of ten slots taken by the earlier run, two more go at once."""
    with emulating(concurrency_limit=10, time_scale=0.0) as emulator:
        async with client_of(emulator) as kling:
            stream = kling.clone_voices(requests(8), batch_id="cast")
            first = asyncio.create_task(all_of(stream))
            await until(lambda: emulator.created == 8)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        async with client_of(emulator) as kling:
            second = asyncio.create_task(all_of(kling.clone_voices(requests(30), batch_id="cast")))
            await until(lambda: emulator.created == 10)
            await until(lambda: kling.slots.limit == 10)
            assert kling.slots.in_flight == 10
            emulator.advance(20)
            await until(lambda: emulator.created == 20)
            emulator.advance(20)
            await until(lambda: emulator.created == 30)
            emulator.advance(20)
            assert names(await second) == expected(30)

        assert_each_once(emulator, 30)


async def test_the_same_batch_twice_at_once_in_one_client() -> None:
    """Both get all results, of the same voices."""
    with emulating(concurrency_limit=5) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            one, two = await asyncio.gather(
                *(all_of(kling.clone_voices(requests(25), batch_id="cast")) for _ in range(2))
            )

        assert names(one) == names(two) == expected(25)
        assert_each_once(emulator, 25)


def ids(results: list[CloneResult]) -> list[str]:
    """Give the ids of the voices of results."""
    return sorted(result.voice.voice_id for result in results if result.voice is not None)


async def all_lists_fail(emulator: Emulator) -> None:
    """Let no list be read."""
    emulator.faults = Faults(1.0, kinds=[Fault.HTML_502], calls=["list"])


async def no_list(emulator: Emulator) -> None:
    """Let the server refuse the call altogether."""
    emulator.faults = Faults(1.0, kinds=[1202], calls=["list"])


async def thousands_of_others(emulator: Emulator) -> None:
    """Put more foreign tasks in front of the batch's than are read."""
    emulator.preload(4000)


@pytest.mark.parametrize(
    ("obstacle", "order"),
    [
        (all_lists_fail, "newest"),
        (no_list, "newest"),
        (thousands_of_others, "newest"),
        (thousands_of_others, "oldest"),
        (thousands_of_others, "shuffled"),
    ],
)
async def test_a_batch_needs_no_list(obstacle: Any, order: str) -> None:
    """What the list does not show is refused as a duplicate, and adopted."""
    with emulating(list_order=order) as emulator:
        if order != "newest":
            await obstacle(emulator)
        async with client_of(emulator) as kling:
            first = await all_of(kling.clone_voices(requests(12), batch_id="cast"))
            if order == "newest":
                await obstacle(emulator)
            second = await all_of(kling.clone_voices(requests(15), batch_id="cast"))

        assert set(ids(first)) < set(ids(second))
        assert names(second) == expected(15)
        assert_each_once(emulator, 15)


async def test_the_scan_of_the_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it reads in all, and by what it reads in vain."""
    monkeypatch.setattr(batch_module, "_SCAN_PAGE", 10)
    monkeypatch.setattr(batch_module, "_SCAN_BLANK_ITEMS", 30)
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            await all_of(kling.clone_voices(requests(40), batch_id="cast"))
            for bound, pages in (("_SCAN_ITEMS", 2), ("_SCAN_REQUESTS", 2), ("", 5)):
                with monkeypatch.context() as bounded:
                    if bound:
                        name = bound.replace("_SCAN_ITEMS", "SCAN_ITEMS")
                        bounded.setattr(batch_module, name, 20 if "ITEMS" in bound else 2)
                    before = emulator.requests[LIST]
                    stream = kling.clone_voices(requests(1), batch_id="cast")
                    assert names(await all_of(stream)) == expected(1)
                    assert emulator.requests[LIST] - before == pages
            emulator.preload(100)
            before = emulator.requests[LIST]
            await all_of(kling.clone_voices(requests(1), batch_id="cast"))
            assert emulator.requests[LIST] - before == 3

        assert_each_once(emulator, 40)


async def test_explicit_ids_are_found_in_the_list_as_well() -> None:
    """A finished batch of them run again costs no more than another."""
    asked = [VoiceRequest("Ada", voice_url=url(n), external_task_id=f"row-{n}") for n in range(10)]
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            first = await all_of(kling.clone_voices(asked, batch_id="cast"))
            before = Counter(emulator.requests)
            second = await all_of(kling.clone_voices(asked, batch_id="cast"))

        assert emulator.requests - before == {LIST: 2}
        assert ids(first) == ids(second)


async def test_an_id_that_something_else_holds_is_that_requests_own_error() -> None:
    """A video, or a voice of another name."""
    with emulating() as emulator:
        emulator.reserve_external_id("a-video")
        async with client_of(emulator) as kling:
            await kling.clone_voice("Bob", voice_url=url(0), external_task_id="bobs")
            asked = [
                VoiceRequest("Ada", voice_url=url(1), external_task_id="a-video"),
                VoiceRequest("Ada", voice_url=url(2), external_task_id="bobs"),
                VoiceRequest("Ada", voice_url=url(3)),
            ]
            results = await all_of(kling.clone_voices(asked, batch_id="cast"))

    errors = {result.request.external_task_id: result.error for result in results}
    assert isinstance(errors["a-video"], BadRequestError)
    assert isinstance(errors["bobs"], BadRequestError)
    assert errors[None] is None


async def test_a_success_that_the_list_shows_without_its_voice_is_asked_for() -> None:
    """The list may lag; the task itself is the last word."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            await all_of(kling.clone_voices(requests(1), batch_id="cast"))
            batch = batch_of(kling, requests(1))
            (task,) = emulator.tasks
            bare = {
                "task_id": task.task_id,
                "task_status": "succeed",
                "task_info": {"external_task_id": task.external_task_id},
            }
            assert batch._keep([bare], batch_prefix("cast"))
            assert batch._known(task.external_task_id, requests(1)[0]) is None
            broken = {**bare, "task_status": 7}
            assert batch._keep([broken, None, {}, {"task_info": 1}], batch_prefix("cast"))
            assert batch._known(task.external_task_id, requests(1)[0]) is None


def batch_of(kling: KlingVoiceClient, source: Any) -> batch_module.Batch:
    """Make a batch without running it."""
    return batch_module.Batch(
        kling._transport,
        kling._cloner,
        source,
        batch_id="cast",
        concurrency=None,
        retry_failed=0,
        timeout=None,
        on_update=None,
    )


SCRIPT = """
import asyncio, json, sys
from contextlib import aclosing
from kling_voice import AccessKey, KlingVoiceClient, PollingPolicy, VoiceRequest

async def main(base_url, key, secret, count):
    requests = [
        VoiceRequest(f"Voice {n}", voice_url=f"https://example.com/{n}.mp3") for n in range(count)
    ]
    polling = PollingPolicy(initial=0.02, multiplier=1.0, maximum=0.02)
    keys = AccessKey(key, secret)
    async with KlingVoiceClient(keys, base_url=base_url, polling=polling) as kling:
        async with aclosing(kling.clone_voices(requests, batch_id="killed")) as results:
            async for result in results:
                print(json.dumps([result.request.voice_name, result.voice.voice_id]), flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""


def run_of(emulator: Emulator, count: int) -> subprocess.Popen[str]:
    """Start a process that clones the voices of a batch and prints each result."""
    keys = emulator.credentials
    return subprocess.Popen(
        [
            *(sys.executable, "-c", SCRIPT, emulator.base_url),
            *(keys.access_key, keys.secret_key, str(count)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def voices_of(process: subprocess.Popen[str]) -> dict[str, str]:
    """Give the voices that a process has printed, when it has ended."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return dict(json.loads(line) for line in output.splitlines())


def test_a_run_that_is_killed_five_times_creates_each_voice_once() -> None:
    """SIGKILL at any moment, a real process; the last run gives all results."""
    with emulating(concurrency_limit=6, task_seconds=0.2) as emulator:
        for number in range(1, 6):
            process = run_of(emulator, 60)
            deadline = time.monotonic() + 30
            while emulator.created < 9 * number and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert process.stdout is not None
            process.stdout.close()
            assert 9 * number <= emulator.created < 60
        voices = voices_of(run_of(emulator, 60))

        assert sorted(voices) == expected(60)
        assert_each_once(emulator, 60)
        assert sorted(voices.values()) == sorted(task.voice_id for task in emulator.tasks)


def test_three_processes_work_on_one_batch() -> None:
    """Each gets all results, of the same voices; together they create each once."""
    with emulating(concurrency_limit=6, task_seconds=0.2) as emulator:
        processes = [run_of(emulator, 40) for _ in range(3)]
        first, second, third = [voices_of(process) for process in processes]

        assert first == second == third
        assert sorted(first) == expected(40)
        assert_each_once(emulator, 40)


# --- keys, failures, invalid requests ---


async def test_a_repeated_key_is_that_requests_own_error() -> None:
    """The first one is cloned; which field is at fault is told."""
    asked = [
        VoiceRequest("Ada", voice_url=url(1)),
        VoiceRequest("Ada", voice_url=url(1)),
        VoiceRequest("Bob", voice_url=url(2), key="k"),
        VoiceRequest("Cyd", voice_url=url(3), key="k"),
        VoiceRequest("Dan", voice_url=url(4), external_task_id="x"),
        VoiceRequest("Eve", voice_url=url(5), external_task_id="x"),
    ]
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            results = await all_of(kling.clone_voices(asked, batch_id="cast"))

        assert sorted(task.voice_name for task in emulator.tasks) == ["Ada", "Bob", "Dan"]
    repeated = [result for result in results if result.voice is None]
    fields = Counter(
        result.error.field for result in repeated if isinstance(result.error, InvalidRequestError)
    )
    assert fields == {"key": 2, "external_task_id": 1}
    assert {result.request.voice_name for result in repeated} == {"Ada", "Cyd", "Eve"}


async def test_without_a_batch_id_an_external_id_may_come_twice() -> None:
    """It is nobody's mistake there: both requests get the one voice that bears it."""
    asked = [VoiceRequest("Ada", voice_url=url(0), external_task_id="mine") for _ in range(2)]
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            first, second = await all_of(kling.clone_voices(asked))

        assert emulator.created == 1
    assert first.voice is not None
    assert first.voice == second.voice


async def test_without_a_batch_id_equal_requests_are_different_voices() -> None:
    """There is no key to repeat."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            await all_of(kling.clone_voices([VoiceRequest("Ada", voice_url=url(1))] * 3))

        assert emulator.created == 3


async def test_a_failed_task_is_reported_and_not_tried_again() -> None:
    """Nor by the next run: the same request has failed."""
    with emulating(fail_when=lambda body: "two voices in it") as emulator:
        async with client_of(emulator) as kling:
            for _ in range(2):
                (result,) = await all_of(kling.clone_voices(requests(1), batch_id="cast"))
                assert isinstance(result.error, TaskFailedError)
                assert "two voices in it" in str(result.error)
                assert result.task is not None
                assert result.task.failed
                assert result.error.task == result.task

        assert emulator.created == 1


class FailsAtFirst:
    """Lets each voice fail so many times."""

    def __init__(self, times: int) -> None:
        self._times = times
        self._seen: Counter[str] = Counter()

    def __call__(self, body: Any) -> str | None:
        self._seen[body["voice_name"]] += 1
        return "bad luck" if self._seen[body["voice_name"]] <= self._times else None


@pytest.mark.parametrize("batch_id", ["cast", None])
@pytest.mark.parametrize(("times", "made"), [(0, 1), (1, 2), (2, 3), (3, 3)])
async def test_failed_tasks_are_tried_again_under_ids_of_their_own(
    times: int, made: int, batch_id: str | None
) -> None:
    """As often as asked; the last failure is reported."""
    with emulating(fail_when=FailsAtFirst(times)) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            (result,) = await all_of(
                kling.clone_voices(requests(1), batch_id=batch_id, retry_failed=2)
            )

        tried = [task.external_task_id or "" for task in emulator.tasks]
    assert (result.voice is not None) == (times <= 2)
    assert tried == [tried[0], f"{tried[0]}-r1", f"{tried[0]}-r2"][:made]


async def test_tries_of_failed_tasks_go_on_where_an_earlier_run_stopped() -> None:
    """Across runs, each further try is created once; and found again when all is done."""
    with emulating(fail_when=FailsAtFirst(2)) as emulator:
        async with client_of(emulator) as kling:
            for retries, created in ((0, 1), (1, 2), (1, 2), (3, 3), (3, 3)):
                (result,) = await all_of(
                    kling.clone_voices(requests(1), batch_id="cast", retry_failed=retries)
                )
                assert emulator.created == created
                assert (result.voice is not None) == (created == 3)
        before = Counter(emulator.requests)
        async with client_of(emulator) as kling:
            await all_of(kling.clone_voices(requests(1), batch_id="cast", retry_failed=3))

        assert emulator.requests - before == {LIST: 2}


async def test_invalid_requests_are_their_own_results() -> None:
    """Whatever is wrong with them; the others are cloned, and nothing is sent for them."""
    bad: list[Any] = [
        VoiceRequest("Ada"),
        VoiceRequest("Ada", voice_url=url(1), video_id="1"),
        VoiceRequest("a name of more than 20 characters", voice_url=url(1)),
        VoiceRequest("", voice_url=url(1)),
        VoiceRequest("Ada", voice_url="not a url"),
        VoiceRequest("Ada", voice_url=url(1), external_task_id=".."),
        VoiceRequest("Ada", voice_url=url(1), callback_url="x"),
        VoiceRequest("Ada", voice_file="missing.mp3"),
        "not a request",
        None,
    ]
    odd: Any = VoiceRequest
    bad += [odd(7, voice_url=8), odd("Ada", voice_file=7), odd("Ada", video_id=b"7")]
    keyed = [odd("Ada", voice_url=url(1), key=""), odd("Ada", voice_url=url(1), key=7)]
    for batch_id, wrong_ones in ((None, bad), ("cast", bad + keyed)):
        with emulating() as emulator:
            async with client_of(emulator, sample_host=Shelf()) as kling, nothing_left(kling):
                results = await all_of(
                    kling.clone_voices(
                        itertools.chain(requests(3), wrong_ones, requests(3, start=3)),
                        batch_id=batch_id,
                    )
                )

            assert_each_once(emulator, 6)
        wrong = [result for result in results if result.error is not None]
        assert len(wrong) == len(wrong_ones)
        for result in wrong:
            assert isinstance(result.error, InvalidRequestError | SampleError)
            assert any(result.request is request for request in wrong_ones)
            assert result.task is None
            assert result.voice is None


async def test_one_failure_does_not_harm_the_others() -> None:
    """A refused create, one whose outcome is unknown, and a wait that timed out."""
    faults = Faults(script={"create": {2: 1301, 4: Fault.ERROR_500_BEFORE}})
    once = RetryPolicy(attempts=1)
    with emulating(
        faults=faults, task_seconds=lambda number: 0.05 if number != 5 else 60.0
    ) as emulator:
        async with client_of(emulator, retry=once) as kling, nothing_left(kling):
            results = await all_of(kling.clone_voices(requests(12), timeout=0.8))

    errors = [result.error for result in results if result.error is not None]
    assert sorted(type(error).__name__ for error in errors) == [
        "PolicyError",
        "ServerError",
        "WaitTimeoutError",
    ]
    outcomes = {type(error): getattr(error, "outcome", None) for error in errors}
    assert outcomes[PolicyError] == "not_created"
    assert outcomes[ServerError] == "unknown"
    assert len(results) == 12
    (late,) = [result for result in results if isinstance(result.error, WaitTimeoutError)]
    assert late.task is not None
    assert not late.task.is_done


# --- streams ---


async def take(stream: Any, reported: list[CloneResult]) -> None:
    """Take a batch's results until it ends or raises."""
    note = reported.append
    async with aclosing(stream) as results:
        async for result in results:
            note(result)


async def enumerated(results: Any) -> AsyncIterator[tuple[int, CloneResult]]:
    """Number what comes, from 1."""
    number = 0
    async for result in results:
        number += 1
        yield number, result


class Source:
    """An endless source that counts what is taken from it, and whether it was closed."""

    def __init__(self) -> None:
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[VoiceRequest]:
        try:
            while True:
                self.taken += 1
                yield VoiceRequest("Voice", voice_url=url(self.taken))
        finally:
            self.closed = True

    async def slowly(self) -> AsyncIterator[VoiceRequest]:
        """Give them one by one, each after a moment."""
        try:
            for request in self:
                await asyncio.sleep(0.001)
                yield request
        finally:
            self.closed = True

    async def never(self) -> AsyncIterator[VoiceRequest]:
        """Give three, and then nothing more."""
        try:
            for request in itertools.islice(self, 3):
                yield request
            await asyncio.Event().wait()
        finally:
            self.closed = True


class Slowly:
    """An async iterable that is not its own iterator."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __aiter__(self) -> AsyncIterator[VoiceRequest]:
        return self._source.slowly()


@pytest.mark.parametrize("batch_id", ["cast", None])
@pytest.mark.parametrize("kind", ["iterable", "generator", "async iterable", "async generator"])
async def test_requests_may_be_endless(kind: str, batch_id: str | None) -> None:
    """A few are read ahead of the slots, whatever is awaited; results come as they complete."""
    source = Source()
    given: Any = {
        "iterable": source,
        "generator": iter(source),
        "async iterable": Slowly(source),
        "async generator": source.slowly(),
    }[kind]
    seen = 0
    with emulating(concurrency_limit=5) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            async with aclosing(kling.clone_voices(given, batch_id=batch_id)) as results:
                async for result in results:
                    assert result.voice is not None
                    seen += 1
                    assert source.taken <= emulator.created + 5 + batch_module.LOOK_AHEAD + 2
                    if seen == 60:
                        break
            assert source.closed

    assert source.taken <= 60 + 2 * (5 + batch_module.LOOK_AHEAD)


async def test_a_slow_consumer_holds_the_creates_back() -> None:
    """Results that nobody takes do not pile up: the source is not read on."""
    source = Source()
    with emulating(concurrency_limit=4) as emulator:
        async with (
            client_of(emulator) as kling,
            nothing_left(kling),
            aclosing(kling.clone_voices(source)) as results,
        ):
            await anext(results)
            await until(lambda: kling.slots.in_flight == 0)
            created = emulator.created
            assert created <= 60
            await asyncio.sleep(0.1)
            assert emulator.created == created
            for _ in range(created + 20):
                await anext(results)
            assert emulator.created > created


async def test_a_consumer_that_keeps_up_is_never_waited_for() -> None:
    """Results do not wait for others: the first comes while the last is far from done."""
    with emulating(task_seconds=lambda number: 60.0 if number == 1 else 0.03) as emulator:
        async with (
            client_of(emulator) as kling,
            nothing_left(kling),
            aclosing(kling.clone_voices(requests(20))) as results,
        ):
            for _ in range(19):
                await anext(results)

        assert emulator.in_flight == 1


async def test_an_async_source_may_wait_for_results() -> None:
    """Requests that depend on earlier results: nothing is read ahead that is not there."""
    asked: asyncio.Queue[VoiceRequest | None] = asyncio.Queue()
    asked.put_nowait(VoiceRequest("0", voice_url=url(0)))

    async def source() -> AsyncIterator[VoiceRequest]:
        while (request := await asked.get()) is not None:
            yield request

    with emulating() as emulator:
        async with (
            client_of(emulator) as kling,
            nothing_left(kling),
            aclosing(kling.clone_voices(source(), batch_id="chain")) as results,
        ):
            async for result in results:
                number = int(result.request.voice_name) + 1
                more = VoiceRequest(str(number), voice_url=url(number))
                asked.put_nowait(more if number < 5 else None)

        assert emulator.created == 5


async def test_memory_is_bounded() -> None:
    """What a batch keeps of a request that has its result is a short digest."""

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, CloneResult | VoiceTask) for one in gc.get_objects())

    before = alive()  # other tests of this process may have left some
    with emulating(task_seconds=0.0) as emulator:
        async with client_of(emulator) as kling:
            batch = batch_of(kling, requests(300))
            async with aclosing(batch.run()) as results:
                async for result in results:
                    del result
            assert len(batch._seen) == 300
            assert all(len(digest) <= 16 for digest in batch._seen)
            assert alive() <= before


# --- the whole account ---

ACCOUNT_WIDE = [
    (1002, AuthenticationError),
    (1101, AccountError),
    (1102, AccountError),
    (1103, PermissionDeniedError),
    (1304, PolicyError),
]


@pytest.mark.parametrize(("code", "error"), ACCOUNT_WIDE)
async def test_an_error_of_the_whole_account_ends_the_batch(
    code: int, error: type[KlingError]
) -> None:
    """The requests already taken are reported, the source is read no further; then it is raised."""
    source = Source()
    reported: list[CloneResult] = []
    faults = Faults(script={"create": dict.fromkeys(range(11, 500), code)})
    with emulating(concurrency_limit=4, faults=faults) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with pytest.raises(error):
                await take(kling.clone_voices(source, batch_id="cast"), reported)

        assert emulator.created <= 10
    assert len(reported) == source.taken
    assert source.closed
    assert sum(result.voice is not None for result in reported) == emulator.created
    assert all(isinstance(result.error, error) for result in reported if result.voice is None)
    assert source.taken <= 10 + 4 + batch_module.LOOK_AHEAD + 4


@pytest.mark.parametrize("call", ["get", "list", "create"])
async def test_it_does_so_wherever_it_is_met(call: str) -> None:
    """At the scan, at a create, or at a look at the tasks."""
    faults = Faults(script={call: dict.fromkeys(range(1, 500), 1101)})
    with emulating(faults=faults) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with pytest.raises(AccountError):
                await all_of(kling.clone_voices(Source(), batch_id="cast"))


async def test_it_does_not_wait_for_a_source_that_gives_nothing_more() -> None:
    """Reading it is given up."""
    source = Source()
    with emulating(faults=Faults(1.0, kinds=[1101], calls=["create"])) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            reported: list[CloneResult] = []
            async with asyncio.timeout(5):
                with pytest.raises(AccountError):
                    await take(kling.clone_voices(source.never()), reported)

    assert len(reported) == 3
    assert source.closed


class Stubborn(Source):
    """A source that swallows its cancellation, and gives more."""

    async def slowly(self) -> AsyncIterator[VoiceRequest]:
        """Give eleven, and the others when it is cancelled."""
        for request in self:
            if self.taken > 11:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
            yield request


async def test_a_source_that_swallows_its_cancellation_is_read_no_further() -> None:
    """Whether the batch ends by an error of the account or is left."""
    for faults in (Faults(script={"create": {11: 1101}}), None):
        source = Stubborn()
        with emulating(faults=faults) as emulator:
            async with client_of(emulator) as kling, nothing_left(kling):
                run = asyncio.create_task(all_of(kling.clone_voices(source.slowly())))
                if faults is None:
                    await until(lambda: emulator.created == 11)
                    run.cancel()
                async with asyncio.timeout(5):
                    (told,) = await asyncio.gather(run, return_exceptions=True)
                assert isinstance(told, AccountError | asyncio.CancelledError)
        assert source.taken == 12


async def test_a_closed_client_starts_nothing_for_such_a_source() -> None:
    """What it gives after the client was closed is not cloned: the batch ends."""
    source = Stubborn()
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            results: list[CloneResult] = []
            run = asyncio.create_task(take(kling.clone_voices(source.slowly()), results))
            await until(lambda: len(results) == 11)
            async with asyncio.timeout(5):
                await kling.close()
                with pytest.raises(ClientClosedError):
                    await run
        assert emulator.created == 11
    assert source.taken == 12


async def test_any_async_iterator_is_a_source() -> None:
    """One that is no generator has nothing to be closed, and is read to its end."""

    class Queued:
        def __init__(self) -> None:
            self.left = requests(3)

        def __aiter__(self) -> "Queued":
            return self

        async def __anext__(self) -> VoiceRequest:
            await asyncio.sleep(0)
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop()

    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            assert names(await all_of(kling.clone_voices(Queued()))) == expected(3)


# --- endings ---


async def break_off(kling: KlingVoiceClient, source: Source) -> None:
    """Leave the loop."""
    async with aclosing(kling.clone_voices(source, batch_id="cast")) as results:
        async for number, _ in enumerated(results):
            if number == 5:
                break


async def raise_in_the_loop(kling: KlingVoiceClient, source: Source) -> None:
    """Fail in the body of the loop."""

    async def consume() -> None:
        async with aclosing(kling.clone_voices(source)) as results:
            async for _ in results:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await consume()


async def raise_in_on_update(kling: KlingVoiceClient, source: Source) -> None:
    """Fail in a callback."""

    def on_update(task: VoiceTask) -> None:
        if task.is_done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await all_of(kling.clone_voices(source, on_update=on_update))


async def raise_in_async_on_update(kling: KlingVoiceClient, source: Source) -> None:
    """Fail in a callback that is a coroutine function."""

    async def on_update(task: VoiceTask) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await all_of(kling.clone_voices(source, on_update=on_update))


async def raise_in_the_source(kling: KlingVoiceClient, source: Source) -> None:
    """Fail in the caller's iterable: what was taken is reported first."""

    def failing() -> Iterator[VoiceRequest]:
        yield from itertools.islice(source, 20)
        raise ZeroDivisionError

    reported: list[CloneResult] = []
    with pytest.raises(ZeroDivisionError):
        await take(kling.clone_voices(failing()), reported)
    assert len(reported) == 20


async def cancel_the_task(kling: KlingVoiceClient, source: Source) -> None:
    """Cancel who consumes the batch, while it waits for a result."""
    consumer = asyncio.create_task(all_of(kling.clone_voices(source)))
    await until(lambda: source.taken > 20)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer


async def time_out(kling: KlingVoiceClient, source: Source) -> None:
    """Run out of the caller's own time."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await all_of(kling.clone_voices(source))


async def close_from_elsewhere(kling: KlingVoiceClient, source: Source) -> None:
    """Close the client while somebody waits for a result."""
    consumer = asyncio.create_task(all_of(kling.clone_voices(source)))
    await until(lambda: source.taken > 20)
    await kling.close()
    with pytest.raises(ClientClosedError):
        await consumer


async def close_in_the_loop(kling: KlingVoiceClient, source: Source) -> None:
    """Close the client in the body of the loop."""

    async def consume() -> None:
        async with aclosing(kling.clone_voices(source)) as results:
            async for number, _ in enumerated(results):
                if number == 5:
                    await kling.close()

    with pytest.raises(ClientClosedError):
        await consume()


async def close_in_on_update(kling: KlingVoiceClient, source: Source) -> None:
    """Close the client in a callback."""

    async def on_update(task: VoiceTask) -> None:
        await kling.close()

    with pytest.raises(ClientClosedError):
        await all_of(kling.clone_voices(source, on_update=on_update))


async def close_in_the_source(kling: KlingVoiceClient, source: Source) -> None:
    """Close the client where the requests come from."""

    async def closing() -> AsyncIterator[VoiceRequest]:
        for number, request in enumerate(source):
            if number == 5:
                await kling.close()
            yield request

    with pytest.raises(ClientClosedError):
        await all_of(kling.clone_voices(closing()))


async def cancel_in_the_source(kling: KlingVoiceClient, source: Source) -> None:
    """Let something that the source waits for be cancelled: no results are lost silently."""

    async def cancelled() -> AsyncIterator[VoiceRequest]:
        for request in itertools.islice(source, 5):
            yield request
        raise asyncio.CancelledError

    with pytest.raises(KlingError, match="cancelled from outside"):
        await all_of(kling.clone_voices(cancelled()))


async def cancel_in_on_update(kling: KlingVoiceClient, source: Source) -> None:
    """Let something that a callback waits for be cancelled: likewise."""

    async def on_update(task: VoiceTask) -> None:
        raise asyncio.CancelledError

    with pytest.raises(KlingError, match="cancelled from outside"):
        await all_of(kling.clone_voices(source, on_update=on_update))


async def forget_it(kling: KlingVoiceClient, source: Source) -> None:
    """Leave the loop without closing the generator, as a bare ``async for`` does."""
    stream = kling.clone_voices(source)
    async for _ in stream:
        break
    del stream
    gc.collect()
    await asyncio.sleep(0.05)


ENDINGS: list[Callable[[KlingVoiceClient, Source], Any]] = [
    break_off,
    raise_in_the_loop,
    raise_in_on_update,
    raise_in_async_on_update,
    raise_in_the_source,
    cancel_the_task,
    time_out,
    close_from_elsewhere,
    close_in_the_loop,
    close_in_on_update,
    close_in_the_source,
    cancel_in_the_source,
    cancel_in_on_update,
    forget_it,
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
async def test_nothing_is_left_however_a_batch_ends(
    ending: Callable[[KlingVoiceClient, Source], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """No asyncio task, no slot, no open source, nothing unclosed and nothing complained of."""
    source = Source()
    with emulating(concurrency_limit=4, task_seconds=0.03) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            async with asyncio.timeout(20):
                await ending(kling, source)
            assert source.closed or ending is cancel_in_the_source
        gc.collect()
    complaints = [record for record in caplog.records if record.name == "asyncio"]
    # Debug mode also logs callbacks that took long: the emulator's thread, while this one collects.
    assert not [record for record in complaints if not record.msg.startswith("Executing ")]


async def test_what_was_accepted_goes_on_and_is_found() -> None:
    """A create whose answer nobody waited for is found by the next run, too."""
    faults = Faults(1.0, kinds=[Fault.STALL_AFTER], calls=["create"])
    with emulating(faults=faults, task_seconds=0.0) as emulator:
        async with client_of(emulator) as kling:
            run = asyncio.create_task(all_of(kling.clone_voices(requests(4), batch_id="c")))
            await until(lambda: emulator.created == 4)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
        emulator.faults = None
        async with client_of(emulator) as kling:
            assert names(await all_of(kling.clone_voices(requests(4), batch_id="c"))) == expected(4)

        assert_each_once(emulator, 4)


async def test_a_list_that_is_forbidden_is_done_without() -> None:
    """A permission may be missing for it alone; what exists is then refused and adopted."""
    faults = Faults(script={"list": dict.fromkeys(range(1, 99), 1103)})
    with emulating(faults=faults) as emulator:
        async with client_of(emulator) as kling:
            for _ in range(2):
                results = await all_of(kling.clone_voices(requests(3), batch_id="cast"))
                assert names(results) == expected(3)
        assert_each_once(emulator, 3)


async def test_a_name_that_is_no_text_is_its_requests_own_error() -> None:
    """Even where a task with the request's id exists."""
    wrong: Any = None
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            await kling.clone_voice("Ada", voice_url=url(1), external_task_id="mine")
            asked = [VoiceRequest(wrong, voice_url=url(1), external_task_id="mine")]
            (result,) = await all_of(kling.clone_voices(asked, batch_id="cast"))
        assert isinstance(result.error, InvalidRequestError)
        assert (result.error.field, result.error.outcome) == ("voice_name", "not_created")


async def test_a_closed_client_refuses_a_batch() -> None:
    """Whether it was closed before the batch was made, or before it was begun."""
    with emulating() as emulator:
        kling = client_of(emulator)
        await kling.close()
        for batch_id in (None, "cast"):
            with pytest.raises(ClientClosedError):
                await all_of(kling.clone_voices([], batch_id=batch_id))


async def test_a_borrowed_session_that_is_closed_ends_the_batch() -> None:
    """Once, and not request by request."""
    with emulating() as emulator:
        async with (
            aiohttp.ClientSession() as session,
            client_of(emulator, session=session) as kling,
            nothing_left(kling),
        ):
            run = asyncio.create_task(all_of(kling.clone_voices(Source())))
            await until(lambda: emulator.created > 10)
            await session.close()
            with pytest.raises(ClientClosedError):
                await run


def test_a_client_of_another_event_loop_refuses_a_batch() -> None:
    """Once, and not request by request."""
    with emulating() as emulator:
        kling = client_of(emulator)

        async def run() -> list[CloneResult]:
            return await all_of(kling.clone_voices(requests(3)))

        with asyncio.Runner() as first, asyncio.Runner() as second:
            assert len(first.run(run())) == 3
            with pytest.raises(ConfigurationError, match="another event loop"):
                second.run(run())
            first.run(kling.close())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"requests": None}, "requests"),
        ({"requests": VoiceRequest("Ada")}, "requests"),
        ({"batch_id": ""}, "batch_id"),
        ({"batch_id": 7}, "batch_id"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 1.5}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"retry_failed": -1}, "retry_failed"),
        ({"retry_failed": None}, "retry_failed"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
)
async def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], field: str) -> None:
    """By the call itself, before anything is iterated."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            with pytest.raises(InvalidRequestError) as caught:
                kling.clone_voices(**{"requests": [], **arguments})

    assert caught.value.field == field


async def test_results_pickle() -> None:
    """Good ones and bad ones, for workers in other processes."""
    asked = [*requests(2), VoiceRequest("Ada"), VoiceRequest("Bob", voice_file=Path("missing"))]

    def fail(body: Any) -> str | None:
        return "noise" if body["voice_name"] == "Voice 1" else None

    with emulating(fail_when=fail) as emulator:
        async with client_of(emulator) as kling:
            results = await all_of(kling.clone_voices(asked, batch_id="cast"))

    assert len(results) == 4
    for result in results:
        again = pickle.loads(pickle.dumps(result))
        assert (again.request, again.task, again.voice) == (
            result.request,
            result.task,
            result.voice,
        )
        assert type(again.error) is type(result.error)
        assert str(again.error) == str(result.error)


async def test_on_update_is_told_of_each_change() -> None:
    """Of every task of the batch, the end included."""
    told: dict[str, list[str]] = {}

    def on_update(task: VoiceTask) -> None:
        told.setdefault(task.task_id, []).append(task.task_status)

    with emulating() as emulator:
        async with client_of(emulator) as kling:
            await all_of(kling.clone_voices(requests(5), on_update=on_update))

        assert set(told) == {task.task_id for task in emulator.tasks}
    for statuses in told.values():
        assert statuses[-1] == "succeed"
        assert statuses.count("succeed") == 1


# --- recordings ---


def recordings_of(folder: Path, count: int) -> list[VoiceRequest]:
    """Make requests of local files that all sound alike, but are not."""
    found = []
    for number in range(count):
        path = folder / f"{number}.mp3"
        path.write_bytes(ADA.read_bytes() + b"\0" * number)
        found.append(VoiceRequest(f"Voice {number}", voice_file=path))
    return found


async def test_recordings_are_published_for_their_creates_and_discarded_at_their_ends(
    tmp_path: Path,
) -> None:
    """Each once, also where the task fails; a resumed run publishes nothing for what exists."""
    shelf = Shelf()

    def fail(body: Any) -> str | None:
        return "noise" if body["voice_name"] == "Voice 3" else None

    asked = recordings_of(tmp_path, 6)
    with emulating(concurrency_limit=2, fail_when=fail) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling, nothing_left(kling):
            first = await all_of(kling.clone_voices(asked, batch_id="cast"))
            second = await all_of(kling.clone_voices(asked, batch_id="cast"))

        links = {task.voice_url for task in emulator.tasks}
        assert_each_once(emulator, 6)
    assert ids(first) == ids(second)
    assert len(ids(first)) == 5
    assert sorted(shelf.published) == sorted(set(shelf.published))
    assert set(shelf.discarded) == links
    assert len(shelf.discarded) == 6
    assert shelf.shown == set()


async def test_nothing_is_published_for_what_exists_where_the_list_does_not_show_it(
    tmp_path: Path,
) -> None:
    """A query comes before an upload."""
    shelf = Shelf()
    asked = recordings_of(tmp_path, 4)
    with emulating() as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            await all_of(kling.clone_voices(asked, batch_id="cast"))
            emulator.preload(4000)
            before = list(shelf.events)
            again = await all_of(kling.clone_voices(asked, batch_id="cast"))

        assert shelf.events == before
        assert names(again) == expected(4)
        assert_each_once(emulator, 4)


async def test_a_batch_that_is_left_discards_what_waits_for_a_slot(tmp_path: Path) -> None:
    """What the vendor has accepted it may fetch still."""
    shelf = Shelf()
    with emulating(concurrency_limit=2, time_scale=0.0) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling, nothing_left(kling):
            run = asyncio.create_task(
                all_of(kling.clone_voices(recordings_of(tmp_path, 9), batch_id="cast"))
            )
            await until(lambda: emulator.refused[1303] and emulator.created == 2)
            await until(lambda: len(shelf.published) == 9)
            await until(lambda: kling.slots.in_flight == 2)  # no create is under way
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

        assert shelf.shown == {task.voice_url for task in emulator.tasks}


async def test_a_host_that_fails_is_each_requests_own_error(tmp_path: Path) -> None:
    """The others are cloned."""

    class Choosy(Shelf):
        async def publish(self, path: Path, name: str) -> str:
            if path.name == "1.mp3":
                raise OSError("full")
            return await super().publish(path, name)

    with emulating() as emulator:
        async with client_of(emulator, sample_host=Choosy()) as kling, nothing_left(kling):
            results = await all_of(kling.clone_voices(recordings_of(tmp_path, 3), batch_id="cast"))

        assert emulator.created == 2
    (bad,) = [result for result in results if result.error is not None]
    assert isinstance(bad.error, SampleError)
    assert bad.error.outcome == "not_created"
    assert bad.request.voice_name == "Voice 1"


async def test_the_same_recording_under_two_names_is_two_voices(tmp_path: Path) -> None:
    """And the same name and bytes from two paths are one request, repeated."""
    one, two = tmp_path / "one.mp3", tmp_path / "two.mp3"
    one.write_bytes(ADA.read_bytes())
    two.write_bytes(ADA.read_bytes())
    asked = [
        VoiceRequest("Ada", voice_file=one),
        VoiceRequest("Bob", voice_file=one),
        VoiceRequest("Ada", voice_file=os.fspath(two)),
    ]
    with emulating() as emulator:
        async with client_of(emulator, sample_host=Shelf()) as kling:
            results = await all_of(kling.clone_voices(asked, batch_id="cast"))

        assert emulator.created == 2
    (repeated,) = [result for result in results if result.error is not None]
    assert isinstance(repeated.error, InvalidRequestError)
