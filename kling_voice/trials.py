"""Trial recordings: fetch one into a file, whole or not at all.

The vendor keeps generated files for 30 days at URLs that need no login, so nothing that could
identify the caller goes along: no token, no cookie, no login of a borrowed session.
"""

import asyncio
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from kling_voice.errors import (
    InvalidRequestError,
    KlingError,
    NotFoundError,
    ResponseError,
)
from kling_voice.models import Voice
from kling_voice.protocol import check_url, is_loopback
from kling_voice.redaction import redact
from kling_voice.transport import translate

TRIAL_CAP: Final = 64 * 1024 * 1024  # bytes
_HOPS: Final = 5
_PIECE: Final = 256 * 1024  # bytes
_PATIENCE: Final = 20  # times the inactivity timeout, for all of a download
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(
    total=None, connect=None, sock_connect=None, sock_read=None
)


def trial_url(voice: Voice) -> str:
    """Give the URL of a voice's trial recording.

    Raises:
        InvalidRequestError: It has none, or one that is not https (http is for loopback only);
            ``.field`` is ``"voice"``.
    """
    url = voice.trial_url
    if not url:
        raise InvalidRequestError(
            f"The voice {voice.voice_id!r} has no trial_url: get it again from its task.",
            field="voice",
        )
    parts = urlsplit(check_url(url, "voice"))
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise InvalidRequestError("The voice's trial_url is not https.", field="voice")
    return url


def is_worth_retrying(error: BaseException) -> bool:
    """Tell whether the same download may succeed a little later."""
    if isinstance(error, ResponseError):
        return error.http_status >= 500 or error.http_status == 429
    return isinstance(error, ConnectionError)


async def download(
    session: aiohttp.ClientSession,
    url: str,
    path: str | os.PathLike[str],
    *,
    timeout: float,
    cap: int = TRIAL_CAP,
    proxy: Callable[[str], str | None] = lambda url: None,
) -> Path:
    """Fetch a file, once; *path* is replaced when all of it is here, and untouched otherwise.

    Args:
        session: Whose connections to use; nothing else of it.
        url: Where the file is, as :func:`trial_url` gives it. Redirects are followed, at most
            five, and only to https; to this machine only from this machine.
        path: Where to put it; its folder must exist.
        timeout: Seconds without a byte before it gives up. All of it may take 20 times as long.
        cap: The most bytes to accept.
        proxy: Gives the proxy for a URL, or ``None``.

    Raises:
        InvalidRequestError: *path* is a folder or cannot be written; ``.field`` is ``"path"``.
        NotFoundError: The file is not there any more.
        ResponseError: Something else than the file was answered.
        ConnectionFailedError: No complete answer came.
    """
    target = Path(path)
    part, file = _open_part(target)
    try:
        try:
            failure = await _fetch(session, url, file, timeout, cap, proxy)
        finally:
            file.close()
        if failure is None:
            os.replace(part, target)
            return target
    except OSError as error:
        failure = _unwritable(target, error)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    raise failure


async def _fetch(
    session: aiohttp.ClientSession,
    url: str,
    file: BinaryIO,
    timeout: float,
    cap: int,
    proxy: Callable[[str], str | None],
) -> KlingError | None:
    """Write what is at *url* to *file*, or give what went wrong; ``OSError`` is the file's."""
    trouble: OSError | None = None
    # A session of its own: a borrowed one may add cookies, headers or a login to any request.
    async with aiohttp.ClientSession(
        connector=session.connector,
        connector_owner=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=session.trace_configs,
        timeout=_NO_TIMEOUT,
    ) as bare:
        try:
            async with (
                asyncio.timeout(timeout * _PATIENCE),
                asyncio.timeout(timeout) as inactivity,
                _answer(bare, url, proxy) as response,
            ):
                size = 0
                async for piece in response.content.iter_chunked(_PIECE):
                    size += len(piece)
                    if size > cap:
                        raise ResponseError(
                            f"it is longer than {cap} bytes", http_status=response.status
                        )
                    try:
                        await asyncio.to_thread(file.write, piece)
                    except OSError as error:
                        trouble = error
                        break
                    inactivity.reschedule(asyncio.get_running_loop().time() + timeout)
            if size == 0:
                raise ResponseError("it is empty", http_status=response.status)
        except KlingError as error:
            return error
        except Exception as error:
            return translate(error, "The download of the trial", timeout, sent=True)
    if trouble is not None:
        raise trouble
    return None


@asynccontextmanager
async def _answer(
    session: aiohttp.ClientSession, url: str, proxy: Callable[[str], str | None]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask for a file, following redirects by hand, and give the answer that holds it."""
    start = here = URL(url, encoded=True)
    for _ in range(_HOPS + 1):
        async with session.get(here, allow_redirects=False, proxy=proxy(str(here))) as response:
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                _check(response)
                yield response
                return
        try:
            here = here.join(URL(location, encoded=True))
        except ValueError:
            here = URL()
        at_home = is_loopback(start.host or "") and is_loopback(here.host or "")
        if not here.host or here.scheme not in (("https", "http") if at_home else ("https",)):
            raise ResponseError(
                f"it redirects to {redact(str(here))!r}, which is not https",
                http_status=response.status,
            )
    raise ResponseError(f"it redirects more than {_HOPS} times", http_status=response.status)


def _check(response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status in (403, 404, 410):
        raise NotFoundError(
            "the trial recording is not there any more",
            http_status=status,
            hint="Trial recordings are kept for 30 days; the voice itself still works.",
        )
    if status != 200:
        raise ResponseError("it is not the trial recording", http_status=status)
    if response.content_type == "text/html":
        raise ResponseError("it is an HTML page, not the trial recording", http_status=status)


# --- the file ---


def _open_part(target: Path) -> tuple[Path, BinaryIO]:
    """Open a new file next to the target, so that it can be renamed into place."""
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(target).st_mode):
                raise InvalidRequestError(
                    f"path must be a file's, and {str(target)!r} is a folder.", field="path"
                )
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        return part, open(part, "xb")
    except InvalidRequestError:
        raise
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from None


def _unwritable(target: Path, error: Exception) -> InvalidRequestError:
    why = getattr(error, "strerror", None) or str(error)
    return InvalidRequestError(f"{str(target)!r} cannot be written: {why}.", field="path")
