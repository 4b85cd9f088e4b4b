"""How a batch is doing: a live display on a terminal, a plain line for each result elsewhere."""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kling_voice.cli.console import clean, say, stderr
from kling_voice.slots import Slots

_LOOK_BACK = 50  # results that the rate is taken from


class Pace:
    """How fast results come, over the last few of them.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moments = deque([clock()], maxlen=_LOOK_BACK + 1)

    def tick(self) -> None:
        """Note a result."""
        self._moments.append(self._clock())

    def rate(self) -> float | None:
        """Give results a second; ``None`` before the first one."""
        passed = self._clock() - self._moments[0]
        return (len(self._moments) - 1) / passed if len(self._moments) > 1 and passed else None

    def left(self, remaining: int) -> float | None:
        """Give the seconds that so many more results will take; ``None`` if that is unknown."""
        rate = self.rate()
        return remaining / rate if rate else None


class Progress:
    """The progress of one batch, as a context manager.

    Attributes:
        total: All requests.
        done: Voices so far, those of earlier runs included.
        failed: Failures so far.

    Args:
        total: All requests.
        done: Voices of earlier runs.
        slots: The client's slots, once there are some.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.done: int = done
        self.failed: int = 0
        self.slots: Slots | None = None
        self._pace = Pace()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if stderr().is_terminal:
            self._live = Live(
                get_renderable=self.render,
                console=stderr(),
                refresh_per_second=5,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def result(self, name: str, *, voice_id: str | None, status: str, why: str) -> None:
        """Note a result: a voice, or what became of it instead and why."""
        self._pace.tick()
        if voice_id is None:
            self.failed += 1
        else:
            self.done += 1
        if voice_id is None:
            say(clean(f"{self._count()} {name}: {status}: {why}"), style="red")
        elif self._live is None:
            say(clean(f"{self._count()} {name}: voice {voice_id}"))

    def _count(self) -> str:
        return f"{self.done + self.failed}/{self.total}"

    def render(self) -> RenderableType:
        """Draw the display: two lines, for 80 columns or fewer."""
        ended = self.done + self.failed
        left = self._pace.left(self.total - ended)
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, justify="right", min_width=12)
        line.add_row(
            ProgressBar(total=max(1, self.total), completed=ended),
            self._count(),
            f"{duration(left)} left" if left is not None else "",
        )
        return Group(line, Text("  ".join(self._figures()), no_wrap=True, overflow="ellipsis"))

    def _figures(self) -> list[str]:
        figures = [f"{self.done} done", f"{self.failed} failed"]
        if self.slots is not None:
            figures.append(f"{self.slots.in_flight} in flight")
            limit = self.slots.limit
            figures.append(f"limit {limit}" if limit is not None else "limit not yet known")
        if (rate := self._pace.rate()) is not None:
            figures.append(f"{rate * 60:.3g} a minute")
        return figures


def duration(seconds: float) -> str:
    """Tell a length of time: ``0:09``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
