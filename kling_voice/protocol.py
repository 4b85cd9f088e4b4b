"""The vendor's protocol without any I/O: build a call, read an answer, judge a failure.

Everything here is a pure function over arguments, or over an answer's (status, headers, body).
Sources of the facts: the vendor's reference of the custom-voice API and its pages
"authentication", "error-codes" and "concurrency-rules", autumn 2026.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from attrs import field, frozen

from kling_voice.errors import (
    AccountError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ConcurrencyLimitError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    PolicyError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from kling_voice.models import VoiceTask, make_converter
from kling_voice.redaction import brief, mask_url, redact

if TYPE_CHECKING:
    from cattrs import Converter

DEFAULT_BASE_URL: Final = "https://api-singapore.klingai.com"
VOICES: Final = "/v1/general/custom-voices"
PRESETS: Final = "/v1/general/presets-voices"
DELETE: Final = "/v1/general/delete-voices"

NAME_LENGTH: Final = 20  # characters
PAGES: Final = 1000  # the highest pageNum
PAGE_SIZES: Final = (1000, 500, 100, 30)  # what to fall back to where a larger page is refused
_SHOWN = 200  # characters of an unreadable body that an error shows
_TOLD = 100  # voices of an unreadable task that are looked at for what is wrong
_LONGEST_RETRY_AFTER = 1e9  # seconds; keeps a silly header finite


# --- calls ---


def _without_query(target: str) -> str:
    return repr(target.partition("?")[0])


@frozen
class Call:
    """A request that is ready to be sent, but for its host and its token.

    Neither its text nor its repr shows the query or the body: they may hold signed URLs, and
    calls are arguments of log records.

    Attributes:
        method: The HTTP method.
        target: The encoded path with its query, to be put behind the base URL.
        body: The JSON body, or ``None``.
    """

    method: str
    target: str = field(repr=_without_query)
    body: bytes | None = field(default=None, repr=False)

    @property
    def is_read(self) -> bool:
        """Whether sending it again can change nothing."""
        return self.method == "GET"

    def __str__(self) -> str:
        return f"{self.method} {self.target.partition('?')[0]}"


def base_url(text: str) -> str:
    """Check a base URL and give it without a trailing slash.

    Raises:
        ConfigurationError: It is not an https URL (http is for loopback only), or has more than a
            host, a port and a path.
    """
    parts = _split(text) if isinstance(text, str) else None
    if parts is None or not _is_nameable(parts.hostname):
        raise ConfigurationError(
            f"base_url (or KLING_BASE_URL) must be a URL such as {DEFAULT_BASE_URL}, not"
            f" {_masked(text)[:_SHOWN]}."
        )
    if parts.username is not None or "?" in text or "#" in text:
        raise ConfigurationError(
            "base_url (or KLING_BASE_URL) must have no user, no query and no fragment, as"
            f" {_masked(text)[:_SHOWN]} has."
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigurationError(
            "base_url (or KLING_BASE_URL) must be https, since keys travel to it;"
            f" http://{parts.hostname} is neither that nor this machine (127.0.0.1, localhost)."
        )
    return text.rstrip("/")


def _is_nameable(host: str) -> bool:
    """Tell whether a host can be looked up at all, and not each call must fail."""
    try:
        return ":" in host or bool(host.encode("idna"))
    except UnicodeError:
        return False


def _masked(url: object) -> str:
    # What is no URL may be one with a slip in it, so all that may be a password goes.
    if isinstance(url, str):
        url = re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return mask_url(url)


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def create_call(
    voice_name: str,
    *,
    external_task_id: str,
    voice_url: str | None = None,
    video_id: str | None = None,
    callback_url: str | None = None,
) -> Call:
    """Build ``POST /v1/general/custom-voices``.

    Raises:
        InvalidRequestError: An argument is one that the vendor would refuse.
    """
    check_name(voice_name)
    sources = [source for source in (voice_url, video_id) if source is not None]
    if len(sources) != 1:
        raise InvalidRequestError(
            "Give exactly one of voice_url, video_id and voice_file,"
            f" not {'none' if not sources else 'several'}.",
            field="source",
        )
    body = {"voice_name": voice_name}
    if voice_url is not None:
        body["voice_url"] = check_url(voice_url, "voice_url")
    if video_id is not None:
        body["video_id"] = _check_text(video_id, "video_id")
    if callback_url is not None:
        body["callback_url"] = check_url(callback_url, "callback_url")
    body["external_task_id"] = check_id(external_task_id, "external_task_id")
    return Call("POST", VOICES, _encode(body))


def get_call(task_id: str) -> Call:
    """Build ``GET /v1/general/custom-voices/{id}``; either kind of id will do.

    Raises:
        InvalidRequestError: The id cannot stand in a URL.
    """
    return Call("GET", f"{VOICES}/{quote(check_id(task_id, 'task_id'), safe='')}")


def list_call(path: str, page_num: int, page_size: int) -> Call:
    """Build ``GET`` of one page of :data:`VOICES` or :data:`PRESETS`.

    Raises:
        InvalidRequestError: ``page_num`` or ``page_size`` is not a whole number from 1 to 1000.
    """
    _check_range(page_num, "page_num", PAGES)
    _check_range(page_size, "page_size", PAGE_SIZES[0])
    return Call("GET", f"{path}?pageNum={page_num}&pageSize={page_size}")


def delete_call(voice_id: str) -> Call:
    """Build ``POST /v1/general/delete-voices``.

    Raises:
        InvalidRequestError: The id is empty or not a string.
    """
    return Call("POST", DELETE, _encode({"voice_id": _check_text(voice_id, "voice_id")}))


def other_call(
    method: str, path: str, params: Mapping[str, object] | None = None, body: object = None
) -> Call:
    """Build any other call of the vendor's.

    Raises:
        InvalidRequestError: The method is not a word, the path does not begin with ``/`` or has a
            query of its own, a parameter is neither text nor a number, or ``body`` is not JSON.
    """
    if not isinstance(method, str) or not re.fullmatch("[A-Za-z]+", method):
        raise InvalidRequestError(
            f"method must be a word such as GET, not {brief(method)}.", field="method"
        )
    segments = _check_text(path, "path").split("/")
    if segments[0] or ".." in segments or re.search(r"[?#\\\s]", path):
        raise InvalidRequestError(
            f"path must begin with '/' and have no query (use params), not {mask_url(path)}.",
            field="path",
        )
    target = quote(path, safe="/%:@!$&'()*+,;=~")
    if params:
        target += f"?{_query(params)}"
    return Call(method.upper(), target, None if body is None else _encode(body))


def _query(params: Mapping[str, object]) -> str:
    # How None, True or a list is spelled in a query is the caller's to say, not ours to guess.
    try:
        if all(type(value) in (str, int, float) for value in params.values()):
            return urlencode(params)
    except (ValueError, AttributeError, TypeError):
        pass
    raise InvalidRequestError(
        "params must be a mapping of names to strings or numbers.", field="params"
    )


def check_name(voice_name: str) -> None:
    """Refuse a name that is not 1 to 20 characters of text.

    Raises:
        InvalidRequestError: as said; ``.field`` is ``"voice_name"``.
    """
    _check_text(voice_name, "voice_name")
    if len(voice_name) > NAME_LENGTH:
        raise InvalidRequestError(
            f"voice_name must have 1 to {NAME_LENGTH} characters; {voice_name[:_SHOWN]!r} has"
            f" {len(voice_name)}.",
            field="voice_name",
        )


def check_id(value: str, field: str) -> str:
    """Refuse an id that cannot be a segment of a URL's path.

    Raises:
        InvalidRequestError: as said; ``.field`` is *field*.
    """
    if _check_text(value, field) in (".", ".."):
        raise InvalidRequestError(f"{field} must not be {value!r}.", field=field)
    return value


def check_url(value: str, field: str) -> str:
    """Refuse what is not an http(s) URL with a host.

    Raises:
        InvalidRequestError: as said; ``.field`` is *field*.
    """
    if _split(_check_text(value, field)) is None:
        raise InvalidRequestError(
            f"{field} must be an http(s) URL with a host, not {mask_url(value)[:_SHOWN]}.",
            field=field,
        )
    return value


def _split(url: str) -> Any:
    if not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if usable else None


def _check_text(value: str, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(
            f"{field} must be a non-empty string, not {type(value).__name__}.", field=field
        )
    if not value:
        raise InvalidRequestError(f"{field} is empty.", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f"{field} is not valid text: it has half a surrogate pair.", field=field
        ) from None
    return value


def _check_range(value: int, field: str, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= highest:
        raise InvalidRequestError(
            f"{field} must be a whole number from 1 to {highest}, not {brief(value)}.",
            field=field,
        )


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def _encode(body: object) -> bytes:
    try:
        return _to_json(body).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The body is not JSON: {error}.", field="json") from None


# --- answers ---


class Envelope(NamedTuple):
    """What a successful answer held.

    Attributes:
        data: The vendor's ``data``, or ``None`` if there was none.
        request_id: The id of the request, or ``None``.
    """

    data: Any
    request_id: str | None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


@cache
def _task_hook() -> Callable[[Any, Any], VoiceTask]:
    return make_converter().get_structure_hook(VoiceTask)


@cache
def _telling_converter() -> "Converter":
    return make_converter(detailed_validation=True)


def read_envelope(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    secrets: Callable[[], tuple[str, ...]] = tuple,
) -> Envelope:
    """Read an answer's envelope.

    Args:
        status: The HTTP status.
        headers: The headers; names in any case.
        body: The whole body.
        secrets: Gives the texts that no error may repeat.

    Raises:
        ApiError: The vendor answered with an error; the class tells its kind.
        ResponseError: The answer is not the vendor's JSON.
    """
    document, why = None, "it has no envelope with a code"
    try:
        document = _decode(body.decode())
    except (ValueError, RecursionError) as error:
        why = _unreadable(status, headers, error)
    # Raised out here, the error has no context: json's own ones hold the whole document.
    if type(document) is not dict or type(document.get("code")) is not int:
        raise _response_error(why, status, headers, body, secrets)
    code, request_id = document["code"], document.get("request_id")
    request_id = _shown(request_id, _SHOWN, secrets) if type(request_id) is str else None
    if code != 0:
        message = document.get("message")
        raise error_class(code, status)(
            _shown(message, 2000, secrets) if type(message) is str else "",
            code=code,
            request_id=request_id,
            http_status=status,
            retry_after=retry_after(headers),
        )
    if not 200 <= status < 300:
        raise _response_error(
            "it reports success with an HTTP error", status, headers, body, secrets
        )
    return Envelope(document.get("data"), request_id)


def read_task(envelope: Envelope) -> VoiceTask:
    """Make the task that an envelope's ``data`` describes.

    Raises:
        ResponseError: It does not describe one; the text says where it went wrong.
    """
    return _structure(envelope.data, envelope.request_id, "data")


def read_items(envelope: Envelope) -> list[Any]:
    """Give the raw items of a list's ``data``.

    Raises:
        ResponseError: It is not a list.
    """
    if envelope.data is None:
        return []
    if type(envelope.data) is not list:
        raise ResponseError("data: expected an array", http_status=200)
    return envelope.data


def read_tasks(envelope: Envelope) -> list[VoiceTask]:
    """Make the tasks that a list's ``data`` describes.

    Raises:
        ResponseError: It does not describe tasks; the text says where it went wrong.
    """
    request_id = envelope.request_id
    return [
        _structure(item, request_id, "data", index)
        for index, item in enumerate(read_items(envelope))
    ]


def read_item(item: Any, request_id: str | None) -> VoiceTask:
    """Make the task that one raw item of a list describes.

    Raises:
        ResponseError: It does not describe one; the text says where it went wrong.
    """
    return _structure(item, request_id, "data[]")


def _structure(data: Any, request_id: str | None, path: str, index: int | None = None) -> VoiceTask:
    try:
        data["request_id"] = request_id  # the envelope's, whatever the data may claim
        task: VoiceTask = _task_hook()(data, VoiceTask)
    except Exception:  # whatever a hostile document brings about; told in full below
        where = path if index is None else f"{path}[{index}]"
        raise ResponseError(_tell(data, where), http_status=200) from None
    return task


def _tell(data: Any, path: str) -> str:
    """Find what is wrong in *data*, by reading it again with validation in detail."""
    if type(data) is not dict:
        return f"{path}: expected an object"
    from cattrs import transform_error  # here, as in make_converter: not needed to be imported

    try:
        _telling_converter().structure(_shortened(data), VoiceTask)
    except Exception as error:
        told = transform_error(error, path=path, format_exception=_format)
        places = [
            f"{place}: {what}" for what, _, place in (text.rpartition(" @ ") for text in told)
        ]
        return redact("; ".join(places[:3]))
    return f"{path}: not readable"


def _shortened(data: dict[str, Any]) -> dict[str, Any]:
    # Telling what is wrong costs a thousand times what reading costs; an answer full of broken
    # voices must not take minutes.
    result = data.get("task_result")
    voices = result.get("voices") if type(result) is dict else None
    return {**data, "task_result": {"voices": voices[:_TOLD]}} if type(voices) is list else data


def _format(error: BaseException, _: type | None) -> str:
    if isinstance(error, KeyError):
        return "missing"
    if isinstance(error, OverflowError):
        return "a number out of range"
    return str(error)[:_SHOWN]


def _unreadable(status: int, headers: Mapping[str, str], error: Exception) -> str:
    if 300 <= status < 400:
        return "it redirects, which is never followed, since the token would go along"
    if "html" in _header(headers, "Content-Type").lower():
        return "it is an HTML page, as gateways send"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it is not JSON"


def _response_error(
    why: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    secrets: Callable[[], tuple[str, ...]],
) -> ResponseError:
    shown = _shown(body[: 20 * _SHOWN].decode(errors="replace"), _SHOWN, secrets)
    return ResponseError(why, http_status=status, body=shown, retry_after=retry_after(headers))


def _shown(text: str, length: int, secrets: Callable[[], tuple[str, ...]]) -> str:
    # Cut to length only after masking: half a signature is still a secret.
    return redact(text[: 20 * _SHOWN], *secrets())[:length]


def _header(headers: Mapping[str, str], name: str) -> str:
    if value := headers.get(name):
        return value
    return next((value for key, value in headers.items() if key.lower() == name.lower()), "")


def server_time(headers: Mapping[str, str]) -> float | None:
    """Give the Unix time of the answer's ``Date``, or ``None``."""
    moment = _http_date(_header(headers, "Date"))
    return None if moment is None else moment.timestamp()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Give the seconds that ``Retry-After`` asks to wait (a number or a date), or ``None``."""
    text = _header(headers, "Retry-After").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text):
        return min(float(text), _LONGEST_RETRY_AFTER)
    until = _http_date(text)
    if until is None:
        return None
    now = _http_date(_header(headers, "Date")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _http_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


# --- verdicts ---

_BY_CODE: Final[Mapping[int, type[ApiError]]] = {
    1000: AuthenticationError,
    1001: AuthenticationError,
    1002: AuthenticationError,
    1003: AuthenticationError,
    1004: AuthenticationError,
    1103: PermissionDeniedError,
    1200: BadRequestError,
    1201: BadRequestError,
    1202: BadRequestError,
    1203: NotFoundError,
    1300: PolicyError,
    1301: PolicyError,
    1302: RateLimitError,
    1303: ConcurrencyLimitError,
    1304: PolicyError,
    5000: ServerError,
    5001: ServerError,
    5002: ServerError,
}
_BY_STATUS: Final[Mapping[int, type[ApiError]]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    429: RateLimitError,
}


def error_class(code: int, status: int) -> type[ApiError]:
    """Class a business code; one that is unknown goes by its HTTP status."""
    if known := _BY_CODE.get(code):
        return known
    if 1100 <= code < 1200:
        return AccountError
    if status >= 500:
        return ServerError
    return _BY_STATUS.get(status, ApiError)


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later."""
    return isinstance(
        error,
        ConnectionFailedError
        | ResponseError
        | RateLimitError
        | ConcurrencyLimitError
        | ServerError,
    )


def certainly_not_processed(error: BaseException) -> bool:
    """Tell whether the vendor certainly did not act on a call that failed like this."""
    if isinstance(error, ConnectionFailedError | ClientClosedError):
        return not error.sent
    return (
        isinstance(error, ApiError)
        and not isinstance(error, ServerError)
        and 400 <= error.http_status < 500
        # A gateway's own codes, such as 408 or 499, prove nothing.
        and (1000 <= error.code < 2000 or isinstance(error, RateLimitError))
    )


def concerns_account(error: BaseException) -> bool:
    """Tell whether every other call of the account must fail like this, too."""
    return isinstance(error, AuthenticationError | AccountError | PermissionDeniedError) or (
        isinstance(error, PolicyError) and error.code == 1304
    )


def is_duplicate(error: BaseException) -> bool:
    """Tell whether a create was refused because its ``external_task_id`` is taken already."""
    return (
        isinstance(error, BadRequestError)
        and error.code == 1201
        and "already exist" in error.message.lower()
    )


def says_deleted(error: ApiError) -> bool:
    """Tell whether a delete was refused because the voice is not there any more."""
    words = error.message.lower()
    return isinstance(error, NotFoundError) or any(
        word in words for word in ("already", "been deleted", "not exist", "not found")
    )


def is_clock_fault(error: ApiError) -> bool:
    """Tell whether a token was refused for its times: 1003 (too early) or 1004 (too late)."""
    return error.code in (1003, 1004)


def is_page_refused(error: BaseException) -> bool:
    """Tell whether a list was refused for a value, which may be its page size."""
    return isinstance(error, BadRequestError) and error.code == 1201


def smaller_page(page_size: int) -> int | None:
    """Give the next smaller page size worth trying, or ``None``."""
    return next((size for size in PAGE_SIZES if size < page_size), None)


def asked_to_wait(error: BaseException | None) -> float | None:
    """Give the seconds that the answer behind *error* asks to wait, or ``None``."""
    seconds = getattr(error, "retry_after", None)
    return seconds if isinstance(seconds, float) and math.isfinite(seconds) else None


def fits(task: VoiceTask, external_task_id: str, voice_name: str | None) -> bool:
    """Tell whether a task found by its external id can be the one that a create would make.

    The vendor tells a name only of a finished voice, and never the source.

    Args:
        task: What was found.
        external_task_id: The create's.
        voice_name: The create's; ``None`` if the id was made for it, so that it says enough.
    """
    if task.external_task_id is None:
        if task.task_id == external_task_id:
            return False  # found by its other id: another task
    elif task.external_task_id != external_task_id:
        return False
    name = task.voice.voice_name if task.voice else None
    return None in (name, voice_name) or _compared(name or "") == _compared(voice_name or "")


def _compared(name: str) -> str:
    # A vendor may tidy a name up; it is the same voice all the same.
    return " ".join(unicodedata.normalize("NFC", name).split())
