"""The slots: what is learned of the account's limit, and how its processes get along."""

import asyncio
import gc
import math
import random
import selectors
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from statistics import mean
from typing import Any, TypeVar

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_voice import ClientClosedError
from kling_voice.slots import Slots, Window

T = TypeVar("T")
LIFE = 9.0  # seconds of a task


# --- time that passes only when everybody sleeps ---


class _Jump(selectors.DefaultSelector):
    """Instead of sleeping until the next timer, turns the clock on to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if timeout is None and not ready:
            raise RuntimeError("nothing will ever happen")
        self.now += timeout or 0.0
        return ready


class _Loop(asyncio.SelectorEventLoop):
    """An event loop in which hours take as long as what happens in them."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def in_no_time(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


@define
class Account:
    """The vendor's account: how many tasks may be in flight, and until when each one is."""

    limit: int
    ends: list[float] = field(factory=list)
    most: int = 0

    def create(self, seconds: float) -> bool:
        """Create a task, or refuse it with 1303."""
        while self.ends and self.ends[0] <= now():
            heappop(self.ends)
        if len(self.ends) >= self.limit:
            return False
        heappush(self.ends, now() + seconds)
        self.most = max(self.most, len(self.ends))
        return True


@define
class Process:
    """A client on an account, and what has become of its voices.

    Attributes:
        account: The account.
        trip: Seconds from a create to its answer; ends are heard of after half of it.
        tick: Seconds between two looks at the tasks; 0 for callbacks.
        seed: Of the tasks' lives.
        life: The tasks' mean life.
    """

    account: Account
    trip: float = 0.02
    tick: float = 0.0
    seed: int = 0
    life: float = LIFE
    slots: Slots = field(factory=lambda: Slots(uniform=random.Random(0).uniform))
    voices: int = 0
    refusals: int = 0
    first: float = math.inf
    last: float = 0.0
    busy: float = 0.0
    workers: list[asyncio.Task[None]] = field(factory=list)

    def start(self, voices: int | None = None) -> None:
        """Clone so many voices, or for ever."""
        rng = random.Random(self.seed)
        left = iter(range(voices)) if voices is not None else iter(int, 1)
        for _ in range(min(voices or 100, self.account.limit + 50)):
            self.workers.append(asyncio.create_task(self._work(left, rng)))

    async def done(self) -> None:
        """Wait for all voices."""
        await asyncio.gather(*self.workers)

    async def leave(self) -> None:
        """Stop at once; what is in flight goes on."""
        for worker in self.workers:
            worker.cancel()
        await asyncio.gather(*self.workers, return_exceptions=True)

    async def _work(self, left: Any, rng: random.Random) -> None:
        for _ in left:
            await self._clone(self.life * rng.uniform(0.7, 1.3))

    async def _clone(self, seconds: float) -> None:
        telling = await self.slots.acquire()
        while True:
            await asyncio.sleep(self.trip / 2)
            created = now()
            accepted = self.account.create(seconds)
            await asyncio.sleep(self.trip / 2)
            if accepted:
                break
            self.refusals += 1
            self.slots.refused(None)
            telling = await self.slots.acquire(first=True)
        self.slots.accepted(telling)
        self.first = min(self.first, created)
        began, seen = now(), created + seconds + self.trip / 2
        if self.tick:
            seen = math.ceil((created + seconds) / self.tick) * self.tick + self.trip
        await asyncio.sleep(max(0.0, seen - now()))
        self.slots.release(now() - began)
        self.voices += 1
        self.busy += seconds
        self.last = now()


async def alone(limit: int, voices: int, **options: Any) -> Process:
    """Clone voices on an account that nobody else uses."""
    process = Process(Account(limit), **options)
    process.start(voices)
    await process.done()
    return process


def list_schedule(limit: int, voices: int, seed: int) -> float:
    """Give the time of who knows the limit and sees every end at once."""
    rng = random.Random(seed)
    slots = [0.0] * limit
    for _ in range(voices):
        heappush(slots, heappop(slots) + LIFE * rng.uniform(0.7, 1.3))
    return max(slots)


# --- the window: decisions without waiting ---


def opened(limit: int, *, window: Window | None = None) -> tuple[Window, int, int]:
    """Open a window on an account, answer by answer: it, the round trips and the refusals."""
    window = window or Window()
    flying = held = trips = refusals = 0
    while not window.learned:
        trips += 1
        assert trips < 100
        while window.allows(held + flying, 0.0):
            flying += 1
            assert flying <= 2 * limit + 8
            assert window.taken(held + flying, 0.0)
        for _ in range(flying):
            if held < limit:
                held += 1
                window.accepted(held + flying - 1, 0.0, telling=True)
                flying -= 1
            else:
                flying -= 1
                refusals += 1
                window.refused(held + flying, 0.0)
    return window, trips, refusals


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 20, 50, 200, 1000])
def test_a_window_finds_the_limit_in_a_few_round_trips(limit: int) -> None:
    """It opens geometrically until the first refusals, and then is the limit itself."""
    window, trips, refusals = opened(limit)

    assert window.size == limit
    assert trips <= 3 + math.log(max(1, limit / 4), 1.2)
    assert refusals <= 4 + limit / 4


@pytest.mark.parametrize("held", [1, 2])
def test_a_window_that_is_not_used_does_not_open(held: int) -> None:
    """Creates that fill half of it at most, such as one at a time, tell nothing of the limit."""
    window = Window()
    for _ in range(100):
        window.accepted(held, 0.0, telling=window.taken(held, 0.0))

    assert window.size == 4
    assert not window.learned


def test_a_refusal_shrinks_the_window_to_what_others_of_ours_hold() -> None:
    """What was refused did not fit; what is in flight does."""
    window, _, _ = opened(20)

    window.refused(17, 0.0)

    assert window.size == 17
    assert window.allows(16, 0.0)
    assert not window.allows(17, 0.0)


def test_a_window_never_closes() -> None:
    """With nothing in flight one create is always worth a try."""
    window = Window()

    window.refused(0, 0.0)

    assert window.size == 1
    assert window.allows(0, 0.0)


def ended(window: Window, count: int, *, seconds: float = LIFE) -> None:
    """Let tasks end; what is owed to others is not what such a test is about."""
    for _ in range(count):
        window.ended(seconds, 0.0)


def let_go_until_one_is_left(window: Window, held: int, moment: float) -> None:
    """Let tasks end, and others take their places, until a slot is left to other processes."""
    for _ in range(1000):
        if not window.allows(held - 1, moment):
            return
        window.ended(LIFE, moment)
    pytest.fail("no slot was ever left")


def test_one_create_is_tried_beyond_the_window_after_two_lives_of_a_task() -> None:
    """One only, and not before."""
    window, _, _ = opened(5)
    ended(window, 1)

    assert not window.allows(5, 2 * LIFE - 0.1)
    assert window.allows(5, 2 * LIFE)
    assert window.wakes_at(0.0) == pytest.approx(2 * LIFE)
    window.taken(6, 2 * LIFE)
    assert not window.allows(6, 100 * LIFE)


def test_trying_beyond_the_window_in_vain_gets_rarer() -> None:
    """After 2, 4 and 8 lives of a task, then always after 8; for long tasks after 120 s."""
    window, _, _ = opened(5)
    ended(window, 1)
    waits = []
    moment = 0.0
    for _ in range(5):
        waits.append(window.wakes_at(moment) - moment)
        moment = window.wakes_at(moment)
        window.taken(6, moment)
        window.refused(5, moment)

    assert waits == pytest.approx([2 * LIFE, 4 * LIFE, 8 * LIFE, 8 * LIFE, 8 * LIFE])
    ended(window, 100, seconds=600.0)
    assert window.wakes_at(moment) - moment == 120.0


def test_a_create_beyond_the_window_that_is_accepted_opens_it_again() -> None:
    """The account has grown, or another process has left: look for more at once."""
    window, _, _ = opened(5)
    ended(window, 1)

    window.accepted(6, 2 * LIFE, telling=window.taken(6, 2 * LIFE))

    assert window.allows(6, 2 * LIFE)
    assert window.size > 6


@pytest.mark.parametrize(("held", "lives"), [(7, 4), (8, 2)])
def test_after_a_find_of_real_room_the_next_try_is_soon(held: int, lives: int) -> None:
    """Two slots more than five may be tasks whose ends were not seen yet; three are more room."""
    window, _, _ = opened(5)
    ended(window, 1)
    window.accepted(6, 2 * LIFE, telling=window.taken(6, 2 * LIFE))

    window.refused(held, 3 * LIFE)

    assert window.wakes_at(3 * LIFE) - 3 * LIFE == pytest.approx(lives * LIFE)


def test_one_long_task_is_no_rule() -> None:
    """The first task tells how long they live; each further one moves that by an eighth."""
    window = Window()
    window.ended(8.0, 0.0)
    assert window.task_seconds == 8.0
    window.ended(80.0, 0.0)
    assert window.task_seconds == 17.0


def test_a_refusal_long_after_a_create_beyond_the_window_shows_others() -> None:
    """What was accepted then had its slot: who refuses it now is another process."""
    window, _, _ = opened(5)
    ended(window, 1)

    window.accepted(6, 2 * LIFE, telling=window.taken(6, 2 * LIFE))
    window.refused(5, 4 * LIFE)

    assert window.contested


def test_a_refill_that_is_accepted_says_nothing_of_a_create_beyond_the_window() -> None:
    """Its answer may come first, and is not the answer that is waited for."""
    window, _, _ = opened(5)
    ended(window, 1)

    refill = window.taken(5, 2 * LIFE)
    window.taken(6, 2 * LIFE)
    window.accepted(6, 2 * LIFE, telling=refill)

    assert window.size == 6
    assert not window.allows(6, 100 * LIFE)


def test_a_create_that_came_to_nothing_does_not_keep_the_next_from_being_tried() -> None:
    """A duplicate or a broken connection says nothing of the limit."""
    window, _, _ = opened(5)
    ended(window, 1)
    window.taken(6, 2 * LIFE)
    window.abandoned()

    assert window.allows(6, 100 * LIFE)


def test_tasks_found_in_flight_widen_the_window() -> None:
    """They fit, or they would not be there; and an unknown limit is looked for beyond them."""
    fresh, (learned, _, _) = Window(), opened(5)
    for held in range(1, 31):
        fresh.found(held)
        learned.found(held)

    assert learned.size == 30
    assert fresh.size == 34


def test_where_tasks_were_found_a_refill_tells_of_the_limit_only_if_that_is_unknown() -> None:
    """A found task has its slot: the next one in it shows no more room than is known of."""
    fresh, (learned, _, _) = Window(), opened(5)
    for held in range(1, 31):
        fresh.found(held)
        learned.found(held)

    assert fresh.taken(30, 0.0)
    assert not learned.taken(30, 0.0)


def test_after_a_slot_was_left_to_others_the_next_try_is_waited_for() -> None:
    """From the very moment on, else nothing would wake up who waits for the try."""
    window, _, _ = opened(5)
    let_go_until_one_is_left(window, 5, 0.0)
    left_until = window.wakes_at(0.0)

    assert left_until == 3.0
    assert window.wakes_at(left_until) == pytest.approx(2 * LIFE)


def test_a_slot_is_left_to_others_now_and_then() -> None:
    """A five-hundredth of the slots' time, in pieces longer than others' backoff."""
    window, _, _ = opened(5)
    moment = idle = 0.0
    for _ in range(5000):
        moment += LIFE / 5
        window.ended(LIFE, moment)
        if not window.allows(4, moment):
            piece = window.wakes_at(moment) - moment
            assert piece == 3.0
            assert window.allows(3, moment)
            idle += piece
            moment += piece
            assert window.allows(4, moment)
            window.accepted(5, moment, telling=window.taken(5, moment))
            assert window.size == 5

    assert idle / (5 * moment) == pytest.approx(0.002, rel=0.1)
    assert not window.contested


def test_nothing_is_left_to_others_before_the_limit_is_known() -> None:
    """While it is looked for, a slot that is left idle would only slow the search."""
    window = Window()
    for _ in range(1000):
        window.ended(LIFE, 0.0)
        assert window.allows(3, 0.0)


def test_a_slot_that_was_left_and_is_gone_shows_that_there_are_others() -> None:
    """Even if the create that is refused goes at the very moment when it may go again."""
    window, _, _ = opened(5)
    let_go_until_one_is_left(window, 5, 0.0)
    moment = window.wakes_at(0.0)

    window.taken(5, moment)
    window.refused(4, moment)

    assert window.contested
    assert window.size == 4


def test_a_slot_that_was_taken_shows_that_there_are_others() -> None:
    """More is left to them then: a twentieth of the time, for two lives of a task each."""
    window, _, _ = opened(5)
    ended(window, 3)
    assert not window.contested

    window.refused(4, 2 * LIFE)  # a refill, long after anything else was tried

    assert window.contested
    window.ended(LIFE, 2 * LIFE)
    moment, count = 2 * LIFE, 0
    while window.allows(3, moment):
        count += 1
        assert count < 100
        window.ended(LIFE, moment)
    assert window.wakes_at(moment) - moment == pytest.approx(2 * LIFE)
    assert count == pytest.approx(2 / 0.05, abs=2)


def test_what_nobody_takes_shows_that_the_others_have_gone() -> None:
    """After three slots in a row that were left and not taken."""
    window, _, _ = opened(5)
    window.refused(0, 0.0)
    window.found(5)
    moment = 0.0
    for left in range(3):
        assert window.contested, left
        let_go_until_one_is_left(window, 5, moment)
        moment = window.wakes_at(moment)
        window.accepted(5, moment, telling=window.taken(5, moment))

    assert not window.contested


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "accept", "refuse", "fail", "end", "find", "wait"]),
            st.floats(0.001, 700),
        ),
        max_size=200,
    )
)
@settings(deadline=None)
def test_a_window_always_goes_on(events: list[tuple[str, float]]) -> None:
    """Whatever happens, there is room for one, at most one is tried beyond, and time helps."""
    window = Window()
    moment, held, asked, telling = 0.0, 0, 0, True
    for event, seconds in events:
        moment += seconds / 100
        if event == "take" and window.allows(held, moment):
            held, asked = held + 1, asked + 1
            telling = window.taken(held, moment)
        elif event == "accept" and asked:
            asked -= 1
            window.accepted(held, moment, telling=telling)
        elif event == "refuse" and asked:
            held, asked = held - 1, asked - 1
            window.refused(held, moment)
        elif event == "fail" and asked:
            held, asked = held - 1, asked - 1
            window.abandoned()
        elif event == "end" and held > asked:
            held -= 1
            window.ended(seconds, moment)
        elif event == "find":
            held += 1
            window.found(held)
        elif event == "wait":
            moment += seconds
        assert window.size >= 1
        assert not window.allows(window.size + 1, moment)
        assert window.allows(0, max(moment, window.wakes_at(moment)))
        assert window.task_seconds > 0


# --- the slots: who waits, and for how long ---


class Grants:
    """Acquires slots in the background, and notes who got one when."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.at: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def ask(self, *names: str, first: bool = False) -> None:
        """Ask for a slot for each name."""
        for name in names:
            self._tasks.append(asyncio.create_task(self._ask(name, first)))

    async def _ask(self, name: str, first: bool) -> None:
        await self.slots.acquire(first=first)
        self.at[name] = now()

    def cancel(self, number: int) -> None:
        """Give up the asking of that number."""
        self._tasks[number].cancel()

    async def over(self) -> None:
        """Give up all that are left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def virtually(
    test: Callable[[Slots, Grants], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    """Make a test of slots run in virtual time."""

    async def run() -> None:
        slots = Slots(uniform=lambda low, high: high)
        grants = Grants(slots)
        try:
            await test(slots, grants)
        finally:
            await grants.over()

    def wrapped() -> None:
        in_no_time(run())

    wrapped.__doc__ = test.__doc__
    return wrapped


async def learned(slots: Slots, limit: int) -> None:
    """Let slots learn a limit, and hold it all."""
    for _ in range(limit):
        slots.accepted(await slots.acquire())
    await slots.acquire()
    slots.refused(None)
    assert slots.limit == slots.in_flight == limit


@virtually
async def test_a_create_goes_the_moment_a_task_ends(slots: Slots, grants: Grants) -> None:
    """Not a timer lets it go but the end itself, in the order in which they asked."""
    await learned(slots, 3)
    grants.ask("a", "b")
    await asyncio.sleep(5.0)
    assert grants.at == {}

    slots.release(5.0)
    await asyncio.sleep(0)
    assert grants.at == {"a": 5.0}
    await asyncio.sleep(1.0)
    slots.release(6.0)
    await asyncio.sleep(0)
    assert grants.at == {"a": 5.0, "b": 6.0}


@virtually
async def test_a_refused_create_is_the_next_to_go(slots: Slots, grants: Grants) -> None:
    """It had had its turn."""
    await learned(slots, 2)
    grants.ask("later")
    await asyncio.sleep(0)
    grants.ask("refused", first=True)
    await asyncio.sleep(0)

    slots.release(1.0)
    await asyncio.sleep(0)

    assert list(grants.at) == ["refused"]


@virtually
async def test_a_refusal_costs_no_backoff_while_anything_is_in_flight(
    slots: Slots, grants: Grants
) -> None:
    """The next end lets the next one go, whatever the vendor asks to wait."""
    await learned(slots, 2)
    slots.release(1.0)
    await slots.acquire()
    slots.refused(30.0)
    grants.ask("again", first=True)
    await asyncio.sleep(0.5)

    slots.release(1.0)
    await asyncio.sleep(0)

    assert grants.at == {"again": 0.5}


@virtually
async def test_a_refusal_with_nothing_in_flight_costs_the_advised_backoff(
    slots: Slots, grants: Grants
) -> None:
    """From 1 s on, growing, with jitter; but never so long that one is shut out."""
    waits = []
    for _ in range(4):
        await slots.acquire()
        slots.refused(None)
        refused = now()
        await slots.acquire()
        waits.append(now() - refused)
        slots.release()

    assert waits == pytest.approx([1.2, 2.4, 2.4, 2.4])


def test_jitter_only_lengthens_a_backoff() -> None:
    """It is from 1 to 1.2 times as long, and so never shorter than the vendor advises."""
    asked: list[tuple[float, float]] = []

    def lowest(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    async def run() -> None:
        slots = Slots(uniform=lowest)
        await slots.acquire()
        slots.refused(None)
        await slots.acquire()
        assert now() == pytest.approx(1.0)

    in_no_time(run())
    assert asked == [(1.0, 1.2)]


def test_a_pause_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Who wonders why nothing is created finds there why, and for how long."""

    async def run() -> None:
        slots = Slots(uniform=lambda low, high: high)
        await slots.acquire()
        slots.refused(None)
        await slots.acquire()
        slots.slow_down(7.0)

    with caplog.at_level("INFO", logger="kling_voice"):
        in_no_time(run())

    assert caplog.messages == [
        "Every task slot of the account is taken; the next create goes in 1.2 s",
        "The vendor finds the requests too many; the next create goes in 7.0 s",
    ]


@virtually
async def test_an_accepted_create_ends_the_backoff(slots: Slots, grants: Grants) -> None:
    """The next one begins from 1 s again."""
    for _ in range(3):
        await slots.acquire()
        slots.refused(None)
    slots.accepted(await slots.acquire())
    slots.release(1.0)
    await slots.acquire()
    slots.refused(None)
    refused = now()

    await slots.acquire()

    assert now() - refused == pytest.approx(1.2)


@pytest.mark.parametrize(("asked", "waited"), [(7.0, 7.0), (0.0, 1.2), (1e9, 300.0)])
def test_the_vendor_may_ask_for_another_backoff(asked: float, waited: float) -> None:
    """Within reason: neither at once, which would be a hot loop, nor for ever."""

    async def run() -> None:
        slots = Slots(uniform=lambda low, high: high)
        await slots.acquire()
        slots.refused(asked)
        await slots.acquire()
        assert now() == pytest.approx(waited)

    in_no_time(run())


@virtually
async def test_too_many_requests_slow_everything_down(slots: Slots, grants: Grants) -> None:
    """Nobody creates for a while, though slots are free and tasks end; many 1302 are one."""
    for _ in range(4):
        telling = await slots.acquire()
    slots.accepted(telling)
    for _ in range(3):
        slots.slow_down(None)
    grants.ask("a", "b")
    await asyncio.sleep(0.5)
    slots.release(0.5)
    await asyncio.sleep(0.6)
    assert grants.at == {}

    await asyncio.sleep(1.0)

    assert grants.at == pytest.approx({"a": 1.2, "b": 1.2})


@virtually
async def test_too_many_requests_cost_the_create_its_slot(slots: Slots, grants: Grants) -> None:
    """Its own one, and no other's."""
    for _ in range(3):
        await slots.acquire()

    slots.slow_down(None)

    assert slots.in_flight == 2


@virtually
async def test_the_slowdown_grows_until_something_is_accepted(slots: Slots, grants: Grants) -> None:
    """1, 2, 4, 8 and at most 16 s, with jitter, or what the vendor asks."""
    waits = []
    for asked in (None, None, None, None, None, None, 3.0):
        await slots.acquire()
        slots.slow_down(asked)
        refused = now()
        await slots.acquire()
        waits.append(now() - refused)
        slots.release()

    assert waits == pytest.approx([1.2, 2.4, 4.8, 9.6, 19.2, 19.2, 3.0])
    assert slots.limit is None


@virtually
async def test_who_gives_up_waiting_leaves_the_queue(slots: Slots, grants: Grants) -> None:
    """The next one gets the slot."""
    await learned(slots, 1)
    grants.ask("gives up", "waits")
    await asyncio.sleep(0)
    grants.cancel(0)
    await asyncio.sleep(0)

    slots.release(1.0)
    await asyncio.sleep(0)

    assert list(grants.at) == ["waits"]
    assert slots.in_flight == 1


@virtually
async def test_giving_up_is_a_plain_cancellation(slots: Slots, grants: Grants) -> None:
    """No other error comes of it, and nothing stays behind in the queue."""
    await learned(slots, 1)
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)

    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not slots._queue


@virtually
async def test_a_slot_granted_to_one_who_gives_up_goes_to_the_next(
    slots: Slots, grants: Grants
) -> None:
    """Even when both happen in the same moment."""
    await learned(slots, 1)
    grants.ask("gives up", "waits")
    await asyncio.sleep(0)

    slots.release(1.0)
    grants.cancel(0)
    await asyncio.sleep(0.1)

    assert list(grants.at) == ["waits"]
    assert slots.in_flight == 1


@virtually
async def test_a_try_beyond_the_window_that_is_given_up_is_not_the_last(
    slots: Slots, grants: Grants
) -> None:
    """Else the account's growth would never be found."""
    await learned(slots, 1)
    grants.ask("tried")
    await asyncio.sleep(21.0)
    assert grants.at == {"tried": 20.0}
    slots.release()  # the try came to nothing
    grants.ask("refill", "next")
    await asyncio.sleep(19.5)

    assert grants.at == {"tried": 20.0, "refill": 21.0, "next": 40.0}


@virtually
async def test_closing_ends_every_wait_for_a_slot(slots: Slots, grants: Grants) -> None:
    """With ClientClosedError; and nobody can begin to wait after it."""
    await learned(slots, 1)
    waiting = [asyncio.create_task(slots.acquire()) for _ in range(3)]
    await asyncio.sleep(0)

    slots.close()

    for told in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(told, ClientClosedError)
        assert str(told) == "The client was closed while a create waited for a slot."
    with pytest.raises(ClientClosedError):
        await slots.acquire()
    with pytest.raises(ClientClosedError):
        await slots.acquire(first=True)


@virtually
async def test_closing_when_nobody_waits(slots: Slots, grants: Grants) -> None:
    """It is quiet, twice as well."""
    slots.close()
    slots.close()

    with pytest.raises(ClientClosedError):
        await slots.acquire()


@virtually
async def test_closing_and_cancelling_together_leave_nothing_behind(
    slots: Slots, grants: Grants
) -> None:
    """Neither a wrong count nor an exception that nobody has looked at."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    await learned(slots, 2)
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)

    slots.close()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    del waiting
    gc.collect()
    await asyncio.sleep(0)

    assert slots.in_flight == 2
    assert complaints == []


@virtually
async def test_closing_passes_over_who_has_just_given_up(slots: Slots, grants: Grants) -> None:
    """Who is cancelled in the moment before stays cancelled; the others' waits end all the same."""
    await learned(slots, 1)
    waiting = [asyncio.create_task(slots.acquire()) for _ in range(3)]
    await asyncio.sleep(0)

    waiting[0].cancel()
    slots.close()

    gone, *others = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(gone, asyncio.CancelledError)
    assert all(isinstance(told, ClientClosedError) for told in others)


@virtually
async def test_tasks_that_are_found_hold_slots(slots: Slots, grants: Grants) -> None:
    """The next create waits for the end of one of them, once it was refused."""
    for _ in range(30):
        slots.hold()
    assert (slots.in_flight, slots.limit) == (30, None)
    await slots.acquire()
    slots.refused(None)
    assert slots.limit == 30
    grants.ask("next")
    await asyncio.sleep(1.0)
    assert grants.at == {}

    slots.release(1.0)
    await asyncio.sleep(0)

    assert grants.at == {"next": 1.0}


# --- together on an account ---


@pytest.mark.parametrize("limit", [5, 20, 50])
@pytest.mark.parametrize("voices", [40, 200, 400])
def test_the_slots_of_an_account_are_always_full(limit: int, voices: int) -> None:
    """Within a hundredth of who knows the limit, at 0.3 refusals a voice at most."""
    process = in_no_time(alone(limit, voices, trip=0.01))

    assert process.account.most <= limit
    assert list_schedule(limit, voices, 0) / process.last >= 0.99
    assert process.refusals <= 0.3 * voices


@pytest.mark.parametrize("limit", [5, 20, 50])
def test_looking_twenty_times_costs_half_a_look_each(limit: int) -> None:
    """Where ends are seen at ticks, nothing but the ticks is lost."""
    lost = []
    for seed in range(5):
        process = in_no_time(alone(limit, 400, trip=0.01, tick=LIFE / 20, seed=seed))
        lost.append(list_schedule(limit, 400, seed) / process.last)
        assert process.refusals <= 0.3 * 400

    assert mean(lost) >= 0.97


@pytest.mark.parametrize("tick", [2.5, LIFE, 3 * LIFE])
def test_ends_that_are_seen_late_cost_time_and_no_refusals(tick: float) -> None:
    """However lazily the tasks are looked at."""
    process = in_no_time(alone(5, 400, trip=0.25, tick=tick))

    assert process.refusals <= 0.3 * 400


def test_an_upgraded_account_is_found_out_and_used() -> None:
    """From 5 to 50 slots in the middle: all of them are in use within ten lives of a task."""

    async def run() -> None:
        account = Account(5)
        process = Process(account)
        process.start()
        await asyncio.sleep(30 * LIFE)
        assert account.most == 5
        account.limit = 50
        await asyncio.sleep(10 * LIFE)
        assert process.slots.in_flight >= 50
        before = process.busy
        await asyncio.sleep(10 * LIFE)
        assert (process.busy - before) / (10 * LIFE * 50) > 0.95
        await process.leave()

    in_no_time(run())


def test_a_downgraded_account_is_found_out() -> None:
    """From 50 to 5 slots: one refusal or two for each slot that is gone, and no more."""

    async def run() -> None:
        account = Account(50)
        process = Process(account)
        process.start()
        await asyncio.sleep(10 * LIFE)
        account.limit, before = 5, process.refusals
        await asyncio.sleep(3 * LIFE)
        assert process.slots.in_flight <= 6
        assert process.refusals - before <= 100
        before = process.refusals
        await asyncio.sleep(30 * LIFE)
        assert process.refusals - before <= 0.3 * 5 * 30
        await process.leave()

    in_no_time(run())


SHARING = [
    pytest.param(5, 0.004, 0.0, LIFE, id="callbacks, on the same machine"),
    pytest.param(5, 0.25, 0.0, LIFE, id="callbacks, across the world"),
    pytest.param(5, 0.25, LIFE / 20, LIFE, id="polling"),
    pytest.param(5, 0.25, 2.5, LIFE, id="lazy polling"),
    pytest.param(20, 0.02, 0.0, LIFE, id="20 slots"),
    pytest.param(5, 0.02, 0.0, 60.0, id="long tasks"),
    pytest.param(1, 0.02, 0.0, LIFE, id="1 slot"),
]


@pytest.mark.parametrize(("limit", "trip", "tick", "life"), SHARING)
def test_a_process_that_comes_later_gets_its_share(
    limit: int, trip: float, tick: float, life: float
) -> None:
    """It is not shut out by refills at once: it gets in within minutes, and then its half."""

    async def run(seed: int) -> tuple[float, float, float]:
        account = Account(limit)
        first = Process(account, trip=trip, tick=tick, seed=seed, life=life)
        first.start()
        await asyncio.sleep(30 * life)
        came = now()
        second = Process(account, trip=trip, tick=tick, seed=seed + 100, life=life)
        second.start()
        await asyncio.sleep(100 * life)
        before = first.voices, second.voices
        await asyncio.sleep(200 * life)
        voices = first.voices - before[0], second.voices - before[1]
        full = sum(voices) * life / (200 * life * limit)
        await first.leave()
        await second.leave()
        return second.first - came, voices[1] / sum(voices), full

    runs = [in_no_time(run(seed)) for seed in range(3)]
    assert max(entry for entry, _, _ in runs) <= 420.0
    assert all(0.2 <= share <= 0.8 for _, share, _ in runs), runs
    expected = 1 / (1 + (trip + tick / 2) / life)
    assert mean(full for _, _, full in runs) >= 0.94 * expected


def test_what_a_process_leaves_behind_is_used_again() -> None:
    """When the other one has gone, and the pauses for its sake end."""

    async def run() -> None:
        account = Account(10)
        stays, goes = Process(account, seed=1), Process(account, seed=2)
        stays.start()
        goes.start()
        await asyncio.sleep(60 * LIFE)
        assert min(stays.voices, goes.voices) > 100
        await goes.leave()
        await asyncio.sleep(20 * LIFE)
        before = stays.busy
        await asyncio.sleep(100 * LIFE)
        assert (stays.busy - before) / (100 * LIFE * 10) > 0.97
        await stays.leave()

    in_no_time(run())


def test_three_processes_share_five_slots() -> None:
    """None of them is left with nothing."""

    async def run() -> None:
        account = Account(5)
        processes = [Process(account, seed=seed) for seed in range(3)]
        for process in processes:
            process.start()
            await asyncio.sleep(20 * LIFE)
        before = [process.voices for process in processes]
        await asyncio.sleep(300 * LIFE)
        gained = [process.voices - was for process, was in zip(processes, before, strict=True)]
        assert min(gained) >= 0.1 * sum(gained)
        assert sum(gained) >= 0.9 * 300 * 5
        for process in processes:
            await process.leave()

    in_no_time(run())


def test_a_task_cannot_be_created_before_its_answer_is_in() -> None:
    """With an answer that takes as long as a task, nothing is counted twice or forgotten."""
    process = in_no_time(alone(5, 100, trip=LIFE))

    assert process.voices == 100
    assert process.slots.in_flight == 0


def test_slots_show_what_is_known() -> None:
    """The repr tells how many are held and what is known of the limit."""

    async def refused() -> str:
        slots = Slots()
        for _ in range(2):
            await slots.acquire()
        slots.refused(None)
        return repr(slots)

    assert repr(Slots()) == "<Slots in_flight=0 limit=None>"
    assert in_no_time(refused()) == "<Slots in_flight=1 limit=1>"
