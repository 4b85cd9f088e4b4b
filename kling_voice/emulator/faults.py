"""What can go wrong on the way: faults by rate or by script, seeded and repeatable."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

from kling_voice.emulator.codes import CODES

__all__ = ["ALL", "CALLS", "ENVELOPES", "PROCESSED", "TRANSIENT", "Fault", "Faults"]

CALLS = ("create", "get", "list", "presets", "delete")
"""The calls that faults can be put on."""


class Fault(StrEnum):
    """A kind of fault; `before` and `after` say whether the request has been processed."""

    RESET_BEFORE = "reset_before"
    RESET_AFTER = "reset_after"
    DELAY = "delay"
    STALL = "stall"
    STALL_AFTER = "stall_after"
    ERROR_500_BEFORE = "error_500_before"
    ERROR_500_AFTER = "error_500_after"
    ERROR_503_BEFORE = "error_503_before"
    ERROR_503_AFTER = "error_503_after"
    ERROR_504_BEFORE = "error_504_before"
    ERROR_504_AFTER = "error_504_after"
    HTML_502 = "html_502"
    HTML_502_AFTER = "html_502_after"
    TRUNCATED = "truncated"
    UNDECODABLE = "undecodable"
    RATE_LIMIT = "rate_limit"
    RATE_LIMIT_RETRY_AFTER = "rate_limit_retry_after"
    CONCURRENCY = "concurrency"
    TOKEN_REFUSED = "token_refused"


ALL = tuple(Fault)
"""Every kind of fault."""

TRANSIENT = tuple(kind for kind in Fault if kind not in (Fault.STALL, Fault.STALL_AFTER,
                                                         Fault.TOKEN_REFUSED))  # fmt: skip
"""The kinds that a patient client outlives without waiting for its timeout."""

PROCESSED = frozenset(
    {
        Fault.RESET_AFTER,
        Fault.DELAY,
        Fault.STALL_AFTER,
        Fault.ERROR_500_AFTER,
        Fault.ERROR_503_AFTER,
        Fault.ERROR_504_AFTER,
        Fault.HTML_502_AFTER,
        Fault.TRUNCATED,
        Fault.UNDECODABLE,
    }
)
"""The kinds that strike after the server has done what it was asked."""

ENVELOPES: Mapping[Fault, int] = {
    Fault.ERROR_500_BEFORE: 5000,
    Fault.ERROR_500_AFTER: 5000,
    Fault.ERROR_503_BEFORE: 5001,
    Fault.ERROR_503_AFTER: 5001,
    Fault.ERROR_504_BEFORE: 5002,
    Fault.ERROR_504_AFTER: 5002,
    Fault.RATE_LIMIT: 1302,
    Fault.RATE_LIMIT_RETRY_AFTER: 1302,
    Fault.CONCURRENCY: 1303,
    Fault.TOKEN_REFUSED: 1004,
}
"""The kinds that answer an envelope, and the business code in it."""

_Script = Mapping[int, Fault | str | int] | Sequence[Fault | str | int | None]


class Faults:
    """Decides which requests meet which fault.

    The n-th request of a call meets the same fault in every run, whatever other calls come in
    between. A business code in place of a kind answers that code, unprocessed:
    `Faults(script={"create": [1101]})`.

    Args:
        rate: the part of all requests that meet a fault, from 0 to 1.
        seed: another one gives another sequence.
        kinds: which faults the rate draws from.
        calls: which calls the rate strikes.
        script: what happens to the n-th request (from 1) of a call, or to successive ones:
            `{"create": {3: Fault.RESET_AFTER}, "get": [Fault.HTML_502, None, 5000]}`. It comes
            before the rate.
        delay_seconds: how late `DELAY` answers, in real seconds.
        stall_seconds: when a stalled connection closes at last; None: with the emulator.
        retry_after: the header of `RATE_LIMIT_RETRY_AFTER`, in seconds or as it is to be sent.

    Attributes:
        injected: how many faults of each kind have struck.
    """

    def __init__(
        self,
        rate: float = 0.0,
        *,
        seed: int = 0,
        kinds: Collection[Fault | str | int] = TRANSIENT,
        calls: Collection[str] = CALLS,
        script: Mapping[str, _Script] | None = None,
        delay_seconds: float = 0.5,
        stall_seconds: float | None = None,
        retry_after: float | str = 1,
    ) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        script = {} if script is None else script
        unknown = sorted({*calls, *script} - {*CALLS})
        if unknown:
            raise ValueError(f"no such call: {', '.join(unknown)}; there are {', '.join(CALLS)}")
        self.rate = rate
        self.delay_seconds = delay_seconds
        self.stall_seconds = stall_seconds
        self.retry_after: str = str(retry_after)
        self.injected: Counter[Fault | int] = Counter()
        self._kinds = [_kind(kind) for kind in kinds]
        self._calls = frozenset(calls)
        self._script = {call: _plan(call, entries) for call, entries in script.items()}
        self._seen: Counter[str] = Counter()
        self._draws = {call: random.Random(f"{seed} {call}") for call in CALLS}

    def draw(self, call: str) -> Fault | int | None:
        """The fault that the next request of a call meets, if any; counts it."""
        self._seen[call] += 1
        fault = self._script.get(call, {}).get(self._seen[call])
        draws = self._draws[call]
        strikes = draws.random() < self.rate
        kind = draws.choice(self._kinds) if self._kinds else None
        if fault is None and strikes and call in self._calls:
            fault = kind
        if fault is not None:
            self.injected[fault] += 1
        return fault


def _kind(kind: Fault | str | int) -> Fault | int:
    if isinstance(kind, str):
        return Fault(kind)
    if kind not in CODES:
        raise ValueError(f"{kind} is not a business code")
    return kind


def _plan(call: str, entries: _Script) -> dict[int, Fault | int]:
    plan = dict(entries if isinstance(entries, Mapping) else enumerate(entries, start=1))
    if wrong := [number for number in plan if not isinstance(number, int) or number < 1]:
        raise ValueError(f"script: the requests of {call!r} are numbered from 1, not {wrong[0]!r}")
    return {number: _kind(kind) for number, kind in plan.items() if kind is not None}
