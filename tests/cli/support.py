"""What the tests of the command line share besides fixtures."""

import asyncio
import json
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from attrs import frozen

from kling_voice.emulator import Emulator


@frozen
class Ended:
    """How a command ended.

    Attributes:
        status: Its exit status.
        out: Its stdout.
        err: Its stderr.
    """

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout."""
        return json.loads(self.out)


Run = Callable[..., Awaitable[Ended]]
Here = Callable[..., Ended]


def results(path: Path) -> list[dict[str, Any]]:
    """Read a results file; every line must be whole."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


async def until_results(path: Path, count: int) -> None:
    """Wait until a results file has so many lines."""
    for _ in range(1000):
        if _lines(path) >= count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the results do not come")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_csv(path: Path, server: Emulator, count: int) -> Path:
    """Write a manifest of so many voices whose recordings the emulator serves."""
    lines = ["voice_name,voice_url,key"]
    lines += [f"Voice {n},{server.base_url}/media/recordings/ada.mp3,{n}" for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def objects(bucket: str) -> int:
    """Count what is in a bucket of the S3 server."""
    with urllib.request.urlopen(f"{bucket}?list-type=2") as listing:
        return int(listing.read().count(b"<Contents>"))
