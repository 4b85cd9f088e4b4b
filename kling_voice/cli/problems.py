"""What went wrong, in a line or two that say what to do, and the exit status that goes with it."""

from collections.abc import Callable

from kling_voice.cli.console import complain, say
from kling_voice.errors import (
    ConfigurationError,
    InvalidRequestError,
    KlingError,
    SampleError,
    TaskFailedError,
    WaitTimeoutError,
)
from kling_voice.models import VoiceRequest

DONE = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130

EMULATOR_ENDED = "The emulator has ended with this command; running it again starts anew."


class UsageError(Exception):
    """The command cannot be carried out as it was given; nothing was done."""


class InterruptedCommandError(Exception):
    """Ctrl-C ended the command; the text says how to go on."""


def report(error: Exception, tell: Callable[[BaseException], str] | None = None) -> int:
    """Tell an error on stderr and give the exit status.

    Args:
        error: What ended the command.
        tell: Puts an error of the package's into words; :func:`in_words` by default.

    Raises:
        Exception: *error* itself, if it is not a foreseeable one.
    """
    if isinstance(error, KlingError):
        complain((tell or in_words)(error))
        if isinstance(error, WaitTimeoutError) and error.task is not None:
            say(f"Wait on with: kling-voice wait {error.task.task_id}")
        return USAGE if isinstance(error, ConfigurationError | InvalidRequestError) else FAILED
    if isinstance(error, InterruptedCommandError):
        say(str(error))
        return INTERRUPTED
    if isinstance(error, UsageError):
        complain(str(error))
        return USAGE
    if isinstance(error, OSError):
        complain(" ".join(filter(None, [error.strerror or str(error), error.filename])))
        return FAILED
    raise error


def in_words(error: BaseException) -> str:
    """Tell an error in the words of the command line."""
    text = _told(error)
    if isinstance(error, TaskFailedError):
        return text
    if isinstance(error, ConfigurationError | InvalidRequestError | SampleError):
        text = _without_id(text, error)  # nothing was sent, so the id is nowhere
    return (
        text.replace(
            "pass credentials=ApiKey(...) or AccessKey(..., ...)",
            "try clone or batch with --emulator",
        )
        .replace("This call created", "This command created")
        .replace("call again with the same id", "run the same command again")
        .replace("call again with external_task_id=", "run it again with external_task_id=")
        .replace("another external_task_id", "another --external-task-id")
        .replace("external_task_id=", "--external-task-id ")
    )


def reason(error: BaseException, request: VoiceRequest, *, emulator: bool = False) -> str:
    """Tell in a few words why one voice of a batch failed.

    Args:
        error: What the voice failed by.
        request: The voice's request.
        emulator: Whether the emulator that was asked ends with the command, and its tasks with it.
    """
    if isinstance(error, TaskFailedError) and error.task is not None:
        return error.task.task_status_msg or "the vendor gives no reason"
    if isinstance(error, WaitTimeoutError) and emulator:
        return "it did not end within --timeout"
    text = in_batch(error)
    if request.external_task_id is None:
        own_id = getattr(error, "external_task_id", None)
        text = text.replace(
            f"external_task_id {own_id!r} is taken",
            f"the id made of its key {request.key!r} is taken",
        )
        text = text.replace("use another external_task_id", "give it another key")
        text = text.replace("Use another external_task_id for another voice", "Give it another key")
    return text


def in_batch(error: BaseException) -> str:
    """Tell an error in a batch's words: its ids are derived, and no option names one."""
    own_id = getattr(error, "external_task_id", None)
    text = _told(error)
    return (
        _without_id(text, error)
        .replace(f"call again with external_task_id={own_id!r}", "run the same command again")
        .replace("call again with the same id", "run the same command again")
    )


def _told(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    for words in ("check the connection, and ", "check "):
        text = text.replace(f"{words}base_url", f"{words}KLING_BASE_URL")
    return text


def _without_id(text: str, error: BaseException) -> str:
    return text.replace(f" (external_task_id={getattr(error, 'external_task_id', None)!r})", "")
