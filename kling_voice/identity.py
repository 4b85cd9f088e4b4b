"""What makes a request of a batch the same request the next time it is run: derived ids."""

import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path

from kling_voice.errors import InvalidRequestError, SampleError
from kling_voice.models import VoiceRequest

ANY_PREFIX = "kv-"  # what every id made by this package begins with
_BATCH_DIGEST = 5  # bytes, 10 characters
_KEY_DIGEST = 10  # bytes, 20 characters: 80 bits, so that a million requests do not collide


def _digest(size: int, *parts: str | bytes) -> bytes:
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        total.update(len(data).to_bytes(8, "big") + data)
    return total.digest()[:size]


@lru_cache(maxsize=16)  # asked for with each request of a batch
def batch_prefix(batch_id: str) -> str:
    """Give what all external ids of a batch begin with."""
    return f"{ANY_PREFIX}{_digest(_BATCH_DIGEST, batch_id).hex()}-"


def derived_id(batch_id: str, key: str, attempt: int = 0) -> str:
    """Give the external id of one request of a batch: short, and safe in a URL's path.

    Args:
        batch_id: The batch.
        key: What tells the request from the others of the batch.
        attempt: 0 for the first task; each further try of a failed one has an id of its own.
    """
    word = _digest(_KEY_DIGEST, batch_id, key).hex()
    return nth_id(f"{batch_prefix(batch_id)}{word}", attempt)


def nth_id(external_task_id: str, attempt: int) -> str:
    """Give the id of a further try of a failed task."""
    return external_task_id if attempt == 0 else f"{external_task_id}-r{attempt}"


def default_key(request: VoiceRequest) -> str:
    """Give the key of a request that names none: a digest of its name and its source.

    A file counts by its bytes, a URL verbatim. Reads the file, so call it in a thread.

    Raises:
        SampleError: The file cannot be read.
        InvalidRequestError: There is no source.
    """
    name = request.voice_name if isinstance(request.voice_name, str) else repr(request.voice_name)
    if request.voice_file is not None:
        return _digest(32, name, "file", _content(request.voice_file)).hex()
    if request.voice_url is not None:
        return _digest(32, name, "url", str(request.voice_url)).hex()
    if request.video_id is not None:
        return _digest(32, name, "video", str(request.video_id)).hex()
    raise InvalidRequestError(
        "Give exactly one of voice_url, video_id and voice_file, not none.", field="source"
    )


def _content(path: str | os.PathLike[str]) -> bytes:
    """Give the digest of a file's bytes.

    Raises:
        SampleError: It cannot be read, or is not a regular file, whose bytes would have an end.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is not a regular file")
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SampleError(f"{str(path)!r} cannot be read: {reason}.") from None


def seen_digest(external_task_id: str) -> bytes:
    """Give the few bytes by which a batch remembers that it has had a request."""
    return _digest(_KEY_DIGEST, external_task_id)
