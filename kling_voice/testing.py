"""Pytest fixtures: an emulator for each test, and clients of it.

Enable them in `conftest.py`:

    pytest_plugins = ["kling_voice.testing"]

The emulator runs in a thread of its own, so tests may use any runner of asyncio, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

try:
    import pytest
except ModuleNotFoundError:
    raise ModuleNotFoundError("kling_voice.testing needs pytest: pip install pytest") from None

from kling_voice import KlingVoiceClient, PollingPolicy, RetryPolicy
from kling_voice.emulator import Emulator, running

__all__ = ["kling_client", "kling_emulator", "kling_emulator_options"]


@pytest.fixture
def kling_emulator_options() -> dict[str, Any]:
    """Arguments of `Emulator` for the test's emulator: override it in a module or a class."""
    return {}


@pytest.fixture
def kling_emulator(kling_emulator_options: dict[str, Any]) -> Iterator[Emulator]:
    """A running emulator whose tasks take 0.2 s, unless `kling_emulator_options` says else."""
    options: dict[str, Any] = {"task_seconds": 0.2, **kling_emulator_options}
    with running(Emulator(**options)) as emulator:
        yield emulator


@pytest.fixture
def kling_client(kling_emulator: Emulator) -> Callable[..., KlingVoiceClient]:
    """A function that makes clients of the test's emulator.

    It takes the arguments of `KlingVoiceClient`; polling and retries are as brisk as the tasks
    unless given. The test closes its clients: `async with kling_client() as kling: ...`.
    """

    def make(**options: Any) -> KlingVoiceClient:
        brisk: dict[str, Any] = {
            "credentials": kling_emulator.credentials,
            "base_url": kling_emulator.base_url,
            "polling": PollingPolicy(initial=0.03, multiplier=1.3, maximum=0.1, jitter=0.1),
            "retry": RetryPolicy(attempts=4, initial=0.02, maximum=0.2, max_elapsed=5.0),
        }
        return KlingVoiceClient(**{**brisk, **options})

    return make
