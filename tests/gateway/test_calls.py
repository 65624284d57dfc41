"""gRPC calls to our server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from autopoiesis.gateway.calls import HEALTH, Call, HealthCheck, Server

LONGEST = 1 << 20
ECHO = "/test.Echo/Say"


class Echo:
    """Says everything again; `lost` counts calls that were broken off."""

    lost = 0

    def __init__(self, call: Call) -> None:
        self.call = call

    def received(self, message: bytes) -> None:
        if message == b"fail":
            raise ZeroDivisionError
        self.call.send(message)

    def half_closed(self) -> None:
        self.call.end()

    def gone(self) -> None:
        Echo.lost += 1


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[grpc.aio.Channel]:
    server = Server(
        {
            ECHO: Echo,
            HEALTH: lambda call: HealthCheck(call, {"": lambda: True, "sad": lambda: False}),
        },
        LONGEST,
    )
    await server.listen_on_socket(path / "s")
    async with grpc.aio.insecure_channel(f"unix:{path / 's'}") as channel:
        yield channel
    await server.close()


async def say(channel: grpc.aio.Channel, *messages: bytes) -> list[bytes]:
    call: Any = channel.stream_stream(ECHO)(iter(messages))
    return [answer async for answer in call]


async def test_messages_of_any_length_come_back_in_order(tmp_path: Path):
    messages = [bytes([i]) * length for i, length in enumerate((0, 1, 16_379, 16_380, LONGEST, 7))]
    async with serving(tmp_path) as channel:
        assert await say(channel, *messages) == messages


async def test_many_calls_at_once_share_one_connection(tmp_path: Path):
    async with serving(tmp_path) as channel:
        spoken = [[str(i).encode() * (1 + i * 97), b"end"] for i in range(200)]
        assert await asyncio.gather(*(say(channel, *words) for words in spoken)) == spoken


@pytest.mark.parametrize(
    ("path", "message", "code"),
    [
        ("/test.Echo/Sing", b"x", grpc.StatusCode.UNIMPLEMENTED),
        (ECHO, b"fail", grpc.StatusCode.INTERNAL),
        (ECHO, b"x" * (LONGEST + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_call_that_cannot_be_answered_ends_with_its_code(
    tmp_path: Path, path: str, message: bytes, code: grpc.StatusCode
):
    async with serving(tmp_path) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await channel.unary_unary(path)(message)
        assert told.value.code() is code, told.value
        assert await say(channel, b"still here") == [b"still here"]


async def test_health_is_told(tmp_path: Path):
    async with serving(tmp_path) as channel:
        check = channel.unary_unary(HEALTH)
        assert await check(b"") == b"\x08\x01"
        assert await check(b"\x0a\x03sad") == b"\x08\x02"
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await check(b"\x0a\x03who")
        assert told.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_broken_off_call_is_noticed(tmp_path: Path):
    before = Echo.lost
    async with serving(tmp_path) as channel:
        call: Any = channel.stream_stream(ECHO)()
        await call.write(b"one")
        assert await call.read() == b"one"
        call.cancel()
        async with asyncio.timeout(5):
            while Echo.lost == before:
                await asyncio.sleep(0.01)
