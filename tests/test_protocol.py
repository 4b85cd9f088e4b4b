"""The protocol without a network: what is sent, what is read, and what a failure means."""

import json
import re
import warnings
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from kling_voice import protocol
from kling_voice.errors import (
    AccountError,
    ApiError,
    BadRequestError,
    ClientClosedError,
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
from kling_voice.models import TaskInfo, TaskResult, TaskStatus, Voice, VoiceTask
from kling_voice.protocol import (
    Envelope,
    asked_to_wait,
    base_url,
    certainly_not_processed,
    concerns_account,
    create_call,
    delete_call,
    error_class,
    fits,
    get_call,
    is_clock_fault,
    is_duplicate,
    is_loopback,
    is_page_refused,
    is_transient,
    list_call,
    other_call,
    read_envelope,
    read_task,
    read_tasks,
    retry_after,
    says_deleted,
    server_time,
    smaller_page,
)

URL_OF_A_SAMPLE = "https://example.com/a.mp3?sig=5ecret"
SURROGATE = "\ud800"


def create(**changes: Any) -> dict[str, Any]:
    """Build a create, and give the body it sends."""
    arguments = {
        "voice_name": "Ada",
        "external_task_id": "mine",
        "voice_url": URL_OF_A_SAMPLE,
        **changes,
    }
    body = create_call(**arguments).body
    assert body is not None
    document = json.loads(body)
    assert isinstance(document, dict)
    return document


# --- what is sent ---


def test_create_sends_what_was_given() -> None:
    """A create is a POST of the given fields and no others, in UTF-8."""
    call = create_call("Ada", external_task_id="mine", voice_url=URL_OF_A_SAMPLE)
    assert (call.method, call.target, call.is_read) == ("POST", "/v1/general/custom-voices", False)
    assert create() == {
        "voice_name": "Ada",
        "voice_url": URL_OF_A_SAMPLE,
        "external_task_id": "mine",
    }
    assert create(
        voice_name="Ада 声音", voice_url=None, video_id="v-1", callback_url="http://me.example/cb"
    ) == {
        "voice_name": "Ада 声音",
        "video_id": "v-1",
        "callback_url": "http://me.example/cb",
        "external_task_id": "mine",
    }


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("voice_name", wrong) for wrong in ("", "a" * 21, None, 5, b"Ada", ["Ada"], SURROGATE)),
        *(("external_task_id", wrong) for wrong in ("", ".", "..", None, 5, SURROGATE)),
        *(
            (field, wrong)
            for field in ("voice_url", "callback_url")
            for wrong in (
                "",
                "a.mp3",
                "/a.mp3",
                "//example.com/a.mp3",
                "file:///etc/passwd",
                "ftp://example.com/a.mp3",
                "data:audio/mp3;base64,AAAA",
                "https://",
                "https:///a.mp3",
                "https://:443/a.mp3",
                "https://example.com:0/a.mp3",
                "https://example.com:99999/a.mp3",
                "https://example.com:port/a.mp3",
                "https://[::1/a.mp3",
                "https://example.com/a b.mp3",
                " https://example.com/a.mp3",
                "https://example.com/a.mp3\n",
                "https://example.com/\x00",
                f"https://example.com/{SURROGATE}",
                5,
                b"https://example.com/a.mp3",
                URL("https://example.com/a.mp3"),
            )
        ),
    ],
)
def test_create_refuses_an_argument(field: str, wrong: object) -> None:
    """Each unusable argument is refused before anything is sent, with its name in ``.field``."""
    with pytest.raises(InvalidRequestError) as caught:
        create(**{field: wrong})
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize("wrong", ["", 5, None, SURROGATE])
def test_create_refuses_a_video_id(wrong: object) -> None:
    """An unusable video id is refused as ``video_id``; none at all as the missing source."""
    with pytest.raises(InvalidRequestError) as caught:
        create(voice_url=None, video_id=wrong)
    assert caught.value.field == ("source" if wrong is None else "video_id")


def test_create_needs_exactly_one_source() -> None:
    """No source and two sources are both refused as ``source``."""
    for sources in ({"voice_url": None}, {"video_id": "v-1"}, {"video_id": ""}):
        with pytest.raises(InvalidRequestError) as caught:
            create(**sources)
        assert caught.value.field == "source"


@pytest.mark.parametrize("name", ["A", "a" * 20, "声" * 20, "👩‍🚀", " ", '"\\/'])
def test_names_of_up_to_20_characters(name: str) -> None:
    """A name has 1 to 20 characters, whatever they take in bytes."""
    assert create(voice_name=name)["voice_name"] == name


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "HTTPS://EXAMPLE.COM/A.MP3",
        "https://example.com:8443/a.mp3?x=1&y=%20#z",
        "https://user:pass@example.com/a.mp3",
        "https://[2001:db8::1]/a.mp3",
        "https://例え.jp/音.mp3",
    ],
)
def test_usable_urls_are_sent_verbatim(url: str) -> None:
    """A URL is checked, never rewritten."""
    assert create(voice_url=url, callback_url=url)["callback_url"] == url


def test_refusals_do_not_repeat_signatures() -> None:
    """The error about an unusable URL or path does not show its query."""
    for url in ("https://x/a b?sig=5ecret", "s3://x/a?sig=5ecret", f"x?sig=5ecret{SURROGATE}"):
        with pytest.raises(InvalidRequestError) as caught:
            create(voice_url=url)
        assert "5ecret" not in str(caught.value)
    with pytest.raises(InvalidRequestError) as caught:
        other_call("GET", "/v1/x?sig=5ecret")
    assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize("task_id", ["", ".", "..", None, 5, b"t", SURROGATE])
def test_get_refuses_an_id(task_id: Any) -> None:
    """An id that cannot be a segment of a path is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        get_call(task_id)
    assert caught.value.field == "task_id"


@given(st.text(min_size=1))
def test_an_id_is_one_segment(task_id: str) -> None:
    """Any other id, slashes and dots and all, is one segment of the path and comes back whole."""
    try:
        call = get_call(task_id)
    except InvalidRequestError:
        assert task_id in (".", "..")
        return
    url = URL(f"https://example.com{call.target}", encoded=True)
    prefix, _, segment = url.raw_path.rpartition("/")
    assert prefix == "/v1/general/custom-voices"
    assert unquote(segment) == task_id
    assert (url.raw_query_string, url.raw_fragment) == ("", "")
    assert call.target.isascii()


@pytest.mark.parametrize(
    ("task_id", "segment"),
    [
        ("a/b", "a%2Fb"),
        ("../../delete-voices", "..%2F..%2Fdelete-voices"),
        ("%2e%2e", "%252e%252e"),
        ("a b?c#d", "a%20b%3Fc%23d"),
        ("声", "%E5%A3%B0"),
        ("...", "..."),
    ],
)
def test_ids_are_encoded(task_id: str, segment: str) -> None:
    """Ids with characters of their own meaning in URLs are encoded once."""
    call = get_call(task_id)
    assert (call.method, call.target) == ("GET", f"/v1/general/custom-voices/{segment}")


@pytest.mark.parametrize("wrong", [0, -1, 1001, 1.0, True, "1", None, 10**30])
@pytest.mark.parametrize("field", ["page_num", "page_size"])
def test_pages_have_bounds(field: str, wrong: Any) -> None:
    """A page's number and size are whole numbers from 1 to 1000."""
    with pytest.raises(InvalidRequestError) as caught:
        list_call(protocol.VOICES, **{"page_num": 1, "page_size": 30, field: wrong})
    assert caught.value.field == field


def test_lists() -> None:
    """A list asks for its page in the query."""
    assert list_call(protocol.VOICES, 2, 1000).target == (
        "/v1/general/custom-voices?pageNum=2&pageSize=1000"
    )
    assert list_call(protocol.PRESETS, 1000, 1).target == (
        "/v1/general/presets-voices?pageNum=1000&pageSize=1"
    )


def test_delete() -> None:
    """A delete posts the voice's id; ids that are no text are refused."""
    call = delete_call("v/1")
    assert (call.method, call.target) == ("POST", "/v1/general/delete-voices")
    assert call.body == b'{"voice_id":"v/1"}'
    wrong: list[Any] = ["", None, 5, SURROGATE]
    for voice_id in wrong:
        with pytest.raises(InvalidRequestError) as caught:
            delete_call(voice_id)
        assert caught.value.field == "voice_id"


def test_other_calls() -> None:
    """Any other call has its method, encoded path, query and body."""
    call = other_call("get", "/v1/a~b/ü%2F", {"q": "x y&z", "n": 5, "f": 1.5})
    assert (call.method, call.target) == ("GET", "/v1/a~b/%C3%BC%2F?q=x+y%26z&n=5&f=1.5")
    assert call.body is None
    assert call.is_read
    assert other_call("PUT", "/", None, {"a": [1, None]}).body == b'{"a":[1,null]}'
    assert not other_call("DELETE", "/x").is_read


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        *(("method", (wrong, "/x")) for wrong in ("", "GET /", "G\nT", None, 5, "GÉT")),
        *(
            ("path", ("GET", wrong))
            for wrong in (
                "",
                "x",
                "https://evil.example/",
                "/a/../b",
                "/..",
                "/x?y=1",
                "/x#y",
                "/a b\n",
                "/\\evil",
                None,
                5,
                SURROGATE,
                f"/{SURROGATE}",
            )
        ),
        *(
            ("params", ("GET", "/x", wrong))
            for wrong in (
                {"a": None},
                {"a": True},
                {"a": [1]},
                {"a": b"x"},
                {"a": SURROGATE},
                [("a", 1)],
                "a=1",
            )
        ),
        *(
            ("json", ("POST", "/x", None, wrong))
            for wrong in ({1, 2}, float("nan"), object(), b"x", SURROGATE, {("a",): 1})
        ),
    ],
)
def test_other_calls_refuse(field: str, arguments: tuple[Any, ...]) -> None:
    """What cannot be sent, or not without guessing, is refused with its name in ``.field``."""
    with pytest.raises(InvalidRequestError) as caught:
        other_call(*arguments)
    assert caught.value.field == field


def test_endless_bodies_are_refused() -> None:
    """A body that contains itself is refused, too."""
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(InvalidRequestError):
        other_call("POST", "/x", None, endless)


@pytest.mark.parametrize(
    ("given_url", "kept"),
    [
        ("https://api-singapore.klingai.com", "https://api-singapore.klingai.com"),
        ("https://api-beijing.klingai.com/", "https://api-beijing.klingai.com"),
        ("https://gateway.example:8443/kling/", "https://gateway.example:8443/kling"),
        ("HTTPS://Gateway.Example", "HTTPS://Gateway.Example"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://localhost:8080/x", "http://localhost:8080/x"),
        ("http://LOCALHOST", "http://LOCALHOST"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://127.8.8.8", "http://127.8.8.8"),
    ],
)
def test_usable_base_urls(given_url: str, kept: str) -> None:
    """https anywhere, http on this machine alone; a path prefix stays, a last slash goes."""
    assert base_url(given_url) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "api-singapore.klingai.com",
        "http://api-singapore.klingai.com",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "http://evil.example#localhost",
        "http://10.0.0.1",
        "http://0.0.0.0",
        "ftp://example.com",
        "https://",
        "https:///v1",
        "https://user@example.com",
        "https://user:pass@example.com",
        "https://@example.com",
        "https://example.com?x=1",
        "https://example.com?",
        "https://example.com#x",
        "https://example.com#",
        "https://example.com:0",
        "https://example.com:99999",
        "https://exa mple.com",
        "https://example.com\n",
        None,
        5,
        b"https://example.com",
    ],
)
def test_unusable_base_urls(wrong: Any) -> None:
    """Anything that would carry keys in the clear, or is no plain URL, is refused at once."""
    with pytest.raises(ConfigurationError):
        base_url(wrong)


# --- what is read ---


def answer(**document: object) -> bytes:
    """Write an envelope."""
    return json.dumps({"code": 0, "message": "SUCCEED", "request_id": "req-1", **document}).encode()


def unreadable(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> str:
    """Read an answer that is not the vendor's JSON; gives the error's text."""
    with pytest.raises(ResponseError) as caught:
        read_envelope(status, headers or {}, body)
    assert caught.value.http_status == status
    assert len(caught.value.body) <= 200
    assert caught.value.__context__ is None
    return str(caught.value)


def test_success() -> None:
    """A success gives the data and the request id; both may be absent."""
    assert read_envelope(200, {}, answer(data={"a": 1})) == Envelope({"a": 1}, "req-1")
    assert read_envelope(201, {}, answer()) == Envelope(None, "req-1")
    assert read_envelope(200, {}, b'{"code":0}') == Envelope(None, None)
    assert read_envelope(200, {}, answer(request_id=5, message=None)).request_id is None


def test_tasks_name_the_request_that_told_of_them() -> None:
    """Each task, alone or in a list, has the answer's request id, whatever it claims itself."""
    first = {"task_id": "1", "task_status": "submitted", "request_id": "its own"}
    second = {"task_id": "2", "task_status": "submitted"}
    assert read_task(Envelope(dict(first), "req-1")).request_id == "req-1"
    assert [
        (task.task_id, task.request_id) for task in read_tasks(Envelope([first, second], "req-2"))
    ] == [("1", "req-2"), ("2", "req-2")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"<html>502 Bad Gateway</html>",
        b'{"code":0,"data":{"task_id":"t',
        b"\x1f\x8b\x08\xff\xfe",
        b'{"code":0,"message":"\xe9\x80"}',
        b'\xef\xbb\xbf{"code":0}',
        '{"code":0}'.encode("utf-16"),
        b'{"code":0}{"code":0}',
        b'{"code":0,"data":NaN}',
        b'{"code":0,"data":Infinity}',
        b'{"code":0,"data":' + b"9" * 5000 + b"}",
        b'{"code":0,"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 1_000_000,
        b"{'code': 0}",
        b"null",
        b"[]",
        b"0",
        b'"code"',
        b"{}",
        b'{"data":{}}',
        b'{"code":"0"}',
        b'{"code":0.0}',
        b'{"code":false}',
        b'{"code":null}',
        b'{"code":[]}',
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("status", [200, 400, 502])
def test_what_is_not_the_vendors_json(body: bytes, status: int) -> None:
    """Whatever is not an envelope is a ResponseError, whatever its status."""
    unreadable(body, status)


def test_unreadable_answers_say_why() -> None:
    """The error tells a redirect, a gateway's page and too deep a nest from broken JSON."""
    page = {"content-type": "TEXT/HTML; charset=utf-8"}
    assert "HTML" in unreadable(b"<html>", 502, page)
    assert "redirect" in unreadable(b"", 302, {"Location": "https://evil.example"})
    assert "nested" in unreadable(b"[" * 1_000_000)
    assert "not JSON" in unreadable(b"{")
    assert "envelope" in unreadable(b"{}")
    assert "<html>" in unreadable(b"<html>")


@pytest.mark.parametrize("status", [302, 400, 404, 500])
def test_success_with_an_http_error(status: int) -> None:
    """A code of 0 with an HTTP error is not believed."""
    assert "success" in unreadable(answer(data={}), status)


def test_the_last_of_duplicate_keys_counts() -> None:
    """Duplicate keys are read as every JSON reader reads them, without a crash."""
    with pytest.raises(BadRequestError):
        read_envelope(200, {}, b'{"code":0,"code":1201,"message":"x"}')


def test_refusals_tell_all_that_the_answer_does() -> None:
    """The text, the code, the request's id, the status, and how long to wait."""
    with pytest.raises(RateLimitError) as caught:
        read_envelope(429, {"Retry-After": "7"}, answer(code=1302, message="slow down"))
    error = caught.value
    assert (error.message, error.code, error.request_id) == ("slow down", 1302, "req-1")
    assert (error.http_status, error.retry_after) == (429, 7.0)


def test_what_a_gateway_asks_to_wait_is_kept() -> None:
    """A page that is not the vendor's may tell a wait, too."""
    with pytest.raises(ResponseError) as caught:
        read_envelope(503, {"Retry-After": "7"}, b"<html>")
    assert caught.value.retry_after == 7.0


@pytest.mark.parametrize("message", [None, 5, [], {}, True])
def test_odd_messages(message: object) -> None:
    """A refusal whose message is no text is still a refusal."""
    with pytest.raises(BadRequestError) as caught:
        read_envelope(400, {}, answer(code=1201, message=message, request_id=None))
    assert caught.value.message == ""
    assert caught.value.request_id is None


def test_long_messages_are_cut() -> None:
    """A refusal's message has a sane length."""
    with pytest.raises(BadRequestError) as caught:
        read_envelope(400, {}, answer(code=1201, message="x" * 1_000_000))
    assert 1000 < len(caught.value.message) <= 2000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("1", 1.0),
        (" 120 ", 120.0),
        ("2.5", 2.5),
        ("999999999999", 1e9),
        ("9" * 400, None),
        ("-1", None),
        ("1e3", None),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("\u0661", None),
        ("Fri, 32 Dec 2026 00:00:00 GMT", None),
    ],
)
def test_retry_after_in_seconds(header: str, seconds: float | None) -> None:
    """``Retry-After`` is read as a plain number; anything odd counts as not said."""
    assert retry_after({"retry-after": header}) == seconds


def test_retry_after_as_a_date() -> None:
    """A date is counted from the server's own ``Date``, and a past one is now."""
    date = datetime(2026, 11, 22, 13, 0, tzinfo=UTC)
    for seconds in (30, 0, -30):
        headers = {
            "Date": format_datetime(date, usegmt=True),
            "RETRY-AFTER": format_datetime(date + timedelta(seconds=seconds), usegmt=True),
        }
        assert retry_after(headers) == max(0, seconds)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    told = retry_after({"Retry-After": soon})
    assert told is not None
    assert 55 < told <= 60


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000", "UT"])
def test_dates_of_any_spelling_of_the_zone(zone: str) -> None:
    """Two dates can be compared whether they name their zone or, with -0000, do not."""
    headers = {
        "Date": f"Sun, 22 Nov 2026 13:00:00 {zone}",
        "Retry-After": "Sun, 22 Nov 2026 13:00:30 GMT",
    }
    assert retry_after(headers) == 30.0
    assert server_time(headers) == 1795352400


def test_server_time() -> None:
    """The server's clock is that of its ``Date``, in any zone; a broken one is none."""
    assert server_time({"date": "Sun, 22 Nov 2026 13:00:00 GMT"}) == 1795352400
    assert server_time({"date": "Sun, 22 Nov 2026 14:00:00 +0100"}) == 1795352400
    for broken in ("", "now", "Sun, 22 Nov 2026", "Sun, 99 Nov 2026 13:00:00 GMT"):
        assert server_time({"Date": broken}) is None
    assert server_time({}) is None


# --- fuzz: whatever comes, only our errors come out ---

FIELDS = [
    "code",
    "data",
    "message",
    "request_id",
    "task_id",
    "task_status",
    "task_info",
    "task_result",
    "voices",
    "voice_id",
    "created_at",
    "final_unit_deduction",
    "final_balance_deduction",
    "quota",
    "external_task_id",
    "trial_url",
    "x",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["submitted", "succeed", "0.05", "kling"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)
HEADERS = st.dictionaries(
    st.sampled_from(["Date", "Retry-After", "Content-Type", "retry-after", "X"]), st.text()
)
STATUSES = st.sampled_from([100, 200, 204, 302, 400, 401, 429, 500, 502, 999])


def drive(status: int, headers: dict[str, str], body: bytes) -> None:
    """Read an answer in every way, and look at any error in every way."""
    for read in (read_task, read_tasks):
        failure: KlingError | None = None
        try:
            read(read_envelope(status, headers, body))
        except KlingError as error:
            failure = error
        if failure is not None:
            assert isinstance(failure, ApiError | ResponseError)
            assert str(failure)
            assert repr(failure)
            is_transient(failure)
            is_duplicate(failure)
            assert not (isinstance(failure, ResponseError) and certainly_not_processed(failure))


@given(STATUSES, HEADERS, st.binary())
def test_fuzz_bytes(status: int, headers: dict[str, str], body: bytes) -> None:
    """Only this package's errors come of any bytes with any headers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drive(status, headers, body)


@given(STATUSES, HEADERS, JSON)
@settings(max_examples=300)
def test_fuzz_documents(status: int, headers: dict[str, str], document: object) -> None:
    """Only this package's errors come of any JSON."""
    drive(status, headers, json.dumps(document).encode())


@given(JSON, st.integers(0, 10**6))
@settings(max_examples=300)
def test_fuzz_data(data: object, code: int) -> None:
    """Only this package's errors come of any data in a sound envelope."""
    drive(200, {}, answer(data=data))
    drive(200, {}, answer(data=[data]))
    drive(400, {}, answer(data=data, code=code, message=data, request_id=data))


REAL = answer(
    data={
        "task_id": "829819360242163",
        "task_status": "succeed",
        "task_status_msg": "",
        "task_info": {"external_task_id": "mine"},
        "task_result": {"voices": [{"voice_id": "v", "voice_name": "A", "trial_url": "https://x"}]},
        "final_unit_deduction": "0.05",
        "created_at": 1722769557708,
        "updated_at": 1722769566001,
    }
)


@given(st.data())
@settings(max_examples=300)
def test_fuzz_mutations(data: st.DataObject) -> None:
    """Only this package's errors come of a real answer that was cut, spliced or scratched."""
    body = bytearray(REAL)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        stop = min(len(body), start + data.draw(st.integers(0, 30)))
        body[start:stop] = data.draw(st.binary(max_size=6) | st.sampled_from([b"", b"null", b"[]"]))
    drive(200, {}, bytes(body))


# --- what a failure means ---


def api_error(code: int, status: int, message: str = "no") -> ApiError:
    """Read the vendor's refusal."""
    with pytest.raises(ApiError) as caught:
        read_envelope(status, {}, answer(code=code, message=message))
    return caught.value


def closed_amid_a_call() -> ClientClosedError:
    """Make the error of a call whose request may have left when the client was closed."""
    error = ClientClosedError("closed")
    error.sent = True
    return error


@pytest.mark.parametrize(
    ("error", "certain"),
    [
        (ConnectionFailedError("refused", sent=False), True),
        (RequestTimeoutError("connecting", sent=False), True),
        (ConnectionFailedError("reset"), False),
        (RequestTimeoutError("stalled"), False),
        (ResponseError("html", http_status=400), False),
        (ResponseError("html", http_status=502), False),
        (ClientClosedError("closed"), True),
        (closed_amid_a_call(), False),
        (ValueError("foreign"), False),
        (api_error(1201, 400), True),
        (api_error(1302, 429), True),
        (api_error(1303, 429), True),
        (api_error(1004, 401), True),
        (api_error(1999, 400), True),
        (api_error(429, 429), True),
        (api_error(5000, 500), False),
        (api_error(5002, 400), False),
        (api_error(1201, 500), False),
        (api_error(1303, 200), False),
        (api_error(7777, 502), False),
        (api_error(408, 408), False),
        (api_error(499, 499), False),
        (api_error(1, 400), False),
    ],
)
def test_when_nothing_was_created_for_certain(error: Exception, certain: bool) -> None:
    """Only a 4xx with a business code, or a connection never made, proves that nothing was done."""
    assert certainly_not_processed(error) is certain


def test_what_concerns_the_account() -> None:
    """Keys, billing, permissions and the whitelist concern every call; the rest only one."""
    account = {1000, 1001, 1002, 1003, 1004, 1100, 1101, 1102, 1103, 1304}
    single = {1200, 1201, 1202, 1203, 1300, 1301, 1302, 1303, 5000}
    assert all(concerns_account(api_error(code, 400)) for code in account)
    assert not any(concerns_account(api_error(code, 400)) for code in single)
    assert not concerns_account(ConnectionFailedError())


@pytest.mark.parametrize(
    ("code", "message", "duplicate"),
    [
        (1201, "external_task_id x already exists", True),
        (1201, "External task id ALREADY EXIST", True),
        (1201, "voice_name is too long", False),
        (1200, "already exists", False),
        (1203, "already exists", False),
    ],
)
def test_duplicates(code: int, message: str, duplicate: bool) -> None:
    """A duplicate is code 1201 with "already exist" in its message, in any case."""
    assert is_duplicate(api_error(code, 400, message)) is duplicate


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (BadRequestError("The voice was Already removed", code=1201), True),
        (BadRequestError("voice has BEEN DELETED", code=1201), True),
        (BadRequestError("voice_id does not exist", code=1201), True),
        (ApiError("Voice Not Found", code=1), True),
        (NotFoundError("no such voice", code=1203), True),
        (BadRequestError("voice_id is too long", code=1201), False),
        (BadRequestError("voice cannot be deleted", code=1201), False),
        (ServerError("internal error", code=5000), False),
    ],
)
def test_deletes_of_what_is_gone(error: ApiError, gone: bool) -> None:
    """The vendor's several words for "it is not there any more", in any case, or its 1203."""
    assert says_deleted(error) is gone


@pytest.mark.parametrize(
    ("external", "task_id", "name", "fitting"),
    [
        ("mine", "t-1", None, True),
        ("mine", "t-1", "Ada", True),
        ("mine", "t-1", " Ada ", True),
        ("mine", "t-1", "Ad\N{COMBINING DIAERESIS}a", False),
        ("mine", "t-1", "Bob", False),
        ("other", "t-1", None, False),
        (None, "t-1", "Ada", True),
        (None, "mine", "Ada", False),
        ("mine", "mine", "Ada", True),
    ],
)
def test_what_fits_a_create(
    external: str | None, task_id: str, name: str | None, fitting: bool
) -> None:
    """A found task is the create's own unless its id or its known name says otherwise."""
    voices = () if name is None else (Voice("v-1", name),)
    found = VoiceTask(
        task_id,
        TaskStatus.PROCESSING,
        task_info=TaskInfo(external),
        task_result=TaskResult(voices),
    )
    assert fits(found, "mine", "Ada") is fitting


@pytest.mark.parametrize("name", ["Zo\u00eb Li", "Zoe\u0308 Li", " Zo\u00eb  Li"])
def test_a_name_that_was_tidied_up_is_the_same(name: str) -> None:
    """Another Unicode form or other spaces do not make it another voice's."""
    found = VoiceTask(
        "t-1", TaskStatus.SUCCEED, task_result=TaskResult((Voice("v-1", "Zo\u00eb Li"),))
    )
    assert fits(found, "mine", name)
    assert not fits(found, "mine", "Zoe Li")


def test_a_new_id_says_enough() -> None:
    """What bears an id that was made for a create is its own, whatever it is named."""
    found = VoiceTask("t-1", TaskStatus.SUCCEED, task_result=TaskResult((Voice("v-1", "Bob"),)))
    assert fits(found, "kv-new", None)
    assert not fits(evolve(found, task_info=TaskInfo("other")), "kv-new", None)


def test_smaller_pages() -> None:
    """A page that is refused is asked for again in steps, down to the documented default."""
    steps = [1000]
    while (smaller := smaller_page(steps[-1])) is not None:
        assert smaller < steps[-1]
        steps.append(smaller)
    assert steps == [1000, 500, 100, 30]
    assert smaller_page(1) is None


def test_calls_are_named_without_their_query() -> None:
    """What logs and errors call a request has its path, not its query."""
    call = other_call("GET", "/v1/x", {"sig": "5ecret"})
    assert str(call) == "GET /v1/x"
    assert re.fullmatch(r"GET /v1/general/custom-voices", str(list_call(protocol.VOICES, 1, 30)))


def test_rate_limits_of_gateways_pass() -> None:
    """A gateway's own 429 in JSON is a rate limit, which passes."""
    assert type(api_error(429, 429)) is RateLimitError
    assert is_transient(api_error(429, 429))


def test_calls_show_neither_query_nor_body() -> None:
    """The text and the repr of a call, which logs carry, hold no signed URL."""
    call = create_call("Ada", voice_url="https://a.b/c?5ecret", external_task_id="mine")
    assert str(call) == "POST /v1/general/custom-voices"
    assert repr(call) == "Call(method='POST', target='/v1/general/custom-voices')"
    other = other_call("get", "/x", {"sig": "5ecret"})
    assert repr(other) == "Call(method='GET', target='/x')"


@pytest.mark.parametrize(
    ("code", "status", "cls"),
    [
        (9999, 499, ApiError),
        (9999, 500, ServerError),
        (1100, 200, AccountError),
        (1199, 200, AccountError),
        (1099, 200, ApiError),
        (1199, 500, AccountError),
        (1299, 404, NotFoundError),
        (-1, 429, RateLimitError),
    ],
)
def test_codes_and_statuses_at_the_edges(code: int, status: int, cls: type[ApiError]) -> None:
    """11xx is the account's, whatever the status; other unknown codes go by their status."""
    assert error_class(code, status) is cls


@pytest.mark.parametrize(
    ("code", "status", "certain"),
    [
        (999, 400, False),
        (1000, 400, True),
        (1999, 499, True),
        (2000, 400, False),
        (1000, 399, False),
        (1000, 500, False),
    ],
)
def test_refusals_at_the_edges(code: int, status: int, certain: bool) -> None:
    """Only a code of the vendor's with a 4xx status proves that nothing was done."""
    assert certainly_not_processed(ApiError(code=code, http_status=status)) is certain


def test_loopback_names_and_trailing_slashes() -> None:
    """Names below ``localhost`` are this machine's; of the text only slashes are cut."""
    assert base_url("http://kling.localhost:1//") == "http://kling.localhost:1"
    assert base_url("https://a.b/X") == "https://a.b/X"
    assert is_loopback("::1")
    assert not is_loopback("mylocalhost")


def test_request_ids_are_masked_and_cut() -> None:
    """A server that sends the key or a book as its request id does not make us show it."""
    body = answer(request_id="a 5ecret id" + "x" * 1000)
    told = read_envelope(200, {}, body, secrets=lambda: ("5ecret",)).request_id
    assert told == ("a *** id" + "x" * 1000)[:200]


def test_what_a_refusal_asks_for() -> None:
    """Clock faults, refused pages and waits are told from other refusals by their codes."""
    assert [code for code in range(1000, 1400) if is_clock_fault(ApiError(code=code))] == [
        1003,
        1004,
    ]
    assert is_page_refused(BadRequestError(code=1201))
    assert not is_page_refused(BadRequestError(code=1200))
    assert not is_page_refused(ApiError(code=1201))
    assert asked_to_wait(ApiError(retry_after=2.0)) == 2.0
    assert asked_to_wait(ApiError(retry_after=float("inf"))) is None
    assert asked_to_wait(ValueError()) is None
    assert asked_to_wait(None) is None
