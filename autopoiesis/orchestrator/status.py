"""What the control API tells of a running instance: recent windows, arms, traffic, events."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.registry import Registry
from autopoiesis.gateway.link import Batch
from autopoiesis.orchestrator.loop import Settled
from autopoiesis.orchestrator.rails import in_force
from autopoiesis.orchestrator.reward import percentile
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.telemetry.query import QueryError
from autopoiesis.telemetry.records import EventRow, GuardRails, RequestRecord
from autopoiesis.telemetry.records import Status as Ending
from autopoiesis.telemetry.store import Store, TelemetryError

WINDOWS, EVENTS = 120, 200
RECENT_S = 10.0
"""Traffic figures are over the requests that ended in this time."""


class Status:
    """A picture of now, kept by the controller and read by the control API."""

    def __init__(
        self, settings: Settings, registry: Registry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.allocation: Allocation | None = None
        self.why = ""
        self.guard_rails = GuardRails()
        self._settings = settings
        self._registry = registry
        self._clock = clock
        self._started_s = clock()
        self._windows: deque[dict[str, Any]] = deque(maxlen=WINDOWS)
        self._events: deque[EventRow] = deque(maxlen=EVENTS)
        self._shares: dict[int, dict[str, float]] = {}
        self._recent: deque[tuple[float, RequestRecord]] = deque()
        self._in_flight: dict[str, int] = {}
        self._scores: dict[str, dict[str, Any]] = {}
        self._synthesis_since_s: float | None = None

    # --- what the controller tells ------------------------------------------------------------

    def saw(self, batch: Batch) -> None:
        """Take in what the picker reports."""
        now_s = self._clock()
        self._recent.extend((now_s, record) for record in batch.requests)
        self._forget(now_s)
        for sample in batch.replicas:
            self._in_flight[sample.replica] = sample.in_flight

    def allocated(self, allocation: Allocation, why: str) -> None:
        """Take in who serves from now on."""
        self.allocation, self.why = allocation, why
        self._shares[allocation.window] = {arm: allocation.share(arm) for arm in allocation.arms()}
        self._shares = dict(list(self._shares.items())[-WINDOWS:])

    def settled(self, settled: Settled, events: list[EventRow]) -> None:
        """Take in a window's figures."""
        row = settled.window
        self._events.extend(e for e in settled.events if e not in events)
        self._windows.append(
            {
                "window": row.window,
                "started_s": row.started_s,
                "requests": row.requests,
                "throughput_tokens_s": row.throughput_tokens_s,
                "ttft_p50_s": row.ttft_p50_s,
                "ttft_p99_s": row.ttft_p99_s,
                "tpot_p50_s": row.tpot_p50_s,
                "tpot_p99_s": row.tpot_p99_s,
                "utility": row.utility,
                "regret": row.regret,
                "drift": row.drift,
                "shares": self._shares.get(row.window, {}),
            }
        )

    def scores(self, store: Store) -> None:
        """Read each arm's utility from the telemetry."""
        try:
            result = store.query("select id, utility from arm_scores", 10_000)
        except (QueryError, TelemetryError):
            return
        self._scores = {row[0]: {"utility": row[1]} for row in result.rows}

    def say(self, event: EventRow) -> None:
        """Take in an event."""
        self._events.append(event)

    def synthesis_began(self, at_s: float) -> None:
        """Note that the synthesizer works."""
        self._synthesis_since_s = at_s

    def synthesis_ended(self) -> None:
        """Note that it has ended."""
        self._synthesis_since_s = None

    @property
    def is_synthesizing(self) -> bool:
        """Whether policies are being written now."""
        return self._synthesis_since_s is not None

    # --- what the control API asks ------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Return everything for `GET /status`."""
        allocation = self.allocation
        return {
            "uptime_s": self._clock() - self._started_s,
            "window": allocation.window if allocation else None,
            "window_s": self._settings.window_s,
            "objective": self._settings.objective.as_dict(),
            "allocation": self.why,
            "guard_rails": in_force(
                self.guard_rails, lambda arm_id: self._registry.get(arm_id).name
            ),
            "traffic": self._traffic(self._clock()),
            "windows": list(self._windows),
            "arms": self._arms(),
            "synthesis": {
                "running": self.is_synthesizing,
                "since_s": self._synthesis_since_s,
            },
            "events": list(self._events),
        }

    def _traffic(self, now_s: float) -> dict[str, Any]:
        self._forget(now_s)
        records = [record for _, record in self._recent]
        ttft = np.array([r.ttft_s for r in records if r.ttft_s is not None], np.float64)
        tpot = np.array([t for r in records if (t := r.tpot_s) is not None], np.float64)
        return {
            "requests_rps": len(records) / RECENT_S,
            "tokens_s": sum(r.output_tokens for r in records) / RECENT_S,
            "shed": sum(r.status is Ending.SHED for r in records),
            "failed": sum(r.status is Ending.FAILED for r in records),
            "ttft_p50_s": percentile(ttft, 50),
            "ttft_p99_s": percentile(ttft, 99),
            "tpot_p50_s": percentile(tpot, 50),
            "tpot_p99_s": percentile(tpot, 99),
            "in_flight": sum(self._in_flight.values()),
        }

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()

    def _arms(self) -> list[dict[str, Any]]:
        shares = self._shares.get(self.allocation.window, {}) if self.allocation else {}
        rows = [
            {
                "id": arm.id,
                "name": arm.name,
                "kind": arm.kind,
                "origin": arm.origin,
                "state": arm.state,
                "traffic_share": shares.get(arm.id, 0.0),
                "utility": self._scores.get(arm.id, {}).get("utility"),
                "reason": arm.reason,
            }
            for arm in self._registry.all()
        ]
        return sorted(rows, key=lambda row: -row["traffic_share"])
