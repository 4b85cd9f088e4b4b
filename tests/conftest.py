"""What the tests share: an emulator, and a maker of clients that are quick to try again."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from wire import BRISK, MakeClient

from kling_voice import AccessKey, KlingVoiceClient, PollingPolicy
from kling_voice.emulator import Emulator

settings.register_profile(  # machines can be busy
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test: neither credentials nor proxies."""
    for name in (
        "KLING_API_KEY",
        "KLING_ACCESS_KEY",
        "KLING_SECRET_KEY",
        "KLING_BASE_URL",
        "KLING_WEBHOOK_SECRET",
        *(name for proxy in ("http", "https", "all", "no") for name in _both(f"{proxy}_proxy")),
    ):
        monkeypatch.delenv(name, raising=False)


def _both(name: str) -> tuple[str, str]:
    return name, name.upper()


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    """An emulator whose tasks end at once."""
    async with Emulator(task_seconds=0.0) as running:
        yield running


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """A function that makes clients of a server; they are closed after the test.

    It takes the server (anything with a ``base_url``) and the arguments of ``KlingVoiceClient``.
    """
    async with AsyncExitStack() as stack:

        def make(server: Any, **options: Any) -> KlingVoiceClient:
            known = AccessKey("the-access-key-id", "the-secret-key-of-at-least-32-bytes")
            client = KlingVoiceClient(
                **{
                    "credentials": getattr(server, "credentials", known),
                    "base_url": server.base_url,
                    "timeout": 5.0,
                    "retry": BRISK,
                    "polling": PollingPolicy(initial=0.02, maximum=0.1),
                    **options,
                }
            )
            stack.push_async_callback(client.close)
            return client

        yield make
