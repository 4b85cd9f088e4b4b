"""Every error this package raises; one root, so that ``except KlingError`` catches them all.

::

    KlingError
    ├── ConfigurationError            missing or bad settings (also ValueError)
    ├── ClientClosedError             the client is closed (also RuntimeError)
    ├── InvalidRequestError           refused before it was sent (also ValueError)
    ├── ConnectionFailedError         no usable answer came (also ConnectionError)
    │   └── RequestTimeoutError       no answer in time (also TimeoutError)
    ├── ResponseError                 an answer that is not the vendor's JSON
    ├── ApiError                      the vendor said no
    │   ├── AuthenticationError       1000-1004
    │   ├── PermissionDeniedError     1103
    │   ├── AccountError              1100, 1101, 1102 and other 11xx
    │   ├── BadRequestError           1200, 1201, 1202
    │   ├── NotFoundError             1203
    │   ├── PolicyError               1300, 1301, 1304
    │   ├── RateLimitError            1302
    │   ├── ConcurrencyLimitError     1303
    │   └── ServerError               5000-5002
    ├── TaskFailedError               the task ended as failed
    ├── WaitTimeoutError              the wait ended before the task (also TimeoutError)
    ├── SampleError                   a local file that the vendor would refuse
    └── CallbackError                 a callback that is not to be trusted or not readable

All of them pickle, and none holds a key, a token or the query of a URL.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kling_voice.models import VoiceTask

Outcome = Literal["not_created", "unknown"]


class KlingError(Exception):
    """The root of every error this package raises.

    Attributes:
        external_task_id: The idempotency key of the create that failed; ``None`` on other calls.
        outcome: What the failure of a create means. ``"not_created"``: this call created no voice
            and nothing is billed for it; what an earlier call with the same ``external_task_id``
            may have created stands, so go on with that id. ``"unknown"``: it may have been created;
            calling again with the same ``external_task_id`` finishes the job and cannot bill twice.
            ``None`` on other calls.
    """

    external_task_id: str | None = None
    outcome: Outcome | None = None

    def _sentence(self) -> str:
        return Exception.__str__(self)

    def __str__(self) -> str:
        text = self._sentence()
        if self.outcome == "not_created":
            own_id = self.external_task_id
            text += " This call created no voice and nothing is billed for it"
            text += "." if own_id is None else f" (external_task_id={own_id!r})."
        elif self.outcome == "unknown":
            text += (
                " It is not known whether the voice was created: call again with"
                f" external_task_id={self.external_task_id!r} to get it; that cannot bill twice."
            )
        return text


class ConfigurationError(KlingError, ValueError):
    """Settings are missing or contradict each other; the text names what to set."""


class ClientClosedError(KlingError, RuntimeError):
    """The client was used after ``close()``, or closed while the call was waiting.

    Attributes:
        sent: Whether the call may have left before.
    """

    sent = False


class InvalidRequestError(KlingError, ValueError):
    """An argument was refused before anything was sent.

    Attributes:
        field: The Python argument at fault; ``"source"`` when none or several of ``voice_url``,
            ``video_id`` and ``voice_file`` were given.
    """

    def __init__(self, message: str = "", *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConnectionFailedError(KlingError, ConnectionError):
    """No usable answer came: the connection was refused or reset, or DNS or TLS failed.

    Attributes:
        sent: ``False`` when it is certain that the request never left.
    """

    def __init__(self, message: str = "", *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class RequestTimeoutError(ConnectionFailedError, TimeoutError):
    """No complete answer came within the client's ``timeout``."""


class ResponseError(KlingError):
    """The answer is not the vendor's JSON: a gateway's page, a broken or an unexpected document.

    Attributes:
        http_status: The HTTP status of the answer; 0 if it is not even HTTP.
        body: The beginning of the answer's body, at most 200 characters, URLs without queries.
        retry_after: Seconds that the answer asks to wait, or ``None``.
    """

    def __init__(
        self,
        message: str = "",
        *,
        http_status: int = 0,
        body: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.body = body
        self.retry_after = retry_after

    def _sentence(self) -> str:
        status = f" (HTTP {self.http_status})" if self.http_status else ""
        text = f"The answer{status} is not readable: {super()._sentence()}."
        return f"{text} It begins: {self.body!r}." if self.body else text


# What to do, by business code. Source: the vendor's page "error-codes", autumn 2026.
_ADVICE = {
    1000: "Check the key that the client was given.",
    1001: "The server saw no Authorization header: check proxies between here and the vendor.",
    1002: "Check that the key is complete, active and meant for this host.",
    1003: "The token is not valid yet: set this machine's clock.",
    1004: "The token has expired: set this machine's clock.",
    1100: "The account is not in order: ask the vendor; retrying does not help.",
    1101: "The account is in arrears: top it up.",
    1102: "The resource pack is used up or has expired: buy another.",
    1103: "The account may not use this API or model: ask for it in the vendor's console.",
    1200: "Correct the request.",
    1201: "Correct the value that the message names.",
    1202: "This server does not know the call: check base_url.",
    1203: "Check the id and the account: the vendor does not know it.",
    1300: "The vendor's platform policy forbids it: use another recording or name.",
    1301: "The vendor's content policy forbids it: use another recording or name.",
    1302: "Too many requests: slow down, then call again.",
    1303: "Every task slot of the account is taken: wait until a task ends, then call again.",
    1304: "The account's IP whitelist shuts this machine out: add its address there.",
    5000: "The vendor had an internal error: call again later.",
    5001: "The vendor is under maintenance: call again later.",
    5002: "The vendor has a backlog: call again later.",
}


class ApiError(KlingError):
    """The vendor answered with an error.

    Attributes:
        code: The vendor's business code, e.g. 1201.
        message: The vendor's own words.
        request_id: The id to quote to the vendor's support, or ``None``.
        http_status: The HTTP status; 0 if what was read, not what was refused, makes the error.
        retry_after: Seconds that the answer asks to wait, or ``None``.
        hint: What to do, where this package knows better than the code's usual advice.
    """

    def __init__(
        self,
        message: str = "",
        *,
        code: int = 0,
        request_id: str | None = None,
        http_status: int = 0,
        retry_after: float | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.request_id = request_id
        self.http_status = http_status
        self.retry_after = retry_after
        self.hint = hint

    def _sentence(self) -> str:
        code = f"code {self.code}, " if self.code else ""
        text = (
            f"The vendor refused: {self.message or 'no reason given'}"
            f" ({code}HTTP {self.http_status}, request_id {self.request_id})."
            if self.http_status
            else f"{self.message}."  # nothing was refused: it is our own word on what was read
        )
        hint = self.hint or _ADVICE.get(self.code, "")
        return f"{text} {hint}" if hint else text


class AuthenticationError(ApiError):
    """1000-1004: the vendor does not accept the key or the token."""


class PermissionDeniedError(ApiError):
    """1103: the account may not use this API or model."""


class AccountError(ApiError):
    """1100, 1101, 1102 and other 11xx: only the account's owner can mend it; never retried."""


class BadRequestError(ApiError):
    """1200, 1201, 1202: the vendor refuses the request or a value in it."""


class NotFoundError(ApiError):
    """1203: the vendor does not know the id."""


class PolicyError(ApiError):
    """1300, 1301, 1304: a policy of the platform, or of the account's IP whitelist, forbids it."""


class RateLimitError(ApiError):
    """1302: too many requests in a short time."""


class ConcurrencyLimitError(ApiError):
    """1303: the account has as many tasks in flight as it may have."""


class ServerError(ApiError):
    """5000-5002: the vendor failed; a create may have been processed all the same."""


class TaskFailedError(KlingError):
    """The task ended as ``failed``; nothing is deducted for it.

    Attributes:
        task: The failed :class:`VoiceTask`; its ``task_status_msg`` is the vendor's reason.
    """

    def __init__(self, message: str = "", *, task: "VoiceTask | None" = None) -> None:
        super().__init__(message)
        self.task = task


class WaitTimeoutError(KlingError, TimeoutError):
    """The wait ended before the task did; the task goes on at the vendor and may be billed.

    Attributes:
        task: The last state seen, or ``None`` if none was.
    """

    def __init__(self, message: str = "", *, task: "VoiceTask | None" = None) -> None:
        super().__init__(message)
        self.task = task


class SampleError(KlingError):
    """A local recording that the vendor would refuse, or that cannot be read or stored."""


CallbackReason = Literal["not_authentic", "unreadable", "too_large"]


class CallbackError(KlingError):
    """A callback that is forged, stale or not readable.

    Attributes:
        reason: ``"not_authentic"``, ``"unreadable"`` or ``"too_large"``.
    """

    def __init__(self, message: str = "", *, reason: CallbackReason = "unreadable") -> None:
        super().__init__(message)
        self.reason: CallbackReason = reason
