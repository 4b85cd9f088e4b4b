"""What refusals say, word for word: people read them, and search for them."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest

from kling_voice import (
    AccessKey,
    ApiKey,
    CallbackError,
    CallbackReceiver,
    ConfigurationError,
    InvalidRequestError,
    ResponseError,
)
from kling_voice.auth import TokenSource, credentials_from_environment
from kling_voice.protocol import (
    VOICES,
    base_url,
    create_call,
    delete_call,
    get_call,
    list_call,
    other_call,
    read_envelope,
    read_item,
    read_task,
    read_tasks,
)
from kling_voice.webhooks import BODY_CAP, Verifier, read_ids
from kling_voice.webhooks import read_task as read_callback

WEBHOOK_SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
NEVER: Any = None


def create(**changed: Any) -> object:
    """Build a create that is sound but for what is changed."""
    return create_call(**{"voice_name": "Ada", "external_task_id": "mine", **changed})


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            create,
            "Give exactly one of voice_url, video_id and voice_file, not none.",
        ),
        (
            lambda: create(voice_url="https://a.b/c.mp3", video_id="v"),
            "Give exactly one of voice_url, video_id and voice_file, not several.",
        ),
        (
            lambda: create(voice_name="x" * 21, video_id="v"),
            f"voice_name must have 1 to 20 characters; {'x' * 21!r} has 21.",
        ),
        (
            lambda: create(voice_name="x" * 300, video_id="v"),
            f"voice_name must have 1 to 20 characters; {'x' * 200!r} has 300.",
        ),
        (
            lambda: create(voice_url="ftp://a.b/c?d"),
            "voice_url must be an http(s) URL with a host, not 'ftp://a.b/c?***'.",
        ),
        (
            lambda: create(voice_url="f" * 500),
            f"voice_url must be an http(s) URL with a host, not '{'f' * 199}.",
        ),
        (lambda: create(video_id=""), "video_id is empty."),
        (lambda: create(voice_name="", video_id="v"), "voice_name is empty."),
        (lambda: create(voice_url=""), "voice_url is empty."),
        (lambda: get_call(""), "task_id is empty."),
        (lambda: delete_call(""), "voice_id is empty."),
        (lambda: create(video_id=5), "video_id must be a non-empty string, not int."),
        (
            lambda: create(video_id="\ud800"),
            "video_id is not valid text: it has half a surrogate pair.",
        ),
        (lambda: get_call(".."), "task_id must not be '..'."),
        (lambda: delete_call(NEVER), "voice_id must be a non-empty string, not NoneType."),
        (
            lambda: list_call(VOICES, 0, 30),
            "page_num must be a whole number from 1 to 1000, not 0.",
        ),
        (
            lambda: list_call(VOICES, 1, 1001),
            "page_size must be a whole number from 1 to 1000, not 1001.",
        ),
        (lambda: other_call("G T", "/x"), "method must be a word such as GET, not 'G T'."),
        (
            lambda: other_call("GET", "/x?sig=5ecret"),
            "path must begin with '/' and have no query (use params), not '/x?***'.",
        ),
        (
            lambda: other_call("GET", "/x", {"a": None}),
            "params must be a mapping of names to strings or numbers.",
        ),
        (
            lambda: other_call("POST", "/x", None, float("nan")),
            "The body is not JSON: Out of range float values are not JSON compliant",
        ),
    ],
)
def test_refused_arguments(build: Callable[[], object], text: str) -> None:
    """An argument that cannot be sent is refused in a sentence that says what would do."""
    with pytest.raises(InvalidRequestError) as caught:
        build()
    assert str(caught.value).startswith(text)
    assert str(caught.value).endswith(".")


BASE_URL = "base_url (or KLING_BASE_URL)"
LOOPBACK = "is neither that nor this machine (127.0.0.1, localhost)."


@pytest.mark.parametrize(
    ("set_up", "text"),
    [
        (
            lambda: base_url("kling"),
            f"{BASE_URL} must be a URL such as https://api-singapore.klingai.com, not 'kling'.",
        ),
        (
            lambda: base_url(NEVER),
            f"{BASE_URL} must be a URL such as https://api-singapore.klingai.com, not None.",
        ),
        (
            lambda: base_url("htps://me:5ecret@a.b/c?sig=5ecret"),
            f"{BASE_URL} must be a URL such as https://api-singapore.klingai.com, not"
            " 'htps://***@a.b/c?***'.",
        ),
        (
            lambda: base_url("me:5ecret\n@a.b"),
            f"{BASE_URL} must be a URL such as https://api-singapore.klingai.com, not '***@a.b'.",
        ),
        (
            lambda: base_url("https://me:5ecret@a.b"),
            f"{BASE_URL} must have no user, no query and no fragment, as 'https://***@a.b' has.",
        ),
        (
            lambda: base_url("https://a.b?c"),
            f"{BASE_URL} must have no user, no query and no fragment, as 'https://a.b?***' has.",
        ),
        (
            lambda: base_url("http://a.b"),
            f"{BASE_URL} must be https, since keys travel to it; http://a.b {LOOPBACK}",
        ),
        (lambda: ApiKey(""), "ApiKey: key must be a non-empty string."),
        (
            lambda: AccessKey("a", "b\n"),
            "AccessKey: secret_key has a character that no key has; was it pasted with a line"
            " break or a space?",
        ),
        (
            lambda: credentials_from_environment({}),
            "No credentials: set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY, or pass"
            " credentials=ApiKey(...) or AccessKey(..., ...).",
        ),
        (
            lambda: credentials_from_environment({"KLING_ACCESS_KEY": "a"}),
            "Half of the credentials is missing: set KLING_SECRET_KEY too, or KLING_API_KEY alone.",
        ),
        (
            lambda: Verifier("whsec_"),
            "The webhook secret is empty: copy it from the vendor's console, or unset"
            " KLING_WEBHOOK_SECRET.",
        ),
        (
            lambda: Verifier("whsec_ä"),
            "The webhook secret is not base64 after its 'whsec_': copy all of it from the vendor's"
            " console, without quotes, spaces or a line break.",
        ),
        (
            lambda: CallbackReceiver().parse(b"{}", {}),
            "A callback can only be parsed with the account's webhook secret: set"
            " KLING_WEBHOOK_SECRET, or pass CallbackReceiver(secret).",
        ),
        (
            lambda: CallbackReceiver(public_url="me"),
            "public_url must be an http(s) URL with a host, not 'me'.",
        ),
    ],
)
def test_refused_settings(set_up: Callable[[], object], text: str) -> None:
    """A setting that cannot work is refused in a sentence that names what to set."""
    with pytest.raises(ConfigurationError) as caught:
        set_up()
    assert str(caught.value) == text


@pytest.mark.parametrize(("offset", "side"), [(240, "behind"), (-240, "ahead of")])
def test_a_clock_that_is_days_off(offset: int, side: str) -> None:
    """A clock too wrong to be healed is told with its offset."""
    source = TokenSource(AccessKey("a", "b"), clock=lambda: 1e9)
    assert source.heal(source.token(), 1e9 + offset * 3600) == (
        f"This machine's clock is 240.0 hours {side} the server's: set it, then call again."
    )


def envelope(data: str) -> bytes:
    """Write the vendor's envelope around some JSON."""
    return f'{{"code":0,"message":"","data":{data}}}'.encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "why"),
    [
        (300, {}, b"", "it redirects, which is never followed, since the token would go along"),
        (302, {}, b"", "it redirects, which is never followed, since the token would go along"),
        (399, {}, b"", "it redirects, which is never followed, since the token would go along"),
        (400, {"Content-Type": "text/HTML"}, b"", "it is an HTML page, as gateways send"),
        (200, {}, b"[" * 100_000, "it is nested too deeply"),
        (200, {}, b"", "it is not JSON"),
        (299, {}, b"{}", "it has no envelope with a code"),
        (300, {}, b'{"code":0}', "it reports success with an HTTP error"),
        (199, {}, b'{"code":0}', "it reports success with an HTTP error"),
        (200, {}, envelope("5"), "data: expected an object"),
        (200, {}, envelope("{}"), "data.task_id: missing; data.task_status: missing"),
        (
            200,
            {},
            envelope('{"task_id":1,"task_status":2,"created_at":"3","updated_at":"4"}'),
            "data.task_id: expected a string, got a number; data.task_status: expected a string,"
            " got a number; data.created_at: expected Unix milliseconds, got a string",
        ),
        (
            200,
            {},
            envelope('{"task_id":"1","task_status":"x","created_at":' + "9" * 30 + "}"),
            "data.created_at: a number out of range",
        ),
    ],
)
def test_unreadable_answers(status: int, headers: dict[str, str], body: bytes, why: str) -> None:
    """An answer that cannot be read says why, and where in it."""
    with pytest.raises(ResponseError) as caught:
        read_task(read_envelope(status, headers, body))
    assert caught.value.args == (why,)
    assert caught.value.http_status == status


def test_unreadable_lists() -> None:
    """A list that cannot be read says which of its items is at fault."""
    for data, why in (
        ("5", "data: expected an array"),
        ('[{"task_id":"1","task_status":"x"},5]', "data[1]: expected an object"),
        ('[{"task_id":"1"}]', "data[0].task_status: missing"),
    ):
        with pytest.raises(ResponseError) as caught:
            read_tasks(read_envelope(200, {}, envelope(data)))
        assert caught.value.args == (why,)
        assert caught.value.http_status == 200


def test_unreadable_items() -> None:
    """An item that is read alone names the request that it came with, or its own fault."""
    assert read_item({"task_id": "1", "task_status": "x"}, "req-1").request_id == "req-1"
    with pytest.raises(ResponseError) as caught:
        read_item({"task_id": "1"}, None)
    assert caught.value.args == ("data[].task_status: missing",)


def test_a_fault_behind_a_hundred_voices() -> None:
    """Of a task with very many voices only the first hundred are looked into for the fault."""
    good = '{"voice_id":"v"},'
    for count, why in ((99, "data.task_result.voices[99]: expected an object, got a number"),
                       (100, "data: not readable")):  # fmt: skip
        voices = f'{{"voices":[{good * count}5]}}'
        data = f'{{"task_id":"1","task_status":"x","task_result":{voices}}}'
        with pytest.raises(ResponseError) as caught:
            read_task(read_envelope(200, {}, envelope(data)))
        assert caught.value.args == (why,)


NOW = datetime.datetime.now(datetime.UTC).timestamp()
GOOD = {
    "webhook-id": "1",
    "webhook-timestamp": f"{NOW:.0f}",
    "webhook-signature": f"v1,{'A' * 43}=",
}
ADVICE = (
    "If it is the vendor's, check that the secret is the account's webhook secret, that the body"
    " is passed on byte for byte, and that this machine's clock is right."
)


@pytest.mark.parametrize(
    ("body", "changed", "reason", "text"),
    [
        (
            b"{}",
            {"webhook-id": 5, "webhook-signature": ""},
            "not_authentic",
            "The callback is not authentic: it has no webhook-id and no webhook-signature. If it is"
            " the vendor's, check that the account has a webhook secret, and that no proxy on the"
            " way drops headers.",
        ),
        (
            b"{}",
            {"webhook-timestamp": "soon"},
            "not_authentic",
            "The callback is not authentic: its webhook-timestamp is not what the Standard Webhooks"
            " scheme (v1) asks for.",
        ),
        (
            b"{}",
            {"webhook-id": "ä"},
            "not_authentic",
            "The callback is not authentic: its webhook-id is not what the Standard Webhooks scheme"
            " (v1) asks for.",
        ),
        (
            b"{}",
            {"webhook-signature": "v2,AAAA"},
            "not_authentic",
            "The callback is not authentic: its webhook-signature is not what the Standard Webhooks"
            " scheme (v1) asks for.",
        ),
        (
            b"{}",
            {},
            "not_authentic",
            "The callback is not authentic: the signature does not hold (No matching signature"
            f" found). {ADVICE}",
        ),
        (b"\xff", {}, "unreadable", "The callback is not readable: it is not UTF-8."),
        (
            "{}",
            {},
            "unreadable",
            "The callback is not readable: its body must be handed over as the raw bytes that"
            " arrived, since those are signed, not as str.",
        ),
        (
            b" " * (BODY_CAP + 1),
            {},
            "too_large",
            "The callback is longer than 262144 bytes.",
        ),
    ],
)
def test_refused_callbacks(body: Any, changed: dict[str, Any], reason: str, text: str) -> None:
    """A callback that is not the vendor's says why, and what to check if it is."""
    with pytest.raises(CallbackError) as caught:
        CallbackReceiver(WEBHOOK_SECRET).parse(body, {**GOOD, **changed})
    assert (caught.value.reason, str(caught.value)) == (reason, text)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("5", "it is not a JSON object"),
        ("x", "it is not JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ("{}", "it has neither a task_id nor an id"),
        ('{"task_id":"","task_status":"x"}', "its id is empty"),
        ('{"task_id":"1"}', "read as a task, data.task_status: missing"),
        ('{"id":"1"}', "read as a task, data.task_status: expected a string, got null"),
    ],
)
def test_unreadable_callbacks(document: str, why: str) -> None:
    """A callback that tells no task says where it went wrong."""
    with pytest.raises(CallbackError) as caught:
        read_callback(document)
    assert str(caught.value) == f"The callback is not readable: {why}."
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{}", "it names no task"),
        (b'{"task_id":5}', "an id in it is not a string of at most 512 characters"),
        (b'{"id":"' + b"x" * 513 + b'"}', "an id in it is not a string of at most 512 characters"),
    ],
)
def test_callbacks_that_name_nothing(body: bytes, why: str) -> None:
    """A callback without a usable id says so."""
    with pytest.raises(CallbackError) as caught:
        read_ids(body)
    assert str(caught.value) == f"The callback is not readable: {why}."
