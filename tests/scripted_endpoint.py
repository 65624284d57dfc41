"""A real HTTP server that does, one after the other, what a script says: the bad days of an LLM API."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]

GOOD = """# Less work for slow replicas.
def score(request, replica, fleet):
    return replica.in_flight / replica.speed
"""
BROKEN = """# Half an idea.
def score(request, replica, fleet):
    return replica.in_flite / replica.speed
"""
PROSE = "Certainly! Routing is a fascinating topic. I would send requests to the fastest replica."


def fenced(*policies: str) -> str:
    return (
        "Here you are.\n\n" + "\n\n".join(f"```python\n{p}```" for p in policies) + "\n\nGood luck!"
    )


def completion(*texts: str, usage: Any = (1000, 200), finish: str = "stop") -> dict[str, Any]:
    plain: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [
            {"index": i, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
            for i, text in enumerate(texts)
        ],
    }
    if usage is not None:
        plain["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return plain


def says(*texts: str, **more: Any) -> Act:
    return sends(orjson.dumps(completion(*texts, **more)))


def sends(body: bytes, status: int = 200, **headers: str) -> Act:
    async def act(_request: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(
            body=body, status=status, content_type="application/json", headers=named
        )

    return act


def refuses(status: int, message: str = "no", code: str | None = None, **headers: str) -> Act:
    error = {"error": {"message": message, "type": "error", "code": code}}
    return sends(orjson.dumps(error), status, **headers)


def hangs(seconds: float = 30.0) -> Act:
    async def act(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.Response()

    return act


def drips() -> Act:
    """Sends a byte now and then, for ever: no read ever times out."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    return act


def drops(after: bytes = b"") -> Act:
    """Hangs up, in the middle of a response if `after` is given."""

    async def act(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        if after:
            transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + after)
        transport.close()
        return web.Response()

    return act


def repeats_the_key() -> Act:
    async def act(request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Authorization", "")
        error = {"error": {"message": f"Incorrect API key provided: {key}", "type": "auth"}}
        return web.Response(body=orjson.dumps(error), status=401, content_type="application/json")

    return act


class ScriptedEndpoint:
    """`with ScriptedEndpoint(act, act, ...) as endpoint`: the last act is repeated for ever."""

    def __init__(self, *script: Act) -> None:
        self.script = list(script)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ScriptedEndpoint":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(orjson.loads(await request.read()))
        self.keys.append(request.headers.get("Authorization", ""))
        act = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.open += 1
        try:
            return await act(request)
        finally:
            self.open -= 1

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": 4096}]})
