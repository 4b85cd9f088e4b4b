"""What no honest vendor sends: kept cases of the fuzzer, answers changed node by node, and bombs.

The arbitrary bytes and documents are in the tests of each room; the fuzzer is in ``tests/fuzz``.
"""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.decoder import mutate, read, sign, timed
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import ONCE, MakeClient, Server, response

from kling_voice import CallbackError, CallbackReceiver, KlingError, ResponseError
from kling_voice.protocol import read_envelope, read_task, read_tasks
from kling_voice.redaction import redact
from kling_voice.transport import ANSWER_CAP
from kling_voice.webhooks import BODY_CAP

CASES = {
    path.name: path.read_bytes() for path in sorted(Path(__file__).parent.glob("fuzz/cases/*"))
}
SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
MIB = 1024 * 1024
SOON = 3.0  # seconds of CPU, on a slow machine and traced; what is not linear takes minutes


def costs(work: Callable[[], object]) -> tuple[float, int]:
    """Give the seconds of CPU and the most bytes of memory that some work takes."""
    tracemalloc.start()
    try:
        started = time.process_time()
        work()
        return time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", CASES)
def test_kept_cases(name: str) -> None:
    """What the fuzzer began with and what it once found is read, or refused by our errors."""
    timed(CASES[name])


@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_changed_cases(name: str, seed: int) -> None:
    """Of an answer or a callback with nodes replaced, moved or nested, only our errors come."""
    read(mutate(CASES[name], 20_000, seed, lambda case, longest: case[: seed % (len(case) + 1)]))


# --- bombs ---


def envelope(**document: object) -> bytes:
    """Write the vendor's envelope."""
    return json.dumps({"code": 0, "message": "x", "request_id": "r", **document}).encode()


TASK: dict[str, object] = {"task_id": "t-1", "task_status": "succeed"}
N = 250_000  # stays below the cap of callbacks, too
BOMBS = {
    "open arrays": b"[" * N,
    "open objects": b'{"a":' * (N // 5),
    "closed arrays": b'{"code":0,"data":' + b"[" * (N // 3) + b"]" * (N // 3) + b"}",
    "nested data": b'{"code":0,"data":' + b'{"data":' * 900 + b"1" + b"}" * 900 + b"}",
    "a huge integer": b'{"code":0,"data":' + b"9" * N + b"}",
    "a huge code": b'{"code":' + b"9" * 4300 + b"}",
    "huge integers": b'{"code":0,"data":[' + b",".join([b"9" * 4300] * 50) + b"]}",
    "a huge time": envelope(data={**TASK, "created_at": 10**4000}),
    "a huge exponent": b'{"code":0,"data":{"task_id":"1","created_at":1e999999999}}',
    "a huge amount": envelope(data={**TASK, "final_unit_deduction": "9" * N}),
    "a long message": envelope(code=1201, message="x" * N),
    "a long request id": envelope(code=1201, request_id="x" * N),
    "a long key": envelope(data={**TASK, "x" * N: 1, "task_id": 1}),
    "a long page": b"<html>" + b"eyJ" * (N // 3),
    "tokens without an end": envelope(code=1201, message="eyJ" * (N // 3)),
    "empty objects": envelope(data=[{}] * (N // 4)),
    "empty arrays": envelope(data=[[]] * (N // 4)),
    "wrong voices": envelope(data={**TASK, "task_result": {"voices": [0] * (N // 3)}}),
    "empty voices": envelope(data={**TASK, "task_result": {"voices": [{}] * (N // 4)}}),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("structure", [read_task, read_tasks])
def test_bombs(name: str, structure: Callable[..., object]) -> None:
    """An answer that is made to be costly is refused at once, in little memory and few words."""

    def work() -> None:
        with pytest.raises(KlingError) as caught:
            structure(read_envelope(200, {}, BOMBS[name]))
        assert len(str(caught.value)) < 5000
        assert len(repr(vars(caught.value))) < 10_000

    seconds, peak = costs(work)
    assert seconds < SOON
    assert peak < 30 * len(BOMBS[name]) + MIB


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_as_callbacks(name: str) -> None:
    """A callback that is made to be costly is refused at once, even a signed one."""
    data = json.loads(BOMBS[name])["data"] if name.endswith("voices") else None
    body = BOMBS[name] if data is None else json.dumps(data).encode()
    assert len(body) <= BODY_CAP

    def work() -> None:
        with pytest.raises(CallbackError) as caught:
            CallbackReceiver(SECRET).parse(body, sign(body, {}))
        assert caught.value.reason == "unreadable"
        assert len(str(caught.value)) < 1000

    seconds, peak = costs(work)
    assert seconds < SOON
    assert peak < 30 * len(body) + MIB


@pytest.mark.parametrize(
    "field", ["task_id", "task_status", "task_status_msg", "created_at", "final_unit_deduction"]
)
@pytest.mark.parametrize(
    "piece", ["x", "9", "eyJ", "http://", "https%3A%2F%2F", "?", "?a=", "\ud800"]
)
def test_giant_strings(field: str, piece: str) -> None:
    """A giant string in any field is read or refused, and shown, in linear time."""
    body = envelope(data={**TASK, field: piece * (MIB // len(piece))})

    def work() -> None:
        shown = ""
        try:
            assert repr(read_task(read_envelope(200, {}, body)))
        except ResponseError as error:
            shown = str(error)
        assert len(shown) < 1000

    seconds, peak = costs(work)
    assert seconds < SOON
    assert peak < 12 * len(body)


@pytest.mark.parametrize(
    "piece",
    [
        "eyJ",
        "eyJa.",
        "http://",
        "http:",
        "https%3A%2F%2F",
        "%3F",
        "?",
        "?a",
        "?a=",
        "https://@",
        "@",
    ],
)
def test_redaction_is_linear(piece: str) -> None:
    """Masking takes no more than linear time, whatever the text is made of."""
    text = piece * (MIB // len(piece))
    seconds, peak = costs(lambda: redact(text))
    assert seconds < SOON
    assert peak < 16 * MIB


async def test_an_endless_body_in_bounded_memory(make_client: MakeClient) -> None:
    """A body without an end costs no more memory than the cap on an answer."""
    bomb = response(b"", length=10**15) + b" " * (ANSWER_CAP + MIB)
    async with Server([bomb]) as server:
        client = make_client(server, retry=ONCE)
        tracemalloc.start()
        try:
            with pytest.raises(ResponseError, match="longer than"):
                await client.get_task("t-1")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3 * ANSWER_CAP  # the server's own half included
