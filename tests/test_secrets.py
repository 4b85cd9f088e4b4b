"""Every call, under faults and with all logs on: no key, no token and no signature is seen.

Seen is what is logged, shown, raised, warned of or pickled. Two things hold a signed URL because
their caller needs it there: a :class:`VoiceRequest` the caller's own ``voice_url`` and
``callback_url``, and a :class:`Voice` its ``trial_url``; neither shows it in a repr or a log.
"""

import asyncio
import copy
import gc
import logging
import pickle
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from wire import ONCE, MakeClient, Request, Server, envelope, response, task

from kling_voice import (
    AccessKey,
    ApiKey,
    CallbackReceiver,
    CloneResult,
    KlingError,
    KlingVoiceClient,
    ObjectStoreHost,
    RetryPolicy,
    Voice,
    VoiceRequest,
    VoiceTask,
)
from kling_voice.emulator import ALL, Emulator, Faults, recordings

SIGNED = "5ecretS1gnature"
QUERY = f"X-Amz-Credential=AKIA5ecret&X-Amz-Signature={SIGNED}"
SAMPLE = f"https://bucket.example.com/ada.mp3?{QUERY}"
CALLBACK = f"https://me.example.com/cb?token={SIGNED}"
WEBHOOK_SECRET = "whsec_NXVwZXI1ZWNyZXR3ZWJob29rc2VjcmV0MTIzNDU2Nzg="
KEYS = AccessKey("the-5ecret-access-key", "the-5ecret-secret-key-of-32-bytes")
API_KEY = "the-5ecret-api-key"
ADA = recordings()["ada.mp3"]
NOT_TO_BE_SEEN = ("5ecret", "5uper", "NXVwZXI1", "eyJ", "AKIA")


class SignedHost:
    """A sample host whose URLs are signed, and which fails now and then."""

    def __init__(self) -> None:
        self.calls = 0

    async def publish(self, path: Path, name: str) -> str:
        """Give a signed URL."""
        self.calls += 1
        if self.calls % 3 == 0:
            raise OSError(f"cannot PUT {SAMPLE}")
        return f"https://bucket.example.com/{name}.mp3?{QUERY}"

    async def discard(self, url: str) -> None:
        """Fail, quoting the URL."""
        raise OSError(f"cannot DELETE {url}")


class Everything(logging.Handler):
    """Keeps all that is logged: the message, its template, its arguments, its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record in every form that a handler may write it in."""
        self.texts += [self.format(record), repr(record.args), repr(vars(record))]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All that is logged by anyone, at any level."""
    handler = Everything()
    names = ("kling_voice", "kling_voice.emulator", "asyncio", "tenacity")
    web_names = ("client", "internal", "server", "web", "access", "websocket")
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    loggers += [logging.getLogger(f"aiohttp.{name}") for name in web_names]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        logger.manager._clear_cache() if hasattr(logger.manager, "_clear_cache") else None
    logging.getLogger().addHandler(handler)
    yield handler.texts
    logging.getLogger().removeHandler(handler)
