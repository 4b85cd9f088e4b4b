"""The example programs, each run as its user would run it, with the emulator as the vendor."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from kling_voice.emulator import Emulator, recordings, running

EXAMPLES = Path(__file__).parent / "examples"
SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A vendor that fetches the recordings, signs its callbacks, and takes a second."""
    emulator = Emulator(task_seconds=1.0, fetch_samples=True, webhook_secret=SECRET)
    with running(emulator):
        yield emulator


@pytest.fixture
def s3() -> Iterator[str]:
    """An S3 server on loopback with a bucket "bucket"; its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    yield url
    server.stop()


def environment(emulator: Emulator, s3: str, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {
        "KLING_BASE_URL": emulator.base_url,
        "KLING_API_KEY": emulator.api_key,
        "KLING_WEBHOOK_SECRET": SECRET,
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        **more,
    }


def objects(s3: str) -> int:
    with urllib.request.urlopen(f"{s3}/bucket?list-type=2") as answer:
        listing: bytes = answer.read()
    return listing.count(b"<Key>")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def served(command: list[str], port: int, env: dict[str, str]) -> Iterator[str]:
    """Run a web app as a process until the block ends; gives its URL."""
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, *command], cwd=EXAMPLES, env=env, stdout=subprocess.DEVNULL
    ) as process:
        try:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, "the app ended"
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()


def upload(url: str, name: str, recording: Path) -> tuple[int, dict[str, str]]:
    """Send a form as curl does; gives the status and the answer."""
    parts = (
        f'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'
        f'--x\r\nContent-Disposition: form-data; name="recording"; filename="{recording.name}"'
        "\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    request = urllib.request.Request(
        f"{url}/voices",
        data=parts + recording.read_bytes() + b"\r\n--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("framework", ["aiohttp", "fastapi"])
def test_a_web_app_answers_when_the_callback_comes(
    framework: str, emulator: Emulator, s3: str, tmp_path: Path
) -> None:
    """An upload is cloned, the callback ends the wait, and the recording is discarded."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = environment(emulator, s3, PUBLIC_URL=url, PORT=str(port), SAMPLE_HOST="s3://bucket/it")
    command = ["aiohttp_app.py"]
    if framework == "fastapi":
        pytest.importorskip("fastapi")
        command = ["-m", "uvicorn", "--factory", "fastapi_app:make_app", "--port", str(port)]
        command += ["--log-level", "warning"]
    broken = tmp_path / "broken.mp3"
    broken.write_bytes(b"this is no recording")
    with served(command, port, env):
        started = time.monotonic()
        status, answer = upload(url, "Ada", recordings()["ada.mp3"])
        took = time.monotonic() - started
        assert (status, set(answer)) == (200, {"voice_id", "trial_url"}), answer
        assert upload(url, "Ada", broken)[0] == 400
        assert (
            upload(url, "a name of more than twenty characters", recordings()["ada.mp3"])[0] == 400
        )
    assert emulator.created == 1
    assert emulator.callbacks["delivered"] >= 1
    assert took < 4.5  # the slow polling underneath would have needed five seconds
    assert objects(s3) == 0


def test_a_folder_is_cloned_once_however_often_the_script_runs(emulator: Emulator, s3: str) -> None:
    """The script prints a voice for each recording; run again, it creates nothing."""
    folder = recordings()["ada.mp3"].parent
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "clone_folder.py"), str(folder), "s3://bucket/samples"],
            env=environment(emulator, s3),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(sorted(done.stdout.splitlines()))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == len(recordings()) == emulator.created
    assert objects(s3) == 0
