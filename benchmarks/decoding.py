"""Decoding a list page of 1,000 tasks: `list_tasks` beside pydantic, into the same types."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from decimal import Decimal

from attrs import asdict
from pydantic import BaseModel, ConfigDict

from benchmarks.answers import TASK
from benchmarks.harness import Figure, at_most, cpu_in_turn, ratios
from kling_voice import TaskStatus, VoiceTask, protocol

TASKS = 1000


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Voice(_Model):
    voice_id: str
    voice_name: str | None = None
    trial_url: str | None = None
    owned_by: str | None = None


class _TaskInfo(_Model):
    external_task_id: str | None = None


class _TaskResult(_Model):
    voices: tuple[_Voice, ...] = ()


class _BalanceDeduction(_Model):
    quota: Decimal | None = None
    list_price: Decimal | None = None


class _Task(_Model):
    task_id: str
    task_status: TaskStatus
    task_status_msg: str | None = None
    task_info: _TaskInfo = _TaskInfo()
    task_result: _TaskResult = _TaskResult()
    final_unit_deduction: Decimal | None = None
    final_balance_deduction: _BalanceDeduction | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class _Page(_Model):
    code: int
    message: str
    request_id: str
    data: list[_Task]


def run(*, quick: bool) -> list[Figure]:
    """Measure; some 10 s, or one when quick."""
    pages, rounds = (5, 5) if quick else (20, 21)
    body = _page()
    _check_equal(body)
    spent = asyncio.run(_measure(body, pages, rounds))
    millis = {name: [1e3 * seconds / pages for seconds in values] for name, values in spent.items()}
    figures = [
        Figure(
            "decoding",
            "CPU of decoding 1,000 tasks in list_tasks / by pydantic",
            ratios(millis["kling_voice"], millis["pydantic"]),
            goal=at_most(1.0),
        )
    ]
    figures += [
        Figure("decoding", f"CPU of decoding 1,000 tasks: {name}", values, "ms")
        for name, values in millis.items()
    ]
    return figures


def _page() -> bytes:
    """A page as the vendor sends it: ids, times and URLs all differ, the price does not."""
    tasks = []
    for number in range(TASKS):
        text = json.dumps(TASK["data"])
        task = json.loads(text.replace("8298773019297833", f"{number:016d}"))
        task["task_info"] = {"external_task_id": f"kv-{number:032x}"}
        task["created_at"] += 1000 * number
        task["updated_at"] += 1001 * number
        tasks.append(task)
    return json.dumps({**TASK, "data": tasks}, separators=(",", ":")).encode()


def _ours(body: bytes) -> list[VoiceTask]:
    return protocol.read_tasks(protocol.read_envelope(200, {}, body))


def _check_equal(body: bytes) -> None:
    """Make sure that both sides make the same of the page."""
    for ours, theirs in zip(_ours(body), _Page.model_validate_json(body).data, strict=True):
        mine = asdict(ours)
        del mine["request_id"]
        if mine != theirs.model_dump():
            raise AssertionError(f"{mine} is not {theirs}")


async def _measure(body: bytes, pages: int, rounds: int) -> dict[str, list[float]]:
    async def kling_voice() -> None:
        for _ in range(pages):
            _ours(body)

    async def pydantic() -> None:
        for _ in range(pages):
            _Page.model_validate_json(body)

    async def plain_json() -> None:
        for _ in range(pages):
            json.loads(body)

    sides = {"kling_voice": kling_voice, "pydantic": pydantic, "json.loads alone": plain_json}
    return await cpu_in_turn(sides, rounds)
