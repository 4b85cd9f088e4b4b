"""Feed anything to what reads the vendor's answers and callbacks: only ``KlingError`` comes out.

The suite replays the kept cases (``tests/test_fuzz.py``). To look for new ones, with a fuzzer
that is guided by coverage and is no dependency of this project::

    python -m pip install atheris
    mkdir -p /tmp/corpus
    python tests/fuzz/decoder.py /tmp/corpus tests/fuzz/cases -dict=tests/fuzz/words.dict \
        -max_total_time=1800 -timeout=5 -rss_limit_mb=1024 -max_len=20000

It writes what broke to ``crash-…``, ``timeout-…`` or ``oom-…`` in the working directory: keep it
in ``tests/fuzz/cases`` under a name that says what it is.

A case reads like a message: a first line that says what it is (an HTTP status for an answer;
``signed``, ``forged`` or ``unproven`` for a callback), headers, an empty line, and the body.
"""

import asyncio
import copy
import importlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kling_voice.errors import KlingError

ROOT: Final = Path(__file__).parents[2]
LONGEST: Final = 1.0  # seconds of CPU that a case may take
SECRETS: Final = ("the-access-key", "5ecret-key")
WEBHOOK_SECRET: Final = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="


def read(case: bytes) -> None:
    """Read one case in every way that there is; raises whatever should not come out.

    Raises:
        AssertionError: An error is not of the right kind, says nothing, or tells a secret.
    """
    head, _, body = case.partition(b"\n\n")
    first, *lines = head.decode("latin-1").split("\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip(): text.strip() for name, _, text in pairs}
    if re.fullmatch("[0-9]{1,4}", first):
        _read_answer(int(first), headers, body)
    else:
        _read_callback(first, headers, body)


def _read_answer(status: int, headers: dict[str, str], body: bytes) -> None:
    from kling_voice import protocol
    from kling_voice.errors import ApiError, ResponseError

    def readers(read: Callable[[protocol.Envelope], Any]) -> Any:
        # The envelope anew for each: structuring a task writes its request id into the data.
        return read(protocol.read_envelope(status, headers, body, secrets=lambda: SECRETS))

    protocol.server_time(headers)
    for read in (protocol.read_task, protocol.read_tasks, protocol.read_items):
        error = _show(partial(readers, read))
        if error is None:
            continue
        assert isinstance(error, ApiError | ResponseError), error
        assert not any(secret in f"{error} {error!r} {vars(error)}" for secret in SECRETS)
        protocol.is_transient(error)
        protocol.certainly_not_processed(error)
        protocol.concerns_account(error)
        protocol.is_duplicate(error)
        protocol.is_page_refused(error)
        protocol.asked_to_wait(error)


def _read_callback(kind: str, headers: dict[str, str], body: bytes) -> None:
    from kling_voice.callbacks import CallbackReceiver
    from kling_voice.errors import CallbackError

    receiver = CallbackReceiver(None if kind == "unproven" else WEBHOOK_SECRET)
    if kind == "signed":
        headers = sign(body, headers)
    if kind == "unproven":
        error = _show(lambda: asyncio.run(receiver.receive(body, headers)))
    else:
        error = _show(lambda: receiver.parse(body, headers))
    if error is not None:
        assert isinstance(error, CallbackError), error
        assert error.reason in ("not_authentic", "unreadable", "too_large"), error.reason


def _show(read: Callable[[], Any]) -> "KlingError | None":
    """Read something, look at all that it tells, and give the error that came instead."""
    from kling_voice.errors import KlingError
    from kling_voice.models import VoiceTask

    try:
        told = read()
    except KlingError as error:
        failure = error
    else:
        for task in told if isinstance(told, list) else [told]:
            if isinstance(task, VoiceTask):
                assert repr(task)
                assert isinstance(task.task_id, str)
                assert task.is_done == (task.succeeded or task.failed)
                assert (task.voice is None) == (not task.voices)
        return None
    assert str(failure)
    assert failure.__context__ is None or failure.__suppress_context__
    return failure


def sign(body: bytes, headers: dict[str, str]) -> dict[str, str]:
    """Add the headers that make a callback the vendor's own, where they can be made."""
    from datetime import UTC, datetime

    from standardwebhooks import Webhook

    now = datetime.now(UTC)
    try:
        signature = Webhook(WEBHOOK_SECRET).sign("msg", now, body.decode())
    except UnicodeDecodeError:
        return headers
    return {
        **headers,
        "webhook-id": "msg",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }


# --- fuzzing ---

_TEXTS: Final = ("", "x", "succeed", "1.5", "\ud800")
_VALUES: Final[tuple[Any, ...]] = (*_TEXTS, None, True, 0, -1, 1.5, 10**30, [], {})


def mutate(case: bytes, longest: int, seed: int, by_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """Change a case: the JSON of its body node by node, or else any of its bytes."""
    dice = random.Random(seed)
    head, separator, body = case.partition(b"\n\n")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return by_bytes(case, longest)
    if dice.random() < 0.5:
        return by_bytes(case, longest)
    places = list(_places([document]))
    for _ in range(dice.randint(1, 3)):
        holder, key = dice.choice(places)
        value = dice.choice([*_VALUES, [holder[key]], {"data": holder[key]}, _pick(dice, places)])
        holder[key] = copy.deepcopy(value)
    document = places[0][0][0]
    try:
        changed = head + separator + json.dumps(document).encode()
    except (ValueError, RecursionError):
        return by_bytes(case, longest)
    return changed if len(changed) <= longest else by_bytes(case, longest)


def _pick(dice: random.Random, places: list[tuple[Any, Any]]) -> Any:
    holder, key = dice.choice(places)
    return holder[key]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Give every place of a document, as what holds it and its key there."""
    waiting = [node]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def timed(case: bytes) -> None:
    """Read one case, and be quick about it.

    Raises:
        AssertionError: As :func:`read`, or it took too long.
    """
    started = time.process_time()
    read(case)
    taken = time.process_time() - started
    if taken > LONGEST:
        raise AssertionError(f"a case of {len(case)} bytes took {taken:.1f} s")


def main() -> None:
    """Fuzz until told to stop; the arguments are libFuzzer's."""
    atheris = importlib.import_module("atheris")
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["kling_voice", "json", "email", "standardwebhooks"]):
        for name in ("protocol", "callbacks", "webhooks"):
            importlib.import_module(f"kling_voice.{name}")

    def changed(case: bytes, longest: int, seed: int) -> bytes:
        return mutate(case, longest, seed, atheris.Mutate)

    atheris.Setup(sys.argv, timed, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
