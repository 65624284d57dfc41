"""What the live page shows, in parts, and what of it has changed since it was sent last."""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from autopoiesis.telemetry.store import Store

WINDOWS = 360
"""Windows of history that a page gets: an hour of windows of 10 s."""
EVENTS, CYCLES = 200, 50
MOST_ROWS = 20_000

StatusOf = Callable[[], dict[str, Any]]
Table = dict[str, Any]
"""`columns`, and `rows` in the same order."""

BY_WINDOW = {
    "windows": """
        select window_id, started_s, ended_s, requests, completed, shed, failed, utility, regret,
            regret_low, regret_high, drift, ttft_p50_s, ttft_p99_s, tpot_p50_s, tpot_p99_s,
            goodput_rps, throughput_tokens_s, twin_weight
        from windows where window_id > {since} order by window_id""",
    "allocations": """
        select window_id, arm_id, sum(share) as share
        from allocations where window_id > {since} group by all order by window_id, share desc""",
    "twin_errors": """
        select window_id, metric, observed, twin
        from twin_errors where window_id > {since} order by window_id, metric""",
}
"""Parts that grow by a window at a time; of an allocation the newest window may still change."""

WHOLE = {
    "arms": """
        select s.id, s.name, s.kind, s.origin, s.state, a.pinned, s.traffic_share, s.utility, s.posterior_mean,
            s.posterior_sd, s.probability, s.windows, s.requests, s.parents, a.created_s, s.reason
        from arm_scores as s join arms as a using (id) order by a.created_s, s.name""",
    "cells": """
        select cell, arm_id, replicas, share, propensity from allocations
        where window_id = (select max(window_id) from allocations) order by cell""",
    "replicas": """
        select replica, arg_max(healthy, at_s) as healthy, arg_max(in_flight, at_s) as in_flight,
            arg_max(running, at_s) as running, arg_max(waiting, at_s) as waiting,
            arg_max(kv_usage, at_s) as kv_usage,
            (max(prefix_hits_total) - min(prefix_hits_total))
                / nullif(max(prefix_queries_total) - min(prefix_queries_total), 0) as hit_rate
        from replicas where at_s > (select max(at_s) - 120 from replicas)
        group by replica order by replica""",
    "syntheses": f"""
        select synthesis, started_s, window_id, "trigger", synthesizer, candidates, promoted, beaten,
            conclusion, seconds, cpu_seconds, tokens, cost_usd, error
        from syntheses order by synthesis desc limit {CYCLES}""",  # noqa: S608
    "events": f"select at_s, kind, window_id, subject, message from events order by at_s desc limit {EVENTS}",  # noqa: S608
}
"""Parts that are sent anew when something has changed."""


@dataclass(slots=True)
class Sent:
    """What one page has got so far."""

    window: int = -2
    """The last window whose rows it has; -2: nothing yet."""
    mark: Hashable = None


@dataclass(slots=True)
class Picture:
    """The whole page's data, read from the store at most once per change, for all pages together."""

    store: Store
    status: StatusOf
    _mark: Hashable = None
    _parts: dict[str, Table] = field(default_factory=dict[str, Table])
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def changes(self, sent: Sent) -> dict[str, Any]:
        """Return the parts that a page lacks, by name, and note them as sent.

        Raises:
            TelemetryError, QueryError: the store cannot be read; nothing is noted.
        """
        status = self.status()
        told: dict[str, Any] = {"now": _now(status)}
        mark = _mark_of(self.store.last_window(), status)
        async with self._reading:
            if mark != self._mark:
                self._parts = await asyncio.to_thread(self._read)
                self._mark = mark
            parts = self._parts
        if sent.mark == mark:
            return told
        told["events"] = _with_unwritten(parts["events"], status["events"])
        for name, part in parts.items():
            if name in BY_WINDOW:
                told[name] = {**part, "rows": [r for r in part["rows"] if r[0] > sent.window]}
            elif name != "events":
                told[name] = part
        # The newest window's allocation may be replaced by an operator's order: it is sent again.
        sent.window = parts["windows"]["rows"][-1][0] if parts["windows"]["rows"] else -1
        sent.mark = mark
        return told

    def _read(self) -> dict[str, Table]:
        since = self.store.last_window() - WINDOWS
        queries = {name: query.format(since=since) for name, query in BY_WINDOW.items()} | WHOLE
        return {name: self._table(query) for name, query in queries.items()}

    def _table(self, query: str) -> Table:
        result = self.store.query(query, MOST_ROWS)
        return {"columns": result.columns, "rows": result.rows}


def _now(status: dict[str, Any]) -> dict[str, Any]:
    names = (
        "uptime_s",
        "window",
        "window_s",
        "objective",
        "allocation",
        "guard_rails",
        "traffic",
        "synthesis",
    )
    return {name: status[name] for name in names}


def _mark_of(last_window: int, status: dict[str, Any]) -> Hashable:
    """Return something that differs when anything but the traffic figures does."""
    events = status["events"]
    arms = tuple((arm["id"], arm["state"], arm["reason"]) for arm in status["arms"])
    return last_window, status["window"], status["allocation"], arms, events[-1] if events else None


def _with_unwritten(stored: Table, recent: list[Any]) -> Table:
    """Join the events of the store with those that wait for their window to end, newest first."""
    rows = {tuple(row) for row in stored["rows"]}
    rows |= {(e.at_s, e.kind, e.window, e.subject, e.message) for e in recent}
    return {**stored, "rows": sorted(rows, reverse=True)[:EVENTS]}
