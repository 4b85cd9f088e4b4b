"""What a failure says of the voice and the money, wherever in its life a clone is cut short."""

import asyncio
import logging
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest
from cast import (
    ADA,
    Shelf,
    all_of,
    client_of,
    emulating,
    names,
    nothing_left,
    requests,
    until,
    url,
)
from wire import ONCE, Server, envelope, stall

from kling_voice import (
    AccountError,
    ApiKey,
    BadRequestError,
    ClientClosedError,
    ConnectionFailedError,
    InvalidRequestError,
    KlingError,
    KlingVoiceClient,
    NotFoundError,
    RateLimitError,
    RetryPolicy,
    SampleError,
    VoiceRequest,
    VoiceTask,
    WaitTimeoutError,
    creating,
)
from kling_voice.emulator import Fault, Faults

READS_REFUSED = {call: dict.fromkeys(range(1, 50), 1101) for call in ("list", "get")}


async def error_of(work: asyncio.Task[object]) -> KlingError:
    """Give the error that a call ends with."""
    (error,) = await asyncio.gather(work, return_exceptions=True)
    assert isinstance(error, KlingError)
    return error


async def test_a_client_closed_while_a_voice_is_made() -> None:
    """The task goes on, so that its id is all that can find the voice again."""
    with emulating(task_seconds=0.3) as emulator:
        kling = client_of(emulator)
        call: asyncio.Task[object] = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(1)))
        await until(lambda: emulator.created)
        await asyncio.sleep(0.05)
        await kling.close()

        error = await error_of(call)
        assert isinstance(error, ClientClosedError)
        assert error.outcome == "unknown"
        assert error.external_task_id == emulator.tasks[0].external_task_id
        async with client_of(emulator) as other:
            await other.clone_voice(
                "Ada", voice_url=url(1), external_task_id=error.external_task_id
            )
        assert emulator.created == 1


async def test_an_account_that_is_barred_while_a_voice_is_made() -> None:
    """A wait that fails for good leaves the id, and in a batch the task as well."""
    with emulating(faults=Faults(script=READS_REFUSED)) as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with pytest.raises(AccountError) as caught:
                await kling.clone_voice("Ada", voice_url=url(1))
            assert caught.value.outcome == "unknown"
            assert caught.value.external_task_id == emulator.tasks[0].external_task_id

            async with aclosing(kling.clone_voices(requests(1))) as results:
                result = await anext(results)
            assert isinstance(result.error, AccountError)
            assert result.task is not None
            assert result.task.external_task_id == emulator.tasks[1].external_task_id


async def test_an_error_of_on_update_is_not_ours_to_judge(tmp_path: Path) -> None:
    """A refused argument of another call inside it says nothing of the voice's create."""
    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):

            async def save(task: VoiceTask) -> None:
                if task.voice:
                    await kling.download_trial(task.voice, tmp_path)

            with pytest.raises(InvalidRequestError) as caught:
                await all_of(kling.clone_voices(requests(1), on_update=save))
            assert caught.value.outcome != "not_created"
            assert emulator.created == 1


async def test_an_exception_of_on_update_names_the_task() -> None:
    """Whatever it is, a note tells how to get the voice that is being made."""

    def clumsy(task: VoiceTask) -> None:
        raise KeyError("mine")

    with emulating() as emulator:
        async with client_of(emulator) as kling, nothing_left(kling):
            with pytest.raises(KeyError) as caught:
                await kling.clone_voice("Ada", voice_url=url(1), on_update=clumsy)
            assert f"wait_for_task('{emulator.tasks[0].task_id}')" in caught.value.__notes__[0]


async def test_a_cancelled_clone_logs_its_task(caplog: pytest.LogCaptureFixture) -> None:
    """An id that was made for the caller is known to nobody else."""
    with emulating(task_seconds=5.0) as emulator:
        async with client_of(emulator) as kling:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await kling.clone_voice("Ada", voice_url=url(1))
            assert f"wait_for_task('{emulator.tasks[0].task_id}')" in caplog.text


async def test_a_cancelled_queue_logs_an_open_create(caplog: pytest.LogCaptureFixture) -> None:
    """A create whose outcome is open may be cancelled while it queues for a slot again."""
    faults = Faults(
        script={
            "create": [Fault.ERROR_500_AFTER, *[Fault.CONCURRENCY] * 50],
            "get": [Fault.ERROR_500_BEFORE] * 200,
        }
    )
    with emulating(task_seconds=5.0, faults=faults) as emulator:
        async with client_of(emulator) as kling:
            call = asyncio.create_task(kling.clone_voice("Ada", voice_url=url(1)))
            await until(lambda: emulator.refused[1303] > 0)
            await until(lambda: kling.slots.in_flight == 0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert caplog.records[-1].levelno == logging.WARNING
        assert str(emulator.tasks[0].external_task_id) in caplog.text


@pytest.mark.parametrize("method", ["create_voice", "clone_voice"])
async def test_a_closed_client_creates_nothing_and_says_so(method: str) -> None:
    """With the caller's own id, for a new client."""
    kling = KlingVoiceClient(ApiKey("a-key"))
    await kling.close()
    with pytest.raises(ClientClosedError) as caught:
        await getattr(kling, method)("Ada", voice_url=url(1), external_task_id="mine")
    assert (caught.value.outcome, caught.value.external_task_id) == ("not_created", "mine")


async def test_a_create_that_never_left_was_not_created() -> None:
    """A client that is closed while a create queues for a connection has sent nothing."""

    async def never(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with (
        Server([never]) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session,
    ):
        kling = KlingVoiceClient(ApiKey("a-key"), base_url=server.base_url, session=session)
        first = asyncio.create_task(kling.get_task("t"))
        await until(lambda: server.requests)
        call: asyncio.Task[object] = asyncio.create_task(
            kling.create_voice("Ada", voice_url=url(1), external_task_id="mine")
        )
        await asyncio.sleep(0.05)
        await kling.close()
        await asyncio.gather(first, return_exceptions=True)
        error = await error_of(call)
        assert isinstance(error, ClientClosedError)
        assert (error.outcome, len(server.requests)) == ("not_created", 1)


async def test_one_look_that_finds_nothing_proves_nothing() -> None:
    """Reads may lag: without a second look it is open what holds an id."""
    with emulating(read_lag=1.0, task_seconds=5.0) as emulator:
        async with (
            client_of(emulator) as first,
            client_of(emulator, retry=RetryPolicy(attempts=1)) as second,
        ):
            await first.create_voice("Ada", voice_url=url(1), external_task_id="mine")
            with pytest.raises(KlingError) as caught:
                await second.create_voice("Ada", voice_url=url(1), external_task_id="mine")
            assert caught.value.outcome == "unknown"


async def test_a_refusal_by_a_gateway_is_no_deletion() -> None:
    """A 404 that nothing came before says that the voice, or the host, is not known."""
    refusal = envelope(code=404, message="no Route matched", status=404)
    async with (
        Server([refusal]) as server,
        KlingVoiceClient(ApiKey("a-key"), base_url=server.base_url) as kling,
    ):
        with pytest.raises(NotFoundError):
            await kling.delete_voice("v1")


async def test_a_deadline_that_passes_as_the_client_closes() -> None:
    """Is still the wait's own end, and its slot is given back."""
    with emulating(task_seconds=0.5) as emulator:
        kling = client_of(emulator)
        seen = asyncio.Event()

        async def slow(task: VoiceTask) -> None:
            seen.set()
            await asyncio.sleep(0.5)

        call: asyncio.Task[object] = asyncio.create_task(
            kling.clone_voice("Ada", voice_url=url(1), timeout=0.4, on_update=slow)
        )
        await seen.wait()
        await asyncio.sleep(0.4)
        await kling.close()
        error = await error_of(call)
        assert isinstance(error, WaitTimeoutError)
        assert error.external_task_id == emulator.tasks[0].external_task_id
        assert kling.slots.in_flight == 0


async def test_a_client_closed_by_an_on_update_is_closed_wholly() -> None:
    """Though the batch that ends by it cancels who closes."""
    with emulating(task_seconds=0.1) as emulator:
        kling = client_of(emulator)

        async def enough(task: VoiceTask) -> None:
            await kling.close()

        with pytest.raises(ClientClosedError):
            await all_of(kling.clone_voices(requests(2), on_update=enough))
        assert "closed" in repr(kling)
        await kling.close()


# --- recordings ---


def fetchable(shelf: Shelf, body: dict[str, object]) -> str | None:
    """Let a task fail whose recording is not shown any more."""
    return None if body["voice_url"] in {*shelf.shown, url(0)} else "cannot fetch the sample"


async def test_a_machine_that_leaves_takes_nobodys_recording() -> None:
    """Two machines run a batch of files over one host, and one of them is left."""
    shelf = Shelf()
    files = [VoiceRequest(f"Voice {number}", voice_file=ADA) for number in range(4)]
    with emulating(
        concurrency_limit=1, task_seconds=0.3, fail_when=lambda body: fetchable(shelf, body)
    ) as emulator:
        async with (
            client_of(emulator) as other,
            client_of(emulator, sample_host=shelf) as one,
            client_of(emulator, sample_host=shelf) as two,
        ):
            await other.create_voice("Blocker", voice_url=url(0))
            stays, leaves = (
                asyncio.create_task(all_of(kling.clone_voices(files, batch_id="cast")))
                for kling in (one, two)
            )
            await until(lambda: len(shelf.published) == 8)
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
            assert [result.error for result in await stays] == [None] * 4


async def test_a_create_cancelled_before_it_was_accepted_withdraws_its_recording(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody needs it any more."""
    shelf = Shelf()
    faults = Faults(1.0, kinds=[Fault.CONCURRENCY], calls=["create"])
    slow = RetryPolicy(attempts=5, initial=3.0)
    with emulating(faults=faults) as emulator:
        async with client_of(emulator, sample_host=shelf, retry=slow) as kling:
            call = asyncio.create_task(kling.create_voice("Ada", voice_file=ADA))
            await until(lambda: "again in" in caplog.text)  # the refusal is here, not only sent
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
    assert len(shelf.published) == 1
    assert shelf.shown == set()


async def test_a_recording_is_discarded_when_its_task_is_found_to_have_ended() -> None:
    """After a wait that had timed out."""
    shelf = Shelf()
    with emulating(task_seconds=0.3) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:

            async def clone(timeout: float) -> None:
                await kling.clone_voice(
                    "Ada", voice_file=ADA, external_task_id="mine", timeout=timeout
                )

            with pytest.raises(WaitTimeoutError):
                await clone(0.05)
            await until(lambda: kling.slots.in_flight == 0)  # nobody watches it any more
            await asyncio.sleep(0.3)
            await clone(5.0)
    assert shelf.shown == set()


class SlowShelf(Shelf):
    """A sample host whose discards take their time, as a bucket's do."""

    async def discard(self, url: str) -> None:
        """Note it, later."""
        await asyncio.sleep(0.01 * (1 + len(self.events) % 5))
        await super().discard(url)


@pytest.mark.parametrize("how", ["close", "cancel", "on_update"])
async def test_recordings_are_withdrawn_however_a_batch_is_left(how: str) -> None:
    """What the vendor was not given is not left public; what it has accepted it may still fetch."""
    shelf = SlowShelf()
    spoil = False

    def on_update(task: VoiceTask) -> None:
        if spoil:
            raise KeyError("mine")

    with emulating(concurrency_limit=2, time_scale=0.0) as emulator:
        kling = client_of(emulator, sample_host=shelf)
        files = [VoiceRequest(f"Voice {number}", voice_file=ADA) for number in range(9)]
        run = asyncio.create_task(all_of(kling.clone_voices(files, on_update=on_update)))
        await until(lambda: emulator.refused[1303] and emulator.created == 2)
        await until(lambda: len(shelf.published) == 9)
        await until(lambda: kling.slots.in_flight == 2)
        if how == "close":
            await kling.close()
        elif how == "cancel":
            run.cancel()
        else:
            spoil = True
            emulator.advance(0.04)
        await asyncio.gather(run, return_exceptions=True)
        await kling.close()
        assert shelf.shown <= {task.voice_url for task in emulator.tasks}


async def test_recordings_that_stay_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A client that is closed before it saw the end of a task says that its recording is there."""
    shelf = Shelf()
    with emulating(task_seconds=5.0) as emulator:
        async with client_of(emulator, sample_host=shelf) as kling:
            await kling.create_voice("Ada", voice_file=ADA)
    assert len(shelf.shown) == 1
    assert "1 recording(s) stay at the sample host" in caplog.text


async def test_a_recording_that_cannot_be_read_was_not_created() -> None:
    """A batch reads a file for its key before anything is sent."""
    with emulating() as emulator:
        async with client_of(emulator, sample_host=Shelf()) as kling:
            request = VoiceRequest("Ada", voice_file="/nowhere/ada.mp3")
            (result,) = await all_of(kling.clone_voices([request], batch_id="b"))
            assert isinstance(result.error, SampleError)
            assert result.error.outcome == "not_created"


# --- ids that are taken ---


async def test_a_voice_that_no_read_shows_yet_is_not_said_to_be_missing() -> None:
    """Who calls again as told, and is refused as a duplicate, is told again that it may exist."""
    faults = Faults(script={"create": [Fault.RESET_AFTER]})
    quick = RetryPolicy(attempts=3, initial=0.01, maximum=0.05)
    with emulating(read_lag=60.0, faults=faults) as emulator:
        async with client_of(emulator, retry=ONCE) as kling:
            with pytest.raises(KlingError) as first:
                await kling.create_voice("Ada", voice_url=url(1))
        async with client_of(emulator, retry=quick) as kling:
            with pytest.raises(BadRequestError) as second:
                await kling.create_voice(
                    "Ada", voice_url=url(1), external_task_id=first.value.external_task_id
                )
        assert emulator.created == 1
        assert second.value.outcome == "unknown"
        assert "cannot bill twice" in str(second.value)
        assert "another" not in str(second.value)


async def test_two_machines_share_a_batch_whose_reads_lag_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another machine has created is looked for beyond the retry policy."""
    monkeypatch.setattr(creating, "_LOOK_EVERY", 0.1)
    quick = RetryPolicy(attempts=4, initial=0.01, maximum=0.05)
    with emulating(read_lag=1.0, task_seconds=0.3) as emulator:
        async with client_of(emulator, retry=quick) as one, client_of(emulator, retry=quick) as two:
            both = await asyncio.gather(
                *(all_of(kling.clone_voices(requests(4), batch_id="x")) for kling in (one, two))
            )
        assert [len(names(results)) for results in both] == [4, 4]
        assert emulator.created == 4


async def test_it_is_not_looked_for_beyond_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists and stays unseen ends a clone in time, its outcome open."""
    monkeypatch.setattr(creating, "_LOOK_EVERY", 0.05)
    quick = RetryPolicy(attempts=2, initial=0.01, maximum=0.05)
    with emulating(read_lag=60.0) as emulator:
        async with client_of(emulator, retry=quick) as kling:
            await kling.create_voice("Ada", voice_url=url(1), external_task_id="kv-known")
            with pytest.raises(BadRequestError) as caught:
                await kling.clone_voice(
                    "Ada", voice_url=url(1), external_task_id="kv-known", timeout=0.3
                )
            assert caught.value.outcome == "unknown"
            assert kling.slots.in_flight == 0


# --- whether it was sent ---


async def test_a_middleware_that_sends_again_does_not_make_it_unsent() -> None:
    """A create that left by a borrowed session's first try is open, though the second failed."""
    server = Server([b""])

    async def retry(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        try:
            return await handler(request)
        except aiohttp.ClientError:
            raise aiohttp.ConnectionTimeoutError from None  # its second try finds nobody

    async with (
        server,
        aiohttp.ClientSession(middlewares=(retry,)) as session,
        KlingVoiceClient(
            ApiKey("k"), base_url=server.base_url, session=session, retry=ONCE
        ) as kling,
    ):
        with pytest.raises(ConnectionFailedError) as caught:
            await kling.create_voice("Ada", voice_url=url(1))
        assert caught.value.outcome == "unknown"


async def test_a_create_that_is_cancelled_before_it_left_is_not_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Queueing for a connection sends nothing: its recording is withdrawn, and nothing is told."""
    shelf = Shelf()
    async with (
        Server([stall]) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session,
        KlingVoiceClient(
            ApiKey("k"), base_url=server.base_url, session=session, sample_host=shelf
        ) as kling,
    ):
        other = asyncio.create_task(kling.get_task("t-1"))
        await server.arrived(1)
        create = asyncio.create_task(kling.create_voice("Ada", voice_file=ADA))
        await until(lambda: shelf.shown)
        await asyncio.sleep(0.05)
        create.cancel()
        other.cancel()
        await asyncio.gather(create, other, return_exceptions=True)
        assert shelf.shown == set()
        assert "may have been created" not in caplog.text


@pytest.mark.parametrize("code", [1305, 1399])
async def test_a_refusal_by_429_of_an_unknown_code_ends(code: int) -> None:
    """Only 1302 and 1303 surely pass; what is not known may be a quota of the day."""
    quick = RetryPolicy(attempts=2, initial=0.01, maximum=0.05)
    answer = envelope(code=code, message="quota", status=429)
    async with (
        Server([answer]) as server,
        KlingVoiceClient(ApiKey("k"), base_url=server.base_url, retry=quick) as kling,
    ):
        with pytest.raises(RateLimitError) as caught:
            await kling.clone_voice("Ada", voice_url=url(1))
        assert caught.value.outcome == "not_created"
        assert kling.slots.in_flight == 0


# --- results that nobody has got ---


async def test_what_has_ended_is_given_before_an_error_of_on_update() -> None:
    """A slip in the caller's function does not cost the results of the other voices."""
    ended = 0

    def clumsy(task: VoiceTask) -> None:
        nonlocal ended
        ended += task.is_done
        if ended == 6:
            raise KeyError("mine")

    given = []
    with emulating() as emulator:
        async with (
            client_of(emulator) as kling,
            aclosing(kling.clone_voices(requests(6), on_update=clumsy)) as results,
        ):
            given.append(await anext(results))
            await until(lambda: ended == 6)
            given += [await anext(results) for _ in range(4)]
            with pytest.raises(KeyError):
                await anext(results)
    assert len({result.request for result in given}) == 5


@pytest.mark.parametrize("batch_id", [None, "spring"])
async def test_a_batch_that_is_left_tells_what_it_has_paid_for(
    batch_id: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Ids that were made for the caller are known to nobody else."""

    def life(number: int) -> float:
        return 0.02 if number <= 4 else 5.0

    seen: list[VoiceTask] = []
    caplog.set_level(logging.INFO, "kling_voice")
    with emulating(task_seconds=life) as emulator:
        async with (
            client_of(emulator) as kling,
            aclosing(
                kling.clone_voices(requests(26), batch_id=batch_id, on_update=seen.append)
            ) as results,
        ):
            await anext(results)
            # The client knows of all of them, and of the ends of four.
            await until(lambda: len({task.task_id for task in seen}) == 26)
            await until(lambda: kling.slots.in_flight == 22)
        (told,) = [line for line in caplog.records if "A batch was left" in line.getMessage()]
        assert "left with 25 voices" in told.getMessage()
        named = [one.task_id for one in emulator.tasks if one.task_id in told.getMessage()]
        assert len(named) == (20 if batch_id is None else 0)
        assert told.levelno == (logging.WARNING if batch_id is None else logging.INFO)
        assert ("and 5 more" in told.getMessage()) == (batch_id is None)


async def test_a_batch_that_has_ended_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Every result was given, those of tasks that were tried again as well."""
    with emulating(fail_when=lambda body: "noise") as emulator:
        async with client_of(emulator) as kling:
            results = await all_of(kling.clone_voices(requests(3), retry_failed=1))
        assert len(results) == 3
        assert emulator.created == 6
    assert "left" not in caplog.text
