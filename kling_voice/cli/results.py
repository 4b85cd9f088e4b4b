"""The results file of a batch: one JSON line a request, appended as they come, and resumed from.

A line is flushed as soon as it is known, so that a run killed at any moment loses nothing. The
next run keeps the lines of voices that are done, drops the failures, which are tried again, and
appends; so there is one line for each request in the end.
"""

import json
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from kling_voice.cli.problems import UsageError
from kling_voice.models import CloneResult
from kling_voice.protocol import is_loopback

Line = dict[str, Any]

_FIELDS = {
    "voice_name",
    "key",
    "external_task_id",
    "task_id",
    "task_status",
    "voice_id",
    "trial_url",
    "error",
}


def line_of(result: CloneResult, external_task_id: str) -> Line:
    """Make the line of a result.

    Args:
        result: How the request ended.
        external_task_id: The id that the request was derived, for when nothing was created.
    """
    task, voice, error = result.task, result.voice, result.error
    known = task.external_task_id if task is not None else None
    return {
        "voice_name": result.request.voice_name,
        "key": result.request.key,
        "external_task_id": known or getattr(error, "external_task_id", None) or external_task_id,
        "task_id": task.task_id if task is not None else None,
        "task_status": str(task.task_status) if task is not None else None,
        "voice_id": voice.voice_id if voice is not None else None,
        "trial_url": voice.trial_url if voice is not None else None,
        "error": None if error is None else _error(error),
    }


def _error(error: Exception) -> Line:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "code": getattr(error, "code", None),
        "request_id": getattr(error, "request_id", None),
        "outcome": getattr(error, "outcome", None),
    }


def request_of(line: Line, ids: Collection[str]) -> str | None:
    """Give the id, of *ids*, of the request whose line this is; further tries have a suffix."""
    external_task_id: str = line["external_task_id"]
    if external_task_id in ids:
        return external_task_id
    base, _, number = external_task_id.rpartition("-r")
    return base if base in ids and number.isdigit() else None


def parse_results(content: bytes, name: str) -> list[Line]:
    """Read a results file; an unfinished last line, as a killed run leaves it, is dropped.

    Raises:
        UsageError: A line is no result, so the file is something else.
    """
    *whole, _unfinished = content.split(b"\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not (
            isinstance(line, dict)
            and line.keys() >= _FIELDS
            and isinstance(line["external_task_id"], str)
        ):
            raise UsageError(
                f"{name} exists, and its line {number} is no result of a batch: name another"
                " --output."
            )
        lines.append(line)
    if not whole and content and not content.startswith(b"{"):
        raise UsageError(f"{name} exists, and is no result of a batch: name another --output.")
    return lines


def keep(
    lines: Iterable[Line],
    ids: Collection[str],
    prefix: str,
    name: str,
    *,
    emulator: bool = False,
    local: bool = False,
) -> dict[str, Line]:
    """Choose the lines that stay: those of voices that are done, by their request's id.

    A voice whose request has left the manifest stays, too, since it was paid for.

    Args:
        lines: What the file holds.
        ids: The ids of the manifest's requests.
        prefix: What the ids of this batch begin with.
        name: The file's name.
        emulator: Whether an emulator was started for this run.
        local: Whether this run is against a server on this machine: an emulator, or a gateway.

    Raises:
        UsageError: The file is another batch's, or an emulator's and this run is not (or the
            other way round).
    """
    kept: dict[str, Line] = {}
    for line in lines:
        request = request_of(line, ids)
        if request is None and not line["external_task_id"].startswith(prefix):
            raise UsageError(
                f"{name} holds results of another batch ({line['external_task_id']!r}): name"
                " another --output, or the --batch-id of that batch."
            )
        if line["voice_id"] is None:
            continue
        emulated = _is_emulated(line)
        if (emulator and not emulated) or (emulated and not emulator and not local):
            whose = "an emulator" if emulated else "the vendor"
            raise UsageError(f"{name} holds results of {whose}: name another --output.")
        kept[request or line["external_task_id"]] = line
    return kept


def _is_emulated(line: Line) -> bool:
    try:
        return is_loopback(urlsplit(line["trial_url"] or "").hostname or "")
    except (ValueError, TypeError, AttributeError):
        return False


class ResultsFile:
    """A results file that is open for appending, as a context manager.

    Attributes:
        path: Where it is.
        lines: The line of each request that has one, by the request's id.
    """

    def __init__(self, path: Path, lines: Mapping[str, Line]) -> None:
        self.path = path
        self.lines: dict[str, Line] = dict(lines)

    def __enter__(self) -> Self:
        content = "".join(map(_dump, self.lines.values()))
        encoded = content.encode(errors="backslashreplace")  # also JSON's way to write these
        try:
            if not self.path.exists() or self.path.read_bytes() != encoded:
                _replace(self.path, encoded)
            self._file = self.path.open("ab")
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written: {error.strerror}. Name another --output."
            ) from None
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, request: str, line: Line) -> None:
        """Write the line of a request, and see that it leaves this process.

        Raises:
            OSError: It cannot be written, e.g. since the disk is full.
        """
        self.lines[request] = line
        self._file.write(_dump(line).encode(errors="backslashreplace"))
        self._file.flush()


def load_results(path: Path) -> list[Line]:
    """Read what an earlier run has left; nothing if there is no file.

    Raises:
        UsageError: It is not a results file, or cannot be read.
    """
    try:
        return parse_results(path.read_bytes(), str(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None


def _dump(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
