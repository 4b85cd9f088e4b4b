"""When to look: the intervals, the ticks, the deadlines, and the agenda."""

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import AsyncRetrying, RetryCallState, wait_exponential

from kling_voice.models import TaskStatus
from kling_voice.policies import PollingPolicy
from kling_voice.schedule import NEVER, Agenda, Schedule, advances

SUBMITTED, PROCESSING = TaskStatus.SUBMITTED, TaskStatus.PROCESSING
SUCCEED, FAILED = TaskStatus.SUCCEED, TaskStatus.FAILED
REVIEWING = TaskStatus("reviewing")  # a word that this version does not know
STATUSES = [SUBMITTED, PROCESSING, REVIEWING, SUCCEED, FAILED]

seconds = st.floats(0.001, 1e4)
moments = st.floats(0.0, 1e7)
policies = st.builds(
    PollingPolicy,
    initial=seconds,
    multiplier=st.floats(1.0, 10.0),
    maximum=seconds,
    jitter=st.floats(0.0, 3.0),
)
schedules = st.builds(
    Schedule, policies, slow=st.booleans(), seed=st.floats(0.0, 1.0, exclude_max=True)
)


class TestAdvances:
    """A status never goes backwards, nor leaves an end."""

    @pytest.mark.parametrize("told", STATUSES)
    def test_anything_follows_nothing(self, told: TaskStatus) -> None:
        """The first state that is told is news, whatever it is."""
        assert advances(None, told)

    @pytest.mark.parametrize(
        ("known", "told", "follows"),
        [
            (SUBMITTED, SUBMITTED, True),
            (SUBMITTED, PROCESSING, True),
            (SUBMITTED, REVIEWING, True),
            (SUBMITTED, SUCCEED, True),
            (PROCESSING, SUBMITTED, False),
            (PROCESSING, PROCESSING, True),
            (PROCESSING, REVIEWING, True),
            (PROCESSING, FAILED, True),
            (REVIEWING, SUBMITTED, False),
            (REVIEWING, PROCESSING, True),
            (REVIEWING, SUCCEED, True),
            (SUCCEED, SUBMITTED, False),
            (SUCCEED, PROCESSING, False),
            (SUCCEED, REVIEWING, False),
            (SUCCEED, SUCCEED, False),
            (SUCCEED, FAILED, False),
            (FAILED, SUCCEED, False),
        ],
    )
    def test_the_order_of_the_words(
        self, known: TaskStatus, told: TaskStatus, follows: bool
    ) -> None:
        """Submitted comes before all others, an end after all others."""
        assert advances(known, told) is follows


class TestIntervals:
    """The intervals are tenacity's."""

    @given(policies, st.integers(0, 10_000))
    def test_they_are_tenacitys(self, policy: PollingPolicy, looks: int) -> None:
        """After n looks the interval is what wait_exponential gives for the attempt n + 1."""
        state = RetryCallState(AsyncRetrying(), None, (), {})
        state.attempt_number = looks + 1
        expected = wait_exponential(
            multiplier=policy.initial, exp_base=policy.multiplier, max=policy.maximum
        )(state)
        assert Schedule(policy).interval(looks) == expected

    def test_they_grow_to_the_maximum(self) -> None:
        """The first is the initial one, each further one longer by the multiplier, up to a cap."""
        schedule = Schedule(PollingPolicy(initial=1.0, multiplier=2.0, maximum=5.0))
        assert [schedule.interval(looks) for looks in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]

    def test_a_wait_for_ever_does_not_overflow(self) -> None:
        """However often a task was looked at, the interval is the maximum."""
        schedule = Schedule(PollingPolicy(initial=1.0, multiplier=3.0, maximum=5.0))
        assert schedule.interval(10**7) == 5.0

    @given(policies, st.integers(0, 100))
    def test_slow_is_the_maximum_always(self, policy: PollingPolicy, looks: int) -> None:
        """With callbacks, polling is the net underneath: only every so often."""
        assert Schedule(policy, slow=True).interval(looks) == policy.maximum


class TestTicks:
    """Reads fall due at moments that all tasks of a client share."""

    def test_without_jitter_they_are_multiples(self) -> None:
        """A tick is a multiple of the initial interval, the nearest to what was asked for."""
        schedule = Schedule(PollingPolicy(initial=2.0, maximum=10.0, jitter=0.0))
        assert schedule.tick(100.0, 104.9) == 104.0
        assert schedule.tick(100.0, 105.1) == 106.0

    def test_one_that_has_passed_is_not_given(self) -> None:
        """A tick is after now, even if the nearest one is now or before."""
        schedule = Schedule(PollingPolicy(initial=2.0, maximum=10.0, jitter=0.0))
        assert schedule.tick(100.0, 100.5) == 102.0
        assert schedule.tick(100.5, 100.6) == 102.0
        assert schedule.tick(100.0, 50.0) == 102.0

    def test_they_are_no_longer_apart_than_the_maximum(self) -> None:
        """A policy whose maximum is below its initial interval has ticks of the maximum."""
        schedule = Schedule(PollingPolicy(initial=9.0, maximum=3.0, jitter=0.0))
        assert schedule.period == 3.0
        assert schedule.tick(0.0, 3.0) == 3.0

    @given(schedules, moments, seconds)
    def test_one_is_near_what_was_asked_for(
        self, schedule: Schedule, now: float, ahead: float
    ) -> None:
        """A tick is after now, and less than a tick away from the target or from now."""
        tick = schedule.tick(now, now + ahead)
        assert now < tick
        assert tick <= max(now + 2 * schedule.period, now + ahead + schedule.period)
        assert tick >= now + ahead - schedule.period

    @given(policies, st.floats(0.0, 1.0), st.integers(0, 10_000), seconds, seconds)
    def test_they_are_shared(
        self, policy: PollingPolicy, seed: float, number: int, one: float, other: float
    ) -> None:
        """Whoever asks, and whenever: the same tick is the very same moment."""
        schedule = Schedule(policy, seed=seed)
        target = number * schedule.period
        ticks = {schedule.tick(target - wait, target) for wait in (one, other)}
        ticks = {tick for tick in ticks if abs(tick - target) <= schedule.period / 2}
        assert len(ticks) <= 1

    @given(policies, st.floats(0.0, 1.0), st.integers(0, 10_000))
    def test_jitter_moves_their_phase(
        self, policy: PollingPolicy, seed: float, number: int
    ) -> None:
        """A tick is off its place by at most half the jitter, and ticks never change places."""
        schedule = Schedule(policy, seed=seed)
        place = number * schedule.period
        tick = schedule.tick(place - schedule.period / 2, place)
        assert abs(tick - place) <= policy.jitter * schedule.period / 2 + 1e-6
        assert schedule.tick(tick, tick + schedule.period) > tick

    def test_jitter_differs_from_tick_to_tick_and_from_client_to_client(self) -> None:
        """Many clients do not ask in step, not even some of the time."""
        policy = PollingPolicy(initial=1.0, maximum=1.0, jitter=0.5)
        one, other = Schedule(policy, seed=0.1), Schedule(policy, seed=0.6)
        offsets = [{s.tick(n - 0.5, n) - n for n in range(10, 30)} for s in (one, other)]
        assert all(len(of_one) == 20 for of_one in offsets)
        assert all(max(of_one) - min(of_one) > 0.4 for of_one in offsets)
        assert not offsets[0] & offsets[1]
        assert Schedule(policy).tick(0.6, 1.0) != Schedule(policy).tick(0.6, 1.0)

    def test_a_jitter_wider_than_a_tick_is_cut(self) -> None:
        """It spreads ticks over nearly a whole one, and they still come in their order."""
        schedule = Schedule(PollingPolicy(initial=1.0, maximum=1.0, jitter=3.0), seed=0.1)
        ticks = [schedule.tick(number - 2.0, number) for number in range(10, 100)]
        offsets = [tick - number for number, tick in enumerate(ticks, 10)]
        assert ticks == sorted(set(ticks))
        assert 0.8 < max(offsets) - min(offsets) < 1.0

    def test_a_beat_is_a_part_of_a_tick_and_never_long(self) -> None:
        """What shares a read without waiting for a tick is moved by a tenth of a second at most."""
        assert Schedule(PollingPolicy(initial=0.4, maximum=1.0)).beat == 0.05
        assert Schedule(PollingPolicy(initial=20.0, maximum=20.0)).beat == 0.1


class TestDeadlines:
    """The last sleep is clipped; nothing begins that cannot end in time."""

    schedule = Schedule(PollingPolicy(initial=1.0, maximum=5.0, jitter=0.0))

    def test_a_look_within_the_deadline_stays(self) -> None:
        """A look that is due early enough is not moved."""
        assert self.schedule.clip(10.0, 12.0, [15.0]) == 12.0

    def test_a_sleep_across_the_deadline_is_clipped(self) -> None:
        """A look that would come too late comes at the last moment."""
        assert self.schedule.clip(10.0, 16.0, [15.0]) == 15.0

    def test_the_nearest_deadline_counts(self) -> None:
        """Of those who wait for one task, the first to leave gets its last look too."""
        assert self.schedule.clip(10.0, 16.0, [15.0, 13.0, NEVER, 14.0]) == 13.0

    def test_no_look_is_planned_for_nobody(self) -> None:
        """If nobody has the time for another look, there is none."""
        assert self.schedule.clip(10.0, 12.0, []) == NEVER
        assert self.schedule.clip(10.0, 12.0, [9.0, 10.0]) == NEVER

    def test_those_who_have_no_time_left_do_not_count(self) -> None:
        """One who has had the last look does not hasten those of the others."""
        assert self.schedule.clip(10.0, 12.0, [9.0, 20.0]) == 12.0

    def test_no_deadline(self) -> None:
        """A wait for ever has no last look."""
        assert self.schedule.last_look(NEVER, NEVER, 0.2) == NEVER
        assert self.schedule.clip(10.0, 12.0, [NEVER]) == 12.0

    @pytest.mark.parametrize("timeout", [1.0, 60.0])
    def test_the_last_look_falls_on_a_beat(self, timeout: float) -> None:
        """The last looks of waits of a tick or more that end about together fall together."""
        lasts = {self.schedule.last_look(100.01 + i / 1000, timeout, 0.2) for i in range(90)}
        assert len(lasts) <= 2

    def test_a_short_wait_uses_all_its_time(self) -> None:
        """A wait shorter than a tick has its last look as late as may be."""
        assert self.schedule.last_look(100.15, 0.15, 0.02) == pytest.approx(100.13)
        assert self.schedule.last_look(100.08, 0.08, 10.0) == pytest.approx(100.06)

    @given(schedules, moments, st.floats(0.0, 1e4), st.floats(0.0, 60.0))
    def test_the_last_look_is_in_time(
        self, schedule: Schedule, now: float, timeout: float, margin: float
    ) -> None:
        """It leaves the margin, or else a quarter of the wait; at most a beat is given away."""
        last = schedule.last_look(now + timeout, timeout, margin)
        kept = min(margin, timeout / 4)
        assert last <= now + timeout - kept + 1e-6
        assert last >= now + timeout - kept - schedule.beat - 1e-6
        assert last >= now - 1e-6

    @given(schedules, moments, seconds, st.lists(moments, max_size=5))
    def test_clipping_only_hastens(
        self, schedule: Schedule, now: float, ahead: float, lasts: list[float]
    ) -> None:
        """A clipped look is after now, not later than it was due, and in somebody's time."""
        moment = schedule.clip(now, now + ahead, lasts)
        if moment == NEVER:
            assert all(last <= now for last in lasts)
        else:
            assert now < moment <= now + ahead
            assert any(moment <= last for last in lasts)


class TestAgenda:
    """Who is due when; each one once."""

    def test_an_empty_one(self) -> None:
        """Nobody is due, ever."""
        agenda: Agenda[str] = Agenda()
        assert agenda.first == NEVER
        assert agenda.moment("a") == NEVER
        assert agenda.take(math.inf) == []
        assert len(agenda) == 0

    def test_those_of_one_moment_come_together(self) -> None:
        """All who are due by a moment are given at once, the earliest first."""
        agenda: Agenda[str] = Agenda()
        for who, moment in (("late", 9.0), ("b", 2.0), ("a", 1.0), ("also b", 2.0)):
            agenda.plan(who, moment)
        assert agenda.first == 1.0
        assert agenda.take(2.0) == ["a", "b", "also b"]
        assert agenda.take(2.0) == []
        assert agenda.first == 9.0
        assert len(agenda) == 1

    def test_planning_anew_replaces(self) -> None:
        """Who is planned anew is due at the new moment only, be it earlier or later."""
        agenda: Agenda[str] = Agenda()
        agenda.plan("a", 5.0)
        agenda.plan("a", 3.0)
        assert agenda.first == agenda.moment("a") == 3.0
        agenda.plan("a", 7.0)
        assert agenda.first == agenda.moment("a") == 7.0
        assert agenda.take(6.0) == []
        assert agenda.take(7.0) == ["a"]

    def test_planning_for_never_drops(self) -> None:
        """Who is never due is not there."""
        agenda: Agenda[str] = Agenda()
        agenda.plan("a", 5.0)
        agenda.plan("a", NEVER)
        agenda.plan("b", NEVER)
        agenda.drop("c")
        assert len(agenda) == 0
        assert agenda.first == NEVER

    @given(
        st.lists(
            st.tuples(st.sampled_from("pdt"), st.integers(0, 5), st.integers(0, 8)), max_size=60
        )
    )
    def test_it_does_what_a_dictionary_would(self, steps: list[tuple[str, int, int]]) -> None:
        """Whatever is planned, dropped and taken, it tells the same as a plain dictionary."""
        agenda: Agenda[int] = Agenda()
        model: dict[int, float] = {}
        for what, who, moment in steps:
            if what == "p":
                agenda.plan(who, float(moment))
                model[who] = float(moment)
            elif what == "d":
                agenda.drop(who)
                model.pop(who, None)
            else:
                taken = agenda.take(float(moment))
                assert sorted(taken) == sorted(w for w, at in model.items() if at <= moment)
                due = [model.pop(who) for who in taken]
                assert due == sorted(due)
            assert len(agenda) == len(model)
            assert agenda.first == min(model.values(), default=NEVER)
            assert all(agenda.moment(who) == model.get(who, NEVER) for who in range(6))

    def test_what_was_dropped_takes_no_room(self) -> None:
        """A million plans that came to nothing leave nothing behind, though their time is far."""
        agenda: Agenda[int] = Agenda()
        for number in range(20_000):
            agenda.plan(0, 1e6 + number % 7 + number / 1e6)
        assert len(agenda) == 1
        assert len(agenda._order) < 300
        agenda.drop(0)
        assert agenda.first == NEVER
        assert len(agenda._order) == 0


def test_importing_needs_no_event_loop() -> None:
    """Deciding is pure: it works where no event loop runs."""
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert Schedule(PollingPolicy()).tick(0.0, 1.0) > 0.0
