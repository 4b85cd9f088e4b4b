"""Recordings at the sample host: published once, discarded once, and never in the way."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from cast import ADA, Shelf

from kling_voice import ConfigurationError, SampleError
from kling_voice import hosting as hosting_module
from kling_voice.hosting import Hosting


async def test_a_recording_is_published_by_its_task_and_discarded_once() -> None:
    """Each try under a name of its own; its task's end discards them all."""
    shelf = Shelf()
    hosting = Hosting(shelf)

    links = {await hosting.publish(path, "kv-1") for path in (str(ADA), ADA)}

    assert len(links) == 2
    assert all(link.startswith("https://shelf.example/kv-1-") for link in links)
    assert shelf.shown == links
    await hosting.discard("kv-1")
    await hosting.discard("kv-1")
    assert sorted(shelf.discarded) == sorted(links)


async def test_what_is_withdrawn_leaves_the_other_tries_alone() -> None:
    """The same task may still be fetched from another one."""
    shelf = Shelf()
    hosting = Hosting(shelf)
    mine, other = [await hosting.publish(ADA, "kv-1") for _ in range(2)]

    await hosting.discard("kv-1", mine)

    assert shelf.shown == {other}
    await hosting.discard("kv-1")
    assert shelf.shown == set()


async def test_a_cancelled_discard_is_made_up_for() -> None:
    """What may still be shown is discarded at the next opportunity."""

    class Slow(Shelf):
        def __init__(self) -> None:
            super().__init__()
            self.works = asyncio.Event()

        async def discard(self, url: str) -> None:
            await self.works.wait()
            await super().discard(url)

    shelf = Slow()
    hosting = Hosting(shelf)
    await hosting.publish(ADA, "kv-1")
    task = asyncio.create_task(hosting.discard("kv-1"))
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    shelf.works.set()

    await hosting.discard("kv-1")

    assert shelf.shown == set()


async def test_every_link_that_was_given_is_discarded() -> None:
    """A host may give a new one each time."""

    class Numbering(Shelf):
        async def publish(self, path: Path, name: str) -> str:
            return await super().publish(path, f"{name}-{len(self.events)}")

    shelf = Numbering()
    hosting = Hosting(shelf)
    await hosting.publish(ADA, "kv-1")
    await hosting.publish(ADA, "kv-1")

    await hosting.discard("kv-1")

    assert len(shelf.discarded) == 2
    assert shelf.shown == set()


async def test_what_was_not_published_here_is_not_discarded() -> None:
    """Neither a task of another client nor one without an id, with or without a host."""
    shelf = Shelf()
    for hosting in (Hosting(shelf), Hosting(None)):
        await hosting.discard("kv-of-another")
        await hosting.discard(None)

    assert shelf.events == []


async def test_without_a_host_a_file_cannot_be_cloned() -> None:
    """The error says what to give the client."""
    with pytest.raises(ConfigurationError, match="sample_host"):
        await Hosting(None).publish(ADA, "kv-1")


async def test_a_file_that_the_vendor_would_refuse_is_not_published(tmp_path: Path) -> None:
    """It is looked into first."""
    shelf = Shelf()
    bad = tmp_path / "bad.mp3"
    bad.write_bytes(b"not a recording")

    with pytest.raises(SampleError):
        await Hosting(shelf).publish(bad, "kv-1")

    assert shelf.events == []


class Broken(Shelf):
    """A host that fails, or misbehaves."""

    def __init__(self, error: BaseException | None = None, link: Any = None) -> None:
        super().__init__()
        self._error = error
        self._link = link

    async def publish(self, path: Path, name: str) -> str:
        if self._error is not None:
            raise self._error
        link: str = self._link
        return link

    async def discard(self, url: str) -> None:
        assert self._error is not None
        raise self._error


async def test_a_host_that_fails_is_a_sample_error() -> None:
    """Of whatever kind its own error is; its text may hold secrets and is not repeated."""
    with pytest.raises(SampleError, match=r"ada\.mp3.*ValueError") as caught:
        await Hosting(Broken(ValueError("secret"))).publish(ADA, "kv-1")

    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


async def test_an_error_of_this_package_is_passed_on() -> None:
    """A host may say by itself what is wrong."""
    error = ConfigurationError("no such bucket")

    with pytest.raises(ConfigurationError) as caught:
        await Hosting(Broken(error)).publish(ADA, "kv-1")

    assert caught.value is error


@pytest.mark.parametrize("link", ["", None, "file:///ada.mp3", "ada.mp3", 7])
async def test_a_host_that_gives_no_link_is_a_sample_error(link: object) -> None:
    """Nothing else is ever sent to the vendor in its place."""
    hosting = Hosting(Broken(link=link))

    with pytest.raises(SampleError, match="gave no http"):
        await hosting.publish(ADA, "kv-1")

    await hosting.discard("kv-1")


async def test_a_recording_that_cannot_be_discarded_is_told_and_not_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The voice is there all the same."""
    shelf = Broken(link="https://shelf.example/kv-1.mp3?signature=secret")
    hosting = Hosting(shelf)
    await hosting.publish(ADA, "kv-1")
    shelf._error = OSError("https://shelf.example/kv-1.mp3?signature=secret")

    with caplog.at_level(logging.WARNING):
        await hosting.discard("kv-1")

    assert "kv-1 could not be discarded (OSError)" in caplog.text
    assert "secret" not in caplog.text


async def test_a_host_that_hangs_is_not_waited_for_for_ever(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, and the end of a batch, wait for the discard."""

    class Hanging(Shelf):
        async def discard(self, url: str) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(hosting_module, "_PATIENCE", 0.01)
    shelf = Hosting(Hanging())
    await shelf.publish(ADA, "kv-1")

    async with asyncio.timeout(5):
        await shelf.discard("kv-1")

    assert "kv-1 could not be discarded (TimeoutError)" in caplog.text


async def test_a_cancelled_discard_is_cancelled() -> None:
    """Cancellation is no failure of the host."""
    shelf = Broken(asyncio.CancelledError(), "https://shelf.example/a.mp3")
    shelf._error = None
    hosting = Hosting(shelf)
    await hosting.publish(ADA, "kv-1")
    shelf._error = asyncio.CancelledError()

    with pytest.raises(asyncio.CancelledError):
        await hosting.discard("kv-1")
