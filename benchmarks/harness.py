"""What the benchmarks share: figures with their spread, sides measured in turn, fresh processes."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal, ParamSpec, TypeVar

from attrs import field, frozen

P = ParamSpec("P")
T = TypeVar("T")

Side = Callable[[], Awaitable[object]]

SPAWN = multiprocessing.get_context("spawn")
"""Makes processes that share nothing with this one, on every platform alike."""


@frozen
class Goal:
    """What a figure should be at most, or at least."""

    sense: Literal["<=", ">="]
    bound: float

    def is_met_by(self, value: float) -> bool:
        """Tell whether a value reaches the goal."""
        return value <= self.bound if self.sense == "<=" else value >= self.bound


def _row(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(values)


@frozen
class Figure:
    """One measured number.

    Attributes:
        benchmark: The name of the benchmark that measured it.
        what: What was measured, and against what.
        values: One value a round.
        unit: What the values are counted in; "x" for a ratio.
        goal: What the median should reach, if there is a goal.
        note: What a reader should know beside the number.
        panel: The panel of the picture that shows its median, with a hint behind "; ".
        bar: The name of its bar there.
    """

    benchmark: str
    what: str
    values: tuple[float, ...] = field(converter=_row)
    unit: str = "x"
    goal: Goal | None = None
    note: str = ""
    panel: str | None = None
    bar: str = ""

    @property
    def median(self) -> float:
        """The value to quote."""
        return median(self.values)

    @property
    def verdict(self) -> str:
        """Whether the goal is reached, in a word."""
        if self.goal is None:
            return ""
        return "yes" if self.goal.is_met_by(self.median) else "no"


def at_most(bound: float) -> Goal:
    """Make a goal that is an upper bound."""
    return Goal("<=", bound)


def at_least(bound: float) -> Goal:
    """Make a goal that is a lower bound."""
    return Goal(">=", bound)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Divide round by round: each ratio's two sides were measured within the same seconds."""
    return tuple(mine / other for mine, other in zip(ours, theirs, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """Give the value that the share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def cpu_in_turn(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of each side, one after the other, many times over.

    Every round begins with another side, so that none is always the one that runs on a warm or a
    throttled processor. A first round is run and not counted. What was imported so far is kept out
    of the garbage collector's sight: the more SDKs there are in this process, the more it would
    charge to each.
    """
    gc.collect()
    gc.freeze()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        names.append(names.pop(0))
        for name in names:
            gc.collect()
            before = time.process_time()
            await sides[name]()
            if number:
                spent[name].append(time.process_time() - before)
    return spent


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a process of its own, and give what it returns."""
    with SPAWN.Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def say(text: str = "") -> None:
    """Tell the user something on the terminal."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def as_json(figure: Figure) -> dict[str, Any]:
    """Put a figure into plain data, with what is computed from its values."""
    goal = figure.goal
    return {
        "benchmark": figure.benchmark,
        "what": figure.what,
        "unit": figure.unit,
        "median": _short(figure.median),
        "min": _short(min(figure.values)),
        "max": _short(max(figure.values)),
        "goal": None if goal is None else f"{goal.sense} {goal.bound:g}",
        "met": None if goal is None else goal.is_met_by(figure.median),
        "values": [_short(value) for value in figure.values],
        "note": figure.note,
        "panel": figure.panel,
        "bar": figure.bar,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
