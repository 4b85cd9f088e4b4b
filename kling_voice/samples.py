"""Local recordings: look into them before anything is uploaded or paid, and host them for a while.

The vendor takes only public URLs, so a local file needs a :class:`SampleHost` that serves it until
the vendor has fetched it. What the vendor takes (``.mp3``/``.wav`` audio or ``.mp4``/``.mov``
video, 5 to 30 s of one clean human voice) is from its reference of the custom-voice API.
"""

import asyncio
import mmap
import os
import re
import stat
from collections.abc import Mapping
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol
from urllib.parse import unquote, urlsplit

from attrs import frozen

from kling_voice import redaction
from kling_voice.errors import ConfigurationError, SampleError
from kling_voice.protocol import is_loopback

SHORTEST: Final = 5.0  # seconds
LONGEST: Final = 30.0  # seconds
CONTENT_TYPES: Final = {
    ".mp3": "audio/mpeg",
    ".wav": "audio/wav",
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
}
_STORAGE: Final = "pip install 'kling-voice[storage]'"


# --- look into a file ---


@frozen
class SampleInfo:
    """What a local recording is.

    Attributes:
        format: ``"mp3"``, ``"wav"``, ``"mp4"`` or ``"mov"``.
        seconds: How long it lasts.
        channels: 1 for mono, 2 for stereo; ``None`` if the file does not tell.
        sample_rate: In Hz; ``None`` if the file does not tell.
        bytes: The size of the file.
    """

    format: str
    seconds: float
    channels: int | None
    sample_rate: int | None
    bytes: int


def inspect_sample(path: str | os.PathLike[str]) -> SampleInfo:
    """Check that the vendor would take a local recording, and tell what it is.

    The vendor takes ``.mp3``, ``.wav``, ``.mp4`` and ``.mov`` with 5 to 30 s of sound. Whether the
    voice is clean, and the only one, is not checked. This reads the file, so call it in a thread
    from async code.

    Args:
        path: The file.

    Raises:
        SampleError: The vendor would refuse it; the text says why and what to do.
        ConfigurationError: The extra ``storage`` is not installed.
    """
    if not isinstance(path, str | os.PathLike):
        raise SampleError(f"A recording is given by its path, not by {type(path).__name__}.")
    shown = repr(os.fspath(path))
    try:
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            raise SampleError(f"{shown} is a folder: give a recording.")
        if not stat.S_ISREG(state.st_mode):
            raise SampleError(f"{shown} is not a regular file: save the recording to one.")
        if state.st_size == 0:
            raise SampleError(f"{shown} is empty: record it again.")
        with open(path, "rb") as file:
            return _inspect(file, os.path.splitext(path)[1].lower(), state.st_size, shown)
    except ConfigurationError:
        raise
    except FileNotFoundError:
        raise SampleError(f"{shown} does not exist: check the path.") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(f"{shown} cannot be read: {why or type(error).__name__}.") from None


def _inspect(file: BinaryIO, extension: str, size: int, shown: str) -> SampleInfo:
    if extension not in CONTENT_TYPES:
        raise SampleError(
            f"{shown} is not named as a recording that the vendor takes: its name must end in"
            " .mp3, .wav, .mp4 or .mov; convert other formats."
        )
    inside = _extensions(file.read(4096))
    if not inside:
        raise SampleError(
            f"{shown} is not a readable {extension} file: nothing in it looks like one."
        )
    if extension not in inside:
        raise SampleError(f"{shown} is named {extension} but is {inside[0]} inside: rename it so.")
    tag = _read_tag(file, extension)
    seconds: float = tag.duration or 0.0 if tag is not None else 0.0
    if tag is None or not 0 < seconds < float("inf"):
        raise SampleError(
            f"{shown} is not a readable {extension} file: no sound could be found in it; save it"
            " again."
        )
    if extension in (".mp4", ".mov"):
        if not tag.samplerate and not _mentions_sound(file):
            raise SampleError(f"{shown} is a video without sound: give one with a voice in it.")
    elif (tag.bitrate or 0) * 1000 / 8 * seconds > size * 1.05 + 4096:
        # The header, which the length is read from, promises more than there is.
        raise SampleError(f"{shown} is cut off: it ends before its sound does; copy it again.")
    if not SHORTEST <= seconds <= LONGEST:
        what = "short" if seconds < SHORTEST else "long"
        raise SampleError(
            f"{shown} is too {what}: it lasts {seconds:.2f} s, and the vendor takes"
            f" {SHORTEST:g} to {LONGEST:g} s."
        )
    return SampleInfo(
        format=extension[1:],
        seconds=seconds,
        channels=tag.channels or None,
        sample_rate=tag.samplerate or None,
        bytes=size,
    )


def _extensions(head: bytes) -> tuple[str, ...]:
    """Give the accepted extensions that fit how a file begins."""
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return (".wav",)
    # An old QuickTime file has no "ftyp" and begins with any of these.
    if head[4:8] == b"ftyp":
        return (".mov", ".mp4") if head[8:12] == b"qt  " else (".mp4", ".mov")
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return (".mov", ".mp4")
    if head.startswith(b"ID3"):
        return (".mp3",)
    frame = head.lstrip(b"\0")[:3]  # some editors pad the beginning
    if len(frame) == 3 and frame[0] == 0xFF and frame[1] >= 0xE0:
        # Layer 0 is not MPEG audio but AAC; 0xF_ and 0x0_ are not bit rates of a frame.
        version, layer, bitrate = frame[1] >> 3 & 3, frame[1] >> 1 & 3, frame[2] >> 4
        if version != 1 and layer != 0 and 0 < bitrate < 15:
            return (".mp3",)
    return ()


def _read_tag(file: BinaryIO, extension: str) -> Any:
    """Read a recording's properties; ``None`` if it is not what it looks like."""
    try:
        from tinytag import TinyTag
    except ImportError:
        raise ConfigurationError(
            f"Local recordings need tinytag: install it with {_STORAGE}."
        ) from None
    file.seek(0)
    parser = ".mp4" if extension == ".mov" else extension
    try:
        tag = TinyTag.get(f"sample{parser}", file_obj=file, tags=False)
    except Exception:  # whatever a broken file brings about in the parser
        return None
    # An ID3 tag may stand in front of another format than MP3.
    return tag if extension != ".mp3" or tag.mime_type == "audio/mpeg" else None


def _mentions_sound(file: BinaryIO) -> bool:
    """Tell whether a film has a sound track ("soun"), in a codec that tinytag does not know."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"soun") >= 0


# --- host it ---


class SampleHost(Protocol):
    """Serves local recordings at public URLs, so that the vendor can fetch them."""

    async def publish(self, path: Path, name: str) -> str:
        """Serve a file and give its URL, which must work until the voice's task has ended.

        Args:
            path: The file.
            name: What to call it: the request's ``external_task_id`` and a random part, so that no
                process discards what another one has published for the same request. It has no
                extension; the file's is to be kept.

        Raises:
            KlingError: It cannot be published.
        """
        ...

    async def discard(self, url: str) -> None:
        """Serve a published file no longer; one that is gone already is no error.

        Args:
            url: What :meth:`publish` gave, perhaps in another process.

        Raises:
            KlingError: It cannot be discarded.
        """
        ...


class ObjectStoreHost:
    """Hosts samples in a bucket: one object per voice, behind a signed URL of limited life.

    A recording of a voice is personal data. The client discards it when its task has ended; an
    expiry rule on the bucket sees to what a killed process leaves behind.

    Endpoint and credentials come from the environment by their usual names (``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, …) or
    from *options*. S3 is the store this is tested with; ``gs://`` and ``az://`` come along with
    obstore. Needs the extra ``storage``.

    Args:
        url: The bucket, and a prefix for the objects' names: ``"s3://bucket/prefix"``.
        expires: How many seconds a signed URL works, at most 604800 (a week). It must outlast the
            time from the upload until the vendor has fetched the file. Default 3600. Temporary
            credentials may end it earlier.
        options: Passed on to ``obstore.store.from_url``, e.g. ``region=``, ``endpoint=``,
            ``access_key_id=``, ``client_options=``, ``retry_config=``.

    Raises:
        ConfigurationError: The URL names no bucket that can sign URLs, a setting is wrong, or the
            extra is not installed.
    """

    def __init__(self, url: str, *, expires: float = 3600.0, **options: Any) -> None:
        self._url = _bucket_url(url)
        is_number = isinstance(expires, int | float) and not isinstance(expires, bool)
        if not is_number or not 1 <= expires <= 604800:
            raise ConfigurationError(
                f"expires must be 1 to 604800 seconds (a week), not {redaction.brief(expires)}."
            )
        self._expires = timedelta(seconds=int(expires))
        self._store = _open_store(self._url, options)

    def __repr__(self) -> str:
        return f"ObjectStoreHost({self._url!r})"

    async def publish(self, path: str | os.PathLike[str], name: str) -> str:
        """Put a file into the bucket and give a signed URL of it; the same *name* overwrites.

        Raises:
            SampleError: The file cannot be read, or the store cannot be reached.
            ConfigurationError: The store refuses the credentials, or has no such bucket.
        """
        extension = os.path.splitext(path)[1].lower()
        key = _safe(name) + extension
        try:
            content = await asyncio.to_thread(Path(path).read_bytes)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise SampleError(f"{os.fspath(path)!r} cannot be read: {why}.") from None
        kind = CONTENT_TYPES.get(extension, "application/octet-stream")
        import obstore

        try:
            await obstore.put_async(self._store, key, content, attributes={"Content-Type": kind})
            return await self._sign(key)
        except Exception as error:
            failure = self._failure("cannot take the sample", error)
        raise failure  # out here, without the store's own error, which may quote credentials

    async def discard(self, url: str) -> None:
        """Delete the object that a signed URL names, expired or not, whichever process made it.

        An object that is gone already, its bucket even, is no error.

        Raises:
            SampleError: It is not a URL of this host, or the store cannot be reached; the object
                is still there.
            ConfigurationError: The store refuses the credentials.
        """
        import obstore

        key = unquote(_place(url).rpartition("/")[2])
        try:
            ours = bool(key) and _place(await self._sign(key)) == _place(url)
            if ours:
                await obstore.delete_async(self._store, key)
                return
        except FileNotFoundError:
            return
        except Exception as error:
            failure = self._failure(f"cannot delete the sample {key!r}", error)
        else:
            failure = SampleError(f"{self._url} did not publish {_place(url)!r}.")
        raise failure

    async def _sign(self, key: str) -> str:
        import obstore

        return await obstore.sign_async(self._store, "GET", key, self._expires)

    def _failure(self, what: str, error: Exception) -> ConfigurationError | SampleError:
        """Tell a store's error without the answer it quotes, which may hold key and signature."""
        text = str(error)
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        told = " ".join(found[1] for found in (status, code) if found)
        if "169.254." in text or "redential" in text.partition("\n")[0]:
            return ConfigurationError(
                f"{self._url} {what}: there are no usable credentials. Set AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY."
            )
        if status and status[1] in ("301", "307", "400", "401", "403", "404"):
            return ConfigurationError(
                f"{self._url} {what}: the store refuses it ({told}). Check the bucket's name, its"
                " region and endpoint (AWS_REGION, AWS_ENDPOINT_URL) and what the key may do."
            )
        return SampleError(
            f"{self._url} {what}: {told or 'the store cannot be reached'}. Check the endpoint"
            " (AWS_ENDPOINT_URL) and try again."
        )


def _bucket_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = bool(parts.scheme and parts.hostname) and "@" not in parts.netloc
    except (ValueError, AttributeError, TypeError):
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigurationError(
            "A sample host must be a bucket's URL such as s3://bucket/prefix, without credentials"
            " in it."
        )
    return url.rstrip("/")


def _open_store(url: str, options: dict[str, Any]) -> Any:
    try:
        from obstore.store import AzureStore, GCSStore, S3Store, from_url
    except ImportError:
        raise ConfigurationError(
            f"Sample hosts in a bucket need obstore: install it with {_STORAGE}."
        ) from None
    # obstore's own patience is three minutes a call; a batch must not stall so long on each file.
    options.setdefault("retry_config", {"max_retries": 5, "retry_timeout": timedelta(seconds=45)})
    try:
        store: Any = from_url(url, **options)
        if (
            isinstance(store, S3Store)
            and "client_options" not in options
            and _is_local(store.config)
        ):
            store = from_url(url, **options, client_options={"allow_http": True})
    except Exception as error:
        failure = ConfigurationError(
            f"{url} is no usable bucket such as s3://bucket/prefix: {_first_line(error)}."
        )
    else:
        if isinstance(store, S3Store | GCSStore | AzureStore):
            return store
        failure = ConfigurationError(
            f"{url} cannot sign URLs: give a bucket such as s3://bucket/prefix."
        )
    raise failure


def _is_local(config: Mapping[str, Any]) -> bool:
    """Tell whether S3 is on this machine, so that http will do; settings win over environment."""
    given = [str(value) for name, value in config.items() if "endpoint" in name] or [
        value
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        if (value := os.environ.get(name))
    ]
    return bool(given) and all(is_loopback(urlsplit(value).hostname or "") for value in given)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(". ")[:200] or type(error).__name__


def _place(url: str) -> str:
    """Give a URL without its query, where the signature is."""
    return url.partition("?")[0]


def _safe(name: str) -> str:
    """Make an object's name of any text: the text itself where it needs no escaping in a URL."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name):
        return name
    digest = sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-')[:64]}-{digest}"
