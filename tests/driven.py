"""A clock that the tests drive, and a vendor who lives by it: waiting without waiting."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ParamSpec

from attrs import define, field
from yarl import URL

from kling_voice.errors import (
    BadRequestError,
    ClientClosedError,
    KlingError,
    NotFoundError,
    RequestTimeoutError,
)
from kling_voice.models import VoiceTask
from kling_voice.protocol import VOICES, Call, Envelope, read_task

P = ParamSpec("P")

START = 1000.0  # what the clock shows when a test begins: a tick of every policy in use


class _Selector(selectors.DefaultSelector):
    """Lets the time pass at once that the event loop would sleep for."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("nothing will ever happen")
        self.now += timeout
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._driven = _Selector()
        super().__init__(self._driven)

    def time(self) -> float:
        return self._driven.now

    def fall_behind(self, seconds: float) -> None:
        self._driven.now += seconds


def driven(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop whose clock jumps from one event to the next."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=_Loop) as runner:
            runner.run(test(*args, **kwargs))

    return run


def now() -> float:
    """Seconds since the test began."""
    return asyncio.get_running_loop().time() - START


async def until(moment: float) -> None:
    """Let time pass until so many seconds after the test began."""
    await asyncio.sleep(moment - now())


def lag(seconds: float) -> None:
    """Let time pass in which the event loop gets nothing done, as on a busy machine."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    loop.fall_behind(seconds)


def tasks_left() -> int:
    """Count the asyncio tasks that run beside the test."""
    return len(asyncio.all_tasks()) - 1


@define(eq=False)
class Job:
    """A task at the vendor: what it is, and from when on (in seconds of the test)."""

    task_id: str
    external: str | None = None
    timeline: list[tuple[float, str]] = field(factory=lambda: [(0.0, "submitted")])
    visible: float = 0.0
    voices_listed: bool = True
    voices_queried: bool = True
    lag: float = 0.0  # of the list behind the single query
    hidden: bool = False  # from the list

    def shape(self, moment: float, *, listed: bool = False) -> dict[str, Any]:
        """Describe it as the vendor does."""
        moment -= self.lag if listed else 0.0
        since, status = [step for step in self.timeline if step[0] <= max(moment, 0.0)][-1]
        shape: dict[str, Any] = {
            "task_id": self.task_id,
            "task_status": status,
            "updated_at": int(since * 1000),
            "task_info": {} if self.external is None else {"external_task_id": self.external},
        }
        if status == "succeed" and (self.voices_listed if listed else self.voices_queried):
            shape["task_result"] = {"voices": [{"voice_id": f"voice-{self.task_id}"}]}
        return shape


def job(
    task_id: str,
    ends: float = float("inf"),
    *,
    external: str | None = None,
    status: str = "succeed",
    **more: Any,
) -> Job:
    """Make a task that is submitted, and at some moment ends."""
    return Job(task_id, external, [(0.0, "submitted"), (ends, status)], **more)


def told(task_id: str = "t", status: str = "submitted", **fields: Any) -> VoiceTask:
    """Make a state as the caller of a wait may have it."""
    voices = {"task_result": {"voices": [{"voice_id": "v"}]}} if status == "succeed" else {}
    data = {"task_id": task_id, "task_status": status, **voices, **fields}
    return read_task(Envelope(data, None))


class Vendor:
    """Answers queries and lists by the driven clock, in place of a transport.

    Attributes:
        listed: Its tasks, in the order of its list.
        calls: The moment and the target of each request.
        latency: Seconds that an answer takes, or a function from the call to it.
        fault: Gives the error that a call meets.
        page_cap: The largest page.
        clamp: Whether a larger one is cut to that, and not refused.
        frozen: From when on a cache answers the list, with what that was then.
    """

    def __init__(self, jobs: Iterable[Job] = (), *, latency: float = 0.01) -> None:
        self.listed: list[Job] = list(jobs)
        self.calls: list[tuple[float, str]] = []
        self.latency: float | Callable[[Call], float] = latency
        self.fault: Callable[[Call], KlingError | None] = lambda call: None
        self.page_cap = 1000
        self.clamp = False
        self.frozen = float("inf")
        self.in_flight = 0
        self.is_closed = False

    def check_open(self) -> None:
        """Do as the real one does."""
        if self.is_closed:
            raise ClientClosedError("closed")

    async def send(self, call: Call, *, timeout: float | None = None) -> Envelope:
        """Answer one request."""
        self.check_open()
        self.calls.append((now(), call.target))
        seconds = self.latency if isinstance(self.latency, float) else self.latency(call)
        self.in_flight += 1
        try:
            assert timeout is not None
            await asyncio.sleep(min(seconds, timeout))
            if seconds > timeout:
                raise RequestTimeoutError("stalled")
            if (error := self.fault(call)) is not None:
                raise error
            return Envelope(self._answer(call), "request-id")
        finally:
            self.in_flight -= 1

    def _answer(self, call: Call) -> Any:
        moment = now()
        url = URL(call.target)
        if url.path == VOICES:
            number, size = int(url.query["pageNum"]), int(url.query["pageSize"])
            if size > self.page_cap:
                if not self.clamp:
                    raise BadRequestError("pageSize is too large", code=1201, http_status=400)
                size = self.page_cap
            shown = [job for job in self.listed if job.visible <= moment and not job.hidden]
            page = shown[(number - 1) * size : number * size]
            return [job.shape(min(moment, self.frozen), listed=True) for job in page]
        for candidate in self.listed:
            if url.name in (candidate.task_id, candidate.external) and candidate.visible <= moment:
                return candidate.shape(moment)
        raise NotFoundError("no such task", code=1203, http_status=404)

    @property
    def lists(self) -> list[float]:
        """The moments of the list requests."""
        return [moment for moment, target in self.calls if "?" in target]

    @property
    def singles(self) -> list[float]:
        """The moments of the single queries."""
        return [moment for moment, target in self.calls if "?" not in target]


def is_list(call: Call) -> bool:
    """Tell a list request from a single query."""
    return "?" in call.target
