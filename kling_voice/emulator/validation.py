"""What the endpoints accept: bodies and queries are read and judged here, as the vendor would."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen

from kling_voice.emulator.codes import BusinessError

__all__ = ["CreateBody", "Paging", "read_create", "read_delete", "read_object", "read_paging"]

_LONGEST_NAME = 20
_LAST_PAGE = 1000
_DEFAULT_PAGE_SIZE = 30


@frozen
class CreateBody:
    """The body of a create that passed validation.

    Attributes:
        voice_name: 1 to 20 characters.
        voice_url: where the sample is, unless `video_id` is given.
        video_id: a video made earlier on the account, unless `voice_url` is given.
        callback_url: whom to tell of changes of status.
        external_task_id: the caller's own id of the task.
    """

    voice_name: str
    voice_url: str | None = None
    video_id: str | None = None
    callback_url: str | None = None
    external_task_id: str | None = None


@frozen
class Paging:
    """Which page of a list is asked for.

    Attributes:
        number: from 1.
        size: tasks a page.
    """

    number: int
    size: int


def read_object(body: bytes) -> Mapping[str, Any]:
    """Read a JSON object, or refuse with 1200."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise BusinessError(1200, "Request body is not valid JSON") from None
    if not isinstance(value, dict):
        raise BusinessError(1200, "Request body must be a JSON object")
    return MappingProxyType(value)


def read_create(raw: Mapping[str, Any]) -> CreateBody:
    """Judge the body of a create."""
    if raw.get("voice_name") is None:
        raise BusinessError(1200, "voice_name is required")
    voice_name = _text(raw, "voice_name") or ""
    if not 1 <= len(voice_name) <= _LONGEST_NAME:
        raise BusinessError(1201, f"voice_name must have 1 to {_LONGEST_NAME} characters")
    voice_url = _url(raw, "voice_url")
    video_id = _text(raw, "video_id")
    if voice_url is not None and video_id is not None:
        raise BusinessError(1201, "voice_url and video_id are mutually exclusive, give only one")
    if voice_url is None and video_id is None:
        raise BusinessError(1201, "one of voice_url and video_id is required")
    return CreateBody(
        voice_name=voice_name,
        voice_url=voice_url,
        video_id=video_id,
        callback_url=_url(raw, "callback_url"),
        external_task_id=_text(raw, "external_task_id"),
    )


def read_delete(raw: Mapping[str, Any]) -> str:
    """Judge the body of a delete: the id of the voice."""
    voice_id = _text(raw, "voice_id")
    if voice_id is None:
        raise BusinessError(1200, "voice_id is required")
    return voice_id


def read_paging(query: Mapping[str, str], *, cap: int, clamp: bool) -> Paging:
    """Read and judge `pageNum` and `pageSize`.

    A page over the cap is refused, or quietly cut to it if `clamp` is set.
    """
    number = _integer(query, "pageNum", default=1, highest=_LAST_PAGE)
    if clamp:
        asked = _integer(query, "pageSize", default=_DEFAULT_PAGE_SIZE, highest=None)
        return Paging(number, min(asked, cap))
    default = min(_DEFAULT_PAGE_SIZE, cap)
    return Paging(number, _integer(query, "pageSize", default=default, highest=cap))


def _text(raw: Mapping[str, Any], name: str) -> str | None:
    """A string of the body; null and the empty string count as absent."""
    value = raw.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise BusinessError(1201, f"{name} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BusinessError(1201, f"{name} is not valid text") from None
    return value


def _url(raw: Mapping[str, Any], name: str) -> str | None:
    value = _text(raw, name)
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or re.search(r"\s", value):
        raise BusinessError(1201, f"{name} is not a valid URL")
    return value


def _integer(query: Mapping[str, str], name: str, *, default: int, highest: int | None) -> int:
    text = query.get(name)
    if text is None:
        return default
    bounds = "at least 1" if highest is None else f"between 1 and {highest}"
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if value < 1 or (highest is not None and value > highest):
        raise BusinessError(1201, f"{name} must be {bounds}")
    return value
