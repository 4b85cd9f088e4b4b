"""The client that a command works with: of the vendor, or of an emulator started for it."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kling_voice.client import KlingVoiceClient
from kling_voice.policies import PollingPolicy
from kling_voice.protocol import DEFAULT_BASE_URL, base_url
from kling_voice.samples import ObjectStoreHost, SampleHost

# Brisker than the vendor, which needs some 9 s for a voice; trial packs have its limit.
_EMULATED_SECONDS = 1.5
_EMULATED_LIMIT = 5
_EMULATED_POLLING = PollingPolicy(initial=0.25, maximum=1.0)


def host_url(given: str | None, *, emulator: bool) -> str | None:
    """Give the sample host that a command is to use; ``None`` if none was named.

    The environment's host is real, so an emulator does not use it unasked.
    """
    return given or (None if emulator else os.environ.get("KLING_SAMPLE_HOST") or None)


def server_url() -> str:
    """Give the URL of the server that the environment names; the vendor's by default.

    Raises:
        ConfigurationError: It is not usable.
    """
    return base_url(os.environ.get("KLING_BASE_URL") or DEFAULT_BASE_URL)


@asynccontextmanager
async def connected(
    *, emulator: bool = False, host: str | None = None
) -> AsyncIterator[KlingVoiceClient]:
    """Make a client, and close it in the end.

    Args:
        emulator: Start an emulator and work with that; it takes recordings as well.
        host: The URL of the bucket to put recordings into.

    Raises:
        ConfigurationError: Credentials are missing, or a setting is not usable.
    """
    bucket: SampleHost | None = ObjectStoreHost(host) if host else None
    if not emulator:
        async with KlingVoiceClient(base_url=server_url(), sample_host=bucket) as kling:
            yield kling
        return
    from kling_voice.emulator import Emulator

    logger = logging.getLogger("kling_voice")
    if bucket is None:
        logger.addFilter(_not_of_recordings)
    try:
        async with (
            Emulator(task_seconds=_EMULATED_SECONDS, concurrency_limit=_EMULATED_LIMIT) as server,
            KlingVoiceClient(
                server.credentials,
                base_url=server.base_url,
                polling=_EMULATED_POLLING,
                sample_host=bucket or server,
            ) as kling,
        ):
            yield kling
    finally:
        logger.removeFilter(_not_of_recordings)


def _not_of_recordings(record: logging.LogRecord) -> bool:
    # Those that are left at the emulator end with it: there is nothing to warn of.
    return record.module != "hosting"
