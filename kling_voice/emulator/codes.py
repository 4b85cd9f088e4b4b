"""The business codes that the vendor documents, and how an endpoint refuses with one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["CODES", "BusinessError"]

CODES: Mapping[int, tuple[int, str]] = MappingProxyType(
    {
        1000: (401, "Authentication failed"),
        1001: (401, "Authorization is empty"),
        1002: (401, "Authorization is invalid"),
        1003: (401, "Authorization is not yet valid"),
        1004: (401, "Authorization has expired"),
        1100: (429, "Account exception"),
        1101: (429, "Account in arrears"),
        1102: (429, "Resource pack depleted or expired"),
        1103: (403, "No permission for the requested API or model"),
        1200: (400, "Invalid request parameters"),
        1201: (400, "Invalid parameter value"),
        1202: (404, "The requested method is invalid"),
        1203: (404, "The requested resource does not exist"),
        1300: (400, "The request triggered the platform's policy"),
        1301: (400, "The request triggered the platform's content security policy"),
        1302: (429, "Too many requests, the rate limit was exceeded"),
        1303: (429, "parallel task over resource pack limit"),
        1304: (429, "The request triggered the platform's IP whitelist policy"),
        5000: (500, "Internal server error"),
        5001: (503, "The server is temporarily unavailable, under maintenance"),
        5002: (504, "The server timed out, tasks are backlogged"),
    }
)
"""HTTP status and usual message of each business code."""


class BusinessError(Exception):
    """An endpoint refuses a request with a business code.

    Attributes:
        code: the business code, one of `CODES`.
        message: what the envelope says; the code's usual message unless a better one is given.
    """

    def __init__(self, code: int, message: str | None = None) -> None:
        self.code = code
        self.message: str = CODES[code][1] if message is None else message
        super().__init__(f"{code} {self.message}")
