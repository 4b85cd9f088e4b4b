"""A callback without any I/O: verify its signature, and read what it tells.

Everything here is a function of the body and the headers, and of the clock where a signature is
verified. Source of the shapes and the signature: the vendor's page "callbacks", autumn 2026.
"""

import base64
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from kling_voice import protocol
from kling_voice.errors import CallbackError, ConfigurationError, ResponseError
from kling_voice.models import VoiceTask
from kling_voice.redaction import redact

if TYPE_CHECKING:
    from standardwebhooks import Webhook

BODY_CAP: Final = 256 * 1024  # bytes; the vendor's callbacks have about 1 KiB
_LONGEST_ID = 512  # characters of an id in a callback that nothing proves

_SIGNED_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")
_MESSAGE_ID = re.compile(r"[!-~]{1,256}")
_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_SIGNATURE = re.compile(r"v1,[A-Za-z0-9+/]{43}=")  # base64 of the 32 bytes of HMAC-SHA256
_SECRET = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2,3}={0,2})?")


# --- verifying ---


class Verifier:
    """Tells the vendor's own callbacks from others, by the account's webhook secret.

    Args:
        secret: Base64, with or without ``whsec_`` in front, with or without padding.

    Raises:
        ConfigurationError: It is empty or not base64.
    """

    def __init__(self, secret: str) -> None:
        text = secret.removeprefix("whsec_") if isinstance(secret, str) else ""
        if not text:
            raise ConfigurationError(
                "The webhook secret is empty: copy it from the vendor's console, or unset"
                " KLING_WEBHOOK_SECRET."
            )
        if not _SECRET.fullmatch(text):
            raise ConfigurationError(
                "The webhook secret is not base64 after its 'whsec_': copy all of it from the"
                " vendor's console, without quotes, spaces or a line break."
            )
        self._key = base64.b64decode(text + "==")  # more padding than needed does no harm
        self._webhook: Webhook | None = None

    def verify(self, body: bytes, headers: Mapping[str, str]) -> tuple[str, str]:
        """Verify the signature over the raw bytes; any of several signatures will do.

        Args:
            body: The raw body.
            headers: The request's headers; names in any case.

        Returns:
            The ``webhook-id``, and the body as text.

        Raises:
            CallbackError: It is not the vendor's, more than 5 minutes old or ahead, or not UTF-8.
        """
        signed = _signed_headers(headers)
        text = _decode(body)
        if self._webhook is None:
            from standardwebhooks import Webhook  # here, since only few processes get callbacks

            self._webhook = Webhook(self._key)
        try:
            self._webhook.verify(text, signed, json_parse=False)
        except Exception as error:  # the library's own, and whatever else a header brings about
            why = redact(str(error))[:100]
        else:
            return signed["webhook-id"], text
        # Raised out here, the error has no context.
        raise _not_authentic(
            f"the signature does not hold ({why}). If it is the vendor's, check that the secret is"
            " the account's webhook secret, that the body is passed on byte for byte, and that"
            " this machine's clock is right."
        )


def _signed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Pick the headers of the signature, so that they can be handed to the library.

    The library chokes on a signature that is not base64 or has no version, even beside a good one.

    Raises:
        CallbackError: One is missing or malformed.
    """
    found = {
        name.lower(): value
        for name, value in headers.items()
        if isinstance(name, str) and isinstance(value, str) and name.lower() in _SIGNED_HEADERS
    }
    if missing := [name for name in _SIGNED_HEADERS if not found.get(name)]:
        raise _not_authentic(
            f"it has no {' and no '.join(missing)}. If it is the vendor's, check that the account"
            " has a webhook secret, and that no proxy on the way drops headers."
        )
    signatures = filter(_SIGNATURE.fullmatch, found["webhook-signature"].split())
    found["webhook-signature"] = " ".join(signatures)
    well_formed = {
        "webhook-id": _MESSAGE_ID.fullmatch(found["webhook-id"]),
        "webhook-timestamp": _TIMESTAMP.fullmatch(found["webhook-timestamp"]),
        "webhook-signature": found["webhook-signature"],
    }
    for name, value in well_formed.items():
        if not value:
            raise _not_authentic(
                f"its {name} is not what the Standard Webhooks scheme (v1) asks for."
            )
    return found


# --- reading ---


def check_body(body: bytes) -> bytes:
    """Refuse a body that is too long, before anything else is done with it.

    Raises:
        CallbackError: It has more than :data:`BODY_CAP` bytes, or is no bytes at all.
    """
    if not isinstance(body, bytes | bytearray | memoryview):
        raise unreadable(
            "its body must be handed over as the raw bytes that arrived, since those are signed,"
            f" not as {type(body).__name__}"
        )
    if memoryview(body).nbytes > BODY_CAP:
        raise too_large()
    return bytes(body)


def read_task(text: str) -> VoiceTask:
    """Read the state of a task, in either of the vendor's shapes.

    Raises:
        CallbackError: It is neither; the error tells where it went wrong.
    """
    document = _load(text)
    if "task_id" not in document:
        if "id" not in document:
            raise unreadable("it has neither a task_id nor an id")
        document = _as_task_object(document)
    try:
        task = protocol.read_task(protocol.Envelope(document, None))
    except ResponseError as error:
        why = f"read as a task, {error.args[0]}"
    else:
        if task.task_id:
            return task
        why = "its id is empty"
    raise unreadable(why)


def read_ids(body: bytes) -> tuple[str | None, str | None]:
    """Read the ``task_id`` and the ``external_task_id`` that either shape names, and nothing else.

    Raises:
        CallbackError: It names none, or one that cannot be an id.
    """
    document = _load(_decode(body))
    if "task_id" in document:
        info = document.get("task_info")
        external = info.get("external_task_id") if type(info) is dict else None
        ids = (_read_id(document["task_id"]), _read_id(external))
    else:
        ids = (_read_id(document.get("id")), _read_id(document.get("external_id")))
    if ids == (None, None):
        raise unreadable("it names no task")
    return ids


def _read_id(value: object) -> str | None:
    if value is None or value == "":
        return None
    if type(value) is not str or len(value) > _LONGEST_ID:
        raise unreadable(f"an id in it is not a string of at most {_LONGEST_ID} characters")
    return value


def _decode(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    raise unreadable(why)


def _load(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError:  # not JSON, or a number of thousands of digits
        why = "it is not JSON"
    else:
        if type(document) is dict:
            return document
        why = "it is not a JSON object"
    raise unreadable(why)


def _as_task_object(document: dict[str, Any]) -> dict[str, Any]:
    """Put the newer shape into the older one's words; what is wrong in it stays so."""
    voices = document.get("outputs")
    if type(voices) is list:
        voices = [
            _as_voice(output) if type(output) is dict else output
            for output in voices
            if type(output) is not dict or output.get("type") == "voice"
        ]
    return {
        "task_id": document.get("id"),
        "task_status": document.get("status"),
        "task_status_msg": document.get("message"),
        "task_info": {"external_task_id": document.get("external_id")},
        "task_result": {"voices": voices},
        "created_at": document.get("create_time"),
        "updated_at": document.get("update_time"),
    }


def _as_voice(output: dict[str, Any]) -> dict[str, Any]:
    return {
        "voice_id": output.get("id"),
        "voice_name": output.get("name"),
        "trial_url": output.get("url"),
        "owned_by": output.get("owned_by"),
    }


# --- the errors ---


def _not_authentic(why: str) -> CallbackError:
    return CallbackError(f"The callback is not authentic: {why}", reason="not_authentic")


def unreadable(why: str) -> CallbackError:
    """Make the error of a callback that cannot be read."""
    return CallbackError(f"The callback is not readable: {why}.", reason="unreadable")


def too_large() -> CallbackError:
    """Make the error of a callback that has more than :data:`BODY_CAP` bytes."""
    return CallbackError(f"The callback is longer than {BODY_CAP} bytes.", reason="too_large")
