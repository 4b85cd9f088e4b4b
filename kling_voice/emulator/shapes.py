"""How tasks look on the wire: in answers and in both shapes of callbacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attrs import define, frozen

from kling_voice.emulator.account import State, Task
from kling_voice.emulator.clock import Clock

__all__ = ["OFFICIAL_VOICES", "Shapes", "to_json"]

_UNITS = "0.05"
_LIST_PRICE = "0.07"

_OFFICIAL_NAMES = (
    "Calm Narrator", "Bright Girl", "Gentle Uncle", "Morning Host", "Old Sailor", "Young Scholar",
    "Warm Mother", "Cool Detective", "Cheerful Boy", "Wise Grandma", "Sports Reporter", "Poet",
)  # fmt: skip
_OFFICIAL_SINCE = 1_764_547_200_000

OFFICIAL_VOICES: Mapping[str, str] = {
    str(829_000_000_000_000_000 + place): name
    for place, name in enumerate(_OFFICIAL_NAMES, start=1)
}
"""The official library: the name of each voice by its id."""


def to_json(value: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@frozen
class _Moments:
    created: int
    updated: int


@define(eq=False)
class Shapes:
    """Renders the tasks of one account.

    Attributes:
        clock: the server's clock.
        owner: the account's id, which its voices are `owned_by`.
        succeed_word: how answers spell the good end.
        base_url: what `trial_url` begins with.
    """

    clock: Clock
    owner: str
    succeed_word: str
    base_url: str = ""

    def created(self, task: Task) -> bytes:
        """What a create answers."""
        moments = self._moments(task, State.SUBMITTED)
        return to_json(
            {
                "task_id": task.task_id,
                "task_status": State.SUBMITTED,
                "task_info": _task_info(task),
                "created_at": moments.created,
                "updated_at": moments.updated,
            }
        )

    def queried(self, task: Task, now: float) -> bytes:
        """What queries and lists show of a task; rendered once for each of its states."""
        state = task.state(now)
        if task.rendered is None or task.rendered[0] is not state:
            task.rendered = (state, to_json(self.legacy(task, state)))
        return task.rendered[1]

    def deleted(self, task: Task) -> bytes:
        """What a delete answers."""
        return to_json({"task_id": task.task_id, "task_status": self.succeed_word})

    def official(self) -> list[bytes]:
        """The official library as a list shows it."""
        return [self._official(voice_id, name) for voice_id, name in OFFICIAL_VOICES.items()]

    def legacy(self, task: Task, state: State) -> dict[str, Any]:
        """The task object: of queries, lists and the legacy callbacks."""
        moments = self._moments(task, state)
        shape: dict[str, Any] = {
            "task_id": task.task_id,
            "task_status": self.succeed_word if state is State.SUCCEED else state,
            "task_status_msg": _reason(task, state),
            "task_info": _task_info(task),
            "created_at": moments.created,
            "updated_at": moments.updated,
        }
        if state is State.SUCCEED:
            shape["task_result"] = {
                "voices": [
                    {
                        "voice_id": task.voice_id,
                        "voice_name": task.body.voice_name,
                        "trial_url": self.base_url + task.trial_path,
                        "owned_by": self.owner,
                    }
                ]
            }
            shape["final_unit_deduction"] = _UNITS
            shape["final_balance_deduction"] = {"quota": _UNITS, "list_price": _LIST_PRICE}
        if state is State.FAILED:
            shape["final_unit_deduction"] = "0"
            shape["final_balance_deduction"] = {"quota": "0", "list_price": "0"}
        return shape

    def new(self, task: Task, state: State) -> dict[str, Any]:
        """The newer shape, which only callbacks have."""
        moments = self._moments(task, state)
        ended_well = state is State.SUCCEED
        status = "succeeded" if ended_well else state
        voice = {
            "type": "voice",
            "id": task.voice_id,
            "name": task.body.voice_name,
            "url": self.base_url + task.trial_path,
            "owned_by": self.owner,
            "status": status,
        }
        return {
            "id": task.task_id,
            "status": status,
            "message": _reason(task, state),
            "create_time": moments.created,
            "update_time": moments.updated,
            "external_id": task.body.external_task_id or "",
            "outputs": [voice] if ended_well else [],
            "billing": [{"type": "unit", "amount": _UNITS}] if ended_well else [],
        }

    def _moments(self, task: Task, state: State) -> _Moments:
        updated = self.clock.wall_at(task.created, task.created_wall, task.since(state))
        return _Moments(int(task.created_wall * 1000), int(updated * 1000))

    def _official(self, voice_id: str, name: str) -> bytes:
        voice = {
            "voice_id": voice_id,
            "voice_name": name,
            "trial_url": f"{self.base_url}/media/trials/{voice_id}.mp3",
            "owned_by": "kling",
        }
        return to_json(
            {
                "task_id": voice_id,
                "task_status": self.succeed_word,
                "task_status_msg": "",
                "task_result": {"voices": [voice]},
                "created_at": _OFFICIAL_SINCE,
                "updated_at": _OFFICIAL_SINCE,
            }
        )


def _task_info(task: Task) -> dict[str, str]:
    external_task_id = task.body.external_task_id
    return {} if external_task_id is None else {"external_task_id": external_task_id}


def _reason(task: Task, state: State) -> str:
    return task.failure or "" if state is State.FAILED else ""
