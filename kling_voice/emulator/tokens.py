"""Who calls: API keys and signed tokens (RFC 7519, HS256), and the codes 1000 to 1004.

Tokens are verified by hand: the client signs with a library, and a mistake of that library, or in
the use of it, must not be repeated here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Sequence
from typing import Any

from kling_voice.auth import AccessKey
from kling_voice.emulator.codes import BusinessError

__all__ = ["authenticate"]


def authenticate(given: Sequence[str], credentials: AccessKey, api_key: str, now: float) -> None:
    """Judge the values of the Authorization header, at a moment of the server's wall clock."""
    if not any(value.strip() for value in given):
        raise BusinessError(1001)
    scheme, _, token = given[0].strip().partition(" ")
    token = token.strip()
    if len(given) > 1 or scheme.lower() != "bearer" or not token or not token.isascii():
        raise BusinessError(1002)
    if hmac.compare_digest(token.encode(), api_key.encode()):
        return
    if token.count(".") != 2:
        raise BusinessError(1000, "The API key is unknown")
    not_before, expires = _times(token, credentials)
    if not not_before <= now:
        raise BusinessError(1003)
    if not now < expires:
        raise BusinessError(1004)


def _times(token: str, credentials: AccessKey) -> tuple[float, float]:
    """From when until when a token of ours is good; any other one is refused."""
    signed, _, signature = token.rpartition(".")
    header, _, claims = signed.partition(".")
    expected = hmac.digest(credentials.secret_key.encode(), signed.encode(), "sha256")
    if not hmac.compare_digest(_decode(signature), expected):
        raise BusinessError(1002)
    if _object(header).get("alg") != "HS256":
        raise BusinessError(1002)
    told = _object(claims)
    if told.get("iss") != credentials.access_key:
        raise BusinessError(1002)
    return _number(told.get("nbf")), _number(told.get("exp"))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BusinessError(1002)
    return value


def _decode(part: str) -> bytes:
    padded = part + "=" * (-len(part) % 4)
    try:
        return base64.b64decode(padded, altchars=b"-_", validate=True)
    except binascii.Error:
        raise BusinessError(1002) from None


def _object(part: str) -> dict[str, Any]:
    try:
        value = json.loads(_decode(part))
    except (ValueError, RecursionError):
        raise BusinessError(1002) from None
    if not isinstance(value, dict):
        raise BusinessError(1002)
    return value
