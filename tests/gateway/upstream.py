"""A small OpenAI-compatible server for tests: `python upstream.py PORT NAME`.

What it does with a request is said in the body's `test` object: `status`, `first_s`, `each_s`,
`usage` (false: leave it out of streams), `break_after` (close the connection after so many tokens).
"""

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

NAME = sys.argv[2]
ABOUT = {"id": "c", "created": 0, "model": "m"}


async def chat(request: web.Request) -> web.StreamResponse:
    body: dict[str, Any] = await request.json()
    how: dict[str, Any] = body.get("test", {})
    headers = {"x-served-by": NAME}
    if status := how.get("status"):
        error = {"message": "as asked", "type": "x", "param": None, "code": "x"}
        return web.json_response({"error": error}, status=status, headers=headers)
    tokens = int(body.get("max_tokens", 4))
    usage = {
        "prompt_tokens": len(json.dumps(body.get("messages") or body.get("prompt"))) // 5,
        "completion_tokens": tokens,
        "total_tokens": tokens,
    }
    if not body.get("stream"):
        await asyncio.sleep(how.get("first_s", 0.0))
        message = {"role": "assistant", "content": "word " * tokens}
        choices = [{"index": 0, "message": message, "finish_reason": "length"}]
        answer = {**ABOUT, "object": "chat.completion", "choices": choices, "usage": usage}
        return web.json_response(answer, headers=headers)
    response = web.StreamResponse(
        headers={"content-type": "text/event-stream; charset=utf-8", **headers}
    )
    await response.prepare(request)
    await asyncio.sleep(how.get("first_s", 0.0))
    for i in range(tokens):
        if i == how.get("break_after"):
            assert request.transport
            request.transport.close()
            return response
        await send(response, [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
        await asyncio.sleep(how.get("each_s", 0.0))
    if how.get("usage", True):
        await send(response, [], usage=usage)
    await response.write(b"data: [DONE]\n\n")
    return response


async def send(response: web.StreamResponse, choices: list[Any], **more: Any) -> None:
    chunk = {**ABOUT, "object": "chat.completion.chunk", "choices": choices, **more}
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


async def models(_: web.Request) -> web.Response:
    listing = {"object": "list", "data": [{"id": "m", "object": "model"}]}
    return web.json_response(listing, headers={"x-served-by": NAME})


async def metrics(_: web.Request) -> web.Response:
    return web.Response(
        text="vllm:num_requests_running 3.0\nvllm:num_requests_waiting 1.0\nvllm:kv_cache_usage_perc 0.25\n"
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0\n'
    )


async def echo(request: web.Request) -> web.Response:
    return web.json_response(
        {"headers": dict(request.headers), "length": len(await request.read())}
    )


@web.middleware
async def judged(request: web.Request, handler: Any) -> web.StreamResponse:
    """Answer 400 to what this server makes nothing of, as vLLM does."""
    try:
        return await handler(request)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        return web.json_response({"error": {"message": str(error)}}, status=400)


app = web.Application(client_max_size=1 << 30, middlewares=[judged])
app.router.add_post("/v1/chat/completions", chat)
app.router.add_post("/v1/completions", chat)
app.router.add_post("/v1/embeddings", echo)
app.router.add_get("/v1/models", models)
app.router.add_get("/health", models)
app.router.add_get("/metrics", metrics)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, handle_signals=False)
