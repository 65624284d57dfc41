"""The telemetry's house: settled hours are sealed as history, outdated ones forgotten, while serving goes on."""

import asyncio
import logging
from collections.abc import Callable

from autopoiesis.orchestrator.settings import Settings
from autopoiesis.telemetry.history import HOUR_S
from autopoiesis.telemetry.store import Retention, Store, TelemetryError

log = logging.getLogger(__name__)

INTERVAL_S = 300.0


async def keep_house(store: Store, settings: Settings, say: Callable[[str], None]) -> None:
    """Look every few minutes for hours to seal and to forget, until cancelled; say once what keeps it from that."""
    retention = Retention(
        settings.retention_hours * HOUR_S, settings.window_retention_hours * HOUR_S
    )
    trouble = ""
    while True:
        try:
            files = await asyncio.to_thread(store.keep_history, settings.history_dir, retention)
            trouble = ""
            if files:
                log.info("%d files of history were written", len(files))
        except TelemetryError as error:
            log.error("%s", error)
            if str(error) != trouble:
                say(f"history is not kept: {error}")
            trouble = str(error)
        await asyncio.sleep(INTERVAL_S)
