"""Who we are: credentials, where they come from, and the bearer token made of them."""

import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

from kling_voice.errors import ConfigurationError

if TYPE_CHECKING:
    from attrs import Attribute

TOKEN_LIFE = 1800.0  # [vendor: authentication] exp = now + 1800 s
_NOT_BEFORE = 5.0  # [vendor: authentication] nbf = now - 5 s
_RENEW_BEFORE = 300.0  # a token is replaced this long before it expires
MAX_SKEW = 24 * 3600.0  # a clock that is further off than this is a fault to tell, not to heal


def _hidden(value: object) -> str:
    return "'***'"


def _check_key(instance: object, attribute: "Attribute[str]", value: str) -> None:
    name = attribute.name
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{type(instance).__name__}: {name} must be a non-empty string.")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigurationError(
            f"{type(instance).__name__}: {name} has a character that no key has;"
            " was it pasted with a line break or a space?"
        )


@frozen
class ApiKey:
    """A static API key, sent as it is; it works for all endpoints.

    Attributes:
        key: The key from the vendor's console. Not shown in the repr.
    """

    key: str = field(repr=_hidden, validator=_check_key)


@frozen
class AccessKey:
    """An access key with its secret key; each token is a JWT (HS256) signed by the secret key.

    Attributes:
        access_key: The key's id, the token's ``iss``. Not shown in the repr.
        secret_key: The key that signs. Not shown in the repr.
    """

    access_key: str = field(repr=_hidden, validator=_check_key)
    secret_key: str = field(repr=_hidden, validator=_check_key)


Credentials = ApiKey | AccessKey


def credentials_from_environment(environ: Mapping[str, str]) -> Credentials:
    """Read ``KLING_API_KEY``, else ``KLING_ACCESS_KEY`` with ``KLING_SECRET_KEY``.

    Raises:
        ConfigurationError: Neither is set, or one of the pair is missing.
    """
    if api_key := environ.get("KLING_API_KEY"):
        return ApiKey(api_key)
    access_key, secret_key = environ.get("KLING_ACCESS_KEY"), environ.get("KLING_SECRET_KEY")
    if access_key and secret_key:
        return AccessKey(access_key, secret_key)
    if access_key or secret_key:
        missing = "KLING_SECRET_KEY" if access_key else "KLING_ACCESS_KEY"
        raise ConfigurationError(
            f"Half of the credentials is missing: set {missing} too, or KLING_API_KEY alone."
        )
    raise ConfigurationError(
        "No credentials: set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY,"
        " or pass credentials=ApiKey(...) or AccessKey(..., ...)."
    )


def sign(credentials: AccessKey, now: float) -> str:
    """Make the JWT that is valid around *now* (Unix seconds of the server's clock)."""
    import jwt  # here, since a client with an API key never needs it

    claims = {
        "iss": credentials.access_key,
        "exp": int(now + TOKEN_LIFE),
        "nbf": int(now - _NOT_BEFORE),
    }
    with warnings.catch_warnings():
        # The vendor chose the key's length; its user can do nothing about it.
        warnings.filterwarnings("ignore", message=".*key.*")
        return jwt.encode(claims, credentials.secret_key, algorithm="HS256")


class TokenSource:
    """The current bearer token: made once, kept, and renewed before it expires."""

    def __init__(self, credentials: Credentials, *, clock: Callable[[], float] = time.time) -> None:
        self._credentials = credentials
        self._clock = clock
        self._skew = 0.0  # the server's clock minus ours
        self._signed_at = 0.0
        self._token = credentials.key if isinstance(credentials, ApiKey) else ""

    def token(self) -> str:
        """Give the token to send now."""
        if isinstance(self._credentials, ApiKey):
            return self._token
        now = self._clock() + self._skew
        # A clock that was set back must not keep a token of the future alive, hence both bounds.
        if not (self._token and 0 <= now - self._signed_at < TOKEN_LIFE - _RENEW_BEFORE):
            self._token, self._signed_at = sign(self._credentials, now), now
        return self._token

    def heal(self, refused: str, server_time: float | None) -> str | None:
        """Take the server's clock after it refused the token *refused* for its times.

        Returns:
            ``None`` if a new token is worth another try, else why it is not ("" for an API key).
        """
        if isinstance(self._credentials, ApiKey):
            return ""
        if refused != self._token:
            return None  # another call has healed it meanwhile
        if server_time is not None:
            skew = server_time - self._clock()
            if abs(skew) > MAX_SKEW:
                side = "behind" if skew > 0 else "ahead of"
                return (
                    f"This machine's clock is {abs(skew) / 3600:.1f} hours {side} the server's:"
                    " set it, then call again."
                )
            self._skew = skew
        self._token = ""
        return None

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every text that must not be shown to anyone."""
        if isinstance(self._credentials, ApiKey):
            return (self._credentials.key,)
        return (self._token, self._credentials.secret_key, self._credentials.access_key)
