"""A replica that costs as little as possible and can be told to misbehave: `mock_replica.py PORT`.

It answers after `delay_s` with 16 tokens, in one piece or as a stream. `GET /mode/NAME` changes how
it behaves from then on: ok, prefill (sends a stream's headers before the delay, as vLLM does), slow (ten
times the delay), errors (500), garbage (no HTTP), breaks (closes after the fifth token). `GET
/delay/SECONDS` changes the delay, `GET /each/SECONDS` the time from one token to the next.
"""

import asyncio
import json
import re
import sys
from typing import Any

import uvloop

ASKS_FOR_STREAM = re.compile(rb'"stream":\s*true')
TOKENS = 16
CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "word " * TOKENS},
    "finish_reason": "length",
}
USAGE = {"prompt_tokens": 260, "completion_tokens": TOKENS, "total_tokens": 260 + TOKENS}
ANSWER = json.dumps(
    {"id": "c", "object": "chat.completion", "choices": [CHOICE], "usage": USAGE}
).encode()
METRICS = (
    b"vllm:num_requests_running 1.0\nvllm:num_requests_waiting 0.0\nvllm:kv_cache_usage_perc 0.1\n"
)
MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def plain(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def event(**fields: Any) -> bytes:
    data = b"data: " + json.dumps({"id": "c", "object": "chat.completion.chunk", **fields}).encode()
    return chunk(data + b"\n\n")


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


OK = plain(ANSWER)
ERROR_BODY = b'{"error":{"message":"the replica is broken"}}'
ERROR = plain(ERROR_BODY, "500 Internal Server Error")
TOKEN = event(choices=[{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
LAST = event(choices=[], usage=USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Behaviour:
    """How the replica behaves now."""

    mode = "ok"
    delay_s = 0.0
    each_s = 0.0

    def wait_s(self) -> float:
        """Return how long an answer takes."""
        return self.delay_s * (10.0 if self.mode == "slow" else 1.0)


class MockReplica(asyncio.Protocol):
    """One connection."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = content_length(self._received[:end])
            if len(self._received) < end + 4 + length:
                return
            head, body = self._received[:end], self._received[end + 4 : end + 4 + length]
            self._received = self._received[end + 4 + length :]
            self._take(head, body)

    def _take(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET "):
            self._transport.write(self._told(head.split(b" ", 2)[1].decode()))
            return
        wait_s = self._behaviour.wait_s()
        answer = self._plain
        if ASKS_FOR_STREAM.search(body):
            answer = self._stream
            if self._behaviour.mode == "prefill":
                answer = self._tokens
                self._transport.write(STREAM_HEAD)
        if wait_s:
            asyncio.get_running_loop().call_later(wait_s, answer)
        else:
            answer()

    def _told(self, path: str) -> bytes:
        _, name, *value = path.split("/")
        if name == "mode":
            self._behaviour.mode = value[0]
        elif name == "delay":
            self._behaviour.delay_s = float(value[0])
        elif name == "each":
            self._behaviour.each_s = float(value[0])
        if name == "metrics":
            return plain(METRICS, kind="text/plain")
        return plain(MODELS)

    def _plain(self) -> None:
        if self._transport.is_closing():
            return
        mode = self._behaviour.mode
        if mode == "garbage":
            self._transport.write(b"\x00\x01 what is this?\r\n\r\n")
        else:
            self._transport.write(ERROR if mode == "errors" else OK)

    def _stream(self) -> None:
        if self._transport.is_closing():
            return
        mode = self._behaviour.mode
        if mode in {"errors", "garbage"}:
            self._plain()
        else:
            self._transport.write(STREAM_HEAD)
            self._tokens()

    def _tokens(self, left: int = TOKENS) -> None:
        each_s = self._behaviour.each_s
        while left and not self._transport.is_closing():
            self._transport.write(TOKEN)
            left -= 1
            if self._behaviour.mode == "breaks" and left == TOKENS - 5:
                self._transport.close()
            if each_s:
                asyncio.get_running_loop().call_later(each_s, self._tokens, left)
                return
        if not self._transport.is_closing():
            self._transport.write(LAST)


def content_length(head: bytes) -> int:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def serve(port: int) -> None:
    behaviour = Behaviour()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: MockReplica(behaviour), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
