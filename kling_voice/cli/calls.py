"""The commands for one voice, and the lists: what they do, in terms of the client."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from attrs import frozen
from rich.prompt import Confirm
from rich.status import Status

from kling_voice.cli.connection import connected, host_url
from kling_voice.cli.console import (
    clean,
    complain,
    say,
    show,
    show_json,
    stderr,
)
from kling_voice.cli.problems import (
    DONE,
    EMULATOR_ENDED,
    FAILED,
    InterruptedCommandError,
    UsageError,
    report,
)
from kling_voice.cli.views import as_json, show_task, show_tasks
from kling_voice.creating import new_external_task_id
from kling_voice.errors import NotFoundError, SampleError, TaskFailedError, WaitTimeoutError
from kling_voice.models import VoiceTask
from kling_voice.samples import inspect_sample

T = TypeVar("T")

_PAGE = 500  # tasks a request; the client asks for fewer where that is refused


def run(work: Coroutine[Any, Any, T], *, go_on: str = "") -> T:
    """Run a command's coroutine.

    Args:
        work: The coroutine.
        go_on: How to go on after Ctrl-C.

    Raises:
        InterruptedCommandError: Ctrl-C ended it.
    """
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise InterruptedCommandError(f"Interrupted. {go_on}".strip()) from None


@frozen
class Wanted:
    """A voice to create.

    Attributes:
        voice_name: Its name.
        voice_url: A public URL of the recording, unless another source is given.
        voice_file: A local recording.
        video_id: A video made earlier on the account.
        callback_url: Where the vendor reports changes.
        external_task_id: The idempotency key.
        host: The bucket that a local recording goes to.
        emulator: Whether to work with an emulator started for it.
    """

    voice_name: str
    voice_url: str | None
    voice_file: Path | None
    video_id: str | None
    callback_url: str | None
    external_task_id: str | None
    host: str | None
    emulator: bool

    def check(self) -> None:
        """Refuse what can be seen to be wrong before anything is done.

        Raises:
            UsageError: It cannot be created as it was asked for.
        """
        given = [self.voice_url, self.voice_file, self.video_id]
        if sum(source is not None for source in given) != 1:
            raise UsageError("Give exactly one of --voice-url, --voice-file and --video-id.")
        if self.voice_file is None:
            return
        try:
            inspect_sample(self.voice_file)
        except SampleError as error:
            raise UsageError(str(error)) from None
        if not self.emulator and host_url(self.host, emulator=False) is None:
            raise UsageError(
                "--voice-file needs a bucket that the vendor can fetch it from: name one by"
                " --host s3://bucket/prefix or KLING_SAMPLE_HOST."
            )


def clone(wanted: Wanted, *, timeout: float | None, json: bool) -> int:
    """Create a voice and wait for it."""
    wanted.check()
    external_task_id = wanted.external_task_id or new_external_task_id()

    async def work() -> VoiceTask:
        ended: list[VoiceTask] = []
        async with connected(
            emulator=wanted.emulator, host=host_url(wanted.host, emulator=wanted.emulator)
        ) as kling:
            with _watching(f"cloning {wanted.voice_name}") as tell:

                def update(task: VoiceTask) -> None:
                    tell(task)
                    if task.succeeded:
                        ended.append(task)

                await kling.clone_voice(
                    wanted.voice_name,
                    voice_url=wanted.voice_url,
                    voice_file=wanted.voice_file,
                    video_id=wanted.video_id,
                    callback_url=wanted.callback_url,
                    external_task_id=external_task_id,
                    timeout=timeout,
                    on_update=update,
                )
            return ended[-1] if ended else await kling.get_task(external_task_id)

    go_on = _again(wanted, external_task_id)
    return _show_end(work(), go_on=go_on, json=json, emulator=wanted.emulator)


def create(wanted: Wanted, *, json: bool) -> int:
    """Create a voice and tell its task."""
    wanted.check()
    external_task_id = wanted.external_task_id or new_external_task_id()

    async def work() -> VoiceTask:
        async with connected(
            emulator=wanted.emulator, host=host_url(wanted.host, emulator=wanted.emulator)
        ) as kling:
            return await kling.create_voice(
                wanted.voice_name,
                voice_url=wanted.voice_url,
                voice_file=wanted.voice_file,
                video_id=wanted.video_id,
                callback_url=wanted.callback_url,
                external_task_id=external_task_id,
            )

    task = run(work(), go_on=_again(wanted, external_task_id))
    show_task(task, json=json)
    if not (task.is_done or wanted.emulator):
        say(f"Wait for it with: kling-voice wait {task.task_id}")
    return DONE


def _again(wanted: Wanted, external_task_id: str) -> str:
    if wanted.emulator:
        return EMULATOR_ENDED
    return (
        f"Run the same command again with --external-task-id {external_task_id}; that cannot create"
        " it twice."
    )


def get(task_id: str, *, json: bool) -> int:
    """Tell a task."""

    async def work() -> VoiceTask:
        async with connected() as kling:
            return await kling.get_task(task_id)

    show_task(run(work()), json=json)
    return DONE


def wait(task_id: str, *, timeout: float | None, json: bool) -> int:
    """Wait for a task's end and tell it."""

    async def work() -> VoiceTask:
        async with connected() as kling:
            with _watching(f"waiting for {task_id}") as tell:
                return await kling.wait_for_task(task_id, timeout=timeout, on_update=tell)

    go_on = f"The task goes on; wait on with: kling-voice wait {task_id}"
    return _show_end(work(), go_on=go_on, json=json)


def _show_end(
    work: Coroutine[Any, Any, VoiceTask],
    *,
    go_on: str,
    json: bool,
    emulator: bool = False,
) -> int:
    """Show the task that *work* ends with; one that failed, or goes on, is told as JSON too."""
    try:
        show_task(run(work, go_on=go_on), json=json)
    except (TaskFailedError, WaitTimeoutError) as error:
        if json and error.task is not None:
            show_json(as_json(error.task))
        if emulator and isinstance(error, WaitTimeoutError):
            complain(f"The task did not end within --timeout. {EMULATOR_ENDED}")
            return FAILED
        raise
    return DONE


def list_tasks(*, presets: bool, limit: int | None, emulator: bool, json: bool) -> int:
    """Tell all tasks, or all presets."""

    async def work() -> list[VoiceTask]:
        async with connected(emulator=emulator) as kling:
            size = min(limit or _PAGE, _PAGE)
            source = kling.iter_presets(size) if presets else kling.iter_tasks(size)
            return await _take(source, limit)

    show_tasks(run(work()), json=json, presets=presets)
    return DONE


async def _take(source: AsyncIterator[VoiceTask], limit: int | None) -> list[VoiceTask]:
    taken: list[VoiceTask] = []
    async for task in source:
        taken.append(task)
        if len(taken) == limit:
            break
    return taken


def delete(voice_id: str, *, yes: bool, json: bool) -> int:
    """Delete a voice, after asking."""
    if not yes:
        if not (sys.stdin.isatty() and stderr().is_terminal):
            raise UsageError("Deleting cannot be undone: confirm it with --yes.")
        try:
            question = f"Delete the voice {clean(voice_id)}? This cannot be undone."
            yes = Confirm.ask(question, console=stderr(), default=False)
        except EOFError:
            say("")
        if not yes:
            say("Nothing was deleted.")
            return FAILED

    async def work() -> None:
        async with connected() as kling:
            await kling.delete_voice(voice_id)

    run(work(), go_on="Run the same command again; deleting twice does no harm.")
    if json:
        show_json({"voice_id": voice_id, "deleted": True})
    else:
        show(clean(f"Deleted the voice {voice_id}."))
    return DONE


def download(task_id: str, path: Path, *, json: bool) -> int:
    """Fetch the trial recording of a task's voice."""

    async def work() -> Path | VoiceTask | NotFoundError:
        async with connected() as kling:
            try:
                task = await kling.get_task(task_id)
            except NotFoundError as error:
                return error
            if task.voice is None:
                return task
            return await kling.download_trial(task.voice, path)

    done = run(work(), go_on="No file was left; run the same command again.")
    if isinstance(done, NotFoundError):
        status = report(done)
        say(
            "download takes a task's id (task_id or external_task_id), not a voice_id; the"
            " trial_url of a preset is in: kling-voice presets --json"
        )
        return status
    if isinstance(done, VoiceTask):
        complain(f"Task {task_id} has no voice: it is {done.task_status}.")
        if not done.is_done:
            say(f"Wait for it with: kling-voice wait {task_id}")
        return FAILED
    size = done.stat().st_size
    if json:
        show_json({"path": str(done), "bytes": size})
    else:
        show(clean(f"{done}: {size:,} bytes"))
    return DONE


@contextmanager
def _watching(what: str) -> Iterator[Callable[[VoiceTask], None]]:
    """Show on stderr how a task gets on: a spinner on a terminal, a line a change elsewhere."""
    if not stderr().is_terminal:
        yield lambda task: say(clean(f"{what}: {task.task_status}"))
        return
    with Status(clean(what), console=stderr()) as status:
        yield lambda task: status.update(clean(f"{what}: {task.task_status}"))
