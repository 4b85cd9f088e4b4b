"""The results file: its lines, and what the next run makes of them."""

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kling_voice.cli.problems import UsageError
from kling_voice.cli.results import (
    EMULATOR,
    Line,
    ResultsFile,
    alone,
    is_failed_task,
    keep,
    line_of,
    load_results,
    parse_results,
    request_of,
    status_of,
    units_of,
)
from kling_voice.errors import BadRequestError, SampleError, ServerError, TaskFailedError
from kling_voice.identity import batch_prefix
from kling_voice.models import (
    CloneResult,
    TaskInfo,
    TaskResult,
    TaskStatus,
    Voice,
    VoiceRequest,
    VoiceTask,
)

PREFIX = batch_prefix("batch")
SERVER = "https://vendor.example"
REQUEST = VoiceRequest("Ada", voice_url="https://example.com/a.mp3", key="k")
VOICE = Voice("9", "Ada", "https://example.com/t.mp3?sign=1")
TASK = VoiceTask(
    "8",
    TaskStatus.SUCCEED,
    None,
    TaskInfo(f"{PREFIX}a"),
    TaskResult((VOICE,)),
    final_unit_deduction=Decimal("5E-2"),
)
FAILED = VoiceTask("7", TaskStatus.FAILED, "noise", TaskInfo(f"{PREFIX}b-r1"))


def line(external_task_id: str, *, voice: str | None = "9", base_url: str = SERVER) -> Line:
    """Make a line of a voice, or of a failure."""
    error = None if voice else {"type": "TaskFailedError"}
    return {
        "voice_name": "Ada",
        "key": "k",
        "external_task_id": external_task_id,
        "task_id": "8",
        "task_status": "succeed",
        "voice_id": voice,
        "trial_url": "https://e.com/t" if voice else None,
        "error": error,
        "base_url": base_url,
    }


def dump(*lines: Any) -> bytes:
    """Give lines as a file has them."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def test_line_of_a_voice() -> None:
    """A voice's line has its ids, its trial and the server that made it, and no error."""
    assert line_of(CloneResult(REQUEST, TASK, VOICE, None), "derived", SERVER) == {
        "voice_name": "Ada",
        "key": "k",
        "external_task_id": f"{PREFIX}a",
        "task_id": "8",
        "task_status": "succeed",
        "voice_id": "9",
        "trial_url": "https://example.com/t.mp3?sign=1",
        "units": "0.05",
        "error": None,
        "base_url": SERVER,
    }


@pytest.mark.parametrize("told", [None, 5, "NaN", "1e9", "", "٣"])
def test_units_of_a_line(told: object) -> None:
    """The units of a line are a plain number, or none, whatever the file says."""
    assert units_of(line("a") | {"units": "0.05"}) == Decimal("0.05")
    assert units_of(line("a") | {"units": told}) == units_of(line("a")) == 0


def test_line_of_a_failed_task() -> None:
    """A failed task's line has its last task's ids and the reason."""
    error = TaskFailedError("Task 7 failed: noise.", task=FAILED)
    made = line_of(CloneResult(REQUEST, FAILED, None, error), "derived", SERVER)
    assert (made["task_id"], made["task_status"], made["voice_id"]) == ("7", "failed", None)
    assert made["external_task_id"] == f"{PREFIX}b-r1"
    assert made["error"]["type"] == "TaskFailedError"
    assert "noise" in made["error"]["message"]
    assert (status_of(made), is_failed_task(made)) == ("failed", True)


def test_line_of_a_refusal() -> None:
    """A refused create's line has the code, the request's id and the outcome."""
    error = BadRequestError("taken", code=1201, request_id="r", http_status=400)
    error.external_task_id, error.outcome = "mine", "not_created"
    made = line_of(CloneResult(REQUEST, None, None, error), "derived", SERVER)
    assert made["external_task_id"] == "mine"
    assert made["error"]["code"] == 1201
    assert made["error"]["request_id"] == "r"
    assert made["error"]["outcome"] == "not_created"
    assert (status_of(made), is_failed_task(made)) == ("not created", False)


def test_line_of_a_doubt() -> None:
    """Where it is open whether there is a task, neither it nor its absence is claimed."""
    error = ServerError("busy", code=5000, http_status=500)
    error.external_task_id, error.outcome = "mine", "unknown"
    made = line_of(CloneResult(REQUEST, None, None, error), "derived", SERVER)
    assert (status_of(made), is_failed_task(made)) == ("unknown", False)


@pytest.mark.parametrize("error", [None, "noise", 5, {}])
def test_status_of_a_strange_line(error: object) -> None:
    """A line that tells neither task nor outcome has no task, as far as it tells."""
    strange = line("a") | {"task_status": None, "error": error}
    assert (status_of(strange), is_failed_task(strange)) == ("not created", False)


def test_line_without_a_task() -> None:
    """Where nothing was sent, the line has the id that the request would have had."""
    made = line_of(CloneResult(REQUEST, None, None, SampleError("too short")), "derived", SERVER)
    assert (made["external_task_id"], made["task_id"], made["task_status"]) == (
        "derived",
        None,
        None,
    )
    assert (made["error"]["code"], made["error"]["outcome"]) == (None, None)


def test_requests_of_lines() -> None:
    """A line is its request's, whichever try it is of."""
    ids = {"a", "b-r1", "c-rx"}
    for given, found in {
        "a": "a",
        "a-r1": "a",
        "a-r12": "a",
        "b-r1": "b-r1",
        "b-r1-r2": "b-r1",
        "b": None,
        "a-rx": None,
        "c-rx": "c-rx",
        "": None,
    }.items():
        assert request_of(line(given), ids) == found


def test_unfinished_line_is_dropped() -> None:
    """What a killed run left of its last line does not count; a file of nothing else is empty."""
    whole = dump(line("a"), line("b"))
    assert parse_results(whole, "f") == [line("a"), line("b")]
    for cut in range(1, len(dump(line("b")))):
        assert parse_results(whole[:-cut], "f") == [line("a")]
    assert parse_results(b"", "f") == []


@pytest.mark.parametrize(
    "content",
    [
        b"voice_name,voice_url\nAda,x\n",
        b"voice_name,voice_url",
        b'{"voice_name": "Ada"}\n',
        dump(line("a")) + b"\n",
        dump(line("a"), [1]),
        dump(line("a") | {"external_task_id": None}),
        dump({name: value for name, value in line("a").items() if name != "base_url"}),
        dump(line("a") | {"base_url": None}),
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=[
        "csv",
        "text",
        "manifest",
        "blank",
        "array",
        "no id",
        "no server",
        "null",
        "binary",
        "deep",
    ],
)
def test_other_files_are_left_alone(content: bytes) -> None:
    """A file that is no results file is refused, never overwritten."""
    with pytest.raises(UsageError, match=r"^f exists.*name another --output"):
        parse_results(content, "f")


def test_voices_stay_and_failures_go() -> None:
    """Voices are kept, of requests that have left the manifest too; failures are tried again."""
    lines = [
        line(f"{PREFIX}a"),
        line(f"{PREFIX}b", voice=None),
        line(f"{PREFIX}gone"),
        line(f"{PREFIX}gone-too", voice=None),
        line("mine"),
        line(f"{PREFIX}c-r1"),
    ]
    kept = keep(
        lines,
        dict.fromkeys([f"{PREFIX}a", f"{PREFIX}b", f"{PREFIX}c", "mine"], "Ada"),
        PREFIX,
        SERVER,
        "f",
    )
    assert list(kept) == [f"{PREFIX}a", f"{PREFIX}gone", "mine", f"{PREFIX}c"]


def test_one_line_for_each_request() -> None:
    """Of several lines of one request the last voice stays."""
    lines = [line(f"{PREFIX}a", voice="1"), line(f"{PREFIX}a-r1", voice="2")]
    kept = keep(lines, {f"{PREFIX}a": "Ada"}, PREFIX, SERVER, "f")
    assert [each["voice_id"] for each in kept.values()] == ["2"]


def test_another_batch() -> None:
    """Results of another batch are refused, so that two never share a file."""
    other = f"{batch_prefix('other')}a"
    with pytest.raises(UsageError) as caught:
        keep([line(other)], {f"{PREFIX}a": "Ada"}, PREFIX, SERVER, "f")
    assert str(caught.value) == (
        f"f holds results of another batch (one has the external_task_id {other!r}); nothing was"
        " created. Name another --output, or give the --batch-id of the run that wrote it: by"
        " default its manifest's name."
    )


@pytest.mark.parametrize("name", ["Bob", "ada", None, 5])
def test_another_name(name: object) -> None:
    """A voice of another name than its request's stays in the file, but not as the request's."""
    given = line(f"{PREFIX}a") | {"voice_name": name}
    kept = keep([given], {f"{PREFIX}a": "Ada"}, PREFIX, SERVER, "f")
    assert list(kept.values()) == [given]
    assert f"{PREFIX}a" not in kept
    renamed = keep([given, line(f"{PREFIX}a")], {f"{PREFIX}a": " Ada "}, PREFIX, SERVER, "f")
    assert list(renamed.values()) == [given, line(f"{PREFIX}a")]
    assert renamed[f"{PREFIX}a"] == line(f"{PREFIX}a")


@pytest.mark.parametrize("voice", ["9", None])
@pytest.mark.parametrize(
    ("written", "run", "told"),
    [
        (SERVER, "https://b.example", f"{SERVER} (this run is against https://b.example)"),
        ("http://127.0.0.1:1", SERVER, f"http://127.0.0.1:1 (this run is against {SERVER})"),
        (EMULATOR, SERVER, f"an emulator (this run is against {SERVER})"),
        (SERVER, EMULATOR, f"{SERVER} (this run is against an emulator)"),
    ],
)
def test_another_server(voice: str | None, written: str, run: str, told: str) -> None:
    """Results of another server are refused: what one account has, another has not."""
    lines = [line(f"{PREFIX}a", voice=voice, base_url=written)]
    with pytest.raises(UsageError) as caught:
        keep(lines, {}, PREFIX, run, "f")
    assert str(caught.value) == f"f holds results of {told}: name another --output."
    assert len(keep(lines, {}, PREFIX, written, "f")) == (voice is not None)


def test_file(tmp_path: Path) -> None:
    """Lines are on the disk the moment they are appended, after those that were kept."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(dump(line("a"), line("b", voice=None)) + b'{"half')
    with ResultsFile(path, {"a": line("a")}) as file:
        assert load_results(path) == [line("a")]
        file.append("b", line("b") | {"voice_name": "名\ud800"})
        assert load_results(path)[1]["voice_name"] == "名\ud800"
        assert set(file.lines) == {"a", "b"}
    assert [each.name for each in tmp_path.iterdir()] == ["r.jsonl"]
    assert "名" in path.read_text(encoding="utf-8")


def test_good_file_is_not_touched(tmp_path: Path) -> None:
    """A file that needs no change keeps its inode: nothing can get lost."""
    path = tmp_path / "r.jsonl"
    with ResultsFile(path, {}) as file:
        file.append("a", line("a"))
    before = path.stat().st_ino
    with ResultsFile(path, {"a": line("a")}):
        assert path.stat().st_ino == before


def test_no_empty_file_is_left(tmp_path: Path) -> None:
    """A run without a result leaves no file of its own, and touches no empty one of another's."""
    path, other = tmp_path / "r.jsonl", tmp_path / "other"
    other.touch()
    for each in (path, other):
        with ResultsFile(each, {}):
            assert each.exists()
    assert [each.name for each in tmp_path.iterdir()] == ["other"]
    with ResultsFile(path, {}):
        path.unlink()  # by someone else
    with ResultsFile(path, {}) as file:
        file.append("a", line("a"))
    assert load_results(path) == [line("a")]


@pytest.mark.parametrize("name", ["folder", "none/r.jsonl"])
def test_bad_path(tmp_path: Path, name: str) -> None:
    """A path that cannot be written is told before anything is created."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        ResultsFile(tmp_path / name, {}).__enter__()
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_alone(tmp_path: Path) -> None:
    """While a file is one run's, no other gets it; afterwards nothing tells that it was."""
    path = tmp_path / "r.jsonl"
    for _ in range(2):
        with (
            alone(path),
            alone(tmp_path / "other.jsonl"),
            pytest.raises(UsageError, match=r"Another run is writing .*r\.jsonl: wait"),
        ):
            alone(path).__enter__()
        assert os.listdir(tmp_path) == []


def test_lock_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """A lock that nobody holds any more is no lock, and is cleared away."""
    (tmp_path / ".r.jsonl.lock").touch()
    with alone(tmp_path / "r.jsonl"):
        assert os.listdir(tmp_path) == [".r.jsonl.lock"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["none/r.jsonl", "r.jsonl"])
def test_where_nothing_can_be_locked(tmp_path: Path, name: str) -> None:
    """A folder that is missing, or takes no lock, hinders no run: that is told elsewhere."""
    (tmp_path / ".r.jsonl.lock").mkdir()
    with alone(tmp_path / name):
        assert os.listdir(tmp_path) == [".r.jsonl.lock"]


def test_unreadable(tmp_path: Path) -> None:
    """A folder in the results' place is told; no file at all means no results."""
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_results(tmp_path)
    assert load_results(tmp_path / "none") == []
