"""Who may call: both kinds of tokens, and the codes 1000 to 1004."""

import hmac
import time
from base64 import urlsafe_b64encode

import pytest

from kling_voice.auth import AccessKey

from .support import VOICES, serving, token


async def test_the_api_key_is_accepted() -> None:
    """The static API key opens the API."""
    async with serving() as api:
        assert (await api.call("GET", VOICES)).verdict == (200, 0)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Bearer  "])
async def test_a_signed_token_is_accepted(scheme: str) -> None:
    """A JWT of the access key opens the API, whatever the case of the scheme."""
    async with serving() as api:
        authorization = token(api.emu).replace("Bearer", scheme)
        reply = await api.call("GET", VOICES, authorization=authorization)
        assert reply.verdict == (200, 0)


@pytest.mark.parametrize("authorization", [None, " "])
async def test_no_authorization_is_1001(authorization: str | None) -> None:
    """A missing or blank header is told apart from a wrong one."""
    async with serving() as api:
        reply = await api.call("GET", VOICES, authorization=authorization)
        assert reply.verdict == (401, 1001)
        assert "data" not in reply.envelope


async def test_an_unknown_api_key_is_1000() -> None:
    """What does not look like a JWT can only be an API key, and is unknown."""
    async with serving() as api:
        reply = await api.call("GET", VOICES, authorization="Bearer someone-else")
        assert reply.verdict == (401, 1000)


@pytest.mark.parametrize(
    "authorization", ["Basic eDp5", "Bearer", "Bearer a.b.c", "Bearer a.b.!", "Bearer \xfc"]
)
async def test_a_malformed_authorization_is_1002(authorization: str) -> None:
    """Another scheme, no token, and a token that is no JWT are invalid."""
    async with serving() as api:
        reply = await api.call("GET", VOICES, authorization=authorization)
        assert reply.verdict == (401, 1002)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "another secret key, as long as it takes"},
        {"alg": "HS512", "key": "another secret key, as long as it takes" * 2},
        {"iss": "someone else"},
        {"iss": None},
        {"exp": None},
        {"nbf": None},
        {"exp": "tomorrow"},
        {"nbf": True},
        {"iss": 7},
        {"iss": "\ud800"},
    ],
)
async def test_a_token_we_did_not_agree_on_is_1002(wrong: dict[str, object]) -> None:
    """A wrong signature, algorithm or issuer, and missing or odd claims are invalid."""
    async with serving() as api:
        key, alg = str(wrong.pop("key", "")), str(wrong.pop("alg", "HS256"))
        authorization = token(api.emu, key=key, alg=alg, **wrong)
        reply = await api.call("GET", VOICES, authorization=authorization)
        assert reply.verdict == (401, 1002)


async def test_the_right_key_with_another_algorithm_is_1002() -> None:
    """Only HS256 is accepted, even when the key is right."""
    async with serving(credentials=AccessKey("me", "k" * 64)) as api:
        reply = await api.call("GET", VOICES, authorization=token(api.emu, alg="HS512"))
        assert reply.verdict == (401, 1002)


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        ("{}", "{}"),
        ('{"alg": "none"}', "{}"),
        ("[]", "{}"),
        ("{", "{}"),
        ('{"alg": "HS256"}', "[]"),
        ('{"alg": "HS256"}', "7" * 5000),
        ('{"alg": "HS256"}', "[" * 3000),
        ('{"alg": "HS256"}', "\xff"),
    ],
)
async def test_a_well_signed_oddity_is_1002(header: str, claims: str) -> None:
    """Even under a good signature, what is no token of ours is invalid."""
    async with serving() as api:
        parts = [urlsafe_b64encode(part.encode("latin-1")) for part in (header, claims)]
        signed = b".".join(part.rstrip(b"=") for part in parts)
        digest = hmac.digest(api.emu.credentials.secret_key.encode(), signed, "sha256")
        sent = b".".join([signed, urlsafe_b64encode(digest).rstrip(b"=")]).decode()
        reply = await api.call("GET", VOICES, authorization=f"Bearer {sent}")
        assert reply.verdict == (401, 1002)


async def test_an_odd_time_is_no_free_pass() -> None:
    """A time that is no number at all never holds."""
    async with serving() as api:
        reply = await api.call("GET", VOICES, authorization=token(api.emu, exp=float("nan")))
        assert reply.verdict == (401, 1004)
        reply = await api.call("GET", VOICES, authorization=token(api.emu, nbf=float("nan")))
        assert reply.verdict == (401, 1003)


async def test_a_short_secret_is_no_obstacle() -> None:
    """Keys that a test makes up may be short."""
    async with serving(credentials=AccessKey("ak", "sk")) as api:
        signed = b"eyJhbGciOiJIUzI1NiJ9." + urlsafe_b64encode(
            b'{"iss": "ak", "nbf": 0, "exp": 99999999999}'
        ).rstrip(b"=")
        digest = urlsafe_b64encode(hmac.digest(b"sk", signed, "sha256")).rstrip(b"=")
        authorization = f"Bearer {(signed + b'.' + digest).decode()}"
        assert (await api.call("GET", VOICES, authorization=authorization)).verdict == (200, 0)


async def test_a_token_of_the_future_is_1003() -> None:
    """A client whose clock is ahead is told so."""
    async with serving() as api:
        authorization = token(api.emu, nbf=time.time() + 60)
        reply = await api.call("GET", VOICES, authorization=authorization)
        assert reply.verdict == (401, 1003)


async def test_an_old_token_is_1004() -> None:
    """A token is good until it expires, and not after."""
    async with serving() as api:
        authorization = token(api.emu)
        api.emu.advance(1790)
        assert (await api.call("GET", VOICES, authorization=authorization)).verdict == (200, 0)
        api.emu.advance(20)
        assert (await api.call("GET", VOICES, authorization=authorization)).verdict == (401, 1004)


@pytest.mark.parametrize(("skew", "code"), [(-3600, 1003), (7200, 1004)])
async def test_the_servers_own_clock_judges(skew: float, code: int) -> None:
    """A skewed server refuses a right client, and its Date header tells why."""
    async with serving(clock_skew=skew) as api:
        reply = await api.call("GET", VOICES, authorization=token(api.emu))
        assert reply.verdict == (401, code)
        assert reply.date == pytest.approx(time.time() + skew, abs=3)
        healed = token(api.emu, exp=reply.date + 1800, nbf=reply.date - 5)
        assert (await api.call("GET", VOICES, authorization=healed)).verdict == (200, 0)
        api.emu.clock_skew = 0
        assert (await api.call("GET", VOICES, authorization=token(api.emu))).verdict == (200, 0)
        assert api.emu.clock_skew == 0


async def test_two_authorizations_are_1002() -> None:
    """A doubled header is no authorization at all."""
    async with serving() as api:
        key = f"Bearer {api.emu.api_key}"
        headers = [("Authorization", key), ("Authorization", key)]
        async with api.session.get(api.emu.base_url + VOICES, headers=headers) as response:
            assert (response.status, (await response.json())["code"]) == (401, 1002)


async def test_authorization_comes_before_everything_else() -> None:
    """Whoever is not known learns nothing about bodies, ids or methods."""
    async with serving() as api:
        for method, path in [("POST", VOICES), ("GET", f"{VOICES}/1"), ("PUT", "/nowhere")]:
            reply = await api.call(method, path, body=b"{", authorization=None)
            assert reply.verdict == (401, 1001)
        assert api.emu.refused == {1001: 3}


async def test_keys_may_be_chosen() -> None:
    """The keys that an emulator accepts can be given to it."""
    async with serving(api_key="mine") as api:
        reply = await api.call("GET", VOICES, authorization="Bearer mine")
        assert reply.verdict == (200, 0)
