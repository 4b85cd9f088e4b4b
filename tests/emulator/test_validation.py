"""Validation: whatever is sent, it is either understood or refused with a business code."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_voice.emulator.codes import CODES, BusinessError
from kling_voice.emulator.validation import read_create, read_delete, read_object, read_paging

TEXT = st.text("ab é声\ud800\0/:.%1", max_size=30)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["voice_name", "voice_url", "video_id", "callback_url", "external_task_id", "voice_id"]
)
VALUES = st.sampled_from(["Ada", "", "https://example.com/a.mp3", "http://[", "//", "\ud800"])


def code_of(read: Callable[..., object], *arguments: object, **options: object) -> int:
    """The business code that a reader refuses with, or 0; its message can be put on the wire."""
    try:
        read(*arguments, **options)
    except BusinessError as refusal:
        refusal.message.encode()
        return refusal.code
    return 0


@given(st.dictionaries(FIELDS, ANYTHING | VALUES))
def test_any_object_is_judged(sent: dict[str, object]) -> None:
    """A create or a delete with any fields at all is taken or refused with 1200 or 1201."""
    raw = read_object(json.dumps(sent).encode())
    assert code_of(read_create, raw) in (0, 1200, 1201)
    assert code_of(read_delete, raw) in (0, 1200, 1201)


@given(st.binary())
def test_any_bytes_are_judged(body: bytes) -> None:
    """Bytes are a JSON object, or refused with 1200."""
    assert code_of(read_object, body) in (0, 1200)


@given(TEXT | st.integers().map(str), TEXT | st.integers().map(str), st.booleans())
def test_any_paging_is_judged(number: str, size: str, clamp: bool) -> None:
    """Any text for a page is a number within bounds, or refused with 1201."""
    query = {"pageNum": number, "pageSize": size}
    code = code_of(read_paging, query, cap=500, clamp=clamp)
    assert code in (0, 1201)
    if code == 0:
        paging = read_paging(query, cap=500, clamp=clamp)
        assert 1 <= paging.number <= 1000
        assert 1 <= paging.size <= 500


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_its_message(code: int) -> None:
    """A refusal says the code's own message unless a better one is given."""
    assert BusinessError(code).message == CODES[code][1]
    assert BusinessError(code, "because").message == "because"
