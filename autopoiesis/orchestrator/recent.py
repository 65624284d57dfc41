"""The requests of the last windows, in memory: what windows are judged by and synthesis briefs are made from."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from autopoiesis.orchestrator.clock import SLACK_S
from autopoiesis.orchestrator.loop import KEEP_WINDOWS
from autopoiesis.telemetry.records import RequestRecord
from autopoiesis.telemetry.store import Store

BRIEF_WINDOWS = 14
"""Windows of requests that a synthesis brief is made from."""


class RecentRequests:
    """Requests by arrival, old ones forgotten."""

    def __init__(self, window_s: float) -> None:
        self._kept_s = max(BRIEF_WINDOWS, KEEP_WINDOWS + 1) * window_s
        self._records: deque[RequestRecord] = deque()

    def recall(self, store: Store, now_s: float) -> None:
        """Take up what an earlier controller has stored."""
        self._records.extend(store.requests_between(now_s - self._kept_s, now_s))

    def add(self, records: Iterable[RequestRecord]) -> None:
        """Take in new ones."""
        self._records.extend(records)

    def all(self) -> list[RequestRecord]:
        """Return all that are kept."""
        return list(self._records)

    def follow_clock(self, by_s: float) -> None:
        """Move all arrivals: the clock was set by so much."""
        moved = (replace(r, arrived_s=r.arrived_s + by_s) for r in self._records)
        self._records = deque(moved)

    def forget(self, now_s: float) -> None:
        """Drop old records, and those from before the clock was set back, which seem to come from the future."""
        since_s, until_s = now_s - self._kept_s, time.time() + SLACK_S
        self._records = deque(r for r in self._records if since_s <= r.arrived_s <= until_s)
