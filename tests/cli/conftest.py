"""An emulator in a thread, an S3 server, and a function that runs `kling-voice` as a process."""

import asyncio
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from kling_voice.cli import main
from kling_voice.emulator import Emulator, running

from .support import Ended, Run


@pytest.fixture
def server_options() -> dict[str, Any]:
    """Arguments of the test's emulator: parametrize it."""
    return {}


@pytest.fixture
def server(server_options: dict[str, Any]) -> Iterator[Emulator]:
    """An emulator whose tasks take 0.2 s, in a thread of its own."""
    with running(Emulator(**{"task_seconds": 0.2, **server_options})) as emulator:
        yield emulator


@pytest.fixture
def environment(server: Emulator) -> dict[str, str]:
    """The environment of the commands: the test's emulator, and nothing of the machine's."""
    kept = ("PATH", "HOME", "SYSTEMROOT", "TMPDIR", "PYTHONPATH", "COVERAGE_")
    return {
        **{name: value for name, value in os.environ.items() if name.startswith(kept)},
        "KLING_BASE_URL": server.base_url,
        "KLING_API_KEY": server.api_key,
        "PYTHONIOENCODING": "utf-8",
        "PYTHONWARNINGS": "error",
        "TERM": "xterm-256color",
    }


@pytest.fixture
def kv(environment: dict[str, str], tmp_path: Path) -> Run:
    """A function that runs a command in the test's folder; it must never end in a traceback."""

    async def run(*arguments: object, **changes: str) -> Ended:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "kling_voice.cli", *map(str, arguments)),
            env=environment | changes,
            cwd=tmp_path,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(30):
            out, err = await process.communicate()
        ended = Ended(process.returncode or 0, out.decode(), err.decode())
        assert "Traceback" not in ended.err
        assert "Warning" not in ended.err
        return ended

    return run


@pytest.fixture
def here(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ended]:
    """A function that runs a command in this process: quicker, where nothing hangs on that."""

    def run(*arguments: object, **changes: str) -> Ended:
        monkeypatch.chdir(tmp_path)
        for name, value in (environment | changes).items():
            monkeypatch.setenv(name, value)
        status = main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return Ended(status, told.out, told.err)

    return run


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 server on loopback with a bucket "voices"; its URL."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/voices", method="PUT")).close()
    yield url
    moto.stop()


@pytest.fixture
def bucket(s3: str, environment: dict[str, str]) -> str:
    """The commands' environment gets the settings of the S3 server; the URL of its bucket."""
    environment |= {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "the-key",
        "AWS_SECRET_ACCESS_KEY": "the-secret",
        "AWS_REGION": "us-east-1",
    }
    return f"{s3}/voices"
