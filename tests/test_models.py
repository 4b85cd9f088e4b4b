"""The vendor's JSON as attrs classes: strict, tolerant of news, and exact about where it hurts."""

import copy
import json
import pickle
import typing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import attrs
import pytest
from cattrs import Converter
from hypothesis import given
from hypothesis import strategies as st

from kling_voice import ResponseError
from kling_voice.models import (
    BalanceDeduction,
    CloneResult,
    TaskInfo,
    TaskResult,
    TaskStatus,
    Voice,
    VoiceRequest,
    VoiceTask,
    configure_converter,
    make_converter,
)
from kling_voice.protocol import Envelope, read_task, read_tasks

SIGNED = "https://cdn.example.com/trial.mp3?Signature=5ecret&Expires=1"

DONE: dict[str, Any] = {
    "task_id": "829819360242163",
    "task_status": "succeed",
    "task_status_msg": "",
    "task_info": {"external_task_id": "mine"},
    "task_result": {
        "voices": [
            {"voice_id": "v-1", "voice_name": "Ada", "trial_url": SIGNED, "owned_by": "me"},
            {"voice_id": "v-2", "voice_name": "Bob", "trial_url": SIGNED, "owned_by": "me"},
        ]
    },
    "final_unit_deduction": "0.05",
    "final_balance_deduction": {"quota": "0.05", "list_price": "0.07"},
    "created_at": 1722769557708,
    "updated_at": 1722769566001,
}


def read(data: Any) -> VoiceTask:
    """Read a task as the answer of a query."""
    return read_task(Envelope(data, "req-1"))


def changed(path: str, value: object) -> dict[str, Any]:
    """Give the finished task with one value replaced; the path is dotted, numbers index."""
    document = copy.deepcopy(DONE)
    place: Any = document
    *parents, last = path.split(".")
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[int(last) if last.isdigit() else last] = value
    return document


def test_a_finished_task() -> None:
    """All that the vendor tells of a finished task is there, in fitting types."""
    task = read(copy.deepcopy(DONE))
    assert task == VoiceTask(
        task_id="829819360242163",
        task_status=TaskStatus.SUCCEED,
        task_status_msg="",
        task_info=TaskInfo("mine"),
        task_result=TaskResult(
            (Voice("v-1", "Ada", SIGNED, "me"), Voice("v-2", "Bob", SIGNED, "me"))
        ),
        final_unit_deduction=Decimal("0.05"),
        final_balance_deduction=BalanceDeduction(Decimal("0.05"), Decimal("0.07")),
        created_at=datetime(2024, 8, 4, 11, 5, 57, 708000, tzinfo=UTC),
        updated_at=datetime(2024, 8, 4, 11, 6, 6, 1000, tzinfo=UTC),
        request_id="req-1",
    )
    assert task.external_task_id == "mine"
    assert task.voice == task.voices[0] == Voice("v-1", "Ada", SIGNED, "me")
    assert (task.is_done, task.succeeded, task.failed) == (True, True, False)


def test_a_bare_task() -> None:
    """Of a task only the id and the status are needed; the rest is None or empty."""
    task = read({"task_id": "t-1", "task_status": "submitted"})
    assert task == VoiceTask("t-1", TaskStatus.SUBMITTED, request_id="req-1")
    assert (task.voice, task.voices, task.external_task_id, task.created_at) == (
        None,
        (),
        None,
        None,
    )
    assert (task.is_done, task.succeeded, task.failed) == (False, False, False)


OPTIONAL = [
    "task_status_msg",
    "task_info",
    "task_info.external_task_id",
    "task_result",
    "task_result.voices",
    "task_result.voices.0.voice_name",
    "task_result.voices.0.trial_url",
    "task_result.voices.0.owned_by",
    "final_unit_deduction",
    "final_balance_deduction",
    "final_balance_deduction.quota",
    "final_balance_deduction.list_price",
    "created_at",
    "updated_at",
]


@pytest.mark.parametrize("path", OPTIONAL)
def test_null_is_missing(path: str) -> None:
    """Null means the same as a field that is not there, for each optional field."""
    document: Any = copy.deepcopy(DONE)
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    del place[last]
    assert read(changed(path, None)) == read(document)


@pytest.mark.parametrize("path", ["", "task_info", "task_result", "task_result.voices.0"])
def test_unknown_fields_are_ignored(path: str) -> None:
    """The vendor may add fields of any kind, anywhere."""
    news: list[object] = [1, None, "x", [1], {"a": {}}, 1e300]
    for value in news:
        assert read(changed(f"{path}.news".lstrip("."), value)) == read(copy.deepcopy(DONE))


def test_request_id_is_the_envelopes() -> None:
    """The request id of a task is that of the answer, whatever its data may claim."""
    assert read(changed("request_id", 5)).request_id == "req-1"
    assert read_task(Envelope(changed("request_id", "mine"), None)).request_id is None


TEXTS = [
    ("task_id", "data.task_id"),
    ("task_status", "data.task_status"),
    ("task_status_msg", "data.task_status_msg"),
    ("task_info.external_task_id", "data.task_info.external_task_id"),
    ("task_result.voices.1.voice_id", "data.task_result.voices[1].voice_id"),
    ("task_result.voices.0.voice_name", "data.task_result.voices[0].voice_name"),
    ("task_result.voices.0.trial_url", "data.task_result.voices[0].trial_url"),
    ("task_result.voices.0.owned_by", "data.task_result.voices[0].owned_by"),
]
AMOUNTS = [
    ("final_unit_deduction", "data.final_unit_deduction"),
    ("final_balance_deduction.quota", "data.final_balance_deduction.quota"),
    ("final_balance_deduction.list_price", "data.final_balance_deduction.list_price"),
]
TIMES = [("created_at", "data.created_at"), ("updated_at", "data.updated_at")]
OBJECTS = [
    ("task_info", "data.task_info"),
    ("task_result", "data.task_result"),
    ("task_result.voices.0", "data.task_result.voices[0]"),
    ("final_balance_deduction", "data.final_balance_deduction"),
]
ARRAYS = [("task_result.voices", "data.task_result.voices")]


def refuse(document: object, where: str) -> None:
    """Check that a document is refused, at exactly one place."""
    with pytest.raises(ResponseError) as caught:
        read(document)
    assert f"{where}: " in str(caught.value)
    assert str(caught.value).count("data") == 1
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(("path", "where"), TEXTS + AMOUNTS)
@pytest.mark.parametrize("wrong", [0, 1, 1.9, True, False, [], {}, ["a"], 10**400])
def test_no_text_is_made_of_anything_else(path: str, where: str, wrong: object) -> None:
    """Where the vendor sends text, nothing else is turned into text."""
    refuse(changed(path, wrong), where)


@pytest.mark.parametrize(("path", "where"), TIMES)
@pytest.mark.parametrize(
    "wrong", ["1722769557708", "", 1.9, 1722769557708.0, True, False, [], {}, 10**30, -(10**30)]
)
def test_no_time_is_made_of_anything_else(path: str, where: str, wrong: object) -> None:
    """Times are whole milliseconds that a calendar can hold: no text, no fraction, no truth."""
    refuse(changed(path, wrong), where)


@pytest.mark.parametrize(("path", "where"), AMOUNTS)
@pytest.mark.parametrize(
    "wrong",
    [
        "NaN",
        "Infinity",
        "1e5",
        "0x1",
        "1_000",
        " 1",
        "1 ",
        "\u0661",
        "--1",
        ".",
        "1.",
        "a",
        "9" * 99,
    ],
)
def test_no_amount_is_made_of_anything_else(path: str, where: str, wrong: str) -> None:
    """Amounts are plain decimal numbers of a sane length."""
    refuse(changed(path, wrong), where)


@pytest.mark.parametrize(("path", "where"), OBJECTS)
@pytest.mark.parametrize("wrong", [0, True, "", "a", [], [["voice_id", "v-1"]]])
def test_no_object_is_made_of_anything_else(path: str, where: str, wrong: object) -> None:
    """Where the vendor sends an object, nothing else will do."""
    refuse(changed(path, wrong), where)


@pytest.mark.parametrize(("path", "where"), ARRAYS)
@pytest.mark.parametrize("wrong", [0, True, "", "a", {}, {"voice_id": "v-1"}])
def test_no_array_is_made_of_anything_else(path: str, where: str, wrong: object) -> None:
    """An empty text or an object is not an empty array."""
    refuse(changed(path, wrong), where)


@pytest.mark.parametrize(
    ("path", "where"), [TEXTS[0], TEXTS[1], TEXTS[4]], ids=["task_id", "task_status", "voice_id"]
)
def test_what_is_needed_is_missed(path: str, where: str) -> None:
    """A missing id or status is told with its exact place, and so is null."""
    refuse(changed(path, None), where)


@pytest.mark.parametrize("data", [None, [], "", "task", 5, True, [DONE]])
def test_what_is_no_task_at_all(data: object) -> None:
    """An answer without a task object is a ResponseError, not a crash."""
    with pytest.raises(ResponseError, match=r"data: expected an object"):
        read(data)


def test_a_list_tells_which_item() -> None:
    """In a list the place begins with the item's number."""
    with pytest.raises(ResponseError, match=r"data\[1\]\.task_result\.voices\[0\]\.voice_id: "):
        read_tasks(Envelope([DONE, changed("task_result.voices.0.voice_id", 5)], None))
    with pytest.raises(ResponseError, match=r"data: expected an array"):
        read_tasks(Envelope({"items": []}, None))
    assert read_tasks(Envelope(None, None)) == []


def test_several_faults_are_told_together() -> None:
    """Several faults come in one error, each with its place, and not without end."""
    document = changed("created_at", "x")
    document["task_id"] = 5
    document["task_result"]["voices"] = [{}] * 1000
    with pytest.raises(ResponseError) as caught:
        read(document)
    assert "data.task_id: expected a string, got a number" in str(caught.value)
    assert len(str(caught.value)) < 500


# --- statuses ---


@pytest.mark.parametrize("word", ["succeed", "succeeded"])
def test_both_spellings_of_success(word: str) -> None:
    """``succeeded``, which newer endpoints say, reads as ``succeed``."""
    task = read(changed("task_status", word))
    assert task.task_status is TaskStatus.SUCCEED
    assert task.succeeded


@pytest.mark.parametrize("word", ["queued", "", "SUCCEED", "Failed", "失败", "a" * 1000])
def test_an_unknown_status_survives(word: str) -> None:
    """A word that the vendor adds survives as itself, is not terminal, and travels."""
    status = read(changed("task_status", word)).task_status
    assert isinstance(status, TaskStatus)
    assert status == word == str(status) == status.value
    assert not status.is_known
    assert not status.is_terminal
    for twin in (pickle.loads(pickle.dumps(status)), copy.copy(status), copy.deepcopy(status)):
        assert type(twin) is TaskStatus
        assert twin == status
        assert hash(twin) == hash(status) == hash(word)
    assert list(TaskStatus) == ["submitted", "processing", "succeed", "failed"]


@pytest.mark.parametrize("value", [None, 1, b"succeed"])
def test_only_a_word_is_a_status(value: Any) -> None:
    """What is no string is refused, never made into a status."""
    with pytest.raises(ValueError, match="is not a valid TaskStatus"):
        TaskStatus(value)


def test_known_statuses() -> None:
    """Two statuses end a task, and two do not."""
    assert {status: (status.is_known, status.is_terminal) for status in TaskStatus} == {
        TaskStatus.SUBMITTED: (True, False),
        TaskStatus.PROCESSING: (True, False),
        TaskStatus.SUCCEED: (True, True),
        TaskStatus.FAILED: (True, True),
    }


# --- both ways ---


@pytest.mark.parametrize("detailed", [False, True])
def test_round_trip(detailed: bool) -> None:
    """What was read can be written as the vendor's JSON again, and reads the same."""
    converter = make_converter(detailed_validation=detailed)
    task = read(copy.deepcopy(DONE))
    text = json.dumps(converter.unstructure(task))
    written = json.loads(text)
    assert written == {**DONE, "request_id": "req-1"}
    assert converter.structure(written, VoiceTask) == task


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))
def test_times_round_trip(moment: datetime) -> None:
    """Every whole millisecond that a calendar can hold survives the way there and back."""
    converter = make_converter()
    aware = moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC)
    task = VoiceTask("t-1", TaskStatus.FAILED, created_at=aware)
    back = converter.structure(converter.unstructure(task), VoiceTask).created_at
    assert back == aware
    assert back is not None
    assert back.utcoffset() == timedelta(0)


@given(st.decimals(-(10**20), 10**20, places=6))
def test_amounts_round_trip(amount: Decimal) -> None:
    """Every amount survives with all of its digits."""
    converter = make_converter()
    task = VoiceTask("t-1", TaskStatus.SUCCEED, final_unit_deduction=amount)
    back = converter.structure(converter.unstructure(task), VoiceTask)
    assert str(back.final_unit_deduction) == str(amount)


def test_an_empty_amount_is_none() -> None:
    """An empty text in place of an amount means that there is none."""
    assert read(changed("final_unit_deduction", "")).final_unit_deduction is None


def test_an_apps_own_converter_can_learn_it() -> None:
    """The hooks can be registered in a converter that an app has for its own classes."""

    @attrs.frozen
    class Mine:
        task: VoiceTask
        number: int

    converter = Converter(forbid_extra_keys=True)
    configure_converter(converter)
    mine = converter.structure({"task": DONE, "number": 5}, Mine)
    assert mine.task.voice == Voice("v-1", "Ada", SIGNED, "me")


# --- the classes ---


@pytest.mark.parametrize(
    "cls", [Voice, TaskInfo, TaskResult, BalanceDeduction, VoiceTask, VoiceRequest, CloneResult]
)
def test_models_are_frozen_and_slotted(cls: type) -> None:
    """All models are frozen attrs classes with slots, documented, each field named in the text."""
    assert attrs.has(cls)
    assert "__slots__" in vars(cls)
    assert cls.__setattr__ is not object.__setattr__
    for field in attrs.fields(cls):
        assert f"{field.name}:" in (cls.__doc__ or "")


def test_models_travel() -> None:
    """Tasks, requests and results pickle and compare equal on the other side."""
    task = read(changed("task_status", "queued"))
    request = VoiceRequest("Ada", voice_url=SIGNED, key="k")
    for thing in (
        task,
        request,
        CloneResult(request, task, task.voice, None),
        CloneResult(request, None, None, None),
    ):
        assert pickle.loads(pickle.dumps(thing)) == thing
        assert copy.deepcopy(thing) == thing


def test_reprs_hide_signatures() -> None:
    """No repr shows the query of a URL, where signatures live, whatever characters it has."""
    for url in (SIGNED, "https://a.b/c?it's=5ecret&x", "HTTPS://a.b?5ecret", "s3://b/k#x?5ecret"):
        request = VoiceRequest("Ada", voice_url=url, callback_url=url)
        task = VoiceTask("t", TaskStatus.SUCCEED, task_result=TaskResult((Voice("v", "n", url),)))
        for thing in (request, task, CloneResult(request, task, task.voice, None)):
            assert "5ecret" not in repr(thing)
    assert "https://cdn.example.com/trial.mp3" in repr(Voice("v-1", "Ada", SIGNED))


def test_public_types_resolve() -> None:
    """All annotations of the models can be evaluated, as other tools need them."""
    for cls in (
        Voice,
        TaskInfo,
        TaskResult,
        BalanceDeduction,
        VoiceTask,
        VoiceRequest,
        CloneResult,
    ):
        assert set(typing.get_type_hints(cls)) == {field.name for field in attrs.fields(cls)}
