"""Secrets stay secret: in logs, reprs, messages, tracebacks and pickles, whatever goes wrong."""

import asyncio
import base64
import copy
import json
import logging
import pickle
import traceback
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire import ONCE, Answer, MakeClient, Request, Server, envelope, response, task

from kling_voice import (
    AccessKey,
    ApiKey,
    CloneResult,
    KlingVoiceClient,
    RetryPolicy,
    TaskResult,
    TaskStatus,
    Voice,
    VoiceRequest,
    VoiceTask,
)
from kling_voice.emulator import ALL, Emulator, Faults
from kling_voice.errors import ApiError, ConfigurationError, KlingError, ResponseError
from kling_voice.redaction import mask_url, redact

SIGNATURE = "X-Amz-Signature=5ecretS1gnature"
SAMPLE = f"https://bucket.example.com/ada.mp3?{SIGNATURE}"
CALLBACK = f"https://me.example.com/cb?{SIGNATURE}"
faults = partial(Faults, delay_seconds=0.01, retry_after=0, stall_seconds=0.05)


def texts(error: BaseException) -> Iterator[str]:
    """Everything that an error shows to whoever prints, logs or sends it."""
    yield str(error)
    yield repr(error)
    yield "".join(traceback.format_exception(error))
    yield repr(vars(error))
    yield repr(pickle.dumps(error))
    seen = error
    while (inner := seen.__cause__ or seen.__context__) is not None:
        yield str(inner)
        yield repr(vars(inner))
        seen = inner


def secrets_of(emulator: Emulator) -> list[str]:
    """What nobody may read."""
    keys = emulator.credentials
    return [keys.access_key, keys.secret_key, emulator.api_key, "5ecret", "eyJ"]


@pytest.mark.parametrize("kind", ["access key", "API key"])
async def test_nothing_leaks_under_faults(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Under every fault, with all logs on, no key, token or signature is seen anywhere."""
    caplog.set_level(logging.DEBUG)
    storm = faults(0.7, kinds=[*ALL, 1000, 1002, 1004, 1101, 1201, 1203, 5000])
    async with Emulator(faults=storm, task_seconds=0.0) as emulator:
        client = make_client(
            emulator,
            credentials=emulator.credentials if kind == "access key" else ApiKey(emulator.api_key),
            retry=RetryPolicy(attempts=2, initial=0.001, maximum=0.01),
            timeout=0.2,
        )
        results = await asyncio.gather(
            *(
                client.create_voice("Ada", voice_url=SAMPLE, callback_url=CALLBACK)
                for _ in range(40)
            ),
            *(client.get_task("t-1") for _ in range(20)),
            *(client.list_tasks() for _ in range(20)),
            *(client.delete_voice("v-1") for _ in range(20)),
            *(client.request("GET", "/x", params={"sig": "5ecret"}) for _ in range(20)),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        assert len(errors) > 30
        assert all(isinstance(error, KlingError) for error in errors)
        shown = [caplog.text, repr(results), repr(client)]
        shown += [text for error in errors for text in texts(error)]
        for secret in secrets_of(emulator):
            assert not any(secret in text for text in shown)


@pytest.mark.parametrize("status", [200, 400, 401, 502])
@pytest.mark.parametrize("credentials", [AccessKey("the-access-key", "s" * 32), ApiKey("the-key")])
async def test_a_server_that_repeats_what_it_was_sent(
    make_client: MakeClient,
    caplog: pytest.LogCaptureFixture,
    status: int,
    credentials: AccessKey | ApiKey,
) -> None:
    """A server or gateway that echoes the request does not make us show its secrets."""
    caplog.set_level(logging.DEBUG)

    def echo(request: Request) -> str:
        return f"{request.headers['authorization']} {request.body.decode()}"

    def page(request: Request) -> Answer:
        return response(f"<pre>{echo(request)}</pre>".encode(), status)

    def escaped(request: Request) -> Answer:
        return response(echo(request).replace("/", "\\/").encode(), status)

    def refusal(request: Request) -> Answer:
        return envelope(code=1201, message=f"bad: {echo(request)}", status=status)

    for answer in (page, escaped, refusal):
        async with Server(answer) as server:
            client = make_client(server, credentials=credentials, retry=ONCE)
            with pytest.raises(KlingError) as caught:
                await client.create_voice("Ada", voice_url=SAMPLE, callback_url=CALLBACK)
            assert isinstance(caught.value, ApiError | ResponseError)
            shown = [*texts(caught.value), caplog.text]
            for secret in ("the-access-key", "the-key", "s" * 32, "5ecret", "eyJ"):
                assert not any(secret in text for text in shown)
            assert any("bucket.example.com/ada.mp3" in text.replace("\\", "") for text in shown)


async def test_a_secret_at_the_edge(make_client: MakeClient) -> None:
    """A secret that crosses the place where a long body is cut does not show its beginning."""
    for length in range(100, 200, 7):

        def page(request: Request, length: int = length) -> Answer:
            filler = "x" * length
            return response(f"{filler} {request.headers['authorization'][7:]}".encode(), 502)

        async with Server(page) as server:
            client = make_client(server, credentials=ApiKey("5ecret-api-key"), retry=ONCE)
            with pytest.raises(ResponseError) as caught:
                await client.get_task("t-1")
            assert "5ecret" not in caught.value.body


async def test_signatures_in_answers(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial's signature reaches the caller in its field, and is seen nowhere else."""
    caplog.set_level(logging.DEBUG)
    voice = {"voice_id": "v-1", "voice_name": "Ada", "trial_url": SAMPLE}
    good = task("t-1", "succeed", task_result={"voices": [voice]})
    broken = task("t-1", "succeed", task_result={"voices": [{**voice, "voice_id": 5}]})
    async with Server([envelope(good), envelope(broken), response(json.dumps(good).encode())]) as s:
        client = make_client(s, retry=ONCE)
        made = await client.get_task("t-1")
        assert made.voice is not None
        assert made.voice.trial_url == SAMPLE
        shown = [repr(made), str(made), f"{[made.voice]}", caplog.text]
        for _ in range(2):
            with pytest.raises(ResponseError) as caught:
                await client.get_task("t-1")
            shown += texts(caught.value)
        assert not any("5ecret" in text for text in shown)


def test_reprs() -> None:
    """No repr of anything public shows a key or a signature."""
    voice = Voice("v-1", "Ada", SAMPLE, "me")
    made = VoiceTask("t-1", TaskStatus.SUCCEED, task_result=TaskResult((voice,)))
    request = VoiceRequest("Ada", voice_url=SAMPLE, callback_url=CALLBACK)
    things = [
        AccessKey("5ecret", "5ecret"),
        ApiKey("5ecret"),
        KlingVoiceClient(AccessKey("5ecret", "5ecret")),
        voice,
        made,
        request,
        CloneResult(request, made, voice, None),
        {"nested": [(request, made)]},
    ]
    for thing in things:
        assert "5ecret" not in f"{thing!r} {thing}"
        assert "5ecret" not in f"{copy.copy(thing)!r}"


def test_settings_that_hold_secrets_are_not_repeated() -> None:
    """The error about an unusable base URL does not repeat a login or a query in it."""
    for url in (
        "https://user:5ecret@example.com",
        "https://example.com?key=5ecret",
        "http://example.com/?5ecret",
        "example.com?key=5ecret",
    ):
        with pytest.raises(ConfigurationError) as caught:
            KlingVoiceClient(ApiKey("key"), base_url=url)
        assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://a.b/c.mp3?x=5ecret&y=1 now", "see https://a.b/c.mp3?*** now"),
        ("HTTPS://A.B?5ecret", "HTTPS://A.B?***"),
        ("https://u:5ecret@a.b/c", "https://***@a.b/c"),
        ("https://a.b/c#token=5ecret", "https://a.b/c?***"),
        (r'{"u":"https:\/\/a.b\/c?s=5ecret"}', r'{"u":"https:\/\/a.b\/c?***"}'),
        ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJ4In0.5ecret_-x.", "Bearer ***."),
        ("https://a.b/c https://d.e/f?5ecret", "https://a.b/c https://d.e/f?***"),
        ("nothing to hide", "nothing to hide"),
        ("", ""),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    """Queries, logins and tokens are masked in any text; the rest stays readable."""
    assert redact(text) == shown


@given(st.text(), st.text(st.characters(exclude_characters="*"), min_size=6), st.text())
def test_redaction_of_a_secret(before: str, secret: str, after: str) -> None:
    """A known secret is masked wherever it stands."""
    assert secret not in redact(before + secret + after, secret) or secret in before + after


@given(st.text())
def test_a_masked_url_has_no_query(query: str) -> None:
    """The repr of a URL ends at its query, whatever characters that has."""
    assert mask_url(f"https://a.b/c?{query}") == "'https://a.b/c?***'"
    assert mask_url(f"s3://a.b/c#{query}") == "'s3://a.b/c?***'"


async def test_tokens_say_no_secret(make_client: MakeClient) -> None:
    """The token that travels holds the key's id and the times; the secret key never travels."""
    async with Server([envelope([])]) as server:
        keys = AccessKey("the-access-key", "the-secret-key-of-some-32-characters")
        await make_client(server, credentials=keys).list_tasks()
        (request,) = server.requests
        travelled = f"{request}"
        assert keys.secret_key not in travelled
        assert base64.b64encode(keys.secret_key.encode()).decode().rstrip("=")[:-2] not in travelled


async def test_cookies_are_not_kept(make_client: MakeClient) -> None:
    """A server's cookies do not come back to it: calls are known by their token alone."""
    answer = envelope([], headers={"Set-Cookie": "tracking=1; Path=/"})
    async with Server([answer]) as server:
        url = server.base_url.replace("127.0.0.1", "localhost")  # of hosts, jars keep cookies
        client = make_client(server, base_url=url)
        await client.list_tasks()
        await client.list_tasks()
        assert all("cookie" not in request.headers for request in server.requests)
