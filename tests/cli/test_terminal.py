"""What people see on a terminal of 80 columns: the progress, tables, colours and questions."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kling_voice.emulator import Emulator, Faults

from .support import Ended, results, write_csv

fcntl = pytest.importorskip("fcntl")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

Type = Callable[..., Awaitable[Ended]]
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def at_terminal(environment: dict[str, str], tmp_path: Path) -> Type:
    """A function that runs a command at a terminal of 80 columns; all it shows is its ``out``.

    *when* is a text to wait for, and *do* what to do then: a text to type, or a signal.
    """

    async def run(
        *arguments: object, when: str = "", do: str | signal.Signals = "", **changes: str
    ) -> Ended:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\0\x50\0\0\0\0\0")  # 24 lines, 80 columns
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "kling_voice.cli", *map(str, arguments)),
            env=environment | changes,
            cwd=tmp_path,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        shown = ""
        acting: asyncio.Task[None] | None = None

        async def act() -> None:
            while process.returncode is None:  # what comes before the line is read may be lost
                if isinstance(do, signal.Signals):
                    process.send_signal(do)
                else:
                    os.write(ours, do.encode())
                await asyncio.sleep(1)

        patience = asyncio.get_running_loop().call_later(30, process.kill)
        while piece := await asyncio.to_thread(_read, ours):
            shown += piece
            if acting is None and when and when in shown:
                acting = asyncio.create_task(act())
        await process.wait()
        patience.cancel()
        if acting is not None:
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
        os.close(ours)
        assert (acting is not None) == bool(when)
        assert "Traceback" not in shown
        return Ended(process.returncode or 0, shown, "")

    return run


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the other side has been closed
        return ""


def lines(shown: str) -> list[str]:
    """Give what was shown, line by line as it was drawn, without its escapes."""
    return [line for line in re.split(r"[\r\n]+", ESCAPES.sub("", shown)) if line.strip()]


@pytest.mark.parametrize("server_options", [{"task_seconds": 0.5, "concurrency_limit": 3}])
async def test_progress(at_terminal: Type, server: Emulator, tmp_path: Path) -> None:
    """The display tells done, failed, in flight, limit, rate and time left, in 80 columns."""
    server.fail_when = lambda body: "noise" if body["voice_name"] == "Voice 2" else None
    write_csv(tmp_path / "cast.csv", server, 9)
    ended = await at_terminal("batch", "cast.csv")
    assert ended.status == 1
    shown = lines(ended.out)
    assert all(len(line) <= 80 for line in shown)
    figures = [line for line in shown if " in flight " in line]
    assert len(figures) > 5
    form = r"\d done  \d failed  \d in flight  limit \d  [\d.]+ a minute *"
    assert re.fullmatch(form, figures[-3])
    assert any(re.search(r"\d/9 +\d:\d\d left", line) for line in shown)
    assert any("Voice 2: failed: noise" in line for line in shown)
    assert any(re.search(r"Voice 8 +succeed +\d{18}", line) for line in shown)
    assert "8 voices, 1 failure, 0.40 units deducted" in ended.out
    assert len(results(tmp_path / "cast.results.jsonl")) == 9
    assert COLOURS.search(ended.out)
    assert ended.out.count("\x1b[?25l") == ended.out.count("\x1b[?25h") == 1  # the cursor is back


async def test_no_color(at_terminal: Type, server: Emulator, tmp_path: Path) -> None:
    """NO_COLOR leaves the display, without colours."""
    write_csv(tmp_path / "cast.csv", server, 1)
    ended = await at_terminal("batch", "cast.csv", NO_COLOR="1")
    assert ended.status == 0
    assert " in flight " in ended.out
    colours = {code for match in COLOURS.findall(ended.out) for code in match[2:-1].split(";")}
    assert not {code for code in colours if code.startswith(("3", "4")) and len(code) > 1}


@pytest.mark.parametrize("server_options", [{"task_seconds": 5}])
async def test_ctrl_c(at_terminal: Type, server: Emulator, tmp_path: Path) -> None:
    """Ctrl-C leaves a clean terminal and the way to go on."""
    write_csv(tmp_path / "cast.csv", server, 3)
    ended = await at_terminal("batch", "cast.csv", when="3 in flight", do=signal.SIGINT)
    assert ended.status == 130
    assert lines(ended.out)[-1].endswith(
        "the same command again to go on; nothing is created twice."
    )
    assert ended.out.count("\x1b[?25l") == ended.out.count("\x1b[?25h")


async def test_questions_without_an_answer(at_terminal: Type, server: Emulator) -> None:
    """Ctrl-D and Ctrl-C at the question delete nothing, and each has its status."""
    ended, interrupted = await asyncio.gather(
        at_terminal("delete", "829", when="[y/n]", do="\x04"),
        at_terminal("delete", "829", when="[y/n]", do=signal.SIGINT),
    )
    assert ended.status == 1
    assert lines(ended.out)[-1] == "Nothing was deleted."
    assert interrupted.status == 130
    assert "Interrupted." in lines(interrupted.out)[-1]
    assert not server.requests


async def test_many_failures(at_terminal: Type, server: Emulator, tmp_path: Path) -> None:
    """Of more than 25 requests people get no table: ten failures, and how many more there are."""
    server.fail_when = lambda body: "noise" if int(body["voice_name"][6:]) < 12 else None
    write_csv(tmp_path / "cast.csv", server, 26)
    ended = await at_terminal("batch", "cast.csv")
    assert ended.status == 1
    shown = lines(ended.out)
    end = shown.index("… and 2 more failures")
    assert shown[end - 10 : end] == [f"line {n + 2}, Voice {n}: noise" for n in range(10)]
    assert shown[end + 1].startswith("14 voices, 12 failures, 0.70 units deducted in all, ")
    assert "voice_name" not in ended.out

    server.fail_when = None
    again = await at_terminal("batch", "cast.csv", "--retry-failed", "1")
    assert again.status == 0
    assert lines(again.out)[-2].startswith("26 voices (14 done before: ")
    assert "Voice" not in again.out


async def test_narrow_terminal(at_terminal: Type, server: Emulator) -> None:
    """Where a table does not fit, each row is a block of lines, in which all ids are whole."""
    names = ["A name of 20 letters", "名" * 10]
    for name in names:
        await at_terminal("create", name, "--voice-url", "https://example.com/a.mp3")
    server.advance(1)
    wide, narrow, tiny = await asyncio.gather(
        *(at_terminal("list", COLUMNS=columns) for columns in ("78", "77", "30"))
    )
    blocks = []
    for task, name in zip(server.tasks, names, strict=True):
        (row,) = [line for line in lines(wide.out) if task.task_id in line]
        assert row.split("  ")[0].strip() == name
        assert row.split()[-3:] == ["succeed", task.voice_id, task.task_id]
        blocks.append(
            f"voice_name: {name}\ntask_status: succeed\nvoice_id: {task.voice_id}\n"
            f"task_id: {task.task_id}\n"
        )
    for ended in (narrow, tiny):
        shown = ESCAPES.sub("", ended.out).replace("\r\n", "\n")
        assert shown == "\n".join(reversed(blocks))


async def test_long_reason(at_terminal: Type, server: Emulator, tmp_path: Path) -> None:
    """A long reason is wrapped within the table, and takes no room from the ids."""
    server.faults = Faults(script={"create": {1: 1201}})
    write_csv(tmp_path / "cast.csv", server, 2)
    ended = await at_terminal("batch", "cast.csv", "--concurrency", "1")
    shown = lines(ended.out)
    assert all(len(line) <= 80 for line in shown)
    assert any(re.match(r" Voice 0 +not created +The vendor refused", line) for line in shown)
    assert any(re.match(rf" Voice 1 +succeed +{server.tasks[0].voice_id}", line) for line in shown)

    server.faults = Faults(script={"create": {1: 1201}})
    narrow = await at_terminal(
        "batch", "cast.csv", "--batch-id", "b", "--output", "b", COLUMNS="60"
    )
    text = ESCAPES.sub("", narrow.out).replace("\r\n", "\n")
    assert "voice_name: Voice 0\ntask_status: not created\nreason: The vendor refused: " in text


async def test_empty_table(at_terminal: Type) -> None:
    """An account without voices is told in words, not by an empty table."""
    listed = await at_terminal("list")
    assert (listed.status, lines(listed.out)) == (0, ["There are none."])


async def test_tables_and_questions(at_terminal: Type, server: Emulator) -> None:
    """A voice is waited for and listed in 80 columns, and deleted only after a yes."""
    url = f"{server.base_url}/media/recordings/ada.mp3"
    cloned = await at_terminal("clone", "A name of 20 letters", "--voice-url", url)
    assert cloned.status == 0
    assert "cloning A name of 20 letters" in cloned.out
    voice_id = server.tasks[0].voice_id
    listed, no = await asyncio.gather(
        at_terminal("list"), at_terminal("delete", voice_id, when="[y/n]", do="n\r")
    )
    (row,) = [line for line in lines(listed.out) if voice_id in line]
    assert row.split()[-3:] == ["succeed", voice_id, server.tasks[0].task_id]
    assert len(row) <= 80
    assert no.status == 1
    assert "Nothing was deleted" in no.out
    assert not server.tasks[0].deleted
    yes = await at_terminal("delete", voice_id, when="[y/n]", do="y\r")
    assert yes.status == 0
    assert server.tasks[0].deleted


@pytest.mark.parametrize("server_options", [{"fail_when": lambda body: "\x1b[2Jcleared\r\n"}])
async def test_hostile_text(at_terminal: Type, server: Emulator, tmp_path: Path) -> None:
    """Nothing that the vendor says moves the cursor or clears the screen."""
    write_csv(tmp_path / "cast.csv", server, 1)
    batch, cloned = await asyncio.gather(
        at_terminal("batch", "cast.csv"),
        at_terminal("clone", "Ada", "--voice-url", "https://example.com/a.mp3"),
    )
    for ended in (batch, cloned):
        assert "cleared" in ended.out
        assert "\x1b[2J" not in ended.out
