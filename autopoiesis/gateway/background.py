"""Work in the background that must not end before the process does."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

RESTART_S = 1.0
"""Wait before work that failed begins anew."""


async def keep_up(
    work: Callable[[], Awaitable[None]], on_fault: Callable[[str, str], None]
) -> None:
    """Begin a piece of work anew whenever it ends or fails; `on_fault` is told what went wrong."""
    while True:
        try:
            await work()
        except Exception as error:
            log.exception("Work in the background failed; it begins anew")
            on_fault("", f"{type(error).__name__} in the background: {error}"[:200])
        await asyncio.sleep(RESTART_S)
