"""The account on the vendor's side: its tasks, slots, ids and lists. Pure state, no HTTP."""

from __future__ import annotations

import math
import random
import secrets
import threading
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from heapq import heappop, heappush
from typing import Literal

from attrs import define, frozen

from kling_voice.emulator.clock import Clock
from kling_voice.emulator.codes import BusinessError
from kling_voice.emulator.validation import CreateBody, Paging

__all__ = ["Account", "ListOrder", "State", "Task", "TaskView"]

ListOrder = Literal["newest", "oldest", "shuffled"]

_SUBMITTED_PART = 0.15
"""How much of a task's life it spends as `submitted`."""


class State(StrEnum):
    """Where a task is in its life; the values are the vendor's words."""

    SUBMITTED = "submitted"
    PROCESSING = "processing"
    SUCCEED = "succeed"
    FAILED = "failed"


@define(eq=False)
class Task:
    """A task as the server keeps it; its state is computed from the clock.

    Attributes:
        number: which create made it, from 1; 0 for a preloaded one.
        task_id: the server's id.
        voice_id: the id of the voice that it makes.
        body: what was asked for.
        created: when, by the emulator's clock.
        created_wall: when, by the server's wall clock.
        processing: when it leaves `submitted`.
        ends: when it ends; infinite while its sample is being checked.
        visible: from when on reads show it.
        failure: why it fails, if it does.
        planned_end: when it ends if the check of its sample does not take longer.
        trial_extension: the format of the trial of its voice.
        deleted: whether its voice was deleted.
        rendered: its JSON in the state it was last shown in.
    """

    number: int
    task_id: str
    voice_id: str
    body: CreateBody
    created: float
    created_wall: float
    processing: float
    ends: float
    visible: float
    failure: str | None
    planned_end: float
    trial_extension: str = ".mp3"
    deleted: bool = False
    rendered: tuple[State, bytes] | None = None

    @property
    def trial_path(self) -> str:
        """Where the emulator serves the trial of its voice."""
        return f"/media/trials/{self.task_id}{self.trial_extension}"

    def state(self, now: float) -> State:
        """Where the task is in its life at a moment of the emulator's clock."""
        if now >= self.ends:
            return State.FAILED if self.failure is not None else State.SUCCEED
        return State.SUBMITTED if now < self.processing else State.PROCESSING

    def since(self, state: State) -> float:
        """When, by the emulator's clock, it entered a state."""
        if state is State.SUBMITTED:
            return self.created
        return self.processing if state is State.PROCESSING else self.ends


@frozen
class TaskView:
    """A task as it was when a test looked.

    Attributes:
        number: which create made it, from 1; 0 for a preloaded one.
        task_id: the server's id.
        external_task_id: the caller's id, or None.
        voice_name: the voice's name.
        voice_url: the source, or None.
        video_id: the source, or None.
        callback_url: whom the server tells, or None.
        voice_id: the id of its voice, whether or not it has succeeded yet.
        status: `submitted`, `processing`, `succeed` or `failed`.
        failure: why it fails, if it does.
        deleted: whether its voice was deleted.
        created: when, by the emulator's clock (`Emulator.now()`).
        ends: when it ends, by that clock; infinite while its sample is being checked.
    """

    number: int
    task_id: str
    external_task_id: str | None
    voice_name: str
    voice_url: str | None
    video_id: str | None
    callback_url: str | None
    voice_id: str
    status: str
    failure: str | None
    deleted: bool
    created: float
    ends: float

    @property
    def ended(self) -> bool:
        """Whether it had succeeded or failed."""
        return self.status in (State.SUCCEED, State.FAILED)


class Account:
    """The tasks of one account, under one lock: any thread may look and change settings.

    Attributes:
        clock: the time that tasks live by.
        concurrency_limit: tasks in flight at once, or None for no limit.
        occupied: slots that someone else holds.
        task_seconds: a task's whole life, or a function from the number of the create to it.
        read_lag: seconds before reads show a new task.
        created: how many tasks were created (preloaded ones do not count).
        max_in_flight: the most tasks that were in flight at once.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        concurrency_limit: int | None,
        task_seconds: float | Callable[[int], float],
        read_lag: float,
        list_order: ListOrder,
    ) -> None:
        if list_order not in ("newest", "oldest", "shuffled"):
            raise ValueError(f"list_order is newest, oldest or shuffled, not {list_order!r}")
        self.clock = clock
        self.concurrency_limit = concurrency_limit
        self.occupied = 0
        self.task_seconds = task_seconds
        self.read_lag = read_lag
        self.created: int = 0
        self.max_in_flight: int = 0
        self._list_order = list_order
        self._lock = threading.RLock()
        self._shuffle = random.Random(0)
        self._ids = secrets.randbelow(10**16) + 8 * 10**17
        self._by_task_id: dict[str, Task] = {}
        self._by_external_id: dict[str, Task] = {}
        self._by_voice_id: dict[str, Task] = {}
        self._reserved: set[str] = set()
        self._listed: list[Task] = []
        self._unlisted: deque[Task] = deque()
        self._checking = 0
        self._ends: list[float] = []

    # Slots

    @property
    def in_flight(self) -> int:
        """Tasks that have not ended."""
        with self._lock:
            now = self.clock.now()
            while self._ends and self._ends[0] <= now:
                heappop(self._ends)
            return len(self._ends) + self._checking

    # Writes

    def create(
        self, body: CreateBody, *, failure: str | None = None, checked: bool = False
    ) -> Task:
        """Make a task of a valid body; with a `failure` it will fail for that reason.

        With `checked`, the task does not end before `check_done` has been called.
        Refuses an external id that is taken, then a task over the concurrency limit.
        """
        with self._lock:
            self._refuse_taken(body.external_task_id)
            in_flight = self.in_flight
            limit = self.concurrency_limit
            if limit is not None and in_flight + self.occupied >= limit:
                raise BusinessError(1303)
            number = self.created + 1
            life = self.task_seconds(number) if callable(self.task_seconds) else self.task_seconds
            task = self._new_task(number, body, life, failure)
            if checked:
                self._checking += 1
                task.ends = math.inf
            else:
                heappush(self._ends, task.ends)
            self.created = number
            self.max_in_flight = max(self.max_in_flight, in_flight + 1)
            self._unlisted.append(task)
            return task

    def check_done(self, task: Task, failure: str | None) -> None:
        """The sample of a task was checked: now it may end, well or with a reason."""
        with self._lock:
            self._checking -= 1
            task.failure = failure if failure is not None else task.failure
            task.ends = max(task.planned_end, self.clock.now())
            heappush(self._ends, task.ends)

    def delete(self, voice_id: str) -> Task:
        """Delete the voice that a task made."""
        with self._lock:
            task = self._by_voice_id.get(voice_id)
            if task is None or task.state(self.clock.now()) is not State.SUCCEED:
                raise BusinessError(1203, f"voice {voice_id} does not exist")
            if task.deleted:
                raise BusinessError(1201, f"voice {voice_id} has already been deleted")
            task.deleted = True
            return task

    def preload(self, count: int) -> None:
        """Add tasks of someone else that ended well, as if they had been created just now."""
        with self._lock:
            self._list_visible()
            for _ in range(count):
                body = CreateBody(voice_name="Foreign", voice_url="https://example.com/voice.mp3")
                task = self._new_task(0, body, 0.0, None)
                task.visible = task.created
                self._list(task)

    def reserve_external_id(self, external_task_id: str) -> None:
        """Let something that is not a custom voice hold an external id."""
        with self._lock:
            self._refuse_taken(external_task_id)
            self._reserved.add(external_task_id)

    # Reads

    def find(self, any_id: str) -> Task:
        """The task of a task id or an external id."""
        with self._lock:
            task = self._by_task_id.get(any_id) or self._by_external_id.get(any_id)
            if task is None or task.visible > self.clock.now():
                raise BusinessError(1203, f"task {any_id} does not exist")
            return task

    def task(self, task_id: str) -> Task | None:
        """The task of a task id, whether or not reads show it yet."""
        return self._by_task_id.get(task_id)

    def page(self, paging: Paging, *, until: float | None = None) -> list[Task]:
        """One page of the list, as it is or was; beyond the last page, nothing."""
        with self._lock:
            self._list_visible()
            listed = self._listed
            if until is not None:
                listed = [task for task in listed if task.visible <= until]
            skipped = (paging.number - 1) * paging.size
            if self._list_order != "newest":
                return listed[skipped : skipped + paging.size]
            last = max(0, len(listed) - skipped)
            return listed[max(0, last - paging.size) : last][::-1]

    def views(self) -> tuple[TaskView, ...]:
        """All tasks as they are now, in the order in which they were made."""
        with self._lock:
            now = self.clock.now()
            return tuple(_view(task, now) for task in self._by_task_id.values())

    # Inside

    def _new_task(self, number: int, body: CreateBody, life: float, failure: str | None) -> Task:
        now = self.clock.now()
        order = len(self._by_task_id)
        task = Task(
            number=number,
            task_id=str(self._ids + 7 * order),
            voice_id=str(self._ids + 10**17 + 7 * order),
            body=body,
            created=now,
            created_wall=self.clock.wall(),
            processing=now + life * _SUBMITTED_PART,
            ends=now + life,
            visible=now + self.read_lag,
            failure=failure,
            planned_end=now + life,
        )
        self._by_task_id[task.task_id] = task
        self._by_voice_id[task.voice_id] = task
        if body.external_task_id is not None:
            self._by_external_id[body.external_task_id] = task
        return task

    def _refuse_taken(self, external_task_id: str | None) -> None:
        if external_task_id in self._by_external_id or external_task_id in self._reserved:
            raise BusinessError(1201, f"external_task_id {external_task_id} already exists")

    def _list_visible(self) -> None:
        """Put into the list what the read lag holds back no more."""
        now = self.clock.now()
        while self._unlisted and self._unlisted[0].visible <= now:
            self._list(self._unlisted.popleft())

    def _list(self, task: Task) -> None:
        if self._list_order == "shuffled":
            self._listed.insert(self._shuffle.randint(0, len(self._listed)), task)
        else:
            self._listed.append(task)


def _view(task: Task, now: float) -> TaskView:
    return TaskView(
        number=task.number,
        task_id=task.task_id,
        external_task_id=task.body.external_task_id,
        voice_name=task.body.voice_name,
        voice_url=task.body.voice_url,
        video_id=task.body.video_id,
        callback_url=task.body.callback_url,
        voice_id=task.voice_id,
        status=task.state(now).value,
        failure=task.failure,
        deleted=task.deleted,
        created=task.created,
        ends=task.ends,
    )
