"""Callbacks: told on time, in either shape, signed; lost, repeated or late on demand."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import itertools
import random
import secrets
import time
from collections import Counter
from heapq import heappop, heappush
from typing import Literal
from urllib.parse import urlsplit

import aiohttp
from attrs import evolve, frozen

from kling_voice.emulator.account import State, Task
from kling_voice.emulator.clock import Clock
from kling_voice.emulator.shapes import Shapes, to_json

__all__ = ["CallbackShape", "Callbacks", "sign"]

CallbackShape = Literal["legacy", "new"]

_ATTEMPTS = 3
_BACKOFF = 0.1
_TIMEOUT = 5.0
_LANES = 16


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature` for a callback, as Standard Webhooks defines it."""
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    signed = b".".join([message_id.encode(), str(timestamp).encode(), body])
    digest = hmac.digest(key, signed, "sha256")
    return "v1," + base64.b64encode(digest).decode()


@frozen
class _Notice:
    """One callback that is to be delivered."""

    message_id: str
    task: Task
    state: State
    attempt: int = 1


class Callbacks:
    """The schedule of all callbacks: one heap, one timer, and lanes that keep a task's order.

    Each server that is called back has lanes of its own, so that a deaf one delays no other.

    Args:
        clock: the time that tasks live by; its skew also shows in the signed timestamps.
        shapes: renders the bodies.
        shape: which of the two shapes is sent.
        secret: signs the callbacks; None: they are not signed.
        repeat: the part of callbacks that is delivered twice.
        drop: the part that is never delivered.
        reorder: the part that comes after the task's next one.

    Attributes:
        counts: how many were `sent` (attempts), `delivered`, `failed` for good, `repeated`,
            `dropped` and `reordered`.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        shapes: Shapes,
        shape: CallbackShape = "legacy",
        secret: str | None = None,
        repeat: float = 0.0,
        drop: float = 0.0,
        reorder: float = 0.0,
    ) -> None:
        if shape not in ("legacy", "new"):
            raise ValueError(f"callback_shape is legacy or new, not {shape!r}")
        if secret is not None:
            _check_secret(secret)
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._shapes = shapes
        self._shape = shape
        self._secret = secret
        self._repeat, self._drop, self._reorder = repeat, drop, reorder
        self._random = random.Random(0)
        self._order = itertools.count()
        self._heap: list[tuple[float, bool, int, _Notice]] = []
        self._changed = asyncio.Event()
        self._lanes: dict[tuple[str, int], asyncio.Queue[_Notice]] = {}
        self._workers: list[asyncio.Task[None]] = []

    def start(self, session: aiohttp.ClientSession) -> None:
        """Begin to deliver, with a session that the caller closes."""
        self._changed = asyncio.Event()
        self._lanes = {}
        self._workers = [asyncio.create_task(self._run_timer(session))]

    async def close(self) -> None:
        """End all deliveries."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers.clear()

    def wake(self) -> None:
        """Look at the clock again: it was moved."""
        self._changed.set()

    def follow(self, task: Task) -> None:
        """Schedule what there is to tell of a new task; its end too, if that is known."""
        if task.body.callback_url is None:
            return
        self._schedule(task, State.SUBMITTED, task.created, then=task.processing)
        self._schedule(task, State.PROCESSING, task.processing, then=task.ends)
        if task.ends < float("inf"):
            self.follow_end(task)

    def follow_end(self, task: Task) -> None:
        """Schedule what there is to tell of a task's end."""
        if task.body.callback_url is not None:
            self._schedule(task, task.state(task.ends), task.ends, then=task.ends)

    def _schedule(self, task: Task, state: State, due: float, *, then: float) -> None:
        drops, repeats, reorders = (self._random.random() for _ in range(3))
        notice = _Notice(f"msg_{secrets.token_hex(12)}", task, state)
        if drops < self._drop:
            self.counts["dropped"] += 1
            return
        late = reorders < self._reorder and due < then < float("inf")
        if late:
            self.counts["reordered"] += 1
            due = then
        self._push(due, notice, late=late)
        if repeats < self._repeat:
            self.counts["repeated"] += 1
            self._push(due, notice, late=late)

    def _push(self, due: float, notice: _Notice, *, late: bool = False) -> None:
        entry = (due, late, next(self._order), notice)
        heappush(self._heap, entry)
        if self._heap[0] is entry:
            self._changed.set()

    def _lane(self, task: Task, session: aiohttp.ClientSession) -> asyncio.Queue[_Notice]:
        server = urlsplit(task.body.callback_url or "").netloc
        key = (server, hash(task.task_id) % _LANES)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = asyncio.Queue()
            self._workers.append(asyncio.create_task(self._deliver_lane(session, lane)))
        return lane

    async def _run_timer(self, session: aiohttp.ClientSession) -> None:
        while True:
            now = self._clock.now()
            while self._heap and self._heap[0][0] <= now:
                notice = heappop(self._heap)[-1]
                self._lane(notice.task, session).put_nowait(notice)
            self._changed.clear()
            pause = self._clock.real_seconds(self._heap[0][0] - now) if self._heap else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def _deliver_lane(
        self, session: aiohttp.ClientSession, lane: asyncio.Queue[_Notice]
    ) -> None:
        while True:
            notice = await lane.get()
            self.counts["sent"] += 1
            if await self._post(session, notice):
                self.counts["delivered"] += 1
            elif notice.attempt < _ATTEMPTS:
                pause = _BACKOFF * notice.attempt * self._clock.scale
                again = evolve(notice, attempt=notice.attempt + 1)
                self._push(self._clock.now() + pause, again)
            else:
                self.counts["failed"] += 1

    async def _post(self, session: aiohttp.ClientSession, notice: _Notice) -> bool:
        render = self._shapes.legacy if self._shape == "legacy" else self._shapes.new
        body = to_json(render(notice.task, notice.state))
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            timestamp = int(time.time() + self._clock.skew)
            headers["webhook-id"] = notice.message_id
            headers["webhook-timestamp"] = str(timestamp)
            headers["webhook-signature"] = sign(self._secret, notice.message_id, timestamp, body)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
        url = notice.task.body.callback_url or ""
        try:
            async with session.post(
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                return 200 <= response.status < 300
        except (aiohttp.ClientError, OSError, ValueError):
            return False


def _check_secret(secret: str) -> None:
    try:
        sign(secret, "", 0, b"")
    except (binascii.Error, ValueError):
        raise ValueError("webhook_secret is not base64 after its whsec_ prefix") from None
