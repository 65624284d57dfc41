import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession, web
from telemetry_rows import fill

from autopoiesis.telemetry.endpoint import ask, sql_routes
from autopoiesis.telemetry.query import QueryError
from autopoiesis.telemetry.store import Store, TelemetryError

ENDLESS = "select count(*) from range(1000000) a, range(1000000) b where a.range % 7 = b.range % 11"


async def started(app: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
async def url(store: Store) -> AsyncIterator[str]:
    fill(store, range(3))
    app = web.Application()
    app.add_routes(sql_routes(store, timeout_s=0.5))
    runner, address = await started(app)
    yield address
    await runner.cleanup()


async def test_the_client_gets_the_same_answer_as_the_store(store: Store, url: str) -> None:
    query = "select window_id, started_at, context, 'nan'::double as x from windows order by 1"
    answer = await asyncio.to_thread(ask, url, query, 2)
    direct = store.query(query, max_rows=2)
    assert answer.rows == direct.rows
    assert (answer.columns, answer.types, answer.truncated) == (
        direct.columns,
        direct.types,
        True,
    )


async def test_a_refused_query_is_a_400_with_a_message(url: str) -> None:
    with pytest.raises(QueryError, match="read-only"):
        await asyncio.to_thread(ask, url, "delete from windows")
    async with ClientSession() as http, http.post(url + "/sql", json={"query": "selec"}) as answer:
        assert answer.status == 400
        assert "syntax error" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"query": 1}',
        b'{"query": "select 1", "max_rows": 0}',
        b'{"query": "select 1", "max_rows": true}',
        b'{"query": "select 1", "max_rows": 1e9}',
        b"\xff\xfe",
    ],
)
async def test_a_malformed_question_is_a_400(url: str, body: bytes) -> None:
    async with ClientSession() as http, http.post(url + "/sql", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["message"]


async def test_slow_queries_wait_for_each_other_and_never_for_the_loop(url: str) -> None:
    async def count() -> tuple[int, float]:
        async with (
            ClientSession() as http,
            http.post(url + "/sql", json={"query": ENDLESS}) as answer,
        ):
            return answer.status, time.monotonic()

    begun = time.monotonic()
    slow = [asyncio.create_task(count()) for _ in range(4)]
    lag = 0.0
    while not all(task.done() for task in slow):
        tick = time.monotonic()
        await asyncio.sleep(0.01)
        lag = max(lag, time.monotonic() - tick - 0.01)
    ended = sorted(task.result()[1] - begun for task in slow)
    assert {task.result()[0] for task in slow} == {400}
    assert ended[3] - ended[0] > 0.4
    assert lag < 0.25


async def test_an_answer_too_large_to_send_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopoiesis.telemetry.endpoint.MOST_BYTES", 1000)
    with pytest.raises(QueryError, match="ask for fewer rows"):
        await asyncio.to_thread(ask, url, "from range(1000)", 1000)


async def test_a_closed_store_is_said_to_be_closed(store: Store, url: str) -> None:
    store.close()
    with pytest.raises(TelemetryError, match="closed"):
        await asyncio.to_thread(ask, url, "select 1")


async def test_the_client_says_when_nobody_or_somebody_else_answers() -> None:
    runner, url = await started(web.Application())
    with pytest.raises(TelemetryError, match="is it a control port"):
        await asyncio.to_thread(ask, url, "select 1")
    await runner.cleanup()
    with pytest.raises(TelemetryError, match="No instance answers"):
        await asyncio.to_thread(ask, url, "select 1")
