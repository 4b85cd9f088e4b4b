"""`kling-voice batch` as a process: manifests to results, interrupted and resumed."""

import asyncio
import errno
import json
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from kling_voice.cli.problems import reason
from kling_voice.cli.results import Line, ResultsFile
from kling_voice.emulator import Emulator, Faults, recordings, running
from kling_voice.errors import BadRequestError
from kling_voice.models import VoiceRequest

from .support import Here, Run, objects, results, until_results, write_csv


async def start(environment: dict[str, str], folder: Path, *arguments: str) -> Process:
    """Start a batch as a process."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kling_voice.cli", "batch", *arguments),
        env=environment,
        cwd=folder,
        stdout=PIPE,
        stderr=PIPE,
    )


def full(results: ResultsFile, request: str, line: Line) -> None:
    """Append as a full disk lets one."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(results.path))


@pytest.mark.parametrize("server_options", [{"fetch_samples": True, "concurrency_limit": 2}])
async def test_folder_through_s3(kv: Run, bucket: str, server: Emulator, tmp_path: Path) -> None:
    """A folder of recordings becomes voices; no recording stays in the bucket."""
    folder = tmp_path / "cast"
    folder.mkdir()
    for path in recordings().values():
        shutil.copy(path, folder)
    ended = await kv("batch", "cast", "--host", "s3://voices/samples")
    assert ended.status == 0
    assert "Batch 'cast': 3 requests" in ended.err
    assert "3/3 " in ended.err
    assert ended.out.splitlines()[0] == "voice_name\ttask_status\tvoice_id\treason"
    assert "3 voices, 0 failures, 0.15 units deducted in all" in ended.out
    lines = results(tmp_path / "cast.results.jsonl")
    assert sorted(line["voice_name"] for line in lines) == ["ada", "alan", "james"]
    assert {line["task_status"] for line in lines} == {"succeed"}
    assert {line["voice_id"] for line in lines} == {task.voice_id for task in server.tasks}
    assert objects(bucket) == 0

    again = await kv("batch", "cast/", "--json", KLING_SAMPLE_HOST="s3://voices/samples")
    assert again.status == 0
    assert "3 requests, 3 of them done before" in again.err
    assert (again.json["voices"], again.json["done_before"]) == (3, 3)
    assert again.json["units_deducted"] == "0.15"
    assert results(tmp_path / "cast.results.jsonl") == lines
    assert server.created == 3


async def test_failures_and_retries(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """Failures are lines with their reason, status 1; --retry-failed tries them as new tasks."""
    server.fail_when = lambda body: "noise" if body["voice_name"].endswith("1") else None
    write_csv(tmp_path / "cast.csv", server, 3)
    arguments = ("batch", "cast.csv", "--output", "r.jsonl", "--batch-id", "b")
    first = await kv(*arguments, "--json")
    assert first.status == 1
    assert first.json == first.json | {
        "batch_id": "b",
        "output": "r.jsonl",
        "requests": 3,
        "voices": 2,
        "failures": 1,
        "units_deducted": "0.10",
    }
    assert "Voice 1: failed: noise" in first.err
    assert first.err.endswith(
        "\n1 task ended as failed, for which nothing is deducted; the same command does not try"
        " them again. Mend the cause and run it with --retry-failed 1.\n"
    )
    (failed,) = [line for line in results(tmp_path / "r.jsonl") if line["voice_id"] is None]
    assert failed["task_status"] == "failed"
    assert failed["error"]["type"] == "TaskFailedError"
    assert "noise" in failed["error"]["message"]

    server.fail_when = None
    again = await kv(*arguments)
    assert again.status == 1  # a task that ended as failed stays failed
    assert server.created == 3
    mended = await kv(*arguments, "--retry-failed", "1")
    assert mended.status == 0
    assert server.created == 4
    lines = results(tmp_path / "r.jsonl")
    assert len(lines) == 3
    assert sorted(line["key"] for line in lines) == ["0", "1", "2"]
    assert all(line["voice_id"] for line in lines)


def test_tasks_that_failed_again(here: Here, server: Emulator, tmp_path: Path) -> None:
    """The number counts over the batch's life, so one more is advised than was given."""
    server.fail_when = lambda body: "noise"
    write_csv(tmp_path / "cast.csv", server, 2)
    ended = here("batch", "cast.csv", "--retry-failed", "1")
    assert server.created == 4
    assert "2 tasks ended as failed, " in ended.err
    assert ended.err.endswith("Mend the cause and run it with --retry-failed 2.\n")
    server.fail_when = None
    assert here("batch", "cast.csv", "--retry-failed", "1").status == 1
    assert server.created == 4
    assert here("batch", "cast.csv", "--retry-failed", "2").status == 0
    assert server.created == 6


def test_failures_of_both_kinds(here: Here, server: Emulator, tmp_path: Path) -> None:
    """What was never created is tried again by the same command, and told in words of its own."""
    server.fail_when = lambda body: "noise" if body["voice_name"] == "Voice 0" else None
    server.faults = Faults(script={"create": {2: 1201}})
    write_csv(tmp_path / "cast.csv", server, 3)
    ended = here("batch", "cast.csv", "--concurrency", "1")
    assert ended.status == 1
    header, *rows = (line.split("\t") for line in ended.out.splitlines()[:4])
    assert header == ["voice_name", "task_status", "voice_id", "reason"]
    assert rows[0] == ["Voice 0", "failed", "", "noise"]
    assert rows[1][:3] == ["Voice 1", "not created", ""]
    assert rows[1][3].startswith("The vendor refused: ")
    assert rows[2] == ["Voice 2", "succeed", server.tasks[1].voice_id, ""]
    assert "2/3 Voice 1: not created: The vendor refused: " in ended.err
    assert ended.err.splitlines()[-1] == (
        "Run the same command again to try the other failures again; nothing is created twice. 1"
        " task ended as failed, for which nothing is deducted; the same command does not try them"
        " again. Mend the cause and run it with --retry-failed 1."
    )
    again = here("batch", "cast.csv")
    assert server.created == 3
    assert (
        "2 voices (1 done before: read from the file, not asked of the vendor), 1 failure, 0.10"
        " units deducted in all" in again.out
    )


def test_renamed_row(here: Here, server: Emulator, tmp_path: Path) -> None:
    """A voice of the same key and another name is not the renamed row's; the key is blamed."""
    path = tmp_path / "g.csv"
    path.write_text("voice_name,video_id,key\nOne,829,k1\n")
    assert here("batch", "g.csv").status == 0
    (one,) = results(tmp_path / "g.results.jsonl")
    path.write_text("voice_name,video_id,key\nTwo,829,k1\n")
    for _ in range(2):
        ended = here("batch", "g.csv")
        assert ended.status == 1
        assert "done before" not in ended.err
        name, status, voice_id, reason = ended.out.splitlines()[1].split("\t")
        assert (name, status, voice_id) == ("Two", "not created", "")
        assert reason == (
            "the id made of its key 'k1' is taken by a task with another voice_name. Give it"
            " another key. This call created no voice and nothing is billed for it."
        )
        assert "external" not in ended.out + ended.err
        assert [line["voice_name"] for line in results(tmp_path / "g.results.jsonl")] == [
            "One",
            "Two",
        ]
        assert ended.err.splitlines()[-1] == (
            "Run the same command again to try the failures again; nothing is created twice."
        )
    path.write_text("voice_name,video_id,key\nOne,829,k1\nTwo,829,k2\n")
    mended = here("batch", "g.csv")
    assert mended.status == 0
    assert "1 of them done before" in mended.err
    assert results(tmp_path / "g.results.jsonl")[0] == one
    assert server.created == 2


def test_taken_id_of_a_row(here: Here, server: Emulator, tmp_path: Path) -> None:
    """A row that names its external_task_id is told of that, which is a column, and no option."""
    server.reserve_external_id("mine")
    (tmp_path / "g.csv").write_text("voice_name,video_id,external_task_id\nOne,829,mine\n")
    ended = here("batch", "g.csv")
    assert ended.status == 1
    assert "external_task_id 'mine' is taken by " in ended.out
    assert (
        "run the same command again, since reads may lag; else use another external_task_id."
        in (ended.out)
    )
    assert "--external-task-id" not in ended.out + ended.err


def test_taken_id_of_a_key() -> None:
    """A row whose id was made of its key is told of the key, and of the command."""
    error = BadRequestError(
        "external_task_id 'made' is taken by another task",
        code=1201,
        hint="If a create with this id was sent in the last seconds, call again with the same id,"
        " since reads may lag; else use another external_task_id.",
    )
    error.external_task_id, error.outcome = "made", "not_created"
    assert reason(error, VoiceRequest("Ada", video_id="1", key="k")) == (
        "the id made of its key 'k' is taken by another task. If a create with this id was sent in"
        " the last seconds, run the same command again, since reads may lag; else give it another"
        " key. This call created no voice and nothing is billed for it."
    )


def test_unknown_outcome(here: Here, server: Emulator, tmp_path: Path) -> None:
    """Of a voice that may exist the batch says that running it again gets it, and is right."""
    server.faults = Faults(rate=1, kinds=["error_500_after"], calls=["create", "get"])
    write_csv(tmp_path / "cast.csv", server, 1)
    ended = here("batch", "cast.csv")
    assert ended.status == 1
    name, status, voice_id, reason = ended.out.splitlines()[1].split("\t")
    assert (name, status, voice_id) == ("Voice 0", "unknown", "")
    assert "run the same command again to get it; that cannot bill twice." in reason
    assert "external" not in ended.out + ended.err
    server.faults = None
    assert here("batch", "cast.csv").status == 0
    assert server.created == 1


def test_skipped_files(here: Here, tmp_path: Path) -> None:
    """What a folder holds besides recordings is counted on stderr."""
    folder = tmp_path / "cast"
    (folder / "more").mkdir(parents=True)
    for path in recordings().values():
        shutil.copy(path, folder)
    (folder / ".hidden").touch()
    one = here("batch", "cast", "--emulator")
    (folder / "notes.txt").touch()
    two = here("batch", "cast", "--emulator")
    assert one.status == two.status == 0
    assert one.err.startswith("cast: 3 recordings; 1 other skipped\nBatch 'cast': 3 requests")
    assert two.err.startswith("cast: 3 recordings; 2 others skipped\n")


def test_no_results_file_without_a_result(here: Here, server: Emulator, tmp_path: Path) -> None:
    """A host that is none, and a key that is wrong, leave no empty results file behind."""
    manifest = write_csv(tmp_path / "cast.csv", server, 2)
    bad_host = here("batch", "cast.csv", "--host", "nonsense")
    assert bad_host.status == 2
    wrong_key = here("batch", "cast.csv", KLING_API_KEY="wrong")
    assert wrong_key.status == 1
    assert "No results (batch id 'cast')" in wrong_key.out
    assert "Correct that first; then run the same command again to go on" in wrong_key.err
    assert "external" not in wrong_key.out + wrong_key.err
    assert list(tmp_path.iterdir()) == [manifest]
    assert not server.created


@pytest.mark.parametrize("server_options", [{"task_seconds": 0.4, "concurrency_limit": 2}])
async def test_interrupted_and_resumed(
    kv: Run, server: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C ends cleanly and says how to go on; the same command creates nothing twice."""
    write_csv(tmp_path / "cast.csv", server, 6)
    process = await start(environment, tmp_path, "cast.csv", "--output", "r.jsonl")
    await until_results(tmp_path / "r.jsonl", 1)
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    told = err.decode()
    assert process.returncode == 130
    assert out == b""
    assert "Interrupted: " in told
    assert "Run the same command again" in told
    assert "Traceback" not in told
    before = results(tmp_path / "r.jsonl")
    assert 1 <= len(before) < 6

    again = await kv("batch", "cast.csv", "--output", "r.jsonl")
    assert again.status == 0
    assert f"{len(before)} of them done before" in again.err
    after = results(tmp_path / "r.jsonl")
    assert after[: len(before)] == before
    assert sorted(int(line["key"]) for line in after) == list(range(6))
    assert server.created == 6


async def test_interrupted_trial(
    server: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    """Of a batch on an emulator of its own nothing goes on, and nothing can be resumed."""
    write_csv(tmp_path / "cast.csv", server, 20)
    process = await start(environment, tmp_path, "cast.csv", "--emulator")
    await until_results(tmp_path / "cast.emulator.jsonl", 5)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    done = len(results(tmp_path / "cast.emulator.jsonl"))
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == (
        f"Interrupted: {done} of 20 voices were done. The emulator has ended with this command;"
        " running it again starts anew."
    )


def test_failures_of_a_trial(
    here: Here, server: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a trial nobody is told to resume it, whether a voice failed or the whole batch."""
    write_csv(tmp_path / "cast.csv", server, 1)
    late = here("batch", "cast.csv", "--emulator", "--timeout", "0.1")
    monkeypatch.setattr(ResultsFile, "append", full)
    failed = here("batch", "cast.csv", "--emulator")
    for ended in (late, failed):
        assert ended.status == 1
        assert ended.err.splitlines()[-1] == (
            "The emulator has ended with this command; running it again starts anew."
        )
        assert "same command" not in ended.out + ended.err
    assert late.out.splitlines()[1].endswith("\tit did not end within --timeout")
    assert "No space left" in failed.err


@pytest.mark.parametrize("server_options", [{"task_seconds": 0.4, "concurrency_limit": 2}])
async def test_killed_and_resumed(
    kv: Run, server: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    """A run that is killed, in the middle of a line even, is resumed without a loss."""
    write_csv(tmp_path / "cast.csv", server, 6)
    process = await start(environment, tmp_path, "cast.csv", "--output", "r.jsonl")
    await until_results(tmp_path / "r.jsonl", 1)
    process.kill()
    await process.communicate()
    with (tmp_path / "r.jsonl").open("ab") as file:
        file.write(b'{"voice_name": "Voice')
    again = await kv("batch", "cast.csv", "--output", "r.jsonl")
    assert again.status == 0
    assert sorted(int(line["key"]) for line in results(tmp_path / "r.jsonl")) == list(range(6))
    assert server.created == 6


@pytest.mark.parametrize("server_options", [{"task_seconds": 600}])
async def test_two_runs_at_once(
    kv: Run, server: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    """A run that would replace the file another one writes is refused, until that has ended."""
    write_csv(tmp_path / "cast.csv", server, 2)
    process = await start(environment, tmp_path, "cast.csv", "--output", "r.jsonl")
    assert process.stderr is not None
    await process.stderr.readline()  # it has begun
    second = await kv("batch", "cast.csv", "--output", "r.jsonl")
    assert (second.status, second.out) == (2, "")
    assert second.err == (
        "Error: Another run is writing r.jsonl: wait for it, or name another --output.\n"
    )
    process.kill()
    await process.communicate()
    ended = await kv("batch", "cast.csv", "--output", "r.jsonl", "--timeout", "0.1")
    assert ended.status == 1
    assert len(results(tmp_path / "r.jsonl")) == 2
    assert sorted(os.listdir(tmp_path)) == ["cast.csv", "r.jsonl"]


async def test_faults(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """A bad network shows neither in the results nor in words."""
    server.faults = Faults(rate=0.3, seed=3)
    write_csv(tmp_path / "cast.csv", server, 12)
    ended = await kv("batch", "cast.csv", "--concurrency", "6", "--json")
    assert ended.status == 0
    assert ended.json["voices"] == server.created == 12
    assert len(ended.err.splitlines()) == 13, ended.err


def test_list_that_may_not_be_read(here: Here, server: Emulator, tmp_path: Path) -> None:
    """What the client warns of is a note; the batch goes on."""
    server.faults = Faults(script={"list": {1: 1200}})
    write_csv(tmp_path / "cast.csv", server, 1)
    ended = here("batch", "cast.csv")
    assert ended.status == 0
    assert "Note: The list could not be read; the batch goes on without it" in ended.err


def test_many_rows(here: Here, server: Emulator, tmp_path: Path) -> None:
    """A pipe gets a row for each request, however many there are."""
    server.fail_when = lambda body: "noise" if int(body["voice_name"][6:]) < 12 else None
    write_csv(tmp_path / "cast.csv", server, 26)
    first = here("batch", "cast.csv")
    assert first.status == 1
    header, *rows, figures, _ = first.out.splitlines()
    assert header == "voice_name\ttask_status\tvoice_id\treason"
    assert [row.split("\t")[0] for row in rows] == [f"Voice {n}" for n in range(26)]
    assert rows[11] == "Voice 11\tfailed\t\tnoise"
    assert figures.startswith("14 voices, 12 failures, 0.70 units deducted in all, ")

    server.fail_when = None
    again = here("batch", "cast.csv", "--retry-failed", "1")
    assert again.status == 0
    _, *rows, figures, _ = again.out.splitlines()
    assert [row.split("\t")[1] for row in rows] == ["succeed"] * 26
    told = "26 voices (14 done before: read from the file, not asked of the vendor), 0 failures, "
    assert figures.startswith(told)


def test_full_disk(
    here: Here, server: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that cannot be written ends the batch; with room again nothing is created twice."""
    write_csv(tmp_path / "cast.csv", server, 2)
    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "append", full)
        ended = here("batch", "cast.csv", "--output", "r.jsonl")
    assert ended.status == 1
    assert "Error: No space left on device r.jsonl\n" in ended.err
    assert ended.err.endswith("Run the same command again to go on; nothing is created twice.\n")
    assert here("batch", "cast.csv", "--output", "r.jsonl").status == 0
    assert len(results(tmp_path / "r.jsonl")) == server.created == 2


async def test_account_in_arrears(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """What concerns the whole account ends the batch: status 1, the code, how to go on."""
    server.faults = Faults(script={"create": dict.fromkeys(range(2, 100), 1101)})
    write_csv(tmp_path / "cast.csv", server, 20)
    ended = await kv("batch", "cast.csv", "--concurrency", "1", "--output", "r.jsonl")
    assert ended.status == 1
    assert "code 1101" in ended.err
    assert ended.err.endswith(
        "\nCorrect that first; then run the same command again to go on; nothing is created"
        " twice.\n"
    )
    assert "external" not in ended.err
    assert len(results(tmp_path / "r.jsonl")) < 10
    server.faults = None
    again = await kv("batch", "cast.csv", "--output", "r.jsonl")
    assert again.status == 0
    assert len(results(tmp_path / "r.jsonl")) == server.created == 20


def test_bad_manifest(here: Here, server: Emulator, tmp_path: Path) -> None:
    """Every bad line is told, nothing is created, and no output appears."""
    (tmp_path / "cast.csv").write_text(
        "voice_name,voice_url,voice_file\n"
        "Good,https://example.com/a.mp3,\n"
        ",https://example.com/a.mp3,\n"
        "Bad,,no.mp3\n"
    )
    (tmp_path / "cast.jsonl").write_text('{"voice_name": 1}\n')
    (tmp_path / "cast.txt").write_text("?")
    (tmp_path / "none.csv").write_text("voice_name\n")
    (tmp_path / "empty").mkdir()
    for name, told in {
        "cast.csv": ["Error: cast.csv, line 3: voice_name", "Error: cast.csv, line 4: "],
        "cast.jsonl": ["Error: cast.jsonl, line 1: voice_name must be a string"],
        "cast.txt": ["Error: cast.txt is no manifest: it must end in .csv or .jsonl, or be a"],
        "empty": ["Error: empty holds no .mp3, .wav, .mp4 or .mov"],
        "none.csv": ["Error: none.csv holds no requests"],
        ".": [f"Error: {tmp_path} holds no .mp3, .wav, .mp4 or .mov"],
        "no.csv": ["no.csv cannot be read: No such file"],
    }.items():
        ended = here("batch", name)
        assert (ended.status, ended.out) == (2, "")
        lines = ended.err.splitlines()
        for text, line in zip(told, lines, strict=False):
            assert text in line
        if name != "no.csv":
            assert "nothing was created" in lines[len(told)]
    assert not server.requests
    assert not list(tmp_path.glob("*results*"))


async def test_bad_manifest_as_a_process(kv: Run, tmp_path: Path) -> None:
    """The same, as it is for a shell."""
    (tmp_path / "cast.csv").write_text("voice_name,voice_url\n,\n")
    ended = await kv("batch", "cast.csv")
    assert (ended.status, ended.out) == (2, "")
    assert "1 problem in cast.csv; nothing was created." in ended.err


def test_bad_settings(here: Here, server: Emulator, tmp_path: Path) -> None:
    """No host for recordings, an output of something else: status 2 before anything is done."""
    shutil.copy(recordings()["ada.mp3"], tmp_path / "ada.mp3")
    (tmp_path / "files.csv").write_text("voice_name,voice_file\nAda,ada.mp3\n")
    manifest = write_csv(tmp_path / "cast.csv", server, 1)
    text = manifest.read_text()
    for arguments, told in (
        (["files.csv"], "--host s3://bucket/prefix or KLING_SAMPLE_HOST"),
        (["cast.csv", "--output", "cast.csv"], "cast.csv exists, and its line 1 is no result"),
        (["cast.csv", "--output", "none/r.jsonl"], "none/r.jsonl cannot be written: No such file"),
        (["cast.csv", "--batch-id", ""], "Error: --batch-id is empty.\n"),
        (["cast.csv", "--concurrency", "0"], "--concurrency"),
        (["cast.csv", "--retry-failed", "-1"], "--retry-failed"),
    ):
        ended = here("batch", *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert told in ended.err
    no_key = here("batch", "cast.csv", KLING_API_KEY="")
    assert (no_key.status, no_key.out) == (2, "")
    assert "KLING_API_KEY" in no_key.err
    assert manifest.read_text() == text
    assert not server.requests


async def test_emulated_results_are_kept_apart(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """A trial run on an emulator never makes a real run believe that its voices exist.

    Every trial run makes all its voices; by default in a file of its own.
    """
    (tmp_path / "cast.jsonl").write_text(json.dumps({"voice_name": "A", "video_id": "1"}))
    for _ in range(2):
        trial = await kv("batch", "cast.jsonl", "--emulator", KLING_API_KEY="")
        assert trial.status == 0
        assert "done before" not in trial.err
        assert "1 voice, 0 failures, 0.05 units" in trial.out
        assert len(results(tmp_path / "cast.emulator.jsonl")) == 1
    real, other = await asyncio.gather(
        kv(
            *("batch", "cast.jsonl", "--output", "cast.emulator.jsonl"),
            KLING_BASE_URL="https://example.com",
        ),
        kv("batch", "cast.jsonl", "--output", "cast.emulator.jsonl", "--batch-id", "other"),
    )
    assert real.status == other.status == 2
    assert "holds results of an emulator" in real.err
    assert "results of another batch" in other.err
    assert not server.requests


def test_results_of_another_server(here: Here, server: Emulator, tmp_path: Path) -> None:
    """Voices of one account are not taken for another's; that is told before anything is sent."""
    write_csv(tmp_path / "cast.csv", server, 2)
    assert here("batch", "cast.csv", "--output", "r.jsonl").status == 0
    before = results(tmp_path / "r.jsonl")
    with running(Emulator()) as other:
        ended = here(
            *("batch", "cast.csv", "--output", "r.jsonl"),
            KLING_BASE_URL=f"{other.base_url}/",
            KLING_API_KEY=other.api_key,
        )
        assert (ended.status, ended.out) == (2, "")
        assert ended.err == (
            f"Error: r.jsonl holds results of {server.base_url} (this run is against"
            f" {other.base_url}): name another --output.\n"
        )
        assert not other.requests
    assert results(tmp_path / "r.jsonl") == before
