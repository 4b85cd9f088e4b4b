"""The progress display: its figures, and that they fit."""

import io

import pytest
from rich.console import Console

from kling_voice.cli.progress import Pace, Progress, duration
from kling_voice.slots import Slots


def drawn(progress: Progress, width: int) -> list[str]:
    """Draw the display on a terminal of a width, without colours."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    console.print(progress.render())
    return file.getvalue().splitlines()


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace() -> None:
    """The rate is that of the last results; without any there is none."""
    clock = Clock()
    pace = Pace(clock)
    clock.now = 10
    assert (pace.rate(), pace.left(5)) == (None, None)
    for _ in range(5):
        clock.now += 2
        pace.tick()
    assert pace.rate() == 5 / 20
    assert pace.left(10) == 40
    for _ in range(60):
        clock.now += 1
        pace.tick()
    assert pace.rate() == pytest.approx(1)
    clock.now += 50
    assert pace.rate() == pytest.approx(0.5)  # a standstill shows


def test_figures() -> None:
    """The display has all its figures, in 80 columns, even when they are large."""
    progress = Progress(123_456, 99_999)
    progress.slots = Slots()
    progress.failed = 1_234
    for _ in range(3):
        progress._pace.tick()
    first, second = drawn(progress, 80)
    assert max(len(first), len(second)) <= 80
    assert "101233/123456" in first
    assert "left" in first
    assert second.startswith("99999 done  1234 failed  0 in flight  limit not yet known  ")
    assert "a minute" in second


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_any_width(width: int) -> None:
    """The display has two lines whatever the terminal's width."""
    progress = Progress(10, 3)
    progress.slots = Slots()
    lines = drawn(progress, width)
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)


def test_nothing_to_do() -> None:
    """A display of no requests can be drawn."""
    assert len(drawn(Progress(0, 0), 80)) == 2


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0:00"), (9.4, "0:09"), (75, "1:15"), (3723, "1:02:03")]
)
def test_duration(seconds: float, told: str) -> None:
    """Lengths of time read as on a clock."""
    assert duration(seconds) == told
