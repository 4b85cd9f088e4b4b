"""The time that an import takes, each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.harness import Figure, at_most, ratios

MODULES = ("aiohttp", "kling_voice", "replicate", "runwayml", "openai")

PANEL = "What an import costs; ms of CPU, in a fresh interpreter"

_SCRIPT = """
import sys, time
before = time.process_time()
__import__(sys.argv[1])
sys.stdout.write(str(time.process_time() - before))
"""


def run(*, quick: bool) -> list[Figure]:
    """Measure; some 30 s, or ten when quick."""
    spent: dict[str, list[float]] = {module: [] for module in MODULES}
    order = list(MODULES)
    for number in range(4 if quick else 16):
        order.append(order.pop(0))
        for module in order:
            seconds = _import_seconds(module)
            if number:  # the first one may have had to compile
                spent[module].append(1e3 * seconds)
    figures = [
        Figure(
            "imports",
            f"CPU of import kling_voice / of import {module}",
            ratios(spent["kling_voice"], spent[module]),
            goal=at_most(1.2) if module == "aiohttp" else None,
        )
        for module in MODULES
        if module != "kling_voice"
    ]
    figures += [
        Figure("imports", f"CPU of import {module}", values, "ms", panel=PANEL, bar=module)
        for module, values in spent.items()
    ]
    return figures


def _import_seconds(module: str) -> float:
    # An installed package has its bytecode; one that was never imported here would have none.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, module],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return float(done.stdout)
