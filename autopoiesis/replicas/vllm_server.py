"""vLLM's HTTP API in front of the real-time engine."""

import asyncio
import contextlib
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import numpy as np
import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from autopoiesis import __version__
from autopoiesis.arms.prefix import BLOCK_TOKENS, CHARS_PER_TOKEN
from autopoiesis.replicas.answers import Reply, TokenStream
from autopoiesis.replicas.generation import (
    ApiError,
    Generation,
    Json,
    Prompt,
    chat_text,
    read_generation,
    read_object,
    require_model,
)
from autopoiesis.replicas.probe import SIMULATED
from autopoiesis.replicas.realtime import RealtimeEngine, Sequence
from autopoiesis.replicas.vllm_metrics import ReplicaMetrics
from autopoiesis.twin.engine import Engine
from autopoiesis.twin.latency import Profile

LARGEST_BODY = 64 << 20
NATURAL_MEDIAN_TOKENS, NATURAL_SIGMA = 120.0, 0.9
"""Log-normal lengths of answers that nothing else determines (mean 180)."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Replica:
    """The server's state and its endpoints."""

    def __init__(self, name: str, model: str, chosen: Profile, speed: float, seed: int) -> None:
        """Prepare; `engine.run` must be running for requests to be answered."""
        self.name = name
        self.model = model
        self.max_model_len = chosen.kv_tokens
        self.draining = False
        engine = Engine(chosen, BLOCK_TOKENS)
        metrics = ReplicaMetrics(engine, model)
        self.engine = RealtimeEngine(engine, metrics, speed)
        self._registry = metrics.registry()
        self._rng = np.random.default_rng(seed)
        self._started = int(time.time())

    def application(self) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[_in_openai_shape])
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.post("/tokenize", self.tokenize),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/version", self.version),
                web.get("/metrics", self.metrics),
            ]
        )
        return app

    async def health(self, _request: web.Request) -> web.Response:
        """Say that the server lives; like vLLM it says so while it drains, too."""
        return web.Response()

    async def version(self, _request: web.Request) -> web.Response:
        """Tell the version."""
        return _json({"version": f"{__version__}+simulated"})

    async def models(self, _request: web.Request) -> web.Response:
        """List the one model."""
        one = {
            "id": self.model,
            "object": "model",
            "created": self._started,
            "owned_by": SIMULATED,
            "root": self.model,
            "parent": None,
            "max_model_len": self.max_model_len,
        }
        return _json({"object": "list", "data": [one]})

    async def metrics(self, _request: web.Request) -> web.Response:
        """Tell the metrics in Prometheus text."""
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def tokenize(self, request: web.Request) -> web.Response:
        """Cut a text into tokens of `CHARS_PER_TOKEN` bytes."""
        fields = read_object(await request.read())
        require_model(fields, self.model)
        text = fields.get("prompt") if "messages" not in fields else chat_text(fields)
        if not isinstance(text, str):
            raise ApiError(400, "`prompt` must be a string, or `messages` be given.", "prompt")
        data = text.encode("utf-8", "surrogatepass")
        pieces = [data[i : i + CHARS_PER_TOKEN] for i in range(0, len(data), CHARS_PER_TOKEN)]
        tokens = [zlib.crc32(piece) & 0xFFFF for piece in pieces]
        return _json(
            {
                "count": len(tokens),
                "max_model_len": self.max_model_len,
                "tokens": tokens,
                "token_strs": None,
            }
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer `/v1/chat/completions`."""
        return await self._complete(request, chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer `/v1/completions`."""
        return await self._complete(request, chat=False)

    async def _complete(self, request: web.Request, chat: bool) -> web.StreamResponse:
        if self.draining:
            message = f"{self.name} is shutting down; send the request to another replica."
            raise ApiError(503, message, kind="ServiceUnavailableError")
        asked = read_generation(read_object(await request.read()), chat, self.model)
        lengths = [self._length(asked, prompt) for prompt in asked.prompts for _ in range(asked.n)]
        request_id = _request_id(request)
        reply = Reply(request_id, int(time.time()), self.model, chat)
        if asked.stream:
            return await self._stream(request, asked, lengths, reply)
        answer = await self._whole(asked, lengths, reply)
        if request.headers.get("endpoint-load-metrics-format", "").upper() == "TEXT":
            answer.headers["endpoint-load-metrics"] = self._load()
        return answer

    def _load(self) -> str:
        """Tell the load as vLLM does in the headers of a plain answer that is asked to."""
        engine = self.engine.engine
        usage, waiting = float(engine.kv_usage), float(engine.waiting)
        return f"TEXT named_metrics.kv_cache_usage_perc={usage}, named_metrics.num_requests_waiting={waiting}"

    def _length(self, asked: Generation, prompt: Prompt) -> tuple[int, str]:
        """Return how many tokens the answer will have, and why it will end there."""
        room = self.max_model_len - prompt.tokens
        if room < 1:
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens. However, your "
                f"prompt has {prompt.tokens} tokens; shorten it."
            )
            raise ApiError(400, message, "messages" if asked.chat else "prompt")
        limit = min(room, asked.max_tokens or room)
        if asked.ignore_eos:
            return limit, "length"
        natural = asked.natural_tokens
        if natural is None:
            rng = (
                self._rng if asked.seed is None else np.random.default_rng(asked.seed & (2**64 - 1))
            )
            drawn = NATURAL_MEDIAN_TOKENS * np.exp(NATURAL_SIGMA * rng.standard_normal())
            natural = max(1, int(drawn))
        return (natural, "stop") if natural <= limit else (limit, "length")

    async def _whole(
        self, asked: Generation, lengths: list[tuple[int, str]], reply: Reply
    ) -> web.StreamResponse:
        done = _Countdown(len(lengths))
        sequences: list[Sequence] = []
        with self._aborting(sequences):
            for i, (tokens, reason) in enumerate(lengths):
                prompt = asked.prompts[i // asked.n]
                sequence = self.engine.submit(prompt, tokens, reason, asked.priority, done.on_token)
                sequences.append(sequence)
            await done.wait()
        return web.Response(
            body=reply.whole(sequences, _usage(asked, sequences)), content_type="application/json"
        )

    async def _stream(
        self, request: web.Request, asked: Generation, lengths: list[tuple[int, str]], reply: Reply
    ) -> web.StreamResponse:
        """Send the headers at once and every token when the engine emits it."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
            }
        )
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            return response
        done = _Countdown(len(lengths))
        chunked = request.version >= (1, 1)
        sequences: list[Sequence] = []
        with self._aborting(sequences):
            for i, (tokens, reason) in enumerate(lengths):
                stream = TokenStream(reply, i, reason, transport, chunked)
                on_token = _both(stream.write, done.on_token)
                prompt = asked.prompts[i // asked.n]
                sequences.append(
                    self.engine.submit(prompt, tokens, reason, asked.priority, on_token)
                )
            await done.wait()
        end = b"data: [DONE]\n\n"
        if asked.include_usage:
            end = reply.event([], usage=_usage(asked, sequences)) + end
        with contextlib.suppress(ConnectionError):
            await response.write(end)
            await response.write_eof()
        return response

    @contextlib.contextmanager
    def _aborting(self, sequences: list[Sequence]) -> Generator[None]:
        """Free the sequences' places however the request ends."""
        try:
            yield
        finally:
            for sequence in sequences:
                self.engine.abort(sequence)


class _Countdown:
    """Waits until a number of sequences have finished."""

    __slots__ = ("_done", "_left")

    def __init__(self, count: int) -> None:
        self._left = count
        self._done = asyncio.get_running_loop().create_future()

    def on_token(self, finished: bool) -> None:
        if finished:
            self._left -= 1
            if not self._left and not self._done.done():
                self._done.set_result(None)

    async def wait(self) -> None:
        await self._done


def _both(first: Callable[[bool], None], second: Callable[[bool], None]) -> Callable[[bool], None]:
    def on_token(finished: bool) -> None:
        first(finished)
        second(finished)

    return on_token


def _usage(asked: Generation, sequences: list[Sequence]) -> dict[str, Any]:
    prompt = sum(p.tokens for p in asked.prompts)
    output = sum(s.output_tokens for s in sequences)
    cached = sum(s.cached_tokens for s in sequences[:: asked.n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _request_id(request: web.Request) -> str:
    """Take over the caller's id, as vLLM does, if it is a sane one."""
    given = request.headers.get("X-Request-Id", "")
    return given if given.isascii() and 0 < len(given) <= 128 else uuid.uuid4().hex


def _json(value: Json) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


@web.middleware
async def _in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error the way OpenAI does."""
    try:
        return await handler(request)
    except ApiError as error:
        refused = error
    except web.HTTPRequestEntityTooLarge:
        refused = ApiError(
            413, f"The request body is larger than {LARGEST_BODY >> 20} MiB; send less."
        )
    except web.HTTPException as error:
        kind = f"{error.reason.replace(' ', '')}Error"
        refused = ApiError(
            error.status, f"{error.reason}: {request.method} {request.path}", kind=kind
        )
    return web.Response(status=refused.status, body=refused.body, content_type="application/json")
