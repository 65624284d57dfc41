import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from autopoiesis.replicas.scrape import Health, Scraper, parse_metrics

VLLM = b"""\
# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",major="3",minor="12"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B"} 12.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B"} 4.0
vllm:num_requests_waiting{engine="1",model_name="meta-llama/Llama-3.1-8B"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 99.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="a}b"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a}b"} 0.75
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1.5e+06
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.76e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 896.0 1700000000000
vllm:num_preemptions_total{engine="0",model_name="m"} 38.0
vllm:generation_tokens_total{engine="0",model_name="m"} 120.0
vllm:generation_tokens_total{engine="1",model_name="m"} 1.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 5.0
vllm:cache_config_info{block_size="128",cache_dtype="auto",num_cpu_blocks="None",num_gpu_blocks="512",engine="0"} 1.0
vllm:cache_config_info{block_size="128",cache_dtype="auto",num_cpu_blocks="None",num_gpu_blocks="500",engine="1"} 1.0
"""


def test_current_vllm_is_understood_and_summed_over_engines() -> None:
    told = parse_metrics(VLLM)
    assert (told.running, told.waiting, told.kv_usage) == (15, 4, 0.5)
    assert (told.prefix_queries_total, told.prefix_hits_total, told.preemptions_total) == (
        1.5e6,
        896,
        38,
    )
    assert told.generated_tokens_total == 121
    assert (told.kv_blocks, told.block_size) == (1012, 128)
    assert told.missing == ()


def test_older_names_are_understood() -> None:
    told = parse_metrics(
        b'vllm:gpu_cache_usage_perc{model_name="m"} 0.5\n'
        b'vllm:gpu_prefix_cache_queries_total{model_name="m"} 10\n'
        b'vllm:gpu_prefix_cache_hits_total{model_name="m"} 4'
    )
    assert (told.kv_usage, told.prefix_queries_total, told.prefix_hits_total) == (0.5, 10, 4)
    assert told.running is None
    assert told.missing == (
        "running",
        "waiting",
        "preemptions_total",
        "generated_tokens_total",
        "kv_blocks",
        "block_size",
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>no metrics</html>",
        b"vllm:num_requests_running",
        b"vllm:num_requests_running ",
        b"vllm:num_requests_running many\n",
        b'vllm:num_requests_running{engine="0"} NaN\n',
        b'vllm:cache_config_info{num_gpu_blocks="None"} 1\n',
        b"\xff\xfe\x00vllm:",
    ],
)
def test_nonsense_is_missing_not_zero(text: bytes) -> None:
    told = parse_metrics(text)
    assert told.running is None
    assert told.kv_blocks is None
    assert len(told.missing) == 9


@given(
    st.lists(
        st.tuples(st.text(max_size=10), st.floats(0, 1e9), st.floats(0, 1)), min_size=1, max_size=4
    )
)
def test_agrees_with_what_prometheus_client_writes(engines: list[tuple[str, float, float]]) -> None:
    registry = CollectorRegistry()
    labels = ("model_name", "engine")
    running = Gauge("vllm:num_requests_running", "", labels, registry=registry)
    usage = Gauge("vllm:kv_cache_usage_perc", "", labels, registry=registry)
    hits = Counter("vllm:prefix_cache_hits", "", labels, registry=registry)
    for i, (model, number, share) in enumerate(engines):
        running.labels(model, str(i)).set(number)
        usage.labels(model, str(i)).set(share)
        hits.labels(model, str(i)).inc(number)
    told = parse_metrics(generate_latest(registry))
    assert told.running == pytest.approx(sum(n for _, n, _ in engines))
    assert told.prefix_hits_total == pytest.approx(sum(n for _, n, _ in engines))
    assert told.kv_usage == pytest.approx(sum(s for _, _, s in engines) / len(engines))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes([web.get("/metrics", handler)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"{host}:{port}"
    await runner.cleanup()


@asynccontextmanager
async def scraping(scraper: Scraper) -> AsyncIterator[None]:
    task = asyncio.create_task(scraper.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_replicas_are_polled_and_their_health_is_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    status = 200

    async def good(_: web.Request) -> web.Response:
        return web.Response(body=VLLM)

    async def changing(_: web.Request) -> web.Response:
        return web.Response(status=status, body=b"vllm:num_requests_running 1\n")

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(1)
        return web.Response(body=VLLM)

    results: dict[str, list[Health]] = {"good": [], "changing": [], "slow": [], "gone": []}
    caplog.set_level(logging.WARNING)
    async with server(good) as a, server(changing) as b, server(slow) as c:
        addresses = {"good": a, "changing": b, "slow": c, "gone": "127.0.0.1:1"}
        scraper = Scraper(
            addresses, lambda h: results[h.replica].append(h), interval_s=0.05, timeout_s=0.1
        )
        assert not any(health.healthy for health in scraper.health.values())
        async with scraping(scraper):
            await asyncio.sleep(0.6)
            assert scraper.health["good"].healthy
            assert scraper.health["changing"].healthy
            status = 500
            await asyncio.sleep(0.6)
            failed = [h for h in results["changing"] if h.failures]
    assert len(results["good"]) >= 10
    assert all(h.healthy and h.scrape and h.scrape.running == 15 for h in results["good"])
    assert [h.healthy for h in failed[:4]] == [True, True, False, False]
    assert failed[0].error == "/metrics answered 500"
    assert failed[3].scrape == results["changing"][0].scrape
    assert failed[3].age_s(failed[3].scraped_s + 2.0) == 2.0
    assert not any(h.healthy for h in results["slow"])
    assert "longer than 0.1 s" in results["slow"][0].error
    assert 2 <= len(results["slow"]) <= 13
    assert not results["gone"][-1].healthy
    assert results["gone"][-1].failures >= 3
    assert results["gone"][-1].error
    told = [r.getMessage() for r in caplog.records if "does not tell" in r.getMessage()]
    assert len(told) == 1
    assert "changing does not tell waiting, kv_usage" in told[0]
