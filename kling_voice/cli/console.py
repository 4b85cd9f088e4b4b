"""Where words go: results to stdout, all else to stderr, with colour only where someone looks."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.text import Text

# What these rooms warn of is told by the commands themselves: retries, and a call cut short.
_TOLD_ELSEWHERE = ("backoff", "transport", "creating", "client")


@cache
def stdout() -> Console:
    """Give the console of stdout."""
    return Console(highlight=False)


@cache
def stderr() -> Console:
    """Give the console of stderr."""
    return Console(stderr=True, highlight=False)


def clean(text: object) -> str:
    """Give a text of the vendor's or of a file's on one line, without control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in str(text))


def say(text: str, *, style: str = "") -> None:
    """Tell something on stderr."""
    _put(Text(text, style))


def complain(text: str) -> None:
    """Tell an error on stderr."""
    _put(Text.assemble(("Error: ", "bold red"), clean(text)))


def _put(text: Text) -> None:
    console = stderr()
    console.print(text, soft_wrap=not console.is_terminal)  # a line of a log stays one line


def show(text: str | Text) -> None:
    """Print a line of the result on stdout, never wrapped; as it is where nobody looks."""
    if stdout().is_terminal:
        stdout().print(Text(text) if isinstance(text, str) else text, soft_wrap=True)
    else:
        sys.stdout.write(f"{text}\n")


def show_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeError:
        text = json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.module not in _TOLD_ELSEWHERE:
            say(f"Note: {clean(record.getMessage())}", style="yellow")


@contextmanager
def warnings_told() -> Iterator[None]:
    """Let the package's warnings appear on stderr, above a progress display if there is one."""
    logger = logging.getLogger("kling_voice")
    notices, propagates = _Notices(logging.WARNING), logger.propagate
    logger.addHandler(notices)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(notices)
        logger.propagate = propagates
