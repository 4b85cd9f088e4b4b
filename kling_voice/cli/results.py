"""The results file of a batch: one JSON line a request, appended as they come, and resumed from.

A line is flushed as soon as it is known, so that a run killed at any moment loses nothing. The
next run keeps the lines of voices that are done, drops the failures, which are tried again, and
appends; so there is one line for each request in the end.
"""

import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from kling_voice.cli.problems import UsageError
from kling_voice.models import CloneResult

EMULATOR = "emulator"
"""Stands for the URL of an emulator that was started for the run, and has ended with it."""

Line = dict[str, Any]
Place = str | tuple[str, str]
"""A line's place: its request's id, with its name if the request has another name by now."""

_FIELDS = {
    "voice_name",
    "key",
    "external_task_id",
    "task_id",
    "task_status",
    "voice_id",
    "trial_url",
    "error",
    "base_url",
}


def line_of(result: CloneResult, external_task_id: str, base_url: str) -> Line:
    """Make the line of a result.

    Args:
        result: How the request ended.
        external_task_id: The id that the request was derived, for when nothing was created.
        base_url: The server that was asked, or :data:`EMULATOR`.
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
        "units": _units(task.final_unit_deduction) if task is not None else None,
        "error": None if error is None else _error(error),
        "base_url": base_url,
    }


def _units(units: Decimal | None) -> str | None:
    return None if units is None else f"{units:f}"


def units_of(line: Line) -> Decimal:
    """Give the units that were deducted for a line's task; 0 if it does not tell."""
    told = line.get("units")
    if isinstance(told, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", told):
        return Decimal(told)
    return Decimal(0)


def status_of(line: Line) -> str:
    """Give the status of a line's task, or what became of its create if there is no task."""
    if line["task_status"] is not None:
        return str(line["task_status"])
    return "unknown" if _of_error(line, "outcome") == "unknown" else "not created"


def is_failed_task(line: Line) -> bool:
    """Tell whether a line is of a task that ended as failed, which it stays."""
    return bool(_of_error(line, "type") == "TaskFailedError")


def _of_error(line: Line, name: str) -> Any:
    error = line["error"]
    return error.get(name) if isinstance(error, dict) else None


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
            and isinstance(line["base_url"], str)
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
    lines: Iterable[Line], names: Mapping[str, str], prefix: str, base_url: str, name: str
) -> dict[Place, Line]:
    """Choose the lines that stay: those of voices that are done, by their request's id.

    A voice whose request has left the manifest, or has another name by now, stays, too, since it
    was paid for.

    Args:
        lines: What the file holds.
        names: The ``voice_name`` of each of the manifest's requests, by its id.
        prefix: What the ids of this batch begin with.
        base_url: The server that this run asks, or :data:`EMULATOR`.
        name: The file's name.

    Raises:
        UsageError: The file is another batch's, or another server's.
    """
    kept: dict[Place, Line] = {}
    for line in lines:
        request = request_of(line, names)
        if request is None and not line["external_task_id"].startswith(prefix):
            raise UsageError(
                f"{name} holds results of another batch (one has the external_task_id"
                f" {line['external_task_id']!r}); nothing was created. Name another --output, or"
                " give the --batch-id of the run that wrote it: by default its manifest's name."
            )
        if line["base_url"] != base_url:
            raise UsageError(
                f"{name} holds results of {_server(line['base_url'])} (this run is against"
                f" {_server(base_url)}): name another --output."
            )
        if line["voice_id"] is None:
            continue
        place: Place = request or line["external_task_id"]
        if request is not None and not _same(line["voice_name"], names[request]):
            place = request, str(line["voice_name"])
        kept[place] = line
    return kept


def _same(one: object, other: str) -> bool:
    return isinstance(one, str) and one.strip() == other.strip()


def _server(base_url: str) -> str:
    return "an emulator" if base_url == EMULATOR else base_url


class ResultsFile:
    """A results file that is open for appending, as a context manager.

    One that it has made, and that has no line in the end, is removed.

    Attributes:
        path: Where it is.
        lines: The line of each request that has one, by the request's id, and others that stay.
    """

    def __init__(self, path: Path, lines: Mapping[Place, Line]) -> None:
        self.path = path
        self.lines: dict[Place, Line] = dict(lines)
        self._made = False

    def __enter__(self) -> Self:
        content = "".join(map(_dump, self.lines.values()))
        encoded = content.encode(errors="backslashreplace")  # also JSON's way to write these
        try:
            if not self.path.exists() or self.path.read_bytes() != encoded:
                _replace(self.path, encoded)
                self._made = True
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
        if self._made and not self.lines:
            with suppress(OSError):
                self.path.unlink()

    def append(self, request: str, line: Line) -> None:
        """Write the line of a request, and see that it leaves this process.

        Raises:
            OSError: It cannot be written, e.g. since the disk is full.
        """
        self.lines[request] = line
        self._file.write(_dump(line).encode(errors="backslashreplace"))
        self._file.flush()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """See that no other run writes a results file, from before it is read until the end.

    What is locked is a file beside it, since it may be replaced itself; the system lifts the lock
    of a run that is killed.

    Raises:
        UsageError: Another run is writing it.
    """
    beside = path.parent / f".{path.name}.lock"
    lock = FileLock(beside, timeout=0)
    try:
        if path.parent.is_dir():  # else it would be made
            lock.acquire()
    except Timeout:
        raise UsageError(
            f"Another run is writing {path}: wait for it, or name another --output."
        ) from None
    except OSError:
        pass  # where nothing can be locked, each run is taken to be alone
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no file that is open
                beside.unlink()
        lock.release()


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
