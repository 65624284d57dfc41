"""Counting of tokens starts from the model's own tokenizer, where a replica offers it."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from autopoiesis.gateway.tokenizer import SAMPLE, chars_per_token

Serve = Callable[[object], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def start(told: object) -> str:
        async def models(_request: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "m"}]})

        async def tokenize(request: web.Request) -> web.Response:
            asked = await request.json()
            assert (asked["model"], asked["prompt"]) == ("m", SAMPLE)
            return web.json_response(told)

        app = web.Application()
        app.router.add_get("/v1/models", models)
        if told is not None:
            app.router.add_post("/tokenize", tokenize)
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        host, port = runners[-1].addresses[0][:2]
        return f"{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_the_ratio_is_that_of_the_replica_s_tokenizer(serve: Serve):
    assert await chars_per_token(await serve({"count": 250})) == len(SAMPLE) / 250


@pytest.mark.parametrize("told", [None, [], {"count": 0}, {"count": "many"}, {}])
async def test_a_replica_without_one_tells_nothing(serve: Serve, told: object):
    assert await chars_per_token(await serve(told)) is None


async def test_nobody_there_tells_nothing():
    assert await chars_per_token("127.0.0.1:9") is None
