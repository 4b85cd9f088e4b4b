"""Manifests: what is read from them, and how bad lines are told."""

import json
import shutil
from pathlib import Path

import pytest

from kling_voice.cli.manifest import (
    Entry,
    Problem,
    count_others,
    read_csv,
    read_json_lines,
    read_manifest,
)
from kling_voice.emulator import recordings
from kling_voice.identity import default_key, derived_id
from kling_voice.models import VoiceRequest

URL = "https://example.com/a.mp3"


def read(path: Path, content: str | bytes) -> tuple[list[Entry], list[Problem]]:
    """Read a manifest of a given content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_manifest(path, "batch")


def test_csv(tmp_path: Path) -> None:
    """Columns may stand in any order; empty cells, blank lines and a BOM do not matter."""
    text = (
        "\ufeffkey,voice_name,voice_url,video_id,external_task_id\r\n"
        f"a,  Ada ,{URL},,\r\n"
        "\r\n"
        ",,,,\r\n"
        '"b, c","Bob ""B""",,829,ext-1\r\n'
        f",Cleo,{URL}"
    )
    entries, problems = read(tmp_path / "cast.CSV", text)
    assert problems == []
    assert [entry.where for entry in entries] == ["line 2", "line 5", "line 6"]
    assert entries[0].request == VoiceRequest("Ada", voice_url=URL, key="a")
    assert entries[1].request == VoiceRequest(
        'Bob "B"', video_id="829", external_task_id="ext-1", key="b, c"
    )
    assert entries[1].external_task_id == "ext-1"


def test_json_lines(tmp_path: Path) -> None:
    """Each line is an object with the fields of a request; null is not given."""
    lines = [
        {"voice_name": "Ada", "voice_url": URL, "key": None},
        {"voice_name": "名", "video_id": "1", "callback_url": "https://example.com/hook"},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    entries, problems = read(tmp_path / "cast.jsonl", text)
    assert problems == []
    assert [entry.where for entry in entries] == ["line 1", "line 3"]
    assert entries[1].request.voice_name == "名"
    assert entries[1].request.callback_url == "https://example.com/hook"


def test_folder(tmp_path: Path) -> None:
    """A folder gives its recordings by file name; what is no recording is left out and counted."""
    for path in recordings().values():
        shutil.copy(path, tmp_path)
    (tmp_path / "notes.txt").write_text("no recording")
    (tmp_path / ".hidden.mp3").write_text("no recording")
    (tmp_path / "more").mkdir()
    entries, problems = read_manifest(tmp_path, "batch")
    assert problems == []
    assert [entry.where for entry in entries] == ["ada.mp3", "alan.mp3", "james.wav"]
    assert count_others(tmp_path) == 2  # the hidden one does not count
    assert [entry.request.voice_name for entry in entries] == ["ada", "alan", "james"]
    assert entries[0].request.voice_file == str(tmp_path / "ada.mp3")


def test_ids_are_those_of_the_library(tmp_path: Path) -> None:
    """A batch begun by a program is resumed by the command line: both derive the same ids."""
    entries, _ = read(tmp_path / "cast.csv", f"voice_name,voice_url,key\nAda,{URL},\nBob,{URL},k\n")
    key = default_key(VoiceRequest("Ada", voice_url=URL))
    assert entries[0].request.key == key
    assert entries[0].external_task_id == derived_id("batch", key)
    assert entries[1].external_task_id == derived_id("batch", "k")


def test_files_are_found_beside_the_manifest(tmp_path: Path) -> None:
    """A relative voice_file is relative to the manifest's folder; its path does not make its id."""
    ada = recordings()["ada.mp3"]
    shutil.copy(ada, tmp_path / "a.mp3")
    beside, _ = read(tmp_path / "cast.csv", "voice_name,voice_file\nAda,a.mp3\n")
    absolute, _ = read(tmp_path / "cast.csv", f"voice_name,voice_file\nAda,{ada}\n")
    assert beside[0].request.voice_file == str(tmp_path / "a.mp3")
    assert absolute[0].external_task_id == beside[0].external_task_id


BAD_CSV = {
    "no such column": ("voice_name,url\nAda,x\n", ["line 1: 'url' is no column; the columns are"]),
    "semicolons": (
        "voice_name;voice_url\nAda;x\n",
        ["line 1: 'voice_name;voice_url' is no column (separate by commas); the columns are"],
    ),
    "tabs": (
        "voice_name\tvoice_url\n",
        ["line 1: 'voice_name\\tvoice_url' is no column (separate by commas); the columns are"],
    ),
    "no header": (
        f"A,{URL}\nB,{URL}\n",
        ["line 1: 'A' is no column (is the header line missing?); the columns are"],
    ),
    "upper case": (
        f"Voice_Name,Voice_URL\nA,{URL}\n",
        ["line 1: 'Voice_Name' is no column: did you mean voice_name? Columns are in lower case."],
    ),
    "no name column": ("voice_url\nx\n", ["line 1: must name the column voice_name"]),
    "column twice": ("voice_name,key,key\n", ["line 1: names a column twice"]),
    "name too long": (
        f"voice_name,voice_url\n{'x' * 21},{URL}\nBob,{URL}\n,{URL}\n",
        ["line 2: voice_name must have 1 to 20", "line 4: voice_name is empty."],
    ),
    "sources": (
        f"voice_name,voice_url,video_id,voice_file\nA,,,\nB,{URL},1,\nC,{URL},,x\nD,,1,x\n",
        [
            "line 2: Give exactly one of",
            "line 3: Give exactly one of",
            "line 4: Give exactly one of",
            "line 5: Give exactly one of",
        ],
    ),
    "url": ("voice_name,voice_url\nA,ftp://x\n", ["line 2: voice_url must be an http(s) URL"]),
    "callback": (
        f"voice_name,voice_url,callback_url\nA,{URL},hook\n",
        ["line 2: callback_url must be an http(s) URL"],
    ),
    "id": (
        f"voice_name,voice_url,external_task_id\nA,{URL},..\n",
        ["line 2: external_task_id must not be '..'"],
    ),
    "file": ("voice_name,voice_file\nA,no.mp3\n", ["line 2: '/"]),
    "too many cells": (
        f"voice_name,voice_url\nAda, the first,{URL}\n",
        ["line 2: has 3 values for 2 columns: quote values"],
    ),
    "open quote": (f'voice_name,voice_url\n"Ada,{URL}\n', ["line 2: is not CSV: "]),
    "after a long cell": (
        f'voice_name,voice_url\n"Ada\nB",{URL}\n,{URL}\n',
        ["line 4: voice_name is empty."],
    ),
    "repeated": (
        f"voice_name,voice_url,key\nA,{URL},\nB,{URL},\nA,{URL},\nC,{URL},k\nD,{URL},k\n",
        [
            "line 4: repeats line 2: remove it, or give each a key of its own",
            "line 6: repeats line 5: give one of them another key",
        ],
    ),
    "id repeated": (
        f"voice_name,voice_url,external_task_id\nA,{URL},e\nB,{URL},e\n",
        ["line 3: repeats line 2: give one of them another external_task_id"],
    ),
    "empty": ("", ["cast.csv holds no requests"]),
    "header only": ("voice_name,voice_url\n", ["cast.csv holds no requests"]),
    "not UTF-8": (b"voice_name\nAd\xe9\n", ["line 2: is not UTF-8: save the file as UTF-8"]),
}


@pytest.mark.parametrize(("content", "told"), BAD_CSV.values(), ids=BAD_CSV)
def test_bad_csv(tmp_path: Path, content: str | bytes, told: list[str]) -> None:
    """Every bad line is told with its number, and only those."""
    _, problems = read(tmp_path / "cast.csv", content)
    lines = [problem.told("cast.csv").removeprefix("cast.csv, ") for problem in problems]
    assert len(lines) == len(told)
    for line, beginning in zip(lines, told, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "line 1: is not JSON"),
        ("\n[]", "line 2: is not a JSON object"),
        ('{"voice_name": 7}', "line 1: voice_name must be a string"),
        ('{"voice_name": "A", "key": 7}', "line 1: key must be a string"),
        ('{"name": "A"}', "line 1: 'name' is no field; the fields are"),
        ('{"Voice_Name": "A"}', "line 1: 'Voice_Name' is no field; did you mean voice_name?"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"voice_name": "\\ud800", "video_id": "1"}', "line 1: voice_name is not valid text"),
        ("{}", "line 1: Give exactly one of"),
        ('{"video_id": "1"}', "line 1: voice_name is empty."),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str, told: str) -> None:
    """What is not the object of a request is told with its line."""
    _, [problem] = read(tmp_path / "cast.jsonl", content)
    assert f"{problem.where}: {problem.what}".startswith(told)


def test_bad_folder(tmp_path: Path) -> None:
    """Recordings that the vendor would refuse are told by their names."""
    shutil.copy(recordings()["ada.mp3"], tmp_path / "a.wav")
    shutil.copy(recordings()["ada.mp3"], tmp_path / f"{'x' * 30}.mp3")
    _, problems = read_manifest(tmp_path, "batch")
    assert [problem.where for problem in problems] == ["a.wav", f"{'x' * 30}.mp3"]
    assert "is .mp3 inside" in problems[0].what
    assert problems[1].what == (
        f"voice_name must have 1 to 20 characters; {'x' * 30!r} has 30: rename the file, or list it"
        " in a CSV with a voice_name."
    )


def test_folder_without_recordings(tmp_path: Path) -> None:
    """Of a folder without recordings it is told what was looked for."""
    (tmp_path / "notes.txt").write_text("no recording")
    _, [problem] = read_manifest(tmp_path, "batch")
    assert problem.told("cast") == "cast holds no .mp3, .wav, .mp4 or .mov"


def test_other_files(tmp_path: Path) -> None:
    """A file of another kind is told as that; one that is missing is an OSError."""
    _, [problem] = read(tmp_path / "cast.xlsx", b"PK")
    assert problem.told("cast.xlsx") == (
        "cast.xlsx is no manifest: it must end in .csv or .jsonl, or be a folder"
    )
    for name in ("no.csv", "no.jsonl", "no", "no.txt"):
        with pytest.raises(FileNotFoundError):
            read_manifest(tmp_path / name, "batch")


@pytest.mark.parametrize("parse", [read_csv, read_json_lines])
@pytest.mark.parametrize("text", ["\0", "\r\r\r", '"', "\x1b[31m", "voice_name\n\0\n", ","])
def test_garbage(parse: object, text: str) -> None:
    """No text surprises the parsers."""
    assert callable(parse)
    list(parse(text))
