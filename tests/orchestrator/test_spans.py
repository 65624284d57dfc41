"""Spans of requests, at a real OTLP receiver."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from aiohttp import web

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.orchestrator import spans as module
from autopoiesis.orchestrator.spans import Spans
from autopoiesis.replicas.fleet import free_ports
from autopoiesis.telemetry.records import RequestRecord, Status

REQUEST = RequestRecord(
    id="abc", arrived_s=1_790_000_000.25, path="/v1/chat/completions", model="llama", status=Status.COMPLETED,
    http_status=200, arm_id="feed", window=7, shard=40, session=1, replica="r1", attempts=1, stream=True,
    input_tokens=900, output_tokens=21, max_output_tokens=64, cached_tokens=512, usage_counted=True,
    priority_class=0.0, held_s=0.125, decision_s=0.0005, ttft_s=0.5, e2e_s=2.5,
)  # fmt: skip
CELLS = (Cell("beef", ("r0",), tuple(range(32))), Cell("feed", ("r1",), tuple(range(32, 64))))


def values(span):
    read = {"stringValue": str, "intValue": int, "doubleValue": float}
    return {a["key"]: read[kind](v) for a in span["attributes"] for kind, v in a["value"].items()}


@asynccontextmanager
async def receiver(port, statuses=()):
    got, statuses = [], list(statuses)

    async def take(request):
        status = statuses.pop(0) if statuses else 200
        if status == 200:
            message = await request.json()
            got.extend(
                s for r in message["resourceSpans"] for x in r["scopeSpans"] for s in x["spans"]
            )
        return web.Response(status=status)

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield got
    finally:
        await runner.cleanup()


@asynccontextmanager
async def sending(port, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_S", 0.05)
    spans = Spans(f"http://127.0.0.1:{port}/v1/traces", {"feed": "gen-1", "beef": "old"}.get)
    task = asyncio.create_task(spans.run())
    try:
        yield spans
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(holds, limit_s=20.0):
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(0.02)


async def test_a_span_tells_arm_cell_replica_and_times(monkeypatch):
    (port,) = free_ports(1)
    async with receiver(port) as got, sending(port, monkeypatch) as spans:
        spans.allocated(Allocation(7, CELLS))
        spans.saw((REQUEST,))
        await until(lambda: got)

    (span,) = got
    told = values(span)
    assert "chat/completions llama" == span["name"]
    assert "1790000000250000000" == span["startTimeUnixNano"]
    assert "1790000002750000000" == span["endTimeUnixNano"]
    assert "1790000000750000000" == span["events"][0]["timeUnixNano"]
    assert ("gen-1", 1, "r1") == tuple(told[f"autopoiesis.{x}"] for x in ("arm", "cell", "replica"))
    assert (0.0005, 0.125) == (told["autopoiesis.decision_s"], told["autopoiesis.held_s"])
    assert (900, 21) == (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"])
    assert (16, 8) == (len(bytes.fromhex(span["traceId"])), len(bytes.fromhex(span["spanId"])))


async def test_failed_and_shed_requests_are_errors_and_undecided_ones_have_no_arm(monkeypatch):
    (port,) = free_ports(1)
    endings = (Status.SHED, Status.FAILED, Status.ABORTED)
    async with receiver(port) as got, sending(port, monkeypatch) as spans:
        spans.saw(tuple(replace(REQUEST, id=e, status=e, arm_id="", ttft_s=None) for e in endings))
        await until(lambda: len(got) == 3)

    assert [2, 2, 0] == [span["status"]["code"] for span in got]
    assert {"autopoiesis.arm", "autopoiesis.cell", "autopoiesis.ttft_s"}.isdisjoint(values(got[0]))


@pytest.mark.parametrize("statuses", [(503,), (429, 500)])
async def test_what_a_busy_collector_refuses_is_sent_again_once(monkeypatch, statuses):
    (port,) = free_ports(1)
    async with receiver(port, statuses) as got, sending(port, monkeypatch) as spans:
        spans.saw(tuple(replace(REQUEST, id=str(i)) for i in range(2_500)))
        await until(lambda: len(got) >= 2_500)

    assert 2_500 == len({span["traceId"] for span in got}) == len(got)


async def test_a_collector_that_comes_late_gets_the_newest_spans(monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setattr(module, "MOST_KEPT", 100)
    async with sending(port, monkeypatch) as spans:
        spans.saw(tuple(replace(REQUEST, id=str(i)) for i in range(150)))
        await asyncio.sleep(0.2)
        async with receiver(port) as got:
            await until(lambda: len(got) == 100)

    assert "50" == values(got[0])["autopoiesis.request_id"]


async def test_spans_that_a_collector_never_takes_do_not_stand_in_the_way(monkeypatch):
    (port,) = free_ports(1)
    async with receiver(port, (400,)) as got, sending(port, monkeypatch) as spans:
        spans.saw((replace(REQUEST, id="bad"),))
        await asyncio.sleep(0.3)
        spans.saw((REQUEST,))
        await until(lambda: got)

    assert ["abc"] == [values(span)["autopoiesis.request_id"] for span in got]
