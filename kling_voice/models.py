"""The vendor's data as attrs classes, and the strict cattrs converter that makes them.

The converter never coerces: a number is not a string, ``"false"`` is not true. Fields that the
vendor adds are ignored; ``null`` means the same as a missing field; what is left out is ``None``
or empty. Source of all fields: the vendor's reference of the custom-voice API.
"""

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from kling_voice.redaction import mask_url, redact

if TYPE_CHECKING:
    from cattrs import Converter


class TaskStatus(StrEnum):
    """The state of a task: ``submitted``, ``processing``, then ``succeed`` or ``failed``.

    A word that the vendor adds survives as a member with that value, and is not terminal; the
    newer spelling ``succeeded`` reads as ``succeed``.
    """

    SUBMITTED = "submitted"
    PROCESSING = "processing"
    SUCCEED = "succeed"
    FAILED = "failed"

    @classmethod
    def _missing_(cls, value: object) -> "TaskStatus | None":
        if value == "succeeded":
            return cls.SUCCEED
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = value.upper()
        unknown._value_ = value
        return unknown

    @property
    def is_known(self) -> bool:
        """Whether this version knows the word."""
        return self in _STATUSES

    @property
    def is_terminal(self) -> bool:
        """Whether the task has ended: ``succeed`` or ``failed``."""
        return self is TaskStatus.SUCCEED or self is TaskStatus.FAILED


_STATUSES = {str(status): status for status in TaskStatus}


@frozen
class Voice:
    """A voice.

    Attributes:
        voice_id: Its id, unique across the vendor.
        voice_name: Its name.
        trial_url: Where a trial recording can be fetched, for 30 days. Its query is not shown in
            the repr.
        owned_by: ``"kling"`` for the official library, else the creator's id.
    """

    voice_id: str
    voice_name: str | None = None
    trial_url: str | None = field(default=None, repr=mask_url)
    owned_by: str | None = None


@frozen
class TaskInfo:
    """What a task was created with.

    Attributes:
        external_task_id: The caller's own id of the task, unique within the account.
    """

    external_task_id: str | None = None


@frozen
class TaskResult:
    """What a task made.

    Attributes:
        voices: The voices; empty until the task has succeeded.
    """

    voices: tuple[Voice, ...] = ()


@frozen
class BalanceDeduction:
    """What a task took from the account's balance.

    Attributes:
        quota: The amount deducted.
        list_price: The amount before discounts.
    """

    quota: Decimal | None = None
    list_price: Decimal | None = None


@frozen
class VoiceTask:
    """A task that makes a voice, as the vendor last described it.

    Attributes:
        task_id: The vendor's id of the task.
        task_status: Its state.
        task_status_msg: The vendor's reason when it failed, URLs without queries.
        task_info: What it was created with.
        task_result: What it made.
        final_unit_deduction: Units deducted; known once the task has ended.
        final_balance_deduction: What was taken from the balance; known once the task has ended.
        created_at: When it was created, in UTC.
        updated_at: When it last changed, in UTC.
        request_id: The request whose answer this is; quote it to the vendor's support.
    """

    task_id: str
    task_status: TaskStatus
    task_status_msg: str | None = None
    task_info: TaskInfo = TaskInfo()
    task_result: TaskResult = TaskResult()
    final_unit_deduction: Decimal | None = None
    final_balance_deduction: BalanceDeduction | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    request_id: str | None = None

    @property
    def external_task_id(self) -> str | None:
        """The caller's own id of the task."""
        return self.task_info.external_task_id

    @property
    def voices(self) -> tuple[Voice, ...]:
        """The voices it made; empty until it has succeeded."""
        return self.task_result.voices

    @property
    def voice(self) -> Voice | None:
        """The first voice it made, or ``None``."""
        return self.task_result.voices[0] if self.task_result.voices else None

    @property
    def is_done(self) -> bool:
        """Whether it has ended, either way."""
        return self.task_status.is_terminal

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.task_status is TaskStatus.SUCCEED

    @property
    def failed(self) -> bool:
        """Whether it ended badly; ``task_status_msg`` says why."""
        return self.task_status is TaskStatus.FAILED


@frozen
class VoiceRequest:
    """One voice to clone in a batch: plain data, checked when it is used.

    Attributes:
        voice_name: The voice's name, 1 to 20 characters.
        voice_url: A public URL of an ``.mp3``/``.wav`` audio or ``.mp4``/``.mov`` video of one
            clean human voice, 5 to 30 s long.
        video_id: Instead of a URL: a video made earlier on the account.
        voice_file: Instead of a URL: the path of a local recording; needs a sample host.
        callback_url: Where the vendor reports changes of the task's state.
        external_task_id: The idempotency key; derived or made if it is not given.
        key: What tells this request from the others of its batch; by default a digest of the name
            and the source (a file's bytes, a URL verbatim: URLs that rotate need a key).
    """

    voice_name: str
    voice_url: str | None = field(default=None, repr=mask_url)
    video_id: str | None = None
    voice_file: str | os.PathLike[str] | None = None
    callback_url: str | None = field(default=None, repr=mask_url)
    external_task_id: str | None = None
    key: str | None = None


@frozen
class CloneResult:
    """How one request of a batch ended: exactly one of ``voice`` and ``error`` is set.

    Attributes:
        request: The request, as it was given.
        task: The task in its last known state, or ``None`` if there is none.
        voice: The voice, if the request succeeded.
        error: What went wrong, if it did not.
    """

    request: VoiceRequest
    task: VoiceTask | None
    voice: Voice | None
    error: Exception | None


# --- the converter ---

_DECIMAL = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_Hook = Callable[[Any, Any], Any]
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number"}


def _expected(what: str, value: object) -> TypeError:
    kind = "null" if value is None else _KINDS.get(type(value), "a number")
    return TypeError(f"expected {what}, got {kind}")


def _text(value: Any, _: Any = None) -> str:
    if type(value) is str:
        return value
    raise _expected("a string", value)


def _optional_text(value: Any, _: Any = None) -> str | None:
    if type(value) is str or value is None:
        return value
    raise _expected("a string", value)


def _own_id(value: Any, _: Any = None) -> str | None:
    return _optional_text(value) or None  # an empty id is none: two such tasks are not the same


def _message(value: Any, _: Any = None) -> str | None:
    # A reason such as "cannot fetch https://..." may hold a signed URL, and errors repeat it.
    return redact(value) if _optional_text(value) else value


def _status(value: Any, _: Any = None) -> TaskStatus:
    status = _STATUSES.get(value) if type(value) is str else None
    return status or TaskStatus(_text(value))


def _time(value: Any, _: Any = None) -> datetime | None:
    if type(value) is int:
        return _EPOCH + value * _MILLISECOND
    if value is None:
        return None
    raise _expected("Unix milliseconds", value)


def _amount(value: Any, _: Any = None) -> Decimal | None:
    if type(value) is str:
        return _decimal(value)
    if value is None:
        return None
    raise _expected("a string", value)


@lru_cache(maxsize=1024)  # an account pays the same few amounts again and again
def _decimal(text: str) -> Decimal | None:
    if text == "":
        return None
    if _DECIMAL.fullmatch(text):
        return Decimal(text)
    raise ValueError("expected a decimal number in a string")


def _object(structure: _Hook, **default: object) -> _Hook:
    """Read an object; ``null`` stands for a missing one where there is an ``absent=`` for it."""

    def hook(value: Any, cls: Any) -> Any:
        if type(value) is dict:
            return structure(value, cls)
        if value is None and default:
            return default["absent"]
        raise _expected("an object", value)

    return hook


def _array(structure: _Hook) -> _Hook:
    def hook(value: Any, cls: Any) -> Any:
        if value is None:
            return ()
        if type(value) in (list, tuple):
            return structure(value, cls)
        raise _expected("an array", value)

    return hook


def configure_converter(converter: "Converter") -> None:
    """Teach a cattrs converter the vendor's JSON, both ways; for use in an app's own converter.

    Milliseconds become aware datetimes, decimal strings ``Decimal``; nothing is coerced silently.
    """
    from cattrs.gen import make_dict_structure_fn, override  # here, as below

    register = converter.register_structure_hook
    register(str, _text)
    register(str | None, _optional_text)
    register(TaskStatus, _status)
    register(datetime | None, _time)
    register(Decimal | None, _amount)
    # Inner classes first: a class's hook is made of those of its fields.
    voice = _object(make_dict_structure_fn(Voice, converter))
    register(Voice, voice)
    voices: _Hook = converter.get_structure_hook(tuple[Voice, ...])
    if not converter.detailed_validation:

        def voices(value: Any, _: Any) -> tuple[Voice, ...]:
            return tuple([voice(item, Voice) for item in value])

    converter.register_structure_hook_func(lambda kind: kind == tuple[Voice, ...], _array(voices))
    info = make_dict_structure_fn(
        TaskInfo, converter, external_task_id=override(struct_hook=_own_id)
    )
    register(TaskInfo, _object(info, absent=TaskInfo()))
    result = make_dict_structure_fn(TaskResult, converter)
    register(TaskResult, _object(result, absent=TaskResult()))
    deduction = make_dict_structure_fn(BalanceDeduction, converter)
    register(BalanceDeduction | None, _object(deduction, absent=None))
    task = make_dict_structure_fn(
        VoiceTask, converter, task_status_msg=override(struct_hook=_message)
    )
    register(VoiceTask, _object(task))
    converter.register_unstructure_hook(Decimal, str)
    converter.register_unstructure_hook(TaskStatus, str)
    converter.register_unstructure_hook(datetime, lambda moment: (moment - _EPOCH) // _MILLISECOND)


def make_converter(*, detailed_validation: bool = False) -> "Converter":
    """Make a converter for the vendor's JSON.

    Args:
        detailed_validation: Tell where in the document an error is, at the price of speed.
    """
    from cattrs import Converter  # here, so that importing this package does not wait for it

    converter = Converter(detailed_validation=detailed_validation, omit_if_default=False)
    configure_converter(converter)
    return converter
