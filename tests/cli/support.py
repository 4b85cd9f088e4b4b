"""What the tests of the command line share besides fixtures."""

import json
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


def results(path: Path) -> list[dict[str, Any]]:
    """Read a results file; every line must be whole."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def write_csv(path: Path, server: Emulator, count: int) -> Path:
    """Write a manifest of so many voices whose recordings the emulator serves."""
    lines = ["voice_name,voice_url,key"]
    lines += [f"Voice {n},{server.base_url}/media/recordings/ada.mp3,{n}" for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path
