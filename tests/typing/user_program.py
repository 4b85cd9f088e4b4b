"""A user's program, for the type checker alone: it is checked and never run."""

from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, assert_type

from kling_voice import (
    ApiKey,
    CallbackReceiver,
    CloneResult,
    KlingError,
    KlingVoiceClient,
    SampleHost,
    SampleInfo,
    TaskStatus,
    Voice,
    VoiceRequest,
    VoiceTask,
    inspect_sample,
)


async def told(task: VoiceTask) -> None: ...


def told_at_once(task: VoiceTask) -> None: ...


class OwnHost:
    async def publish(self, path: Path, name: str) -> str:
        return f"https://example.com/{name}{path.suffix}"

    async def discard(self, url: str) -> None: ...


async def requests() -> AsyncIterator[VoiceRequest]:
    yield VoiceRequest("Ada", voice_file=Path("ada.mp3"), key="ada")


async def program() -> None:
    host: SampleHost = OwnHost()
    receiver = CallbackReceiver("whsec_x", public_url="https://example.com/kling")
    async with KlingVoiceClient(ApiKey("key"), callbacks=receiver, sample_host=host) as kling:
        assert_type(kling, KlingVoiceClient)
        task = await kling.create_voice("Ada", voice_url="https://example.com/ada.mp3")
        assert_type(task, VoiceTask)
        assert_type(task.task_id, str)
        assert_type(task.task_status, TaskStatus)
        assert_type(task.external_task_id, str | None)
        assert_type(task.voices, tuple[Voice, ...])
        assert_type(task.voice, Voice | None)
        assert_type(task.final_unit_deduction, Decimal | None)
        assert_type(task.created_at, datetime | None)
        assert_type(task.is_done, bool)
        assert_type(await kling.get_task(task.task_id), VoiceTask)
        assert_type(await kling.list_tasks(page_num=2, page_size=100), list[VoiceTask])
        assert_type(kling.iter_presets(), AsyncGenerator[VoiceTask, None])
        assert_type(await kling.wait_for_task(task, timeout=None, on_update=told), VoiceTask)
        assert_type(await kling.wait_for_task("id", on_update=told_at_once), VoiceTask)
        voice = await kling.clone_voice("Ada", voice_file="ada.mp3", on_update=told)
        assert_type(voice, Voice)
        assert_type(await kling.download_trial(voice, "ada.mp3"), Path)
        assert_type(await kling.request("GET", "/v1/x", params={"a": 1}), Any)
        results = kling.clone_voices(requests(), batch_id="cast", concurrency=3)
        assert_type(results, AsyncGenerator[CloneResult, None])
        async for result in results:
            assert_type(result.error, Exception | None)
            if isinstance(result.error, KlingError):
                assert_type(result.error.external_task_id, str | None)
        assert_type(receiver.parse(b"", {}), VoiceTask)
    assert_type(inspect_sample("ada.mp3"), SampleInfo)
