"""The README's promises: every block of code in it runs, with the emulator as the vendor."""

import ast
import asyncio
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from kling_voice.emulator import Emulator, recordings, running

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(README.read_text()) if name == language]


def file_blocks() -> dict[str, str]:
    """The blocks that are files, by the name in their first line."""
    named = (re.match(r"# (\w+\.py)\n", body) for body in blocks("python"))
    return {match[1]: match.string for match in named if match}


def script_blocks() -> list[str]:
    return [body for body in blocks("python") if body not in file_blocks().values()]


def run(code: str) -> None:
    """Run a block; it may await at its top level."""
    compiled = compile(code, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, object] = {"__name__": "__main__"}
    if compiled.co_flags & inspect.CO_COROUTINE:

        async def main() -> None:
            await eval(compiled, names)

        asyncio.run(main())
    else:
        exec(compiled, names)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server on loopback with a bucket "my-bucket"; its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/my-bucket", method="PUT")).close()
    yield url
    server.stop()


@pytest.fixture
def emulator(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """A folder with recordings, and an environment that names an emulator and an S3 server."""
    (tmp_path / "recordings").mkdir()
    for recording in recordings().values():
        shutil.copy(recording, tmp_path / "recordings")
    (tmp_path / "cast.csv").write_text(
        "voice_name,voice_url\nAda,https://example.com/ada.mp3\nAlan,https://example.com/alan.mp3\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("AWS_", "KLING_")):
            monkeypatch.delenv(name)
    with running(Emulator(task_seconds=0.2)) as emulator:
        for name, value in {
            "KLING_BASE_URL": emulator.base_url,
            "KLING_ACCESS_KEY": emulator.credentials.access_key,
            "KLING_SECRET_KEY": emulator.credentials.secret_key,
            "KLING_WEBHOOK_SECRET": SECRET,
            "AWS_ENDPOINT_URL": s3,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield emulator


@pytest.mark.parametrize(
    "code", [pytest.param(c, id=f"{n}") for n, c in enumerate(script_blocks())]
)
def test_every_python_block_runs(code: str, emulator: Emulator) -> None:
    """A reader who copies a block and runs it gets no error."""
    run(code)
    if "clone_voice(" in code and "Emulator(" not in code and "FastAPI(" not in code:
        assert emulator.created >= 1


def test_the_fixtures_work_as_shown(tmp_path: Path) -> None:
    """A project with the shown conftest.py and test file passes its tests."""
    for name in ("conftest.py", "test_app.py"):
        (tmp_path / name).write_text(file_blocks()[name])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_batch_is_spread_over_workers(emulator: Emulator, tmp_path: Path) -> None:
    """The shown program prints each voice of its cast, and creates each once."""
    pytest.importorskip("distributed")
    (tmp_path / "many_machines.py").write_text(file_blocks()["many_machines.py"])
    done = subprocess.run(
        [sys.executable, "many_machines.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = sorted(line.partition(" Voice(")[0] for line in done.stdout.splitlines())
    assert told == [f"Voice {n}" for n in range(9)]
    assert emulator.created == 9


COMMANDS = [
    line for line in "".join(blocks("text")).splitlines() if line.startswith("kling-voice ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, emulator: Emulator) -> None:
    """A reader who copies a command and runs it gets exit status 0."""
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "kling_voice.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_two_command_lines_are_the_first_blocks() -> None:
    """The first `sh` block runs the main job and the second the tests, each in one line."""
    first, second = blocks("sh")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert "--emulator" in first
    assert "pytest" in second


def test_every_link_leads_somewhere() -> None:
    """Each link to a file or a heading of this repository exists."""
    text = README.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
