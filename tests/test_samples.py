"""Local recordings: what is refused and why; and hosting them in a bucket, on a real S3 API."""

import asyncio
import os
import pickle
import random
import shutil
import struct
import sys
import traceback
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from moto.server import ThreadedMotoServer

from kling_voice.emulator import Emulator, recordings
from kling_voice.errors import ConfigurationError, SampleError
from kling_voice.samples import ObjectStoreHost, SampleHost, inspect_sample

ADA = recordings()["ada.mp3"]
JAMES = recordings()["james.wav"]
SECRET = "a-secret-that-nothing-may-repeat"


def write_wav(path: Path, seconds: float, *, channels: int = 1, rate: int = 8000) -> Path:
    """Write a silent PCM file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(round(seconds * rate) * 2 * channels))
    return path


def atom(kind: bytes, *parts: bytes) -> bytes:
    """Build one atom of an MPEG-4 file."""
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def film(seconds: float, *, brand: bytes = b"isom", sound: bool = True, ftyp: bool = True) -> bytes:
    """Build a film of a given length, with a sound track in a codec of its own or none."""
    header = struct.pack(">IIIII", 0, 0, 0, 1000, round(seconds * 1000)) + bytes(80)
    handler = bytes(8) + (b"soun" if sound else b"vide") + bytes(12)
    track = atom(b"trak", atom(b"mdia", atom(b"hdlr", handler)))
    moov = atom(b"moov", atom(b"mvhd", header), track)
    return (atom(b"ftyp", brand, bytes(4)) if ftyp else b"") + moov + atom(b"mdat", bytes(1000))


# --- inspect_sample ---


@pytest.mark.parametrize("path", recordings().values(), ids=recordings())
def test_shipped_recordings_are_good(path: Path) -> None:
    """The recordings that come with the package pass, and are told as what they are."""
    info = inspect_sample(path)
    assert info.format == path.suffix[1:]
    assert 5 <= info.seconds <= 30
    assert info.channels == 1
    assert info.sample_rate
    assert info.bytes == path.stat().st_size


def test_wav_is_told_exactly(tmp_path: Path) -> None:
    """Length, channels and sample rate of a .wav are its own."""
    info = inspect_sample(write_wav(tmp_path / "a.WAV", 6.5, channels=2, rate=16000))
    assert (info.format, info.seconds, info.channels, info.sample_rate) == ("wav", 6.5, 2, 16000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.mp4", film(12)),
        ("a.mov", film(12, brand=b"qt  ")),
        ("a.mov", film(12, ftyp=False)),
        ("a.mp4", film(12, brand=b"qt  ")),
    ],
    ids=["mp4", "mov", "old mov", "mov as mp4"],
)
def test_films_pass(tmp_path: Path, name: str, content: bytes) -> None:
    """Films of both kinds pass if they have a sound track, whatever its codec."""
    path = tmp_path / name
    path.write_bytes(content)
    info = inspect_sample(path)
    assert (info.format, info.seconds, info.sample_rate) == (name[-3:], 12.0, None)


@pytest.mark.parametrize("seconds", [5.0, 30.0])
def test_limits_are_inclusive(tmp_path: Path, seconds: float) -> None:
    """Exactly 5 s and exactly 30 s pass."""
    assert inspect_sample(write_wav(tmp_path / "a.wav", seconds)).seconds == seconds


def copied(source: Path, name: str) -> Callable[[Path], Path]:
    """Give a maker of a copy under another name."""
    return lambda folder: Path(shutil.copy(source, folder / name))


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    """Give a maker of a file with a given content."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def folder_named(name: str) -> Callable[[Path], Path]:
    """Give a maker of a folder."""

    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


REFUSED = {
    "missing": (lambda folder: folder / "no.mp3", "does not exist"),
    "folder": (folder_named("a.mp3"), "is a folder"),
    "empty": (written("a.mp3", b""), "is empty"),
    "null byte": (lambda folder: folder / "a\0.mp3", "cannot be read"),
    "endless name": (lambda folder: folder / ("a" * 5000 + ".mp3"), "cannot be read"),
    "device": (lambda folder: Path(os.devnull), "regular file"),
    "no extension": (copied(ADA, "ada"), r"must end in \.mp3"),
    "other extension": (copied(ADA, "ada.ogg"), r"must end in \.mp3"),
    "mp3 named wav": (copied(ADA, "ada.wav"), r"named \.wav but is \.mp3 inside"),
    "wav named mp3": (copied(JAMES, "james.mp3"), r"named \.mp3 but is \.wav inside"),
    "mp4 named mp3": (written("a.mp3", film(10)), r"is \.mp4 inside"),
    "mov named wav": (written("a.wav", film(10, brand=b"qt  ")), r"is \.mov inside"),
    "a page": (written("a.mp3", b"<html>" * 999), "nothing in it looks like one"),
    "Ogg inside": (written("a.mp3", b"OggS" + bytes(999)), "nothing in it looks like one"),
    "AAC inside": (written("a.mp3", b"\xff\xf1\x50\x80" * 999), "nothing in it looks like one"),
    "bare ID3": (written("a.mp3", b"ID3\x04\0\0\0\0\0\0" + bytes(999)), "no sound"),
    "FLAC after ID3": (written("a.mp3", b"ID3\x04\0\0\0\0\0\0fLaC" + bytes(999)), "no sound"),
    "bare header": (written("a.wav", b"RIFF\0\0\0\0WAVE"), "no sound"),
    "bare ftyp": (written("a.mp4", atom(b"ftyp", b"isom")), "no sound"),
    "silent film": (written("a.mp4", film(10, sound=False)), "video without sound"),
    "short": (lambda folder: write_wav(folder / "a.wav", 4.99), r"too short.*4\.99 s.*5 to 30 s"),
    "long": (lambda folder: write_wav(folder / "a.wav", 30.01), r"too long.*30\.01 s"),
    "long film": (written("a.mov", film(31)), "too long"),
    "cut off": (written("a.wav", JAMES.read_bytes()[:9000]), "cut off"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, make: Callable[[Path], Path], why: str) -> None:
    """A file that the vendor would refuse is a SampleError that names it and says why."""
    path = make(tmp_path)
    with pytest.raises(SampleError, match=why) as caught:
        inspect_sample(path)
    assert repr(str(path)) in str(caught.value)


def test_what_is_no_path() -> None:
    """Neither a recording nor a bucket is given by it, and the error is this package's."""
    nothing: Any = None
    places: Any = ["s3://voices"]
    with pytest.raises(SampleError, match="NoneType"):
        inspect_sample(nothing)
    with pytest.raises(ConfigurationError, match="bucket"):
        ObjectStoreHost(places)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs file permissions")
def test_unreadable(tmp_path: Path) -> None:
    """A file that may not be read says so."""
    path = Path(shutil.copy(ADA, tmp_path))
    path.chmod(0)
    with pytest.raises(SampleError, match="cannot be read: Permission denied"):
        inspect_sample(path)


def test_without_tinytag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error names it."""
    monkeypatch.setitem(sys.modules, "tinytag", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kling-voice\[storage\]'"):
        inspect_sample(ADA)


def test_broken_files_never_surprise(tmp_path: Path) -> None:
    """Whatever is done to a file's bytes, it passes or is a SampleError."""
    chance = random.Random(1)
    sources = {
        ".mp3": ADA.read_bytes()[:20000],
        ".wav": JAMES.read_bytes()[:20000],
        ".mp4": film(9),
        ".mov": film(9, ftyp=False),
    }
    passed = 0
    for number in range(600):
        extension, content = chance.choice(list(sources.items()))
        broken = bytearray(content)
        for _ in range(chance.randint(1, 20)):
            broken[chance.randrange(chance.choice((16, 200, len(broken))))] = chance.randrange(256)
        if chance.random() < 0.3:
            broken = broken[: chance.randrange(len(broken))]
        if chance.random() < 0.1:
            broken = bytearray(broken[:12] + chance.randbytes(3000))
        path = tmp_path / f"{number}{extension}"
        path.write_bytes(broken)
        try:
            info = inspect_sample(path)
        except SampleError:
            continue
        assert 5 <= info.seconds <= 30
        passed += 1
    assert passed  # some damage is harmless


# --- ObjectStoreHost ---


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server on loopback with a bucket "voices"; its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/voices", method="PUT"))
    yield url
    server.stop()


@pytest.fixture
def environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The usual settings of S3 in the environment; the server's URL."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return s3


def objects(s3: str) -> str:
    """Give the server's list of the bucket, as it is."""
    with urllib.request.urlopen(f"{s3}/voices?list-type=2") as answer:
        listing: bytes = answer.read()
    return listing.decode()


async def fetch(url: str) -> tuple[int, str, bytes]:
    """Fetch a URL as the vendor would: without any credentials.

    Not by aiohttp: moto names its server twice, which aiohttp takes amiss in asyncio's debug mode.
    """

    def read() -> tuple[int, str, bytes]:
        try:
            answer = urllib.request.urlopen(url)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, answer.headers.get_content_type(), answer.read()

    return await asyncio.to_thread(read)


async def test_publish_and_discard(environment: str) -> None:
    """A published file is fetched by its URL with its type, and is gone once discarded."""
    host: SampleHost = ObjectStoreHost("s3://voices/some/prefix/")
    url = await host.publish(ADA, "kv-1")
    assert urlsplit(url).path == "/voices/some/prefix/kv-1.mp3"
    assert await fetch(url) == (200, "audio/mpeg", ADA.read_bytes())
    await host.discard(url)
    assert (await fetch(url))[0] == 404
    assert "kv-1" not in objects(environment)
    await host.discard(url)  # gone already


async def test_discard_from_another_process(environment: str) -> None:
    """The object is found from the URL alone: an expired one, and in a new process."""
    url = await ObjectStoreHost("s3://voices/p", expires=1).publish(JAMES, "kv-2")
    assert "X-Amz-Expires=1&" in url
    await ObjectStoreHost("s3://voices/p").discard(url)
    assert "kv-2" not in objects(environment)


async def test_discard_of_what_is_gone(environment: str) -> None:
    """What is gone already is discarded, though its whole bucket is."""
    await ObjectStoreHost("s3://gone").discard(f"{environment}/gone/kv-8.mp3")


async def test_discard_touches_nothing_else(environment: str) -> None:
    """A URL of another bucket, prefix or host is refused, and nothing is deleted."""
    host = ObjectStoreHost("s3://voices/mine")
    url = await ObjectStoreHost("s3://voices/theirs").publish(ADA, "kv-3")
    await host.publish(ADA, "kv-3")
    for other in (url, "https://example.com/voices/mine/kv-3.mp3", "https://example.com", ""):
        with pytest.raises(SampleError, match="did not publish"):
            await host.discard(other)
    assert objects(environment).count("kv-3") == 2


@pytest.mark.parametrize(
    "name", ["a/b", "../up", "..", "é ü?#%2F", "x" * 300, "", " ", ".hidden", "名"]
)
async def test_any_name(environment: str, name: str) -> None:
    """Any external id makes one object of its own with a plain name, and can be discarded."""
    host = ObjectStoreHost("s3://voices/names")
    url = await host.publish(ADA, name)
    assert await host.publish(ADA, name + "'") != url
    folder, _, plain = urlsplit(url).path.rpartition("/")
    assert folder == "/voices/names"
    assert plain.isascii()
    assert "%" not in plain
    assert (await fetch(url))[2] == ADA.read_bytes()
    await host.discard(url)
    assert (await fetch(url))[0] == 404


async def test_same_name_overwrites(environment: str) -> None:
    """A second try under the same name leaves one object, with the new content."""
    host = ObjectStoreHost("s3://voices/again")
    await host.publish(ADA, "kv-4")
    url = await host.publish(recordings()["alan.mp3"], "kv-4")
    assert objects(environment).count("again/kv-4") == 1
    assert (await fetch(url))[2] == recordings()["alan.mp3"].read_bytes()


async def test_vendor_fetches_the_signed_url(environment: str) -> None:
    """The emulator, which checks what it fetches, makes a voice of a signed URL."""
    async with Emulator(fetch_samples=True, task_seconds=0.05) as emulator:
        url = await ObjectStoreHost("s3://voices").publish(JAMES, "kv-5")
        token = {"Authorization": f"Bearer {emulator.api_key}"}
        async with aiohttp.ClientSession(emulator.base_url, headers=token) as session:
            body = {"voice_name": "James", "voice_url": url, "external_task_id": "kv-5"}
            await session.post("/v1/general/custom-voices", json=body)
            for _ in range(500):
                if emulator.tasks[0].ended:
                    break
                await asyncio.sleep(0.02)
    assert (emulator.tasks[0].status, emulator.tasks[0].failure) == ("succeed", None)


async def test_loop_stays_free(environment: str) -> None:
    """An upload does not hold the event loop up."""
    host = ObjectStoreHost("s3://voices/busy")
    await host.publish(ADA, "first")  # imports and connections
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    pulse = asyncio.create_task(beat())
    await asyncio.gather(*(host.publish(ADA, f"kv-{number}") for number in range(8)))
    pulse.cancel()
    assert beats > 100


async def test_file_that_vanished(environment: str, tmp_path: Path) -> None:
    """A file that is gone when it is to be uploaded is a SampleError that names it."""
    with pytest.raises(SampleError, match=r"gone\.mp3' cannot be read: No such file"):
        await ObjectStoreHost("s3://voices").publish(tmp_path / "gone.mp3", "kv-6")


async def told(host: ObjectStoreHost) -> str:
    """Let a host fail, and give all that a log could show of it."""
    with pytest.raises((SampleError, ConfigurationError)) as caught:
        await host.publish(ADA, "kv-7")
    error = caught.value
    text = "".join(traceback.format_exception(error)) + repr(error) + repr(host)
    text += repr(error.__context__) + repr(pickle.loads(pickle.dumps(error)))
    assert SECRET not in text
    assert "Signature=" not in text
    assert "f00" not in text
    return f"{type(error).__name__} {error}"


async def test_no_such_bucket(environment: str) -> None:
    """A bucket that is not there is a ConfigurationError that says what to check."""
    text = await told(ObjectStoreHost("s3://nowhere"))
    assert text.startswith("ConfigurationError s3://nowhere cannot take the sample")
    assert "404 NoSuchBucket" in text


async def test_unreachable(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that cannot be reached is a SampleError, soon."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    host = ObjectStoreHost("s3://voices", retry_config={"max_retries": 1})
    assert "cannot be reached" in await told(host)
    with pytest.raises(SampleError, match=r"cannot delete the sample 'a\.mp3'"):
        await host.discard("http://127.0.0.1:9/voices/a.mp3?X-Amz-Signature=f00")


async def test_refused_key(environment: str, unused_tcp_port: int) -> None:
    """What the store says of a key it refuses is told by its code alone."""
    answer = (
        "<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>the-key</AWSAccessKeyId>"
        f"<StringToSign>{SECRET}</StringToSign><Signature>f00</Signature></Error>"
    )

    async def refuse(request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=403, text=answer)

    server = aiohttp.web.ServerRunner(aiohttp.web.Server(refuse))
    await server.setup()
    await aiohttp.web.TCPSite(server, "127.0.0.1", unused_tcp_port).start()
    text = await told(
        ObjectStoreHost("s3://voices", endpoint=f"http://127.0.0.1:{unused_tcp_port}")
    )
    await server.cleanup()
    assert text.startswith("ConfigurationError")
    assert "403 SignatureDoesNotMatch" in text
    assert "the-key" not in text


async def test_no_credentials(
    environment: str, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    """Where neither the environment nor the machine has any, it is told which to set."""

    async def know_none(request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=200 if request.method == "PUT" else 404, text="f00")

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    machine = f"http://127.0.0.1:{unused_tcp_port}"  # where clouds tell a machine its own
    server = aiohttp.web.ServerRunner(aiohttp.web.Server(know_none))
    await server.setup()
    await aiohttp.web.TCPSite(server, "127.0.0.1", unused_tcp_port).start()
    text = await told(ObjectStoreHost("s3://voices", metadata_endpoint=machine))
    await server.cleanup()
    assert text.startswith("ConfigurationError")
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY." in text


async def test_http_is_for_this_machine(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording does not travel to another machine without TLS."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid")
    host = ObjectStoreHost("s3://voices", retry_config={"max_retries": 0})
    assert "SampleError" in await told(host)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "voices",
        "s3://",
        "s3://key:secret@voices",
        "s3://voices?x=1",
        "ftp://voices/p",
        "memory:///",
        "memory://x",
        "https://example.com/p",
        "file:///tmp",
        "s3://[",
        None,
    ],
)
def test_not_a_bucket(url: str) -> None:
    """What is not a bucket that can sign URLs is refused at once, without repeating secrets."""
    with pytest.raises(ConfigurationError) as caught:
        ObjectStoreHost(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("expires", [0, -1, 604801, float("nan"), True])
def test_life_of_urls_is_limited(environment: str, expires: float) -> None:
    """A signed URL works for at least a second and at most a week."""
    with pytest.raises(ConfigurationError, match="expires"):
        ObjectStoreHost("s3://voices", expires=expires)


def test_unknown_option(environment: str) -> None:
    """An option that the store does not know is named."""
    with pytest.raises(ConfigurationError, match="nonsense"):
        ObjectStoreHost("s3://voices", nonsense="1")


def test_repr_shows_no_secret(environment: str) -> None:
    """The repr tells the bucket, and no credentials."""
    host = ObjectStoreHost("s3://voices/p", secret_access_key=SECRET)
    assert repr(host) == "ObjectStoreHost('s3://voices/p')"


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error names it."""
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kling-voice\[storage\]'"):
        ObjectStoreHost("s3://voices")
