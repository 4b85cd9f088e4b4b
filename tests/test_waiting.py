"""Waiting as a user does it: a client and the emulator, over a real socket."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from attrs import define
from wire import MakeClient

from kling_voice import (
    AccountError,
    ApiKey,
    AuthenticationError,
    ClientClosedError,
    InvalidRequestError,
    KlingVoiceClient,
    PermissionDeniedError,
    PollingPolicy,
    RetryPolicy,
    TaskFailedError,
    TaskStatus,
    VoiceTask,
    WaitTimeoutError,
    reading,
)
from kling_voice.emulator import ALL, TRANSIENT, Emulator, Fault, Faults

QUICK = PollingPolicy(initial=0.02, multiplier=1.0, maximum=0.02)
CALM = PollingPolicy(initial=0.1, multiplier=1.0, maximum=0.1, jitter=0.0)
SOURCE = "https://example.com/voice.mp3"
STALLS = (Fault.STALL, Fault.STALL_AFTER)


@define
class Stage:
    """An emulator and a client of it."""

    emu: Emulator
    kling: KlingVoiceClient

    async def create(self, count: int, *, external: bool = False) -> list[VoiceTask]:
        """Create tasks, one after the other, so that the list's order is known."""
        return [
            await self.kling.create_voice(
                "Ada", voice_url=SOURCE, external_task_id=f"e{number}" if external else None
            )
            for number in range(count)
        ]

    @property
    def lists(self) -> int:
        """List requests so far."""
        return self.emu.requests["GET /v1/general/custom-voices"]

    @property
    def singles(self) -> int:
        """Single queries so far."""
        return self.emu.requests["GET /v1/general/custom-voices/{id}"]

    async def all(self, tasks: Sequence[VoiceTask | str], **options: Any) -> list[VoiceTask]:
        """Wait for tasks at once."""
        return await asyncio.gather(*(self.kling.wait_for_task(one, **options) for one in tasks))


@asynccontextmanager
async def stage(
    polling: PollingPolicy = QUICK, *, timeout: float = 5.0, credentials: Any = None, **options: Any
) -> AsyncIterator[Stage]:
    """Set up an emulator whose tasks live by ``advance`` alone, unless it has a time scale."""
    async with AsyncExitStack() as stack:
        emu = Emulator(**{"task_seconds": 9.0, "time_scale": 0.0, **options})
        await stack.enter_async_context(emu)
        kling = KlingVoiceClient(
            credentials or emu.credentials,
            base_url=emu.base_url,
            timeout=timeout,
            polling=polling,
            retry=RetryPolicy(attempts=8, initial=0.01),
        )
        yield Stage(emu, await stack.enter_async_context(kling))


async def looked(play: Stage, more: int = 1) -> None:
    """Wait until the vendor was asked so many more times."""
    aim = play.lists + play.singles + more
    for _ in range(2500):
        if play.lists + play.singles >= aim:
            return
        await asyncio.sleep(0.002)
    raise TimeoutError("the vendor was not asked in 5 s")


def others(known: set[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """Give the asyncio tasks that run and did not before, those of the emulator's server aside."""
    running = (task for task in asyncio.all_tasks() - known if not task.done())
    return [task for task in running if "RequestHandler" not in repr(task.get_coro())]


async def test_a_task_is_waited_for() -> None:
    """The wait ends with the task, and gives its voice; meanwhile only this task is asked for."""
    async with stage() as play:
        (task,) = await play.create(1)
        wait = asyncio.create_task(play.kling.wait_for_task(task))
        await looked(play, 3)
        assert not wait.done()
        play.emu.advance(9.0)
        ended = await wait
        assert ended.succeeded
        assert ended.voice is not None
        assert ended.voice.voice_name == "Ada"
        assert play.lists == 0


def test_waits_on_uvloop() -> None:
    """Tasks that are looked at at once are waited for where uvloop makes no timer for that."""

    async def main() -> None:
        async with stage() as play:
            tasks = await play.create(20)
            waits = asyncio.create_task(play.all([task.task_id for task in tasks]))
            await looked(play, 3)
            play.emu.advance(9.0)
            assert all(task.succeeded for task in await waits)

    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_many_share_list_requests() -> None:
    """Three hundred waits cost a list request a tick, and not one single query."""
    async with stage(CALM) as play:
        tasks = await play.create(300)
        waits = asyncio.gather(play.all(tasks[:150]), play.all([t.task_id for t in tasks[150:]]))
        await asyncio.sleep(0.45)
        play.emu.advance(9.0)
        one, other = await waits
        assert all(task.succeeded for task in one + other)
        assert play.lists <= 9
        assert play.singles <= 2


@pytest.mark.parametrize("cap", [1000, 500, 100])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("order", ["newest", "oldest", "shuffled"])
async def test_any_list(order: str, cap: int, clamp: bool) -> None:
    """Whatever the list's order and page cap, among thousands of foreign tasks, all waits end."""
    async with stage(list_order=order, page_cap=cap, page_clamp=clamp) as play:
        play.emu.preload(1000)
        tasks = await play.create(60)
        play.emu.preload(1000)
        waits = asyncio.create_task(play.all(tasks))
        await looked(play, 3)
        play.emu.advance(9.0)
        ended = await waits
        assert [task.task_id for task in ended] == [task.task_id for task in tasks]
        assert all(task.voices for task in ended)


async def test_arrivals_at_random() -> None:
    """Four hundred waits that begin and end at different moments all end well."""
    rng = random.Random(2)
    async with stage(task_seconds=lambda number: number * 0.001, time_scale=1.0) as play:
        tasks = await play.create(400, external=True)

        async def wait(task: VoiceTask) -> VoiceTask:
            await asyncio.sleep(rng.random() / 2)
            ids: list[VoiceTask | str] = [task, task.task_id, str(task.external_task_id)]
            return await play.kling.wait_for_task(rng.choice(ids))

        ended = await asyncio.gather(*map(wait, tasks))
        assert [task.task_id for task in ended] == [task.task_id for task in tasks]
        assert play.lists + play.singles <= 400


async def test_ids_of_either_kind_share() -> None:
    """Waits by VoiceTask, task_id and external_task_id of one task share their reads."""
    async with stage(CALM) as play:
        (task,) = await play.create(1, external=True)
        waits = asyncio.create_task(play.all([task, task.task_id, "e0", "e0"]))
        await asyncio.sleep(0.45)
        play.emu.advance(9.0)
        ended = await waits
        assert len({one.task_id for one in ended}) == 1
        assert play.singles <= 7
        assert play.lists == 0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("call", "count"), [("get", 1), ("list", 5)])
async def test_every_passing_fault_is_outlived(kind: Fault, call: str, count: int) -> None:
    """A wait outlives three faults of any kind in a row, those of its list included."""
    faults = Faults(
        script={call: [kind] * 3}, retry_after="0.05", delay_seconds=0.05, stall_seconds=None
    )
    timeout = 0.1 if kind in STALLS else 5.0
    async with stage(timeout=timeout) as play:
        tasks = await play.create(count)
        play.emu.faults = faults
        play.emu.advance(9.0)
        if kind is Fault.TOKEN_REFUSED:  # signed anew once; refused once more, that is for good
            with pytest.raises(AuthenticationError):
                await play.all([task.task_id for task in tasks])
        else:
            assert all(task.succeeded for task in await play.all([t.task_id for t in tasks]))
        assert faults.injected[kind] >= 1


async def test_faults_at_random() -> None:
    """With two requests in five failing in all manners, a hundred waits all end."""
    async with stage(time_scale=1.0, task_seconds=lambda number: number * 0.005) as play:
        tasks = await play.create(100)
        play.emu.faults = Faults(
            0.4, kinds=TRANSIENT, retry_after="0.02", delay_seconds=0.05, seed=3
        )
        ended = await play.all(tasks, timeout=30.0)
        assert all(task.succeeded for task in ended)
        assert len(play.emu.faults.injected) > 2


async def test_a_refused_token_is_signed_anew() -> None:
    """A single refusal of the token does not end the wait: it is signed anew."""
    async with stage() as play:
        (task,) = await play.create(1)
        play.emu.faults = Faults(script={"get": [Fault.TOKEN_REFUSED]})
        play.emu.advance(9.0)
        assert (await play.kling.wait_for_task(task.task_id)).succeeded


@pytest.mark.parametrize("count", [1, 40])
async def test_a_key_that_is_not_accepted(count: int) -> None:
    """A 401 ends all waits at once, by one request for all of them."""
    async with stage(credentials=ApiKey("unknown")) as play:
        with pytest.raises(AuthenticationError):
            await play.kling.wait_for_task("t")
        asked = play.lists + play.singles
        assert asked == 1
        waits = [play.kling.wait_for_task(f"t{number}") for number in range(count)]
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(error) for error in errors} == {AuthenticationError}
        assert play.lists + play.singles == asked + 1


@pytest.mark.parametrize(
    ("code", "error"), [(1103, PermissionDeniedError), (1101, AccountError)], ids=str
)
async def test_a_refusal_for_good(code: int, error: type[Exception]) -> None:
    """What no patience mends ends the wait at once, though it may come as HTTP 429."""
    async with stage() as play:
        (task,) = await play.create(1)
        play.emu.faults = Faults(script={"get": [None, None, code]})
        with pytest.raises(error):
            await play.kling.wait_for_task(task)
        assert play.singles == 3


async def test_a_list_that_may_not_be_read() -> None:
    """If the list alone is forbidden, each task is queried alone, and the waits end."""
    async with stage() as play:
        tasks = await play.create(20)
        play.emu.faults = Faults(1.0, kinds=[1103], calls=["list"])
        waits = asyncio.create_task(play.all(tasks))
        await looked(play, 30)
        play.emu.advance(9.0)
        assert all(task.succeeded for task in await waits)


async def test_read_lag() -> None:
    """A task that reads do not show yet is waited for."""
    async with stage(read_lag=5.0) as play:
        tasks = await play.create(5)
        waits = asyncio.create_task(play.all([task.task_id for task in tasks]))
        await looked(play, 12)
        assert play.emu.refused[1203] >= 5
        play.emu.advance(5.0)
        await looked(play, 3)
        assert not waits.done()
        play.emu.advance(4.0)
        assert all(task.succeeded for task in await waits)


@pytest.mark.parametrize("timeout", [0, 0.1, 0.25])
async def test_the_deadline(timeout: float) -> None:
    """The wait ends in time, with the last state seen, and no request comes after it."""
    async with stage() as play:
        (task,) = await play.create(1)
        started = asyncio.get_running_loop().time()
        with pytest.raises(WaitTimeoutError) as caught:
            await play.kling.wait_for_task(task, timeout=timeout)
        assert asyncio.get_running_loop().time() - started < timeout + 0.2
        assert caught.value.task is not None
        assert caught.value.task.task_status == "submitted"
        asked = play.singles
        assert bool(asked) is (timeout > 0)
        await asyncio.sleep(0.1)
        assert play.singles == asked


async def test_a_look_at_the_deadline_is_dropped() -> None:
    """A request that hangs at the deadline neither prolongs the wait nor outlives it."""
    async with stage() as play:
        (task,) = await play.create(1)
        play.emu.faults = Faults(1.0, kinds=[Fault.STALL])
        before = asyncio.all_tasks()
        with pytest.raises(WaitTimeoutError):
            await play.kling.wait_for_task(task, timeout=0.1)
        await asyncio.sleep(0.02)
        assert others(before) == []


async def test_an_ended_task_needs_no_request() -> None:
    """A VoiceTask that has ended is given back; a failed one raises, unless that is not wanted."""
    async with stage(fail_when=lambda body: "too noisy") as play:
        (task,) = await play.create(1)
        play.emu.advance(9.0)
        failed = await play.kling.get_task(task.task_id)
        asked = play.singles
        assert await play.kling.wait_for_task(failed, raise_on_failure=False) is failed
        with pytest.raises(TaskFailedError, match="too noisy") as caught:
            await play.kling.wait_for_task(failed)
        assert caught.value.task is failed
        assert play.singles == asked
        with pytest.raises(TaskFailedError, match="too noisy"):
            await play.kling.wait_for_task(task)


async def test_updates() -> None:
    """on_update is told of each status once, in order, be it a function or a coroutine one."""
    async with stage(succeed_word="succeeded") as play:
        (task,) = await play.create(1)
        from_task: list[str] = []
        from_id: list[str] = []

        async def note(state: VoiceTask) -> None:
            from_id.append(state.task_status)

        waits = asyncio.gather(
            play.kling.wait_for_task(task, on_update=lambda t: from_task.append(t.task_status)),
            play.kling.wait_for_task(task.task_id, on_update=note),
        )
        await looked(play, 3)
        play.emu.advance(2.0)
        await looked(play, 3)
        play.emu.advance(7.0)
        await waits
        assert from_task == [TaskStatus.PROCESSING, TaskStatus.SUCCEED]
        assert from_id == [TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED]


async def test_the_last_one_to_leave_stops_the_work() -> None:
    """When all waiters have been cancelled no request follows, and no asyncio task is left."""
    async with stage() as play:
        tasks = await play.create(10)
        play.emu.faults = Faults(1.0, kinds=[Fault.DELAY], delay_seconds=0.2)
        before = asyncio.all_tasks()
        waits = [asyncio.create_task(play.kling.wait_for_task(task)) for task in tasks]
        await looked(play)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await asyncio.sleep(0.02)
        assert others(before) == []
        asked = play.lists + play.singles
        await asyncio.sleep(0.1)
        assert play.lists + play.singles == asked


async def test_closing() -> None:
    """close() ends every wait with ClientClosedError, and leaves no asyncio task behind."""
    async with stage() as play:
        tasks = await play.create(10)
        before = asyncio.all_tasks()
        waits = [
            asyncio.create_task(play.kling.wait_for_task(task, timeout=None)) for task in tasks
        ]
        await looked(play, 2)
        await play.kling.close()
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(error, ClientClosedError) for error in errors)
        assert others(before) == []
        with pytest.raises(ClientClosedError):
            await play.kling.wait_for_task(tasks[0])


@pytest.mark.parametrize("timeout", [-1, True, "9", float("nan"), float("inf")])
async def test_a_timeout_that_is_none(timeout: Any) -> None:
    """A timeout is None or a number of seconds."""
    async with stage() as play:
        with pytest.raises(InvalidRequestError) as caught:
            await play.kling.wait_for_task("t", timeout=timeout)
        assert caught.value.field == "timeout"


@pytest.mark.parametrize("timeout", [1e300, 10**400], ids=["float", "int"])
async def test_a_timeout_of_centuries(timeout: float) -> None:
    """A timeout longer than any clock can tell is one without a deadline."""
    async with stage() as play:
        (task,) = await play.create(1)
        play.emu.advance(10.0)
        assert (await play.kling.wait_for_task(task, timeout=timeout)).succeeded


@pytest.mark.parametrize("task", ["", ".", "..", 7, None, VoiceTask("..", TaskStatus.SUBMITTED)])
async def test_an_id_that_is_none(task: Any) -> None:
    """A task is a VoiceTask or an id that can stand in a URL."""
    async with stage() as play:
        with pytest.raises(InvalidRequestError) as caught:
            await play.kling.wait_for_task(task)
        assert caught.value.field == "task"


async def test_a_frozen_list_starves_nobody(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits end though a cache answers the list for ever with what it was before."""
    monkeypatch.setattr(reading, "_BEHIND", 0.3)
    async with Emulator(task_seconds=0.5) as emulator:
        kling = make_client(emulator, polling=PollingPolicy(initial=0.05, maximum=0.05))
        tasks = [
            await kling.create_voice(f"v{i}", voice_url="https://example.com/a.mp3")
            for i in range(40)
        ]
        emulator.list_frozen = True
        assert emulator.list_frozen
        states = await asyncio.gather(*(kling.wait_for_task(task, timeout=30.0) for task in tasks))
        assert all(state.succeeded for state in states)
        emulator.list_frozen = False
        assert {task.task_status for task in await kling.list_tasks(page_size=40)} == {"succeed"}
