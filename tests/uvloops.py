"""A pytest plugin that runs every test on uvloop: `-p tests.uvloops`; see CONTRIBUTING.md."""

import asyncio

import pytest
import uvloop


@pytest.fixture(scope="session")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """What pytest-asyncio makes its event loops with."""
    policy: asyncio.AbstractEventLoopPolicy = uvloop.EventLoopPolicy()
    return policy
