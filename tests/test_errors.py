"""The error tree: every class, every code, what each error carries and how it reads."""

import copy
import pickle
import re
from datetime import UTC, datetime

import pytest

import kling_voice
from kling_voice import errors
from kling_voice.errors import (
    AccountError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    CallbackError,
    ClientClosedError,
    ConcurrencyLimitError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    KlingError,
    NotFoundError,
    PermissionDeniedError,
    PolicyError,
    RateLimitError,
    RequestTimeoutError,
    ResponseError,
    SampleError,
    ServerError,
    TaskFailedError,
    WaitTimeoutError,
)
from kling_voice.models import TaskInfo, TaskStatus, VoiceTask
from kling_voice.protocol import error_class, is_transient, read_envelope

CODES = {
    1000: (401, AuthenticationError),
    1001: (401, AuthenticationError),
    1002: (401, AuthenticationError),
    1003: (401, AuthenticationError),
    1004: (401, AuthenticationError),
    1100: (429, AccountError),
    1101: (429, AccountError),
    1102: (429, AccountError),
    1103: (403, PermissionDeniedError),
    1200: (400, BadRequestError),
    1201: (400, BadRequestError),
    1202: (404, BadRequestError),
    1203: (404, NotFoundError),
    1300: (400, PolicyError),
    1301: (400, PolicyError),
    1302: (429, RateLimitError),
    1303: (429, ConcurrencyLimitError),
    1304: (429, PolicyError),
    5000: (500, ServerError),
    5001: (503, ServerError),
    5002: (504, ServerError),
}

PARENTS = {
    ConfigurationError: (KlingError, ValueError),
    ClientClosedError: (KlingError, RuntimeError),
    InvalidRequestError: (KlingError, ValueError),
    ConnectionFailedError: (KlingError, ConnectionError),
    RequestTimeoutError: (ConnectionFailedError, TimeoutError),
    ResponseError: (KlingError,),
    ApiError: (KlingError,),
    AuthenticationError: (ApiError,),
    PermissionDeniedError: (ApiError,),
    AccountError: (ApiError,),
    BadRequestError: (ApiError,),
    NotFoundError: (ApiError,),
    PolicyError: (ApiError,),
    RateLimitError: (ApiError,),
    ConcurrencyLimitError: (ApiError,),
    ServerError: (ApiError,),
    TaskFailedError: (KlingError,),
    WaitTimeoutError: (KlingError, TimeoutError),
    SampleError: (KlingError,),
    CallbackError: (KlingError,),
}

TASK = VoiceTask(
    task_id="t-1",
    task_status=TaskStatus("queued"),
    task_info=TaskInfo("mine"),
    created_at=datetime(2026, 9, 1, tzinfo=UTC),
)

API_KINDS = [kind for kind, parents in PARENTS.items() if parents == (ApiError,)]


def api_error(kind: type[ApiError]) -> ApiError:
    return kind(
        "too long", code=1201, request_id="r", http_status=400, retry_after=2.5, hint="Shorten it."
    )


EXAMPLES: list[tuple[KlingError, dict[str, object]]] = [
    (KlingError("Something is wrong."), {}),
    (ConfigurationError("Set a key."), {}),
    (ClientClosedError("The client is closed."), {}),
    (InvalidRequestError("It is empty.", field="voice_name"), {"field": "voice_name"}),
    (ConnectionFailedError("Reset by peer.", sent=False), {"sent": False}),
    (RequestTimeoutError("No answer within 1 s.", sent=True), {"sent": True}),
    (
        ResponseError("it is not JSON", http_status=502, body="<html>", retry_after=3.0),
        {"http_status": 502, "body": "<html>", "retry_after": 3.0},
    ),
    *(
        (
            api_error(kind),
            {
                "code": 1201,
                "message": "too long",
                "request_id": "r",
                "http_status": 400,
                "retry_after": 2.5,
                "hint": "Shorten it.",
            },
        )
        for kind in [ApiError, *API_KINDS]
    ),
    (TaskFailedError("Task t-1 failed.", task=TASK), {"task": TASK}),
    (WaitTimeoutError("The wait ended.", task=TASK), {"task": TASK}),
    (SampleError("It is too short."), {}),
    (CallbackError("It is forged.", reason="not_authentic"), {"reason": "not_authentic"}),
]
NAMES = [type(error).__name__ for error, _ in EXAMPLES]


def refusal(code: int, status: int, message: str = "no") -> ApiError:
    """Read the error that the vendor's answer stands for."""
    body = f'{{"code": {code}, "message": "{message}", "request_id": "req-7"}}'.encode()
    with pytest.raises(ApiError) as caught:
        read_envelope(status, {"Retry-After": "3"}, body)
    return caught.value


@pytest.mark.parametrize(("code", "status", "kind"), [(c, *CODES[c]) for c in CODES])
def test_documented_code(code: int, status: int, kind: type[ApiError]) -> None:
    """Each documented code has its class, and the error carries all that the answer told."""
    error = refusal(code, status, "the vendor's words")
    assert type(error) is kind
    assert (error.code, error.http_status) == (code, status)
    assert (error.message, error.request_id, error.retry_after) == (
        "the vendor's words",
        "req-7",
        3.0,
    )


@pytest.mark.parametrize("code", CODES)
def test_code_decides_whatever_the_status(code: int) -> None:
    """A documented code keeps its class when a gateway has changed the HTTP status."""
    for status in (200, 400, 429, 500):
        assert type(refusal(code, status)) is CODES[code][1]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (200, ApiError),
        (400, ApiError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (409, ApiError),
        (418, ApiError),
        (429, RateLimitError),
        (500, ServerError),
        (503, ServerError),
        (599, ServerError),
    ],
)
@pytest.mark.parametrize("code", [-1, 1, 1005, 1204, 1305, 4999, 5003, 10**30])
def test_unknown_code(code: int, status: int, kind: type[ApiError]) -> None:
    """An unknown code is classed by its HTTP status, and never breaks."""
    error = refusal(code, status)
    assert type(error) is kind
    assert error.code == code


@pytest.mark.parametrize("code", [1104, 1150, 1199])
@pytest.mark.parametrize("status", [200, 400, 403, 429, 500])
def test_unknown_account_code(code: int, status: int) -> None:
    """Every unknown 11xx is the account's, so that 429 never makes a rate limit of it."""
    assert error_class(code, status) is AccountError


@pytest.mark.parametrize("code", CODES)
def test_what_passes(code: int) -> None:
    """Only 1302, 1303 and the 5xxx may pass; billing, policy and keys never do."""
    assert is_transient(refusal(code, CODES[code][0])) == (code in (1302, 1303, 5000, 5001, 5002))


@pytest.mark.parametrize("code", CODES)
def test_sentence_of_a_code(code: int) -> None:
    """The text of a refusal has the vendor's words, the numbers for support, and what to do."""
    text = str(refusal(code, CODES[code][0], "the reason"))
    said, advice = text.split(").", 1)
    assert "the reason" in said
    assert f"code {code}" in said
    assert f"HTTP {CODES[code][0]}" in said
    assert "req-7" in said
    assert re.fullmatch(r" [A-Z].*\.", advice)


@pytest.mark.parametrize(("error", "told"), EXAMPLES, ids=NAMES)
@pytest.mark.parametrize("outcome", [None, "not_created", "unknown"])
def test_errors_travel(
    error: KlingError, told: dict[str, object], outcome: errors.Outcome | None
) -> None:
    """Every error survives pickling and copying, with its class, its text and all it carries."""
    error = copy.copy(error)
    if outcome is not None:
        error.outcome, error.external_task_id = outcome, "ext-1"
    told = {**told, "outcome": outcome, "external_task_id": "ext-1" if outcome else None}
    travelled = [
        copy.copy(error),
        copy.deepcopy(error),
        *(pickle.loads(pickle.dumps(error, level)) for level in range(2, 6)),
    ]
    for twin in travelled:
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert {name: getattr(twin, name) for name in told} == told


@pytest.mark.parametrize(("error", "told"), EXAMPLES, ids=NAMES)
def test_errors_read_as_sentences(error: KlingError, told: dict[str, object]) -> None:
    """The text of every error is made of sentences, whatever its outcome."""
    assert re.fullmatch(r"[A-Z].*\.", str(error))
    for outcome, word in (("not_created", "nothing is billed"), ("unknown", "cannot bill twice")):
        failed = copy.copy(error)
        failed.outcome = "not_created" if outcome == "not_created" else "unknown"
        failed.external_task_id = "ext-1"
        assert re.fullmatch(r"[A-Z].*\.", str(failed))
        assert word in str(failed)
        assert "'ext-1'" in str(failed)


@pytest.mark.parametrize("kind", PARENTS)
def test_tree(kind: type[KlingError]) -> None:
    """Each class stands where the tree draws it, built-in parents included."""
    assert all(issubclass(kind, parent) for parent in PARENTS[kind])
    assert issubclass(kind, KlingError)


def test_nothing_outside_the_tree() -> None:
    """The package has no other error class, and each one is drawn in the module's docstring."""
    every = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    mine = {kind for kind in every if issubclass(kind, KlingError)}
    assert mine == {KlingError, *PARENTS}
    assert {type(error) for error, _ in EXAMPLES} == mine
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in mine)


@pytest.mark.parametrize("kind", PARENTS)
def test_errors_need_no_arguments(kind: type[KlingError]) -> None:
    """Every error can be made of nothing or of a text alone, as libraries that rebuild them do."""
    assert isinstance(str(kind()), str)
    assert "because" in str(kind("because"))


def test_public_names() -> None:
    """``__all__`` is sorted and complete: the names of the contract and all errors."""
    names = kling_voice.__all__
    assert list(names) == sorted(names)
    contract = {
        "KlingVoiceClient ApiKey AccessKey RetryPolicy PollingPolicy VoiceTask TaskInfo TaskResult",
        "Voice TaskStatus BalanceDeduction VoiceRequest CloneResult CallbackReceiver SampleHost",
        "ObjectStoreHost SampleInfo inspect_sample __version__",
    }
    assert set(names) == {
        *" ".join(contract).split(),
        *(kind.__name__ for kind in [KlingError, *PARENTS]),
    }
    assert all(getattr(kling_voice, name) is not None for name in names)
