import asyncio
import contextlib
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web

from autopoiesis.arms.prefix import BLOCK_TOKENS, block_hashes
from autopoiesis.gateway.load import Answer, replay_load, run_load
from autopoiesis.gateway.load_prompts import PromptText, request_body
from autopoiesis.replicas.fleet import Member, free_ports, simulated_command
from autopoiesis.replicas.generation import prompt_of
from autopoiesis.replicas.probe import ProbeError, Server
from autopoiesis.replicas.scrape import parse_metrics
from autopoiesis.twin.trace import Trace, read_trace

TRACES = Path(__file__).parents[2] / "traces"


@pytest.fixture(scope="module")
def replica() -> Iterator[str]:
    member = Member("sim-0", f"127.0.0.1:{free_ports(1)[0]}", "h100-llama-3-8b-tp1-bf16", speed=5.0)
    command = simulated_command(member)
    environment = os.environ | command.environment
    process = subprocess.Popen(command.argv, env=environment, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{member.url}/health", timeout=1).close()
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield member.url
    finally:
        process.terminate()
        process.wait(10)


def trace_of(
    arrival_s: list[float], output: int = 5, blocks: list[list[int]] | None = None, session: int = 0
) -> Trace:
    n = len(arrival_s)
    rows = blocks or [[] for _ in range(n)]
    return Trace(
        arrival_s=np.array(arrival_s, np.float64),
        input_tokens=np.full(n, 1300),
        output_tokens=np.full(n, output),
        max_output_tokens=np.full(n, 4096),
        session=np.full(n, session),
        priority=np.zeros(n),
        block_start=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        blocks=np.array([b for row in rows for b in row], np.int64),
        block_tokens=512,
        name="made",
    )


def metrics(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        return parse_metrics(answer.read())


def test_prompts_have_their_length_and_share_their_prefixes() -> None:
    trace = trace_of([0.0, 0.0, 0.0], blocks=[[7, 8], [7, 9], []])
    text = PromptText(trace, seed=1)
    first, second, third = (text.of(i) for i in range(3))
    assert {len(first), len(second), len(third)} == {1300 * 4}
    assert all(prompt_of(t.decode()).tokens == 1300 for t in (first, second, third))
    a, b, c = (block_hashes(t.decode()) for t in (first, second, third))
    shared = 512 // BLOCK_TOKENS
    assert a[:shared].tolist() == b[:shared].tolist()
    assert not np.isin(a[shared:], b).any()
    assert not np.isin(c, [*a, *b]).any()
    assert PromptText(trace, seed=1).of(1) == second
    assert PromptText(trace, seed=2).of(1) != second


def test_a_partly_filled_last_block_and_real_traces() -> None:
    trace = read_trace(TRACES / "mooncake_conversation_a.parquet").head(200)
    text = PromptText(trace, seed=0)
    for i in range(0, 200, 20):
        assert len(text.of(i)) == 4 * trace.input_tokens[i]
        assert text.of(i).isascii()


def test_a_simulated_replica_is_told_the_length_beside_the_limit() -> None:
    trace = trace_of([0.0], output=77)
    simulated = Server("http://x:1", "1.1.1.1:1", ("m",), "autopoiesis-simulated", None)
    body = orjson.loads(request_body(trace, 0, b"hi", simulated))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 4096,
        "vllm_xargs": {"simulated_output_tokens": 77},
    }
    real = Server("http://x:1", "1.1.1.1:1", ("m",), "vllm", None)
    body = orjson.loads(request_body(trace, 0, b"hi", real))
    assert (body["max_tokens"], body["ignore_eos"]) == (77, True)
    assert "vllm_xargs" not in body


async def test_a_real_trace_runs_against_a_replica(replica: str) -> None:
    trace = read_trace(TRACES / "azure2023_code_a.parquet").slice(0, 60)
    answers: list[Answer] = []
    before = metrics(replica)
    told = await replay_load(trace, replica, speed=30.0, max_requests=60, on_done=answers.append)
    assert (told.requests, told.completed, told.failed, told.unfinished) == (60, 60, 0, 0)
    assert told.statuses == {"200": 60}
    assert told.errors == {}
    outputs = {a.index: a.output_tokens for a in answers}
    assert [outputs[i] for i in range(60)] == trace.head(60).output_tokens.tolist()
    assert told.ttft_p50_s
    assert told.e2e_p99_s
    assert told.tpot_p50_s
    assert 0 < told.ttft_p50_s < told.e2e_p99_s
    queried = metrics(replica).prefix_queries_total - before.prefix_queries_total
    assert queried == trace.head(60).input_tokens.sum()
    for answer in answers:
        assert answer.complete
        assert answer.ttft_s
        assert answer.ttft_s <= answer.e2e_s


async def test_shared_blocks_hit_the_prefix_cache(replica: str) -> None:
    trace = trace_of([0.0, 0.4], blocks=[[1, 2], [1, 2]], session=5)
    before = metrics(replica)
    told = await replay_load(trace, replica, seed=3)
    assert told.completed == 2
    assert metrics(replica).prefix_hits_total - before.prefix_hits_total == 1024


@asynccontextmanager
async def server(chat: Any) -> AsyncIterator[str]:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": "vllm"}]})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


async def test_load_is_open_and_errors_are_counted() -> None:
    arrived: list[float] = []
    sessions: set[str] = set()

    async def chat(request: web.Request) -> web.StreamResponse:
        number = len(arrived)
        arrived.append(time.monotonic())
        sessions.add(request.headers["x-session-id"])
        if number % 5 == 1:
            return web.Response(status=429)
        if number % 5 == 2:
            return web.Response(status=500)
        if number % 5 == 3:
            assert request.transport
            request.transport.abort()
            return web.Response()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.5)
        await response.write(b'data: {"choices":[{}]}\n\n' * 3)
        await asyncio.sleep(0.2)
        if number % 5 == 0:
            await response.write(b"data: [DONE]\n\n")
        return response

    planned = [0.02 * i for i in range(20)]
    async with server(chat) as url:
        told = await replay_load(trace_of(planned, session=-1), url)
    assert (told.requests, told.completed, told.shed, told.failed) == (20, 4, 4, 12)
    assert told.statuses == {"200": 8, "429": 4, "500": 4}
    assert Counter(told.errors) == Counter(
        {
            "HTTP 429": 4,
            "HTTP 500": 4,
            "stream broke off": 4,
            "ServerDisconnectedError: Server disconnected": 4,
        }
    )
    assert told.ttft_p50_s == pytest.approx(0.5, abs=0.1)
    assert told.tpot_p50_s == pytest.approx(0.2, abs=0.1)
    assert arrived[-1] - arrived[0] == pytest.approx(planned[-1], abs=0.15)
    assert told.lag_p99_s is not None
    assert told.lag_p99_s < 0.15
    assert sessions == {"ffffffffffffffff"}


async def test_load_ends_when_it_should() -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    trace = trace_of([0.1 * i for i in range(100)])
    async with server(never) as url:
        start = time.monotonic()
        told = await replay_load(trace, url, speed=2.0, until_s=0.3, drain_s=0.2)
        assert time.monotonic() - start < 2.0
        assert (told.requests, told.unfinished, told.completed) == (6, 6, 0)
        assert told.as_dict()["ttft_p50_s"] is None
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.25, stop.set)
        told = await replay_load(trace, url, stop=stop)
        assert 2 <= told.requests <= 4
        assert told.unfinished == told.requests
    with pytest.raises(ProbeError, match="refuses connections"):
        await replay_load(trace, "http://127.0.0.1:1")


def test_the_command_line_entry(replica: str, capfd: pytest.CaptureFixture[str]) -> None:
    trace = trace_of([0.0, 0.1, 0.2])
    told = run_load(trace, replica, 2.0, 5.0, None, 0, quiet=True).as_dict()
    assert (told["completed"], told["trace"], told["model"]) == (3, "made", "simulated")
    assert told["tokens_s"] > 0
    assert orjson.dumps(told)
    assert capfd.readouterr().err == ""
