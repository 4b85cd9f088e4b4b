"""The command line: what it prints, what it serves, and how it ends."""

import asyncio
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from kling_voice.emulator import Emulator, running
from kling_voice.emulator.__main__ import main

from .support import VOICES


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The emulator as a process."""
    command = [sys.executable, "-W", "error", "-m", "kling_voice.emulator", "--port=0", *arguments]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def greeting(child: asyncio.subprocess.Process) -> str:
    """All that it prints when it starts."""
    assert child.stdout is not None
    lines: list[str] = []
    async with asyncio.timeout(20):
        while not lines or not lines[-1].startswith("curl"):
            line = (await child.stdout.readline()).decode()
            assert line or not lines, "it ended early"
            lines.append(line)
    return "".join(lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_until_a_signal(number: signal.Signals) -> None:
    """It tells its URL, its keys and a request that works, and ends cleanly on a signal."""
    async with process("--task-seconds=0") as child:
        told = await greeting(child)
        variables = dict(re.findall(r"export (\w+)=(\S+)", told))
        assert set(variables) == {
            "KLING_BASE_URL",
            "KLING_ACCESS_KEY",
            "KLING_SECRET_KEY",
            "KLING_API_KEY",
        }
        example = shlex.split(told.splitlines()[-1])
        headers = dict(re.findall(r"--header=(.+): (.+)", "\n".join(example)))
        body = example[-1].removeprefix("--data=")
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(example[1], data=body) as response:
                assert (await response.json())["code"] == 0
            task: dict[str, str] = {}
            while task.get("task_status") not in ("succeed", "failed"):
                async with session.get(variables["KLING_BASE_URL"] + VOICES) as response:
                    (task,) = (await response.json())["data"]
        assert task["task_status"] == "succeed"
        child.send_signal(number)
        _, errors = await asyncio.wait_for(child.communicate(), 5)
        assert (child.returncode, errors) == (0, b"")


async def test_its_options(tmp_path: Path) -> None:
    """Keys, limit, faults and samples are set by options."""
    sample = tmp_path / "me.wav"
    sample.write_bytes(b"me")
    async with process(
        "--access-key=me",
        f"--secret-key={'s' * 32}",
        "--api-key=mine",
        "--prefix=/kling",
        "--concurrency-limit=1",
        "--faults=1",
        "--fault-seed=3",
        "--fault-kinds=html_502",
        "--no-fetch-samples",
        f"--sample={sample}",
    ) as child:
        told = await greeting(child)
        assert "export KLING_ACCESS_KEY=me\n" in told
        assert "KLING_API_KEY=mine" in told
        base_url = re.findall(r"export KLING_BASE_URL=(\S+)", told)[0]
        assert base_url.endswith("/kling")
        assert child.stdout is not None
        line = (await child.stdout.readline()).decode()
        assert line.startswith(str(sample))
        async with aiohttp.ClientSession() as session:
            async with session.get(line.split()[-1]) as response:
                assert await response.read() == b"me"
            async with session.get(base_url + VOICES) as response:
                assert response.status == 502


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--access-key=me"], "go together"),
        (["--sample=/nowhere.wav"], "no such file"),
        (["--fault-kinds=earthquake"], "earthquake"),
        (["--webhook-secret=whsec_?"], "base64"),
        (["--port=x"], "--port"),
        (["--concurrency-limit=0"], "concurrency_limit must be 1 or more, not 0"),
        (["--task-seconds=-1"], "task_seconds must not be negative"),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is wrong; the status is 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is one line and status 1, no traceback."""
    with running(Emulator()) as emu:
        port = emu.base_url.rpartition(":")[2]
        assert main([f"--port={port}"]) == 1
    assert capsys.readouterr().err.startswith(f"Cannot listen on 127.0.0.1:{port}: ")


def test_it_can_be_run_within_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    """main serves until the signal that it waits for comes, and returns 0."""

    def terminate(*_: object) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, terminate)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        keys = ["--access-key=me", f"--secret-key={'s' * 32}", f"--sample={__file__}"]
        assert main(["--port=0", "--faults=0.1", *keys]) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "KLING_ACCESS_KEY=me" in capsys.readouterr().out
