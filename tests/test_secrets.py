"""Every call, under faults and with all logs on: no key, no token and no signature is seen.

Seen is what is logged, shown, raised, warned of or pickled. Three things hold a signed URL since
their caller needs it there: a :class:`VoiceRequest` the caller's own ``voice_url`` and
``callback_url``, a :class:`Voice` its ``trial_url`` (neither shows it in a repr or a log), and what
``request()`` returns is the vendor's data as it came. What a sample host of the user's own says in
its errors, which are the causes of ours, is the user's.
"""

import asyncio
import copy
import gc
import logging
import pickle
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from wire import ONCE, MakeClient, Request, Server, envelope, response, task

from kling_voice import (
    AccessKey,
    ApiKey,
    CallbackReceiver,
    CloneResult,
    KlingError,
    KlingVoiceClient,
    ObjectStoreHost,
    RetryPolicy,
    Voice,
    VoiceRequest,
    VoiceTask,
)
from kling_voice.emulator import ALL, Emulator, Faults, recordings
from kling_voice.redaction import mask_url, redact

SIGNED = "5ecretS1gnature"
QUERY = f"X-Amz-Credential=AKIA5ecret&X-Amz-Signature={SIGNED}"
SAMPLE = f"https://bucket.example.com/ada.mp3?{QUERY}"
CALLBACK = f"https://me.example.com/cb?token={SIGNED}"
WEBHOOK_SECRET = "whsec_NXVwZXI1ZWNyZXR3ZWJob29rc2VjcmV0MTIzNDU2Nzg="
KEYS = AccessKey("the-5ecret-access-key", "the-5ecret-secret-key-of-32-bytes")
API_KEY = "the-5ecret-api-key"
ADA = recordings()["ada.mp3"]
NOT_TO_BE_SEEN = ("5ecret", "5uper", "NXVwZXI1", "eyJ", "AKIA")


class SignedHost:
    """A sample host whose URLs are signed, and which fails now and then."""

    def __init__(self) -> None:
        self.calls = 0

    async def publish(self, path: Path, name: str) -> str:
        """Give a signed URL."""
        self.calls += 1
        if self.calls % 3 == 0:
            raise OSError("the bucket is gone")
        return f"https://bucket.example.com/{name}.mp3?{QUERY}"

    async def discard(self, url: str) -> None:
        """Fail, quoting the URL."""
        raise OSError(f"cannot DELETE {url}")


class Everything(logging.Handler):
    """Keeps all that is logged: the message, its template, its arguments, its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record in every form that a handler may write it in."""
        self.texts += [self.format(record), repr(vars(record))]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All that is logged by anyone, at any level."""
    handler = Everything()
    web_names = ("client", "internal", "server", "web", "access", "websocket")
    names = ["", "kling_voice", "asyncio", "tenacity", *(f"aiohttp.{name}" for name in web_names)]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    yield handler.texts
    logging.getLogger().removeHandler(handler)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@asynccontextmanager
async def debugging(*, slow: float = 0.0) -> AsyncIterator[list[str]]:
    """Let asyncio tell all it can, callbacks that take that long included; note every warning."""
    loop = asyncio.get_running_loop()
    before = loop.slow_callback_duration
    loop.set_debug(True)
    loop.slow_callback_duration = slow
    warned: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield warned
            gc.collect()
            await asyncio.sleep(0)
        finally:
            loop.slow_callback_duration = before
            loop.set_debug(False)
            warned += [str(warning) for warning in caught]


def shown(thing: object) -> Iterator[str]:
    """Everything that a result or an error shows to whoever prints, logs, sends or stores it."""
    if thing is None or isinstance(thing, dict):  # of request(): the data as it came
        return
    if isinstance(thing, list | tuple):
        for item in thing:
            yield from shown(item)
        return
    yield f"{thing} {thing!r} {copy.copy(thing)!r}"
    if isinstance(thing, CloneResult):
        yield from shown((thing.task, thing.voice, thing.error))  # the request keeps its URLs
        return
    if not isinstance(thing, Voice | VoiceTask):  # a voice keeps its trial_url
        yield repr(pickle.dumps(thing))
    if isinstance(thing, BaseException):
        yield "".join(traceback.format_exception(thing))
        yield repr(vars(thing))
        yield from shown(pickle.loads(pickle.dumps(thing)).args)
        for inner in (thing.__cause__, thing.__context__):
            if inner is not None:
                yield f"{inner} {inner!r} {vars(inner)}"


def check(texts: Iterable[str]) -> None:
    """Find no secret."""
    for text in texts:
        for secret in NOT_TO_BE_SEEN:
            at = text.find(secret)
            assert at < 0, f"{secret} in: {text[max(0, at - 300) : at + 100]}"


Calls = dict[str, Callable[[], Awaitable[object]]]


def every_call(kling: KlingVoiceClient, folder: Path, trial: str) -> Calls:
    """Every call of a client, with secrets in whatever may hold one."""
    create = partial(kling.create_voice, callback_url=CALLBACK)
    clone = partial(kling.clone_voice, timeout=0.3)
    requests = [
        VoiceRequest("Ada", SAMPLE, callback_url=CALLBACK),
        VoiceRequest("Bad", SAMPLE),
        VoiceRequest("Ada", voice_file=ADA),
        VoiceRequest("Ada", f"ftp://bucket.example.com/ada.mp3?{QUERY}"),
        VoiceRequest("Ada", SAMPLE, callback_url=f"ftp://me?{QUERY}"),
    ]

    async def every(tasks: AsyncIterator[VoiceTask]) -> list[VoiceTask]:
        return [task async for task in tasks]

    async def batch(**options: Any) -> list[CloneResult]:
        async with aclosing(kling.clone_voices(requests, timeout=0.3, **options)) as results:
            return [result async for result in results]

    return {
        "create": lambda: create("Ada", voice_url=SAMPLE),
        "create of a file": lambda: create("Ada", voice_file=ADA),
        "create refused": lambda: create("Ada", voice_url=f"ftp://x?{QUERY}"),
        "get": lambda: kling.get_task("t-1"),
        "list": kling.list_tasks,
        "presets": kling.list_presets,
        "iter": lambda: every(kling.iter_tasks()),
        "iter presets": lambda: every(kling.iter_presets()),
        "delete": lambda: kling.delete_voice("v-1"),
        "request": lambda: kling.request("GET", "/x", params={"sig": SIGNED}),
        "write": lambda: kling.request("POST", "/x", json={"url": SAMPLE}),
        "request refused": lambda: kling.request("GET", f"/x?{QUERY}"),
        "wait": lambda: kling.wait_for_task("t-1", timeout=0.3),
        "clone": lambda: clone("Ada", voice_url=SAMPLE),
        "clone that fails": lambda: clone("Bad", voice_url=SAMPLE),
        "clone of a file": lambda: clone("Ada", voice_file=ADA),
        "batch": batch,
        "batch that resumes": lambda: batch(batch_id="cast", retry_failed=1),
        "trial": lambda: kling.download_trial(Voice("v-1", "Ada", trial), folder / "t.mp3"),
        "trial refused": lambda: kling.download_trial(
            Voice("v-1", "Ada", f"ftp://x?{QUERY}"), folder / "t.mp3"
        ),
    }


async def outcomes(calls: Calls, *, times: int = 1, seconds: float = 4.0) -> list[object]:
    """Make all calls at once; what takes too long is cancelled."""

    async def one(call: Callable[[], Awaitable[object]]) -> object:
        async with asyncio.timeout(seconds):
            return await call()

    work = (one(call) for call in calls.values() for _ in range(times))
    return list(await asyncio.gather(*work, return_exceptions=True))


def only_ours(results: Iterable[object]) -> list[KlingError]:
    """Give the errors, all of which must be this package's; a cut-off one is the test's own."""
    errors = [result for result in results if isinstance(result, BaseException)]
    ours = [error for error in errors if isinstance(error, KlingError)]
    assert all(isinstance(error, KlingError) or type(error) is TimeoutError for error in errors)
    return ours


def quick(make_client: MakeClient, server: object, **options: Any) -> KlingVoiceClient:
    """Make a client that gives up soon."""
    retry = RetryPolicy(attempts=2, initial=0.001, maximum=0.01)
    return make_client(
        server, **{"retry": retry, "timeout": 1.0, "sample_host": SignedHost(), **options}
    )


@pytest.mark.parametrize("credentials", [KEYS, ApiKey(API_KEY)], ids=["access key", "API key"])
async def test_every_call_under_faults(
    make_client: MakeClient, tmp_path: Path, logged: list[str], credentials: AccessKey | ApiKey
) -> None:
    """Whatever fails, and however loud all logs are, nobody sees a secret."""
    faults = Faults(
        0.5,
        kinds=[*ALL, 1000, 1002, 1004, 1101, 1201, 1203, 5000],
        delay_seconds=0.01,
        retry_after=0,
        stall_seconds=0.05,
    )
    async with (
        debugging(slow=0.02) as warned,
        Emulator(
            credentials=KEYS,
            api_key=API_KEY,
            faults=faults,
            task_seconds=0.05,
            webhook_secret=WEBHOOK_SECRET,
            fail_when=lambda body: (
                f"cannot fetch {body['voice_url']}" if body["voice_name"] == "Bad" else None
            ),
        ) as emulator,
    ):
        receiver = CallbackReceiver(WEBHOOK_SECRET, public_url=CALLBACK)
        client = quick(make_client, emulator, credentials=credentials, callbacks=receiver)
        calls = every_call(client, tmp_path, f"{emulator.base_url}/media/trials/1.mp3?{QUERY}")
        results = await outcomes(calls, times=2, seconds=2.0)
        assert only_ours(results)
        assert len(faults.injected) > 5
        seen = [f"{client!r} {receiver!r} {credentials!r}"]
        await client.close()
    assert any("attempt" in text for text in logged)
    check([*logged, *warned, *seen, *(text for result in results for text in shown(result))])


async def test_a_reason_that_quotes_a_signed_url(
    make_client: MakeClient, logged: list[str], emulator: Emulator
) -> None:
    """The vendor's reason for a failed task is told without the signature of the URL in it."""
    emulator.fail_when = lambda body: f"cannot fetch {body['voice_url']}"
    client = make_client(emulator)
    with pytest.raises(KlingError) as caught:
        await client.clone_voice("Ada", voice_url=SAMPLE)
    assert "cannot fetch https://bucket.example.com/ada.mp3?***" in str(caught.value)
    check([*logged, *shown(caught.value)])


def _spoken(request: Request) -> str:
    return f"{request.headers['authorization']} {request.body.decode()} {SAMPLE} {request.target}"


def _gateway(request: Request) -> bytes:
    return response(f"<pre>{_spoken(request)}</pre>".encode(), 502, {"Content-Type": "text/html"})


def _refusal(request: Request) -> bytes:
    return envelope(code=1201, message=f"bad request: {_spoken(request)}", status=400)


def _broken(request: Request) -> bytes:
    return response(f'{{"code":0,"data":{_spoken(request)}'.encode())


def _identified(request: Request) -> bytes:
    key = request.headers["authorization"].removeprefix("Bearer ")
    body = f'{{"code":1203,"message":"no","request_id":"{key}"}}'
    return response(body.encode(), 404)


def _remembered(request: Request) -> bytes:
    key = request.headers["authorization"].removeprefix("Bearer ")
    body = f'{{"code":0,"data":null,"request_id":"{key}"}}'
    return response(body.encode())


def _failed(request: Request) -> bytes:
    told = task("t-1", "failed", task_status_msg=f"cannot fetch {SAMPLE}")
    return envelope([told] if "?" in request.target else told)


def _wrong(request: Request) -> bytes:
    told = task(
        "t-1", "succeed", task_result={"voices": [{"trial_url": SAMPLE}]}, created_at=SAMPLE
    )
    return envelope([told] if "?" in request.target else told)


def _elsewhere(request: Request) -> bytes:
    return response(b"", 302, {"Location": f"https://evil.example/?{QUERY}"})


ECHOES = (_gateway, _refusal, _broken, _identified, _remembered, _failed, _wrong, _elsewhere)


@pytest.mark.parametrize("credentials", [KEYS, ApiKey(API_KEY)], ids=["access key", "API key"])
@pytest.mark.parametrize("echo", ECHOES, ids=lambda echo: echo.__name__.strip("_"))
async def test_a_server_that_repeats_secrets(
    make_client: MakeClient,
    tmp_path: Path,
    logged: list[str],
    echo: Callable[[Request], bytes],
    credentials: AccessKey | ApiKey,
) -> None:
    """A server that sends the keys and URLs that it was sent back does not make us show them."""
    async with debugging(slow=0.02) as warned, Server(echo) as server:
        client = quick(make_client, server, credentials=credentials, retry=ONCE)
        calls = every_call(client, tmp_path, f"{server.base_url}/t.mp3?{QUERY}")
        del calls["trial"]  # no credentials are sent there to be repeated
        results = await outcomes(calls, seconds=0.4)
        assert only_ours(results)
        await client.close()
    check([*logged, *warned, *(text for result in results for text in shown(result))])


@pytest.mark.parametrize("credentials", [KEYS, ApiKey(API_KEY)], ids=["access key", "API key"])
async def test_an_answer_that_is_not_http(
    make_client: MakeClient,
    tmp_path: Path,
    logged: list[str],
    credentials: AccessKey | ApiKey,
) -> None:
    """The line that makes an answer unreadable is told without the token and the URL in it."""

    def broken(request: Request) -> bytes:
        return f"HTTP/1.1 200 OK\r\nBad Header {_spoken(request)}\r\n\r\n".encode()

    async with Server(broken) as server:
        client = quick(make_client, server, credentials=credentials, retry=ONCE)
        calls = every_call(client, tmp_path, f"{server.base_url}/t.mp3?{QUERY}")
        del calls["trial"]
        results = await outcomes(calls, seconds=0.4)
        assert any("Bad Header" in str(error) for error in only_ours(results))
    check([*logged, *(text for result in results for text in shown(result))])


def _gone(request: Request) -> bytes:
    return response(f"<Code>{SAMPLE}</Code>".encode(), 403)


def _page(request: Request) -> bytes:
    return response(f"<pre>{request.target}</pre>".encode(), 200, {"Content-Type": "text/html"})


def _down(request: Request) -> bytes:
    return response(request.target.encode(), 500)


def _closed(request: Request) -> bytes:
    return b""


def _unsafe(request: Request) -> bytes:
    return response(b"", 302, {"Location": f"http://user:{SIGNED}@bucket.example.com/?{QUERY}"})


@pytest.mark.parametrize(
    "answer", [_gone, _page, _down, _closed, _unsafe], ids=lambda answer: answer.__name__.strip("_")
)
async def test_signed_trials(
    make_client: MakeClient, tmp_path: Path, logged: list[str], answer: Callable[[Request], bytes]
) -> None:
    """A trial's signed URL is used and never seen; no credentials go to its host."""
    async with debugging() as warned, Server(answer) as host, Server([envelope()]) as vendor:
        client = quick(make_client, vendor, credentials=KEYS)
        voice = Voice("v-1", "Ada", f"{host.base_url}/trial.mp3?{QUERY}")
        with pytest.raises(KlingError) as caught:
            await client.download_trial(voice, tmp_path / "t.mp3")
        assert host.requests[0].target.endswith(QUERY)
        assert not vendor.requests
        for request in host.requests:
            assert "authorization" not in request.headers
            check([f"{request.headers}"])
        await client.close()
    check([*logged, *warned, *shown(caught.value), repr(voice)])


async def test_callbacks(logged: list[str]) -> None:
    """A genuine, a forged and a broken callback show neither secret, signature nor signed URL."""
    voice = {"voice_id": "v-1", "trial_url": SAMPLE}
    receiver = CallbackReceiver(WEBHOOK_SECRET, public_url=CALLBACK)
    app = web.Application()
    app.router.add_post("/cb", receiver.aiohttp_handler)
    runner = web.AppRunner(app, access_log=None)  # its access log is the server owner's
    results: list[object] = [receiver]
    async with (
        debugging(slow=0.02) as warned,
        Emulator(
            task_seconds=0.05,
            webhook_secret=WEBHOOK_SECRET,
            fail_when=lambda body: f"cannot fetch {SAMPLE}",
        ) as emulator,
    ):
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/cb?token={SIGNED}"
        async with KlingVoiceClient(
            emulator.credentials, base_url=emulator.base_url, callbacks=receiver
        ) as client:
            results += await outcomes(
                {"clone": lambda: client.clone_voice("Ada", voice_url=SAMPLE, callback_url=url)}
            )
        async with aiohttp.ClientSession() as session:
            for body in (SAMPLE, str(voice), "{}"):
                headers = {"webhook-id": SAMPLE, "webhook-signature": SIGNED}
                async with session.post(url, data=body, headers=headers) as answer:
                    results.append(f"{answer.status} {await answer.text()}")
        await runner.cleanup()
    for raw in (SAMPLE.encode(), repr(voice).encode()):
        with pytest.raises(KlingError) as caught:
            receiver.parse(raw, {"webhook-id": "1", "webhook-timestamp": SAMPLE})
        results.append(caught.value)
    assert any("not authentic" in text for text in logged)
    assert any("Executing" in text for text in logged)
    check([*logged, *warned, f"{receiver!r}", *(t for r in results[1:] for t in shown(r))])


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_credentials_go_to_the_origin_only(
    make_client: MakeClient, tmp_path: Path, status: int
) -> None:
    """Nothing is sent to where a server redirects any call; and that server gets all calls."""
    async with Server([envelope([])]) as other:
        moved = response(b"", status, {"Location": f"{other.base_url}/v1/elsewhere"})
        async with Server([moved]) as server:
            client = quick(make_client, server, credentials=KEYS, retry=ONCE)
            calls = every_call(client, tmp_path, "https://localhost:1/t.mp3")
            only_ours(await outcomes(calls, seconds=0.4))
            assert server.requests
            assert not other.requests


@pytest.mark.parametrize("trust_env", [False, True])
async def test_netrc_is_never_read(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust_env: bool
) -> None:
    """A ~/.netrc that names the host is used by no call and no download, whoever trusts it."""
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login ada password {SIGNED}\ndefault login a password b\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    async with (
        Server([envelope([])]) as server,
        aiohttp.ClientSession(trust_env=trust_env) as session,
    ):
        for borrowed in (None, session):
            client = quick(make_client, server, credentials=KEYS, retry=ONCE, session=borrowed)
            trial = f"{server.base_url}/t.mp3"
            await outcomes(every_call(client, tmp_path, trial), seconds=0.4)
        assert len(server.requests) > 20
        for request in server.requests:
            told = request.headers.get("authorization", "Bearer none")
            assert told.startswith("Bearer ")
            assert (request.target == "/t.mp3") == (told == "Bearer none")


def test_hosts_show_no_signature() -> None:
    """A sample host's repr shows its bucket and not the keys that it was given."""
    host = ObjectStoreHost(
        "s3://voices/kling",
        access_key_id="AKIA5ecret",
        secret_access_key="5ecret",
        region="eu-central-1",
    )
    check([f"{host} {host!r}"])


# --- the masking itself ---


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("GET /ada.mp3?X-Amz-Signature=5ecret&x=1 HTTP", "GET /ada.mp3?*** HTTP"),
        ("is it so? a=5", "is it so? a=5"),
        ("what?", "what?"),
        ("/go?to=https%3A%2F%2Fa.b%2Fc%3Fs%3D5ecret end", "/go?*** end"),
        ("to https%3A%2F%2Fa.b%2Fc%3Fs%3D5ecret&x now", "to https%3A%2F%2Fa.b%2Fc%3F***&x now"),
        ("to http%3a%2f%2fa.b%23s%3d5ecret", "to http%3a%2f%2fa.b%3F***"),
        ("to https%3A%2F%2Fa.b%2Fc now", "to https%3A%2F%2Fa.b%2Fc now"),
        ("5ecretly-eyJhbGc.eyJpc3M.5ecret", "5ecretly-***"),
        ("eyJ.a eyJa. a.eyJb.c.d", "eyJ.a eyJa. a.***"),
        ("http:/a?b http//a ://c?", "http:/a?b http//a ://c?"),
    ],
)
def test_masking(text: str, masked: str) -> None:
    """Queries without a scheme, encoded URLs and tokens inside words are masked, and no more."""
    assert redact(text) == masked


def test_a_secret_is_replaced_by_stars() -> None:
    """Every given secret is starred wherever it stands; an empty one is none."""
    assert redact("a key, a pass, a key", "key", "", "pass") == "a ***, a ***, a ***"


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("https://a.b/c", "'https://a.b/c'"),
        ("https://a.b/c?d?e#f", "'https://a.b/c?***'"),
        ("https://a:b@c/d", "'https://***@c/d'"),
        (None, "None"),
        (b"https://a.b/c?d=e", "b'https://a.b/c?***'"),
    ],
)
def test_masked_urls(url: object, masked: str) -> None:
    """The repr of a URL ends at its query; of anything else it is masked as text."""
    assert mask_url(url) == masked
