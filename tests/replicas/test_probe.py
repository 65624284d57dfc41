import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from autopoiesis.replicas.probe import ProbeError, base_url, probe


@asynccontextmanager
async def http(**answers: web.Response | Callable[[], Any]) -> AsyncIterator[str]:
    """Serve `/v1/models` and `/version` as given."""
    app = web.Application()
    paths = {"models": "/v1/models", "version": "/version"}
    for name, answer in answers.items():

        async def handler(_: web.Request, answer: Any = answer) -> web.Response:
            return await answer() if callable(answer) else answer

        app.router.add_get(paths[name], handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


@asynccontextmanager
async def tcp(speak: bytes) -> AsyncIterator[str]:
    """Serve something that is no HTTP."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(speak)
        writer.close()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def models(*ids: str) -> web.Response:
    return web.json_response(
        {"object": "list", "data": [{"id": i, "owned_by": "vllm"} for i in ids]}
    )


async def test_a_simulated_replica_is_recognised(replica: Any) -> None:
    found = await probe(f"localhost:{replica.member.address.split(':')[1]}/v1/")
    assert found.models == ("simulated",)
    assert found.simulated
    assert found.address == replica.member.address
    assert found.version
    assert found.version.endswith("simulated")


async def test_a_vllm_server_is_recognised() -> None:
    version = web.json_response({"version": "0.32.0"})
    async with http(models=models("a", "a-lora"), version=version) as url:
        found = await probe(url)
    assert (found.models, found.version, found.simulated) == (("a", "a-lora"), "0.32.0", False)
    assert found.url == url
    async with http(models=models("a")) as url:
        assert (await probe(url)).version is None


async def says(url: str, timeout_s: float = 2.0) -> str:
    with pytest.raises(ProbeError) as error:
        await probe(url, timeout_s)
    assert "\n" not in str(error.value)
    return str(error.value)


async def test_what_is_no_openai_server_is_named() -> None:
    async with http(models=web.Response(status=401)) as url:
        assert "wants an API key" in await says(url)
    async with http() as url:
        assert "has no /v1/models" in await says(url)
    async with http(models=web.Response(status=500)) as url:
        assert "answered 500" in await says(url)
    async with http(models=web.Response(status=302, headers={"Location": "/login"})) as url:
        assert "answered 302" in await says(url)
    async with http(models=web.Response(text="<html>", content_type="text/html")) as url:
        assert "serves a web page" in await says(url)
    for body in ("{", "[]", '{"data": 5}', '{"data": ["x"]}', '{"data": [{}]}', "null"):
        async with http(models=web.Response(text=body, content_type="application/json")) as url:
            assert "not as OpenAI does" in await says(url), body
    async with http(models=web.Response(text=json.dumps({"data": []}))) as url:
        assert "serves no model" in await says(url)


async def test_what_does_not_answer_is_named() -> None:
    async def never() -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async with http(models=never) as url:
        assert "did not answer within 0.2 s" in await says(url, 0.2)
    async with http() as url:
        closed = url
    assert "refuses connections" in await says(closed)
    async with tcp(b"SSH-2.0-OpenSSH_9.2\r\n") as url:
        assert "does not speak HTTP" in await says(url)
    async with tcp(b"") as url:
        assert "closed the connection" in await says(url)
    assert "no host called" in await says("http://no-such-host.invalid:80")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://10.0.0.1:8000/v1/", "http://10.0.0.1:8000"),
        (" http://host/v1 ", "http://host:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_what_people_type_is_understood(typed: str, meant: str) -> None:
    assert base_url(typed) == meant


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "http://",
        "https://host",
        "ftp://host",
        "http://host:99999",
        "http://host/api",
        "http://h:x",
    ],
)
def test_what_is_no_base_url_is_refused(typed: str) -> None:
    with pytest.raises(ProbeError):
        base_url(typed)
