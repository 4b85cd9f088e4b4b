"""Derived ids: the same for the same request in every run, and different for any other."""

import errno
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from kling_voice import InvalidRequestError, SampleError, VoiceRequest
from kling_voice.identity import (
    ANY_PREFIX,
    batch_prefix,
    default_key,
    derived_id,
    nth_id,
    seen_digest,
)
from kling_voice.protocol import create_call

GOLDEN = {
    ("spring-cast", "ada", 0): "kv-d857f2bcec-a38618d4aedf39ffabf1",
    ("spring-cast", "ada", 1): "kv-d857f2bcec-a38618d4aedf39ffabf1-r1",
    ("Frühling 🎭", "7", 0): "kv-39e4d97943-cfe6dfd2f0bfafacf9dd",
}
URL_KEY = "89906271cf93ab89611a6b39aa8b9fb8f6d10d18861eb4be0a372180a2cb76ac"
VIDEO_KEY = "3aec97e9f547d09c3fad1f5efbc837158b5aa68787bac18951a578872c397a7c"
FILE_KEY = "c5bc03d2ea2a6b75a8ad15f0a70b8d0da421524926f1554aaff169f24928dd93"
ANY_TEXT = st.text(st.characters(), max_size=50)  # half surrogate pairs included


def test_ids_are_those_of_earlier_releases() -> None:
    """A batch that was begun with an earlier release is resumed with this one."""
    assert {parts: derived_id(*parts) for parts in GOLDEN} == GOLDEN


def test_default_keys_are_those_of_earlier_releases(tmp_path: Path) -> None:
    """The name and the source, digested as ever."""
    recording = tmp_path / "ada.mp3"
    recording.write_bytes(b"the bytes of a recording")

    assert default_key(VoiceRequest("Ada", voice_url="https://example.com/ada.mp3")) == URL_KEY
    assert default_key(VoiceRequest("Ada", video_id="871234")) == VIDEO_KEY
    assert default_key(VoiceRequest("Ada", voice_file=recording)) == FILE_KEY


@given(ANY_TEXT, ANY_TEXT, st.integers(0, 1000))
def test_ids_are_short_and_safe_in_a_url(batch_id: str, key: str, attempt: int) -> None:
    """One segment of a path that needs no escaping, whatever the batch and the key are called."""
    external_task_id = derived_id(batch_id, key, attempt)

    assert quote(external_task_id, safe="") == external_task_id
    assert len(external_task_id) <= 40
    assert external_task_id == external_task_id.lower()
    assert external_task_id.startswith(batch_prefix(batch_id))
    assert batch_prefix(batch_id).startswith(ANY_PREFIX)
    assert derived_id(batch_id, key, attempt) == external_task_id
    assert nth_id(derived_id(batch_id, key), attempt) == external_task_id


@given(st.tuples(ANY_TEXT, ANY_TEXT), st.tuples(ANY_TEXT, ANY_TEXT))
def test_other_batches_and_keys_have_other_ids(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    """Neither part of an id depends on one of the two alone."""
    ids = {derived_id(*one), derived_id(*other)}
    keys = {derived_id(*one).rpartition("-")[2], derived_id(*other).rpartition("-")[2]}

    assert len(ids) == len(keys) == len({one, other})


def test_many_keys_have_as_many_ids() -> None:
    """Nothing collides among a hundred thousand, further tries of failed tasks included."""
    count = 50_000
    ids = {
        derived_id("batch", str(number), attempt) for number in range(count) for attempt in (0, 1)
    }

    assert len(ids) == 2 * count
    assert len({seen_digest(external_task_id) for external_task_id in ids}) == 2 * count


URL = "https://example.com/ada.mp3?sig=1"


@pytest.mark.parametrize(
    "other",
    [
        VoiceRequest("Bob", voice_url=URL),
        VoiceRequest("Ada", voice_url="https://example.com/ada.mp3?sig=2"),
        VoiceRequest("Ada", video_id=URL),
        VoiceRequest("Ad", voice_url=f"a{URL}"),
    ],
)
def test_the_default_key_is_of_the_name_and_the_source(other: VoiceRequest) -> None:
    """A URL counts verbatim, its query included."""
    assert default_key(VoiceRequest("Ada", voice_url=URL)) != default_key(other)


@pytest.mark.parametrize(
    "same",
    [
        {"callback_url": "https://example.com/hook"},
        {"external_task_id": "mine"},
        {"key": "explicit"},
    ],
)
def test_nothing_else_is_in_the_default_key(same: dict[str, str]) -> None:
    """What only steers the request does not make it another one."""
    request = VoiceRequest("Ada", voice_url=URL)

    assert default_key(evolve(request, **same)) == default_key(request)


def test_a_file_counts_by_its_bytes(tmp_path: Path) -> None:
    """Not by its path: a batch may be resumed on another machine."""
    (tmp_path / "elsewhere").mkdir()
    here, there, other = tmp_path / "a.mp3", tmp_path / "elsewhere" / "b.mp3", tmp_path / "c.mp3"
    here.write_bytes(b"1" * 100_000)
    there.write_bytes(b"1" * 100_000)
    other.write_bytes(b"1" * 99_999 + b"2")
    key = default_key(VoiceRequest("Ada", voice_file=here))

    assert default_key(VoiceRequest("Ada", voice_file=str(there))) == key
    assert default_key(VoiceRequest("Ada", voice_file=other)) != key
    assert default_key(VoiceRequest("Bob", voice_file=here)) != key


def test_a_file_that_cannot_be_read_is_a_sample_error(tmp_path: Path) -> None:
    """It names the file; and a pipe does not hang the run."""
    os.mkfifo(tmp_path / "pipe")
    bad: Any
    for bad in (tmp_path / "missing.mp3", tmp_path, tmp_path / "pipe", "", "nul\0byte", 7):
        with pytest.raises(SampleError, match="cannot be read"):
            default_key(VoiceRequest("Ada", voice_file=bad))


def test_why_a_file_cannot_be_read_is_told(tmp_path: Path) -> None:
    """In the system's words, or that it is no file at all."""
    missing = tmp_path / "missing.mp3"

    with pytest.raises(SampleError) as caught:
        default_key(VoiceRequest("Ada", voice_file=missing))
    assert str(caught.value) == f"{str(missing)!r} cannot be read: {os.strerror(errno.ENOENT)}."

    with pytest.raises(SampleError) as caught:
        default_key(VoiceRequest("Ada", voice_file=tmp_path))
    assert str(caught.value) == f"{str(tmp_path)!r} cannot be read: it is not a regular file."


def test_a_request_without_a_source_has_no_key() -> None:
    """It could not be created either: the error is the same."""
    with pytest.raises(InvalidRequestError) as caught:
        default_key(VoiceRequest("Ada"))
    with pytest.raises(InvalidRequestError) as refused:
        create_call("Ada", external_task_id="mine")

    assert caught.value.field == refused.value.field == "source"
    assert str(caught.value) == str(refused.value)


def test_bad_data_has_a_key_all_the_same() -> None:
    """It is refused later, by what checks it, and does not break the batch here."""
    name: Any
    source: Any
    for name, source in ((None, URL), (7, 8), ("\ud800", "\ud800")):
        assert default_key(VoiceRequest(name, voice_url=source))


def test_requests_with_different_bad_names_have_different_keys() -> None:
    """Each is refused as itself, and not taken for the other one again."""
    names: list[Any] = [None, 7, ["Ada"], "Ada"]

    assert len({default_key(VoiceRequest(name, voice_url=URL)) for name in names}) == len(names)


def test_remembering_a_request_takes_a_few_bytes() -> None:
    """A batch of a million requests remembers each one."""
    assert len(seen_digest(derived_id("batch", "key"))) == 10
