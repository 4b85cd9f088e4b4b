"""Trying again, by tenacity: when, how often, and after which pause. Loaded when it is needed."""

import logging
import random
from collections.abc import Awaitable, Callable

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random_exponential,
)
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from kling_voice import protocol
from kling_voice.errors import ConcurrencyLimitError, NotFoundError, RateLimitError
from kling_voice.policies import RetryPolicy
from kling_voice.protocol import Call

_log = logging.getLogger("kling_voice")


def retrying(
    policy: RetryPolicy,
    again: Callable[[BaseException], bool],
    time_left: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
    what: Call | str,
) -> AsyncRetrying:
    """Make the loop for one call: bounded by attempts and by total time, never shared.

    Args:
        policy: The bounds.
        again: Which failures are worth another attempt.
        time_left: Gives the seconds that the call has left.
        sleep: Sleeps so many seconds.
        what: The call's name, for the log.
    """

    def warn(state: RetryCallState) -> None:
        _log.warning(
            "%s: attempt %d of %d failed (%s); again in %.2f s",
            what,
            state.attempt_number,
            policy.attempts,
            _name(state),
            state.upcoming_sleep,
        )

    return AsyncRetrying(
        sleep=sleep,
        retry=retry_if_exception(again),
        stop=stop_after_attempt(policy.attempts) | _OutOfTime(time_left),
        wait=_Backoff(policy),
        before_sleep=warn,
        reraise=True,
    )


class _OutOfTime(stop_base):
    """Stops when the next attempt would begin after the call's time is up."""

    def __init__(self, time_left: Callable[[], float]) -> None:
        self._time_left = time_left

    def __call__(self, retry_state: RetryCallState) -> bool:
        return retry_state.upcoming_sleep >= self._time_left()


class _Backoff(wait_base):
    """What the vendor asks, a firm step after "too many" or "not yet", else full jitter."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._maximum = policy.maximum
        self._jittered = wait_random_exponential(multiplier=policy.initial, max=policy.maximum)
        self._firm = wait_exponential(multiplier=2 * policy.initial, max=policy.maximum)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if (asked := protocol.asked_to_wait(error)) is not None:
            return asked
        if isinstance(error, RateLimitError | ConcurrencyLimitError | NotFoundError):
            return min(self._firm(retry_state) * random.uniform(1.0, 1.25), self._maximum)
        return self._jittered(retry_state)


def _name(state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    code = getattr(error, "code", None) or getattr(error, "http_status", None)
    return type(error).__name__ + (f" {code}" if code else "")
