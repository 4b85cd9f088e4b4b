"""Waiting, by a clock that the tests drive: when the vendor is asked, and what for."""

import asyncio
import gc
import itertools
import logging
import random
import sys
from collections import Counter
from typing import Any

import pytest
from driven import (
    START,
    Job,
    Vendor,
    driven,
    is_list,
    job,
    lag,
    now,
    tasks_left,
    told,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_voice import protocol
from kling_voice.errors import (
    AccountError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ConcurrencyLimitError,
    ConnectionFailedError,
    InvalidRequestError,
    KlingError,
    NotFoundError,
    PermissionDeniedError,
    PolicyError,
    RateLimitError,
    ResponseError,
    ServerError,
    WaitTimeoutError,
)
from kling_voice.models import VoiceTask
from kling_voice.policies import PollingPolicy
from kling_voice.protocol import Call, Envelope
from kling_voice.schedule import Schedule
from kling_voice.waiting import TaskWatcher
from kling_voice.watches import Look, Waiter, Watch

STEADY = PollingPolicy(initial=1.0, multiplier=1.0, maximum=1.0, jitter=0.0)
GROWING = PollingPolicy(initial=1.0, multiplier=2.0, maximum=8.0, jitter=0.0)
USUAL = PollingPolicy()

TRANSIENT: list[KlingError] = [
    ConnectionFailedError("reset"),
    ResponseError("an HTML page", http_status=502),
    ServerError("5000", code=5000, http_status=500),
    ServerError("5001", code=5001, http_status=503, retry_after=2.0),
    ServerError("5002", code=5002, http_status=504),
    RateLimitError("1302", code=1302, http_status=429),
    RateLimitError("1302", code=1302, http_status=429, retry_after=3.0),
    ConcurrencyLimitError("1303", code=1303, http_status=429),
]
PERMANENT: list[KlingError] = [
    AuthenticationError("1002", code=1002, http_status=401),
    PermissionDeniedError("1103", code=1103, http_status=403),
    AccountError("1101", code=1101, http_status=429),
    PolicyError("1304", code=1304, http_status=429),
    BadRequestError("1200", code=1200, http_status=400),
    ApiError("unknown", code=1777, http_status=400),
]


def watching(vendor: Vendor, policy: PollingPolicy = STEADY, **options: Any) -> TaskWatcher:
    """Make a watcher of this vendor's tasks."""
    slow = options.pop("slow", False)
    return TaskWatcher(vendor, Schedule(policy, slow=slow, seed=0.25), **options)


def name(error: KlingError) -> str:
    """Name a case."""
    return f"{type(error).__name__}-{getattr(error, 'retry_after', None)}"


async def gather(*waits: Any) -> list[Any]:
    """Let waits go on together, and give what came of each."""
    return await asyncio.gather(*waits, return_exceptions=True)


def records() -> list[object]:
    """Give all that watchers, those of earlier tests included, have written down."""
    return [one for one in gc.get_objects() if isinstance(one, Waiter | Watch | Look)]


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(10):
        await asyncio.sleep(0)


class TestSchedule:
    """The schedule is tenacity's exponential, bounded by the deadline."""

    @driven
    async def test_looks_are_ever_farther_apart(self) -> None:
        """The looks at one task come 1, 2, 4, 8, 8 … seconds after one another."""
        vendor = Vendor([job("t", ends=30.0)])
        await watching(vendor, GROWING).wait(told(), timeout=60.0)
        assert vendor.singles == [1.0, 3.0, 7.0, 15.0, 23.0, 31.0]

    @driven
    async def test_an_id_is_looked_at_at_once(self) -> None:
        """Of a mere id nothing is known: the first look does not wait for a tick."""
        vendor = Vendor([job("t", ends=3.0)])
        await watching(vendor, GROWING).wait("t", timeout=60.0)
        assert vendor.singles == [0.0, 2.0, 6.0]

    @driven
    async def test_with_callbacks_looks_are_rare(self) -> None:
        """With callbacks, polling goes on slowly underneath."""
        vendor = Vendor([job("t", ends=17.0)])
        await watching(vendor, GROWING, slow=True).wait(told(), timeout=60.0)
        assert vendor.singles == [8.0, 16.0, 24.0]

    @driven
    async def test_the_last_sleep_is_clipped(self) -> None:
        """A task that ends just before the deadline, between two looks, is not missed."""
        vendor = Vendor([job("t", ends=19.5)])
        ended = await watching(vendor, GROWING).wait(told(), timeout=20.0)
        assert ended.succeeded
        assert now() < 20.0
        assert vendor.singles[:-1] == [1.0, 3.0, 7.0, 15.0]
        assert 19.5 < vendor.singles[-1] < 20.0

    @driven
    async def test_the_last_look_leaves_time_for_a_slow_answer(self) -> None:
        """Where answers take two seconds, the last look begins more than two seconds early."""
        vendor = Vendor([job("t", ends=14.0)], latency=2.0)
        ended = await watching(vendor, GROWING).wait("t", timeout=18.0)
        assert ended.succeeded
        assert now() < 18.0
        assert 14.0 <= vendor.singles[-1] < 16.0

    @driven
    async def test_a_look_that_comes_too_late_is_dropped(self) -> None:
        """A look that is under way at the deadline is not waited for, and outlives it not."""
        vendor = Vendor([job("t", ends=9.0)])
        vendor.latency = lambda call: 0.01 if now() < 9.0 else 2.0
        watcher = watching(vendor)
        with pytest.raises(WaitTimeoutError):
            await watcher.wait(told(), timeout=10.0)
        assert now() == 10.0
        await settle()
        assert vendor.in_flight == 0
        assert watcher.idle
        assert tasks_left() == 0

    @pytest.mark.parametrize("timeout", [0.0, 0.001, 0.2, 1.0, 3.7, 20.0])
    @pytest.mark.parametrize("known", [True, False])
    @driven
    async def test_nothing_is_asked_after_the_deadline(self, timeout: float, known: bool) -> None:
        """The wait ends at its deadline, and so do the requests."""
        vendor = Vendor([job("t")])
        watcher = watching(vendor, GROWING)
        with pytest.raises(WaitTimeoutError):
            await watcher.wait(told() if known else "t", timeout=timeout)
        assert now() == pytest.approx(timeout)
        assert all(moment < timeout for moment, _ in vendor.calls)
        asked = len(vendor.calls)
        assert asked >= (timeout > 0)
        await until(timeout + 60.0)
        assert len(vendor.calls) == asked
        assert watcher.idle

    @driven
    async def test_no_time_at_all(self) -> None:
        """A timeout of 0 asks nothing, and tells what was known."""
        vendor = Vendor([job("t", ends=0.0)])
        with pytest.raises(WaitTimeoutError) as caught:
            await watching(vendor).wait(told(), timeout=0)
        assert vendor.calls == []
        assert caught.value.task == told()
        assert "last seen as 'submitted'" in str(caught.value)

    @driven
    async def test_a_timeout_tells_the_last_state_seen(self) -> None:
        """WaitTimeoutError.task is what the vendor told last, in its own words."""
        vendor = Vendor([Job("t", timeline=[(0.0, "submitted"), (2.5, "processing")])])
        with pytest.raises(WaitTimeoutError, match="ended after 5 s; it was last seen") as caught:
            await watching(vendor).wait("t", timeout=5)
        assert caught.value.task is not None
        assert caught.value.task.task_status == "processing"

    @driven
    async def test_a_timeout_without_any_state(self) -> None:
        """If the vendor never told anything, there is no task to tell of."""
        vendor = Vendor()
        vendor.fault = lambda call: ConnectionFailedError("refused")
        with pytest.raises(WaitTimeoutError, match="did not tell its state") as caught:
            await watching(vendor).wait("t", timeout=5)
        assert caught.value.task is None

    @driven
    async def test_a_timeout_of_a_task_that_is_not_known(self) -> None:
        """If the vendor said that there is none, the error says so, until it is there after all."""
        vendor = Vendor([job("late", ends=99.0, visible=2.5)])
        for task_id, match in [("t", r"does not know it \(1203\)"), ("late", "last seen")]:
            with pytest.raises(WaitTimeoutError, match=match):
                await watching(vendor).wait(task_id, timeout=5)

    @driven
    async def test_without_a_timeout(self) -> None:
        """A wait for ever outlasts months, at the slowest pace of the policy."""
        months = 90 * 86400.0
        vendor = Vendor([job("t", ends=months)])
        polling = PollingPolicy(initial=1.0, multiplier=2.0, maximum=3600.0)
        ended = await watching(vendor, polling).wait("t", timeout=None)
        assert ended.succeeded
        assert months <= now() < months + 3700.0
        assert len(vendor.calls) < months / 3600 + 20

    @pytest.mark.parametrize(
        "timeout", [1.1e9, sys.float_info.max, 10**400], ids=["years", "float", "int"]
    )
    @driven
    async def test_a_timeout_beyond_all_clocks(self, timeout: float) -> None:
        """A timeout of centuries is none, and harms no other wait for the same task."""
        vendor = Vendor([job("t", ends=5.0)])
        watcher = watching(vendor)
        waits = (watcher.wait(told(), timeout=seconds) for seconds in (60.0, timeout))
        states = await asyncio.gather(*waits)
        assert all(state.succeeded for state in states)
        assert now() < 5.1
        assert watcher.idle

    @driven
    async def test_a_last_look_that_fails_is_made_again(self) -> None:
        """If the last look fails and a tick is left before the deadline, there is another one."""
        vendor = Vendor([job("t", ends=17.5)])
        vendor.latency = lambda call: 2.0 if now() < 15.0 else 0.01
        vendor.fault = lambda call: ConnectionFailedError("reset") if 15.0 < now() < 17.5 else None
        assert (await watching(vendor).wait("t", timeout=20.0)).succeeded
        assert 17.5 < now() < 20.0

    @driven
    async def test_no_last_look_without_the_time_for_it(self) -> None:
        """If the last look fails and no tick is left, the wait ends at its deadline."""
        vendor = Vendor([job("t")])
        vendor.fault = lambda call: ConnectionFailedError("reset") if now() > 9.5 else None
        with pytest.raises(WaitTimeoutError):
            await watching(vendor).wait("t", timeout=10.0)
        assert vendor.singles[-2:] == [9.0, pytest.approx(9.8, abs=0.1)]
        assert now() == 10.0

    @driven
    async def test_no_last_look_at_the_deadline(self) -> None:
        """If the last look fails and the next tick is the deadline, nothing is asked then."""
        vendor = Vendor([job("t")])
        vendor.latency = lambda call: 0.6 if now() < 8.5 else 0.01
        vendor.fault = lambda call: ConnectionFailedError("reset") if now() > 8.9 else None
        with pytest.raises(WaitTimeoutError):
            await watching(vendor).wait("t", timeout=10.0)
        assert vendor.singles[-2:] == [8.0, 9.0]
        assert now() == 10.0

    @driven
    async def test_an_outage_blinds_no_longer_than_it_lasts(self) -> None:
        """Waits whose vendor stalls in their second quarter look again long before their end."""
        vendor = Vendor([job(f"t{i}", ends=40.0, hidden=True) for i in range(60)])
        vendor.latency = lambda call: 100.0 if 15.0 <= now() <= 46.0 else 0.01
        watcher = watching(vendor, USUAL)
        await asyncio.gather(*(watcher.wait(told(f"t{i}"), timeout=60.0) for i in range(60)))
        assert now() < 56.0

    @driven
    async def test_an_end_is_returned_without_a_request(self) -> None:
        """A VoiceTask that has ended is given back as it is."""
        vendor = Vendor()
        for status in ("succeed", "failed"):
            ended = told(status=status)
            assert await watching(vendor).wait(ended, timeout=10.0) is ended
        assert vendor.calls == []

    @driven
    async def test_a_task_that_ended_before(self) -> None:
        """A task that has long ended costs one request, by its id or from an old state of it."""
        for given_task in ("t", told("t")):
            vendor = Vendor([job("t", ends=0.0)])
            started = now()
            assert (await watching(vendor).wait(given_task, timeout=10.0)).succeeded
            assert len(vendor.calls) == 1
            assert now() - started <= 1.02

    @driven
    async def test_a_failed_task_is_an_end(self) -> None:
        """A task that failed ends the wait like one that succeeded."""
        vendor = Vendor([job("t", ends=2.0, status="failed")])
        assert (await watching(vendor).wait("t", timeout=10.0)).failed

    @driven
    async def test_jitter_moves_the_ticks(self) -> None:
        """Looks are off their places by up to half the jitter, differently each time."""
        vendor = Vendor([job("t", ends=50.0)])
        polling = PollingPolicy(initial=1.0, multiplier=1.0, maximum=1.0, jitter=0.4)
        await watching(vendor, polling).wait(told(), timeout=60.0)
        offsets = [moment - round(moment) for moment in vendor.singles]
        assert all(abs(offset) <= 0.2 for offset in offsets)
        assert max(offsets) - min(offsets) > 0.3


class TestSharedReads:
    """Reads that fall due together are merged."""

    @driven
    async def test_a_thousand_tasks_cost_one_list_request_a_tick(self) -> None:
        """A thousand waits are answered from the list, once a tick, and told within a tick."""
        jobs = [job(f"t{i}", ends=2.0 + i / 200) for i in range(1000)]
        vendor = Vendor(jobs)
        watcher = watching(vendor)
        late: list[float] = []

        async def wait(one: Job) -> None:
            await watcher.wait(told(one.task_id), timeout=60.0)
            late.append(now() - one.timeline[-1][0])

        await asyncio.gather(*map(wait, jobs))
        assert len(late) == 1000
        assert max(late) <= 1.02
        assert len(vendor.lists) <= 8
        assert len(vendor.singles) <= 2
        assert watcher.idle

    @driven
    async def test_a_thousand_ids_at_once(self) -> None:
        """A thousand ids that nothing is known of are looked up by one list request at once."""
        vendor = Vendor([job(f"t{i}", ends=0.0) for i in range(1000)])
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(1000)))
        assert len(vendor.calls) == 1
        assert now() < 0.1

    @driven
    async def test_arrivals_at_different_moments(self) -> None:
        """Two thousand ids that come one by one share their first looks and all later ones."""
        rng = random.Random(1)
        comes = sorted(rng.uniform(0.0, 5.0) for _ in range(2000))
        jobs = [
            job(f"t{i}", ends=moment + rng.uniform(0.0, 9.0), visible=moment)
            for i, moment in enumerate(comes)
        ]
        vendor = Vendor(jobs[::-1])
        watcher = watching(vendor)
        late: list[float] = []

        async def wait(one: Job) -> None:
            await until(one.visible)
            await watcher.wait(one.task_id, timeout=60.0)
            late.append(now() - one.timeline[-1][0])

        await asyncio.gather(*map(wait, jobs))
        assert max(late) <= 1.6  # from a first look in between to the tick after the next one
        assert len(vendor.lists) <= 5 * 11 * 2 + 10 * 2
        assert len(vendor.singles) <= 200
        assert watcher.idle

    @driven
    async def test_few_are_queried_alone(self) -> None:
        """Two tasks are two single queries a tick; the list is not asked."""
        vendor = Vendor([job("a", ends=4.5), job("b", ends=4.5)])
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one), timeout=60.0) for one in "ab"))
        assert vendor.lists == []
        assert vendor.singles == [float(tick) for tick in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]

    @driven
    async def test_looks_at_different_ticks_stay_apart(self) -> None:
        """A look is not hastened by another task's that is due a tick before."""
        vendor = Vendor([job("a"), job("b")])
        watcher = watching(vendor, GROWING)
        first = asyncio.create_task(watcher.wait(told("a"), timeout=14.0))
        await until(0.9)
        await gather(watcher.wait(told("b"), timeout=12.0), first)
        asked = [(moment, target[-1]) for moment, target in vendor.calls if moment < 10.0]
        assert asked == [(1.0, "a"), (2.0, "b"), (3.0, "a"), (4.0, "b"), (7.0, "a"), (8.0, "b")]

    @driven
    async def test_what_is_due_in_a_moment_is_shared(self) -> None:
        """The first look at an id joins a tick that comes within a tenth of a second."""
        vendor = Vendor([job("a"), job("b", ends=0.0), job("c", ends=0.0)])
        watcher = watching(vendor)
        other = asyncio.create_task(watcher.wait(told("a"), timeout=60.0))
        await until(0.85)
        await watcher.wait("b", timeout=60.0)
        await until(0.96)
        await watcher.wait("c", timeout=60.0)
        asked = [(round(moment, 3), target[-1]) for moment, target in vendor.calls]
        assert asked == [(0.85, "b"), (1.0, "a"), (1.0, "c")]
        other.cancel()

    @driven
    async def test_single_queries_are_not_sent_all_at_once(self) -> None:
        """Of many tasks that the list does not show, 32 are queried at the same time."""
        vendor = Vendor([job(f"t{i}", ends=0.0, hidden=True) for i in range(100)], latency=0.5)
        watcher = watching(vendor)
        waits = asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(100)))
        most = 0
        while not waits.done():
            most = max(most, vendor.in_flight)
            await asyncio.sleep(0.1)
        assert most == 32
        assert len(vendor.singles) == 100

    @driven
    async def test_three_are_looked_up_in_the_list(self) -> None:
        """From three tasks on, one page answers them all."""
        vendor = Vendor([job(one, ends=4.5) for one in "abc"])
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one), timeout=60.0) for one in "abc"))
        assert vendor.lists == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert vendor.singles == []

    @driven
    async def test_the_same_task_awaited_twice(self) -> None:
        """Two who wait for the same task share everything, whenever they came."""
        vendor = Vendor([job("t", ends=5.5)])
        watcher = watching(vendor)

        async def later() -> VoiceTask:
            await until(2.5)
            return await watcher.wait("t", timeout=60.0)

        one, other = await asyncio.gather(watcher.wait("t", timeout=60.0), later())
        assert one == other
        assert one.succeeded
        assert vendor.singles == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    @driven
    async def test_who_comes_during_the_first_look(self) -> None:
        """Who waits for a mere id while it is looked at for the first time shares that look."""
        vendor = Vendor([job("t", ends=0.9)], latency=0.2)
        watcher = watching(vendor)
        first = asyncio.create_task(watcher.wait("t", timeout=60.0))
        await until(0.05)
        await asyncio.gather(first, watcher.wait("t", timeout=60.0))
        assert vendor.singles == [0.0, 1.0]

    @driven
    async def test_a_wait_after_another(self) -> None:
        """A wait for a task that an earlier one saw to its end asks anew, and gets it."""
        vendor = Vendor([job("t", ends=2.5)])
        watcher = watching(vendor)
        for _ in range(3):
            assert (await watcher.wait("t", timeout=60.0)).succeeded
        assert len(vendor.singles) == 4 + 1 + 1
        assert now() < 3.5

    @driven
    async def test_both_ids_share(self) -> None:
        """Who waits by task_id and who waits by external_task_id share a read a tick."""
        vendor = Vendor([job("t", ends=9.5, external="e")])
        watcher = watching(vendor)
        ids: list[VoiceTask | str] = ["t", "e", told("t"), told("t", task_info=None)]
        states = await asyncio.gather(*(watcher.wait(one, timeout=60.0) for one in ids))
        assert all(state.succeeded for state in states)
        assert [vendor.singles.count(float(tick)) for tick in range(1, 11)] == [1] * 10

    @driven
    async def test_a_state_tells_both_ids(self) -> None:
        """A VoiceTask that bears both ids joins who waits by the other one from the beginning."""
        vendor = Vendor([job("t", ends=9.5, external="e")])
        watcher = watching(vendor)
        task = told("t", task_info={"external_task_id": "e"})
        await asyncio.gather(*(watcher.wait(one, timeout=60.0) for one in ("e", task)))
        assert [vendor.singles.count(float(tick)) for tick in range(1, 11)] == [1] * 10
        assert len(vendor.calls) <= 11

    @driven
    async def test_both_ids_share_in_the_list_too(self) -> None:
        """A hundred tasks that are waited for by both ids are a hundred tasks."""
        jobs = [job(f"t{i}", ends=9.5, external=f"e{i}") for i in range(100)]
        vendor = Vendor(jobs)
        watcher = watching(vendor)
        ids = [i for one in jobs for i in (one.task_id, str(one.external))]
        await asyncio.gather(*(watcher.wait(one, timeout=60.0) for one in ids))
        assert len(vendor.calls) <= 11 + 2  # witnesses
        lists = [target for _, target in vendor.calls if "?" in target]
        assert all("pageSize=125" in target for target in lists[1:])

    @driven
    async def test_long_waits_come_to_share_their_looks(self) -> None:
        """Tasks that have waited for long, from different moments on, share one rare read."""
        jobs = [job(f"t{i}") for i in range(200)]
        vendor = Vendor(jobs)
        watcher = watching(vendor, USUAL)

        async def wait(one: Job, comes: float) -> None:
            await until(comes)
            await watcher.wait(told(one.task_id), timeout=600.0)

        waits = asyncio.gather(
            *(wait(one, i / 20) for i, one in enumerate(jobs)), return_exceptions=True
        )
        await until(60.0)
        calm = len(vendor.singles)
        await until(160.0)
        lists = [moment for moment in vendor.lists if moment >= 60.0]
        assert len(lists) <= 25  # every 5 s
        assert len(vendor.singles) - calm <= 2 * (len(lists) / 4 + 1)  # witnesses
        waits.cancel()

    @driven
    async def test_last_looks_fall_together(self) -> None:
        """A thousand waits that time out within seconds do not end in a thousand queries."""
        vendor = Vendor([job(f"t{i}") for i in range(1000)])
        watcher = watching(vendor, USUAL)

        async def wait(number: int) -> None:
            await until(number / 300)
            with pytest.raises(WaitTimeoutError):
                await watcher.wait(told(f"t{number}"), timeout=30.0)

        await asyncio.gather(*map(wait, range(1000)))
        assert len(vendor.singles) <= 100
        assert len(vendor.lists) <= 34 + 40
        assert watcher.idle

    @driven
    async def test_only_awaited_tasks_are_structured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a page, only what somebody waits for is decoded, and only when it has changed."""
        structured: Counter[str] = Counter()
        read_item = protocol.read_item

        def counting(item: Any, request_id: str | None) -> VoiceTask:
            structured[item["task_id"]] += 1
            return read_item(item, request_id)

        monkeypatch.setattr(protocol, "read_item", counting)
        vendor = Vendor(
            [job(f"f{i}", ends=0.0) for i in range(20)] + [job(f"t{i}", ends=8.5) for i in range(5)]
        )
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(5)))
        assert len(vendor.lists) >= 8
        assert len(vendor.singles) <= 1  # a witness
        assert structured == {f"t{i}": 2 for i in range(5)}

    @driven
    async def test_the_list_answers_those_who_come_later_too(self) -> None:
        """A page that one look fetches tells everyone whose task is on it."""
        vendor = Vendor([job(f"t{i}", ends=7.9) for i in range(50)])
        watcher = watching(vendor, GROWING)
        ended: list[float] = []

        async def wait(number: int, comes: float) -> None:
            await until(comes)
            await watcher.wait(told(f"t{number}"), timeout=60.0)
            ended.append(now())

        await asyncio.gather(
            *(wait(i, 0.0) for i in range(25)), *(wait(i, 4.0) for i in range(25, 50))
        )
        assert max(ended) < 8.1 + 3.0
        assert len(set(ended)) == 1


class TestList:
    """The list is of use in any order and with any page cap, or else it is not used."""

    @pytest.mark.parametrize("foreign", [0, 40, 2000])
    @pytest.mark.parametrize("order", ["newest", "oldest", "shuffled"])
    @pytest.mark.parametrize(("cap", "clamp"), [(1000, False), (500, False), (100, False),
                                                (500, True), (100, True)])  # fmt: skip
    @driven
    async def test_whatever_the_list_is_like(
        self, foreign: int, order: str, cap: int, clamp: bool
    ) -> None:
        """Every wait ends within a tick and a bit of its task's end."""
        jobs = [job(f"t{i}", ends=1.0 + i / 80) for i in range(240)]
        others = [job(f"f{i}", ends=0.0) for i in range(foreign)]
        listed = jobs[::-1] + others
        if order == "oldest":
            listed.reverse()
        if order == "shuffled":
            random.Random(0).shuffle(listed)
        vendor = Vendor(listed)
        vendor.page_cap, vendor.clamp = cap, clamp
        watcher = watching(vendor)

        async def wait(one: Job) -> float:
            ended = await watcher.wait(told(one.task_id), timeout=60.0)
            assert ended.task_id == one.task_id
            assert ended.succeeded
            return now() - one.timeline[-1][0]

        late = await asyncio.gather(*map(wait, jobs))
        assert max(late) <= 1.3
        if order == "newest" or not foreign:
            assert len(vendor.calls) <= 5 * (1 + -(-300 // cap)) + 10
        assert watcher.idle

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_any_mixture(self, data: st.DataObject) -> None:
        """Whoever waits for whatever by whichever id gets it, wherever the list shows it."""
        count = data.draw(st.integers(1, 40))
        jobs = [
            Job(
                f"t{i}",
                data.draw(st.sampled_from([None, f"e{i}"])),
                [(0.0, "submitted"), (data.draw(st.floats(0.0, 20.0)), "succeed")],
                voices_listed=data.draw(st.booleans()),
                lag=data.draw(st.sampled_from([0.0, 0.0, 3.0])),
            )
            for i in range(count)
        ]
        for one in jobs:
            one.hidden = not data.draw(st.integers(0, 9))
        shown = jobs + [job(f"f{i}", ends=0.0) for i in range(data.draw(st.integers(0, 200)))]
        random.Random(data.draw(st.integers())).shuffle(shown)
        comes = [data.draw(st.floats(0.0, 10.0)) for _ in jobs]
        cap = data.draw(st.sampled_from([1000, 100, 30]))

        @driven
        async def run() -> None:
            vendor = Vendor(shown)
            vendor.page_cap = cap
            watcher = watching(vendor, USUAL)

            async def wait(one: Job, moment: float) -> VoiceTask:
                await until(moment)
                return await watcher.wait(one.external or one.task_id, timeout=100.0)

            states = await asyncio.gather(*map(wait, jobs, comes))
            assert [state.task_id for state in states] == [one.task_id for one in jobs]
            assert all(state.voices for state in states)
            await settle()
            assert watcher.idle
            assert tasks_left() == 0

        run()

    @driven
    async def test_a_useless_list_is_left_alone(self) -> None:
        """Where ten thousand foreign tasks hide ours, the list is soon asked but rarely."""
        jobs = [job(f"t{i}", ends=100.5) for i in range(5)]
        vendor = Vendor([job(f"f{i}", ends=0.0) for i in range(10_000)] + jobs)
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=600.0) for one in jobs))
        assert now() < 101.1
        assert 3 <= len(vendor.lists) <= 8
        assert len(vendor.singles) == 5 * 101

    @driven
    async def test_it_is_tried_again_and_used_once_it_is_of_use(self) -> None:
        """When the foreign tasks have gone, the list is found to be of use again."""
        jobs = [job(f"t{i}", ends=200.5) for i in range(20)]
        foreign = [job(f"f{i}", ends=0.0) for i in range(3000)]
        vendor = Vendor(foreign + jobs)
        watcher = watching(vendor)
        waits = asyncio.gather(*(watcher.wait(told(j.task_id), timeout=600.0) for j in jobs))
        await until(50.5)
        vendor.listed = jobs
        await until(120.5)
        queried = len(vendor.singles)
        await waits
        assert len(vendor.singles) <= queried + 80 / 4  # witnesses
        assert len(vendor.lists) >= 81

    @driven
    async def test_what_a_page_does_not_show_is_queried_alone(self) -> None:
        """Tasks that the list hides cost a query each, the others a page for all."""
        jobs = [job(f"t{i}", ends=5.5, hidden=i < 3) for i in range(50)]
        vendor = Vendor(jobs)
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=60.0) for one in jobs))
        assert now() < 6.1
        assert len(vendor.singles) == 3 * 6
        assert len(vendor.lists) <= 12

    @driven
    async def test_a_list_that_gives_the_same_page_again(self) -> None:
        """A server that ignores the page number is asked for two pages a tick, not for all."""
        jobs = [job(f"t{i}", ends=5.5, hidden=i < 5) for i in range(35)]

        class Ignorant(Vendor):
            def _answer(self, call: Call) -> Any:
                if is_list(call):
                    return [one.shape(now(), listed=True) for one in jobs if not one.hidden]
                return super()._answer(call)

        vendor = Ignorant(jobs)
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=60.0) for one in jobs))
        assert now() < 6.1
        assert len(vendor.lists) <= 2 * 6
        assert len(vendor.singles) == 5 * 6

    @driven
    async def test_a_page_size_that_is_refused_is_asked_for_once(self) -> None:
        """A server that allows 100 a page refuses a larger one, and then no other."""
        vendor = Vendor([job(f"t{i}", ends=3.5) for i in range(1000)])
        vendor.page_cap = 100
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(f"t{i}"), timeout=60.0) for i in range(1000)))
        sizes = Counter(target.partition("pageSize=")[2] for _, target in vendor.calls)
        assert sizes["1000"] == sizes["500"] == 1
        assert sizes["100"] <= 4 * 11
        assert vendor.singles == []

    @driven
    async def test_a_page_beyond_the_last_may_be_refused(self) -> None:
        """A server that refuses a page behind the end has just told that there is no more."""
        jobs = [job(f"t{i}", ends=5.5, hidden=i < 30) for i in range(60)]
        vendor = Vendor(jobs)

        def beyond(call: Call) -> KlingError | None:
            if "pageNum=" in call.target and "pageNum=1&" not in call.target:
                return BadRequestError("no such page", code=1201, http_status=400)
            return None

        vendor.fault = beyond
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=60.0) for one in jobs))
        assert len([1 for _, target in vendor.calls if "pageNum=1&" in target]) == 6
        assert len(vendor.singles) == 30 * 6

    @pytest.mark.parametrize(
        "error",
        [
            PermissionDeniedError("1103", code=1103, http_status=403),
            BadRequestError("1201", code=1201, http_status=400),
            NotFoundError("1203", code=1203, http_status=404),
            ApiError("unknown", code=1777, http_status=400),
        ],
        ids=name,
    )
    @driven
    async def test_a_list_that_may_not_be_read(self, error: KlingError) -> None:
        """If the list alone is refused for good, tasks are queried one by one until they end."""
        jobs = [job(f"t{i}", ends=6.5) for i in range(20)]
        vendor = Vendor(jobs)
        vendor.fault = lambda call: error if is_list(call) else None
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=60.0) for one in jobs))
        assert now() < 7.5
        assert len(vendor.lists) <= 3 * 4  # each size, at the ticks 1, 3 and 7
        assert watcher.idle

    @pytest.mark.parametrize("error", TRANSIENT, ids=name)
    @driven
    async def test_a_list_that_fails_for_long(self, error: KlingError) -> None:
        """If the list alone is broken, tasks are soon queried one by one, and get their end."""
        jobs = [job(f"t{i}", ends=9.5) for i in range(20)]
        vendor = Vendor(jobs)
        vendor.fault = lambda call: error if is_list(call) else None
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=600.0) for one in jobs))
        assert now() < 9.5 + 8.0
        assert len(vendor.singles) > 0

    @driven
    async def test_one_failure_of_the_list_costs_a_tick(self) -> None:
        """A list that fails once is asked again at the next tick; nothing is queried alone."""
        vendor = Vendor([job(f"t{i}", ends=0.0) for i in range(100)])
        failures = [ConnectionFailedError("reset")]
        vendor.fault = lambda call: failures.pop() if failures else None
        watcher = watching(vendor, GROWING)
        await asyncio.gather(*(watcher.wait(told(f"t{i}"), timeout=60.0) for i in range(100)))
        assert vendor.lists == [1.0, 2.0]
        assert vendor.singles == []

    @driven
    async def test_a_second_page_that_fails_spoils_not_the_first(self) -> None:
        """What the first page told is taken in, though the second one could not be read."""
        vendor = Vendor([job(f"t{i}", ends=0.0) for i in range(200)])
        vendor.page_cap = 100
        vendor.fault = lambda call: (
            ConnectionFailedError("reset") if "pageNum=2" in call.target else None
        )
        watcher = watching(vendor)
        waits = [asyncio.create_task(watcher.wait(f"t{i}", timeout=60.0)) for i in range(200)]
        await until(0.5)
        assert sum(wait.done() for wait in waits) == 100
        await asyncio.gather(*waits)

    @driven
    async def test_a_list_that_stalls_blinds_nobody_for_long(self) -> None:
        """While a list request hangs, those who come later get theirs; all are told in seconds."""
        vendor = Vendor([job(f"t{i}", ends=0.0) for i in range(40)])
        vendor.latency = lambda call: 3600.0 if is_list(call) else 0.01
        watcher = watching(vendor)
        first = asyncio.gather(*(watcher.wait(f"t{i}", timeout=600.0) for i in range(20)))
        await until(0.5)
        assert (await watcher.wait("t20", timeout=600.0)).succeeded
        assert now() < 0.7
        await first
        assert now() < 12.0

    @driven
    async def test_a_query_that_stalls_blinds_nobody_else(self) -> None:
        """While one task's query hangs, the others are looked at when they are due."""
        vendor = Vendor([job("a", ends=0.0), job("b", ends=0.0)])
        vendor.latency = lambda call: 99.0 if call.target.endswith("a") and now() < 5.0 else 0.01
        watcher = watching(vendor)
        stalled = asyncio.create_task(watcher.wait("a", timeout=60.0))
        await watcher.wait(told("b"), timeout=60.0)
        assert now() == pytest.approx(1.01)
        await stalled
        assert now() < 9.1

    @driven
    async def test_an_item_that_is_not_readable(self) -> None:
        """A list item that is not a task is passed over, and the task queried alone."""
        vendor = Vendor([job(f"t{i}", ends=2.5) for i in range(5)])
        shape = vendor.listed[0].shape

        class Broken(Job):
            def shape(self, moment: float, *, listed: bool = False) -> dict[str, Any]:
                whole = shape(moment)
                return {**whole, "created_at": "yesterday"} if listed else whole

        vendor.listed[0] = Broken("t0")
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(5)))
        assert now() < 3.1
        assert len(vendor.singles) <= 4

    @pytest.mark.parametrize(
        "page",
        [None, {}, "text", [None, 7, "x", [], {}], [{"task_id": 7}, {"task_info": 7}]],
        ids=str,
    )
    @driven
    async def test_a_page_of_nonsense(self, page: Any) -> None:
        """Whatever a list shows, tasks are found by their ids in the end."""

        class Odd(Vendor):
            def _answer(self, call: Call) -> Any:
                return page if is_list(call) else super()._answer(call)

        vendor = Odd([job(f"t{i}", ends=0.0) for i in range(5)])
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(5)))
        assert now() < 3.0

    @driven
    async def test_a_success_without_voices_is_confirmed(self) -> None:
        """A list may show a success without its voices: a single query fetches them, at once."""
        jobs = [job(f"t{i}", ends=2.5, voices_listed=i > 0) for i in range(5)]
        vendor = Vendor(jobs)
        watcher = watching(vendor)
        states = await asyncio.gather(*(watcher.wait(told(j.task_id), timeout=60.0) for j in jobs))
        assert all(state.voices for state in states)
        assert now() < 3.1
        assert vendor.lists == [1.0, 2.0, 3.0]
        assert len(vendor.singles) == 1

    @driven
    async def test_a_success_without_any_voice_is_an_end(self) -> None:
        """If the single query shows no voice either, the wait ends all the same."""
        jobs = [job(f"t{i}", 2.5, voices_listed=False, voices_queried=False) for i in range(3)]
        watcher = watching(Vendor(jobs))
        states = await asyncio.gather(*(watcher.wait(told(j.task_id), timeout=60.0) for j in jobs))
        assert all(state.succeeded and not state.voices for state in states)
        assert now() < 3.1

    @driven
    async def test_the_confirming_query_may_fail(self) -> None:
        """A task whose voices are to be confirmed is queried alone until that succeeds."""
        jobs = [job(f"t{i}", ends=2.5, voices_listed=False) for i in range(5)]
        vendor = Vendor(jobs)
        failures = [ConnectionFailedError("reset")] * 5
        vendor.fault = lambda call: failures.pop() if failures and not is_list(call) else None
        watcher = watching(vendor)
        states = await asyncio.gather(*(watcher.wait(told(j.task_id), timeout=60.0) for j in jobs))
        assert all(state.voices for state in states)
        assert len(vendor.singles) == 10
        assert vendor.lists == [1.0, 2.0, 3.0]


class TestEachItsOwn:
    """One waiter's cancellation, deadline or exception is its own."""

    @driven
    async def test_a_cancellation(self) -> None:
        """A cancelled waiter takes neither the other one nor the shared read along."""
        vendor = Vendor([job("t", ends=3.5)], latency=0.3)
        watcher = watching(vendor)
        one, other = (asyncio.create_task(watcher.wait("t", timeout=60.0)) for _ in "ab")
        await until(0.2)  # a look is under way
        one.cancel()
        assert (await other).succeeded
        assert one.cancelled()
        assert vendor.singles == [0.0, 1.0, 2.0, 3.0, 4.0]

    @driven
    async def test_a_deadline(self) -> None:
        """A waiter that times out leaves the other one waiting."""
        vendor = Vendor([job("t", ends=9.5)])
        watcher = watching(vendor, GROWING)
        short, long = await gather(watcher.wait("t", timeout=2.5), watcher.wait("t", timeout=60.0))
        assert isinstance(short, WaitTimeoutError)
        assert long.succeeded

    @driven
    async def test_a_short_wait_gets_its_last_look(self) -> None:
        """Of two waiters, the one with less time is looked for just before its deadline, too."""
        vendor = Vendor([job("t", ends=5.5)])
        watcher = watching(vendor, GROWING)

        async def short() -> VoiceTask:
            await until(3.5)
            return await watcher.wait("t", timeout=2.4)

        states = await asyncio.gather(watcher.wait(told(), timeout=60.0), short())
        assert all(state.succeeded for state in states)
        assert now() < 5.9

    @driven
    async def test_an_exception_in_on_update(self) -> None:
        """An exception in one waiter's on_update ends that wait alone."""
        vendor = Vendor([job("t", ends=3.5)])
        watcher = watching(vendor)

        def broken(task: VoiceTask) -> None:
            raise ZeroDivisionError

        one, other = await gather(
            watcher.wait("t", timeout=60.0, on_update=broken), watcher.wait("t", timeout=60.0)
        )
        assert isinstance(one, ZeroDivisionError)
        assert other.succeeded

    @driven
    async def test_an_error_is_not_shared(self) -> None:
        """A failure for good ends all waits for the task, each with an error object of its own."""
        vendor = Vendor()
        vendor.fault = lambda call: PERMANENT[0]
        watcher = watching(vendor)
        errors = await gather(*(watcher.wait("t", timeout=60.0) for _ in range(3)))
        assert len({id(error) for error in errors}) == 3
        assert all(isinstance(error, AuthenticationError) for error in errors)
        assert len(vendor.calls) == 1

    @driven
    async def test_a_task_that_cannot_be_queried(self) -> None:
        """A task that the vendor refuses to show ends its own waits, and no others."""
        jobs = [job(f"t{i}", ends=3.5) for i in range(2)]
        vendor = Vendor(jobs)
        vendor.fault = lambda call: PERMANENT[1] if call.target.endswith("t0") else None
        watcher = watching(vendor)
        refused, fine = await gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(2)))
        assert isinstance(refused, PermissionDeniedError)
        assert fine.succeeded

    @pytest.mark.parametrize("count", [1, 50])
    @pytest.mark.parametrize("moment", [0.0, 0.05, 0.5, 1.0, 1.05])
    @driven
    async def test_the_last_one_to_leave_stops_the_work(self, count: int, moment: float) -> None:
        """When all have left, before, in or after a look, nothing is asked and nothing runs."""
        vendor = Vendor([job(f"t{i}") for i in range(count)], latency=0.1)
        watcher = watching(vendor)
        waits = [asyncio.create_task(watcher.wait(f"t{i}", timeout=60.0)) for i in range(count)]
        await until(moment)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await settle()
        assert vendor.in_flight == 0
        assert tasks_left() == 0
        assert watcher.idle
        asked = len(vendor.calls)
        await until(60.0)
        assert len(vendor.calls) == asked

    @driven
    async def test_leaving_the_queue(self) -> None:
        """Who leaves before its single query has begun is not queried."""
        jobs = [job(f"t{i}", ends=0.0) for i in range(100)]
        vendor = Vendor(jobs, latency=1.0)
        vendor.fault = lambda call: PERMANENT[1] if is_list(call) else None
        watcher = watching(vendor, PollingPolicy(initial=30.0, maximum=30.0, jitter=0.0))
        waits = [asyncio.create_task(watcher.wait(f"t{i}", timeout=90.0)) for i in range(100)]
        await until(1.5)
        for wait in waits[50:]:
            wait.cancel()
        await asyncio.gather(*waits[:50])
        assert len(vendor.singles) == 50
        await settle()
        assert watcher.idle
        assert tasks_left() == 0

    @driven
    async def test_a_look_ends_when_the_last_of_its_tasks_is_left(self) -> None:
        """A list request goes on for one waiter of many, and is dropped after that one."""
        vendor = Vendor([job(f"t{i}") for i in range(10)], latency=2.0)
        watcher = watching(vendor)
        waits = [asyncio.create_task(watcher.wait(f"t{i}", timeout=60.0)) for i in range(10)]
        await until(0.5)
        for wait in waits[1:]:
            wait.cancel()
        await until(0.6)
        assert vendor.in_flight == 1
        waits[0].cancel()
        await until(0.7)
        assert vendor.in_flight == 0
        await asyncio.gather(*waits, return_exceptions=True)


class TestClosing:
    """Closing ends every wait and leaves nothing behind."""

    @pytest.mark.parametrize("moment", [0.0, 0.05, 0.5, 1.0, 1.05])
    @driven
    async def test_it_ends_every_wait(self, moment: float) -> None:
        """All waits end at once with ClientClosedError, and no asyncio task is left."""
        vendor = Vendor([job(f"t{i}") for i in range(100)], latency=0.1)
        watcher = watching(vendor)
        waits = [
            asyncio.create_task(watcher.wait(f"t{i % 90}", timeout=timeout))
            for i, timeout in zip(range(100), itertools.cycle([60.0, None]), strict=False)
        ]
        await until(moment)
        await asyncio.sleep(0)
        watcher.close()
        errors = await asyncio.gather(*waits, return_exceptions=True)
        await watcher.closed()
        assert now() == pytest.approx(moment)
        assert all(isinstance(error, ClientClosedError) for error in errors)
        assert len({id(error) for error in errors}) == 100
        assert tasks_left() == 0
        assert watcher.idle
        asked = len(vendor.calls)
        await until(60.0)
        assert len(vendor.calls) == asked

    @driven
    async def test_it_waits_for_the_looks_to_end(self) -> None:
        """A request that takes its time to be cancelled has ended when the closing has."""

        class Tough(Vendor):
            async def send(self, call: Call, *, timeout: float | None = None) -> Envelope:
                try:
                    return await super().send(call, timeout=timeout)
                finally:
                    self.in_flight += 1
                    await asyncio.sleep(2.0)
                    self.in_flight -= 1

        vendor = Tough([job(f"t{i}") for i in range(9)], latency=1.0)
        watcher = watching(vendor)
        waits = [asyncio.create_task(watcher.wait(f"t{i}", timeout=60.0)) for i in range(9)]
        await until(0.5)
        watcher.close()
        await watcher.closed()
        assert vendor.in_flight == 0
        assert now() == pytest.approx(2.5)
        assert all(isinstance(error, ClientClosedError) for error in await gather(*waits))

    @driven
    async def test_no_wait_begins_after_it(self) -> None:
        """A wait that begins while the client is closing is refused."""
        watcher = watching(Vendor([job("t")]))
        watcher.close()
        with pytest.raises(ClientClosedError):
            await watcher.wait("t", timeout=60.0)
        await watcher.closed()

    @driven
    async def test_a_closed_transport_is_refused(self) -> None:
        """A wait of a closed client is refused before anything else."""
        vendor = Vendor()
        vendor.is_closed = True
        with pytest.raises(ClientClosedError):
            await watching(vendor).wait(told(status="succeed"), timeout=60.0)

    @driven
    async def test_a_transport_that_closes_meanwhile(self) -> None:
        """If the session goes away under the waits, they end with the next look."""
        vendor = Vendor([job(f"t{i}") for i in range(5)])
        watcher = watching(vendor)
        waits = asyncio.gather(
            *(watcher.wait(f"t{i}", timeout=None) for i in range(5)), return_exceptions=True
        )
        await until(1.5)
        vendor.is_closed = True
        assert all(isinstance(error, ClientClosedError) for error in await waits)
        assert now() < 2.1

    @driven
    async def test_in_an_on_update(self) -> None:
        """Closing from within an on_update ends that wait, too."""
        watcher = watching(Vendor([job("t")]))

        async def close(task: VoiceTask) -> None:
            watcher.close()
            await watcher.closed()

        with pytest.raises(ClientClosedError):
            await watcher.wait("t", timeout=60.0, on_update=close)


class TestFailures:
    """A failure that passes never ends a wait before its deadline; one for good does at once."""

    @pytest.mark.parametrize("error", TRANSIENT, ids=name)
    @pytest.mark.parametrize("count", [1, 10])
    @driven
    async def test_a_transient_one_is_outlived(self, error: KlingError, count: int) -> None:
        """While the vendor fails the waits go on, and when it recovers they end."""
        vendor = Vendor([job(f"t{i}", ends=5.0) for i in range(count)])
        vendor.fault = lambda call: error if now() < 20.0 else None
        watcher = watching(vendor)
        states = await asyncio.gather(*(watcher.wait(f"t{i}", timeout=600.0) for i in range(count)))
        assert all(state.succeeded for state in states)
        assert now() < 24.0

    @pytest.mark.parametrize("error", TRANSIENT, ids=name)
    @driven
    async def test_a_transient_one_lasts_to_the_deadline(self, error: KlingError) -> None:
        """If the vendor never recovers, it is the deadline that ends the wait."""
        vendor = Vendor([job("t")])
        vendor.fault = lambda call: error
        with pytest.raises(WaitTimeoutError):
            await watching(vendor).wait(told(), timeout=30.0)
        assert now() == 30.0

    @pytest.mark.parametrize("error", PERMANENT, ids=name)
    @pytest.mark.parametrize("count", [1, 10])
    @driven
    async def test_a_permanent_one_ends_the_wait(self, error: KlingError, count: int) -> None:
        """A failure that no patience mends ends every wait with the look that meets it."""
        vendor = Vendor([job(f"t{i}") for i in range(count)])
        vendor.fault = lambda call: error if now() > 3.0 else None
        watcher = watching(vendor)
        errors = await gather(*(watcher.wait(told(f"t{i}"), timeout=600.0) for i in range(count)))
        assert {type(each) for each in errors} == {type(error)}
        assert now() < 3.1
        await settle()
        assert watcher.idle

    @pytest.mark.parametrize("error", [PERMANENT[0], *PERMANENT[2:4]], ids=name)
    @driven
    async def test_what_concerns_the_account_is_asked_once(self, error: KlingError) -> None:
        """A thousand waits end by the one list request that was refused for the account."""
        vendor = Vendor()
        vendor.fault = lambda call: error
        watcher = watching(vendor)
        errors = await gather(*(watcher.wait(f"t{i}", timeout=600.0) for i in range(1000)))
        assert {type(each) for each in errors} == {type(error)}
        assert len(vendor.calls) == 1

    @driven
    async def test_a_bug_does_not_hang_the_waits(self) -> None:
        """Even an exception that nobody foresaw ends the waits instead of stalling them."""
        vendor = Vendor()

        def broken(call: Call) -> KlingError | None:
            raise ZeroDivisionError

        vendor.fault = broken
        watcher = watching(vendor)
        errors = await gather(*(watcher.wait(f"t{i}", timeout=600.0) for i in range(10)))
        assert {type(each) for each in errors} == {ZeroDivisionError}

    @driven
    async def test_a_look_that_is_cancelled_from_outside(self) -> None:
        """If something else cancels the look, the wait goes on with the next one."""
        vendor = Vendor([job("t", ends=0.0)], latency=0.5)
        watcher = watching(vendor)
        wait = asyncio.create_task(watcher.wait("t", timeout=60.0))
        await until(0.2)
        for task in asyncio.all_tasks() - {wait, asyncio.current_task()}:
            task.cancel()
        assert (await wait).succeeded
        assert now() < 2.0

    @driven
    async def test_an_id_that_cannot_be_asked_for(self) -> None:
        """A VoiceTask whose id cannot stand in a URL is refused at once, unless it has ended."""
        vendor = Vendor()
        watcher = watching(vendor)
        for task_id in ("", ".", ".."):
            with pytest.raises(InvalidRequestError) as caught:
                await watcher.wait(told(task_id), timeout=60.0)
            assert caught.value.field == "task"
        assert (await watcher.wait(told("..", "failed"), timeout=60.0)).failed
        assert vendor.calls == []
        assert now() == 0.0

    @driven
    async def test_an_answer_that_is_no_task(self) -> None:
        """A single answer that is not readable is a passing failure."""

        class Odd(Vendor):
            def _answer(self, call: Call) -> Any:
                return super()._answer(call) if now() > 5.0 else ["not", "a", "task"]

        assert (await watching(Odd([job("t", ends=0.0)])).wait("t", timeout=60.0)).succeeded
        assert 5.0 < now() < 6.1

    @driven
    async def test_a_stumble_is_made_up_for(self) -> None:
        """After one failure the next look is at the next tick, however rare looks have become."""
        vendor = Vendor([job("t", ends=14.0)])
        vendor.fault = lambda call: ConnectionFailedError("reset") if 14.5 < now() < 15.5 else None
        await watching(vendor, GROWING).wait(told(), timeout=60.0)
        assert vendor.singles == [1.0, 3.0, 7.0, 15.0, 16.0]

    @driven
    async def test_a_lasting_failure_is_not_hurried(self) -> None:
        """While the vendor goes on failing, looks become ever rarer."""
        vendor = Vendor([job("t")])
        vendor.fault = lambda call: ConnectionFailedError("reset")
        with pytest.raises(WaitTimeoutError):
            await watching(vendor, GROWING).wait(told(), timeout=33.0)
        assert vendor.singles[:-1] == [1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0]

    @driven
    async def test_a_retry_after_is_honoured(self) -> None:
        """When the vendor asks to be left alone, nothing is asked until then, by anyone."""
        vendor = Vendor([job(f"t{i}", ends=0.0) for i in range(9)])
        limit = [RateLimitError("1302", code=1302, http_status=429, retry_after=7.5)]
        vendor.fault = lambda call: limit.pop() if limit else None
        watcher = watching(vendor)
        waits = [asyncio.create_task(watcher.wait("t0", timeout=60.0))]
        await until(1.0)
        waits += [asyncio.create_task(watcher.wait(f"t{i}", timeout=60.0)) for i in range(9)]
        await asyncio.gather(*waits)
        assert vendor.singles == [0.0]
        assert vendor.lists == [pytest.approx(7.51)]

    @driven
    async def test_a_look_that_is_due_meanwhile_honours_it_too(self) -> None:
        """A look is not sent even if its moment comes while the plea for a pause is being read."""
        vendor = Vendor([job(f"t{i}", ends=0.0) for i in range(4)])
        vendor.latency = lambda call: 0.01 if is_list(call) else 0.99
        limit = [RateLimitError("1302", code=1302, http_status=429, retry_after=7.5)]
        vendor.fault = lambda call: limit.pop() if limit else None
        watcher = watching(vendor)
        asyncio.get_running_loop().call_at(START + 0.99, lag, 0.02)
        await asyncio.gather(
            watcher.wait("t0", timeout=60.0),
            *(watcher.wait(told(f"t{i}"), timeout=60.0) for i in range(1, 4)),
        )
        assert vendor.singles == [0.0]
        assert vendor.lists == [pytest.approx(1.01 + 7.5)]

    @driven
    async def test_queued_queries_honour_it_too(self) -> None:
        """Queries that wait for their turn when the vendor asks for a pause are not sent."""
        vendor = Vendor([job(f"t{i}", ends=0.0, hidden=True) for i in range(200)])
        vendor.latency = lambda call: 0.01 if is_list(call) else 0.5 + random.random() / 10
        limit = [RateLimitError("1302", code=1302, http_status=429, retry_after=20.0)]
        vendor.fault = lambda call: limit.pop() if limit and not is_list(call) else None
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(f"t{i}", timeout=600.0) for i in range(200)))
        assert not [moment for moment, _ in vendor.calls if 0.7 < moment < 20.4]
        assert now() < 30.0

    @driven
    async def test_a_retry_after_beyond_the_deadline(self) -> None:
        """A pause that outlasts the wait does not prolong it, and ends in no request."""
        vendor = Vendor([job("t")])
        vendor.fault = lambda call: RateLimitError(code=1302, http_status=429, retry_after=50.0)
        watcher = watching(vendor)
        with pytest.raises(WaitTimeoutError):
            await watcher.wait("t", timeout=20.0)
        assert now() == 20.0
        await until(100.0)
        assert len(vendor.calls) == 1

    @driven
    async def test_an_absurd_retry_after(self) -> None:
        """A Retry-After of thirty years blinds a wait for a minute."""
        vendor = Vendor([job("t", ends=0.0)])
        limit = [RateLimitError("1302", code=1302, http_status=429, retry_after=1e9)]
        vendor.fault = lambda call: limit.pop() if limit else None
        await watching(vendor).wait("t", timeout=None)
        assert now() < 61.0

    @driven
    async def test_a_vendor_in_trouble_is_not_hammered(self) -> None:
        """A thousand waits outlive a long outage with a few requests a second."""
        vendor = Vendor([job(f"t{i}", ends=5.0) for i in range(1000)])
        vendor.fault = lambda call: (
            ServerError(code=5001, http_status=503) if 4.5 < now() < 300.0 else None
        )
        watcher = watching(vendor, USUAL)
        await asyncio.gather(*(watcher.wait(told(f"t{i}"), timeout=600.0) for i in range(1000)))
        assert now() < 312.0
        assert len([1 for moment, _ in vendor.calls if moment < 300.0]) < 300 * 8

    @pytest.mark.parametrize("seed", range(3))
    @driven
    async def test_many_failures_at_random(self, seed: int) -> None:
        """With every third request failing, in every way, all waits end soon after their task."""
        rng = random.Random(seed)
        jobs = [job(f"t{i}", ends=rng.uniform(0.0, 20.0)) for i in range(200)]
        vendor = Vendor(jobs)
        vendor.fault = lambda call: rng.choice(TRANSIENT[:3]) if rng.random() < 0.33 else None
        vendor.latency = lambda call: 60.0 if rng.random() < 0.02 else rng.random() / 10
        watcher = watching(vendor, USUAL)
        await asyncio.gather(*(watcher.wait(told(one.task_id), timeout=600.0) for one in jobs))
        assert now() < 60.0
        await settle()
        assert watcher.idle

    @driven
    async def test_logged_once_and_not_a_thousand_times(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A failure that passes is told at WARNING when it begins, and quietly from then on."""
        vendor = Vendor([job("t", ends=20.5)])
        vendor.fault = lambda call: ConnectionFailedError("reset") if 5.5 < now() < 10.5 else None
        with caplog.at_level(logging.DEBUG, "kling_voice"):
            await watching(vendor).wait("t", timeout=60.0)
        warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "Looking at 1 task(s) failed, and goes on: reset" in warnings[0].getMessage()
        assert len(caplog.records) == 5


class TestReadLag:
    """Not found soon after the create is read lag."""

    @pytest.mark.parametrize("count", [1, 10])
    @driven
    async def test_within_the_grace(self, count: int) -> None:
        """A task that reads show only after nine seconds is waited for."""
        vendor = Vendor([job(f"t{i}", ends=12.0, visible=9.0) for i in range(count)])
        watcher = watching(vendor)
        states = await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(count)))
        assert all(state.succeeded for state in states)
        assert now() < 13.1

    @driven
    async def test_after_the_grace(self) -> None:
        """A task that is not known for ten seconds is not known."""
        with pytest.raises(NotFoundError):
            await watching(Vendor()).wait("t", timeout=60.0)
        assert 10.0 < now() < 11.1

    @driven
    async def test_long_after_the_create(self) -> None:
        """A task that disappears ends its wait when it has not been seen for ten seconds."""
        vendor = Vendor([job("t")])
        watcher = watching(vendor)
        wait = asyncio.create_task(watcher.wait("t", timeout=600.0))
        await until(30.5)
        vendor.listed.clear()
        with pytest.raises(NotFoundError):
            await wait
        assert 40.0 < now() < 41.1

    @driven
    async def test_a_task_that_was_seen_a_moment_ago(self) -> None:
        """A "not found" between two sights of a task is read lag, however long it is waited for."""
        vendor = Vendor([job("t", ends=30.5)])
        missing = NotFoundError("x", code=1203, http_status=404)
        vendor.fault = lambda call: missing if now() % 10 > 4.5 else None
        assert (await watching(vendor).wait("t", timeout=60.0)).succeeded
        assert now() < 31.1

    @driven
    async def test_a_sight_in_the_list_counts(self) -> None:
        """A task that only the list shows is known, though its status has not changed for long."""
        jobs = [job(f"t{i}", ends=30.5) for i in range(3)]
        vendor = Vendor(jobs)
        missing = NotFoundError("x", code=1203, http_status=404)
        vendor.fault = lambda call: missing if not is_list(call) and now() < 30.5 else None
        watcher = watching(vendor)
        waits = asyncio.gather(*(watcher.wait(one.task_id, timeout=60.0) for one in jobs))
        await until(25.5)
        jobs[0].hidden = True
        assert all(state.succeeded for state in await waits)
        assert len(vendor.singles) <= 6 + 7  # witnesses

    @driven
    async def test_each_wait_has_its_own_grace(self) -> None:
        """Who waits for an unknown id from later on has ten seconds, too, and shares the looks."""
        vendor = Vendor([job("t", ends=12.0, external="e", visible=11.5)])
        watcher = watching(vendor)

        async def later() -> VoiceTask:
            await until(9.5)
            return await watcher.wait("e", timeout=60.0)

        first, second = await gather(watcher.wait("e", timeout=60.0), later())
        assert isinstance(first, NotFoundError)
        assert second.succeeded
        assert len(vendor.calls) <= 14
        assert watcher.idle

    @driven
    async def test_one_that_is_not_known_harms_no_other(self) -> None:
        """Among many waits, one for an unknown task ends alone."""
        vendor = Vendor([job(f"t{i}", ends=20.5) for i in range(10)])
        watcher = watching(vendor)
        *fine, unknown = await gather(
            *(watcher.wait(f"t{i}", timeout=60.0) for i in range(10)),
            watcher.wait("nobody", timeout=60.0),
        )
        assert all(state.succeeded for state in fine)
        assert isinstance(unknown, NotFoundError)


class TestUpdates:
    """on_update is called once for each change from the last one known, in order."""

    LIFE = ((0.0, "submitted"), (2.5, "processing"), (5.5, "succeed"))

    @pytest.mark.parametrize("count", [1, 5])
    @driven
    async def test_each_change_once(self, count: int) -> None:
        """From an id, every status is new; it is told when it is seen, and only once."""
        vendor = Vendor([Job(f"t{i}", timeline=list(self.LIFE)) for i in range(count)])
        watcher = watching(vendor)
        seen: dict[str, list[tuple[str, float]]] = {}

        def note(task: VoiceTask) -> None:
            seen.setdefault(task.task_id, []).append((str(task.task_status), round(now())))

        await asyncio.gather(
            *(watcher.wait(f"t{i}", timeout=60.0, on_update=note) for i in range(count))
        )
        expected = [("submitted", 0), ("processing", 3), ("succeed", 6)]
        assert seen == {f"t{i}": expected for i in range(count)}

    @driven
    async def test_from_the_state_that_was_given(self) -> None:
        """A status that the caller's VoiceTask has is no change."""
        for known, expected in (
            ("submitted", ["processing", "succeed"]),
            ("processing", ["succeed"]),
        ):
            moment = now()
            life = [(0.0, "submitted"), (moment + 2.5, "processing"), (moment + 5.5, "succeed")]
            seen: list[VoiceTask] = []
            watcher = watching(Vendor([Job("t", timeline=life)]))
            await watcher.wait(told(status=known), timeout=60.0, on_update=seen.append)
            assert [task.task_status for task in seen] == expected

    @driven
    async def test_a_coroutine_function_is_awaited(self) -> None:
        """An async on_update is awaited before the wait goes on, and for every change in turn."""
        vendor = Vendor([Job("t", timeline=list(self.LIFE))])
        seen: list[str] = []

        async def slow(task: VoiceTask) -> None:
            await asyncio.sleep(4.0)
            seen.append(task.task_status)

        ended = await watching(vendor).wait("t", timeout=60.0, on_update=slow)
        assert ended.succeeded
        assert seen == ["submitted", "processing", "succeed"]
        assert now() == pytest.approx(12.01)

    @driven
    async def test_a_slow_one_delays_nobody_else(self) -> None:
        """While one waiter is busy with an update, the others of the task are told in time."""
        vendor = Vendor([Job("t", timeline=list(self.LIFE))])
        watcher = watching(vendor)

        async def slow(task: VoiceTask) -> None:
            await asyncio.sleep(100.0)

        busy = asyncio.create_task(watcher.wait("t", timeout=None, on_update=slow))
        await watcher.wait("t", timeout=60.0)
        assert now() < 6.1
        assert (await busy).succeeded

    @driven
    async def test_an_end_that_came_in_time_counts(self) -> None:
        """An end seen before the deadline is returned, though an update takes longer than that."""
        vendor = Vendor([job("t", ends=2.5)])
        seen: list[str] = []

        async def slow(task: VoiceTask) -> None:
            await asyncio.sleep(10.0)
            seen.append(task.task_status)

        ended = await watching(vendor).wait("t", timeout=5.0, on_update=slow)
        assert ended.succeeded
        assert seen == ["submitted", "succeed"]

    @driven
    async def test_nothing_is_asked_for_one_who_is_busy_at_the_deadline(self) -> None:
        """A deadline that passes during an update ends the looks then, and the wait after it."""
        vendor = Vendor([job("t", ends=8.0)])

        async def slow(task: VoiceTask) -> None:
            await asyncio.sleep(20.0)

        vendor.latency = lambda call: 0.01 if now() < 4.0 else 2.5
        watcher = watching(vendor)
        wait = asyncio.create_task(watcher.wait("t", timeout=5.1, on_update=slow))
        await until(5.0)
        assert vendor.in_flight == 1
        await until(5.2)
        assert vendor.in_flight == 0
        with pytest.raises(WaitTimeoutError):
            await wait
        assert now() == pytest.approx(20.01)
        assert max(vendor.singles) < 5.1
        assert watcher.idle

    @driven
    async def test_an_exception_reaches_the_caller(self) -> None:
        """An exception in a function or a coroutine function ends the wait with it."""

        def broken(task: VoiceTask) -> None:
            raise ZeroDivisionError

        async def also_broken(task: VoiceTask) -> None:
            raise ZeroDivisionError

        for on_update in (broken, also_broken):
            watcher = watching(Vendor([job("t")]))
            with pytest.raises(ZeroDivisionError):
                await watcher.wait("t", timeout=60.0, on_update=on_update)
            await settle()
            assert watcher.idle
            assert tasks_left() == 0

    @driven
    async def test_one_who_comes_later_is_told_what_is_known(self) -> None:
        """A second waiter learns the state at once, without a request."""
        vendor = Vendor([job("t", ends=9.5)])
        watcher = watching(vendor, GROWING)
        first = asyncio.create_task(watcher.wait("t", timeout=60.0))
        await until(3.0)
        seen: list[tuple[str, float]] = []
        await watcher.wait(
            "t", timeout=60.0, on_update=lambda t: seen.append((t.task_status, now()))
        )
        assert seen[0] == ("submitted", 3.0)
        await first
        assert len(vendor.singles) <= 5

    @pytest.mark.parametrize("given_task", [True, False])
    @driven
    async def test_a_status_never_goes_backwards(self, given_task: bool) -> None:
        """A list that lags behind single queries takes nothing back."""
        life = [(0.0, "submitted"), (2.2, "processing"), (9.5, "succeed")]
        jobs = [Job(f"t{i}", timeline=life, lag=3.0) for i in range(5)]
        vendor = Vendor(jobs)
        watcher = watching(vendor)
        seen: list[str] = []

        async def others() -> None:
            await until(3.5)
            waits = (watcher.wait(told(f"t{i}"), timeout=60.0) for i in range(1, 5))
            await asyncio.gather(*waits)

        states = await asyncio.gather(
            watcher.wait(
                told("t0") if given_task else "t0",
                timeout=60.0,
                on_update=lambda task: seen.append(task.task_status),
            ),
            others(),
        )
        assert states[0].succeeded
        assert seen == ["submitted", "processing", "succeed"][given_task:]


class TestFrozenList:
    """A list that a cache answers with what once was does not starve those whom it shows."""

    @pytest.mark.parametrize("count", [3, 20, 1000])
    @pytest.mark.parametrize("ends", [9.0, 60.0])
    @driven
    async def test_it_is_found_out(self, count: int, ends: float) -> None:
        """Waits end before long though the list shows their tasks as processing for ever."""
        life = [(0.0, "submitted"), (2.0, "processing"), (ends, "succeed")]
        vendor = Vendor([Job(f"t{i}", timeline=life) for i in range(count)])
        vendor.frozen = 5.0
        watcher = watching(vendor, USUAL)
        waits = (watcher.wait(told(f"t{i}"), timeout=600.0) for i in range(count))
        states = await asyncio.gather(*waits)
        assert all(state.succeeded for state in states)
        assert now() <= ends + 35.0
        assert len(vendor.calls) <= 2 * count + 60
        assert watcher.idle

    @driven
    async def test_what_the_caller_knows_is_a_witness_too(self) -> None:
        """A list that shows less than a VoiceTask told, and goes on to, is not believed."""
        jobs = [job(f"t{i}", ends=9.0) for i in range(5)]
        vendor = Vendor(jobs)
        vendor.frozen = 0.0
        watcher = watching(vendor)
        waits = (watcher.wait(told(one.task_id, "processing"), timeout=60.0) for one in jobs)
        assert all(state.succeeded for state in await asyncio.gather(*waits))

    @driven
    async def test_whom_the_earlier_pages_showed_is_queried_alone_at_once(self) -> None:
        """What the last page denies speaks against all the pages that were read before it."""
        jobs = [job(f"t{i}", ends=3.0) for i in range(150)]
        vendor = Vendor(jobs)
        vendor.page_cap = 100
        vendor.frozen = 0.0
        watcher = watching(vendor)
        last = watcher.wait(told("t149", "processing"), timeout=60.0)
        await asyncio.gather(last, *(watcher.wait(f"t{i}", timeout=60.0) for i in range(149)))
        assert now() <= 8.0  # lists are believed for 5 s
        assert watcher.idle

    @driven
    async def test_a_thaw_is_noticed(self) -> None:
        """A list that has thawed is of use again."""
        jobs = [job(f"t{i}", ends=9.0 if i < 10 else 300.5) for i in range(200)]
        vendor = Vendor(jobs)
        vendor.frozen = 5.0
        watcher = watching(vendor)
        waits = asyncio.gather(*(watcher.wait(told(j.task_id), timeout=600.0) for j in jobs))
        await until(100.0)
        vendor.frozen = float("inf")
        await until(180.0)
        queried = len(vendor.singles)
        assert all(state.succeeded for state in await waits)
        assert len(vendor.singles) - queried <= 2 * 120 / 4 + 2
        assert now() <= 302.0

    @driven
    async def test_a_list_that_lags_is_believed(self) -> None:
        """A list that is a few seconds behind is as good as any; one query in many checks it."""
        jobs = [job(f"t{i}", ends=20.0 + i / 20, lag=3.0) for i in range(1000)]
        vendor = Vendor(jobs)
        watcher = watching(vendor)
        await asyncio.gather(*(watcher.wait(told(j.task_id), timeout=600.0) for j in jobs))
        assert now() <= 75.0
        assert len(vendor.calls) <= 1000 * 0.12 + 10 * 75 / 4


class TestStatuses:
    """An unknown status is not terminal."""

    @driven
    async def test_it_is_waited_on_and_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """A word that this version does not know is told once, however many tasks bear it."""
        life = [(0.0, "submitted"), (1.5, "reviewing"), (30.0, "succeed")]
        vendor = Vendor([Job(f"t{i}", timeline=life) for i in range(9)])
        watcher = watching(vendor)
        with caplog.at_level(logging.WARNING, "kling_voice"):
            await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(9)))
        assert [record.getMessage() for record in caplog.records] == [
            "Unknown task status 'reviewing': waiting on"
        ]

    @driven
    async def test_it_lasts_to_the_deadline(self) -> None:
        """A task that stays in an unknown state times out, and the error shows it."""
        vendor = Vendor([Job("t", timeline=[(0.0, "limbo")])])
        with pytest.raises(WaitTimeoutError, match="'limbo'"):
            await watching(vendor).wait("t", timeout=20.0)
        assert now() == 20.0

    @driven
    async def test_a_vendor_full_of_new_words(self, caplog: pytest.LogCaptureFixture) -> None:
        """Endless new words are neither told nor remembered without end."""
        life = [(float(n), f"word-{n}") for n in range(300)] + [(300.0, "succeed")]
        vendor = Vendor([Job("t", timeline=life)])
        with caplog.at_level(logging.WARNING, "kling_voice"):
            await watching(vendor).wait("t", timeout=600.0)
        assert len(caplog.records) == 100


class TestCallbacks:
    """What callbacks bring ends waits at once, or hastens a look."""

    @driven
    async def test_a_delivered_end_ends_the_wait(self) -> None:
        """A state that is surely the vendor's ends the wait in the same moment."""
        vendor = Vendor([job("t", ends=5.0, external="e")])
        watcher = watching(vendor, GROWING, slow=True)
        waits = [asyncio.create_task(watcher.wait(one, timeout=60.0)) for one in ("t", told())]
        await until(5.0)
        assert watcher.deliver(told(status="succeed"))
        states = await asyncio.gather(*waits)
        assert now() == 5.0
        assert all(state.voices for state in states)
        assert watcher.idle

    @driven
    async def test_by_the_external_id_too(self) -> None:
        """A callback that bears both ids reaches who waits by either."""
        watcher = watching(Vendor([job("t", external="e")]), slow=True)
        wait = asyncio.create_task(watcher.wait("e", timeout=60.0))
        await asyncio.sleep(0)
        assert watcher.deliver(told(status="failed", task_info={"external_task_id": "e"}))
        assert (await wait).failed

    @driven
    async def test_of_what_nobody_waits_for(self) -> None:
        """A callback of a task that nobody waits for is not taken, and leaves nothing behind."""
        watcher = watching(Vendor())
        assert not watcher.deliver(told(status="succeed"))
        watcher.prompt("t", "e")
        watcher.prompt(None, None)
        assert watcher.idle

    @driven
    async def test_an_older_state_changes_nothing(self) -> None:
        """Callbacks that come out of order take nothing back."""
        watcher = watching(Vendor([job("t")]), slow=True)
        seen: list[str] = []
        wait = asyncio.create_task(
            watcher.wait("t", timeout=60.0, on_update=lambda t: seen.append(t.task_status))
        )
        await until(0.5)
        for status in ("processing", "submitted", "processing", "succeed", "processing"):
            watcher.deliver(told(status=status))
        await wait
        assert seen == ["submitted", "processing", "succeed"]

    @driven
    async def test_a_success_without_voices_is_confirmed(self) -> None:
        """A callback may leave the voices out: the task is queried at once."""
        vendor = Vendor([job("t", ends=0.0)])
        watcher = watching(vendor, GROWING, slow=True)
        wait = asyncio.create_task(watcher.wait(told(), timeout=60.0))
        await until(2.0)
        watcher.deliver(told(status="succeed", task_result=None))
        assert (await wait).voices
        assert vendor.singles == [2.0]

    @driven
    async def test_one_that_came_before_the_wait(self) -> None:
        """What a callback told before anyone waited is known when the wait begins."""
        vendor = Vendor()
        ended = told(status="succeed")
        watcher = watching(vendor, kept={"t": ended, "e": ended}.get)
        for task in ("t", "e", told()):
            assert await watcher.wait(task, timeout=60.0) is ended
        assert vendor.calls == []
        assert watcher.idle

    @driven
    async def test_a_kept_success_without_voices_is_confirmed(self) -> None:
        """A kept success that leaves the voices out makes the first look come at once."""
        vendor = Vendor([job("t", ends=0.0)])
        watcher = watching(vendor, kept=lambda task_id: told(status="succeed", task_result=None))
        assert (await watcher.wait(told(), timeout=60.0)).voices
        assert vendor.singles == [0.0]

    @driven
    async def test_an_earlier_state_that_was_kept(self) -> None:
        """A kept state that is no end is told, and the wait goes on from there."""
        vendor = Vendor([job("t", ends=2.5)])
        watcher = watching(vendor, kept=lambda task_id: told(status="processing"))
        seen: list[str] = []
        await watcher.wait("t", timeout=60.0, on_update=lambda t: seen.append(t.task_status))
        assert seen == ["processing", "succeed"]
        assert vendor.singles == [0.0, 1.0, 2.0, 3.0]

    @driven
    async def test_what_was_kept_may_be_old(self) -> None:
        """A mere id is looked at at once, though a callback told a state of it some time ago."""
        vendor = Vendor([job("t", ends=0.0)])
        kept = {"t": told(status="processing")}
        await watching(vendor, GROWING, slow=True, kept=kept.get).wait("t", timeout=600.0)
        assert vendor.singles == [0.0]

    @driven
    async def test_a_callback_that_names_the_other_id(self) -> None:
        """What was told by task_id reaches who waits by external id once both are known as one."""
        vendor = Vendor([job("t", external="e")], latency=0.2)
        kept: dict[str, VoiceTask] = {}
        watcher = watching(vendor, GROWING, slow=True, kept=kept.get)
        wait = asyncio.create_task(watcher.wait("e", timeout=600.0))
        await until(0.1)
        kept["t"] = told(status="succeed")
        assert not watcher.deliver(kept["t"])
        assert (await wait) is kept["t"]
        assert now() == pytest.approx(0.2)
        assert watcher.idle

    @driven
    async def test_callbacks_are_attached_to_by_a_wait_that_begins(self) -> None:
        """A wait lets callbacks reach it, then asks what was kept; a refused one does neither."""
        vendor, events = Vendor(), list[object]()

        def kept(task_id: str) -> VoiceTask | None:
            events.append(task_id)
            return told(status="succeed")

        watcher = watching(vendor, kept=kept, attach=events.append)
        await watcher.wait(told(status="succeed"), timeout=60.0)
        vendor.is_closed = True
        with pytest.raises(ClientClosedError):
            await watcher.wait("t", timeout=60.0)
        assert events == []
        vendor.is_closed = False
        await watcher.wait("t", timeout=60.0)
        assert events == [watcher, "t"]
        watcher.close()
        with pytest.raises(ClientClosedError):
            await watcher.wait("t", timeout=60.0)
        assert len(events) == 2

    @driven
    async def test_a_success_that_does_not_show_yet(self) -> None:
        """A success told without voices is asked for at the next ticks, while reads lag behind."""
        vendor = Vendor([job("t", ends=13.5)])
        watcher = watching(vendor, GROWING, slow=True)
        wait = asyncio.create_task(watcher.wait(told(), timeout=600.0))
        await until(10.0)
        watcher.deliver(told(status="succeed", task_result=None))
        assert (await wait).voices
        assert vendor.singles == [8.0, 10.0, 11.0, 12.0, 13.0, 14.0]

    @pytest.mark.parametrize("count", [1, 3])
    @driven
    async def test_a_success_that_never_shows(self, count: int) -> None:
        """After eight ticks such a success is asked for no more often than any other task."""
        jobs = [job(f"t{i}") for i in range(count)]
        vendor = Vendor(jobs)
        watcher = watching(vendor, GROWING, slow=True)
        waits = [watcher.wait(told(one.task_id), timeout=79.0) for one in jobs]
        waiting = asyncio.gather(*waits, return_exceptions=True)
        await until(1.0)
        for one in jobs:
            watcher.deliver(told(one.task_id, "succeed", task_result=None))
        assert all(isinstance(error, WaitTimeoutError) for error in await waiting)
        ticks = [float(tick) for tick in range(1, 10)]
        assert sorted({round(moment, 2) for moment in vendor.singles})[:9] == ticks
        assert len(vendor.singles) <= count * (9 + 70 / 8 + 2)
        assert vendor.lists == []

    @driven
    async def test_a_prompt_outlasts_an_older_list(self) -> None:
        """A prompt stands, though a list shows its task that was asked for before it came."""
        vendor = Vendor([job(f"t{i}") for i in range(4)] + [job("w", ends=8.02, lag=0.1)])
        vendor.latency = lambda call: 0.05
        watcher = watching(vendor, GROWING, slow=True)
        others = [asyncio.create_task(watcher.wait(told(f"t{i}"), timeout=None)) for i in range(4)]
        await until(4.0)
        wait = asyncio.create_task(watcher.wait(told("w"), timeout=600.0))
        await until(8.03)
        watcher.prompt("w", None)
        assert (await wait).succeeded
        assert now() < 8.5
        for other in others:
            other.cancel()

    @driven
    async def test_a_prompt_hastens_the_look(self) -> None:
        """An unproven callback brings about a look at once, by either id."""
        vendor = Vendor([job("t", ends=2.0, external="e"), job("u", ends=4.0)])
        watcher = watching(vendor, GROWING, slow=True)
        task = told(task_info={"external_task_id": "e"})
        waits = asyncio.gather(*(watcher.wait(w, timeout=60.0) for w in (task, told("u"))))
        await until(2.0)
        watcher.prompt(None, "e")
        await until(4.0)
        watcher.prompt("u", None)
        await waits
        assert vendor.singles == [2.0, 4.0]

    @driven
    async def test_many_prompts_are_few_looks(self) -> None:
        """However many unproven callbacks come, a task is looked at twice a second at most."""
        vendor = Vendor([job("t", ends=9.9)])
        watcher = watching(vendor, GROWING, slow=True)
        wait = asyncio.create_task(watcher.wait("t", timeout=60.0))
        while not wait.done():
            watcher.prompt("t", None)
            watcher.prompt("t", "e")
            await asyncio.sleep(0.01)
        assert now() < 10.6
        assert len(vendor.singles) <= 22
        gaps = [later - sooner for sooner, later in itertools.pairwise(vendor.singles)]
        assert min(gaps) >= 0.5 - 1e-6

    @driven
    async def test_a_prompt_during_a_look(self) -> None:
        """A callback that comes while the task is looked at brings about another look after it."""
        vendor = Vendor([job("t", ends=0.5)], latency=0.6)

        class Stale(Vendor):
            def _answer(self, call: Call) -> Any:
                return job("t").shape(0.0) if len(self.calls) == 1 else super()._answer(call)

        vendor = Stale(vendor.listed, latency=0.6)
        watcher = watching(vendor, GROWING, slow=True)
        wait = asyncio.create_task(watcher.wait("t", timeout=60.0))
        await until(0.55)
        watcher.prompt("t", None)
        await wait
        assert vendor.singles == [0.0, pytest.approx(0.6)]

    @driven
    async def test_prompts_for_many_tasks_are_merged(self) -> None:
        """A storm of unproven callbacks of a thousand tasks is a few list requests."""
        vendor = Vendor([job(f"t{i}", ends=3.0) for i in range(1000)])
        watcher = watching(vendor, GROWING, slow=True)
        waits = asyncio.gather(*(watcher.wait(told(f"t{i}"), timeout=60.0) for i in range(1000)))
        await until(3.0)
        for number in range(1000):
            watcher.prompt(f"t{number}", None)
            await asyncio.sleep(0.001)
        await waits
        assert now() < 4.2
        assert len(vendor.lists) <= 12
        assert len(vendor.singles) <= 30

    @driven
    async def test_a_callback_joins_those_who_wait_by_either_id(self) -> None:
        """Two waits that turn out to be for one task go on together, whoever's time is up."""
        vendor = Vendor([job("t", ends=20.0, external="e")], latency=2.0)
        vendor.fault = lambda call: ConnectionFailedError("reset") if now() < 8.0 else None
        watcher = watching(vendor)
        short = asyncio.create_task(watcher.wait("t", timeout=5.0))
        long = asyncio.create_task(watcher.wait("e", timeout=None))
        await until(4.9)  # no time is left for another look at the one
        watcher.deliver(told(status="processing", task_info={"external_task_id": "e"}))
        with pytest.raises(WaitTimeoutError):
            await short
        assert (await long).succeeded
        assert now() < 26.0


class TestIdsThatCollide:
    """A wait ends with its own task, though another's external id is the same as its task_id."""

    OTHER = told("u", "succeed", task_info={"external_task_id": "t"})

    @pytest.mark.parametrize("count", [1, 3])
    @driven
    async def test_in_answers(self, count: int) -> None:
        """Neither a list nor a query that shows the other task ends the wait."""
        others = [job("u", ends=1.5, external="t"), *(job(f"x{i}") for i in range(count - 1))]
        vendor = Vendor([*others, job("t", ends=20.5)])
        watcher = watching(vendor)
        rest = [asyncio.create_task(watcher.wait(f"x{i}", timeout=None)) for i in range(count - 1)]
        if count == 1:  # the vendor mistakes the one for the other, for a while
            asyncio.get_running_loop().call_at(START + 10.0, vendor.listed.pop, 0)
        ended = await watcher.wait(told("t"), timeout=60.0)
        assert ended.task_id == "t"
        assert 20.5 < now() < 21.1
        for one in rest:
            one.cancel()

    @driven
    async def test_in_callbacks(self) -> None:
        """Neither a callback of the other task nor one that was kept ends the wait."""
        vendor = Vendor([job("t", ends=5.5)])
        watcher = watching(vendor, kept=lambda task_id: self.OTHER)
        wait = asyncio.create_task(watcher.wait(told("t"), timeout=60.0))
        await until(0.5)
        assert not watcher.deliver(self.OTHER)
        watcher.prompt("u", "t")
        assert (await wait).task_id == "t"
        assert vendor.singles == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
    @driven
    async def test_both_are_waited_for(self, order: tuple[int, ...]) -> None:
        """Whoever comes first, both waits end with their own task, and the mere id with either."""
        vendor = Vendor([job("u", ends=2.5, external="t"), job("t", ends=4.5)])
        vendor.fault = lambda call: ConnectionFailedError("reset") if now() < 1.5 else None
        watcher = watching(vendor)
        tasks: list[VoiceTask | str] = [
            told("t"),
            told("u", task_info={"external_task_id": "t"}),
            "t",
        ]
        waits: dict[int, asyncio.Task[VoiceTask]] = {}
        for number in order:
            waits[number] = asyncio.create_task(watcher.wait(tasks[number], timeout=60.0))
            await until(now() + 0.1)
        vendor.listed.reverse()
        states = await asyncio.gather(*(waits[number] for number in range(3)))
        assert [state.task_id for state in states[:2]] == ["t", "u"]
        assert states[2].task_id in ("t", "u")
        assert watcher.idle

    @driven
    async def test_who_came_by_the_other_id_leaves(self) -> None:
        """A wait whose id turned out to be another task's as well still ends at its deadline."""
        vendor = Vendor([job("u", external="t"), job("t")])
        watcher = watching(vendor)
        waits = [asyncio.create_task(watcher.wait("t", timeout=3.0))]
        await until(0.5)
        waits.append(asyncio.create_task(watcher.wait(told("t"), timeout=6.0)))
        one, other = await gather(*waits)
        assert isinstance(one, WaitTimeoutError)
        assert isinstance(other, WaitTimeoutError)
        assert one.task is not None
        assert one.task.task_id == "u"
        assert now() == pytest.approx(6.5)
        assert watcher.idle


class TestChaos:
    """Whatever comes together, every wait ends as it must, and nothing is left."""

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_every_wait_ends_as_it_must(self, data: st.DataObject) -> None:
        """Waits, cancellations, callbacks and failures at any moments: all end right, in time."""
        moments = st.floats(0.0, 20.0)
        jobs = [
            Job(
                f"t{i}",
                f"e{i}",
                [(0.0, "submitted"), (ends / 3, "processing"), (ends, "succeed")],
                voices_listed=data.draw(st.booleans()),
                hidden=not data.draw(st.integers(0, 4)),
            )
            for i, ends in enumerate(data.draw(st.lists(moments, min_size=1, max_size=8)))
        ]
        which = st.sampled_from(jobs)
        waits = data.draw(
            st.lists(
                st.tuples(which, st.sampled_from("tes"), moments, st.one_of(st.none(), moments)),
                min_size=1,
                max_size=25,
            )
        )
        leaves = [data.draw(st.one_of(st.none(), moments)) for _ in waits]
        news = data.draw(st.lists(st.tuples(which, st.booleans(), moments), max_size=10))
        trouble = data.draw(st.tuples(moments, st.floats(0.0, 5.0)))
        error = data.draw(st.sampled_from([None, *TRANSIENT]))
        stalls = data.draw(st.booleans())
        slow = data.draw(st.booleans())

        def in_trouble(moment: float) -> bool:
            return trouble[0] <= moment < trouble[0] + trouble[1]

        async def wait(watcher: TaskWatcher, one: Job, by: str, timeout: float | None) -> None:
            """Wait, and check what comes of it, as far as the vendor was not in trouble."""
            begins, ends, seen = now(), one.timeline[-1][0], list[str]()
            state = told(one.task_id, task_info={"external_task_id": one.external})
            ids: dict[str, VoiceTask | str] = {"t": one.task_id, "e": str(one.external), "s": state}
            task = ids[by]
            try:
                ended = await watcher.wait(
                    task, timeout=timeout, on_update=lambda task: seen.append(task.task_status)
                )
            except WaitTimeoutError:
                assert timeout is not None
                assert now() == pytest.approx(begins + timeout)
                if not in_trouble(now()) and not slow and timeout > 4.0 and error is None:
                    assert stalls or ends > now() - 3.0
            else:
                assert ended.task_id == one.task_id
                assert ended.voices
                assert timeout is None or now() <= begins + timeout + 1e-6
                assert seen[-1] == "succeed"
            assert len(set(seen)) == len(seen)
            assert seen == sorted(seen, key=["submitted", "processing", "succeed"].index)

        @driven
        async def run() -> None:
            vendor = Vendor(jobs)
            vendor.fault = lambda call: error if in_trouble(now()) else None
            vendor.latency = lambda call: 99.0 if stalls and in_trouble(now()) else 0.05
            watcher = watching(vendor, USUAL, slow=slow)

            async def come(one: Job, by: str, comes: float, timeout: float | None) -> None:
                await until(comes)
                await wait(watcher, one, by, timeout)

            async def callback(one: Job, genuine: bool, comes: float) -> None:
                await until(comes)
                if genuine:
                    watcher.deliver(protocol.read_item(one.shape(now()), None))
                else:
                    watcher.prompt(None, one.external)

            async def leave(task: asyncio.Task[None], moment: float) -> None:
                await until(moment)
                task.cancel()

            came = [asyncio.create_task(come(*one)) for one in waits]
            left = [leave(task, at) for task, at in zip(came, leaves, strict=True) if at]
            results = await asyncio.gather(
                *came, *left, *(callback(*one) for one in news), return_exceptions=True
            )
            for result, at in itertools.zip_longest(results, leaves):
                if not (isinstance(result, asyncio.CancelledError) and at):
                    assert result is None, result
            assert now() < 60.0
            await settle()
            assert watcher.idle
            assert tasks_left() == 0
            assert vendor.in_flight == 0

        run()


class TestMemory:
    """Nothing accumulates."""

    @driven
    async def test_nothing_is_left_when_waits_have_ended(self) -> None:
        """After waits that ended in every way, the watcher is empty and its records are gone."""
        before = records()
        vendor = Vendor(
            [job(f"t{i}", ends=float(i % 7), external=f"e{i}") for i in range(200)]
            + [job(f"n{i}") for i in range(100)]
        )
        vendor.fault = lambda call: PERMANENT[1] if "t7" in call.target else None
        watcher = watching(vendor, PollingPolicy(initial=1.0, maximum=3600.0))
        waits = [asyncio.create_task(watcher.wait(f"t{i}", timeout=900.0)) for i in range(200)]
        waits += [asyncio.create_task(watcher.wait(f"e{i}", timeout=900.0)) for i in range(200)]
        waits += [asyncio.create_task(watcher.wait(f"n{i}", timeout=50.0)) for i in range(50)]
        waits += [asyncio.create_task(watcher.wait(f"n{i}", timeout=None)) for i in range(50, 100)]
        await until(60.0)
        for wait in waits[-50:]:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await settle()
        assert watcher.idle
        assert tasks_left() == 0
        del waits, wait
        gc.collect()
        assert len(records()) == len(before)

    @driven
    async def test_it_needs_no_garbage_collector(self) -> None:
        """Records of ended waits go at once: no reference cycle holds them."""
        vendor = Vendor([job(f"t{i}", ends=2.0) for i in range(20)])
        watcher = watching(vendor)
        gc.collect()
        before = records()
        gc.disable()
        try:
            await asyncio.gather(*(watcher.wait(f"t{i}", timeout=60.0) for i in range(20)))
            with pytest.raises(WaitTimeoutError):
                await watcher.wait(told("x"), timeout=0.5)
            await settle()
            assert len(records()) == len(before)
        finally:
            gc.enable()

    @driven
    async def test_waits_that_come_and_go(self) -> None:
        """Three thousand waits, one after the other, leave no plans for hours ahead behind."""
        vendor = Vendor([job("t")])
        watcher = watching(vendor, PollingPolicy(initial=60.0, maximum=7200.0), slow=True)
        for _ in range(3000):
            with pytest.raises(WaitTimeoutError):
                await watcher.wait(told(), timeout=0.01)
        await settle()
        assert watcher.idle
        assert len(watcher._agenda._order) < 300


def test_a_watcher_can_be_made_without_an_event_loop() -> None:
    """Making one needs no running loop, as making a client needs none."""
    assert watching(Vendor()).idle
