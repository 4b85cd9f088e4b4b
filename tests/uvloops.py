"""A pytest plugin that runs every test on uvloop: `-p tests.uvloops`; see CONTRIBUTING.md.

The tests that drive the clock (`driven.py`) keep the event loop of their own.
"""

import asyncio
from collections.abc import Callable

import uvloop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What pytest-asyncio makes its event loops with; an older one refuses this hook."""
    return {"uvloop": uvloop.new_event_loop}
