"""Manifests: CSV, JSON lines or a folder of recordings, read and checked whole.

Every bad line becomes a problem that names it, so that all can be mended at once; nothing here
talks to the vendor.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from attrs import evolve, fields, frozen

from kling_voice.errors import InvalidRequestError, KlingError
from kling_voice.identity import default_key, derived_id
from kling_voice.models import VoiceRequest
from kling_voice.protocol import create_call
from kling_voice.samples import CONTENT_TYPES, inspect_sample

COLUMNS = tuple(field.name for field in fields(VoiceRequest))
_HOSTED = "https://hosted.invalid/"  # stands for a recording that has no URL yet


@frozen
class Entry:
    """One request of a manifest that has passed all checks.

    Attributes:
        where: The line, or the file, that it comes from.
        request: What to clone; its ``key`` is set.
        external_task_id: The id that its first task bears.
    """

    where: str
    request: VoiceRequest
    external_task_id: str


@frozen
class Problem:
    """Why a manifest, or a line of it, is bad.

    Attributes:
        where: The line, or the file in a folder; empty for the manifest itself.
        what: What is wrong with it.
    """

    where: str
    what: str

    def told(self, name: str) -> str:
        """Tell it of a manifest of that name."""
        return f"{name}, {self.where}: {self.what}" if self.where else f"{name} {self.what}"


@frozen
class Row:
    """A line as it was read: the fields of a request, not yet checked.

    Attributes:
        where: The line, or the file in a folder.
        fields: The fields that it gives.
        is_file: Whether it is a file in a folder, which gives the voice its name.
    """

    where: str
    fields: dict[str, Any]
    is_file: bool = False


def read_manifest(path: Path, batch_id: str) -> tuple[list[Entry], list[Problem]]:
    """Read a manifest and check every line of it.

    Args:
        path: A ``.csv`` or ``.jsonl`` file, or a folder. Paths in a file are relative to its own
            folder.
        batch_id: What the external ids are derived from.

    Raises:
        OSError: It cannot be read.
    """
    rows: Iterable[Row | Problem]
    if path.is_dir():
        folder, rows = path, read_folder(path)
    elif path.suffix.lower() == ".csv":
        folder, rows = path.parent, read_text(path.read_bytes(), read_csv)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        folder, rows = path.parent, read_text(path.read_bytes(), read_json_lines)
    else:
        path.open("rb").close()  # one that is missing is told as missing
        return [], [Problem("", "is no manifest: it must end in .csv or .jsonl, or be a folder")]
    entries, problems = check_rows(rows, folder, batch_id)
    if not entries and not problems:
        what = "no .mp3, .wav, .mp4 or .mov" if path.is_dir() else "no requests"
        problems.append(Problem("", f"holds {what}"))
    return entries, problems


def read_folder(folder: Path) -> Iterator[Row]:
    """Give a row for each recording in a folder, named by its file name."""
    for path in sorted(_listed(folder)):
        if _is_recording(path):
            yield Row(path.name, {"voice_name": path.stem, "voice_file": path.name}, is_file=True)


def count_others(folder: Path) -> int:
    """Count what a folder holds besides recordings: other files, and folders."""
    return sum(not _is_recording(path) for path in _listed(folder))


def _listed(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _is_recording(path: Path) -> bool:
    return path.suffix.lower() in CONTENT_TYPES


def read_text(
    content: bytes, parse: Callable[[str], Iterator[Row | Problem]]
) -> Iterator[Row | Problem]:
    """Give a parser the text of a file, or a problem if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield Problem(f"line {line}", "is not UTF-8: save the file as UTF-8 text")
        return
    yield from parse(text)


def read_csv(text: str) -> Iterator[Row | Problem]:
    """Read CSV whose header names fields of :class:`VoiceRequest`; empty cells are not given."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    while True:
        where = f"line {reader.line_num + 1}"
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(where, f"is not CSV: {error}")
            return
        if not any(cells):
            continue
        if columns is None:
            columns = cells
            if (wrong := _bad_header(columns)) is not None:
                yield Problem(where, wrong)
                return
        elif len(cells) > len(columns):
            yield Problem(
                where,
                f"has {len(cells)} values for {len(columns)} columns: quote values with commas",
            )
        else:
            yield Row(
                where, {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
            )


def _bad_header(columns: list[str]) -> str | None:
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        if (meant := _meant(unknown[0])) is not None:
            return f"{unknown[0]!r} is no column: {meant} Columns are in lower case."
        hint = ""
        if any(part in COLUMNS for part in re.split(r"[;\t|]", unknown[0])):
            hint = " (separate by commas)"
        elif len(unknown) == len(columns):
            hint = " (is the header line missing?)"
        return f"{unknown[0]!r} is no column{hint}; the columns are {', '.join(COLUMNS)}"
    if len(set(columns)) < len(columns):
        return "names a column twice"
    return None if "voice_name" in columns else "must name the column voice_name"


def _meant(name: str) -> str | None:
    return f"did you mean {name.lower()}?" if name.lower() in COLUMNS else None


def read_json_lines(text: str) -> Iterator[Row | Problem]:
    """Read one JSON object a line, with the fields of :class:`VoiceRequest`."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
            yield Problem(where, f"is not JSON: {why}")
            continue
        if not isinstance(value, dict):
            yield Problem(where, "is not a JSON object")
        elif unknown := sorted(set(value) - set(COLUMNS)):
            meant = _meant(unknown[0]) or f"the fields are {', '.join(COLUMNS)}"
            yield Problem(where, f"{unknown[0]!r} is no field; {meant}")
        elif wrong := [name for name, item in value.items() if not isinstance(item, str | None)]:
            yield Problem(where, f"{wrong[0]} must be a string")
        else:
            yield Row(where, {name: item for name, item in value.items() if item is not None})


def check_rows(
    rows: Iterable[Row | Problem], folder: Path, batch_id: str
) -> tuple[list[Entry], list[Problem]]:
    """Check rows one by one, and that no two of them are the same request."""
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            entry = check_row(row, folder, batch_id)
        except KlingError as error:
            problems.append(Problem(row.where, _refusal(error, row)))
            continue
        same = entries.setdefault(entry.external_task_id, entry)
        if same is not entry:
            problems.append(Problem(row.where, f"repeats {same.where}: {_apart(row)}"))
    return list(entries.values()), problems


def _refusal(error: KlingError, row: Row) -> str:
    told = str(error)
    if row.is_file and isinstance(error, InvalidRequestError) and error.field == "voice_name":
        told = f"{told.rstrip('.')}: rename the file, or list it in a CSV with a voice_name."
    return told


def _apart(row: Row) -> str:
    """Tell how to make a row another request than the one that it repeats."""
    for name in ("external_task_id", "key"):
        if name in row.fields:
            return f"give one of them another {name}"
    return "remove it, or give each a key of its own"


def check_row(row: Row, folder: Path, batch_id: str) -> Entry:
    """Make the request of a row, its recording checked and its key set.

    Raises:
        KlingError: The vendor would refuse it; the text says why.
    """
    request = VoiceRequest(**({"voice_name": ""} | row.fields))
    if sum(name in row.fields for name in ("voice_url", "video_id", "voice_file")) != 1:
        raise InvalidRequestError(
            "Give exactly one of voice_url, video_id and voice_file.", field="source"
        )
    create_call(
        request.voice_name,
        external_task_id=request.external_task_id or "derived",
        voice_url=request.voice_url if request.voice_file is None else _HOSTED,
        video_id=request.video_id,
        callback_url=request.callback_url,
    )
    if request.voice_file is not None:
        path = str(folder / request.voice_file)
        inspect_sample(path)
        request = evolve(request, voice_file=path)
    if request.key is None:
        request = evolve(request, key=default_key(request))
    return Entry(
        row.where, request, request.external_task_id or derived_id(batch_id, request.key or "")
    )
