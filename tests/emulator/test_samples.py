"""Samples: hosting them, fetching them as the vendor does, and judging what was fetched."""

import asyncio
import io
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from tinytag import TinyTag

from kling_voice.emulator import Emulator, recordings

from .support import Api, inbox, serving, serving_app, until

SAMPLES = Path(__file__).with_name("samples")
RECORDINGS = recordings()
WAY_OUT = (
    ": the emulator fetches it as the vendor would; --no-fetch-samples (in Python,"
    " fetch_samples=False) takes any URL"
)


def wav(seconds: float) -> bytes:
    """A silent wav."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(1)
        writer.setframerate(8000)
        writer.writeframes(b"\x80" * int(8000 * seconds))
    return file.getvalue()


async def outcome(api: Api, **source: object) -> tuple[str, str]:
    """Create a voice of a source and await its end: the status and the reason."""
    task_id = (await api.create(**source)).data["task_id"]
    api.emu.advance(9)
    await until(lambda: api.emu.in_flight == 0)
    task = (await api.get(task_id)).data
    return task["task_status"], task["task_status_msg"]


@asynccontextmanager
async def slow_host(gate: asyncio.Event) -> AsyncIterator[str]:
    """A recording that is served once the gate opens; gives its URL."""

    async def serve(request: web.Request) -> web.Response:
        await gate.wait()
        return web.Response(body=RECORDINGS["ada.mp3"].read_bytes())

    async with serving_app("/ada.mp3", serve) as base_url:
        yield f"{base_url}/ada.mp3"


@pytest.mark.parametrize("name", RECORDINGS)
async def test_a_shipped_recording_becomes_a_voice(name: str) -> None:
    """Each recording, published by the emulator itself, succeeds; its trial plays it."""
    async with serving(fetch_samples=True) as api:
        url = await api.emu.publish(RECORDINGS[name], "my voice")
        assert url.endswith(f"/my%20voice{RECORDINGS[name].suffix}")
        assert await api.emu.publish(RECORDINGS[name], "my voice") == url
        assert await outcome(api, voice_url=url) == ("succeed", "")
        await api.emu.discard(url)
        (task,) = await api.page()
        trial = task["task_result"]["voices"][0]["trial_url"]
        async with api.session.get(trial) as response:
            assert await response.read() == RECORDINGS[name].read_bytes()
        async with api.session.get(url) as response:
            assert response.status == 404
        assert api.emu.requests["GET /media/samples/{name}"] == 2
        assert api.emu.requests["GET /media/trials/{name}"] == 1


def test_the_recordings_are_what_the_vendor_takes() -> None:
    """Two or three voices of 6 to 10 seconds, small, of both audio formats."""
    assert {path.suffix for path in RECORDINGS.values()} == {".mp3", ".wav"}
    for path in RECORDINGS.values():
        assert 6 <= (TinyTag.get(path).duration or 0) <= 10
        assert path.stat().st_size < 155_000


async def test_the_recordings_are_served_under_stable_urls() -> None:
    """Whoever runs the emulator may clone a recording by its name."""
    async with serving(fetch_samples=True) as api:
        for name in RECORDINGS:
            url = f"{api.emu.base_url}/media/recordings/{name}"
            assert await outcome(api, voice_url=url) == ("succeed", "")


@pytest.mark.parametrize("name", ["talk.mp4", "talk.mov"])
async def test_a_video_with_sound_becomes_a_voice(name: str) -> None:
    """Both kinds of video are taken for their sound; a name may bear its extension already."""
    async with serving(fetch_samples=True) as api:
        url = await api.emu.publish(SAMPLES / name, name)
        assert url.endswith(f"/{name}")
        assert await outcome(api, voice_url=url) == ("succeed", "")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("short.wav", wav(3.2), "the audio lasts 3.2 s; it must last 5 to 30 s"),
        ("long.wav", wav(30.5), "the audio lasts 30.5 s; it must last 5 to 30 s"),
        ("lie.mp3", wav(6), "the sample is called .mp3 but is .wav inside"),
        ("lie.wav", (SAMPLES / "talk.mp4").read_bytes(), "called .wav but is .mp4"),
        ("lie.mp4", RECORDINGS["ada.mp3"].read_bytes(), "called .mp4 but is .mp3"),
        ("none.wav", wav(0), "no sound"),
        ("silent.mp4", (SAMPLES / "silent.mp4").read_bytes(), "no sound"),
        ("text.wav", b"this is not a recording", "not a readable .wav"),
        ("empty.mp3", b"", "not a readable .mp3"),
        ("odd.wav", wav(6)[:30], "not a readable .wav"),
        ("big.wav", b"\0" * (51 << 20), "larger than 50 MB"),
    ],
)
async def test_a_bad_sample_fails_the_task(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    """What the vendor would not take ends as failed, with a reason that a user can act on."""
    (tmp_path / name).write_bytes(content)
    async with serving(fetch_samples=True) as api:
        url = await api.emu.publish(tmp_path / name, name)
        status, told = await outcome(api, voice_url=url)
        assert status == "failed"
        assert reason in told


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/media/samples/gone.mp3", f"voice_url answered HTTP 404{WAY_OUT}"),
        ("/page.html", "voice_url must end in .mp3, .wav, .mp4 or .mov"),
    ],
)
async def test_a_url_without_a_sample_fails_the_task(path: str, reason: str) -> None:
    """A URL that answers an error, or names no sample, fails the task."""
    async with serving(fetch_samples=True) as api:
        assert await outcome(api, voice_url=api.emu.base_url + path) == ("failed", reason)


async def test_nobody_at_the_url_fails_the_task() -> None:
    """A URL where nobody listens fails the task."""
    async with serving(fetch_samples=True) as api:
        status, told = await outcome(api, voice_url="http://127.0.0.1:1/a.mp3")
        assert status == "failed"
        assert told == f"voice_url could not be fetched (ClientConnectorError){WAY_OUT}"


async def test_a_slow_url_fails_the_task() -> None:
    """A URL that does not answer in time fails the task."""
    gate = asyncio.Event()
    async with slow_host(gate) as url, serving(fetch_samples=True, fetch_seconds=0.05) as api:
        status, told = await outcome(api, voice_url=url)
        assert (status, told) == ("failed", f"voice_url took longer than 0.05 s{WAY_OUT}")
        gate.set()


async def test_a_mistake_in_checking_fails_the_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the library for samples does, the task ends and gives its slot back."""
    monkeypatch.setattr("tinytag.TinyTag.get", lambda *_, **__: 1 / 0)
    async with serving(fetch_samples=True) as api:
        url = f"{api.emu.base_url}/media/recordings/ada.mp3"
        assert await outcome(api, voice_url=url) == ("failed", "internal error")
        assert "ZeroDivisionError" in caplog.text


async def test_the_extension_is_that_of_the_path() -> None:
    """Case, escapes and a signed query do not hide the extension."""
    content = RECORDINGS["ada.mp3"].read_bytes()

    async def serve(request: web.Request) -> web.Response:
        return web.Response(body=content)

    async with (
        serving_app("/{path:.*}", serve) as base_url,
        serving(fetch_samples=True) as api,
    ):
        url = f"{base_url}/my%20voice%2EMP3?signature=x.wav"
        assert await outcome(api, voice_url=url) == ("succeed", "")


async def test_a_task_does_not_end_before_its_sample_was_checked() -> None:
    """A slow sample holds the task, its slot and its callback, past its usual time."""
    gate = asyncio.Event()
    async with (
        slow_host(gate) as url,
        inbox() as box,
        serving(fetch_samples=True, concurrency_limit=1) as api,
    ):
        await api.create(voice_url=url, callback_url=box.url)
        api.emu.advance(100)
        assert (await api.page())[0]["task_status"] == "processing"
        assert api.emu.in_flight == 1
        assert (await api.create()).verdict == (429, 1303)
        await box.until(2)
        gate.set()
        await box.until(3)
        assert box.bodies[-1]["task_status"] == "succeed"
        assert (await api.page())[0]["task_status"] == "succeed"
        assert api.emu.in_flight == 0


async def test_closing_ends_a_fetch() -> None:
    """An emulator that closes does not wait for samples."""
    gate = asyncio.Event()
    async with slow_host(gate) as url:
        async with serving(fetch_samples=True) as api:
            await api.create(voice_url=url)
            await asyncio.sleep(0.02)
        assert len(asyncio.all_tasks()) <= 4  # the test's, and those of the other server
        gate.set()


async def test_a_video_of_the_account_is_a_source() -> None:
    """With fetch_samples a video_id must be known; without, any will do."""
    async with serving(fetch_samples=True) as api:
        api.emu.add_video("mine")
        assert await outcome(api, video_id="mine") == ("succeed", "")
        status, told = await outcome(api, video_id="someone's")
        assert (status, told) == ("failed", "the account has no video someone's")
    async with serving() as api:
        assert await outcome(api, video_id="any") == ("succeed", "")


async def test_without_fetching_any_url_will_do() -> None:
    """By default nothing is fetched: users' tests need no network."""
    async with serving() as api:
        assert await outcome(api, voice_url="https://nowhere.invalid/a") == ("succeed", "")
        await api.emu.discard("https://nowhere.invalid/a")


async def test_tinytag_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library is missing, the error says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"kling-voice\[emulator\]"):
        Emulator(fetch_samples=True)
    Emulator()
