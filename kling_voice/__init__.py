"""The async Python client for the Kling AI custom-voice API.

Create custom voices from recordings, wait for them, and clone hundreds at once: each is created
exactly once. See :class:`KlingVoiceClient`.
"""

from kling_voice._version import __version__
from kling_voice.auth import AccessKey, ApiKey
from kling_voice.callbacks import CallbackReceiver
from kling_voice.client import KlingVoiceClient
from kling_voice.errors import (
    AccountError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    CallbackError,
    ClientClosedError,
    ConcurrencyLimitError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    KlingError,
    NotFoundError,
    PermissionDeniedError,
    PolicyError,
    RateLimitError,
    RequestTimeoutError,
    ResponseError,
    SampleError,
    ServerError,
    TaskFailedError,
    WaitTimeoutError,
)
from kling_voice.models import (
    BalanceDeduction,
    CloneResult,
    TaskInfo,
    TaskResult,
    TaskStatus,
    Voice,
    VoiceRequest,
    VoiceTask,
)
from kling_voice.policies import PollingPolicy, RetryPolicy
from kling_voice.samples import ObjectStoreHost, SampleHost, SampleInfo, inspect_sample

__all__ = [
    "AccessKey",
    "AccountError",
    "ApiError",
    "ApiKey",
    "AuthenticationError",
    "BadRequestError",
    "BalanceDeduction",
    "CallbackError",
    "CallbackReceiver",
    "ClientClosedError",
    "CloneResult",
    "ConcurrencyLimitError",
    "ConfigurationError",
    "ConnectionFailedError",
    "InvalidRequestError",
    "KlingError",
    "KlingVoiceClient",
    "NotFoundError",
    "ObjectStoreHost",
    "PermissionDeniedError",
    "PolicyError",
    "PollingPolicy",
    "RateLimitError",
    "RequestTimeoutError",
    "ResponseError",
    "RetryPolicy",
    "SampleError",
    "SampleHost",
    "SampleInfo",
    "ServerError",
    "TaskFailedError",
    "TaskInfo",
    "TaskResult",
    "TaskStatus",
    "Voice",
    "VoiceRequest",
    "VoiceTask",
    "WaitTimeoutError",
    "__version__",
    "inspect_sample",
]
