"""Deadlines: every block ends at its own, by one timer, and cancellations stay what they are."""

import asyncio

import pytest
from driven import driven, now

from kling_voice.deadlines import Deadlines


async def sleep_within(deadlines: Deadlines, seconds: float, sleep: float) -> float:
    """Sleep in a block; give the moment of its end, negative if it was the deadline."""
    try:
        with deadlines.within(seconds):
            await asyncio.sleep(sleep)
    except TimeoutError:
        return -now()
    return now()


def timers() -> int:
    """Count the timers that the event loop has still to fire."""
    scheduled: list[asyncio.TimerHandle] = vars(asyncio.get_running_loop())["_scheduled"]
    return sum(not timer.cancelled() for timer in scheduled)


@driven
async def test_each_block_ends_at_its_own_deadline() -> None:
    """In whatever order the deadlines come, and none that ended before is touched."""
    deadlines = Deadlines()
    ends = await asyncio.gather(
        sleep_within(deadlines, 3.0, 100.0),
        sleep_within(deadlines, 1.0, 100.0),
        sleep_within(deadlines, 2.0, 1.5),
        sleep_within(deadlines, 2.0, 100.0),
        sleep_within(deadlines, 2.0, 100.0),
    )
    assert list(ends) == [-3.0, -1.0, 1.5, -2.0, -2.0]


@driven
async def test_one_timer_serves_all() -> None:
    """A thousand blocks that end in time set one timer, which is for the first of them."""
    deadlines = Deadlines()
    before = timers()
    for _ in range(1000):
        with deadlines.within(30.0):
            assert timers() == before + 1
    with deadlines.within(10.0):  # the first of them now
        assert timers() == before + 1
    await asyncio.sleep(40.0)
    assert timers() == before


@driven
async def test_a_stale_timer_does_not_end_a_later_block() -> None:
    """The timer of a block that ended in time fires while another one runs."""
    deadlines = Deadlines()
    assert await sleep_within(deadlines, 5.0, 1.0) == 1.0
    assert await sleep_within(deadlines, 6.0, 100.0) == -7.0


@driven
async def test_a_cancellation_stays_one() -> None:
    """A task that is cancelled in a block, even as its deadline comes, is cancelled."""
    deadlines = Deadlines()
    task = asyncio.create_task(sleep_within(deadlines, 5.0, 100.0))
    together = asyncio.create_task(sleep_within(deadlines, 5.0, 100.0))
    await asyncio.sleep(1.0)
    task.cancel()
    asyncio.get_running_loop().call_later(4.0, together.cancel)
    told = await asyncio.gather(task, together, return_exceptions=True)
    assert [type(error) for error in told] == [asyncio.CancelledError] * 2


@driven
async def test_other_errors_come_through_at_the_deadline() -> None:
    """What the block itself raises in its last moment is not turned into a timeout."""
    deadlines = Deadlines()

    async def clumsy() -> None:
        with deadlines.within(1.0):
            try:
                await asyncio.sleep(100.0)
            except asyncio.CancelledError:
                raise KeyError from None

    with pytest.raises(KeyError):
        await clumsy()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@driven
async def test_closing_ends_every_block_at_once() -> None:
    """All that run, once each, however often it is asked for; no timer is left."""
    deadlines = Deadlines()
    before = timers()
    blocks = [asyncio.create_task(sleep_within(deadlines, 5.0, 100.0)) for _ in range(3)]
    await asyncio.sleep(1.0)
    deadlines.expire_all()
    deadlines.expire_all()
    assert await asyncio.gather(*blocks) == [-1.0] * 3
    assert timers() == before


def test_timers_that_do_not_tell_their_moment() -> None:
    """Deadlines that come at once, or nearly, are kept where uvloop makes no timer for them."""

    async def main() -> None:
        deadlines = Deadlines()
        for soon in (0.0, 0.0001, 0.0006, 0.002):
            with pytest.raises(TimeoutError), deadlines.within(soon), deadlines.within(5.0):
                await asyncio.sleep(5.0)

    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
