"""What went wrong, in a line or two that say what to do, and the exit status that goes with it."""

from kling_voice.cli.console import complain, say
from kling_voice.errors import (
    ConfigurationError,
    InvalidRequestError,
    KlingError,
    TaskFailedError,
    WaitTimeoutError,
)

DONE = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130


class UsageError(Exception):
    """The command cannot be carried out as it was given; nothing was done."""


class InterruptedCommandError(Exception):
    """Ctrl-C ended the command; the text says how to go on."""


def report(error: Exception) -> int:
    """Tell an error on stderr and give the exit status.

    Raises:
        Exception: *error* itself, if it is not a foreseeable one.
    """
    if isinstance(error, KlingError):
        complain(in_words(error))
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


def reason(error: BaseException) -> str:
    """Tell in a few words why one voice of many failed."""
    if isinstance(error, TaskFailedError) and error.task is not None:
        return error.task.task_status_msg or "the vendor gives no reason"
    return in_words(error)


def in_words(error: BaseException) -> str:
    """Tell an error in the words of the command line."""
    text = str(error) or type(error).__name__
    if isinstance(error, TaskFailedError):
        return text
    return text.replace("external_task_id=", "--external-task-id ")
