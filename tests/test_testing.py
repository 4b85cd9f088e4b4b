"""The fixtures that users' own tests are written with."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kling_voice import KlingVoiceClient, PollingPolicy, SampleHost, TaskFailedError
from kling_voice.emulator import Emulator, recordings

pytest_plugins = ["kling_voice.testing"]

Clients = Callable[..., KlingVoiceClient]


async def clone(make: Clients) -> str:
    """What a user's code under test may do."""
    async with make() as kling:
        voice = await kling.clone_voice("Ada", voice_url="https://example.com/ada.mp3")
        return voice.voice_id


async def test_with_an_async_test(kling_emulator: Emulator, kling_client: Clients) -> None:
    """An async test clones a voice against an emulator of its own."""
    assert await clone(kling_client) == kling_emulator.tasks[0].voice_id
    assert kling_emulator.created == 1


def test_with_asyncio_run(kling_emulator: Emulator, kling_client: Clients) -> None:
    """A plain test runs its own event loop, twice if it likes."""
    first = asyncio.run(clone(kling_client))
    second = asyncio.run(clone(kling_client))
    assert [task.voice_id for task in kling_emulator.tasks] == [first, second]


async def test_options_of_a_client_win(kling_client: Clients) -> None:
    """What a test gives goes before what the fixture gives."""
    polling = PollingPolicy(initial=0.01, multiplier=1.0, maximum=0.01, jitter=0.0)
    async with kling_client(polling=polling, timeout=3.0) as kling:
        assert await kling.list_tasks() == []


async def test_an_emulator_hosts_samples(kling_emulator: Emulator, kling_client: Clients) -> None:
    """The emulator is a SampleHost, so a file on disk becomes a voice."""
    host: SampleHost = kling_emulator
    async with kling_client(sample_host=host) as kling:
        voice = await kling.clone_voice("Ada", voice_file=recordings()["ada.mp3"])
        assert voice.voice_name == "Ada"


class TestOverridden:
    """Tests whose emulator is not the usual one."""

    @pytest.fixture
    def kling_emulator_options(self) -> dict[str, Any]:
        """Options of the emulator of this class."""
        return {"fail_when": lambda body: "noisy", "concurrency_limit": 3}

    async def test_the_options_are_taken(
        self, kling_emulator: Emulator, kling_client: Clients
    ) -> None:
        """The emulator of a class or module is configured by overriding a fixture."""
        assert kling_emulator.concurrency_limit == 3
        with pytest.raises(TaskFailedError, match="noisy"):
            await clone(kling_client)


def test_without_pytest() -> None:
    """Whoever imports the fixtures without pytest is told what to install."""
    code = "import sys; sys.modules['pytest'] = None; import kling_voice.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs pytest: pip install pytest" in done.stderr
