import asyncio
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from autopoiesis.replicas.answers import text_of
from autopoiesis.replicas.generation import prompt_of
from autopoiesis.replicas.scrape import Scrape, parse_metrics
from autopoiesis.twin.latency import profile

HELLO: Any = [{"role": "user", "content": "Say something."}]


@pytest.fixture
def client(replica: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{replica.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def scrape(session: aiohttp.ClientSession, url: str) -> Scrape:
    async with session.get(f"{url}/metrics") as answer:
        return parse_metrics(await answer.read())


async def until(session: aiohttp.ClientSession, url: str, true: Callable[[Scrape], bool]) -> float:
    start = time.monotonic()
    while not true(await scrape(session, url)):
        assert time.monotonic() - start < 5, await scrape(session, url)
        await asyncio.sleep(0.02)
    return time.monotonic() - start


def test_a_stream_has_its_tokens_its_end_and_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="simulated",
            messages=HELLO,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert {c.id for c in chunks} == {chunks[0].id}
    assert chunks[0].id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == [
        f" {w}" for w in text_of(20).split()
    ]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 20 + ["length"]
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 20, 24)


def test_plain_answers(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="simulated", messages=HELLO, max_completion_tokens=7, extra_body={"ignore_eos": True}
    )
    assert chat.choices[0].message.content == text_of(7)
    assert chat.choices[0].finish_reason == "length"
    assert chat.usage
    assert chat.usage.completion_tokens == 7
    completion = client.completions.create(
        model="simulated", prompt="Once upon a time", extra_body={"ignore_eos": True}
    )
    assert completion.choices[0].text == text_of(16)
    assert completion.usage
    assert completion.usage.prompt_tokens == 4


@pytest.mark.parametrize("stream", [True, False])
def test_several_choices_and_prompts(client: openai.OpenAI, stream: bool) -> None:
    extra = {"ignore_eos": True}
    if not stream:
        plain = client.completions.create(
            model="simulated", prompt=["one", "twotwo"], n=2, max_tokens=5, extra_body=extra
        )
        assert [c.index for c in plain.choices] == [0, 1, 2, 3]
        assert {c.text for c in plain.choices} == {text_of(5)}
        assert plain.usage
        assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (1 + 2, 20)
        return
    texts = {0: "", 1: ""}
    ends = 0
    for chunk in client.chat.completions.create(
        model="simulated", messages=HELLO, n=2, max_tokens=9, stream=True, extra_body=extra
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += choice.finish_reason == "length"
    assert texts == {0: text_of(9), 1: text_of(9)}
    assert ends == 2


def test_lengths_come_from_the_load_the_seed_or_chance(client: openai.OpenAI) -> None:
    def answer(max_tokens: int | None = None, **extra: Any) -> tuple[int, str]:
        made = client.chat.completions.create(
            model="simulated", messages=HELLO, max_tokens=max_tokens, extra_body=extra
        )
        assert made.usage
        return made.usage.completion_tokens, made.choices[0].finish_reason

    told = {"vllm_xargs": {"simulated_output_tokens": 12}}
    assert answer(4096, **told) == (12, "stop")
    assert answer(12, **told) == (12, "stop")
    assert answer(5, **told) == (5, "length")
    assert answer(5, ignore_eos=True, **told) == (5, "length")
    seeded = [answer(300, seed=s) for s in (1, 2, 3, 1, 2, 3)]
    assert seeded[:3] == seeded[3:]
    assert len({n for n, _ in seeded}) > 1


async def test_headers_come_at_once_and_the_body_with_the_first_token(
    start_replica: Callable[..., Any],
) -> None:
    slow = start_replica(speed=0.02)
    host, port = slow.member.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":2,"ignore_eos":true}'
    start = time.monotonic()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    head = await reader.readuntil(b"\r\n\r\n")
    headers_s = time.monotonic() - start
    await reader.readline()
    first = await reader.readline()
    first_s = time.monotonic() - start
    assert head.startswith(b"HTTP/1.1 200")
    assert b"text/event-stream" in head
    assert first.startswith(b"data: {")
    expected_s = profile(slow.member.profile).step.weights_s / 0.02
    assert headers_s < expected_s / 2
    assert first_s >= expected_s
    writer.close()


async def test_an_old_client_gets_its_stream_without_http_chunks(replica: Any) -> None:
    host, port = replica.member.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"prompt":"hi","stream":true,"max_tokens":3,"ignore_eos":true}'
    writer.write(
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head, _, events = (await reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    lines = [line for line in events.split(b"\n") if line]
    assert len(lines) == 4
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    writer.close()


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[1]", 400, None),
        (b"\xff\xfe", 400, None),
        (b"{}", 400, "messages"),
        (b'{"messages":[]}', 400, "messages"),
        (b'{"messages":"hi"}', 400, "messages"),
        (b'{"messages":[5]}', 400, "messages[0]"),
        (b'{"messages":[{"content":"x"}]}', 400, "messages[0].role"),
        (b'{"messages":[{"role":"user","content":5}]}', 400, "messages[0].content"),
        (
            b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}',
            400,
            "messages[0].content[0]",
        ),
        (b'{"messages":[{"role":"user","content":"x"}],"model":"gpt-4o"}', 404, "model"),
        (b'{"messages":[{"role":"user","content":"x"}],"model":7}', 400, "model"),
        (b'{"messages":[{"role":"user","content":"x"}],"max_tokens":0}', 400, "max_tokens"),
        (b'{"messages":[{"role":"user","content":"x"}],"max_tokens":"9"}', 400, "max_tokens"),
        (b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1e400}', 400, None),
        (b'{"messages":[{"role":"user","content":"x"}],"n":129}', 400, "n"),
        (b'{"messages":[{"role":"user","content":"x"}],"n":true}', 400, "n"),
        (b'{"messages":[{"role":"user","content":"x"}],"stream":1}', 400, "stream"),
        (
            b'{"messages":[{"role":"user","content":"x"}],"stream_options":{}}',
            400,
            "stream_options",
        ),
        (b'{"messages":[{"role":"user","content":"x"}],"temperature":3}', 400, "temperature"),
        (b'{"messages":[{"role":"user","content":"x"}],"priority":"high"}', 400, "priority"),
        (
            b'{"messages":[{"role":"user","content":"x"}],"vllm_xargs":{"simulated_output_tokens":0}}',
            400,
            "vllm_xargs.simulated_output_tokens",
        ),
    ],
)
async def test_a_wrong_body_is_refused_in_openai_shape(
    replica: Any, session: aiohttp.ClientSession, body: bytes, status: int, param: str | None
) -> None:
    async with session.post(f"{replica.url}/v1/chat/completions", data=body) as answer:
        told = (await answer.json())["error"]
        assert (answer.status, told["code"], told["param"]) == (status, status, param)
        assert set(told) == {"message", "type", "param", "code"}
        if param:
            assert param.split(".")[-1] in told["message"] or "model" in told["message"]


async def test_other_refusals(replica: Any, session: aiohttp.ClientSession) -> None:
    async def post(path: str, body: bytes) -> tuple[int, str]:
        async with session.post(f"{replica.url}{path}", data=io.BytesIO(body)) as answer:
            return answer.status, (await answer.json())["error"]["message"]

    assert await post("/v1/completions", b'{"prompt":[]}') == (
        400,
        "`prompt` must be a text, a list of token ids, or a list of these.",
    )
    assert (await post("/v1/completions", b'{"prompt":[1,-2]}'))[0] == 400
    assert (await post("/v1/completions", b'{"prompt":[1,"x"]}'))[0] == 400
    many = b'{"prompt":[%b]}' % b",".join([b'"x"'] * 1025)
    assert await post("/v1/completions", many) == (
        400,
        "`prompt` must be at most 1024 prompts at once.",
    )
    status, message = await post("/v1/completions", b'{"prompt":"%b"}' % (b"word" * 500_000))
    assert status == 400
    assert "maximum context length" in message
    status, message = await post("/v1/completions", b'{"prompt":"%b"}' % (b"x" * (65 << 20)))
    assert (status, "64 MiB" in message) == (413, True)
    assert (await post("/v1/embeddings", b"{}"))[0] == 404
    async with session.get(f"{replica.url}/v1/completions") as answer:
        assert answer.status == 405
        assert (await answer.json())["error"]["type"] == "MethodNotAllowedError"


def test_the_openai_package_understands_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="`max_tokens` must be a whole number"):
        client.chat.completions.create(model="simulated", messages=HELLO, max_tokens=-1)
    assert [m.id for m in client.models.list()] == ["simulated"]


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 129, False), ("caf\u00e9", False), ("", False)]
)
async def test_a_sane_request_id_becomes_the_answers_id(
    replica: Any, session: aiohttp.ClientSession, given: str, kept: bool
) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    url, headers = f"{replica.url}/v1/completions", {"X-Request-Id": given}
    async with session.post(url, json=body, headers=headers) as answer:
        assert ((await answer.json())["id"] == f"cmpl-{given}") is kept


async def test_the_small_endpoints(replica: Any, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{replica.url}/health") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with session.get(f"{replica.url}/version") as answer:
        assert (await answer.json())["version"].endswith("simulated")
    async with session.get(f"{replica.url}/v1/models") as answer:
        (model,) = (await answer.json())["data"]
        assert model["owned_by"] == "autopoiesis-simulated"
        assert model["max_model_len"] == profile(replica.member.profile).kv_tokens
    async with session.post(f"{replica.url}/tokenize", json={"prompt": "hello world"}) as answer:
        told = await answer.json()
        assert told["count"] == len(told["tokens"]) == 3 == prompt_of("hello world").tokens


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_place(
    replica: Any, session: aiohttp.ClientSession, stream: bool
) -> None:
    await until(session, replica.url, lambda s: s.running == 0)
    body = {"messages": HELLO, "stream": stream, "max_tokens": 100_000, "n": 2, "ignore_eos": True}

    async def ask() -> None:
        async with session.post(f"{replica.url}/v1/chat/completions", json=body) as answer:
            async for _ in answer.content.iter_any():
                pass

    asking = asyncio.create_task(ask())
    await until(session, replica.url, lambda s: s.running == 2)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert await until(session, replica.url, lambda s: s.running == 0) < 1.0
    assert (await scrape(session, replica.url)).kv_usage == 0.0


async def test_metrics_have_vllms_names_and_types_and_count(
    replica: Any, session: aiohttp.ClientSession
) -> None:
    async def families() -> dict[str, Any]:
        async with session.get(f"{replica.url}/metrics") as answer:
            return {f.name: f for f in text_string_to_metric_families(await answer.text())}

    def value(found: dict[str, Any], sample: str, **labels: str) -> float:
        return sum(
            s.value
            for f in found.values()
            for s in f.samples
            if s.name == sample and labels.items() <= s.labels.items()
        )

    before = await families()
    types = {name: f.type for name, f in before.items()}
    assert types == {
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:kv_cache_usage_perc": "gauge",
        "vllm:prefix_cache_queries": "counter",
        "vllm:prefix_cache_hits": "counter",
        "vllm:num_preemptions": "counter",
        "vllm:prompt_tokens": "counter",
        "vllm:generation_tokens": "counter",
        "vllm:request_success": "counter",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:inter_token_latency_seconds": "histogram",
        "vllm:request_time_per_output_token_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "vllm:request_queue_time_seconds": "histogram",
        "vllm:request_prompt_tokens": "histogram",
        "vllm:request_generation_tokens": "histogram",
        "vllm:cache_config_info": "gauge",
    }
    labels = {"model_name": "simulated", "engine": "0"}
    assert value(before, "vllm:num_requests_running", **labels) == 0
    body = {"prompt": "a" * 400, "max_tokens": 30, "ignore_eos": True}
    async with session.post(f"{replica.url}/v1/completions", json=body) as answer:
        assert answer.status == 200
    after = await families()

    def gain(sample: str, **more: str) -> float:
        return value(after, sample, **labels, **more) - value(before, sample, **labels, **more)

    assert gain("vllm:prompt_tokens_total") == 100
    assert gain("vllm:prefix_cache_queries_total") == 100
    assert gain("vllm:generation_tokens_total") == 30
    assert gain("vllm:request_success_total", finished_reason="length") == 1
    assert gain("vllm:request_success_total", finished_reason="abort") == 0
    assert gain("vllm:inter_token_latency_seconds_count") == 29
    assert gain("vllm:inter_token_latency_seconds_bucket", le="+Inf") == 29
    for histogram in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert gain(f"vllm:{histogram}_seconds_count") == 1
    parts = gain("vllm:time_to_first_token_seconds_sum") + gain(
        "vllm:inter_token_latency_seconds_sum"
    )
    assert gain("vllm:e2e_request_latency_seconds_sum") == pytest.approx(parts)
    told = await scrape(session, replica.url)
    chosen = profile(replica.member.profile)
    assert (told.kv_blocks, told.block_size) == (chosen.kv_blocks, chosen.kv_block_tokens)
    assert told.missing == ()


def test_a_repeated_prefix_is_cached(client: openai.OpenAI) -> None:
    def cached(text: str) -> int:
        made = client.chat.completions.create(
            model="simulated", messages=[{"role": "user", "content": text}], max_tokens=1
        )
        assert made.usage
        assert made.usage.prompt_tokens_details
        return made.usage.prompt_tokens_details.cached_tokens or 0

    prefix = "once more " * 410
    assert cached(prefix + "first") == 0
    assert cached(prefix + "second") == 4 * 256
    assert cached("not " + prefix) == 0


def engine_seconds(name: str, n: int, input_tokens: int, output_tokens: int) -> float:
    """Step an engine, uncompiled, in a process of its own; return the time that its steps sum to."""
    script = f"""
import numpy as np
from autopoiesis.twin.engine import Engine
from autopoiesis.twin.latency import profile
engine = Engine(profile({name!r}), 256)
for _ in range({n}):
    engine.submit({input_tokens}, {output_tokens}, np.zeros(0, np.int64), 0.0)
total = 0.0
while (step_s := engine.start_step()) is not None:
    total += step_s
    engine.finish_step()
print(total)
"""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


async def test_many_at_once_take_the_time_that_the_engine_says(
    start_replica: Callable[..., Any], session: aiohttp.ClientSession
) -> None:
    real = start_replica(speed=1.0)
    tokens, n = 60, 24
    body = {"prompt": "x" * 800, "max_tokens": tokens, "ignore_eos": True, "n": n}
    async with session.post(f"{real.url}/v1/completions", json=body | {"n": 1}) as answer:
        assert answer.status == 200
    start = time.monotonic()
    async with session.post(f"{real.url}/v1/completions", json=body) as answer:
        told = await answer.json()
    took_s = time.monotonic() - start
    assert len(told["choices"]) == n
    expected_s = engine_seconds(real.member.profile, n, 200, tokens)
    assert expected_s * 0.99 < took_s < expected_s * 1.15 + 0.15


async def test_sigterm_finishes_what_runs_and_refuses_what_comes(
    start_replica: Callable[..., Any], session: aiohttp.ClientSession
) -> None:
    running = start_replica(speed=1.0)
    body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
    async with session.post(f"{running.url}/v1/completions", json=body) as answer:
        first = await answer.content.readany()
        running.process.terminate()
        await asyncio.sleep(0.1)
        async with session.post(f"{running.url}/v1/completions", json=body) as refused:
            assert refused.status == 503
            assert (await refused.json())["error"]["type"] == "ServiceUnavailableError"
        async with session.get(f"{running.url}/health") as healthy:
            assert healthy.status == 200
        rest = await answer.content.read()
    assert (first + rest).count(b"data: ") == 151
    assert rest.endswith(b"data: [DONE]\n\n")
    assert await asyncio.to_thread(running.process.wait, 5) == 0


def run_module(*options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "autopoiesis.replicas.simulated", "--name", "s", *options]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_a_replica_that_cannot_start_says_why(replica: Any) -> None:
    unknown = run_module("--port", "1", "--profile", "abacus")
    assert unknown.returncode == 2
    assert "abacus" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = run_module("--port", port, "--profile", replica.member.profile)
    assert refused.returncode == 3
    assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr
    assert "Traceback" not in refused.stderr
