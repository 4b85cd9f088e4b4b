"""Callbacks: verified, read, and delivered to those who wait."""

import asyncio
import base64
import gzip
import inspect
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import time_machine
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook

from kling_voice import (
    CallbackError,
    CallbackReceiver,
    ClientClosedError,
    ConfigurationError,
    KlingVoiceClient,
    PollingPolicy,
    TaskStatus,
    VoiceRequest,
    VoiceTask,
    WaitTimeoutError,
)
from kling_voice import callbacks as callbacks_module
from kling_voice.callbacks import KEPT, REMEMBERED
from kling_voice.emulator import Emulator
from kling_voice.webhooks import BODY_CAP

SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
OTHER_SECRET = "whsec_" + base64.b64encode(b"another secret of 32 bytes, okay").decode()

# The vendor's published vector, on its page "callbacks".
VECTOR_TIME = 1781080794
VECTOR_BODY = (
    b'{"id":"1234567890","status":"succeeded","message":"",'
    b'"create_time":1781080778802,"update_time":1781080794151}'
)
VECTOR_SIGNATURE = "v1,UsKlJP00XoQyOn410NM9xv34sP+Gl0jnOO9Lcpr7NJ4="
VECTOR = {
    "webhook-id": "9876543210",
    "webhook-timestamp": str(VECTOR_TIME),
    "webhook-signature": VECTOR_SIGNATURE,
}

LEGACY = {
    "task_id": "task-1",
    "task_status": "succeed",
    "task_status_msg": "",
    "task_info": {"external_task_id": "mine-1"},
    "task_result": {
        "voices": [
            {
                "voice_id": "v1",
                "voice_name": "Ada",
                "trial_url": "https://cdn.example.com/v1.mp3?sign=secret",
                "owned_by": "me",
            }
        ]
    },
    "final_unit_deduction": "0.05",
    "final_balance_deduction": {"quota": "0.05", "list_price": "0.07"},
    "created_at": 1781080778802,
    "updated_at": 1781080794151,
    "added_later": [1],
}
NEW = {
    "id": "task-1",
    "status": "succeeded",
    "message": "",
    "create_time": 1781080778802,
    "update_time": 1781080794151,
    "external_id": "mine-1",
    "outputs": [
        {
            "type": "voice",
            "id": "v1",
            "name": "Ada",
            "url": "https://cdn.example.com/v1.mp3?sign=secret",
            "owned_by": "me",
            "status": "succeeded",
        },
        {"type": "video", "id": 5},
    ],
    "billing": [{"form": "unknown"}],
}

Parse = Callable[[object], VoiceTask]


def signed(
    body: bytes,
    *,
    webhook_id: str = "msg_1",
    at: float | None = None,
    secret: str = SECRET,
) -> dict[str, str]:
    """Give the headers that the vendor would send with a body."""
    moment = datetime.fromtimestamp(int(time.time() if at is None else at), tz=UTC)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Webhook(secret).sign(webhook_id, moment, body.decode()),
    }


def encode(document: object) -> bytes:
    return json.dumps(document).encode()


def state(
    status: str, task_id: str = "task-1", *, updated_at: int | None = None, **fields: object
) -> bytes:
    """Give the body of a callback that tells a task's state in the older shape."""
    return encode({"task_id": task_id, "task_status": status, "updated_at": updated_at, **fields})


class Listener:
    """A watcher that notes what it is told, and on which thread."""

    def __init__(self) -> None:
        self.delivered: list[VoiceTask] = []
        self.prompted: list[tuple[str | None, str | None]] = []
        self.threads: set[int] = set()

    def deliver(self, task: VoiceTask) -> bool:
        self.threads.add(threading.get_ident())
        self.delivered.append(task)
        return False

    def prompt(self, task_id: str | None, external_task_id: str | None) -> None:
        self.threads.add(threading.get_ident())
        self.prompted.append((task_id, external_task_id))

    @property
    def statuses(self) -> list[str]:
        return [str(task.task_status) for task in self.delivered]


@pytest.fixture(autouse=True)
def no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KLING_WEBHOOK_SECRET", raising=False)


@pytest.fixture
def receiver() -> CallbackReceiver:
    return CallbackReceiver(SECRET)


@pytest.fixture
async def listener(receiver: CallbackReceiver) -> Listener:
    listener = Listener()
    receiver.attach(listener)
    return listener


async def receive(
    receiver: CallbackReceiver, body: bytes, *, webhook_id: str | None = None
) -> None:
    """Send a callback that bears an id of its own unless one is given."""
    if webhook_id is None:
        webhook_id = f"msg_{time.perf_counter_ns()}"
    await receiver.receive(body, signed(body, webhook_id=webhook_id))


def refusal(
    receiver: CallbackReceiver, body: bytes, headers: Mapping[str, str] | None = None
) -> CallbackError:
    """Give the error that a callback brings about; signed unless headers are given."""
    with pytest.raises(CallbackError) as caught:
        receiver.parse(body, signed(body) if headers is None else headers)
    error = caught.value
    assert error.__context__ is None
    assert SECRET.removeprefix("whsec_") not in str(error)
    assert str(error).endswith(".")
    return error


class TestSettings:
    def test_secret_comes_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without an argument, KLING_WEBHOOK_SECRET is the secret."""
        monkeypatch.setenv("KLING_WEBHOOK_SECRET", SECRET)
        body = encode(LEGACY)
        assert CallbackReceiver().parse(body, signed(body)).task_id == "task-1"

    def test_explicit_secret_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An argument wins over the environment."""
        monkeypatch.setenv("KLING_WEBHOOK_SECRET", OTHER_SECRET)
        body = encode(LEGACY)
        assert CallbackReceiver(SECRET).parse(body, signed(body)).task_id == "task-1"

    @pytest.mark.parametrize(
        "secret", ["", "whsec_", "whsec_==", "no base64!", "whsec_A", f"{SECRET}\n", '"' + SECRET]
    )
    def test_unusable_secret(self, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An empty or undecodable secret is refused at once, wherever it comes from."""
        with pytest.raises(ConfigurationError) as caught:
            CallbackReceiver(secret)
        assert "console" in str(caught.value)
        assert caught.value.__context__ is None
        monkeypatch.setenv("KLING_WEBHOOK_SECRET", secret)
        with pytest.raises(ConfigurationError):
            CallbackReceiver()

    @pytest.mark.parametrize("secret", [SECRET, SECRET.removeprefix("whsec_"), SECRET.rstrip("=")])
    def test_spellings_of_a_secret(self, secret: str) -> None:
        """The prefix and the padding of a secret may be missing."""
        body = encode(LEGACY)
        assert CallbackReceiver(secret).parse(body, signed(body)).task_id == "task-1"

    @pytest.mark.parametrize("length", range(1, 66))
    def test_secrets_of_any_length(self, length: int) -> None:
        """A secret may have any number of bytes, and be told without its padding."""
        secret = base64.b64encode(bytes(range(length))).decode()
        body = encode(LEGACY)
        headers = signed(body, secret=secret)
        assert CallbackReceiver(secret.rstrip("=")).parse(body, headers).task_id == "task-1"

    @pytest.mark.parametrize("secret", [5, True, SECRET.encode(), [SECRET]])
    def test_a_secret_that_is_no_text(self, secret: Any) -> None:
        """It is refused as a setting: no key is made up in its place."""
        with pytest.raises(ConfigurationError, match="webhook secret"):
            CallbackReceiver(secret)

    @pytest.mark.parametrize("url", ["", "example.com/kling", "ftp://example.com/", "https://"])
    def test_unusable_public_url(self, url: str) -> None:
        """A public URL that is none is refused at once."""
        with pytest.raises(ConfigurationError, match="public_url"):
            CallbackReceiver(SECRET, public_url=url)

    def test_public_url_is_told(self) -> None:
        """The client reads the public URL for its creates."""
        assert CallbackReceiver(public_url="https://example.com/k").public_url == (
            "https://example.com/k"
        )
        assert CallbackReceiver().public_url is None

    def test_repr_shows_no_secret(self) -> None:
        """Neither the secret nor the query of the URL is in the repr."""
        shown = repr(CallbackReceiver(SECRET, public_url="https://example.com/k?token=abc"))
        assert shown == ("CallbackReceiver(secret='***', public_url='https://example.com/k?***')")
        assert repr(CallbackReceiver()) == "CallbackReceiver(secret=None, public_url=None)"

    def test_parse_needs_a_secret(self) -> None:
        """Without a secret nothing can be parsed, and the error says what to set."""
        body = encode(LEGACY)
        with pytest.raises(ConfigurationError, match="KLING_WEBHOOK_SECRET"):
            CallbackReceiver().parse(body, signed(body))


class TestSignature:
    @pytest.fixture(autouse=True)
    def frozen_clock(self) -> Iterator[None]:
        with time_machine.travel(VECTOR_TIME, tick=False):
            yield

    def test_published_vector(self, receiver: CallbackReceiver) -> None:
        """The vendor's published vector passes."""
        task = receiver.parse(VECTOR_BODY, VECTOR)
        assert task.task_id == "1234567890"
        assert task.succeeded
        assert task.voices == ()
        assert task.updated_at == datetime(2026, 6, 10, 8, 39, 54, 151000, tzinfo=UTC)

    @pytest.mark.parametrize("spell", [str.upper, str.title, lambda name: name.swapcase()])
    def test_case_of_header_names(
        self, receiver: CallbackReceiver, spell: Callable[[str], str]
    ) -> None:
        """Header names may come in any case."""
        headers = {spell(name): value for name, value in VECTOR.items()}
        assert receiver.parse(VECTOR_BODY, headers).succeeded

    @pytest.mark.parametrize("drift", [-300, -299, 0, 299, 300])
    def test_within_five_minutes(self, receiver: CallbackReceiver, drift: int) -> None:
        """A clock that is up to five minutes off is fine."""
        assert receiver.parse(VECTOR_BODY, signed(VECTOR_BODY, at=VECTOR_TIME + drift)).succeeded

    @pytest.mark.parametrize("drift", [-100_000, -301, 301, 100_000])
    def test_stale_or_from_the_future(self, receiver: CallbackReceiver, drift: int) -> None:
        """A genuine signature of another time is a replay, and refused."""
        error = refusal(receiver, VECTOR_BODY, signed(VECTOR_BODY, at=VECTOR_TIME + drift))
        assert error.reason == "not_authentic"
        assert "clock" in str(error)

    @pytest.mark.parametrize(
        "before",
        [
            "v1,",
            "v1",
            ",",
            "v1,,",
            "v1,abc",
            "v1,é",
            "v1a,AAAA",
            "v2," + "A" * 43 + "=",
            "v1," + "A" * 43 + "=",
            "v1," + "=" * 44,
            "x " * 50,
            "",
            "\t",
        ],
    )
    def test_one_good_signature_among_others(self, receiver: CallbackReceiver, before: str) -> None:
        """Any match passes, whatever stands before or behind it."""
        for value in (f"{before} {VECTOR_SIGNATURE}", f"{VECTOR_SIGNATURE} {before}"):
            headers = {**VECTOR, "webhook-signature": value}
            assert receiver.parse(VECTOR_BODY, headers).succeeded

    def test_both_secrets_of_a_rotation(self) -> None:
        """While a secret is rotated, the old one and the new one both pass."""
        new = signed(VECTOR_BODY, webhook_id="9876543210", secret=OTHER_SECRET)
        headers = {
            **VECTOR,
            "webhook-signature": f"{new['webhook-signature']} {VECTOR_SIGNATURE}",
        }
        for secret in (SECRET, OTHER_SECRET):
            assert CallbackReceiver(secret).parse(VECTOR_BODY, headers).succeeded

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"webhook-id": "9876543210"},
            {**VECTOR, "webhook-id": ""},
            {**VECTOR, "webhook-id": "9876543211"},
            {**VECTOR, "webhook-id": "é"},
            {**VECTOR, "webhook-id": "\udcff"},
            {**VECTOR, "webhook-id": "9" * 1000},
            {**VECTOR, "webhook-timestamp": str(VECTOR_TIME + 1)},
            {**VECTOR, "webhook-timestamp": f"{VECTOR_TIME}.0"},
            {**VECTOR, "webhook-timestamp": f" {VECTOR_TIME}"},
            {**VECTOR, "webhook-timestamp": f"-{VECTOR_TIME}"},
            {**VECTOR, "webhook-timestamp": "nan"},
            {**VECTOR, "webhook-timestamp": "1e400"},
            {**VECTOR, "webhook-timestamp": "9" * 12},
            {**VECTOR, "webhook-timestamp": "9" * 5000},
            {**VECTOR, "webhook-timestamp": "١٧٨١٠٨٠٧٩٤"},
            {**VECTOR, "webhook-signature": VECTOR_SIGNATURE.removeprefix("v1,")},
            {**VECTOR, "webhook-signature": VECTOR_SIGNATURE.replace("v1", "v2")},
            {**VECTOR, "webhook-signature": VECTOR_SIGNATURE.rstrip("=")},
            {**VECTOR, "webhook-signature": VECTOR_SIGNATURE.replace("v1,", "v1,,")},
            {**VECTOR, "webhook-signature": VECTOR_SIGNATURE.replace("U", "V")},
            {**VECTOR, "webhook-signature": "v1,é"},
            {**VECTOR, "webhook-signature": "v1,A"},
            {**VECTOR, "webhook-signature": "no comma"},
            {**VECTOR, "webhook-signature": " "},
        ],
    )
    def test_missing_or_wrong_headers(
        self, receiver: CallbackReceiver, headers: dict[str, str]
    ) -> None:
        """Whatever is wrong with the headers, the callback is not authentic."""
        assert refusal(receiver, VECTOR_BODY, headers).reason == "not_authentic"

    @pytest.mark.parametrize(
        "body", [b"", VECTOR_BODY + b" ", VECTOR_BODY.replace(b"succeeded", b"failed")]
    )
    def test_altered_body(self, receiver: CallbackReceiver, body: bytes) -> None:
        """A body that differs in a byte is not authentic."""
        assert refusal(receiver, body, VECTOR).reason == "not_authentic"

    def test_another_secret(self) -> None:
        """What another secret signed is not authentic, and the error says what to check."""
        error = refusal(CallbackReceiver(OTHER_SECRET), VECTOR_BODY, VECTOR)
        assert error.reason == "not_authentic"
        assert "check that the secret" in str(error)

    def test_values_that_are_no_text(self, receiver: CallbackReceiver) -> None:
        """Headers that a careless framework gives as bytes or lists count as missing."""
        headers: Any = {"webhook-id": b"1", b"webhook-id": "1", None: 1, 5: []}
        assert refusal(receiver, VECTOR_BODY, headers).reason == "not_authentic"

    def test_library_failure(
        self, receiver: CallbackReceiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the library raises comes out as a CallbackError, signed URLs masked."""

        def fail(*_: object, **__: object) -> None:
            raise ArithmeticError("https://example.com/a?token=secret")

        monkeypatch.setattr(Webhook, "verify", fail)
        error = refusal(receiver, VECTOR_BODY, VECTOR)
        assert error.reason == "not_authentic"
        assert "token" not in str(error)


class TestReading:
    @pytest.fixture
    def parse(self, receiver: CallbackReceiver) -> Parse:
        def parse(document: object) -> VoiceTask:
            body = encode(document)
            return receiver.parse(body, signed(body))

        return parse

    def test_older_shape(self, parse: Parse) -> None:
        """The task object itself is read in full."""
        task = parse(LEGACY)
        assert task.task_status is TaskStatus.SUCCEED
        assert task.external_task_id == "mine-1"
        assert task.voice is not None
        assert task.voice.voice_name == "Ada"
        assert task.final_unit_deduction == Decimal("0.05")
        assert task.final_balance_deduction is not None
        assert task.updated_at == datetime(2026, 6, 10, 8, 39, 54, 151000, tzinfo=UTC)
        assert task.request_id is None

    def test_newer_shape(self, parse: Parse) -> None:
        """The newer shape tells the same task, but for its deductions; other outputs are left."""
        older = {**LEGACY, "final_unit_deduction": None, "final_balance_deduction": None}
        assert parse(NEW) == parse(older)

    @pytest.mark.parametrize(
        ("word", "status"),
        [
            ("submitted", TaskStatus.SUBMITTED),
            ("processing", TaskStatus.PROCESSING),
            ("succeeded", TaskStatus.SUCCEED),
            ("succeed", TaskStatus.SUCCEED),
            ("failed", TaskStatus.FAILED),
            ("queued", TaskStatus("queued")),
        ],
    )
    def test_statuses(self, parse: Parse, word: str, status: TaskStatus) -> None:
        """Both spellings of the good end are one; an unknown word survives."""
        assert parse({"id": "1", "status": word}).task_status == status
        assert parse({"task_id": "1", "task_status": word}).task_status == status

    def test_console_test_callback(self, parse: Parse) -> None:
        """The callback that the vendor's console sends to try an address is read."""
        task = parse({"id": "1", "status": "submitted", "message": "", "outputs": []})
        assert task.task_status is TaskStatus.SUBMITTED

    @pytest.mark.parametrize(
        "document",
        [
            {"id": "1", "status": "failed", "message": "no voice", "external_id": ""},
            {"task_id": "1", "task_status": "failed", "task_status_msg": "no voice",
             "task_info": {"external_task_id": ""}},
            {"id": "1", "status": "failed", "message": "no voice", "external_id": None,
             "outputs": None, "create_time": None},
        ],
    )  # fmt: skip
    def test_no_external_id(self, parse: Parse, document: object) -> None:
        """An empty external id is none; else all tasks without one would be the same."""
        task = parse(document)
        assert task.external_task_id is None
        assert task.task_status_msg == "no voice"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"text"',
            b"<html></html>",
            b"\xef\xbb\xbf{}",
            b"{}",
            b'{"id": 1, "status": "failed"}',
            b'{"id": null, "status": "failed"}',
            b'{"id": "", "status": "failed"}',
            b'{"id": "1"}',
            b'{"id": "1", "status": null}',
            b'{"id": "1", "status": 3}',
            b'{"id": "1", "status": "failed", "message": 3}',
            b'{"id": "1", "status": "failed", "external_id": 0}',
            b'{"id": "1", "status": "failed", "create_time": "1781080778802"}',
            b'{"id": "1", "status": "failed", "update_time": 1.5}',
            b'{"id": "1", "status": "failed", "update_time": true}',
            b'{"id": "1", "status": "failed", "update_time": NaN}',
            b'{"id": "1", "status": "failed", "update_time": 99999999999999999999}',
            b'{"id": "1", "status": "failed", "update_time": ' + b"9" * 5000 + b"}",
            b'{"id": "1", "status": "succeeded", "outputs": {}}',
            b'{"id": "1", "status": "succeeded", "outputs": "voice"}',
            b'{"id": "1", "status": "succeeded", "outputs": [null]}',
            b'{"id": "1", "status": "succeeded", "outputs": ["v1"]}',
            b'{"id": "1", "status": "succeeded", "outputs": [{"type": "voice"}]}',
            b'{"id": "1", "status": "succeeded", "outputs": [{"type": "voice", "id": 1}]}',
            b'{"task_id": 1, "task_status": "failed"}',
            b'{"task_id": null, "id": "1", "status": "failed"}',
            b'{"task_id": "1", "task_status": "failed", "task_info": []}',
            b'{"task_id": "1", "task_status": "failed", "task_result": {"voices": {}}}',
            b'{"task_id": "1", "task_status": "failed", "final_unit_deduction": 0.05}',
            b'{"task_id": "1", "task_status": "failed", "final_unit_deduction": "Infinity"}',
            b"[" * 100_000,
            b'{"id":' * 40_000,
            b'{"id": "1", "status": "failed", "message": ' + b"[" * 990 + b"]" * 990 + b"}",
        ],
    )
    def test_unreadable(self, receiver: CallbackReceiver, body: bytes) -> None:
        """A genuine callback that is no task is unreadable, whatever it is."""
        assert refusal(receiver, body).reason == "unreadable"

    def test_error_says_where(self, receiver: CallbackReceiver) -> None:
        """The error names the field at fault."""
        assert "task_status: expected a string, got a number" in str(
            refusal(receiver, b'{"task_id": "1", "task_status": 3}')
        )

    def test_not_utf8(self, receiver: CallbackReceiver) -> None:
        """A body that is not UTF-8 is unreadable."""
        assert refusal(receiver, b'{"id": "\xff"}', signed(b"{}")).reason == "unreadable"

    @pytest.mark.parametrize("kind", [bytearray, memoryview])
    def test_other_kinds_of_bytes(
        self, receiver: CallbackReceiver, kind: Callable[[bytes], bytes]
    ) -> None:
        """Whatever holds bytes will do for a body."""
        body = encode(LEGACY)
        assert receiver.parse(kind(body), signed(body)).task_id == "task-1"

    def test_text_for_a_body(self, receiver: CallbackReceiver) -> None:
        """Text is refused with a hint: the signature is one over bytes."""
        body: Any = encode(LEGACY).decode()
        assert "raw bytes" in str(refusal(receiver, body, signed(encode(LEGACY))))

    def test_cap(self, receiver: CallbackReceiver) -> None:
        """A body at the cap is read; one byte more is refused before anything else is looked at."""
        document = encode({"id": "1", "status": "failed", "message": ""})
        body = document.replace(b'""', b'"' + b"x" * (BODY_CAP - len(document)) + b'"')
        assert len(body) == BODY_CAP
        assert receiver.parse(body, signed(body)).failed
        assert refusal(receiver, body + b"\xff", {}).reason == "too_large"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["succeeded", "succeed", "failed", "voice", "0.05", 1781080794151]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*LEGACY, *NEW, "voices", "voice_id", "type", "url", "quota"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
HEADER_TEXT = st.text(max_size=60) | st.sampled_from(
    [str(VECTOR_TIME), VECTOR_SIGNATURE, "v1,", "v1,A", "nan", "1e999", "v1," + "A" * 43 + "="]
)


class TestFuzz:
    @given(
        body=st.binary(max_size=200) | JSON.map(encode) | st.just(VECTOR_BODY),
        headers=st.dictionaries(
            st.sampled_from([*VECTOR, "Webhook-Signature", "WEBHOOK-TIMESTAMP"])
            | st.text(max_size=5),
            HEADER_TEXT | st.lists(HEADER_TEXT).map(" ".join),
        ),
    )
    @settings(max_examples=500, deadline=None)
    def test_forgeries(self, body: bytes, headers: dict[str, str]) -> None:
        """Whatever comes unsigned, only CallbackError comes out."""
        with pytest.raises(CallbackError):
            CallbackReceiver(SECRET).parse(body, headers)

    @given(document=JSON | st.fixed_dictionaries({"task_id": JSON, "task_status": JSON})
           | st.fixed_dictionaries({"id": st.text(min_size=1), "status": st.text(),
                                    "outputs": st.lists(JSON), "update_time": JSON}))  # fmt: skip
    @settings(max_examples=500, deadline=None)
    def test_signed_documents(self, document: object) -> None:
        """Whatever is signed, a task or a CallbackError that says "unreadable" comes out."""
        body = encode(document)
        receiver = CallbackReceiver(SECRET)
        try:
            task, reason = receiver.parse(body, signed(body)), None
        except CallbackError as error:
            task, reason = None, error.reason
        if task is None:
            assert reason == "unreadable"
        else:
            assert type(task.task_id) is str
            assert task.task_id
            assert type(task.task_status) is TaskStatus

    @given(body=st.binary(max_size=200) | JSON.map(encode))
    @settings(max_examples=500, deadline=None)
    def test_unproven_documents(self, body: bytes) -> None:
        """Without a secret, a callback prompts by sane ids or is unreadable, and nothing else."""

        receiver, listener, reason = CallbackReceiver(), Listener(), None

        async def take() -> None:
            receiver.attach(listener)
            await receiver.receive(body, {})

        try:
            asyncio.run(take())
        except CallbackError as error:
            reason = error.reason
        assert reason == (None if listener.prompted else "unreadable")


class TestDelivery:
    async def test_state_is_delivered(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """A genuine callback reaches those who wait."""
        await receive(receiver, encode(NEW))
        assert [task.task_id for task in listener.delivered] == ["task-1"]
        assert listener.delivered[0].voices
        assert not listener.prompted

    async def test_forgery_is_not_delivered(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """What is not authentic reaches nobody, and prompts nothing."""
        body = encode(LEGACY)
        with pytest.raises(CallbackError) as caught:
            await receiver.receive(body, signed(body, secret=OTHER_SECRET))
        assert caught.value.reason == "not_authentic"
        assert not listener.delivered
        assert not listener.prompted
        assert receiver.kept("task-1") is None

    async def test_duplicates(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """A webhook-id is taken in once, however often it comes."""
        for status in ("submitted", "submitted", "processing"):
            await receive(receiver, state(status), webhook_id="msg_1")
        await receive(receiver, state("processing"), webhook_id="msg_2")
        assert listener.statuses == ["submitted", "processing"]

    async def test_forgery_does_not_take_an_id(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """An id is remembered only once it is verified: a forgery cannot shut the real one out."""
        body = state("failed")
        forged = signed(body, webhook_id="msg_1", secret=OTHER_SECRET)
        with pytest.raises(CallbackError):
            await receiver.receive(body, forged)
        await receive(receiver, body, webhook_id="msg_1")
        assert listener.statuses == ["failed"]

    async def test_ids_are_bounded(
        self, receiver: CallbackReceiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only so many webhook-ids are remembered, the newest ones."""
        monkeypatch.setattr(callbacks_module, "REMEMBERED", 3)
        for number in range(5):
            await receive(receiver, state("submitted"), webhook_id=f"msg_{number}")
        assert list(receiver._received) == ["msg_2", "msg_3", "msg_4"]
        assert 1000 <= REMEMBERED <= 100_000

    async def test_older_states_after_newer_ones(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """A status never goes backwards, nor leaves an end."""
        for status in ("processing", "submitted", "failed", "processing", "succeed", "failed"):
            await receive(receiver, state(status))
        assert listener.statuses == ["processing", "failed"]
        kept = receiver.kept("task-1")
        assert kept is not None
        assert kept.failed

    async def test_older_moment_of_the_same_state(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """Of the same status, the later one stands; a step forward counts whatever its time."""
        for status, updated_at in (
            ("processing", 2000),
            ("processing", 1000),
            ("processing", 3000),
            ("rendering", 2500),
            ("failed", 500),
        ):
            await receive(receiver, state(status, updated_at=updated_at))
        assert [task.updated_at and task.updated_at.second for task in listener.delivered] == [
            2,
            3,
            0,
        ]
        assert listener.statuses[-1] == "failed"

    async def test_voices_that_follow_a_success(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """A success told without its voices is completed by one with them, never undone."""
        await receive(receiver, VECTOR_BODY.replace(b"1234567890", b"task-1"))
        await receive(receiver, encode(LEGACY))
        await receive(receiver, VECTOR_BODY.replace(b"1234567890", b"task-1"))
        assert [len(task.voices) for task in listener.delivered] == [0, 1]
        kept = receiver.kept("task-1")
        assert kept is not None
        assert kept.voices

    async def test_tasks_do_not_mix(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """What is older for one task is news for another."""
        await receive(receiver, state("failed", "task-1"))
        await receive(receiver, state("submitted", "task-2"))
        assert listener.statuses == ["failed", "submitted"]

    async def test_kept_before_the_wait(self, receiver: CallbackReceiver) -> None:
        """A state that comes before anybody waits is kept, by either id; others are unknown."""
        await receive(receiver, encode(LEGACY))
        by_id, by_external_id = receiver.kept("task-1"), receiver.kept("mine-1")
        assert by_id is not None
        assert by_id is by_external_id
        assert receiver.kept("task-2") is None
        assert receiver.kept("") is None

    async def test_kept_is_bounded(
        self, receiver: CallbackReceiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only so many tasks are kept, those told of last."""
        monkeypatch.setattr(callbacks_module, "KEPT", 3)

        async def tell(number: int, status: str) -> None:
            info = {"external_task_id": f"mine-{number}"}
            await receive(receiver, state(status, f"task-{number}", task_info=info))

        for number in range(3):
            await tell(number, "submitted")
        await tell(0, "processing")
        await tell(3, "submitted")
        assert [n for n in range(4) if receiver.kept(f"task-{n}")] == [0, 2, 3]
        assert [n for n in range(4) if receiver.kept(f"mine-{n}")] == [0, 2, 3]
        assert len(receiver._kept) == len(receiver._task_ids) == 3
        assert 1000 <= KEPT <= 100_000

    async def test_external_id_that_is_told_once(
        self, receiver: CallbackReceiver, listener: Listener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An external id told once holds for later states without it, and goes with its task."""
        monkeypatch.setattr(callbacks_module, "KEPT", 1)
        info = {"external_task_id": "mine-1"}
        await receive(receiver, state("submitted", task_info=info))
        await receive(receiver, state("processing"))
        await receive(receiver, state("submitted", task_info={"external_task_id": "mine-2"}))
        assert listener.delivered[-1].external_task_id == "mine-1"
        assert receiver.kept("mine-1") is listener.delivered[-1]
        assert receiver.kept("mine-2") is None
        await receive(receiver, state("submitted", "task-2", task_info=info))
        await receive(receiver, state("submitted", "task-3"))
        assert not receiver._task_ids

    async def test_external_ids_that_are_empty(
        self, receiver: CallbackReceiver, listener: Listener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A vendor may spell "no external id" as an empty string; it is forgotten like others."""
        monkeypatch.setattr(callbacks_module, "KEPT", 1)
        info = {"external_task_id": ""}
        await receive(receiver, state("submitted", task_info=info))
        await receive(receiver, state("processing", task_info=info))
        await receive(receiver, state("submitted", "task-2"))
        assert listener.statuses == ["submitted", "processing", "submitted"]
        assert not receiver._task_ids

    async def test_several_clients(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """Every attached client is told, once, until it is detached."""
        other = Listener()
        receiver.attach(other)
        receiver.attach(other)
        await receive(receiver, state("submitted"))
        receiver.detach(other)
        receiver.detach(other)
        await receive(receiver, state("processing"))
        assert listener.statuses == ["submitted", "processing"]
        assert other.statuses == ["submitted"]

    async def test_another_loop_on_another_thread(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """A callback received elsewhere is delivered in the client's own loop."""
        receiver.attach(listener)
        await asyncio.to_thread(lambda: asyncio.run(receive(receiver, state("failed"))))
        await asyncio.sleep(0)
        assert listener.statuses == ["failed"]
        assert listener.threads == {threading.get_ident()}

    async def test_another_kind_of_loop(
        self, receiver: CallbackReceiver, listener: Listener
    ) -> None:
        """A server that does not run on asyncio delivers in the client's loop all the same."""
        receiver.attach(listener)
        body = state("failed")

        def drive() -> None:
            with pytest.raises(StopIteration):
                receiver.receive(body, signed(body)).send(None)

        await asyncio.to_thread(drive)
        await asyncio.sleep(0)
        assert listener.statuses == ["failed"]

    async def test_client_that_fails(
        self,
        receiver: CallbackReceiver,
        listener: Listener,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A client that fails to take a callback in costs the others nothing, and is logged."""
        monkeypatch.setattr(listener, "deliver", lambda task: 1 / 0)
        other = Listener()
        receiver.attach(other)
        await receive(receiver, state("failed"))
        assert other.statuses == ["failed"]
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert record.exc_info

    def test_loop_that_has_ended(self) -> None:
        """A client whose loop is gone harms neither the callback nor the other clients."""
        receiver, gone, here = CallbackReceiver(SECRET), Listener(), Listener()

        async def attach() -> None:
            receiver.attach(gone)

        async def take() -> None:
            receiver.attach(here)
            await receive(receiver, state("failed"))

        asyncio.run(attach())
        asyncio.run(take())
        assert not gone.delivered
        assert here.statuses == ["failed"]

    @pytest.mark.parametrize(
        ("known", "told", "taken"),
        [
            (("processing", 5), ("processing", 4), False),
            (("processing", 5), ("processing", 5), True),
            (("processing", 5), ("processing", 6), True),
            (("processing", 5), ("processing", None), True),
            (("processing", None), ("processing", 5), True),
            (("submitted", 9), ("processing", 1), True),
            (("processing", 1), ("submitted", 9), False),
            (("processing", 9), ("succeed", 1), True),
            (("succeed", 1), ("failed", 9), False),
            (("succeed", 1), ("processing", 9), False),
        ],
    )
    async def test_which_of_two_is_kept(
        self,
        receiver: CallbackReceiver,
        known: tuple[str, int | None],
        told: tuple[str, int | None],
        taken: bool,
    ) -> None:
        """A step forward counts whatever the clocks say; else the newer of two; an end is final."""
        for name, (status, updated_at) in (("known", known), ("told", told)):
            body = state(status, updated_at=updated_at, task_status_msg=name)
            await receiver.receive(body, signed(body, webhook_id=name))
        kept = receiver.kept("task-1")
        assert kept is not None
        assert kept.task_status_msg == ("told" if taken else "known")


class TestWithoutASecret:
    @pytest.fixture
    def receiver(self) -> CallbackReceiver:
        return CallbackReceiver()

    async def test_the_longest_id(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """An id may have 512 characters, in either shape."""
        receiver.attach(listener)
        longest = "x" * 512
        await receiver.receive(encode({"task_id": longest}), {})
        await receiver.receive(encode({"external_id": longest}), {})
        assert listener.prompted == [(longest, None), (None, longest)]

    @pytest.mark.parametrize("document", [LEGACY, NEW])
    async def test_prompts_only(
        self, receiver: CallbackReceiver, listener: Listener, document: object
    ) -> None:
        """A callback prompts a look at the task that it names, and nothing of it is believed."""
        await receiver.receive(encode(document), {})
        assert listener.prompted == [("task-1", "mine-1")]
        assert not listener.delivered
        assert receiver.kept("task-1") is None
        assert receiver.kept("mine-1") is None

    @pytest.mark.parametrize(
        ("document", "ids"),
        [
            ({"id": "1"}, ("1", None)),
            ({"id": "1", "external_id": ""}, ("1", None)),
            ({"external_id": "mine"}, (None, "mine")),
            ({"task_id": "1", "task_info": "nonsense"}, ("1", None)),
            ({"task_id": "1", "id": "2"}, ("1", None)),
        ],
    )
    async def test_ids(
        self,
        receiver: CallbackReceiver,
        listener: Listener,
        document: object,
        ids: tuple[str | None, str | None],
    ) -> None:
        """One id of either kind is enough."""
        await receiver.receive(encode(document), {})
        assert listener.prompted == [ids]

    @pytest.mark.parametrize(
        "document",
        [
            {},
            [],
            {"id": None},
            {"id": ""},
            {"id": 1},
            {"id": ["1"]},
            {"id": "x" * 513},
            {"id": "1", "external_id": 2},
            {"task_id": "1", "task_info": {"external_task_id": {}}},
        ],
    )
    async def test_no_sane_ids(
        self, receiver: CallbackReceiver, listener: Listener, document: object
    ) -> None:
        """A callback that names no task by sane ids is unreadable."""
        with pytest.raises(CallbackError) as caught:
            await receiver.receive(encode(document), {})
        assert caught.value.reason == "unreadable"
        assert not listener.prompted

    @pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 100_000, b'{"id": ' + b"9" * 5000])
    async def test_unreadable(self, receiver: CallbackReceiver, body: bytes) -> None:
        """What is not JSON is unreadable."""
        with pytest.raises(CallbackError) as caught:
            await receiver.receive(body, {})
        assert caught.value.reason == "unreadable"

    async def test_too_large(self, receiver: CallbackReceiver) -> None:
        """The cap holds here, too."""
        with pytest.raises(CallbackError) as caught:
            await receiver.receive(b" " * (BODY_CAP + 1), {})
        assert caught.value.reason == "too_large"


@asynccontextmanager
async def serving(
    receiver: CallbackReceiver,
    *,
    port: int = 0,
    middlewares: Any = (),
    client_max_size: int = 1024**2,
) -> AsyncIterator[str]:
    """Serve a receiver with aiohttp; gives its URL."""
    app = web.Application(middlewares=middlewares, client_max_size=client_max_size)
    app.router.add_route("*", "/kling", receiver.aiohttp_handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    try:
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/kling"
    finally:
        await runner.cleanup()


async def post(url: str, data: Any, headers: Mapping[str, str] | None = None) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=data, headers=headers) as response,
    ):
        await response.read()
        return response.status


class TestAiohttpHandler:
    async def test_statuses(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """200, 401, 400, 413 and 405, each for its reason."""
        body, unreadable = encode(LEGACY), b'{"id": 1}'
        async with serving(receiver) as url, aiohttp.ClientSession() as session:
            assert await post(url, body, signed(body)) == 200
            assert await post(url, body) == 401
            assert await post(url, unreadable, signed(unreadable)) == 400
            assert await post(url, b"x" * (BODY_CAP + 1), signed(b"")) == 413
            async with session.get(url) as response:
                assert response.status == 405
                assert response.headers["Allow"] == "POST"
                assert await response.text() == "Callbacks come by POST."
        assert listener.statuses == ["succeed"]

    @pytest.mark.parametrize("client_max_size", [10, 0, 1024**3])
    async def test_cap_while_reading(
        self, receiver: CallbackReceiver, client_max_size: int
    ) -> None:
        """The cap holds for chunked bodies without an end, whatever the application's limit is."""
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < 10 * BODY_CAP:
                sent += 65536
                yield b"x" * 65536
                await asyncio.sleep(0.01)

        body = encode(LEGACY)
        async with serving(receiver, client_max_size=client_max_size) as url:
            assert await post(url, endless()) == 413
            assert sent < 10 * BODY_CAP
            assert await post(url, body, signed(body)) == 200

    async def test_packed_body(
        self, receiver: CallbackReceiver, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A body that unpacks beyond the cap is too large; a broken packing is told in the log."""
        headers = {"Content-Encoding": "gzip"}
        body = encode(LEGACY)
        async with serving(receiver) as url:
            assert await post(url, gzip.compress(body), {**headers, **signed(body)}) == 200
            assert await post(url, gzip.compress(bytes(20 * BODY_CAP)), headers) == 413
            assert await post(url, b"not packed", headers) == 400
        why = re.compile(r"The callback is not readable: its body broke off \(\w+Error\)\.")
        assert any(why.fullmatch(message) for message in caplog.messages)

    async def test_body_that_a_middleware_has_read(self, receiver: CallbackReceiver) -> None:
        """A middleware may read the body first."""

        @web.middleware
        async def peek(
            request: web.Request,
            handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
        ) -> web.StreamResponse:
            await request.read()
            return await handler(request)

        body = encode(LEGACY)
        async with serving(receiver, middlewares=[peek]) as url:
            assert await post(url, body, signed(body)) == 200
            assert await post(url, b"", signed(b"")) == 400

    @pytest.mark.parametrize(
        "rest", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"]
    )
    async def test_client_that_leaves(
        self, receiver: CallbackReceiver, listener: Listener, rest: bytes
    ) -> None:
        """A client that leaves amid its body harms nobody."""
        body = encode(LEGACY)
        async with serving(receiver) as url:
            port = int(url.split(":")[2].split("/")[0])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /kling HTTP/1.1\r\nHost: x\r\n" + rest)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            assert await post(url, body, signed(body)) == 200
        assert listener.statuses == ["succeed"]

    async def test_log_shows_no_secret(
        self, receiver: CallbackReceiver, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Why a callback was refused is logged, without its content and without the secret."""
        body = encode(LEGACY)
        async with serving(receiver) as url:
            assert await post(url, body, signed(body, secret=OTHER_SECRET)) == 401
        assert caplog.messages[0].startswith("The callback is not authentic: the signature does")
        assert "sign=secret" not in caplog.text
        assert SECRET.removeprefix("whsec_") not in caplog.text


Message = MutableMapping[str, Any]


class AsgiServer:
    """What an ASGI server would do with one request."""

    def __init__(self, *messages: Message) -> None:
        self.incoming = list(messages)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.incoming.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(
        self,
        receiver: CallbackReceiver,
        headers: Mapping[str, str] | None = None,
        **scope: object,
    ) -> int | None:
        """Run the application; gives the status that it answered, if it did."""
        pairs = [(n.lower().encode(), v.encode("latin-1")) for n, v in (headers or {}).items()]
        await receiver.asgi_app(
            {"type": "http", "method": "POST", "headers": pairs, **scope}, self.receive, self.send
        )
        if not self.sent or self.sent[0]["type"] != "http.response.start":
            return None
        start, body = self.sent
        lengths = [value for name, value in start["headers"] if name == b"content-length"]
        assert lengths == [str(len(body["body"])).encode()]
        status: int = start["status"]
        return status


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


class TestAsgiApp:
    async def test_forgeries_do_not_flood_the_log(
        self,
        receiver: CallbackReceiver,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A thousand refusals are one warning for each reason, and a count a minute later."""
        clock = 1000.0
        monkeypatch.setattr("kling_voice.callbacks.time", SimpleNamespace(monotonic=lambda: clock))
        for _ in range(1000):
            assert await AsgiServer(part(b"{}")).run(receiver) == 401
        assert await AsgiServer(part(b"x" * (BODY_CAP + 1))).run(receiver) == 413
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        clock += 60.0
        for _ in range(2):
            assert await AsgiServer(part(b"{}")).run(receiver) == 401
        assert len(caplog.records) == 3
        assert caplog.messages[2].endswith("(999 others since the last warning.)")

    async def test_statuses(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """200, 401, 400, 413 and 405, each for its reason."""
        body, unreadable = encode(LEGACY), b'{"id": 1}'
        assert await AsgiServer(part(body)).run(receiver, signed(body)) == 200
        assert await AsgiServer(part(body)).run(receiver) == 401
        assert await AsgiServer(part(unreadable)).run(receiver, signed(unreadable)) == 400
        assert await AsgiServer(part(b"x" * (BODY_CAP + 1))).run(receiver) == 413
        server = AsgiServer(part(b""))
        assert await server.run(receiver, method="GET") == 405
        assert (b"allow", b"POST") in server.sent[0]["headers"]
        assert listener.statuses == ["succeed"]

    async def test_body_in_parts(self, receiver: CallbackReceiver) -> None:
        """A body may come in parts, empty ones among them, and a part may lack its fields."""
        body = encode(LEGACY)
        parts = (part(body[:9], more=True), part(b"", more=True), part(body[9:], more=True))
        server = AsgiServer(*parts, {"type": "http.request"})
        assert await server.run(receiver, signed(body)) == 200

    async def test_cap_while_reading(self, receiver: CallbackReceiver) -> None:
        """A body without an end is refused as soon as it is too large."""
        server = AsgiServer(*(part(bytes(65536), more=True) for _ in range(100)))
        assert await server.run(receiver) == 413
        assert len(server.incoming) == 100 - BODY_CAP // 65536 - 1

    async def test_client_that_leaves(self, receiver: CallbackReceiver, listener: Listener) -> None:
        """A client that leaves amid its body gets no answer; one that leaves after it is fine."""
        body = encode(LEGACY)
        server = AsgiServer(part(body, more=True), {"type": "http.disconnect"})
        assert await server.run(receiver, signed(body)) is None
        assert not listener.delivered

        class Gone(AsgiServer):
            async def send(self, message: Message) -> None:
                raise BrokenPipeError

        assert await Gone(part(body)).run(receiver, signed(body)) is None
        assert listener.statuses == ["succeed"]

    async def test_lifespan(self, receiver: CallbackReceiver) -> None:
        """Run alone, it tells the server that it has started and stopped."""
        server = AsgiServer({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
        await server.run(receiver, type="lifespan")
        assert server.sent == [
            {"type": "lifespan.startup.complete"},
            {"type": "lifespan.shutdown.complete"},
        ]

    async def test_other_protocols(self, receiver: CallbackReceiver) -> None:
        """A websocket is refused, and what is not known raises, as ASGI asks for."""
        server = AsgiServer({"type": "websocket.connect"})
        await server.run(receiver, type="websocket")
        assert server.sent == [{"type": "websocket.close"}]
        with pytest.raises(NotImplementedError, match="come by HTTP, not by 'telnet'"):
            await AsgiServer().run(receiver, type="telnet")

    @pytest.mark.parametrize(
        ("method", "body", "status", "text"),
        [
            ("POST", encode(LEGACY), 200, b"OK"),
            ("POST", b"{}", 401, b"The callback is not authentic."),
            ("POST", b"x" * (BODY_CAP + 1), 413, b"The callback is too large."),
            ("PUT", b"{}", 405, b"Callbacks come by POST."),
        ],
    )
    async def test_answers_as_asgi_has_them(
        self, receiver: CallbackReceiver, method: str, body: bytes, status: int, text: bytes
    ) -> None:
        """Two messages are sent, word for word: servers take no others."""
        headers = signed(body) if status == 200 else {}
        server = AsgiServer(part(body))
        await server.run(receiver, headers, method=method)
        told = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(text)).encode()),
            *([(b"allow", b"POST")] if status == 405 else []),
        ]
        assert server.sent == [
            {"type": "http.response.start", "status": status, "headers": told},
            {"type": "http.response.body", "body": text},
        ]

    def test_servers_take_it_for_asgi3(self, receiver: CallbackReceiver) -> None:
        """It is an object with a coroutine function: so servers tell an ASGI 3 application."""
        assert not inspect.isroutine(receiver.asgi_app)
        assert inspect.iscoroutinefunction(receiver.asgi_app.__call__)
        assert receiver.asgi_app is receiver.asgi_app


SLOW = PollingPolicy(initial=20.0, multiplier=1.0, maximum=20.0, jitter=0.0)
BRISK = PollingPolicy(initial=0.02, multiplier=1.0, maximum=0.02, jitter=0.0)


class Stage:
    """An emulator, a client that polls every 20 s, and the receiver between them."""

    def __init__(
        self, emulator: Emulator, receiver: CallbackReceiver, kling: KlingVoiceClient
    ) -> None:
        self.emulator = emulator
        self.receiver = receiver
        self.kling = kling

    async def create(self) -> VoiceTask:
        return await self.kling.create_voice("Ada", voice_url="https://example.com/ada.mp3")

    @property
    def reads(self) -> int:
        """How many GETs the emulator has seen."""
        return sum(n for call, n in self.emulator.requests.items() if call.startswith("GET"))

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise TimeoutError


@asynccontextmanager
async def staged(
    *, secret: str | None = SECRET, polling: PollingPolicy = SLOW, **options: Any
) -> AsyncIterator[Stage]:
    with socket.socket() as free:  # the receiver's URL has to be known before it is served
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiver = CallbackReceiver(secret, public_url=f"http://127.0.0.1:{port}/kling")
    options = {"task_seconds": 0.1, "webhook_secret": secret, **options}
    async with (
        serving(receiver, port=port),
        Emulator(**options) as emulator,
        KlingVoiceClient(
            emulator.credentials, base_url=emulator.base_url, polling=polling, callbacks=receiver
        ) as kling,
    ):
        yield Stage(emulator, receiver, kling)


class TestEndToEnd:
    """The emulator's callbacks end the waits of a client that polls every 20 s."""

    @pytest.mark.parametrize("shape", ["legacy", "new"])
    async def test_wait_ends_by_callback(self, shape: str) -> None:
        """The callback alone ends the wait, with the voice and without a single query."""
        async with staged(callback_shape=shape) as stage, asyncio.timeout(5):
            seen: list[str] = []
            task = await stage.kling.wait_for_task(
                await stage.create(), on_update=lambda task: seen.append(str(task.task_status))
            )
            assert task.voice is not None
            assert task.voice.voice_id == stage.emulator.tasks[0].voice_id
            assert seen == ["processing", "succeed"]
            assert stage.reads == 0

    @pytest.mark.parametrize("shape", ["legacy", "new"])
    async def test_failure_ends_the_wait(self, shape: str) -> None:
        """So does the callback of a failure, with the vendor's reason."""
        async with (
            staged(callback_shape=shape, fail_when=lambda body: "noisy") as stage,
            asyncio.timeout(5),
        ):
            task = await stage.kling.wait_for_task(await stage.create(), raise_on_failure=False)
            assert task.task_status_msg == "noisy"
            assert stage.reads == 0

    async def test_wait_by_external_id(self) -> None:
        """A wait by the external id is ended by the same callback."""
        async with staged() as stage, asyncio.timeout(5):
            task = await stage.create()
            waited = await stage.kling.wait_for_task(task.external_task_id or "")
            assert waited.task_id == task.task_id

    async def test_callback_before_the_wait(self) -> None:
        """A wait that begins after the callback ends at once, by either id."""
        async with staged() as stage, asyncio.timeout(5):
            task = await stage.create()
            await stage.until(
                lambda: (kept := stage.receiver.kept(task.task_id)) is not None and kept.is_done
            )
            for waited in (task, task.task_id, task.external_task_id or ""):
                assert (await stage.kling.wait_for_task(waited)).voice is not None
            assert stage.reads == 0

    @pytest.mark.parametrize("shape", ["legacy", "new"])
    async def test_repeated_and_late_callbacks(self, shape: str) -> None:
        """Callbacks that repeat and overtake each other end every wait once, never backwards."""
        async with (
            staged(callback_shape=shape, callback_repeat=0.5, callback_reorder=0.5) as stage,
            asyncio.timeout(10),
        ):
            told: dict[str, list[str]] = {}
            tasks = await asyncio.gather(*(stage.create() for _ in range(20)))
            ended = await asyncio.gather(
                *(
                    stage.kling.wait_for_task(
                        task,
                        on_update=lambda task: told.setdefault(task.task_id, []).append(
                            str(task.task_status)
                        ),
                    )
                    for task in tasks
                )
            )
            assert all(task.voice for task in ended)
            assert all(words in (["processing", "succeed"], ["succeed"]) for words in told.values())
            assert stage.emulator.callbacks["reordered"] > 0
            await stage.until(lambda: stage.emulator.callbacks["delivered"] >= 60)
            assert stage.emulator.callbacks["failed"] == 0

    async def test_lost_callbacks(self) -> None:
        """Polling is the net underneath when every callback is lost."""
        async with staged(callback_drop=1.0, polling=BRISK) as stage, asyncio.timeout(5):
            assert (await stage.kling.wait_for_task(await stage.create())).voice is not None
            assert stage.reads > 0

    async def test_batch_and_clone(self) -> None:
        """Cloning ends by callbacks, too."""
        async with staged() as stage, asyncio.timeout(5):
            voice = await stage.kling.clone_voice("Ada", voice_url="https://example.com/a.mp3")
            assert voice.voice_id == stage.emulator.tasks[0].voice_id

    async def test_unsigned_prompts_a_query(self) -> None:
        """Without a secret the wait ends soon after the callback, by what a query answered."""
        async with staged(secret=None) as stage, asyncio.timeout(5):
            task = await stage.kling.wait_for_task(await stage.create())
            assert task.voice is not None
            assert task.final_unit_deduction is not None
            assert 1 <= stage.reads <= 4

    async def test_unsigned_lies_and_floods(self) -> None:
        """Thousands of unproven callbacks end no wait and are a few queries; none for others."""
        async with staged(secret=None, task_seconds=60.0) as stage:
            task = await stage.create()
            wait = asyncio.create_task(stage.kling.wait_for_task(task, timeout=15.0))
            lie = state("succeed", task.task_id, task_result=LEGACY["task_result"])
            unknown = [state("succeed", f"task-{number}") for number in range(1000)]
            started = time.monotonic()
            for body in unknown:
                await stage.receiver.receive(body, {})
            for _ in range(2000):
                await stage.receiver.receive(lie, {})
                await asyncio.sleep(0)
            elapsed = time.monotonic() - started
            await asyncio.sleep(0.1)
            assert not wait.done()
            assert 1 <= stage.reads <= 2 + elapsed / 0.5
            wait.cancel()
            await asyncio.gather(wait, return_exceptions=True)

    async def test_forgeries_do_nothing(self) -> None:
        """With a secret, a forgery does not even prompt."""
        async with staged(task_seconds=60.0) as stage:
            task = await stage.create()
            wait = asyncio.create_task(stage.kling.wait_for_task(task, timeout=15.0))
            await asyncio.sleep(0.02)
            lie = state("succeed", task.task_id, task_result=LEGACY["task_result"])
            url = stage.receiver.public_url or ""
            assert await post(url, lie, signed(lie, secret=OTHER_SECRET)) == 401
            assert await post(url, lie) == 401
            await asyncio.sleep(0.02)
            assert not wait.done()
            assert stage.reads == 0
            wait.cancel()
            await asyncio.gather(wait, return_exceptions=True)

    async def test_unknown_tasks_are_acknowledged(self) -> None:
        """A callback of a task that nobody knows is answered with 200."""
        body = encode({"id": "elsewhere", "status": "processing", "outputs": []})
        async with staged() as stage:
            assert await post(stage.receiver.public_url or "", body, signed(body)) == 200

    async def test_receiver_on_another_thread(self) -> None:
        """A web framework in another thread ends the wait, too."""
        async with staged(callback_drop=1.0) as stage, asyncio.timeout(5):
            task = await stage.create()
            wait = asyncio.create_task(stage.kling.wait_for_task(task))
            await asyncio.sleep(0.02)
            body = state("succeed", task.task_id, task_result=LEGACY["task_result"])
            await asyncio.to_thread(lambda: asyncio.run(receive(stage.receiver, body)))
            assert (await wait).voice is not None
            assert stage.reads == 0

    async def test_refused_wait_in_another_loop(self) -> None:
        """A wait that is refused, being in a second loop, takes no callback from the first one."""
        async with staged(callback_drop=1.0) as stage, asyncio.timeout(5):
            task = await stage.create()
            wait = asyncio.create_task(stage.kling.wait_for_task(task))
            await asyncio.sleep(0.02)

            async def mistaken() -> None:
                with pytest.raises(ConfigurationError):
                    await stage.kling.wait_for_task(task)
                await receive(stage.receiver, body)

            body = state("succeed", task.task_id, task_result=LEGACY["task_result"])
            await asyncio.to_thread(lambda: asyncio.run(mistaken()))
            assert (await wait).voice is not None
            assert stage.reads == 0

    async def test_batch_made_outside_of_its_loop(self) -> None:
        """A batch takes its callbacks in where it runs, wherever clone_voices was called."""
        async with staged() as stage, asyncio.timeout(5):
            request = VoiceRequest("Ada", voice_url="https://example.com/ada.mp3")
            batch = await asyncio.to_thread(stage.kling.clone_voices, [request])
            async with aclosing(batch) as results:
                assert [bool(result.voice) async for result in results] == [True]
            assert stage.reads == 0

    async def test_own_callback_url_wins(self, receiver: CallbackReceiver) -> None:
        """A create's own callback_url goes before the receiver's."""
        async with staged() as stage, serving(receiver) as url, asyncio.timeout(5):
            task = await stage.kling.create_voice(
                "Ada", voice_url="https://example.com/ada.mp3", callback_url=url
            )
            await stage.until(lambda: receiver.kept(task.task_id) is not None)
            assert stage.receiver.kept(task.task_id) is None

    async def test_closed_client_is_detached(self) -> None:
        """After close() the receiver no longer holds the client, and still takes callbacks in."""
        async with staged() as stage:
            task = await stage.create()
            assert not stage.receiver._watchers
            with pytest.raises(WaitTimeoutError):
                await stage.kling.wait_for_task(task, timeout=0)
            assert stage.receiver._watchers
            await stage.kling.close()
            assert not stage.receiver._watchers
            with pytest.raises(ClientClosedError):
                await stage.kling.wait_for_task(task)
            stage.kling.clone_voices([])
            assert not stage.receiver._watchers
            await stage.until(
                lambda: (kept := stage.receiver.kept(task.task_id)) is not None and kept.is_done
            )
