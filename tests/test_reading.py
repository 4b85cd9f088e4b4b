"""How to ask: patience with slow reads, pauses, and whether the list is of use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_voice.models import TaskStatus
from kling_voice.reading import ITEMS, MERGE, ListUse, Patience, Pauses, Witnesses


class TestPatience:
    """A stalled read blinds those who wait for it, so that it is given up before long."""

    def test_at_first(self) -> None:
        """Before anything is known a read may take three seconds, and usually a tenth of one."""
        patience = Patience()
        assert patience.limit == 3.0
        assert patience.margin == pytest.approx(0.2)

    def test_quick_answers_shorten_the_margin_alone(self) -> None:
        """Where reads are quick the last look may begin late; patience does not go below 3 s."""
        patience = Patience()
        for _ in range(50):
            patience.took(0.001)
        assert patience.margin == 0.05
        assert patience.limit == 3.0

    def test_slow_answers_are_waited_for(self) -> None:
        """Where reads are slow, patience and margin grow with them, up to a limit."""
        patience = Patience()
        for _ in range(50):
            patience.took(0.5)
        assert patience.limit == pytest.approx(5.0)
        assert patience.margin == pytest.approx(1.0)
        for _ in range(50):
            patience.took(60.0)
        assert patience.limit == 10.0

    def test_no_read_needs_more_time_than_it_gets(self) -> None:
        """However slow the reads were, the margin is no longer than one of them may take."""
        patience = Patience()
        for _ in range(50):
            patience.took(60.0)
        assert patience.margin == patience.limit

    def test_what_was_given_up_may_only_be_slow(self) -> None:
        """Each read that is given up gets the next one some more time, up to a limit."""
        patience = Patience()
        limits = []
        for _ in range(5):
            patience.gave_up()
            limits.append(patience.limit)
        assert limits[:2] == [pytest.approx(4.625), pytest.approx(9.828125)]
        assert limits[2:] == [10.0] * 3

    def test_one_slow_answer_is_no_rule(self) -> None:
        """A single answer moves the estimate by a quarter of the way."""
        patience = Patience()
        patience.took(0.5)
        assert patience.margin == pytest.approx(0.4)


class TestPauses:
    """When nothing is asked at all."""

    def test_at_first(self) -> None:
        """Asking may begin at any moment of any clock."""
        assert Pauses(float).until < -1e300

    def test_what_the_vendor_asks_for(self) -> None:
        """A Retry-After is honoured from the first failure on."""
        pauses = Pauses(float)
        pauses.failed(100.0, asked=7.0, limited=False)
        assert pauses.until == 107.0

    def test_at_most_a_minute(self) -> None:
        """A silly Retry-After does not blind the waits for hours."""
        pauses = Pauses(float)
        pauses.failed(100.0, asked=1e9, limited=True)
        assert pauses.until == 160.0

    def test_a_pause_is_never_shortened(self) -> None:
        """Another answer that asks for less changes nothing."""
        pauses = Pauses(float)
        pauses.failed(100.0, asked=30.0, limited=False)
        pauses.failed(101.0, asked=1.0, limited=False)
        assert pauses.until == 130.0

    def test_too_many_requests(self) -> None:
        """After "too many requests" there is a pause at once, and a longer one each time."""
        pauses = Pauses(lambda number: 2.0**number)
        untils = []
        for _ in range(3):
            pauses.failed(100.0, asked=None, limited=True)
            untils.append(pauses.until)
        assert untils == [101.0, 102.0, 104.0]

    def test_other_failures_are_forgiven_seven_times_in_a_row(self) -> None:
        """From the eighth failure in a row on, the vendor is left alone, longer each time."""
        pauses = Pauses(lambda number: 2.0**number)
        untils = []
        for _ in range(10):
            pauses.failed(100.0, asked=None, limited=False)
            untils.append(pauses.until)
        assert all(until < 100.0 for until in untils[:7])
        assert untils[7:] == [101.0, 102.0, 104.0]
        assert pauses.failures == 10

    def test_an_answer_ends_the_row(self) -> None:
        """An answer in between, and all is forgiven anew."""
        pauses = Pauses(float)
        for _ in range(7):
            pauses.failed(100.0, asked=None, limited=False)
        pauses.answered()
        assert pauses.failures == 0
        for _ in range(7):
            pauses.failed(100.0, asked=None, limited=False)
        assert pauses.until < 100.0


class TestWhetherToAsk:
    """Few tasks are queried alone, many are looked up in the list."""

    def test_from_three_on(self) -> None:
        """Three tasks due together are worth a page, two are not."""
        assert not ListUse(1.0).is_worth(0.0, 2, 2)
        assert ListUse(1.0).is_worth(0.0, 3, 3)
        assert MERGE == 3

    def test_few_of_many(self) -> None:
        """A page of a thousand tasks is not read for the sake of a handful."""
        assert not ListUse(1.0).is_worth(0.0, 19, 5000)
        assert ListUse(1.0).is_worth(0.0, 20, 5000)

    def test_it_is_worth_nothing_while_it_rests(self) -> None:
        """A list that was of no use is left alone for a while, then tried again."""
        use = ListUse(0.5)
        use.learn(100.0, found=0, items=30, depth=0)
        assert not use.is_worth(100.9, 10, 10)
        assert use.is_worth(101.0, 10, 10)


class TestPageSize:
    """One page should show all that is waited for, and not much more."""

    def test_with_some_room(self) -> None:
        """A page has room for a quarter more than is waited for."""
        assert ListUse(1.0).page_size(400) == 500

    def test_within_bounds(self) -> None:
        """A page has at least the vendor's usual 30 tasks, and at most 1,000."""
        assert ListUse(1.0).page_size(1) == ListUse(1.0).page_size(24) == 30
        assert ListUse(1.0).page_size(25) == 31
        assert ListUse(1.0).page_size(800) == ListUse(1.0).page_size(10**6) == 1000

    def test_as_deep_as_the_awaited_tasks_are(self) -> None:
        """Where other tasks lie in front, pages are larger by those."""
        use = ListUse(1.0)
        use.learn(0.0, found=10, items=100, depth=80)
        assert use.page_size(10) == 100
        assert use.page_size(60) == 100
        assert use.page_size(100) == 125

    def test_depth_is_forgotten(self) -> None:
        """After 16 ticks nobody knows how deep the tasks are: the front is tried again."""
        use = ListUse(0.5)
        use.learn(100.0, found=10, items=400, depth=400)
        assert not use.is_worth(107.9, 9, 9)
        assert use.page_size(9) == 500
        assert use.is_worth(108.0, 9, 9)
        assert use.page_size(9) == 30

    def test_the_next_try_looks_deeper(self) -> None:
        """After a page that was of no use the next one is five times as large, if worth it."""
        use = ListUse(1.0)
        use.learn(0.0, found=0, items=30, depth=0)
        assert use.page_size(8) == 150
        assert use.is_worth(2.0, 8, 8)
        use.learn(2.0, found=0, items=150, depth=0)
        assert use.page_size(8) == 750
        assert not use.is_worth(6.0, 8, 8)
        assert not use.is_worth(21.9, 8, 8)
        assert use.is_worth(22.0, 8, 8)

    def test_a_refused_size_is_not_asked_for_again(self) -> None:
        """Servers that allow 500, 100 or 30 tasks a page are found out, one after the other."""
        use = ListUse(1.0)
        sizes = []
        while True:
            sizes.append(use.page_size(1000))
            if not use.refused(sizes[-1]):
                break
        assert sizes == [1000, 500, 100, 30]

    def test_from_a_size_in_between(self) -> None:
        """The next smaller of the sizes that servers are known to allow is tried."""
        use = ListUse(1.0)
        assert use.refused(400)
        assert use.page_size(1000) == 100

    def test_where_every_size_is_refused_size_is_not_the_reason(self) -> None:
        """After the smallest one was refused the list is asked for large pages again, later."""
        use = ListUse(1.0)
        assert not use.refused(30)
        assert use.page_size(1000) == 1000


class TestGoingOn:
    """Another page is read as long as it promises to save more than it costs."""

    use = ListUse(1.0)

    def test_while_many_are_missing(self) -> None:
        """A full page of awaited tasks, and more to find: on to the next."""
        assert self.use.go_on(found=100, items=100, read=100, missing=900)

    def test_not_at_the_end_of_the_list(self) -> None:
        """Behind an empty page there is nothing."""
        assert not self.use.go_on(found=0, items=0, read=100, missing=900)

    def test_not_for_two(self) -> None:
        """Two that are missing are queried alone, three are not."""
        assert not self.use.go_on(found=30, items=30, read=30, missing=2)
        assert self.use.go_on(found=30, items=30, read=30, missing=3)

    def test_not_where_awaited_tasks_are_rare(self) -> None:
        """A page on which fewer than one in fifty is waited for is the last one."""
        assert self.use.go_on(found=20, items=1000, read=1000, missing=500)
        assert not self.use.go_on(found=19, items=1000, read=1000, missing=500)

    def test_as_deep_as_last_time(self) -> None:
        """Pages of tasks that have ended are passed, if awaited ones were behind them before."""
        use = ListUse(1.0)
        use.learn(0.0, found=100, items=300, depth=250)
        assert use.go_on(found=0, items=100, read=200, missing=50)
        assert not use.go_on(found=0, items=50, read=250, missing=50)

    def test_not_a_large_page_for_a_few(self) -> None:
        """A page of a thousand is not read for fewer than twenty."""
        assert self.use.go_on(found=900, items=1000, read=1000, missing=20)
        assert not self.use.go_on(found=900, items=1000, read=1000, missing=19)


class TestLearning:
    """Where the list proves useless it is left alone, longer each time; and tried again."""

    def test_rests_double_up_to_64_ticks(self) -> None:
        """The rests are 2, 4, 8 … ticks, and never longer than 64."""
        use, now, rests = ListUse(0.5), 0.0, []
        for _ in range(9):
            use.learn(now, found=0, items=100, depth=0)
            start = now
            while not use.is_worth(now, 100, 100):
                now += 0.5
            rests.append((now - start) / 0.5)
        assert rests == [2, 4, 8, 16, 32, 64, 64, 64, 64]

    def test_once_it_is_of_use_all_is_forgiven(self) -> None:
        """After a success the next rest is short again."""
        use = ListUse(1.0)
        for _ in range(5):
            use.learn(0.0, found=0, items=100, depth=0)
        use.learn(100.0, found=50, items=100, depth=100)
        assert use.is_worth(100.0, 50, 50)
        use.learn(100.0, found=0, items=100, depth=0)
        assert not use.is_worth(101.9, 50, 50)
        assert use.is_worth(102.0, 50, 50)

    def test_one_in_fifty_is_of_use(self) -> None:
        """The list is of use if one task in fifty that it shows is waited for."""
        use = ListUse(1.0)
        use.learn(0.0, found=1, items=50, depth=50)
        assert use.is_worth(0.0, 100, 100)
        use.learn(0.0, found=2, items=100, depth=100)
        assert use.is_worth(0.0, 100, 100)
        use.learn(0.0, found=2, items=101, depth=100)
        assert not use.is_worth(0.0, 100, 100)

    def test_an_empty_list_is_of_no_use(self) -> None:
        """A list without tasks rests like one without ours."""
        use = ListUse(1.0)
        use.learn(0.0, found=0, items=0, depth=0)
        assert not use.is_worth(1.0, 100, 100)

    def test_a_passing_failure_is_forgiven_once(self) -> None:
        """The second failure in a row lets the list rest."""
        use = ListUse(1.0)
        use.failed(0.0, for_good=False)
        assert use.is_worth(0.0, 9, 9)
        use.failed(0.0, for_good=False)
        assert not use.is_worth(1.9, 9, 9)
        assert use.is_worth(2.0, 9, 9)
        use.failed(2.0, for_good=False)
        assert use.is_worth(2.0, 9, 9)
        use.failed(2.0, for_good=False)
        assert not use.is_worth(5.9, 9, 9)
        assert use.is_worth(6.0, 9, 9)

    def test_a_success_in_between_is_a_new_beginning(self) -> None:
        """Failures count in a row only."""
        use = ListUse(1.0)
        for _ in range(4):
            use.failed(0.0, for_good=False)
            use.learn(0.0, found=9, items=9, depth=9)
        assert use.is_worth(0.0, 9, 9)
        for _ in range(2):
            use.failed(0.0, for_good=False)
        assert not use.is_worth(0.0, 9, 9)

    def test_a_failure_for_good_is_not_forgiven(self) -> None:
        """A list that may not be read rests from the first refusal on."""
        use = ListUse(1.0)
        use.failed(0.0, for_good=True)
        assert not use.is_worth(1.9, 9, 9)
        assert use.is_worth(2.0, 9, 9)

    @given(
        st.lists(
            st.tuples(st.integers(0, 60), st.integers(0, 3000), st.integers(1, 5000)), max_size=30
        )
    )
    def test_its_figures_stay_in_bounds(self, history: list[tuple[int, int, int]]) -> None:
        """Whatever the list showed, pages have 30 to 1,000 tasks, and it is tried again."""
        use = ListUse(1.0)
        for found, more, awaited in history:
            items = found + more
            use.learn(0.0, found=found, items=items, depth=items if found else 0)
            assert 30 <= use.page_size(awaited) <= 1000
            assert use.is_worth(80.0, max(MERGE, awaited), awaited)
        assert ITEMS == 50


class TestWitnesses:
    """What was told otherwise convicts a list that goes on denying it."""

    @pytest.mark.parametrize(
        ("told", "shown", "refuted"),
        [
            ("succeed", "processing", True),
            ("failed", "submitted", True),
            ("processing", "submitted", True),
            ("processing", "processing", False),
            ("processing", "succeed", False),
            ("succeed", "succeeded", False),
            ("succeed", "a new word", False),
            ("succeed", None, False),
        ],
    )
    def test_only_what_is_long_over_convicts(self, told: str, shown: object, refuted: bool) -> None:
        """A step back convicts a list that was asked for more than 5 s after it was known."""
        witnesses = Witnesses()
        witnesses.note("t", TaskStatus(told), 10.0)
        assert witnesses.refute("t", shown, 15.1) is refuted
        assert not witnesses.refute("t", shown, 14.9)
        assert not witnesses.refute("u", shown, 99.0)
        assert not witnesses.refute(["t"], shown, 99.0)

    def test_a_state_is_old_from_its_first_telling_on(self) -> None:
        """What is told again does not become younger, and nothing older takes its place."""
        witnesses = Witnesses()
        witnesses.note("t", TaskStatus.SUCCEED, 10.0)
        witnesses.note("t", TaskStatus.SUCCEED, 14.0)
        witnesses.note("t", TaskStatus.PROCESSING, 14.0)
        assert witnesses.refute("t", "processing", 16.0)

    def test_only_so_many_are_remembered(self) -> None:
        """The newest 1,024 are."""
        witnesses = Witnesses()
        for number in range(1025):
            witnesses.note(f"t{number}", TaskStatus.SUCCEED, 0.0)
        assert not witnesses.refute("t0", "processing", 9.0)
        assert witnesses.refute("t1", "processing", 9.0)
        assert witnesses.refute("t1024", "processing", 9.0)

    def test_they_are_called_rarely(self) -> None:
        """One in a hundred is called, at the first list and every fourth one after it."""
        witnesses = Witnesses()
        assert [witnesses.call(101) for _ in range(6)] == [2, 0, 0, 0, 2, 0]
        assert [witnesses.call(0) for _ in range(9)] == [0] * 9
        assert [witnesses.call(1) for _ in range(4)] == [0, 0, 1, 0]
