"""What must not be read over a shoulder: signed URLs, tokens and keys, masked in texts."""

import re

_SHOWN = 200  # characters of an argument that an error repeats

_URL = re.compile(  # the slashes of JSON may be escaped
    r"(https?:(?:\\?/){2})([^\s\"'<>?#/@]*@)?([^\s\"'<>?#]*)([?#][^\s\"'<>]*)?", re.IGNORECASE
)
_ENCODED_URL = re.compile(  # as in the query of another one
    r"(https?%3A(?:%2F){2}(?:(?!%3F|%23)[^\s\"'<>&?#])*+)(%3F|%23)?[^\s\"'<>&?#]*", re.IGNORECASE
)
_QUERY = re.compile(r"\?[\w.%~-]++=[^\s\"'<>]*")  # of a URL without its scheme and host
# Tried once for each run of letters, and never again from its middle, so that it takes no more
# than linear time over whatever a server may send.
_JWT = re.compile(r"(?<![\w-])(?>([\w-]*?)eyJ)[\w-]++\.[\w-]++(?:\.[\w-]*+)?")


def _mask(match: re.Match[str]) -> str:
    scheme, userinfo, place, query = match.groups()
    return f"{scheme}{'***@' if userinfo else ''}{place}{'?***' if query else ''}"


def _mask_encoded(match: re.Match[str]) -> str:
    return f"{match[1]}{'%3F***' if match[2] else ''}"


def redact(text: str, *secrets: str) -> str:
    """Give *text* without the query of any URL in it, without tokens and without the *secrets*."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    if ":" in text:  # most texts have nothing of all this, and each answer is looked at
        text = _URL.sub(_mask, text)
    if "?" in text:
        text = _QUERY.sub("?***", text)
    if "%3" in text:
        text = _ENCODED_URL.sub(_mask_encoded, text)
    if "eyJ" in text:
        text = _JWT.sub(r"\1***", text)
    return text


def brief(value: object) -> str:
    """Give the repr of an argument for an error's text; Python refuses that of a huge number."""
    try:
        return repr(value)[:_SHOWN]
    except ValueError:
        return f"such a {type(value).__name__}"


def mask_url(url: object) -> str:
    """Give the repr of a URL without its query, where signatures live; whatever is in it."""
    if not isinstance(url, str):
        return redact(brief(url))
    place = re.split("[?#]", url, maxsplit=1)[0]
    return repr(redact(place) + ("?***" if place != url else ""))
