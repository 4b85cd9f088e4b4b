"""`kling-voice emulator`: serve an emulator for other programs until it is interrupted."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kling_voice.cli.console import show_json
from kling_voice.cli.problems import DONE, UsageError
from kling_voice.emulator import Emulator, Faults
from kling_voice.emulator.__main__ import serve


def serve_emulator(
    *,
    port: int,
    concurrency_limit: int | None,
    task_seconds: float,
    faults: float,
    fault_seed: int,
    fetch_samples: bool,
    webhook_secret: str | None,
    samples: Sequence[Path],
    json: bool,
) -> int:
    """Serve until interrupted, which is the usual end.

    Raises:
        UsageError: A setting is not usable, or the port is taken.
    """
    for sample in samples:
        if not sample.is_file():
            raise UsageError(f"{sample} is not a file.")
    try:
        emulator = Emulator(
            port=port,
            concurrency_limit=concurrency_limit,
            task_seconds=task_seconds,
            faults=Faults(faults, seed=fault_seed) if faults else None,
            fetch_samples=fetch_samples,
            webhook_secret=webhook_secret,
        )
    except (ImportError, ValueError) as error:
        raise UsageError(f"{error}.") from None
    try:
        asyncio.run(_serve_json(emulator, samples) if json else serve(emulator, samples))
    except OSError as error:
        raise UsageError(f"Port {port} cannot be used: {error.strerror}.") from None
    except KeyboardInterrupt:
        pass  # where signals cannot be handled in the loop
    return DONE


async def _serve_json(emulator: Emulator, samples: Sequence[Path]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with emulator:
        show_json(
            {
                "base_url": emulator.base_url,
                "access_key": emulator.credentials.access_key,
                "secret_key": emulator.credentials.secret_key,
                "api_key": emulator.api_key,
                "samples": {str(path): await emulator.publish(path, path.name) for path in samples},
            }
        )
        await stop.wait()
