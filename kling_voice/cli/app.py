"""The commands of `kling-voice`: their names, options and help.

What they do is in `calls.py`, `running.py` and `serving.py`, which are imported when they are
needed: a command starts as fast as what it uses.
"""

import inspect
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import (
    App,
    CycloptsError,
    Parameter,
    UnknownCommandError,
    UnusedCliTokensError,
    validators,
)

from kling_voice._version import __version__
from kling_voice.cli.console import complain, say, stderr, stdout, warnings_told
from kling_voice.cli.problems import DONE, FAILED, USAGE, report

app: App = App(
    name="kling-voice",
    version=__version__,
    help="Clone voices with the Kling AI custom-voice API: each is created exactly once.\n\n"
    "Credentials come from the environment: KLING_API_KEY, or KLING_ACCESS_KEY with"
    " KLING_SECRET_KEY; KLING_BASE_URL names another host than the vendor's in Singapore.\n\n"
    "To try it without an account, and without paying: clone, create, batch, list and presets take"
    " --emulator, and kling-voice emulator serves one for all commands.",
    suppress_keyboard_interrupt=False,
    help_format="plaintext",
    help_epilogue="Examples:\n"
    "  kling-voice clone Ada --voice-url https://example.com/ada.mp3\n"
    "  kling-voice batch cast.csv --output results.jsonl\n"
    "  kling-voice batch recordings/ --host s3://bucket/samples\n"
    "  kling-voice list --limit 10 --json\n\n"
    "Exit status: 0 all done, 1 something failed, 2 usage, configuration or a bad manifest, 130"
    " interrupted. Shell completion: kling-voice --install-completion",
)
app.register_install_completion_command()

_FLAG = Parameter(negative="", show_default=False)

Json = Annotated[
    bool,
    _FLAG,
    Parameter(help="Print one JSON value on stdout, and nothing else there."),
]
Emulated = Annotated[
    bool,
    _FLAG,
    Parameter(help="Run against a new, empty emulator, which ends with this command."),
]
Host = Annotated[
    str | None,
    Parameter(
        help="The bucket that recordings are put into for the vendor to fetch, s3://bucket/prefix."
        " [default: KLING_SAMPLE_HOST]"
    ),
]
Url = Annotated[str | None, Parameter(help="A public URL of the recording, 5 to 30 s long.")]
File = Annotated[
    Path | None, Parameter(help="A local .mp3, .wav, .mp4 or .mov; it is put into the --host.")
]
Video = Annotated[
    str | None, Parameter(help="A video made earlier on the account, in place of a recording.")
]
Callback = Annotated[str | None, Parameter(help="Where the vendor reports changes.")]
ExternalId = Annotated[
    str | None,
    Parameter(
        help="The idempotency key: running again with the same one never creates a second voice."
        " [default: made up]"
    ),
]
TaskId = Annotated[str, Parameter(help="A task_id or an external_task_id.")]
Timeout = Annotated[
    float,
    Parameter(
        validator=validators.Number(gte=0),
        help="Seconds from the accepted create, or the start of the wait; inf: for ever.",
    ),
]
Limit = Annotated[
    int | None,
    Parameter(validator=validators.Number(gte=1), help="At most so many. [default: all]"),
]


@app.command(
    help_epilogue="""Examples:
  kling-voice clone Ada --voice-url https://example.com/ada.mp3
  kling-voice clone Ada --voice-file ada.wav --host s3://bucket/samples
  kling-voice clone Ada --voice-file ada.wav --emulator --json"""
)
def clone(
    name: Annotated[str, Parameter(help="The voice's name, 1 to 20 characters.")],
    /,
    *,
    voice_url: Url = None,
    voice_file: File = None,
    video_id: Video = None,
    external_task_id: ExternalId = None,
    callback_url: Callback = None,
    timeout: Timeout = 600.0,
    host: Host = None,
    emulator: Emulated = False,
    json: Json = False,
) -> int:
    """Create a voice and wait for it."""
    from kling_voice.cli import calls

    wanted = calls.Wanted(
        name, voice_url, voice_file, video_id, callback_url, external_task_id, host, emulator
    )
    return calls.clone(wanted, timeout=_seconds(timeout), json=json)


@app.command(
    help_epilogue="""Examples:
  kling-voice create Ada --voice-url https://example.com/ada.mp3 --external-task-id ada-1
  kling-voice wait ada-1"""
)
def create(
    name: Annotated[str, Parameter(help="The voice's name, 1 to 20 characters.")],
    /,
    *,
    voice_url: Url = None,
    voice_file: File = None,
    video_id: Video = None,
    external_task_id: ExternalId = None,
    callback_url: Callback = None,
    host: Host = None,
    emulator: Emulated = False,
    json: Json = False,
) -> int:
    """Create a voice and print its task, without waiting."""
    from kling_voice.cli import calls

    wanted = calls.Wanted(
        name, voice_url, voice_file, video_id, callback_url, external_task_id, host, emulator
    )
    return calls.create(wanted, json=json)


@app.command(
    help_epilogue="""Examples:
  kling-voice get ada-1
  kling-voice get 829101234567890123 --json"""
)
def get(task_id: TaskId, /, *, json: Json = False) -> int:
    """Print a task as it is now."""
    from kling_voice.cli import calls

    return calls.get(task_id, json=json)


@app.command(
    help_epilogue="""Examples:
  kling-voice wait ada-1
  kling-voice wait 829101234567890123 --timeout 60 --json"""
)
def wait(task_id: TaskId, /, *, timeout: Timeout = 600.0, json: Json = False) -> int:
    """Wait until a task has ended, and print it."""
    from kling_voice.cli import calls

    return calls.wait(task_id, timeout=_seconds(timeout), json=json)


@app.command(
    name="list",
    help_epilogue="""Examples:
  kling-voice list
  kling-voice list --limit 20
  kling-voice list --json | jq -r '.[].task_result.voices[0].voice_id'""",
)
def list_tasks(*, limit: Limit = None, emulator: Emulated = False, json: Json = False) -> int:
    """Print the account's tasks, the newest first as a rule."""
    from kling_voice.cli import calls

    return calls.list_tasks(presets=False, limit=limit, emulator=emulator, json=json)


@app.command(
    help_epilogue="""Examples:
  kling-voice presets
  kling-voice presets --emulator --json"""
)
def presets(*, limit: Limit = None, emulator: Emulated = False, json: Json = False) -> int:
    """Print the vendor's official voices."""
    from kling_voice.cli import calls

    return calls.list_tasks(presets=True, limit=limit, emulator=emulator, json=json)


@app.command(
    help_epilogue="""Example:
  kling-voice delete 829201234567890123 --yes"""
)
def delete(
    voice_id: Annotated[str, Parameter(help="The voice_id of a custom voice.")],
    /,
    *,
    yes: Annotated[bool, _FLAG, Parameter(help="Do not ask.")] = False,
    json: Json = False,
) -> int:
    """Delete a custom voice; this cannot be undone."""
    from kling_voice.cli import calls

    return calls.delete(voice_id, yes=yes, json=json)


@app.command(
    help_epilogue="""Example:
  kling-voice download ada-1 ada-trial.mp3"""
)
def download(
    task_id: TaskId,
    path: Annotated[Path, Parameter(help="The file to write; an existing one is replaced.")],
    /,
    *,
    json: Json = False,
) -> int:
    """Download the trial recording of a task's voice; the vendor keeps it for 30 days."""
    from kling_voice.cli import calls

    return calls.download(task_id, path, json=json)


@app.command(
    help_epilogue="A manifest is CSV with a header, or JSON lines. Its columns are voice_name, one"
    " of voice_url, voice_file and video_id, and if you like callback_url, external_task_id and"
    " key. A folder stands for the recordings in it, each named by its file name.\n\n"
    "The same command again goes on where it stopped, and creates nothing twice (with --emulator it"
    " starts anew). The results have one line for each request in the end: its voice, or the error."
    " At the end stdout has a row for each request, too, tab-separated on a pipe; on a terminal it"
    " is a table, or of more than 25 requests the failures only.\n\n"
    "Examples:\n"
    "  kling-voice batch cast.csv --output results.jsonl\n"
    "  kling-voice batch recordings/ --host s3://bucket/samples\n"
    "  kling-voice batch recordings/ --emulator"
)
def batch(
    manifest: Annotated[Path, Parameter(help="A .csv or .jsonl file, or a folder.")],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(help="Where results are appended. [default: MANIFEST.results.jsonl, here]"),
    ] = None,
    batch_id: Annotated[
        str | None,
        Parameter(
            help="What makes it the same batch when it is run again. [default: the manifest's name]"
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1),
            help="Your own cap on tasks in flight. [default: the account's limit, as learned]",
        ),
    ] = None,
    retry_failed: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=0),
            help="How often a task that ended as failed is tried again, as a new task; counted over"
            " all runs of the batch.",
        ),
    ] = 0,
    timeout: Timeout = 600.0,
    host: Host = None,
    emulator: Emulated = False,
    json: Json = False,
) -> int:
    """Clone many voices, as fast as the account allows; a run can be killed and resumed."""
    from kling_voice.cli.running import run_batch

    return run_batch(
        manifest,
        output=output,
        batch_id=batch_id,
        concurrency=concurrency,
        retry_failed=retry_failed,
        timeout=_seconds(timeout),
        host=host,
        emulator=emulator,
        json=json,
    )


@app.command(
    help_epilogue="""Examples:
  kling-voice emulator --concurrency-limit 5
  kling-voice emulator --port 0 --task-seconds 0.5 --faults 0.2 --json
  kling-voice emulator --sample ada.mp3"""
)
def emulator(
    *,
    port: Annotated[
        int,
        Parameter(validator=validators.Number(gte=0, lte=65535), help="0 picks a free one."),
    ] = 8080,
    concurrency_limit: Annotated[
        int | None,
        Parameter(validator=validators.Number(gte=1), help="Tasks in flight. [default: any]"),
    ] = None,
    task_seconds: Annotated[
        float, Parameter(validator=validators.Number(gte=0), help="How long a task takes.")
    ] = 9.0,
    faults: Annotated[
        float,
        Parameter(
            validator=validators.Number(gte=0, lte=1),
            help="The part of requests that fail, 0 to 1.",
        ),
    ] = 0.0,
    fault_seed: Annotated[int, Parameter(help="Another sequence of faults.")] = 0,
    fetch_samples: Annotated[
        bool, Parameter(help="Whether to fetch and check each voice_url, as the vendor does.")
    ] = True,
    webhook_secret: Annotated[
        str | None, Parameter(help="Sign the callbacks with it: whsec_ and base64.")
    ] = None,
    sample: Annotated[
        list[Path] | None,
        Parameter(negative="", help="Serve a recording and print its URL; may be repeated."),
    ] = None,
    json: Json = False,
) -> int:
    """Serve an emulator of the vendor's API on this machine, until interrupted."""
    from kling_voice.cli.serving import serve_emulator

    return serve_emulator(
        port=port,
        concurrency_limit=concurrency_limit,
        task_seconds=task_seconds,
        faults=faults,
        fault_seed=fault_seed,
        fetch_samples=fetch_samples,
        webhook_secret=webhook_secret,
        samples=sample or (),
        json=json,
    )


def _seconds(timeout: float) -> float | None:
    return None if math.isinf(timeout) else timeout


def _in_words(error: CycloptsError) -> str:
    """Tell what is wrong with a command's words, where the parser is short of words."""
    if isinstance(error, UnknownCommandError):  # the parser lists eight commands at most
        commands = ", ".join(name for name in app if not name.startswith("-"))
        told, *_ = str(error).partition(" Available commands:")
        return f"{told} The commands are {commands}."
    if isinstance(error, UnusedCliTokensError) and error.target is not None:
        signature = inspect.signature(error.target)
        takes = [
            f"one {parameter.name.replace('_', ' ')}"
            for parameter in signature.parameters.values()
            if parameter.kind is parameter.POSITIONAL_ONLY
        ]
        command, left = " ".join(error.command_chain or ()), error.unused_tokens or []
        return (
            f"{command} takes {' and '.join(takes) or 'options only'}, and"
            f" {', '.join(map(repr, left))} {'is' if len(left) == 1 else 'are'} left over."
        )
    return str(error)


def run(arguments: Sequence[str]) -> int:
    """Run one command, and give the exit status; no foreseeable failure ends in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings_told():
            status = app(
                list(arguments),
                console=stdout(),
                error_console=stderr(),
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
    except CycloptsError as error:
        complain(_in_words(error))
        words = " ".join(["kling-voice", *(error.command_chain or ())])
        say(f"See: {words} --help")
        return USAGE
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return report(error)
    return status if isinstance(status, int) else DONE
