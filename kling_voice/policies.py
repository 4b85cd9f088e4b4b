"""How often, and for how long: the two policies a client is given."""

from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from kling_voice.errors import ConfigurationError
from kling_voice.redaction import brief

if TYPE_CHECKING:
    from attrs import Attribute


_MOST = 1e9  # seconds and times beyond which a number is a mistake


class _AtLeast:
    """An attrs validator: a number that is not below a minimum, nor absurdly high."""

    def __init__(self, minimum: float, *, whole: bool = False) -> None:
        self._minimum = minimum
        self._kinds = int if whole else int | float
        self._what = "a whole number" if whole else "a number"

    def __call__(self, instance: object, attribute: "Attribute[Any]", value: float) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, self._kinds)
            or not self._minimum <= value <= _MOST
        ):
            raise ConfigurationError(
                f"{type(instance).__name__}.{attribute.name} must be {self._what} from"
                f" {self._minimum:g} to {_MOST:g}, not {brief(value)}."
            )


@frozen
class RetryPolicy:
    """How a call is tried again; waits grow exponentially, with full jitter.

    Attributes:
        attempts: How often a call is tried, the first time included. Default 4.
        initial: The first wait's upper bound, in seconds. Default 0.5.
        maximum: No wait's bound grows beyond this many seconds. Default 8.0.
        max_elapsed: No attempt starts or goes on later than this many seconds after the call
            began; only the first attempt, and the last look after a create whose outcome is
            unknown, may outlast it, by the client's ``timeout``. Default 60.0.

    Raises:
        ConfigurationError: A number is out of its range.
    """

    attempts: int = field(default=4, validator=_AtLeast(1, whole=True))
    initial: float = field(default=0.5, validator=_AtLeast(0))
    maximum: float = field(default=8.0, validator=_AtLeast(0))
    max_elapsed: float = field(default=60.0, validator=_AtLeast(0))


@frozen
class PollingPolicy:
    """How often a task that someone waits for is looked at.

    Attributes:
        initial: Seconds to the first look, and between the client's shared ticks. Default 1.0.
        multiplier: Each interval is this many times the one before. Default 1.3.
        maximum: No interval grows beyond this many seconds. Default 5.0.
        jitter: The fraction of the interval by which the client's shared ticks are moved at
            random, so that many clients do not ask in step. Default 0.1.

    Raises:
        ConfigurationError: A number is out of its range.
    """

    initial: float = field(default=1.0, validator=_AtLeast(0.001))
    multiplier: float = field(default=1.3, validator=_AtLeast(1))
    maximum: float = field(default=5.0, validator=_AtLeast(0.001))
    jitter: float = field(default=0.1, validator=_AtLeast(0))
