"""The emulator on the command line: `python -m kling_voice.emulator --port 8080`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kling_voice.auth import AccessKey
from kling_voice.emulator.faults import TRANSIENT, Fault, Faults
from kling_voice.emulator.server import Emulator

__all__ = ["main", "serve"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; answers the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.access_key is None) != (options.secret_key is None):
        parser.error("--access-key and --secret-key go together")
    for sample in options.sample:
        if not sample.is_file():
            parser.error(f"--sample {sample}: no such file")
    try:
        emulator = _emulator(options)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    try:
        asyncio.run(serve(emulator, options.sample))
    except OSError as error:
        sys.stderr.write(f"Cannot listen on {options.host}:{options.port}: {error}\n")
        return 1
    return 0


async def serve(emulator: Emulator, samples: Sequence[Path] = ()) -> None:
    """Run an emulator and tell how to use it, until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels us instead
            loop.add_signal_handler(number, stop.set)
    async with emulator:
        served = [f"{path}: {await emulator.publish(path, path.name)}\n" for path in samples]
        sys.stdout.write(_greeting(emulator) + "".join(served))
        sys.stdout.flush()
        await stop.wait()


def _greeting(emulator: Emulator) -> str:
    url = emulator.base_url
    body = {"voice_name": "Ada", "voice_url": f"{url}/media/recordings/ada.mp3"}
    example = [
        "curl",
        f"{url}/v1/general/custom-voices",
        f"--header=Authorization: Bearer {emulator.api_key}",
        "--header=Content-Type: application/json",
        f"--data={json.dumps(body)}",
    ]
    return "\n".join(
        [
            f"The emulator listens on {url} (Ctrl-C ends it).",
            "",
            f"export KLING_BASE_URL={shlex.quote(url)}",
            f"export KLING_ACCESS_KEY={shlex.quote(emulator.credentials.access_key)}",
            f"export KLING_SECRET_KEY={shlex.quote(emulator.credentials.secret_key)}",
            f"# or, in place of the two keys: export KLING_API_KEY={shlex.quote(emulator.api_key)}",
            "",
            shlex.join(example),
            "",
        ]
    )


def _emulator(options: argparse.Namespace) -> Emulator:
    faults = None
    if options.faults:
        faults = Faults(options.faults, seed=options.fault_seed, kinds=options.fault_kinds)
    credentials = None
    if options.access_key is not None:
        credentials = AccessKey(access_key=options.access_key, secret_key=options.secret_key)
    return Emulator(
        host=options.host,
        port=options.port,
        prefix=options.prefix,
        credentials=credentials,
        api_key=options.api_key,
        concurrency_limit=options.concurrency_limit,
        task_seconds=options.task_seconds,
        time_scale=options.time_scale,
        faults=faults,
        fetch_samples=options.fetch_samples,
        webhook_secret=options.webhook_secret,
        callback_shape=options.callback_shape,
    )


def _fault_kinds(text: str) -> list[Fault]:
    try:
        return [Fault(kind) for kind in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kling_voice.emulator",
        description="The custom-voice API on this machine, to test against instead of paying.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8080, help="port; 0 picks a free one (%(default)s)")
    add("--prefix", default="", help="path in front of all others, as behind a gateway")
    add("--access-key", help="access key to accept (default: made up)")
    add("--secret-key", help="its secret key, 32 characters or more")
    add("--api-key", help="API key to accept (default: made up)")
    add("--concurrency-limit", type=int, metavar="N", help="tasks in flight (default: any)")
    add("--task-seconds", type=float, default=9.0, metavar="S", help="a task's life (%(default)s)")
    add("--time-scale", type=float, default=1.0, metavar="X", help="how much faster tasks live")
    add("--faults", type=float, default=0.0, metavar="RATE", help="part of requests that fail")
    add("--fault-seed", type=int, default=0, metavar="N", help="another sequence of faults")
    add(
        "--fault-kinds",
        type=_fault_kinds,
        default=TRANSIENT,
        metavar="KIND,...",
        help=f"kinds of faults, of: {', '.join(Fault)} (default: all but stalls and tokens)",
    )
    add(
        "--fetch-samples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch and check each voice_url",
    )
    add(
        "--sample",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="serve a recording and print its URL; may be repeated",
    )
    add("--webhook-secret", metavar="whsec_...", help="sign the callbacks")
    add("--callback-shape", choices=["legacy", "new"], default="legacy", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
