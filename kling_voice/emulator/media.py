"""Sound: the shipped recordings, the samples that the emulator hosts, and how it judges them."""

from __future__ import annotations

import asyncio
import importlib.util
import io
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from attrs import frozen

if TYPE_CHECKING:
    from tinytag import TinyTag

__all__ = [
    "Media",
    "Sample",
    "SampleError",
    "content_type",
    "fetch_sample",
    "recordings",
    "require_tinytag",
]

_FOLDER = Path(__file__).with_name("recordings")
_SHORTEST, _LONGEST = 5.0, 30.0
_LARGEST = 50 * 1024 * 1024
_NO_FETCHING = (
    ": the emulator fetches it as the vendor would; --no-fetch-samples (in Python,"
    " fetch_samples=False) takes any URL"
)
_CONTENT_TYPES = {
    ".mp3": "audio/mpeg",
    ".wav": "audio/wav",
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
}


def recordings() -> dict[str, Path]:
    """The shipped recordings of (synthetic) voices by name, such as `ada.mp3`."""
    return {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _CONTENT_TYPES}


def content_type(path: str) -> str:
    """The content type of a sample by its extension."""
    return _CONTENT_TYPES.get(_extension(path), "application/octet-stream")


def require_tinytag() -> None:
    """Fail with a hint if the library that reads samples is not installed."""
    if importlib.util.find_spec("tinytag") is None:
        raise ImportError(
            "fetch_samples needs tinytag: install it with pip install 'kling-voice[emulator]'"
        )


class SampleError(Exception):
    """The sample cannot be made a voice; the text is the reason that the task gives."""


@frozen
class Sample:
    """A sample that was fetched and found good.

    Attributes:
        content: its bytes.
        extension: of the URL, in lower case, dot included.
    """

    content: bytes
    extension: str


async def fetch_sample(session: aiohttp.ClientSession, url: str, *, seconds: float) -> Sample:
    """Fetch a sample and check that the vendor would take it, or raise `SampleError`."""
    extension = _extension(unquote(urlsplit(url).path))
    if extension not in _CONTENT_TYPES:
        raise SampleError("voice_url must end in .mp3, .wav, .mp4 or .mov")
    content = await _download(session, url, seconds)
    await asyncio.to_thread(_inspect, content, extension)
    return Sample(content, extension)


async def _download(session: aiohttp.ClientSession, url: str, seconds: float) -> bytes:
    timeout = aiohttp.ClientTimeout(total=seconds)
    content = bytearray()
    try:
        async with session.get(url, timeout=timeout) as response:
            if response.status != 200:
                raise SampleError(f"voice_url answered HTTP {response.status}{_NO_FETCHING}")
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > _LARGEST:
                    raise SampleError(f"the sample is larger than {_LARGEST >> 20} MB")
    except TimeoutError:
        raise SampleError(f"voice_url took longer than {seconds:g} s{_NO_FETCHING}") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = f"voice_url could not be fetched ({type(error).__name__})"
        raise SampleError(f"{why}{_NO_FETCHING}") from None
    return bytes(content)


def _inspect(content: bytes, extension: str) -> None:
    inside = _formats(content)
    tag = _read_tag(content, inside[0]) if inside else None
    if tag is None:
        raise SampleError(f"the sample is not a readable {extension} file")
    if extension not in inside:
        raise SampleError(f"the sample is called {extension} but is {inside[0]} inside")
    if not tag.duration or not tag.samplerate:
        raise SampleError("the sample has no sound")
    if not _SHORTEST <= tag.duration <= _LONGEST:
        raise SampleError(
            f"the audio lasts {tag.duration:.1f} s; it must last {_SHORTEST:g} to {_LONGEST:g} s"
        )


def _formats(content: bytes) -> tuple[str, ...]:
    """The extensions that fit what is inside a sample."""
    if content.startswith(b"RIFF") and content[8:12] == b"WAVE":
        return (".wav",)
    if content[4:8] == b"ftyp":
        return (".mp4", ".mov")
    if content.startswith(b"ID3") or (content[:1] == b"\xff" and content[1:2] >= b"\xe0"):
        return (".mp3",)
    return ()


def _read_tag(content: bytes, extension: str) -> TinyTag | None:
    from tinytag import TinyTag, TinyTagException

    try:
        return TinyTag.get(f"sample{extension}", file_obj=io.BytesIO(content), tags=False)
    except TinyTagException:
        return None


class Media:
    """The files that the emulator serves under `/media/`; any thread may publish and discard."""

    def __init__(self) -> None:
        self._recordings = {
            f"/media/recordings/{name}": path for name, path in recordings().items()
        }
        self._published: dict[str, bytes] = {}
        self._trials: dict[str, bytes] = {}
        self._kept: dict[bytes, bytes] = {}

    async def publish(self, path: str | Path, name: str) -> str:
        """Serve a copy of a local file; answers the path of its URL, the same one each time."""
        url_path, content = await asyncio.to_thread(_read_sample, Path(path), name)
        self._published[url_path] = content
        return url_path

    def discard(self, url_path: str) -> None:
        """Serve a published file no more; an unknown one is no error."""
        self._published.pop(url_path, None)

    def file(self, url_path: str) -> bytes | None:
        """A recording or a published sample, or None."""
        if url_path in self._recordings:
            return self._recordings[url_path].read_bytes()
        return self._published.get(url_path)

    def keep_trial(self, task_id: str, sample: Sample) -> None:
        """Let a voice's trial play its sample; equal samples are kept once."""
        content = sample.content
        self._trials[task_id] = self._kept.setdefault(sha256(content).digest(), content)

    def trial(self, task_id: str) -> bytes:
        """What the trial of a voice plays: its sample, or else one of the .mp3 recordings."""
        if task_id in self._trials:
            return self._trials[task_id]
        playable = [path for path in self._recordings.values() if path.suffix == ".mp3"]
        return playable[int(task_id) % len(playable)].read_bytes()


def _read_sample(path: Path, name: str) -> tuple[str, bytes]:
    suffix = "" if name.lower().endswith(path.suffix.lower()) else path.suffix
    folder = sha256(f"{name}\n{path.absolute()}".encode()).hexdigest()[:16]
    return f"/media/samples/{folder}/{quote(name + suffix, safe='')}", path.read_bytes()


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower()
