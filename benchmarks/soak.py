"""The soak: many voices under faults, moving limits, lost callbacks and kills; none lost or twice.

`python -m benchmarks.soak` runs 10,000 voices in some minutes and ends with status 1 if the ledger
does not balance; `--voices 200 --kills 2` is a short form.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from multiprocessing.connection import Connection
from typing import Any

from attrs import frozen

from benchmarks.batches import Durations
from benchmarks.harness import SPAWN, say
from benchmarks.servers import (
    SECRET,
    EmulatorProcess,
    emulator_process,
    served_receiver,
)
from kling_voice import (
    AccessKey,
    CloneResult,
    KlingError,
    KlingVoiceClient,
    PollingPolicy,
    RetryPolicy,
    TaskFailedError,
    VoiceRequest,
)
from kling_voice.emulator import ALL, Emulator, Faults

FAULT_RATE = 0.2
BAD_EVERY = 50  # every 50th voice is made to fail
LIMITS = (8, 150)  # between which the account's limit moves
MOVE_SECONDS = 0.5
GLANCE_SECONDS = 0.05  # between two looks at whether a kill is due
STOPS = 20  # a run that ended with an error is started again at most so often

_DONE = ("", "")
_FAILED = TaskFailedError.__name__
_Message = tuple[str, str]  # a source, and what became of it


@frozen
class Ledger:
    """What became of all that was asked for.

    Attributes:
        asked: Voices asked for.
        created: Tasks that the vendor created.
        succeeded: Requests whose voice the last run told, and the vendor confirms.
        failed: Requests whose task failed, as it was made to.
        lost: All other requests.
        twice: Requests for which the vendor created more than one task.
        killed: How often the worker was killed.
        stopped: How often it ended with an error, and was started again.
        requests: All requests that arrived.
        faults: How many of those met a fault.
        callbacks_lost: Callbacks that were dropped, or reached nobody.
        seconds: How long it took.
    """

    asked: int
    created: int
    succeeded: int
    failed: int
    lost: int
    twice: int
    killed: int
    stopped: int
    requests: int
    faults: int
    callbacks_lost: int
    seconds: float

    @property
    def balances(self) -> bool:
        """Whether nothing was lost and nothing was created twice."""
        return self.lost == 0 and self.twice == 0

    def __str__(self) -> str:
        rows = [
            ("asked", self.asked),
            ("created", self.created),
            ("succeeded", self.succeeded),
            ("failed by design", self.failed),
            ("lost", self.lost),
            ("twice", self.twice),
            ("worker killed", self.killed),
            ("worker stopped by an error", self.stopped),
            ("requests", self.requests),
            ("faults among them", self.faults),
            ("callbacks that came to nobody", self.callbacks_lost),
            ("seconds", round(self.seconds)),
        ]
        return "\n".join(f"{what:<30} {count:>9,}" for what, count in rows)


def run(voices: int = 10_000, kills: int = 10, *, seed: int = 0) -> Ledger:
    """Soak the client, and give the ledger.

    Args:
        voices: How many to ask for.
        kills: How often the worker is killed with SIGKILL and started again.
        seed: Another one gives other faults, lives and limits.
    """
    started = time.monotonic()
    faults = Faults(
        FAULT_RATE, seed=seed, kinds=ALL, delay_seconds=0.2, stall_seconds=3.0, retry_after="0.2"
    )
    with emulator_process(
        concurrency_limit=LIMITS[1],
        task_seconds=Durations(0.5, seed=seed),
        faults=faults,
        fail_when=_fails_by_design,
        read_lag=0.05,
        webhook_secret=SECRET,
        callback_drop=0.1,
        callback_repeat=0.1,
        callback_reorder=0.1,
    ) as emulator:
        overseer = _Overseer(emulator, voices, kills, random.Random(seed))
        told = overseer.run()
        return _balance(voices, told, emulator.ask(_look), overseer, time.monotonic() - started)


# --- the vendor's side ---


def _fails_by_design(body: Mapping[str, Any]) -> str | None:
    return "no clear voice" if body["voice_url"].endswith("/bad.mp3") else None


def _move(emulator: Emulator, limit: int, occupied: int) -> None:
    """Change the limit, and the slots that another process holds."""
    emulator.concurrency_limit, emulator.occupied = limit, occupied


def _created(emulator: Emulator) -> int:
    return emulator.created


@frozen
class _Account:
    """What the vendor knows at the end: the voice of each task, by the source it was made of."""

    tasks: list[tuple[str, str]]
    created: int
    requests: int
    faults: int
    callbacks_lost: int


def _look(emulator: Emulator) -> _Account:
    faults = emulator.faults
    return _Account(
        tasks=[(task.voice_url or "", task.voice_id) for task in emulator.tasks],
        created=emulator.created,
        requests=emulator.requests.total(),
        faults=0 if faults is None else faults.injected.total(),
        callbacks_lost=emulator.callbacks["dropped"] + emulator.callbacks["failed"],
    )


# --- the worker's side ---


def _requests(voices: int) -> Iterator[VoiceRequest]:
    for number in range(voices):
        kind = "bad" if number % BAD_EVERY == 0 else "good"
        yield VoiceRequest(f"Voice {number}", voice_url=f"https://example.com/{number}/{kind}.mp3")


def _work(pipe: Connection, base_url: str, credentials: AccessKey, voices: int) -> None:
    """Run the batch in a process that may be killed at any moment; tell each result."""
    logging.getLogger("kling_voice").setLevel(logging.CRITICAL)
    try:
        asyncio.run(_clone(pipe, base_url, credentials, voices))
    except KlingError as error:  # such as two refused tokens in a row: it is started again
        sys.exit(f"The worker stopped: {error}")


async def _clone(pipe: Connection, base_url: str, credentials: AccessKey, voices: int) -> None:
    async with (
        served_receiver() as receiver,
        KlingVoiceClient(
            credentials,
            base_url=base_url,
            timeout=1.0,
            retry=RetryPolicy(attempts=10, initial=0.05, maximum=0.5),
            polling=PollingPolicy(initial=0.5, multiplier=1.0, maximum=0.5),
            callbacks=receiver,
        ) as kling,
        aclosing(kling.clone_voices(_requests(voices), batch_id="soak")) as results,
    ):
        async for result in results:
            pipe.send((result.request.voice_url, _word(result)))
    pipe.send(_DONE)


def _word(result: CloneResult) -> str:
    """Tell a result in a word: the id of its voice, or the class of its error."""
    if result.voice is not None:
        return result.voice.voice_id
    return type(result.error).__name__


class _Overseer:
    """Starts the worker, kills it, starts it again, and moves the account's limit meanwhile.

    Attributes:
        killed: How often the worker was killed.
        stopped: How often it ended, or told results, with an error that was not made on purpose.
    """

    def __init__(
        self, emulator: EmulatorProcess, voices: int, kills: int, draws: random.Random
    ) -> None:
        self.killed = 0
        self.stopped = 0
        self._emulator = emulator
        self._voices = voices
        self._kills = kills
        self._draws = draws
        self._glance_at = 0.0
        self._move_at = 0.0

    def run(self) -> dict[str, str]:
        """Run the batch to its end; give what the last run told of each source."""
        last: dict[str, str] = {}
        while self.stopped <= STOPS:
            told = self._run_once()
            if told is None:
                continue
            last = told
            if all(word.isdigit() or word == _FAILED for word in told.values()):
                break
            self.stopped += 1
        return last

    def _run_once(self) -> dict[str, str] | None:
        """Run the batch; give what it told, or ``None`` if it did not come to its end."""
        ours, theirs = SPAWN.Pipe(duplex=False)
        worker = SPAWN.Process(
            target=_work,
            args=(theirs, self._emulator.base_url, self._emulator.credentials, self._voices),
        )
        worker.start()
        theirs.close()
        told: dict[str, str] = {}
        try:
            while not self._is_time_to_kill():
                while ours.poll(GLANCE_SECONDS):
                    message: _Message = ours.recv()
                    if message == _DONE:
                        return told
                    told[message[0]] = message[1]
                    if time.monotonic() >= self._glance_at:
                        break
            self.killed += 1
            worker.kill()
        except EOFError:  # it ended by itself, with an error on its standard error
            self.stopped += 1
        finally:
            ours.close()
            worker.join()
        return None

    def _is_time_to_kill(self) -> bool:
        """Move the account's limit now and then; tell whether the next kill is due."""
        now = time.monotonic()
        self._glance_at = now + GLANCE_SECONDS
        if now >= self._move_at:
            self._move_at = now + MOVE_SECONDS
            limit = self._draws.randint(*LIMITS)
            self._emulator.ask(_move, limit, self._draws.randint(0, limit // 2))
        if self.killed == self._kills:
            return False
        return self._emulator.ask(_created) >= self._voices * (self.killed + 1) / (self._kills + 1)


# --- the ledger ---


def _balance(
    voices: int, told: Mapping[str, str], account: _Account, overseer: _Overseer, seconds: float
) -> Ledger:
    voice_ids = dict(account.tasks)
    succeeded = failed = 0
    for request in _requests(voices):
        url = request.voice_url or ""
        word = told.get(url)
        if url.endswith("/bad.mp3"):
            failed += word == _FAILED
        else:
            succeeded += word is not None and word == voice_ids.get(url)
    tasks = Counter(url for url, _ in account.tasks)
    return Ledger(
        asked=voices,
        created=account.created,
        succeeded=succeeded,
        failed=failed,
        lost=voices - succeeded - failed,
        twice=sum(count > 1 for count in tasks.values()),
        killed=overseer.killed,
        stopped=overseer.stopped,
        requests=account.requests,
        faults=account.faults,
        callbacks_lost=account.callbacks_lost,
        seconds=seconds,
    )


def main() -> int:
    """Soak, print the ledger, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--voices", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="of the worker (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    options = parser.parse_args()
    ledger = run(options.voices, options.kills, seed=options.seed)
    say(str(ledger))
    return 0 if ledger.balances else 1


if __name__ == "__main__":
    sys.exit(main())
