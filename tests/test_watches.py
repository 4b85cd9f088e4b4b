"""Who waits for which task, and what is known of it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from driven import driven, told

from kling_voice.errors import ApiError, ClientClosedError
from kling_voice.schedule import NEVER
from kling_voice.watches import Look, Waiter, Watch, Watches, follows


def waiter(**options: Any) -> Waiter:
    """Make a waiter that wants to be told everything."""
    last = options.pop("last", None)
    return Waiter(last, **{"eager": True, "timeout": NEVER, "deadline": NEVER, **options})


def at(watch: Watch, *waiters: Waiter) -> None:
    """Let someone wait for a watch's task."""
    for one in waiters:
        watch.join(one)


def statuses(one: Waiter) -> list[str]:
    """Tell the words that a waiter has still to take in."""
    return [str(task.task_status) for task in one.news]


class TestFollows:
    """A task never goes backwards."""

    def test_anything_follows_nothing(self) -> None:
        """The first state is news."""
        assert follows(None, told(status="submitted"))

    def test_steps(self) -> None:
        """A step forward follows, whatever the clocks say; a step back does not."""
        early, late = told(status="processing", updated_at=1), told(updated_at=2)
        assert follows(late, early)
        assert not follows(early, late)
        assert not follows(told(status="succeed"), told(status="processing", updated_at=9))

    def test_words_of_the_same_rank_go_by_the_clock(self) -> None:
        """Between processing and an unknown word, the newer state counts."""
        old, new = told(status="processing", updated_at=1), told(status="reviewing", updated_at=2)
        assert follows(old, new)
        assert not follows(new, old)
        assert follows(new, new)

    def test_without_a_clock_any_change_counts(self) -> None:
        """Where the vendor does not tell the time, what came last is the newest."""
        bare, timed = told(status="processing"), told(status="reviewing", updated_at=2)
        assert follows(timed, bare)
        assert follows(bare, timed)


class TestWaiter:
    """One call that waits."""

    def test_each_change_once_in_order(self) -> None:
        """Every change of the status is news once, steps back and repeats are not."""
        one = waiter()
        for status in ("submitted", "submitted", "processing", "submitted", "succeed", "failed"):
            one.tell(told(status=status))
        assert statuses(one) == ["submitted", "processing", "succeed"]
        assert one.last is not None
        assert one.last.succeeded

    def test_from_the_last_one_known(self) -> None:
        """What the caller knew is no news."""
        one = waiter(last=told(status="processing"))
        one.tell(told(status="submitted"))
        one.tell(told(status="processing"))
        assert one.news == []

    def test_who_wants_the_end_alone(self) -> None:
        """Without an on_update only the end is news, but the last state is known."""
        one = waiter(eager=False)
        one.tell(told(status="processing"))
        assert one.news == []
        assert one.last is not None
        assert one.last.task_status == "processing"
        one.tell(told(status="failed"))
        assert statuses(one) == ["failed"]

    def test_an_error_of_its_own(self) -> None:
        """An error that several waiters get is a copy for each, with all its attributes."""
        error = ApiError("no", code=1103, request_id="r", http_status=403)
        ours, theirs = waiter(), waiter()
        ours.fail(error)
        theirs.fail(error)
        assert ours.error is not theirs.error
        assert isinstance(ours.error, ApiError)
        assert (ours.error.code, ours.error.request_id) == (1103, "r")

    def test_a_foreign_error_is_taken_as_it_is(self) -> None:
        """What cannot be copied for certain is not."""
        error = KeyError("a bug")
        one = waiter()
        one.fail(error)
        assert one.error is error

    @driven
    async def test_it_is_woken(self) -> None:
        """News, an error and the deadline wake it up; twice does no harm."""
        wakes: list[Callable[[Waiter], None]] = [
            lambda one: one.tell(told(status="succeed")),
            lambda one: one.fail(ClientClosedError("closed")),
            lambda one: one.expire(),
        ]
        for wake in wakes:
            one = waiter()
            wake(one)  # nobody sleeps yet
            sleeping = asyncio.create_task(one.woken())
            await asyncio.sleep(0)
            assert not sleeping.done()
            wake(one)
            one.expire()
            await sleeping


class TestWatch:
    """A task that someone waits for."""

    def test_all_who_wait_are_told(self) -> None:
        """What is told reaches everyone, and is remembered."""
        watch = Watch("t", 0.0)
        at(watch, waiter(), waiter())
        watch.tell(told(status="processing"))
        assert [statuses(one) for one in watch.waiters] == [["processing"]] * 2
        assert watch.task == told(status="processing")

    @pytest.mark.parametrize("newer_is_absorbed", [True, False])
    def test_two_become_one(self, newer_is_absorbed: bool) -> None:
        """Of two watches of one task the newer state counts, and everyone gets to know it."""
        seen = (3.0, 5.0) if newer_is_absorbed else (5.0, 3.0)
        watch, other = Watch("t", seen[0]), Watch("e", seen[1])
        ours, theirs = waiter(), waiter()
        at(watch, ours)
        at(other, theirs)
        newer, older = (other, watch) if newer_is_absorbed else (watch, other)
        older.tell(told(status="submitted"))
        newer.tell(told(status="processing"))
        watch.absorb(other)
        assert list(watch.waiters) == [ours, theirs]
        assert ours.watch is theirs.watch is watch
        assert statuses(ours)[-1] == statuses(theirs)[-1] == "processing"
        assert watch.task == told(status="processing")
        assert watch.seen == 5.0

    def test_one_that_knows_nothing(self) -> None:
        """A watch without a state takes on the other's, and the other way round."""
        for knows in (0, 1):
            both = [Watch("t", 0.0), Watch("e", 0.0)]
            waiters = [waiter(), waiter()]
            for watch, one in zip(both, waiters, strict=True):
                at(watch, one)
            both[knows].tell(told())
            both[0].absorb(both[1])
            assert both[0].task == told()
            assert [statuses(one) for one in waiters] == [["submitted"]] * 2

    def test_two_that_know_nothing(self) -> None:
        """Nothing is told where nothing is known."""
        watch, other = Watch("t", 0.0), Watch("e", 0.0)
        watch.absorb(other)
        assert watch.task is None

    def test_of_another_task(self) -> None:
        """Only a task_id that differs from the known one tells that a state is another task's."""
        watch = Watch("t", 0.0)
        assert not watch.is_of_another("u")
        watch.tell(told("t"))
        assert watch.is_of_another("u")
        assert not any(watch.is_of_another(same) for same in ("t", "", None))
        watch.tell(told(""))
        assert not watch.is_of_another("u")


class TestLook:
    """A read for some watches."""

    @driven
    async def test_the_last_one_to_leave_ends_it(self) -> None:
        """It goes on as long as it serves anyone, and no longer."""
        one, other = Watch("a", 0.0), Watch("b", 0.0)
        look = Look([one, other], 7.0)
        look.task = asyncio.create_task(asyncio.sleep(99))
        assert one.look is other.look is look
        assert one.looked == other.looked == 7.0
        look.drop(one)
        await asyncio.sleep(0)
        assert one.look is None
        assert not look.task.cancelling()
        look.drop(other)
        with pytest.raises(asyncio.CancelledError):
            await look.task

    def test_it_is_what_a_prompt_asked_for(self) -> None:
        """Nothing is urgent before a callback asks for it, nor once a look has begun."""
        watch = Watch("a", 0.0)
        assert not watch.urgent
        watch.urgent = True
        Look([watch], 7.0)
        assert not watch.urgent

    @driven
    async def test_it_does_not_end_itself(self) -> None:
        """A look that tells of the end of its last task is not cancelled for that."""
        watch = Watch("a", 0.0)
        look = Look([watch], 0.0)

        async def read() -> None:
            look.drop(watch)
            await asyncio.sleep(0)

        look.task = asyncio.create_task(read())
        await look.task

    @driven
    async def test_one_in_the_queue_is_just_left(self) -> None:
        """A look that has not begun has nothing to cancel."""
        watch = Watch("a", 0.0)
        look = Look([watch], 0.0)
        look.drop(watch)
        assert not look.serves


class TestWatches:
    """All of them, by either id."""

    def test_one_for_each_task(self) -> None:
        """The same id gives the same watch."""
        watches = Watches()
        watch = watches.open("t", 5.0)
        assert watches.open("t", 6.0) is watch
        assert watch.seen == 5.0
        assert watches.open("u", 0.0) is not watch
        assert len(watches) == 2

    def test_found_by_either_id(self) -> None:
        """Once both ids are known, either finds the watch; what is no id finds nothing."""
        watches = Watches()
        watch = watches.open("t", 0.0)
        assert watches.learn(watch, told("t", task_info={"external_task_id": "e"})) == []
        assert watches.find("t") is watches.find("e") is watches.find(None, "e") is watch
        assert watches.find(3, "e") is watches.find("x", "e") is watch
        assert watches.find("x") is watches.find(None, []) is watches.find({}, 3) is None
        assert len(watches) == 1
        assert list(watches) == [watch]

    def test_two_of_one_task_are_told(self) -> None:
        """Where two ids that are waited for turn out to be one task's, that is told, once."""
        watches = Watches()
        watch, other = watches.open("t", 0.0), watches.open("e", 0.0)
        state = told("t", task_info={"external_task_id": "e"})
        assert watches.learn(watch, state) == [other]
        stranger = watches.open("s", 0.0)
        watches.merge(watch, other)
        assert watches.learn(stranger, state) == [watch]

    def test_merged(self) -> None:
        """Of two watches one remains, under all the ids of both, and asked for by its own first."""
        watches = Watches()
        watch, other = watches.open("t", 0.0), watches.open("e", 0.0)
        watches.merge(watch, other)
        assert watches.find("t") is watches.find("e") is watch
        assert watch.ids == ["t", "e"]
        assert len(watches) == 1
        watches.remove(watch)
        assert watches.find("t", "e") is None
        assert len(watches) == 0

    def test_empty_external_ids_do_not_make_one_of_all(self) -> None:
        """A vendor who spells "no external id" as an empty string does not mix up the tasks."""
        watches = Watches()
        one, other = watches.open("t", 0.0), watches.open("u", 0.0)
        assert watches.learn(one, told("t", task_info={"external_task_id": ""})) == []
        assert watches.learn(other, told("u", task_info={"external_task_id": ""})) == []
        assert watches.find("") is None

    def test_an_empty_task_id_does_not_hide_the_other_id(self) -> None:
        """A task whose own id is left empty is known by its external one."""
        watches = Watches()
        watch = watches.open("t", 0.0)
        assert watches.learn(watch, told("", task_info={"external_task_id": "e"})) == []
        assert watches.find("e") is watch
        assert watches.find("") is None

    def test_a_task_id_goes_before_an_external_id(self) -> None:
        """An id that is one task's external id and another's task_id finds the other one."""
        watches = Watches()
        state = told("u", task_info={"external_task_id": "t"})
        by_external_id = watches.open("t", 0.0)
        watches.learn(by_external_id, state)
        by_external_id.tell(state)
        assert watches.open("t", 0.0) is by_external_id
        watch = watches.open("t", 0.0, certain=True)
        watch.tell(told("t"))
        assert watches.open("t", 0.0, certain=True) is watch
        assert watches.find("t") is watch
        assert watches.find("u", "t") is by_external_id
        assert watches.find("v", "t") is None
        assert watches.learn(by_external_id, state) == []
        assert (watch.ids, by_external_id.ids) == (["t"], ["u"])
        watches.remove(by_external_id)
        assert list(watches) == [watch]

    def test_a_task_id_that_is_learned_goes_before_too(self) -> None:
        """So it is if the task_id is learned from a state, since that wait was by another id."""
        watches = Watches()
        state = told("u", task_info={"external_task_id": "t"})
        other = watches.open("u", 0.0, certain=True)
        watches.learn(other, state)
        other.tell(state)
        watch = watches.open("e", 0.0)
        assert watches.learn(watch, told("t", task_info={"external_task_id": "e"})) == []
        assert watches.find("t") is watch
        assert (watch.ids, other.ids) == (["e", "t"], ["u"])

    def test_ids_are_noted_once(self) -> None:
        """However often a task is seen, its ids are kept once."""
        watches = Watches()
        watch = watches.open("t", 0.0)
        for _ in range(3):
            watches.learn(watch, told("t", task_info={"external_task_id": "e"}))
        assert watch.ids == ["t", "e"]
