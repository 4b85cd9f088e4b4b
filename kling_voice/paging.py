"""The pages of a list, one after the other, for as long as there are any."""

import logging
from collections.abc import AsyncGenerator

from kling_voice import protocol
from kling_voice.errors import BadRequestError
from kling_voice.protocol import Envelope
from kling_voice.transport import Transport

_log = logging.getLogger("kling_voice")


async def pages(transport: Transport, path: str, page_size: int) -> AsyncGenerator[Envelope, None]:
    """Give every page of a list; only an empty one is the end.

    A server that refuses so large a page is asked for smaller ones, from the first on; one that
    quietly gives fewer items a page is read to its end all the same.

    Args:
        transport: Reads through this.
        path: ``protocol.VOICES`` or ``protocol.PRESETS``.
        page_size: Items a page, 1 to 1000.

    Raises:
        KlingError: A page could not be read.
    """
    page_num = 1
    while page_num <= protocol.PAGES:
        try:
            envelope = await transport.call(protocol.list_call(path, page_num, page_size))
        except BadRequestError as error:
            smaller = protocol.smaller_page(page_size)
            if page_num > 1 or smaller is None or not protocol.is_page_refused(error):
                raise
            page_size = smaller
            continue
        if not protocol.read_items(envelope):
            return
        yield envelope
        page_num += 1
    _log.warning(
        "%s: the vendor lists no more than %d pages; the rest is left out", path, protocol.PAGES
    )
