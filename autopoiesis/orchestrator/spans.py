"""One OpenTelemetry span per request, sent over OTLP/HTTP to the collector that the settings name.

Spans are made from the picker's records after the fact, so serving never waits for tracing. While
the collector is away the newest spans are kept and the oldest dropped. They go in OTLP's JSON encoding:
OpenTelemetry's SDK and `xds-protos`, which the data plane needs, both bring a package `opentelemetry`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from typing import Any

import aiohttp
import orjson

from autopoiesis import __version__
from autopoiesis.arms.allocation import Allocation
from autopoiesis.telemetry.records import RequestRecord, Status

log = logging.getLogger(__name__)

MOST_KEPT = 20_000
"""Spans kept for a collector that is away."""
MOST_AT_ONCE = 400
INTERVAL_S = 1.0
LONGEST_WAIT_S = 30.0
WINDOWS_KEPT = 8
"""Allocations kept, to tell the cell of a request."""

SERVER, UNSET, ERROR = 2, 0, 2
"""OTLP's numbers: the kind of span, and two status codes."""

NameOf = Callable[[str], str]


class Spans:
    """Takes records, sends spans."""

    def __init__(self, endpoint: str, name_of: NameOf) -> None:
        """`endpoint` is the collector's URL for traces; `name_of` gives an arm's name for its id."""
        self._endpoint = endpoint
        self._name_of = name_of
        self._records: deque[RequestRecord] = deque(maxlen=MOST_KEPT)
        self._cells: dict[int, dict[int, int]] = {}

    def allocated(self, allocation: Allocation) -> None:
        """Remember which shard is in which cell."""
        cells = {shard: i for i, cell in enumerate(allocation.cells) for shard in cell.shards}
        self._cells[allocation.window] = cells
        while len(self._cells) > WINDOWS_KEPT:
            del self._cells[min(self._cells)]

    def saw(self, records: tuple[RequestRecord, ...]) -> None:
        """Take in requests that have ended."""
        self._records.extend(records)

    async def run(self) -> None:
        """Send what there is once a second, for ever; back off while the collector is away."""
        wait_s = INTERVAL_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
            try:
                while True:
                    await asyncio.sleep(wait_s)
                    wait_s = await self._send_all(session, wait_s)
            finally:
                with suppress(aiohttp.ClientError, TimeoutError, OSError):
                    await asyncio.wait_for(self._send(session), 1.0)

    async def _send_all(self, session: aiohttp.ClientSession, wait_s: float) -> float:
        """Send until nothing is left; return how long to wait."""
        try:
            while self._records:
                await self._send(session)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if wait_s == INTERVAL_S:
                log.warning("Spans cannot be sent to %s and wait: %s", self._endpoint, error)
            return min(2 * wait_s, LONGEST_WAIT_S)
        return INTERVAL_S

    async def _send(self, session: aiohttp.ClientSession) -> None:
        records = list(islice(self._records, MOST_AT_ONCE))
        if not records:
            return
        body = self.encoded(records)
        headers = {"Content-Type": "application/json"}
        async with session.post(self._endpoint, data=body, headers=headers) as answer:
            if answer.status == 429 or answer.status >= 500:
                answer.raise_for_status()
            if answer.status >= 400:  # it will never take these
                log.error("%s refuses spans with status %d", self._endpoint, answer.status)
        # Meanwhile others may have come at the end, and pushed out some at the front.
        sent = {id(record) for record in records}
        while self._records and id(self._records[0]) in sent:
            self._records.popleft()

    def encoded(self, records: list[RequestRecord]) -> bytes:
        """Return the records as an OTLP export request."""
        scope = {
            "scope": {"name": "autopoiesis.gateway", "version": __version__},
            "spans": [self._span(record) for record in records],
        }
        resource = {"attributes": [_attribute("service.name", "autopoiesis")]}
        return orjson.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]})

    def _span(self, record: RequestRecord) -> dict[str, Any]:
        identity = blake2b(record.id.encode(), digest_size=24).hexdigest()
        failed = record.status in {Status.FAILED, Status.SHED}
        facts = self._facts(record)
        span: dict[str, Any] = {
            "traceId": identity[:32],
            "spanId": identity[32:],
            "name": f"{record.path.removeprefix('/v1/')} {record.model}",
            "kind": SERVER,
            "startTimeUnixNano": _nanoseconds(record.arrived_s),
            "endTimeUnixNano": _nanoseconds(record.arrived_s + record.e2e_s),
            "attributes": [_attribute(n, v) for n, v in facts.items() if v is not None],
            "status": {"code": ERROR if failed else UNSET},
        }
        if record.ttft_s is not None:
            at = _nanoseconds(record.arrived_s + record.ttft_s)
            span["events"] = [{"name": "first token", "timeUnixNano": at}]
        return span

    def _facts(self, record: RequestRecord) -> dict[str, str | int | float | None]:
        """Return a span's attributes; names with a dot follow OpenTelemetry's conventions where there are any."""
        return {
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.input_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "http.response.status_code": record.http_status,
            "url.path": record.path,
            "autopoiesis.request_id": record.id,
            "autopoiesis.status": record.status,
            "autopoiesis.window": record.window,
            "autopoiesis.arm": self._name_of(record.arm_id) if record.arm_id else None,
            "autopoiesis.arm_id": record.arm_id or None,
            "autopoiesis.cell": self._cells.get(record.window, {}).get(record.shard),
            "autopoiesis.shard": record.shard,
            "autopoiesis.replica": record.replica or None,
            "autopoiesis.attempts": record.attempts,
            "autopoiesis.decision_s": record.decision_s,
            "autopoiesis.held_s": record.held_s,
            "autopoiesis.cached_tokens": record.cached_tokens,
            "autopoiesis.ttft_s": record.ttft_s,
            "autopoiesis.tpot_s": record.tpot_s,
        }


def _attribute(name: str, value: str | int | float) -> dict[str, Any]:
    if isinstance(value, str):
        return {"key": name, "value": {"stringValue": value}}
    if isinstance(value, int):
        return {"key": name, "value": {"intValue": str(value)}}
    return {"key": name, "value": {"doubleValue": value}}


def _nanoseconds(time_s: float) -> str:
    """Return Unix nanoseconds, true to the microsecond; OTLP's JSON has 64-bit integers as text."""
    return str(round(time_s * 1e6) * 1000)
