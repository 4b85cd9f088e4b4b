"""The commands for one voice and the lists, each as a process against an emulator."""

import asyncio
import io
import os
import re
import shutil
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kling_voice import ObjectStoreHost, __version__
from kling_voice.cli import main
from kling_voice.cli.problems import report
from kling_voice.emulator import Emulator, Fault, Faults, recordings

from .support import Here, Run, objects

ADA = recordings()["ada.mp3"]
URL = "https://example.com/ada.mp3"
COMMANDS = (
    *("clone", "create", "get", "wait", "list", "presets", "delete", "download", "batch"),
    "emulator",
)


# --- help ---


async def test_help(kv: Run) -> None:
    """The help names every command, in 80 columns."""
    overview = await kv("--help")
    assert (overview.status, overview.err) == (0, "")
    assert all(f" {command} " in overview.out for command in COMMANDS)
    assert max(map(len, overview.out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(here: Here, command: str) -> None:
    """Each command's help has an example of it, in 80 columns."""
    own = here(command, "--help", COLUMNS="80")
    assert (own.status, own.err) == (0, "")
    assert f"kling-voice {command}" in own.out.partition("Example")[2]
    assert max(map(len, own.out.splitlines())) <= 80


async def test_version_and_completion(kv: Run, tmp_path: Path) -> None:
    """--version prints it; --install-completion writes a script for the shell."""
    version, installed = await asyncio.gather(
        kv("--version"),
        kv("--install-completion", "--shell", "bash", "--output", "done", HOME=str(tmp_path)),
    )
    assert (version.status, version.out) == (0, f"{__version__}\n")
    assert installed.status == 0
    assert "clone" in (tmp_path / "done").read_text()


# --- one voice ---


async def test_clone(kv: Run, server: Emulator) -> None:
    """A voice is cloned; its task is on stdout, how it got on is on stderr."""
    shown, told = await asyncio.gather(
        kv("clone", "Ada", "--voice-url", URL),
        kv("clone", "Bob", "--video-id", "829", "--external-task-id", "bob-1", "--json"),
    )
    assert shown.status == told.status == 0
    assert "voice_name        Ada" in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert "cloning Ada: succeed" in shown.err
    task = told.json
    assert task["task_info"]["external_task_id"] == "bob-1"
    assert task["task_result"]["voices"][0]["voice_name"] == "Bob"
    assert task["final_unit_deduction"] == "0.05"
    assert server.created == 2


@pytest.mark.parametrize("server_options", [{"fetch_samples": True}])
async def test_clone_a_file(kv: Run, bucket: str, server: Emulator) -> None:
    """A local recording goes through the bucket to the vendor, and leaves it in the end."""
    ended = await kv("clone", "Ada", "--voice-file", ADA, "--host", "s3://voices/p", "--json")
    assert ended.status == 0
    assert ended.json["task_status"] == "succeed"
    assert "/voices/p/" in (server.tasks[0].voice_url or "")
    assert objects(bucket) == 0


async def test_own_emulator(kv: Run, server: Emulator) -> None:
    """--emulator works without an account, and leaves the real one alone."""
    presets, voice = await asyncio.gather(
        kv("presets", "--emulator", "--json", KLING_API_KEY=""),
        kv("clone", "Ada", "--voice-file", ADA, "--emulator", KLING_SAMPLE_HOST="s3://not-it"),
    )
    assert presets.json[0]["task_result"]["voices"][0]["owned_by"] == "kling"
    assert voice.status == 0
    assert not server.requests


def test_task_of_an_emulator_that_has_ended(here: Here) -> None:
    """What was created on the command's own emulator is gone: nobody is told to wait for it."""
    created = here("create", "Ada", "--voice-file", ADA, "--emulator")
    assert (created.status, created.err) == (0, "")
    assert "task_status       submitted" in created.out
    told = (
        "Error: The task did not end within --timeout. The emulator has ended with this command;"
        " running it again starts anew.\n"
    )
    for json in ([], ["--json"]):
        ended = here("clone", "Ada", "--video-id", "1", "--emulator", "--timeout", "0.1", *json)
        assert ended.status == 1
        assert ended.err.endswith(told)
        assert "kling-voice" not in ended.err
    assert ended.json["task_status"] in ("submitted", "processing")


@pytest.mark.parametrize("command", ["get", "wait", "delete", "download"])
def test_no_emulator_of_its_own(here: Here, command: str) -> None:
    """A new emulator has nothing to get, wait for, delete or download, so these take none."""
    ended = here(command, "x", "--emulator")
    assert (ended.status, ended.out) == (2, "")
    assert "Unknown option: " in ended.err
    assert "--emulator" in ended.err
    assert "--emulator" not in here(command, "--help").out


async def test_create_get_wait_download_delete(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """A voice's whole life, by either kind of id."""
    created = await kv("create", "Ada", "--voice-url", URL, "--external-task-id", "ada-1", "--json")
    assert created.json["task_status"] == "submitted"
    task_id = created.json["task_id"]
    assert f"kling-voice wait {task_id}" in created.err

    waited, got, same = await asyncio.gather(
        kv("wait", "ada-1", "--json"),
        kv("get", task_id),
        kv("clone", "Ada", "--voice-url", URL, "--external-task-id", "ada-1", "--json"),
    )
    assert same.json["task_id"] == task_id
    assert server.created == 1
    assert waited.json["task_status"] == "succeed"
    assert task_id in got.out

    first, second = await asyncio.gather(
        kv("download", "ada-1", "t.mp3", "--json"), kv("download", task_id, "u.mp3")
    )
    assert first.json == {"path": "t.mp3", "bytes": (tmp_path / "t.mp3").stat().st_size}
    assert (tmp_path / "t.mp3").read_bytes() == (tmp_path / "u.mp3").read_bytes()
    assert second.out.startswith("u.mp3: ")

    voice_id = waited.json["task_result"]["voices"][0]["voice_id"]
    deleted = await kv("delete", voice_id, "--yes", "--json")
    assert deleted.json == {"voice_id": voice_id, "deleted": True}
    assert server.tasks[0].deleted
    again = await kv("delete", voice_id, "--yes")
    assert again.status == 1
    assert "code 1201" in again.err


def test_create_again(here: Here, server: Emulator) -> None:
    """Of a voice that is there already nothing is created, and no wait is advised."""
    create = ("create", "Ada", "--voice-url", URL, "--external-task-id", "a")
    assert "kling-voice wait" in here(*create).err
    server.advance(1)
    again = here(*create)
    assert again.status == 0
    assert "task_status       succeed" in again.out
    assert again.err == ""
    assert server.created == 1


def test_create_from_a_file(here: Here, bucket: str, server: Emulator) -> None:
    """Nobody knows when the vendor has fetched the recording, so it stays; that is told once."""
    ended = here("create", "Ada", "--voice-file", ADA, "--host", "s3://voices/stays")
    assert ended.status == 0
    assert ended.err.count("stay") == 1
    assert "Note: 1 recording(s) stay at the sample host" in ended.err
    assert objects(bucket) == 1
    asyncio.run(ObjectStoreHost("s3://voices/stays").discard(server.tasks[0].voice_url or ""))
    assert objects(bucket) == 0


def test_recording_of_a_trial(here: Here, s3: str, bucket: str) -> None:
    """What a trial put into a real bucket is told; what it gave its own emulator is gone."""
    create = ("create", "Ada", "--voice-file", ADA, "--emulator")
    assert here(*create).err == ""
    urllib.request.urlopen(urllib.request.Request(f"{s3}/trials", method="PUT")).close()
    assert "1 recording(s) stay" in here(*create, "--host", "s3://trials/stays").err
    assert objects(f"{s3}/trials") == 1
    assert objects(bucket) == 0


async def test_stdout_without_the_letters(kv: Run, server: Emulator) -> None:
    """JSON is readable where it can be, and is JSON all the same on a stdout of ASCII."""
    await kv("create", "Zoë", "--voice-url", URL, "--external-task-id", "zoe")
    server.advance(1)
    plain, told = await asyncio.gather(
        kv("get", "zoe", "--json"), kv("get", "zoe", "--json", PYTHONIOENCODING="ascii")
    )
    assert '"Zoë"' in plain.out
    assert told.out.isascii()
    assert told.json["task_result"] == plain.json["task_result"]


async def test_times(kv: Run, server: Emulator) -> None:
    """A time is the machine's, and tells its zone."""
    await kv("create", "Ada", "--voice-url", URL, "--external-task-id", "a")
    there, list_there = await asyncio.gather(kv("get", "a", TZ="JST-9"), kv("list", TZ="JST-9"))
    assert re.search(r"\ncreated_at        \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+0900\n", there.out)
    assert "+0900\t" in list_there.out


@pytest.mark.parametrize("server_options", [{"task_seconds": 600}])
async def test_task_that_goes_on(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """What is not done yet is not there yet: status 1, and what to do."""
    await kv("create", "Ada", "--voice-url", URL, "--external-task-id", "a")
    waited, told, trial, cloned = await asyncio.gather(
        kv("wait", "a", "--timeout", "0.2"),
        kv("wait", "a", "--timeout", "0.2", "--json"),
        kv("download", "a", "t.mp3"),
        kv("clone", "Ada", "--voice-url", URL, "--external-task-id", "a", "--timeout", "0.2"),
    )
    for ended in (waited, told, trial, cloned):
        assert ended.status == 1
        assert "kling-voice wait" in ended.err
        assert len(ended.err.strip().splitlines()) <= 4
    assert told.json["task_status"] in ("submitted", "processing")
    assert waited.out == trial.out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("server_options", [{"fail_when": lambda body: "two voices found"}])
async def test_task_that_fails(kv: Run) -> None:
    """A failed task is status 1 with the vendor's reason; --json gives the task all the same."""
    shown, told = await asyncio.gather(
        kv("clone", "Ada", "--voice-url", URL), kv("clone", "Ada", "--voice-url", URL, "--json")
    )
    assert (shown.status, shown.out) == (1, "")
    assert "two voices found" in shown.err
    assert told.status == 1
    assert told.json["task_status_msg"] == "two voices found"


@pytest.mark.parametrize("server_options", [{"fail_when": lambda body: "noise"}])
def test_download_of_a_failed_task(here: Here, server: Emulator, tmp_path: Path) -> None:
    """There is no recording to fetch, and nothing to wait for."""
    here("create", "Ada", "--voice-url", URL, "--external-task-id", "a")
    server.advance(1)
    ended = here("download", "a", "t.mp3")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "Error: Task a has no voice: it is failed.\n"
    assert os.listdir(tmp_path) == []


# --- lists ---


async def test_lists(kv: Run, server: Emulator) -> None:
    """All pages are listed, or so many as asked for; a pipe gets tab-separated lines."""
    server.preload(1203)
    tasks, some, few, presets = await asyncio.gather(
        kv("list", "--json"),
        kv("list", "--limit", 7, "--json"),
        kv("list", "--limit", "2"),
        kv("presets"),
    )
    assert len(tasks.json) == 1203
    assert [task["task_id"] for task in some.json] == [task["task_id"] for task in tasks.json[:7]]
    header, *rows = few.out.splitlines()
    assert header.split("\t")[:4] == ["voice_name", "task_status", "voice_id", "task_id"]
    assert [len(row.split("\t")) for row in rows] == [len(header.split("\t"))] * 2
    assert "Calm Narrator\t" in presets.out


def test_empty_list(here: Here) -> None:
    """An account without voices has an empty list."""
    assert len(here("list").out.splitlines()) == 1
    assert here("list", "--json").json == []


# --- what is wrong ---

USAGE: dict[str, tuple[list[Any], str]] = {
    "no such command": (
        ["bogus"],
        f'Unknown command "bogus". The commands are {", ".join(COMMANDS)}.',
    ),
    "a slip": (["delet", "x"], 'Unknown command "delet". Did you mean "delete"? The commands are '),
    "a second manifest": (
        ["batch", "a.csv", "b.csv"],
        "Error: batch takes one manifest, and 'b.csv' is left over.\nSee: kling-voice batch --help",
    ),
    "words without quotes": (
        ["clone", "A", "fine", "name", "--video-id", "1"],
        "Error: clone takes one name, and 'fine', 'name' are left over.",
    ),
    "a third word": (
        ["download", "a", "b", "c"],
        "Error: download takes one task id and one path, and 'c' is left over.",
    ),
    "a word for none": (["list", "all"], "Error: list takes options only, and 'all' is left over."),
    "no such option": (["get", "x", "--nope"], "See: kling-voice get --help"),
    "no name": (["clone"], "NAME"),
    "no source": (["clone", "Ada"], "exactly one of --voice-url, --voice-file and --video-id"),
    "two sources": (["create", "Ada", "--voice-url", URL, "--video-id", "1"], "exactly one"),
    "long name": (["clone", "x" * 21, "--voice-url", URL], "1 to 20 characters"),
    "bad url": (["clone", "Ada", "--voice-url", "ftp://x"], "http(s) URL"),
    "no file": (["clone", "Ada", "--voice-file", "no.mp3"], "'no.mp3' does not exist"),
    "bad file": (["clone", "Ada", "--voice-file", __file__], "its name must end in .mp3"),
    "no host": (["clone", "Ada", "--voice-file", ADA], "--host s3://bucket/prefix"),
    "bad host": (
        ["clone", "Ada", "--voice-file", ADA, "--host", "ftp://x/y"],
        "s3://bucket/prefix",
    ),
    "bad timeout": (["wait", "x", "--timeout", "-1"], "--timeout"),
    "no number": (["wait", "x", "--timeout", "soon"], "--timeout"),
    "NaN": (["wait", "x", "--timeout", "nan"], "timeout"),
    "bad limit": (["list", "--limit", "0"], "--limit"),
    "bad id": (["get", ".."], "must not be '..'"),
    "empty id": (["wait", ""], "is empty."),
    "unconfirmed": (["delete", "x"], "--yes"),
    "no path": (["download", "x"], "PATH"),
    "bad port": (["emulator", "--port", "99999"], "--port"),
    "bad faults": (["emulator", "--faults", "2"], "--faults"),
    "bad sample": (["emulator", "--sample", "no.mp3"], "no.mp3 is not a file"),
    "bad secret": (["emulator", "--webhook-secret", "?"], "secret"),
}


@pytest.mark.parametrize(("arguments", "told"), USAGE.values(), ids=USAGE)
def test_usage(here: Here, server: Emulator, arguments: list[Any], told: str) -> None:
    """What cannot be carried out as given is status 2, in a few words, before anything is sent."""
    ended = here(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("Error: ")
    assert told in ended.err
    assert len(ended.err.splitlines()) <= 2
    assert not server.requests


async def test_usage_as_processes(kv: Run) -> None:
    """The same, for some of them, as it is for a shell."""
    cases = [USAGE[case] for case in ("no such command", "no source", "unconfirmed")]
    ends = await asyncio.gather(*(kv(*arguments) for arguments, _ in cases))
    for (_, told), ended in zip(cases, ends, strict=True):
        assert (ended.status, ended.out) == (2, "")
        assert told in ended.err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"KLING_API_KEY": ""},
            "Error: No credentials: set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY, or"
            " try clone or batch with --emulator.\n",
        ),
        ({"KLING_API_KEY": "", "KLING_ACCESS_KEY": "a"}, "KLING_SECRET_KEY"),
        ({"KLING_BASE_URL": "http://example.com"}, "https"),
        ({"KLING_BASE_URL": "kling"}, "base_url (or KLING_BASE_URL) must be a URL such as "),
    ],
)
def test_settings(here: Here, changes: dict[str, str], told: str) -> None:
    """Settings that are missing or wrong are status 2, and tell what to set."""
    ended = here("list", **changes)
    assert (ended.status, ended.out) == (2, "")
    assert told in ended.err


async def test_refusals(kv: Run, unused_tcp_port: int) -> None:
    """A refused key is status 1 with its code, and so is a server that is not there."""
    unknown, nobody = await asyncio.gather(
        kv("list", KLING_API_KEY="not-it"),
        kv("presets", KLING_BASE_URL=f"http://127.0.0.1:{unused_tcp_port}"),
    )
    assert unknown.status == nobody.status == 1
    assert "code 1000" in unknown.err
    assert "request_id" in unknown.err
    assert "no usable answer" in nobody.err
    assert "check the connection, and KLING_BASE_URL." in nobody.err


async def test_download_problems(kv: Run, server: Emulator, tmp_path: Path) -> None:
    """A folder is no file: status 2; a trial that has expired says how long they live."""
    await kv("create", "Ada", "--voice-url", URL, "--external-task-id", "a")
    server.advance(1)
    folder = await kv("download", "a", tmp_path)
    assert (folder.status, folder.out) == (2, "")
    assert "is a folder" in folder.err
    server.advance(31 * 86400)
    expired, missing = await asyncio.gather(
        kv("download", "a", "t.mp3"), kv("download", "none", "t.mp3")
    )
    assert expired.status == missing.status == 1
    assert "30 days" in expired.err
    assert "voice_id" not in expired.err
    assert "code 1203" in missing.err
    assert missing.err.splitlines()[-1] == (
        "download takes a task's id (task_id or external_task_id), not a voice_id; the trial_url of"
        " a preset is in: kling-voice presets --json"
    )


async def test_unknown_outcome(kv: Run, server: Emulator) -> None:
    """When it is not known whether a voice was created, the command to find out is told."""
    server.faults = Faults(rate=1, kinds=["reset_before"])
    ended = await kv("create", "Ada", "--voice-url", URL, "--external-task-id", "ada-1")
    assert ended.status == 1
    assert "run it again with --external-task-id 'ada-1' to get it" in ended.err


def test_taken_id(here: Here, server: Emulator) -> None:
    """Of an id that something else holds it is told what to run, in the command line's words."""
    server.reserve_external_id("mine")
    ended = here("create", "Ada", "--video-id", "829", "--external-task-id", "mine")
    assert ended.status == 1
    assert ended.err.endswith(
        " If a create with this id was sent in the last seconds, run the same command again, since"
        " reads may lag; else use another --external-task-id. This command created no voice and"
        " nothing is billed for it (--external-task-id 'mine').\n"
    )


@pytest.mark.parametrize("arguments", [["x" * 21, "--video-id", "1"], ["Ada", "--voice-url", "x"]])
def test_refused_before_it_was_sent(here: Here, server: Emulator, arguments: list[str]) -> None:
    """Where nothing was sent, no id is told: the vendor has never seen it."""
    ended = here("clone", *arguments)
    assert ended.status == 2
    assert "external" not in ended.err
    assert not server.requests


async def test_reader_that_leaves(kv: Run, environment: dict[str, str], server: Emulator) -> None:
    """A pipe that is closed early ends the command without a word."""
    server.preload(3000)
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m kling_voice.cli list --json | head -n 1",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (out, err) == (b"[\n", b"")


@pytest.mark.parametrize("missing", ["cyclopts", "rich"])
@pytest.mark.parametrize("module", ["kling_voice", "kling_voice.cli"])
async def test_missing_extra(missing: str, module: str) -> None:
    """Without the extra, the command says how to install it, however it is started."""
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['', 'list'];"
        f" runpy.run_module({module!r}, run_name='__main__')"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    assert err.decode() == (
        f"Error: the command line needs {missing}: pip install 'kling-voice[cli]'\n"
    )


async def test_module(environment: dict[str, str]) -> None:
    """`python -m kling_voice` is the command line, too."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kling_voice", "presets"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b"Calm Narrator\t" in out


def test_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the extra's own packages are called missing; what else is, is not hidden."""
    monkeypatch.setitem(sys.modules, "kling_voice.cli.app", None)
    with pytest.raises(ImportError, match=r"kling_voice\.cli\.app"):
        main(["list"])


def test_bugs_are_not_hidden() -> None:
    """An error that no command foresees keeps its traceback."""
    bug = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught:
        report(bug)
    assert caught.value is bug


def test_stdout_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that runs a command may catch its output in a plain StringIO."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["--version"]) == 0
    assert out.getvalue() == f"{__version__}\n"


async def until_true(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it does not become so")


async def interrupted_clone(
    environment: dict[str, str], *arguments: str, until: Callable[[], bool] | None = None
) -> list[str]:
    """Interrupt a clone when something is so, or once it has told something; give its stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kling_voice.cli", "clone", "Ada", "--voice-url", URL, *arguments),
        env=environment,
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    first = b""
    async with asyncio.timeout(30):
        if until is None:
            first = await process.stderr.readline()
        else:
            await until_true(until)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    return (first + err).decode().splitlines()


@pytest.mark.parametrize("server_options", [{"task_seconds": 600}])
async def test_interrupted_clone(environment: dict[str, str], server: Emulator) -> None:
    """Ctrl-C is status 130, and tells the command that gets the voice."""
    told = await interrupted_clone(
        environment, until=lambda: any(call.startswith("GET") for call in list(server.requests))
    )
    assert told == [
        "Interrupted. Run the same command again with --external-task-id"
        f" {server.tasks[0].external_task_id}; that cannot create it twice."
    ]


async def test_interrupted_create(environment: dict[str, str], server: Emulator) -> None:
    """Before the vendor has answered, the way on is the same command with the same id."""
    server.faults = Faults(script={"create": {1: Fault.STALL_AFTER}})
    told = await interrupted_clone(environment, until=lambda: server.created > 0)
    assert told == [
        "Interrupted. Run the same command again with --external-task-id"
        f" {server.tasks[0].external_task_id}; that cannot create it twice."
    ]


async def test_interrupted_trial(environment: dict[str, str]) -> None:
    """The task of the command's own emulator has ended with it: nothing goes on."""
    *_, last = told = await interrupted_clone(environment, "--emulator")
    assert last == (
        "Interrupted. The emulator has ended with this command; running it again starts anew."
    )
    assert "Note" not in "".join(told)


# --- the emulator ---


async def test_emulator(environment: dict[str, str], kv: Run, tmp_path: Path) -> None:
    """The emulator serves until it is interrupted, and other commands work with it."""
    shutil.copy(ADA, tmp_path / "mine.mp3")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kling_voice.cli", "emulator", "--port", "0", "--task-seconds", "0.1"),
        *("--faults", "0.2", "--fault-seed", "3"),
        *("--concurrency-limit", "2", "--sample", "mine.mp3"),
        env=environment,
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    greeting = b""
    while b"mine.mp3: " not in greeting:
        greeting += await asyncio.wait_for(process.stdout.readline(), 10)
    exports = [line.split("=", 1) for line in greeting.decode().splitlines() if "export" in line]
    settings = {name.removeprefix("export "): value for name, value in exports if name[0] == "e"}
    sample = greeting.decode().rpartition("mine.mp3: ")[2].strip()
    settings["KLING_API_KEY"] = ""
    ended, lost = await asyncio.gather(
        kv("clone", "Me", "--voice-url", sample, "--json", **settings),
        kv("clone", "Me", "--voice-url", "http://127.0.0.1:1/a.mp3", **settings),
    )
    assert ended.json["task_status"] == "succeed"
    assert "--no-fetch-samples" in lost.err
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_emulator_for_programs(environment: dict[str, str], kv: Run) -> None:
    """--json tells a program where the emulator is, and how to log in; a taken port is told."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kling_voice.cli", "emulator", "--port", "0", "--json"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    text = await asyncio.wait_for(process.stdout.readuntil(b"\n}\n"), 10)
    port = text.decode().partition("127.0.0.1:")[2].partition('"')[0]
    assert b'"api_key": ' in text
    taken = await kv("emulator", "--port", port)
    assert taken.status == 2
    assert f"Port {port} cannot be used" in taken.err
    process.send_signal(signal.SIGTERM if os.name == "posix" else signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0


async def test_emulator_without_signal_handlers(environment: dict[str, str]) -> None:
    """Where an event loop cannot handle signals, as on Windows, Ctrl-C is the usual end, too."""
    code = (
        "import asyncio, sys; from kling_voice.cli import main;"
        " asyncio.SelectorEventLoop.add_signal_handler ="
        " asyncio.AbstractEventLoop.add_signal_handler;"
        " sys.exit(main(['emulator', '--port', '0', '--json']))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readuntil(b"\n}\n"), 10)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
