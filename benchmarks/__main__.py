"""The benchmarks on the command line: `python -m benchmarks [NAME ...] [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.harness import Figure, as_json, say

BENCHMARKS = ("overhead", "decoding", "imports", "waiting", "batches", "streams", "growth")
PACKAGES = ("aiohttp", "attrs", "cattrs", "openai", "pydantic", "replicate", "runwayml", "tenacity")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run benchmarks, print the table, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes no results")
    parser.add_argument(
        "--output", type=Path, help="folder for results.json and results.svg (default: this one)"
    )
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.names} - {*BENCHMARKS}):
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    os.environ["NO_PROXY"] = "127.0.0.1"
    figures: list[Figure] = []
    for name in options.names or BENCHMARKS:
        started = time.monotonic()
        figures += importlib.import_module(f"benchmarks.{name}").run(quick=options.quick)
        sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    say(table(figures))
    if options.output or not options.quick:
        _write(options.output or Path(__file__).parent, figures)
    return 0


def table(figures: Iterable[Figure]) -> str:
    """Lay figures out as two Markdown tables: those with a goal, and what is behind them."""
    figures = list(figures)
    with_goal = [figure for figure in figures if figure.goal is not None]
    without = [figure for figure in figures if figure.goal is None]
    lines = [
        "| figure | median | min to max | goal | reached | |",
        "| --- | --: | --: | --: | --- | --- |",
    ]
    lines += [
        f"| {_cells(figure)} | {figure.goal.sense} {figure.goal.bound:g} | {figure.verdict} |"
        f" {figure.note} |"
        for figure in with_goal
        if figure.goal is not None
    ]
    lines += ["", "| behind them | median | min to max | |", "| --- | --: | --: | --- |"]
    lines += [f"| {_cells(figure)} | {figure.note} |" for figure in without]
    return "\n".join(lines)


def _cells(figure: Figure) -> str:
    unit = f" {figure.unit}" if figure.unit else ""
    spread = f"{_number(min(figure.values))} to {_number(max(figure.values))}"
    return f"{figure.what} | {_number(figure.median)}{unit} | {spread}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _write(folder: Path, figures: Sequence[Figure]) -> None:
    """Write the results beside those of the benchmarks that were not run this time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    fresh = {figure.benchmark for figure in figures}
    told: list[dict[str, Any]] = [as_json(figure) for figure in figures]
    if path.exists():
        earlier = json.loads(path.read_text())["figures"]
        told += [figure for figure in earlier if figure["benchmark"] not in fresh]
    told.sort(key=lambda one: BENCHMARKS.index(one["benchmark"]))
    document = {"measured": _circumstances(), "figures": told}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.svg").write_text(draw(told))


def _circumstances() -> dict[str, object]:
    return {
        "on": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())
