"""One voice from its slot to its end; and a hundred at once."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from cast import ADA, CREATE, QUERY, Shelf, all_of, client_of, emulating, requests, until, url
from cast import brisk as brisk
from cast import nothing_left as nothing_left
from wire import MakeClient, Server, envelope, task

from kling_voice import (
    AccountError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    ResponseError,
    RetryPolicy,
    SampleError,
    ServerError,
    TaskFailedError,
    VoiceTask,
    WaitTimeoutError,
)
from kling_voice.emulator import Fault, Faults

ONCE = RetryPolicy(attempts=1)


# --- slots ---


async def test_a_hundred_calls_at_once_just_work() -> None:
    """On an account of five slots: each has its voice, and fewer creates are refused than made."""
    with emulating(concurrency_limit=5, task_seconds=0.15) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            voices = await asyncio.gather(
                *(kling.clone_voice(f"Voice {n}", voice_url=url(n)) for n in range(100))
            )

        assert [voice.voice_name for voice in voices] == [f"Voice {n}" for n in range(100)]
        assert emulator.created == 100
        assert emulator.max_in_flight == 5
        assert emulator.refused[1303] < 100  # the figure is test_slots.py's, whose clock is driven


async def test_a_slot_is_held_until_the_task_ends() -> None:
    """Not only until the create is answered."""
    with emulating(concurrency_limit=2, time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator) as kling:
            calls = [
                asyncio.create_task(kling.clone_voice(f"Voice {n}", voice_url=url(n)))
                for n in range(3)
            ]
            await until(lambda: kling.slots.limit is not None)
            assert (kling.slots.in_flight, kling.slots.limit) == (2, 2)
            await asyncio.sleep(0.05)
            assert emulator.created == 2
            emulator.advance(10)
            await until(lambda: emulator.created == 3)
            emulator.advance(10)
            await asyncio.gather(*calls)
            assert kling.slots.in_flight == 0


async def test_calls_are_served_in_their_order() -> None:
    """A create that was refused after it had its turn goes before those that had none yet."""
    with emulating(concurrency_limit=1) as emulator:
        async with client_of(emulator) as kling:
            await asyncio.gather(
                *(kling.clone_voice(f"{number:02}", voice_url=url(0)) for number in range(16))
            )

        assert emulator.refused[1303] >= 3
        created = [int(task.voice_name) for task in emulator.tasks]
    # Those that go at once may overtake each other; at the queue's end they would wait for all.
    assert max(abs(number - place) for place, number in enumerate(created)) <= 6


async def test_single_voices_and_batches_share_the_slots() -> None:
    """Two batches and fifty single voices at once: the account's limit is kept by all of them."""
    with emulating(concurrency_limit=6, task_seconds=0.15) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            singles, *batches = await asyncio.gather(
                asyncio.gather(*(kling.clone_voice("One", voice_url=url(n)) for n in range(50))),
                all_of(kling.clone_voices(requests(30))),
                all_of(kling.clone_voices(requests(30, start=30))),
            )

        assert len(singles) == 50
        assert all(result.voice for batch in batches for result in batch)
        assert emulator.created == 110
        assert emulator.max_in_flight == 6
        assert emulator.refused[1303] < 110  # the figure is test_slots.py's, whose clock is driven


async def test_queueing_for_a_slot_does_not_eat_the_timeout() -> None:
    """It runs from the accepted create: twenty lives of a task are queued for, one is waited."""
    with emulating(concurrency_limit=1, task_seconds=0.05) as emulator:
        async with client_of(emulator) as kling:
            voices = await asyncio.gather(
                *(kling.clone_voice("Ada", voice_url=url(n), timeout=0.6) for n in range(20))
            )

        assert len(voices) == 20


async def test_a_wait_that_timed_out_holds_its_slot_for_one_further_timeout_at_most() -> None:
    """The task goes on at the vendor, and so does its slot; but not for ever."""
    with emulating(time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator) as kling:
            with pytest.raises(WaitTimeoutError) as caught:
                await kling.clone_voice("Ada", voice_url=url(0), timeout=0.2)
            assert caught.value.task is not None
            assert caught.value.external_task_id == emulator.tasks[0].external_task_id
            assert kling.slots.in_flight == 1
            await asyncio.sleep(0.1)
            assert kling.slots.in_flight == 1
            await asyncio.sleep(0.15)
            assert kling.slots.in_flight == 0


async def test_the_slot_of_a_timed_out_wait_comes_back_when_its_task_ends() -> None:
    """However long the further timeout is."""
    with emulating(time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator) as kling:
            late = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(0), timeout=0.3))
            with pytest.raises(WaitTimeoutError):
                await late
            emulator.advance(10)
            await asyncio.sleep(0.1)
            assert kling.slots.in_flight == 0


async def test_closing_ends_what_holds_the_slot_of_a_timed_out_wait() -> None:
    """No asyncio task is left."""
    with emulating(time_scale=0.0, task_seconds=9.0) as emulator:
        kling = client_of(emulator)
        async with nothing_left(kling):
            with pytest.raises(WaitTimeoutError):
                await kling.clone_voice("Ada", voice_url=url(0), timeout=0.05)
            await kling.close()


async def test_who_gives_up_gives_the_slot_back() -> None:
    """While waiting for a slot, for the answer, or for the end; the next one goes on at once."""
    with emulating(concurrency_limit=1, time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            first = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(0)))
            await until(lambda: emulator.created)
            queued = asyncio.create_task(kling.clone_voice("Bob", voice_url=url(1)))
            await until(lambda: emulator.refused[1303])
            queued.cancel()
            first.cancel()
            told = await asyncio.gather(first, queued, return_exceptions=True)
            assert all(isinstance(error, asyncio.CancelledError) for error in told)
            assert kling.slots.in_flight == 0


async def test_an_error_in_on_update_reaches_the_caller_and_frees_the_slot() -> None:
    """The caller's own exception, as it is."""

    def on_update(task: VoiceTask) -> None:
        raise ZeroDivisionError

    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with pytest.raises(ZeroDivisionError):
                await kling.clone_voice("Ada", voice_url=url(0), on_update=on_update)


async def test_refusals_are_outlived_however_many_there_are(brisk: None) -> None:
    """1303 and 1302 are not errors of a voice that waits for its slot."""
    script: dict[int, Fault | int] = dict.fromkeys(range(1, 30), 1303)
    script |= dict.fromkeys(range(30, 40), Fault.RATE_LIMIT_RETRY_AFTER)
    faults = Faults(script={"create": script}, retry_after=0)
    with emulating(faults=faults) as emulator:
        async with client_of(emulator, retry=ONCE) as kling:
            await kling.clone_voice("Ada", voice_url=url(0))

        assert emulator.requests[CREATE] == 40
        assert emulator.created == 1


async def test_too_many_requests_hold_the_others_back(brisk: None) -> None:
    """A 1302 that asks for half a second is heeded by all, though slots are free and tasks end."""
    faults = Faults(script={"create": {2: Fault.RATE_LIMIT_RETRY_AFTER}}, retry_after=0.5)
    with emulating(faults=faults) as emulator:
        async with client_of(emulator) as kling:
            ada = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(0)))
            await until(lambda: emulator.created)
            began = emulator.now()
            bob = asyncio.create_task(kling.clone_voice("Bob", voice_url=url(1)))
            await until(lambda: emulator.refused[1302] and kling.slots.in_flight < 2)
            await asyncio.gather(ada, bob, kling.clone_voice("Cyd", voice_url=url(2)))
            assert kling.slots.limit is None

        first, *later = [task.created for task in emulator.tasks]
    assert first <= began
    assert min(later) - began >= 0.5


@pytest.mark.parametrize(
    ("fault", "error"),
    [(Fault.ERROR_500_BEFORE, ServerError), (Fault.RESET_BEFORE, ConnectionFailedError)],
)
async def test_a_create_that_keeps_failing_is_an_error_and_frees_its_slot(
    fault: Fault, error: type[Exception]
) -> None:
    """After the client's RetryPolicy, with what it means for the voice."""
    with emulating(faults=Faults(1.0, kinds=[fault])) as emulator:
        async with client_of(emulator, retry=RetryPolicy(attempts=2, initial=0.0)) as kling:
            with pytest.raises(error) as caught:
                await kling.clone_voice("Ada", voice_url=url(0), external_task_id="mine")

            assert (caught.value.args, kling.slots.in_flight) == (caught.value.args, 0)


async def test_a_success_without_a_voice_is_an_error(make_client: MakeClient) -> None:
    """Nothing takes a missing voice's place: the error says to query the task again."""

    async with Server([envelope(task()), envelope(task(status="succeed"))]) as server:
        kling = make_client(server)
        with pytest.raises(ResponseError, match="t-1 succeeded, but no voice is shown; query"):
            await kling.clone_voice("Ada", voice_url=url(0))
        assert kling.slots.in_flight == 0


async def test_closing_ends_calls_wherever_they_are() -> None:
    """In the queue, in a backoff, at the create, and at the wait: each with ClientClosedError."""
    with emulating(concurrency_limit=2, time_scale=0.0, task_seconds=9.0) as emulator:
        kling = client_of(emulator)
        async with nothing_left(kling):
            calls = [
                asyncio.create_task(kling.clone_voice("Ada", voice_url=url(n))) for n in range(6)
            ]
            await until(lambda: emulator.refused[1303] and emulator.created == 2)
            await kling.close()
            for told in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(told, ClientClosedError)


async def test_closing_in_a_backoff_does_not_wait_for_its_end() -> None:
    """With nothing in flight, the refused create sleeps for a second or more."""
    with emulating(concurrency_limit=1) as emulator:
        emulator.occupied = 1
        kling = client_of(emulator)
        async with nothing_left(kling):
            call = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(0)))
            await until(lambda: emulator.refused[1303] and kling.slots.in_flight == 0)
            began = asyncio.get_running_loop().time()
            await kling.close()
            with pytest.raises(ClientClosedError) as caught:
                await call
            assert asyncio.get_running_loop().time() - began < 0.5
            assert caught.value.outcome == "not_created"


# --- what exists already ---


async def test_a_voice_that_exists_is_adopted() -> None:
    """By its explicit external id, whoever created it; nothing is created again."""
    with emulating() as emulator:
        async with client_of(emulator) as kling, client_of(emulator) as other:
            first = await kling.clone_voice("Ada", voice_url=url(0), external_task_id="mine")
            second = await other.clone_voice("Ada", voice_url=url(0), external_task_id="mine")

        assert first == second
        assert emulator.created == 1


async def test_voices_that_exist_tell_nothing_of_the_limit() -> None:
    """Duplicates are refused however many tasks are in flight."""
    with emulating() as emulator:
        async with client_of(emulator) as kling, client_of(emulator) as other:
            for client in (other, kling):
                window = client.slots.window
                await asyncio.gather(
                    *(
                        client.clone_voice("Ada", voice_url=url(0), external_task_id=f"row-{n}")
                        for n in range(20)
                    )
                )
            assert kling.slots.window == window < other.slots.window


async def test_a_task_that_is_adopted_in_flight_holds_a_slot() -> None:
    """It takes up one of the account's, too."""
    with emulating(time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator) as kling, client_of(emulator) as other:
            await other.create_voice("Ada", voice_url=url(0), external_task_id="mine")
            call = asyncio.create_task(
                kling.clone_voice("Ada", voice_url=url(0), external_task_id="mine")
            )
            await until(lambda: emulator.requests[QUERY])
            await asyncio.sleep(0.05)
            assert kling.slots.in_flight == 1
            emulator.advance(10)
            await call
            assert kling.slots.in_flight == 0


async def test_the_same_id_twice_at_once_is_one_voice() -> None:
    """Two calls of one client for the same external id: one create, the same voice for both."""
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            first, second = await asyncio.gather(
                *(
                    kling.clone_voice("Ada", voice_url=url(0), external_task_id="mine")
                    for _ in range(2)
                )
            )

        assert first == second
        assert emulator.created == 1


async def test_an_id_that_bears_another_name_is_refused() -> None:
    """It is not this voice; the slot is free again."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            await kling.clone_voice("Ada", voice_url=url(0), external_task_id="mine")
            with pytest.raises(BadRequestError, match="taken"):
                await kling.clone_voice("Bob", voice_url=url(0), external_task_id="mine")
            assert kling.slots.in_flight == 0


# --- errors ---


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"voice_url": None}, "source"),
        ({"video_id": "1"}, "source"),
        ({"voice_file": "a.mp3"}, "source"),
        ({"voice_url": None, "video_id": "1", "voice_file": "a.mp3"}, "source"),
        ({"voice_name": "a name of more than 20"}, "voice_name"),
        ({"voice_url": "ftp://example.com/a"}, "voice_url"),
        ({"callback_url": "nowhere"}, "callback_url"),
        ({"external_task_id": ""}, "external_task_id"),
        ({"external_task_id": ".."}, "external_task_id"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "1"}, "timeout"),
    ],
)
async def test_bad_arguments_are_refused_before_anything_is_sent(
    fields: dict[str, Any], field: str
) -> None:
    """Each names the argument at fault."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            with pytest.raises(InvalidRequestError) as caught:
                await kling.clone_voice(**{"voice_name": "Ada", "voice_url": url(0), **fields})

        assert caught.value.field == field
        assert not emulator.requests


async def test_a_task_that_failed_tells_why() -> None:
    """The vendor's reason is in the text, and the task with the error."""
    with emulating(fail_when=lambda body: "two voices in it") as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with pytest.raises(TaskFailedError, match="two voices in it") as caught:
                await kling.clone_voice("Ada", voice_url=url(0))

            assert caught.value.task is not None
            assert caught.value.external_task_id == emulator.tasks[0].external_task_id


# --- recordings ---


def test_recordings_come_with_the_package() -> None:
    """The tests below need one."""
    assert ADA.is_file()


async def test_a_recording_is_published_before_its_create_and_discarded_after_its_end() -> None:
    """The vendor has to fetch it in between."""
    shelf = Shelf()
    with emulating(time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            call = asyncio.create_task(kling.clone_voice("Ada", voice_file=ADA))
            await until(lambda: emulator.created)
            (task,) = emulator.tasks
            assert shelf.shown == {task.voice_url}
            await asyncio.sleep(0.05)
            assert [what for what, _ in shelf.events] == ["publish"]
            emulator.advance(10)
            await call

    assert shelf.discarded == [task.voice_url]


async def test_a_recording_is_discarded_after_a_failure_as_well() -> None:
    """A task that failed has no further use for it."""
    shelf = Shelf()
    with emulating(fail_when=lambda body: "noise") as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            with pytest.raises(TaskFailedError):
                await kling.clone_voice("Ada", voice_file=ADA)

    assert len(shelf.published) == len(shelf.discarded) == 1


@pytest.mark.parametrize("call", ["clone_voice", "create_voice"])
async def test_a_recording_is_discarded_when_its_create_is_refused(call: str) -> None:
    """The vendor will never fetch it."""
    shelf = Shelf()
    with emulating(faults=Faults(script={"create": [1301]})) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            with pytest.raises(Exception, match="1301"):
                await getattr(kling, call)("Ada", voice_file=ADA)

    assert len(shelf.published) == len(shelf.discarded) == 1


@pytest.mark.parametrize("call", ["clone_voice", "create_voice"])
async def test_a_recording_is_kept_while_the_outcome_is_unknown(call: str) -> None:
    """A task that may exist may fetch it still."""
    shelf = Shelf()
    with emulating(faults=Faults(1.0, kinds=[Fault.ERROR_500_BEFORE])) as emulator:
        async with client_of(emulator, sample_host=shelf, retry=ONCE) as kling:
            with pytest.raises(ServerError) as caught:
                await getattr(kling, call)("Ada", voice_file=ADA)

    assert caught.value.outcome == "unknown"
    assert len(shelf.published) == 1
    assert shelf.discarded == []


async def test_a_bare_create_leaves_the_recording_until_somebody_has_waited() -> None:
    """Then it is discarded, by whichever id the wait was for."""
    shelf = Shelf()
    with emulating() as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            made = await kling.create_voice("Ada", voice_file=ADA)
            assert shelf.discarded == []
            await kling.wait_for_task(made.task_id)

    assert len(shelf.discarded) == 1


async def test_a_recording_that_waits_for_a_slot_is_discarded_by_who_gives_up() -> None:
    """Nothing of it has been sent."""
    shelf = Shelf()
    with emulating(concurrency_limit=1, time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling, nothing_left(kling):
            first = asyncio.create_task(kling.clone_voice("Bob", voice_url=url(0)))
            await until(lambda: emulator.created)
            call = asyncio.create_task(kling.clone_voice("Ada", voice_file=ADA))
            # Both answers are here: one slot is held, and the refused create waits for one.
            await until(lambda: emulator.refused[1303] and kling.slots.in_flight == 1)
            call.cancel()
            first.cancel()
            await asyncio.gather(call, first, return_exceptions=True)

    assert len(shelf.published) == len(shelf.discarded) == 1


async def test_the_slot_is_free_before_the_recording_is_discarded() -> None:
    """A slow store does not keep the next voice waiting."""

    class Slow(Shelf):
        async def discard(self, url: str) -> None:
            await release.wait()

    release = asyncio.Event()
    with emulating() as emulator:
        async with client_of(emulator, sample_host=Slow()) as kling:
            call = asyncio.create_task(kling.clone_voice("Ada", voice_file=ADA))
            await until(lambda: emulator.created)
            await until(lambda: kling.slots.in_flight == 0)
            assert not call.done()
            release.set()
            await call


@pytest.mark.parametrize("call", ["clone_voice", "create_voice"])
async def test_nothing_is_published_for_a_task_that_exists(call: str) -> None:
    """It is asked for before so much is uploaded."""
    shelf = Shelf()
    with emulating() as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            for _ in range(2):
                await getattr(kling, call)("Ada", voice_file=ADA, external_task_id="mine")

        assert emulator.created == 1
        assert len(shelf.published) == 1


async def test_nothing_is_published_for_an_account_that_may_not_do_anything() -> None:
    """The query before it has told already."""
    shelf = Shelf()
    with emulating(faults=Faults(script={"get": [1101]})) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            with pytest.raises(AccountError) as caught:
                await kling.clone_voice("Ada", voice_file=ADA, external_task_id="mine")

    assert caught.value.outcome == "not_created"
    assert shelf.events == []


async def test_a_host_that_fails_leaves_nothing_created() -> None:
    """Its error says so, and bears the id to call again with."""

    class Broken(Shelf):
        async def publish(self, path: Path, name: str) -> str:
            raise OSError("full")

    with emulating() as emulator:
        async with client_of(emulator, sample_host=Broken()) as kling:
            with pytest.raises(SampleError, match="This call created no voice") as caught:
                await kling.clone_voice("Ada", voice_file=ADA)

        assert caught.value.outcome == "not_created"
        assert caught.value.external_task_id
        assert emulator.created == 0


async def test_a_file_without_a_host_leaves_nothing_created() -> None:
    """It says what to give the client."""
    with emulating() as emulator:
        async with client_of(emulator) as kling:
            with pytest.raises(ConfigurationError, match="sample_host"):
                await kling.clone_voice("Ada", voice_file=ADA)

        assert emulator.created == 0


async def test_uploads_at_once_are_few() -> None:
    """However many calls there are: recordings wait at the host for hours otherwise."""

    class Counting(Shelf):
        most = now = 0

        async def publish(self, path: Path, name: str) -> str:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            return await super().publish(path, name)

    shelf = Counting()
    with emulating(concurrency_limit=2, time_scale=0.0, task_seconds=9.0) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            calls = [
                asyncio.create_task(kling.clone_voice("Ada", voice_file=ADA)) for _ in range(40)
            ]
            await until(lambda: emulator.refused[1303])
            await asyncio.sleep(0.1)
            assert shelf.most == 8
            assert len(shelf.shown) <= 2 + 8 + 5  # in flight, waiting, and refused
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert len(shelf.shown) == 2  # the two that the vendor has accepted


async def test_a_cancelled_create_names_its_id(caplog: pytest.LogCaptureFixture) -> None:
    """The voice may exist: its id is logged, to go on with."""
    with emulating(faults=Faults(1.0, kinds=[Fault.STALL_AFTER], calls=["create"])) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with caplog.at_level(logging.WARNING):
                call = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(0)))
                await until(lambda: emulator.created)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)

        assert str(emulator.tasks[0].external_task_id) in caplog.text
