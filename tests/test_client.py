"""The client's calls: what they send and give, and every fault on every one of them."""

import asyncio
import inspect
import logging
import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

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
    task,
)

from kling_voice import (
    AccessKey,
    ApiKey,
    KlingVoiceClient,
    ObjectStoreHost,
    PollingPolicy,
    RetryPolicy,
    TaskStatus,
    Voice,
    VoiceTask,
)
from kling_voice.emulator import ALL, CALLS, Emulator, Fault, Faults
from kling_voice.emulator.codes import CODES
from kling_voice.errors import (
    ApiError,
    BadRequestError,
    ClientClosedError,
    ConcurrencyLimitError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    KlingError,
    NotFoundError,
    RateLimitError,
    RequestTimeoutError,
    ResponseError,
    ServerError,
)

SAMPLE = "https://example.com/a.mp3"
HUGE: Any = 10**5000  # whose repr Python refuses
NO_PATH: Any = 5
faults = partial(Faults, delay_seconds=0.01, retry_after=0)

KINDS: dict[Fault, tuple[type[KlingError], ...]] = {
    Fault.RESET_BEFORE: (ConnectionFailedError,),
    Fault.RESET_AFTER: (ConnectionFailedError,),
    Fault.STALL: (RequestTimeoutError,),
    Fault.STALL_AFTER: (RequestTimeoutError,),
    Fault.ERROR_500_BEFORE: (ServerError,),
    Fault.ERROR_500_AFTER: (ServerError,),
    Fault.ERROR_503_BEFORE: (ServerError,),
    Fault.ERROR_503_AFTER: (ServerError,),
    Fault.ERROR_504_BEFORE: (ServerError,),
    Fault.ERROR_504_AFTER: (ServerError,),
    Fault.HTML_502: (ResponseError,),
    Fault.HTML_502_AFTER: (ResponseError,),
    Fault.TRUNCATED: (ConnectionFailedError,),
    Fault.UNDECODABLE: (ResponseError,),
    Fault.RATE_LIMIT: (RateLimitError,),
    Fault.RATE_LIMIT_RETRY_AFTER: (RateLimitError,),
    Fault.CONCURRENCY: (ConcurrencyLimitError,),
}


async def prepared(emulator: Emulator, make_client: MakeClient) -> VoiceTask:
    """Make a finished task on the account."""
    client = make_client(emulator, retry=BRISK)
    made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="first")
    emulator.advance(60)
    return await client.get_task(made.task_id)


def perform(client: KlingVoiceClient, call: str, ended: VoiceTask) -> Awaitable[object]:
    """Make one of the five calls."""
    assert ended.voice is not None
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: client.create_voice("Bob", voice_url=SAMPLE, external_task_id="mine"),
        "get": lambda: client.get_task(ended.task_id),
        "list": lambda: client.list_tasks(),
        "presets": lambda: client.list_presets(),
        "delete": lambda: client.delete_voice(ended.voices[0].voice_id),
    }
    return calls[call]()


def check(call: str, answer: object, ended: VoiceTask, emulator: Emulator) -> None:
    """Check that a call gave, and did, what it should, once."""
    first = emulator.tasks[0]
    assert first.deleted == (call == "delete")
    assert emulator.created == (2 if call == "create" else 1)
    if call == "create":
        assert isinstance(answer, VoiceTask)
        assert answer.task_id == emulator.tasks[1].task_id
    elif call == "get":
        assert answer == ended or (
            isinstance(answer, VoiceTask) and answer.task_id == ended.task_id
        )
    elif call == "list":
        assert isinstance(answer, list)
        assert [one.task_id for one in answer] == [ended.task_id]
    elif call == "presets":
        assert isinstance(answer, list)
        assert {one.voice.owned_by for one in answer} == {"kling"}
    else:
        assert answer is None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ALL)
async def test_every_fault_on_every_call(make_client: MakeClient, call: str, fault: Fault) -> None:
    """A fault that passes leaves no trace: the call succeeds, and its effect happens once."""
    async with Emulator() as emulator:
        ended = await prepared(emulator, make_client)
        once = fault in (Fault.TOKEN_REFUSED, Fault.STALL, Fault.STALL_AFTER)
        emulator.faults = faults(script={call: [fault] if once else [fault, fault]})
        client = make_client(emulator, timeout=patience(fault))
        check(call, await perform(client, call, ended), ended, emulator)
        assert emulator.faults.injected.total() >= 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", KINDS)
async def test_every_fault_that_stays(make_client: MakeClient, call: str, fault: Fault) -> None:
    """A fault that stays is raised as what it is, after all attempts, and as nothing else."""
    async with Emulator() as emulator:
        ended = await prepared(emulator, make_client)
        emulator.faults = faults(1.0, kinds=[fault])
        retry = RetryPolicy(attempts=2, initial=0.001)
        client = make_client(emulator, timeout=patience(fault) / 3, retry=retry)
        with pytest.raises(KlingError) as caught:
            await perform(client, call, ended)
        assert isinstance(caught.value, KINDS[fault])
        assert (caught.value.outcome is not None) == (call == "create")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", CODES)
async def test_every_code_on_every_call(make_client: MakeClient, call: str, code: int) -> None:
    """A business code that passes is outlived, and any other raised with all it carries."""
    async with Emulator() as emulator:
        ended = await prepared(emulator, make_client)
        emulator.faults = faults(script={call: [code]})
        work = perform(make_client(emulator), call, ended)
        if code in (1003, 1004, 1302, 1303) or code >= 5000:
            check(call, await work, ended, emulator)
        else:
            with pytest.raises(ApiError) as caught:
                await work
            assert caught.value.code == code
            assert caught.value.http_status == CODES[code][0]
            assert caught.value.request_id


# --- get ---


async def test_get_by_either_id(make_client: MakeClient, emulator: Emulator) -> None:
    """A task is found by the vendor's id and by the caller's, and unknown ids are not found."""
    client = make_client(emulator)
    made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
    for one in (made.task_id, "mine"):
        found = await client.get_task(one)
        assert found.task_id == made.task_id
        assert found.external_task_id == "mine"
        assert found.request_id
        assert found.voice is not None
        assert found.voice.voice_name == "Ada"
    with pytest.raises(NotFoundError) as caught:
        await client.get_task("nothing")
    assert (caught.value.code, caught.value.outcome) == (1203, None)


@pytest.mark.parametrize(
    "odd",
    [
        "a/b",
        "../../x",
        "a b",
        "%2F",
        "a%",
        "?x=1",
        "#x",
        "声音",
        "...",
        "a\\b",
        "a+b",
        ";",
        "\x00",
    ],
)
async def test_odd_external_ids(make_client: MakeClient, emulator: Emulator, odd: str) -> None:
    """An id of any characters comes back whole through create, look-up and duplicate."""
    client = make_client(emulator)
    made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id=odd)
    assert made.external_task_id == odd
    assert (await client.get_task(odd)).task_id == made.task_id
    again = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id=odd)
    assert again.task_id == made.task_id
    assert emulator.created == 1


async def test_a_failed_task_is_an_answer(make_client: MakeClient) -> None:
    """A task that failed is a good answer of a query; its message says why."""
    async with Emulator(task_seconds=0.0, fail_when=lambda _: "too noisy") as emulator:
        client = make_client(emulator)
        made = await client.create_voice("Ada", voice_url=SAMPLE)
        ended = await client.get_task(made.task_id)
        assert ended.failed
        assert ended.task_status is TaskStatus.FAILED
        assert ended.task_status_msg == "too noisy"
        assert ended.voice is None


async def test_newer_spelling(make_client: MakeClient) -> None:
    """``succeeded`` is read as ``succeed`` off the wire."""
    async with Emulator(task_seconds=0.0, succeed_word="succeeded") as emulator:
        client = make_client(emulator)
        made = await client.create_voice("Ada", voice_url=SAMPLE)
        assert (await client.get_task(made.task_id)).task_status is TaskStatus.SUCCEED


# --- lists ---


async def test_lists(make_client: MakeClient, emulator: Emulator) -> None:
    """A page has what was asked for, newest first, and beyond the last page there is nothing."""
    client = make_client(emulator)
    for number in range(5):
        await client.create_voice(f"Voice {number}", voice_url=SAMPLE)
    names = [
        [one.voice.voice_name for one in page if one.voice]
        for page in [
            await client.list_tasks(),
            await client.list_tasks(1, 2),
            await client.list_tasks(page_num=3, page_size=2),
            await client.list_tasks(4, 2),
        ]
    ]
    assert names == [
        ["Voice 4", "Voice 3", "Voice 2", "Voice 1", "Voice 0"],
        ["Voice 4", "Voice 3"],
        ["Voice 0"],
        [],
    ]
    assert len(await client.list_presets(page_size=5)) == 5


async def first(answer: Any) -> object:
    """Await an answer, or the first item of an iteration."""
    return await (answer if inspect.isawaitable(answer) else anext(answer))


@pytest.mark.parametrize("call", ["list_tasks", "list_presets", "iter_tasks", "iter_presets"])
async def test_page_bounds(make_client: MakeClient, emulator: Emulator, call: str) -> None:
    """A page out of bounds is refused before anything is sent, with its argument's name."""
    client = make_client(emulator)
    wrong: list[tuple[str, Any]] = [("page_size", 0), ("page_size", 1001), ("page_size", "30")]
    if call.startswith("list"):
        wrong += [("page_num", 0), ("page_num", 1001), ("page_num", True)]
    for name, value in wrong:
        method = getattr(client, call)
        with pytest.raises(InvalidRequestError) as caught:
            await first(method(**{name: value}))
        assert caught.value.field == name
    assert emulator.requests.total() == 0


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
async def test_iterate(make_client: MakeClient, emulator: Emulator, size: int) -> None:
    """Iterating gives every task once, newest first, until a page is empty."""
    emulator.preload(23)
    client = make_client(emulator)
    seen = [one.task_id async for one in client.iter_tasks(page_size=size)]
    assert seen == [view.task_id for view in reversed(emulator.tasks)]
    assert emulator.requests["GET /v1/general/custom-voices"] == -(-23 // size) + 1
    presets = [one async for one in client.iter_presets(page_size=size)]
    assert len({one.task_id for one in presets}) == len(presets) == 12


async def test_iterate_nothing(make_client: MakeClient, emulator: Emulator) -> None:
    """An empty account is an empty iteration, after one request."""
    assert [one async for one in make_client(emulator).iter_tasks()] == []
    assert emulator.requests.total() == 1


async def test_iterate_while_tasks_appear(make_client: MakeClient, emulator: Emulator) -> None:
    """Tasks that appear while pages are read push others down; each is still given once."""
    emulator.preload(20)
    old = {view.task_id for view in emulator.tasks}
    client = make_client(emulator)
    seen = []
    async for one in client.iter_tasks(page_size=4):
        seen.append(one.task_id)
        if len(seen) % 3 == 0 and len(seen) < 15:
            emulator.preload(1)
    assert len(seen) == len(set(seen))
    assert old <= set(seen)


async def test_iterate_over_short_pages(make_client: MakeClient) -> None:
    """A page that is shorter than asked, as some servers cut it, is not taken for the last."""
    async with Emulator(page_cap=5, page_clamp=True) as emulator:
        emulator.preload(12)
        seen = [one.task_id async for one in make_client(emulator).iter_tasks(page_size=10)]
        assert len(set(seen)) == 12


@pytest.mark.parametrize("cap", [500, 100, 30])
async def test_iterate_where_large_pages_are_refused(make_client: MakeClient, cap: int) -> None:
    """Where a larger page is refused with 1201, a smaller one is asked for; nothing is lost."""
    async with Emulator(page_cap=cap) as emulator:
        emulator.preload(600)
        client = make_client(emulator)
        seen = [one.task_id async for one in client.iter_tasks(page_size=1000)]
        assert len(set(seen)) == len(seen) == 600
    async with Emulator(page_cap=20) as emulator:
        with pytest.raises(BadRequestError):
            [one async for one in make_client(emulator).iter_tasks()]


async def test_iterate_under_faults(make_client: MakeClient) -> None:
    """Faults on the way lose no task and give none twice."""
    async with Emulator(faults=faults(0.3)) as emulator:
        emulator.preload(50)
        client = make_client(emulator, retry=RetryPolicy(12, initial=0.001, maximum=0.01))
        seen = [one.task_id async for one in client.iter_tasks(page_size=5)]
        assert len(set(seen)) == len(seen) == 50


async def test_iterate_from_many_tasks(make_client: MakeClient, emulator: Emulator) -> None:
    """Two iterations of one client do not mix, and one may be left in the middle."""
    emulator.preload(10)
    client = make_client(emulator)

    async def all_of_them() -> int:
        return len([one async for one in client.iter_tasks(page_size=3)])

    async for _ in client.iter_tasks(page_size=3):
        break
    assert await asyncio.gather(*(all_of_them() for _ in range(5))) == [10] * 5


# --- delete ---


async def test_delete(make_client: MakeClient, emulator: Emulator) -> None:
    """Deleting works once; deleting again, or what is not there, is the vendor's refusal."""
    ended = await prepared(emulator, make_client)
    client = make_client(emulator)
    voice_id = ended.voices[0].voice_id
    await client.delete_voice(voice_id)
    with pytest.raises(BadRequestError) as caught:
        await client.delete_voice(voice_id)
    assert caught.value.code == 1201
    with pytest.raises(NotFoundError):
        await client.delete_voice("nothing")
    preset = (await client.list_presets(1, 1))[0].voices[0].voice_id
    with pytest.raises(BadRequestError):
        await client.delete_voice(preset)


async def test_delete_without_data(make_client: MakeClient) -> None:
    """A delete that is answered without any data is a success."""
    async with Emulator(delete_data=False) as emulator:
        ended = await prepared(emulator, make_client)
        await make_client(emulator).delete_voice(ended.voices[0].voice_id)
        assert emulator.tasks[0].deleted


@pytest.mark.parametrize(
    "fault",
    [
        Fault.RESET_AFTER,
        Fault.STALL_AFTER,
        Fault.ERROR_500_AFTER,
        Fault.HTML_502_AFTER,
        Fault.TRUNCATED,
        Fault.UNDECODABLE,
    ],
)
async def test_delete_whose_answer_was_lost(make_client: MakeClient, fault: Fault) -> None:
    """A delete that is sent again after an open failure takes "already deleted" as done."""
    async with Emulator() as emulator:
        ended = await prepared(emulator, make_client)
        emulator.faults = faults(script={"delete": [fault]})
        await make_client(emulator, timeout=patience(fault)).delete_voice(ended.voices[0].voice_id)
        assert emulator.tasks[0].deleted
        assert emulator.refused[1201] == 1


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.CONCURRENCY, Fault.TOKEN_REFUSED])
async def test_delete_that_was_refused_before(make_client: MakeClient, fault: Fault) -> None:
    """After a failure that certainly did nothing, "already deleted" is still an error."""
    async with Emulator() as emulator:
        ended = await prepared(emulator, make_client)
        client = make_client(emulator)
        await client.delete_voice(ended.voices[0].voice_id)
        emulator.faults = faults(script={"delete": {1: fault}})
        with pytest.raises(BadRequestError):
            await client.delete_voice(ended.voices[0].voice_id)


async def test_delete_is_not_remembered(make_client: MakeClient) -> None:
    """Each delete judges by its own attempts: an open failure of one call excuses no other."""
    async with Emulator() as emulator:
        ended = await prepared(emulator, make_client)
        client = make_client(emulator)
        emulator.faults = faults(script={"delete": [Fault.RESET_AFTER]})
        await client.delete_voice(ended.voices[0].voice_id)
        with pytest.raises(BadRequestError):
            await client.delete_voice(ended.voices[0].voice_id)


# --- request ---


async def test_request_speaks_to_the_vendor(make_client: MakeClient, emulator: Emulator) -> None:
    """``request`` makes any signed call and gives the envelope's data."""
    client = make_client(emulator)
    made = await client.create_voice("Ada", voice_url=SAMPLE)
    data = await client.request("GET", f"/v1/general/custom-voices/{made.task_id}")
    assert data["task_id"] == made.task_id
    data = await client.request("get", "/v1/general/custom-voices", params={"pageSize": 1})
    assert [item["task_id"] for item in data] == [made.task_id]
    data = await client.request(
        "POST", "/v1/general/custom-voices", json={"voice_name": "Bob", "video_id": "v-1"}
    )
    assert data["task_status"] == "submitted"
    with pytest.raises(BadRequestError) as caught:
        await client.request("GET", "/v1/nothing")
    assert caught.value.code == 1202


@pytest.mark.parametrize("fault", [*KINDS, Fault.DELAY, Fault.TOKEN_REFUSED])
async def test_request_never_repeats_a_write(make_client: MakeClient, fault: Fault) -> None:
    """A POST by ``request`` creates at most once, and succeeds where a re-send is harmless."""
    async with Emulator(faults=faults(script={"create": [fault]})) as emulator:
        client = make_client(emulator, timeout=patience(fault))
        body = {"voice_name": "Ada", "video_id": "v-1"}  # no external id protects this one
        harmless = {Fault.RATE_LIMIT, Fault.RATE_LIMIT_RETRY_AFTER, Fault.CONCURRENCY}
        if fault in {*harmless, Fault.DELAY, Fault.TOKEN_REFUSED}:
            assert (await client.request("POST", "/v1/general/custom-voices", json=body))["task_id"]
            assert emulator.created == 1
        else:
            with pytest.raises(KINDS[fault]) as caught:
                await client.request("POST", "/v1/general/custom-voices", json=body)
            assert caught.value.outcome is None
            assert emulator.created <= 1
            assert emulator.requests.total() == 1


# --- arguments and settings ---


async def test_arguments_are_checked_before_anything_is_sent(
    make_client: MakeClient, emulator: Emulator
) -> None:
    """An unusable argument is told by its Python name, and no request is made."""
    client = make_client(emulator)
    calls: list[tuple[str, Awaitable[object]]] = [
        ("voice_name", client.create_voice("", voice_url=SAMPLE)),
        ("voice_name", client.create_voice("a" * 21, voice_url=SAMPLE)),
        ("source", client.create_voice("Ada")),
        ("source", client.create_voice("Ada", voice_url=SAMPLE, video_id="v-1")),
        ("source", client.create_voice("Ada", voice_url=SAMPLE, voice_file="a.mp3")),
        ("source", client.create_voice("Ada", video_id="v-1", voice_file="a.mp3")),
        ("voice_url", client.create_voice("Ada", voice_url="a.mp3")),
        ("video_id", client.create_voice("Ada", video_id="")),
        ("callback_url", client.create_voice("Ada", video_id="v", callback_url="me")),
        ("callback_url", client.create_voice("Ada", video_id="v", callback_url="")),
        ("external_task_id", client.create_voice("Ada", video_id="v", external_task_id="..")),
        ("external_task_id", client.create_voice("Ada", video_id="v", external_task_id="")),
        ("task_id", client.get_task("")),
        ("task_id", client.get_task("..")),
        ("voice_id", client.delete_voice("")),
        ("method", client.request("", "/x")),
        ("method", client.request(HUGE, "/x")),
        ("page_num", client.list_tasks(HUGE)),
        ("params", client.request("GET", "/x", params={"n": HUGE})),
        ("timeout", client.wait_for_task("t", timeout=-HUGE)),
        ("path", client.download_trial(Voice("v", trial_url=SAMPLE), NO_PATH)),
        ("path", client.request("GET", "x")),
        ("params", client.request("GET", "/x", params={"a": None})),
        ("json", client.request("POST", "/x", json=object())),
    ]
    for field, work in calls:
        with pytest.raises(InvalidRequestError) as caught:
            await work
        assert caught.value.field == field
    assert emulator.requests.total() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": "30"},
        {"timeout": True},
        {"timeout": None},
        {"base_url": ""},
        {"base_url": HUGE},
        {"base_url": "https://a..b"},
        {"base_url": f"https://{'a' * 64}.com"},
        {"base_url": "http://api-singapore.klingai.com"},
        {"credentials": "key"},
        {"credentials": ("id", "secret")},
        {"retry": 3},
        {"polling": 5},
        {"session": "https://example.com"},
        {"callbacks": "https://app.example.com/kling"},
        {"sample_host": "s3://bucket/prefix"},
        {"sample_host": ObjectStoreHost},
    ],
    ids=lambda options: next(iter(options)),
)
def test_unusable_settings(options: dict[str, Any]) -> None:
    """A setting that cannot work is told by its name when the client is made."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        KlingVoiceClient(**{"credentials": ApiKey("key"), **options})


async def test_a_timeout_beyond_all_clocks(make_client: MakeClient, emulator: Emulator) -> None:
    """Seconds that an event loop's clock cannot add are as good as none."""
    for timeout in (10**400, HUGE, 1e300):
        assert await make_client(emulator, timeout=timeout).list_tasks() == []


async def test_a_text_is_no_source_of_requests(make_client: MakeClient, emulator: Emulator) -> None:
    """It is likely a path; its letters are no requests."""
    path: Any = "cast.csv"
    with pytest.raises(InvalidRequestError, match="requests"):
        make_client(emulator).clone_voices(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RetryPolicy, {"attempts": 0}),
        (RetryPolicy, {"attempts": 2.5}),
        (RetryPolicy, {"attempts": True}),
        (RetryPolicy, {"initial": -1}),
        (RetryPolicy, {"maximum": float("nan")}),
        (RetryPolicy, {"max_elapsed": float("inf")}),
        (RetryPolicy, {"max_elapsed": "60"}),
        (PollingPolicy, {"initial": 0}),
        (PollingPolicy, {"multiplier": 0.5}),
        (PollingPolicy, {"maximum": 10**400}),
        (PollingPolicy, {"maximum": HUGE}),
        (PollingPolicy, {"jitter": -0.1}),
    ],
)
def test_unusable_policies(kind: Callable[..., object], options: dict[str, Any]) -> None:
    """A policy out of its range is a ConfigurationError that names the number."""
    with pytest.raises(ConfigurationError, match=rf"Policy\.{next(iter(options))} must be"):
        kind(**options)


async def test_what_is_no_function_is_refused_first(
    make_client: MakeClient, emulator: Emulator
) -> None:
    """An ``on_update`` that cannot be called is told before a voice is created."""
    client = make_client(emulator)
    wrong: Any = "print"
    for call in (
        lambda: client.clone_voice("Ada", voice_url=SAMPLE, on_update=wrong),
        lambda: client.wait_for_task("1", on_update=wrong),
        lambda: anext(client.clone_voices([], on_update=wrong)),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await call()
        assert caught.value.field == "on_update"
    assert emulator.created == 0


async def test_a_download_of_what_is_no_voice(make_client: MakeClient, emulator: Emulator) -> None:
    """An id, say, is refused by the argument's name."""
    wrong: Any = "829877301929783311"
    with pytest.raises(InvalidRequestError, match="voice must be a Voice") as caught:
        await make_client(emulator).download_trial(wrong, "ada.mp3")
    assert caught.value.field == "voice"


async def drip(writer: asyncio.StreamWriter) -> None:
    """Answer a byte at a time."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def test_a_download_ends_with_its_client(tmp_path: Path) -> None:
    """And leaves no half file."""
    async with Server([drip]) as server:
        client = KlingVoiceClient(ApiKey("key"), base_url=server.base_url)
        voice = Voice("1", trial_url=f"{server.base_url}/ada.mp3")
        call = asyncio.create_task(client.download_trial(voice, tmp_path / "ada.mp3"))
        await asyncio.sleep(0.2)
        await client.close()
        with pytest.raises(ClientClosedError):
            await call
    assert os.listdir(tmp_path) == []


async def test_a_further_attempt_of_a_download_ends_in_time(tmp_path: Path) -> None:
    """The retry policy bounds it, however its bytes drip."""
    async with Server([response(b"busy", 503), drip]) as server:
        brief = RetryPolicy(attempts=2, initial=0.01, max_elapsed=0.4)
        async with KlingVoiceClient(ApiKey("key"), base_url=server.base_url, retry=brief) as client:
            voice = Voice("1", trial_url=f"{server.base_url}/ada.mp3")
            with pytest.raises(RequestTimeoutError, match="A trial's download"):
                await client.download_trial(voice, tmp_path / "ada.mp3")


def test_policies_by_the_contract() -> None:
    """The defaults and the order of the policies' numbers are the contract's."""
    assert RetryPolicy() == RetryPolicy(4, 0.5, 8.0, 60.0)
    assert PollingPolicy() == PollingPolicy(1.0, 1.3, 5.0, 0.1)
    assert hash(RetryPolicy()) == hash(RetryPolicy())


def test_the_constructor_by_the_contract() -> None:
    """Every argument but the first is by keyword, with the contract's defaults."""
    parameters = inspect.signature(KlingVoiceClient).parameters
    assert {name: one.default for name, one in parameters.items()} == {
        "credentials": None,
        "base_url": None,
        "session": None,
        "timeout": 30.0,
        "retry": RetryPolicy(),
        "polling": PollingPolicy(),
        "callbacks": None,
        "sample_host": None,
    }
    assert all(one.kind is one.KEYWORD_ONLY for one in list(parameters.values())[1:])


async def test_a_gateways_prefix(make_client: MakeClient) -> None:
    """A base URL may carry a path, as gateways in front of the vendor do."""
    async with Emulator(prefix="/gateway/kling", task_seconds=0.0) as emulator:
        client = make_client(emulator)
        made = await client.create_voice("Ada", voice_url=SAMPLE)
        assert (await client.get_task(made.task_id)).succeeded
        assert "/gateway/kling" in repr(client)


async def test_one_account_for_each_client(make_client: MakeClient) -> None:
    """Clients do not share anything: each speaks to its own server with its own key."""
    async with Emulator(task_seconds=0.0) as one, Emulator(task_seconds=0.0) as two:
        first, second = make_client(one), make_client(two)
        await asyncio.gather(
            first.create_voice("Ada", voice_url=SAMPLE),
            second.create_voice("Ada", voice_url=SAMPLE),
        )
        assert one.created == two.created == 1
        with pytest.raises(ApiError):
            await make_client(two, credentials=one.credentials).list_tasks()


# --- logs ---


async def test_one_debug_line_a_request(
    make_client: MakeClient, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Each request logs one line: method, path, status, code, request id, attempt, time."""
    caplog.set_level(logging.DEBUG, "kling_voice")
    emulator.faults = faults(script={"get": [5000]})
    client = make_client(emulator)
    made = await client.create_voice("Ada", voice_url=SAMPLE, external_task_id="mine")
    caplog.clear()
    await client.get_task("mine")
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert len(lines) == 2
    shape = r"GET /v1/general/custom-voices/mine HTTP {} code {} request_id [\w-]{{36}} attempt {} "
    for line, told in zip(lines, [(500, 5000, 1), (200, 0, 2)], strict=True):
        assert re.match(shape.format(*told) + r"\d+\.\d ms", line)
    assert made.task_id not in "".join(lines)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "attempt 1 of 5" in warning
    assert {r.name.partition(".")[0] for r in caplog.records} == {"kling_voice"}


@pytest.mark.parametrize(
    "answer",
    [response(b"<html>", 502), b"", response(b" " * (17 << 20)), response(b"", 302)],
    ids=["html", "closed", "long", "redirect"],
)
async def test_a_debug_line_whatever_comes(
    make_client: MakeClient, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    """A request without a good answer logs one line as well, with its attempt."""
    caplog.set_level(logging.DEBUG, "kling_voice")
    async with Server([answer]) as server:
        with pytest.raises(KlingError):
            await make_client(server, retry=ONCE).request("POST", "/v1/x")
        (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
        assert line.startswith("POST /v1/x ")
        assert "attempt 1" in line


async def test_a_library_that_is_quiet(
    make_client: MakeClient, emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed, and what goes well is not logged above DEBUG."""
    client = make_client(emulator)
    await client.create_voice("Ada", voice_url=SAMPLE)
    await client.list_tasks()
    assert capsys.readouterr() == ("", "")


async def test_identical_answers_to_different_questions(make_client: MakeClient) -> None:
    """A second call on the same client never gives the first one's answer."""

    def answer(request: Request) -> Answer:
        return envelope(task(request.target.rpartition("/")[2]))

    async with Server(answer) as server:
        client = make_client(server, credentials=AccessKey("id", "s" * 32))
        assert [(await client.get_task(one)).task_id for one in ("a", "b", "a")] == ["a", "b", "a"]
