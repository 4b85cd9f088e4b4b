"""A local recording's stay at the sample host: published for a create, discarded at its end."""

import asyncio
import logging
import os
import secrets
from pathlib import Path

from kling_voice import protocol
from kling_voice.errors import ConfigurationError, InvalidRequestError, KlingError, SampleError
from kling_voice.samples import SampleHost, inspect_sample

_log = logging.getLogger("kling_voice")

_PATIENCE = 15.0  # seconds for a discard: results and the end of a batch wait for it


class Hosting:
    """The recordings that one client has published and not yet discarded.

    Args:
        host: Where recordings are published; ``None`` if the client was given no host.
    """

    def __init__(self, host: SampleHost | None) -> None:
        self._host = host
        self._urls: dict[str, set[str]] = {}  # by external task id

    async def publish(self, path: str | os.PathLike[str], external_task_id: str) -> str:
        """Check a recording, publish it, and give its URL.

        Raises:
            ConfigurationError: The client has no sample host.
            SampleError: The vendor would refuse the file, or the host failed.
        """
        if self._host is None:
            raise ConfigurationError(
                "voice_file needs a sample host, since the vendor takes URLs only: give the client"
                " sample_host=ObjectStoreHost('s3://bucket/prefix') or a host of your own."
            )
        await asyncio.to_thread(inspect_sample, path)
        # A name of its own: another process with this id may withdraw what it has published.
        name = f"{external_task_id}-{secrets.token_hex(4)}"
        failure = None
        try:
            url = await self._host.publish(Path(path), name)
        except KlingError:
            raise
        except Exception as error:
            failure = SampleError(  # its text may quote a signature; ours are known not to
                f"{os.fspath(path)!r}: the sample host failed with {type(error).__name__}; it may"
                " raise a SampleError to say more."
            )
        if failure is not None:
            raise failure  # out here, without the host's own error
        try:
            protocol.check_url(url, "voice_url")
        except InvalidRequestError:
            raise SampleError(
                f"{os.fspath(path)!r}: the sample host gave no http(s) URL for it."
            ) from None
        self._urls.setdefault(external_task_id, set()).add(url)
        return url

    async def discard(self, external_task_id: str | None, only: str | None = None) -> None:
        """Discard the recordings of a task, or one of them; a failure is logged, not raised."""
        if self._host is None or external_task_id is None:
            return
        known = self._urls.get(external_task_id, set())
        for url in [url for url in known if only in (None, url)]:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._host.discard(url)
            except asyncio.CancelledError:
                raise  # it is still known, for the next wait
            except Exception as error:
                _log.warning(
                    "The recording of %s could not be discarded (%s): remove it by hand, or let"
                    " the host's expiry rule do so",
                    external_task_id,
                    type(error).__name__,
                )
            known.discard(url)
        if not known:
            self._urls.pop(external_task_id, None)

    def close(self) -> None:
        """Tell the log of recordings that stay, since nobody has seen the ends of their tasks."""
        if left := sum(map(len, self._urls.values())):
            _log.warning(
                "%d recording(s) stay at the sample host, since the client was closed before it saw"
                " the ends of their tasks: let the host's expiry rule remove them",
                left,
            )
            self._urls.clear()
