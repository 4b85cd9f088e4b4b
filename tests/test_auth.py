"""Credentials and tokens: what is signed, for how long it is used, and how a wrong clock heals."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
import warnings
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire import BRISK, MakeClient, Server, envelope, task

from kling_voice import AccessKey, ApiKey, AuthenticationError, ConfigurationError, KlingVoiceClient
from kling_voice.auth import MAX_SKEW, TokenSource, credentials_from_environment, sign
from kling_voice.emulator import Emulator, Fault, Faults

KEYS = AccessKey("the-access-key-id", "the-secret-key-of-at-least-32-bytes")
HOUR = 3600.0


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, now: float = 1_790_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def read_token(token: str, secret: str = KEYS.secret_key) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify and decode a JWT by hand: its header and its claims."""
    signed, _, signature = token.rpartition(".")
    digest = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()
    assert _unpack(signature) == digest
    header, claims = (json.loads(_unpack(part)) for part in signed.split("."))
    return header, claims


def _unpack(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


# --- what is signed ---


def test_token_as_documented() -> None:
    """A token is an HS256 JWT of iss, exp = now + 1800 and nbf = now - 5, and nothing else."""
    header, claims = read_token(sign(KEYS, 1_790_000_000.7))
    assert header == {"alg": "HS256", "typ": "JWT"}
    assert claims == {"iss": KEYS.access_key, "exp": 1_790_001_800, "nbf": 1_789_999_995}
    assert all(type(claims[name]) is int for name in ("exp", "nbf"))


def test_short_secret_signs_without_a_warning() -> None:
    """The vendor chooses the keys' length: a short one signs, and warns nobody."""
    read_token(sign(AccessKey("id", "short"), 1_790_000_000.0), "short")


def test_token_is_kept() -> None:
    """A token is made once and kept for as long as it lives, less a margin."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    first = tokens.token()
    clock.now += 1000
    assert tokens.token() is first


def test_token_is_renewed_with_a_margin() -> None:
    """Minutes before it expires a token is replaced, so that no request arrives with a dead one."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    first = tokens.token()
    clock.now += 1800 - 60
    second = tokens.token()
    assert second != first
    assert read_token(second)[1]["exp"] == int(clock.now) + 1800


@given(st.lists(st.floats(-1e6, 1e6), max_size=20))
def test_token_is_always_valid_now(steps: list[float]) -> None:
    """However the clock jumps, the token given is valid now and for a minute to come."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    for step in [0.0, *steps]:
        clock.now = max(0.0, clock.now + step)
        claims = read_token(tokens.token())[1]
        assert claims["nbf"] <= clock.now
        assert claims["exp"] >= clock.now + 60


def test_api_key_is_sent_as_it_is() -> None:
    """An API key is its own token, at any time."""
    clock = Clock()
    tokens = TokenSource(ApiKey("a-static-key"), clock=clock)
    assert tokens.token() == "a-static-key"
    clock.now += 10 * HOUR
    assert tokens.token() == "a-static-key"


# --- a wrong clock ---


@pytest.mark.parametrize("offset", [-23.9, -1, 0.01, 23.9])
def test_heal_takes_the_servers_clock(offset: float) -> None:
    """After a refusal, tokens are signed by the server's clock, and go on being kept."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    refused = tokens.token()
    assert tokens.heal(refused, clock.now + offset * HOUR) is None
    healed = tokens.token()
    assert read_token(healed)[1]["nbf"] == int(clock.now + offset * HOUR - 5)
    clock.now += 60
    assert tokens.token() is healed


def test_heal_without_a_date_signs_anew() -> None:
    """A refusal without a Date still gets a fresh token: the old one may just have been old."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    refused = tokens.token()
    clock.now += 1
    assert tokens.heal(refused, None) is None
    assert tokens.token() != refused


def test_heal_is_not_repeated_for_a_token_of_before() -> None:
    """A second call that was refused with the same old token does not shift the clock again."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    refused = tokens.token()
    assert tokens.heal(refused, clock.now + HOUR) is None
    healed = tokens.token()
    assert tokens.heal(refused, clock.now + 9 * HOUR) is None
    assert tokens.token() is healed


@pytest.mark.parametrize(("offset", "side"), [(25, "behind"), (-25, "ahead of")])
def test_too_wrong_a_clock_is_told(offset: float, side: str) -> None:
    """Beyond 24 hours nothing is healed, and the answer names the offset and its direction."""
    clock = Clock()
    tokens = TokenSource(KEYS, clock=clock)
    refused = tokens.token()
    told = tokens.heal(refused, clock.now + offset * HOUR)
    assert told is not None
    assert "25.0 hours" in told
    assert side in told
    assert tokens.token() is refused


def test_api_key_does_not_heal() -> None:
    """There is nothing to sign anew for an API key."""
    assert TokenSource(ApiKey("a-static-key")).heal("a-static-key", time.time() + 60) == ""


@pytest.mark.parametrize("offset", [-23 * HOUR, -HOUR, -60, HOUR, 23 * HOUR])
async def test_skew_heals_on_every_call(make_client: MakeClient, offset: float) -> None:
    """With the server's clock hours away the first call heals, and no later one is refused."""
    async with Emulator(task_seconds=0.0, clock_skew=offset) as emulator:
        client = make_client(emulator)
        made = await client.create_voice("Ada", voice_url="https://example.com/a.mp3")
        assert (await client.get_task(made.task_id)).succeeded
        await client.list_tasks()
        assert emulator.created == 1
        assert emulator.refused.total() == 1
        assert set(emulator.refused) <= {1003, 1004}


@pytest.mark.parametrize("code", [1003, 1004])
async def test_skew_heals_once_a_call(make_client: MakeClient, code: int) -> None:
    """A server that keeps refusing the times is asked twice, not for ever and not by the policy."""
    async with Server([envelope(code=code, message="time", status=401)]) as server:
        with pytest.raises(AuthenticationError) as caught:
            await make_client(server).get_task("t-1")
        assert caught.value.code == code
        assert len(server.requests) == 2
        tokens = {request.headers["authorization"] for request in server.requests}
        assert all(token.startswith("Bearer eyJ") for token in tokens)


@pytest.mark.parametrize("offset", [25 * HOUR, -25 * HOUR])
async def test_skew_beyond_a_day_is_an_error(make_client: MakeClient, offset: float) -> None:
    """A clock that is a day off is told with its offset, after one request."""
    async with Emulator(clock_skew=offset) as emulator:
        with pytest.raises(AuthenticationError, match=r"clock is 25\.0 hours (behind|ahead of)"):
            await make_client(emulator).list_tasks()
        assert emulator.requests.total() == 1


async def test_skew_heals_for_many_calls_at_once(make_client: MakeClient) -> None:
    """Fifty calls that start with a refused token all succeed, with two requests each at most."""
    async with Emulator(clock_skew=HOUR) as emulator:
        client = make_client(emulator)
        await asyncio.gather(*(client.list_tasks() for _ in range(50)))
        assert emulator.requests.total() <= 100
        before = emulator.requests.total()
        await asyncio.gather(*(client.list_tasks() for _ in range(50)))
        assert emulator.requests.total() == before + 50


async def test_skew_follows_a_clock_that_is_set_again(make_client: MakeClient) -> None:
    """A clock that changes once more, in either direction, heals once more."""
    async with Emulator(clock_skew=HOUR) as emulator:
        client = make_client(emulator)
        for skew in (HOUR, -HOUR, 0.0, 5 * HOUR):
            emulator.clock_skew = skew
            await client.list_tasks()


async def test_heal_sends_the_create_whole(make_client: MakeClient) -> None:
    """A create that was refused for its token is sent again with all of its body, and made once."""
    async with Emulator(faults=Faults(script={"create": [Fault.TOKEN_REFUSED]})) as emulator:
        await make_client(emulator).create_voice(
            "Ada", voice_url="https://example.com/a.mp3", external_task_id="mine"
        )
        (made,) = emulator.tasks
        assert (made.voice_name, made.external_task_id) == ("Ada", "mine")


@pytest.mark.parametrize("code", [1003, 1004])
async def test_api_key_is_never_sent_again(make_client: MakeClient, code: int) -> None:
    """With an API key a refusal for the times is final, after one request."""
    async with Server([envelope(code=code, message="time", status=401)]) as server:
        with pytest.raises(AuthenticationError):
            await make_client(server, credentials=ApiKey("a-static-key")).get_task("t-1")
        (request,) = server.requests
        assert request.headers["authorization"] == "Bearer a-static-key"


@pytest.mark.parametrize("code", [1000, 1001, 1002])
async def test_other_refusals_are_final(make_client: MakeClient, code: int) -> None:
    """A key that the vendor does not accept is told after one request."""
    async with Server([envelope(code=code, message="no", status=401)]) as server:
        with pytest.raises(AuthenticationError):
            await make_client(server).create_voice("Ada", video_id="v-1")
        assert len(server.requests) == 1


async def test_both_kinds_of_credentials_work(make_client: MakeClient, emulator: Emulator) -> None:
    """The vendor's side accepts an access key's tokens and an API key, and no other."""
    await make_client(emulator).list_tasks()
    await make_client(emulator, credentials=ApiKey(emulator.api_key)).list_tasks()
    for wrong in (ApiKey("wrong"), AccessKey(emulator.credentials.access_key, "x" * 32)):
        with pytest.raises(AuthenticationError):
            await make_client(emulator, credentials=wrong).list_tasks()


# --- where credentials come from ---


def test_environment_prefers_the_api_key() -> None:
    """``KLING_API_KEY`` goes before the pair, and the pair works without it."""
    pair = {"KLING_ACCESS_KEY": "id", "KLING_SECRET_KEY": "secret"}
    assert credentials_from_environment({**pair, "KLING_API_KEY": "key"}) == ApiKey("key")
    assert credentials_from_environment(pair) == AccessKey("id", "secret")
    assert credentials_from_environment({**pair, "KLING_API_KEY": ""}) == AccessKey("id", "secret")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"KLING_ACCESS_KEY": "id"}, "KLING_SECRET_KEY"),
        ({"KLING_SECRET_KEY": "secret"}, "KLING_ACCESS_KEY"),
        ({"KLING_ACCESS_KEY": "id", "KLING_SECRET_KEY": ""}, "KLING_SECRET_KEY"),
        ({}, "KLING_API_KEY"),
    ],
)
def test_missing_credentials_are_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: str
) -> None:
    """Missing or half-given credentials are an error that names the variable to set."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=rf"set {missing}"):
        KlingVoiceClient()


async def test_environment_configures_a_client(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator
) -> None:
    """Keys and host come from the environment when nothing is given."""
    monkeypatch.setenv("KLING_ACCESS_KEY", emulator.credentials.access_key)
    monkeypatch.setenv("KLING_SECRET_KEY", emulator.credentials.secret_key)
    monkeypatch.setenv("KLING_BASE_URL", emulator.base_url)
    async with KlingVoiceClient(retry=BRISK) as client:
        assert await client.list_tasks() == []


async def test_arguments_win_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, make_client: MakeClient, emulator: Emulator
) -> None:
    """An explicit argument always wins over the environment."""
    monkeypatch.setenv("KLING_API_KEY", "wrong")
    monkeypatch.setenv("KLING_BASE_URL", "https://elsewhere.invalid")
    assert await make_client(emulator).list_tasks() == []


@pytest.mark.parametrize("wrong", ["", None, 5, b"key", "a key", "key\n", "clé", "\x00"])
def test_unusable_keys_are_refused(wrong: Any) -> None:
    """A key that no header can carry is refused at once, and is not repeated in the error."""
    for make in (ApiKey, lambda key: AccessKey("id", key), lambda key: AccessKey(key, "secret")):
        with pytest.raises(ConfigurationError) as caught:
            make(wrong)
        assert not wrong or str(wrong) not in str(caught.value)


def test_credentials_show_no_secret() -> None:
    """No repr or text of credentials, or of what holds them, has a key in it."""
    key, pair = ApiKey("shown-api-key"), AccessKey("shown-access", "shown-secret")
    client = KlingVoiceClient(pair)
    texts = [f"{thing!r} {thing}" for thing in (key, pair, client, TokenSource(pair), [key, pair])]
    assert not any("shown" in text for text in texts)
    assert "ApiKey" in texts[0]


def test_credentials_are_values() -> None:
    """Equal credentials are equal, hashable, and cannot be changed."""
    assert AccessKey("a", "b") == AccessKey("a", "b") != AccessKey("a", "c")
    assert len({ApiKey("a"), ApiKey("a"), ApiKey("b")}) == 2
    for name in ("key", "other"):
        with pytest.raises(AttributeError):
            setattr(ApiKey("a"), name, "b")


def test_a_day_is_the_limit() -> None:
    """The limit of healing is the contract's: 24 hours."""
    assert MAX_SKEW == 24 * HOUR


def test_edges_of_the_times() -> None:
    """A token is renewed when it has 300 s left; a clock exactly a day off is healed."""
    clock = Clock(0.0)
    source = TokenSource(KEYS, clock=clock)
    first = source.token()
    assert read_token(first)[1] == {"iss": KEYS.access_key, "exp": 1800, "nbf": -5}
    clock.now = 1499.0
    assert source.token() == first
    clock.now = 1500.0
    assert source.token() != first
    assert source.heal(source.token(), clock.now - MAX_SKEW) is None
    assert source.heal(source.token(), clock.now + MAX_SKEW) is None


def test_only_the_keys_length_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else the JWT library has to warn of is not silenced."""

    def encode(*_: Any, **__: Any) -> str:
        warnings.warn("HS256 is going away", DeprecationWarning, stacklevel=1)
        return ""

    monkeypatch.setattr(jwt, "encode", encode)
    with pytest.warns(DeprecationWarning, match="going away"):
        sign(KEYS, 0.0)


def test_reprs_of_credentials() -> None:
    """A repr shows which kind of credentials it is, and stars."""
    assert repr(ApiKey("k")) == "ApiKey(key='***')"
    assert repr(AccessKey("a", "b")) == "AccessKey(access_key='***', secret_key='***')"


async def test_every_request_is_signed(make_client: MakeClient) -> None:
    """Each request carries the bearer token and the JSON content type, reads included."""
    async with Server([envelope([]), envelope(task())]) as server:
        client = make_client(server)
        await client.list_tasks()
        await client.create_voice("Ada", video_id="v-1")
        for request in server.requests:
            scheme, _, token = request.headers["authorization"].partition(" ")
            assert scheme == "Bearer"
            assert read_token(token)[1]["iss"] == KEYS.access_key
            assert request.headers["content-type"] == "application/json"
