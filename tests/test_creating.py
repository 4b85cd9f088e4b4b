"""One create, exactly once: on every kind of failure, across calls, clients and cancellations."""

import asyncio
import json
import logging
import pickle
from collections import Counter
from functools import partial

import pytest
from wire import (
    BRISK,
    ONCE,
    Answer,
    MakeClient,
    Request,
    Server,
    envelope,
    patience,
    response,
    stall,
    task,
)

from kling_voice import KlingVoiceClient, RetryPolicy, VoiceTask
from kling_voice.emulator import ALL, Emulator, Fault, Faults
from kling_voice.emulator.codes import CODES
from kling_voice.errors import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConcurrencyLimitError,
    KlingError,
    NotFoundError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
)

SAMPLE = "https://example.com/a.mp3"
PROCESSED = {
    Fault.RESET_AFTER,
    Fault.DELAY,
    Fault.STALL_AFTER,
    Fault.ERROR_500_AFTER,
    Fault.ERROR_503_AFTER,
    Fault.ERROR_504_AFTER,
    Fault.HTML_502_AFTER,
    Fault.TRUNCATED,
    Fault.UNDECODABLE,
}
REFUSED = {
    Fault.RATE_LIMIT,
    Fault.RATE_LIMIT_RETRY_AFTER,
    Fault.CONCURRENCY,
    Fault.TOKEN_REFUSED,
}
OPEN = [fault for fault in ALL if fault not in REFUSED and fault is not Fault.DELAY]


Script = dict[str, list[Fault | str | int | None]]

faults = partial(Faults, delay_seconds=0.01, retry_after=0)  # faults that cost little time


async def failing(client: KlingVoiceClient, external_task_id: str = "mine") -> KlingError:
    """Create a voice in vain."""
    with pytest.raises(KlingError) as caught:
        await client.create_voice("Ada", voice_url=SAMPLE, external_task_id=external_task_id)
    return caught.value


def check_outcome(emulator: Emulator, error: KlingError, external_task_id: str = "mine") -> None:
    """Check that an error says the truth about what is on the account, and travels with it."""
    assert error.external_task_id == external_task_id
    held = [view for view in emulator.tasks if view.external_task_id == external_task_id]
    assert error.outcome in ("not_created", "unknown")
    assert len(held) <= (0 if error.outcome == "not_created" else 1)
    twin = pickle.loads(pickle.dumps(error))
    assert (twin.outcome, twin.external_task_id) == (error.outcome, error.external_task_id)


def is_of(made: VoiceTask, emulator: Emulator, external_task_id: str = "mine") -> bool:
    """Tell whether a task is the one that the account has under an external id."""
    held = [view for view in emulator.tasks if view.external_task_id == external_task_id]
    return [view.task_id for view in held] == [made.task_id]


# --- one fault ---


@pytest.mark.parametrize("fault", ALL)
async def test_a_fault_on_the_create(make_client: MakeClient, fault: Fault) -> None:
    """Whatever goes wrong once with a create, there is one task, and it is the one returned."""
    async with Emulator(faults=faults(script={"create": [fault]})) as emulator:
        client = make_client(emulator, timeout=patience(fault))
        made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
        assert emulator.created == 1
        assert is_of(made, emulator)
        assert emulator.faults is not None
        assert emulator.faults.injected == {fault: 1}


@pytest.mark.parametrize("fault", OPEN)
async def test_a_fault_on_the_create_and_on_the_look(make_client: MakeClient, fault: Fault) -> None:
    """Whatever goes wrong with the look that follows an open create, it stays at one task."""

    async def run(second: Fault | int) -> None:
        script: Script = {"create": [fault], "get": [second]}
        async with Emulator(faults=faults(script=script)) as emulator:
            client = make_client(emulator, timeout=patience(fault, second))
            made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
            assert emulator.created == 1
            assert is_of(made, emulator)

    async with asyncio.TaskGroup() as group:
        seconds: list[Fault | int] = [*ALL, 1203]
        for second in seconds:
            group.create_task(run(second))


@pytest.mark.parametrize("fault", [fault for fault in ALL if fault is not Fault.TOKEN_REFUSED])
async def test_a_fault_on_both_creates(make_client: MakeClient, fault: Fault) -> None:
    """A re-send that meets the same fault again leaves it at one task, too."""
    script = {"create": [fault, fault], "get": [Fault.HTML_502, fault]}
    async with Emulator(faults=faults(script=script)) as emulator:
        client = make_client(emulator, timeout=patience(fault))
        made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
        assert emulator.created == 1
        assert is_of(made, emulator)


@pytest.mark.parametrize("fault", ALL)
async def test_a_fault_that_stays(make_client: MakeClient, fault: Fault) -> None:
    """When every create meets the fault, the task is found, or the error says how it stands."""
    retry = RetryPolicy(attempts=3, initial=0.001, maximum=0.01)
    async with Emulator(faults=faults(1.0, kinds=[fault], calls=["create"])) as emulator:
        client = make_client(emulator, timeout=patience(fault), retry=retry)
        if fault in PROCESSED:
            made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
            assert is_of(made, emulator)
        else:
            error = await failing(client)
            check_outcome(emulator, error)
            assert error.outcome == ("not_created" if fault in REFUSED else "unknown")
        assert emulator.created == (fault in PROCESSED)


@pytest.mark.parametrize("fault", OPEN)
async def test_when_nothing_gets_through(make_client: MakeClient, fault: Fault) -> None:
    """An error whose outcome is unknown carries the id that, later, finishes the job once."""
    async with Emulator(faults=faults(1.0, kinds=[fault])) as emulator:
        retry = RetryPolicy(attempts=2, initial=0.001, maximum=0.01)
        client = make_client(emulator, timeout=patience(fault) / 3, retry=retry)
        error = await failing(client, "mine")
        assert error.outcome == "unknown"
        assert emulator.created == (fault in PROCESSED)
        emulator.faults = None
        assert error.external_task_id is not None
        made = await make_client(emulator).create_voice(
            "Ada", voice_url=SAMPLE, external_task_id=error.external_task_id
        )
        assert emulator.created == 1
        assert is_of(made, emulator)


async def test_an_id_is_made_and_told(make_client: MakeClient) -> None:
    """Without an id of the caller's one is made, is told by the error, and finishes the job."""
    async with Emulator(faults=faults(1.0, kinds=[Fault.RESET_AFTER])) as emulator:
        client = make_client(emulator)
        with pytest.raises(KlingError) as caught:
            await client.create_voice("Ada", voice_url=SAMPLE)
        external = caught.value.external_task_id
        assert external is not None
        assert external in str(caught.value)
        emulator.faults = None
        made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id=external)
        assert emulator.created == 1
        assert is_of(made, emulator, external)


@pytest.mark.parametrize("code", CODES)
async def test_a_refusal_of_every_code(make_client: MakeClient, code: int) -> None:
    """A refused create is not created, a vendor's failure is open, and both say so."""
    async with Emulator(faults=faults(1.0, kinds=[code], calls=["create"])) as emulator:
        error = await failing(make_client(emulator))
        assert isinstance(error, ApiError)
        assert error.code == code
        assert error.outcome == ("unknown" if code >= 5000 else "not_created")
        check_outcome(emulator, error)
        again = code in (1302, 1303) or code >= 5000
        sent = emulator.requests["POST /v1/general/custom-voices"]
        assert sent == (BRISK.attempts if again else 2 if code in (1003, 1004) else 1)


@pytest.mark.parametrize(
    "answer",
    [
        envelope(None),
        envelope({}),
        envelope([]),
        envelope({"task_id": 5, "task_status": "submitted"}),
        envelope({"task_id": "t-1", "task_status": None}),
        envelope(task(), status=500),
        envelope(code=1201, message="already exists", status=502),
        envelope(code=408, message="upstream timed out", status=408),
        envelope(code=7777, message="what is this", status=400),
        response(b"", 204),
        response(b"", 302, {"Location": "/"}),
    ],
    ids=repr,
)
async def test_an_answer_that_proves_nothing(make_client: MakeClient, answer: bytes) -> None:
    """After an odd answer the create is open: the task is looked up rather than given up."""
    answers = [answer, envelope(task("t-9", task_info={"external_task_id": "mine"}))]
    async with Server(answers) as server:
        client = make_client(server)
        if b"7777" in answer or b"408" in answer:
            assert (await failing(client)).outcome == "unknown"  # final, yet not certain
            return
        made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
        assert made.task_id == "t-9"
        assert [request.method for request in server.requests] == ["POST", "GET"]


async def test_a_re_send_is_the_same(make_client: MakeClient) -> None:
    """Every re-send has the same body, the made-up id included, and the look asks for that id."""
    refusal = envelope(code=5000, message="x", status=500)
    unknown = envelope(code=1203, message="x", status=404)

    def answer(request: Request) -> Answer:
        return refusal if request.method == "POST" else unknown

    async with Server(answer) as server:
        client = make_client(server)
        for _ in range(2):
            with pytest.raises(ServerError) as caught:
                await client.create_voice(
                    "Ada", voice_url=SAMPLE, callback_url="https://me.example"
                )
            bodies = {request.body for request in server.requests if request.method == "POST"}
            targets = {request.target for request in server.requests if request.method == "GET"}
            (body,) = bodies
            external = json.loads(body)["external_task_id"]
            assert json.loads(body) == {
                "voice_name": "Ada",
                "voice_url": SAMPLE,
                "callback_url": "https://me.example",
                "external_task_id": external,
            }
            assert targets == {f"/v1/general/custom-voices/{external}"}
            assert caught.value.external_task_id == external
            server.requests.clear()  # and the next call has an id of its own
            assert caught.value.outcome == "unknown"


# --- the same id again ---


async def test_idempotent_across_calls_and_clients(make_client: MakeClient) -> None:
    """Creating again with the same id gives the same task, from any client, at any later time."""
    async with Emulator(task_seconds=5.0) as emulator:
        first, second = make_client(emulator), make_client(emulator)
        made = [
            await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
            for client in (first, first, second)
        ]
        emulator.advance(10)
        made.append(await second.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine"))
        assert emulator.created == 1
        assert {one.task_id for one in made} == {emulator.tasks[0].task_id}
        assert made[-1].voice is not None


async def test_idempotent_at_once(make_client: MakeClient) -> None:
    """Forty creates of one id at once, by two clients under faults, make one task for all."""
    kinds = [Fault.RESET_AFTER, Fault.HTML_502, Fault.ERROR_500_AFTER, Fault.TRUNCATED]
    async with Emulator(faults=faults(0.3, kinds=kinds), read_lag=0.02) as emulator:
        retry = RetryPolicy(attempts=12, initial=0.005, maximum=0.05)
        clients = [make_client(emulator, retry=retry) for _ in range(2)]
        made = await asyncio.gather(
            *(
                clients[number % 2].create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
                for number in range(40)
            )
        )
        assert emulator.created == 1
        assert all(is_of(one, emulator) for one in made)


async def test_an_id_that_something_else_holds(make_client: MakeClient) -> None:
    """An id held by what is no custom voice is told as taken, within the policy's attempts."""
    async with Emulator() as emulator:
        emulator.reserve_external_id("mine")
        error = await failing(make_client(emulator))
        assert isinstance(error, BadRequestError)
        assert error.code == 1201
        assert error.outcome == "not_created"
        assert "'mine' is taken" in str(error)
        assert "call again with the same id, since reads may lag; else use another" in str(error)
        assert emulator.created == 0
        assert emulator.requests.total() == 1 + BRISK.attempts


async def test_an_id_whose_holder_is_unreadable(make_client: MakeClient) -> None:
    """What holds the id and does not read as a custom voice is told as taken."""
    taken = envelope(code=1201, message="already exists", status=400)
    odd: list[object] = [{"video_id": "v"}, [], {"task_id": "t", "task_status": 5}]
    for data in odd:
        async with Server([taken, envelope(data)]) as server:
            error = await failing(make_client(server))
            assert isinstance(error, BadRequestError)
            assert "is taken" in str(error)
            assert error.outcome == "not_created"
            assert len(server.requests) == 2


async def test_an_id_of_another_voice(make_client: MakeClient, emulator: Emulator) -> None:
    """An id that is known to bear another name is told as taken, and nothing is created."""
    client = make_client(emulator)
    await client.create_voice("Bob", voice_url=SAMPLE, external_task_id="mine")
    error = await failing(client)
    assert isinstance(error, BadRequestError)
    assert "another voice_name" in str(error)
    assert error.outcome == "not_created"
    assert emulator.created == 1


async def test_a_name_that_comes_back_otherwise(make_client: MakeClient) -> None:
    """A task under an id that the client made is its own, even if the vendor has renamed it."""

    def answer(request: Request) -> Answer:
        if request.method == "POST":
            made.append(json.loads(request.body)["external_task_id"])
            return b""  # processed, and the answer is lost
        info = {"external_task_id": made[0]}
        voices = [{"voice_id": "v-1", "voice_name": "ADA"}]
        return envelope(task("t-1", "succeed", task_info=info, task_result={"voices": voices}))

    made: list[str] = []
    async with Server(answer) as server:
        created = await make_client(server).create_voice("Ada", voice_url=SAMPLE)
        assert created.task_id == "t-1"
        assert len(made) == 1


async def test_an_unfinished_voice_cannot_be_compared(make_client: MakeClient) -> None:
    """As long as the vendor tells no name, the task that holds the id is returned."""
    async with Emulator(task_seconds=60.0) as emulator:
        client = make_client(emulator)
        made = await client.create_voice("Bob", voice_url=SAMPLE, external_task_id="mine")
        again = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
        assert again.task_id == made.task_id


async def test_an_open_create_and_another_voice(make_client: MakeClient) -> None:
    """A create that failed openly and then finds another voice under its id was not created."""
    async with Emulator(task_seconds=0.0) as emulator:
        client = make_client(emulator)
        await client.create_voice("Bob", voice_url=SAMPLE, external_task_id="mine")
        emulator.faults = faults(script={"create": [Fault.HTML_502]})
        error = await failing(client)
        assert isinstance(error, BadRequestError)
        assert error.outcome == "not_created"


async def test_an_id_that_is_a_task_id(make_client: MakeClient) -> None:
    """The look after an open create is not content with a task that bears the id otherwise."""
    other = envelope(task("mine", "succeed"))
    async with Server([b"", other]) as server:
        error = await failing(make_client(server))
        assert isinstance(error, BadRequestError)
        assert error.outcome == "unknown"


# --- reads that lag behind writes ---


@pytest.mark.parametrize("fault", [None, Fault.RESET_AFTER, Fault.ERROR_500_AFTER])
async def test_read_lag(make_client: MakeClient, fault: Fault | None) -> None:
    """A task that reads do not show yet is waited for, not created twice."""
    script = {"create": [fault]}
    async with Emulator(read_lag=0.1, faults=faults(script=script)) as emulator:
        client = make_client(emulator, retry=RetryPolicy(attempts=6, initial=0.02, maximum=0.1))
        for _ in range(2):
            made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
            assert emulator.created == 1
            assert is_of(made, emulator)


async def test_read_lag_without_end(make_client: MakeClient) -> None:
    """If our own task stays unseen, the error leaves it open and never says to take another id."""
    script = {"create": [Fault.RESET_AFTER]}
    async with Emulator(read_lag=60.0, faults=faults(script=script)) as emulator:
        error = await failing(make_client(emulator))
        assert error.outcome == "unknown"
        assert "call again with external_task_id='mine'" in str(error)
        assert "another" not in str(error)
        check_outcome(emulator, error)
        emulator.advance(61)
        made = await make_client(emulator).create_voice(
            "Ada", voice_url=SAMPLE, external_task_id="mine"
        )
        assert is_of(made, emulator)


# --- refusals for want of room ---


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(Fault.RATE_LIMIT, RateLimitError), (Fault.CONCURRENCY, ConcurrencyLimitError)],
)
async def test_too_many(make_client: MakeClient, fault: Fault, kind: type[KlingError]) -> None:
    """A bare create tries 1302 and 1303 again as the policy says, then raises: not created."""
    async with Emulator(faults=faults(1.0, kinds=[fault], calls=["create"])) as emulator:
        error = await failing(make_client(emulator))
        assert type(error) is kind
        assert error.outcome == "not_created"
        assert emulator.created == 0
        assert emulator.requests == {"POST /v1/general/custom-voices": BRISK.attempts}


async def test_a_slot_that_comes_free(make_client: MakeClient) -> None:
    """A bare create that is refused for want of a slot goes through when one comes free."""
    async with Emulator(concurrency_limit=1, task_seconds=0.1) as emulator:
        client = make_client(emulator, retry=RetryPolicy(attempts=20, initial=0.01, maximum=0.05))
        for _ in range(3):
            await client.create_voice("Ada", voice_url=SAMPLE)
        assert emulator.created == 3
        assert emulator.refused[1303] > 0
        assert emulator.max_in_flight == 1


async def test_no_room_after_an_open_failure(make_client: MakeClient) -> None:
    """A refusal after an open failure does not close it: the first attempt may have been made."""
    script = {"create": {1: Fault.STALL, **dict.fromkeys(range(2, 20), Fault.CONCURRENCY)}}
    async with Emulator(faults=faults(script=script)) as emulator:
        error = await failing(make_client(emulator, timeout=0.25))
        assert isinstance(error, ConcurrencyLimitError)
        assert error.outcome == "unknown"


async def test_a_refusal_after_an_open_failure(make_client: MakeClient) -> None:
    """A final refusal after an open failure leaves the outcome unknown."""
    scripts: list[Script] = [
        {"create": [Fault.RESET_AFTER], "get": [Fault.HTML_502, 1000]},
        {"create": [Fault.RESET_AFTER, 1101], "get": [1203]},
        {"create": [Fault.RESET_AFTER], "get": [1102]},
    ]
    for script in scripts:
        async with Emulator(faults=faults(script=script)) as emulator:
            error = await failing(make_client(emulator))
            assert error.outcome == "unknown"
            assert emulator.created == 1


async def test_a_key_that_is_refused_for_the_look(make_client: MakeClient) -> None:
    """An open create whose look is refused raises that refusal, with the outcome unknown."""
    script: Script = {"create": [Fault.RESET_AFTER], "get": [1002]}
    async with Emulator(faults=faults(script=script)) as emulator:
        error = await failing(make_client(emulator))
        assert isinstance(error, AuthenticationError)
        assert error.outcome == "unknown"


# --- cancellation ---


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Give what was logged as a warning."""
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


async def cancel(client: KlingVoiceClient, server: Server, requests: int = 1) -> None:
    """Cancel a create after so many requests."""
    create = client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
    call = asyncio.create_task(create)
    await server.arrived(requests)
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_cancelled_in_flight(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A create that is cancelled in flight logs the id to call again with, at WARNING."""
    async with Server([stall]) as server:
        await cancel(make_client(server), server)
        (line,) = warnings_of(caplog)
        assert "external_task_id='mine'" in line


async def test_cancelled_by_a_deadline(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A deadline of the caller's own cancels as well, and comes out as the caller's own error."""
    async with Server([stall]) as server:
        client = make_client(server)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
        assert not isinstance(caught.value, KlingError)
        (line,) = warnings_of(caplog)
        assert "external_task_id='mine'" in line


async def test_cancelled_while_it_is_open(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A create that is cancelled between its attempts, or during the look, logs its id as well."""
    async with Server([b"", stall]) as server:
        await cancel(make_client(server), server, 2)
        assert sum("'mine'" in line and "cancelled" in line for line in warnings_of(caplog)) == 1


async def test_cancelled_without_need_to_tell(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A create that was certainly refused before it was cancelled has nothing to tell."""
    refusal = envelope(code=1302, message="x", status=429, headers={"Retry-After": "9"})
    async with Server([refusal]) as server:
        await cancel(make_client(server), server)
        assert not any("cancelled" in line for line in warnings_of(caplog))


# --- many ---


async def test_a_thousand_creates(make_client: MakeClient) -> None:
    """A thousand creates under 30 % faults give a thousand voices, none twice and none lost."""
    async with Emulator(faults=faults(0.3), task_seconds=0.0) as emulator:
        retry = RetryPolicy(attempts=12, initial=0.002, maximum=0.02)
        client = make_client(emulator, retry=retry)
        names = [f"Voice {number}" for number in range(1000)]
        made = await asyncio.gather(
            *(client.create_voice(name, voice_url=SAMPLE) for name in names)
        )
        assert emulator.created == 1000
        assert emulator.faults is not None
        assert emulator.faults.injected.total() > 300
        by_id = {view.task_id: view.voice_name for view in emulator.tasks}
        assert [by_id[one.task_id] for one in made] == names


@pytest.mark.parametrize("seed", range(4))
async def test_outcomes_are_true_in_a_storm(make_client: MakeClient, seed: int) -> None:
    """Under heavy faults of every kind no id is created twice, and no outcome is a lie."""
    storm = faults(0.6, seed=seed, kinds=[*ALL, 1100, 1201, 1203, 5000], stall_seconds=0.05)
    async with Emulator(faults=storm, read_lag=0.01, concurrency_limit=60) as emulator:
        emulator.task_seconds = 0.05
        retry = RetryPolicy(attempts=3, initial=0.002, maximum=0.01)
        client = make_client(emulator, retry=retry)
        ids = [f"id-{number}" for number in range(150)]
        results = await asyncio.gather(
            *(client.create_voice("Ada", voice_url=SAMPLE, external_task_id=one) for one in ids),
            return_exceptions=True,
        )
        outcomes: Counter[str] = Counter()
        for external, result in zip(ids, results, strict=True):
            if isinstance(result, VoiceTask):
                assert is_of(result, emulator, external)
                outcomes["made"] += 1
            else:
                assert isinstance(result, KlingError)
                check_outcome(emulator, result, external)
                outcomes[result.outcome or ""] += 1
        assert emulator.created == len({view.external_task_id for view in emulator.tasks})
        assert all(outcomes[kind] > 0 for kind in ("made", "unknown", "not_created"))


async def test_no_answer_at_all(make_client: MakeClient) -> None:
    """A timeout is open, with the call and the seconds in its text."""
    async with Server([stall]) as server:
        error = await failing(make_client(server, timeout=0.05, retry=ONCE))
        assert isinstance(error, RequestTimeoutError)
        assert error.outcome == "unknown"
        assert "POST /v1/general/custom-voices" in str(error)
        assert [request.method for request in server.requests] == ["POST", "GET"]


async def test_a_source_that_does_not_exist(make_client: MakeClient) -> None:
    """A create that is refused with 1203 is final: what is missing is its source."""
    async with Emulator(faults=faults(script={"create": [1203]})) as emulator:
        error = await failing(make_client(emulator))
        assert isinstance(error, NotFoundError)
        assert error.outcome == "not_created"
        assert emulator.requests.total() == 1
