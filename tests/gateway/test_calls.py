"""gRPC calls to our server: by the official client, and by one that breaks the rules."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import hpack
import pytest
from hypothesis import HealthCheck as Check
from hypothesis import given, settings
from hypothesis import strategies as st

from autopoiesis.gateway import http2
from autopoiesis.gateway.calls import HEALTH, Call, HealthCheck, Server

LONGEST = 1 << 20
ECHO = "/test.Echo/Say"
CALMLY = settings(max_examples=60, deadline=None, suppress_health_check=[Check.too_slow])


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
    server.close()


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


# --- without a client that keeps the rules --------------------------------------------------------


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


@contextmanager
def connected() -> Iterator[tuple[http2.Connection, Wire]]:
    server = Server({ECHO: Echo}, LONGEST)
    connection, wire = server._connection(), Wire()
    connection.connection_made(wire)  # pyright: ignore[reportArgumentType]
    yield connection, wire
    connection.connection_lost(None)


HEADERS = hpack.Encoder().encode([(":method", "POST"), (":path", ECHO)])
OPEN = http2.frame(http2.HEADERS, http2.END_HEADERS, 1, HEADERS)
MESSAGE = b"\0\0\0\0\x02hi"


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found: list[tuple[int, int, int, bytes]] = []
    while data:
        high, low, kind, flags, stream = http2._HEAD.unpack_from(data)
        end = 9 + (high << 8 | low)
        found.append((kind, flags, stream, data[9:end]))
        data = data[end:]
    return found


def data_sent(wire: Wire) -> bytes:
    return b"".join(p for kind, _, _, p in frames(wire.written) if kind == http2.DATA)


@CALMLY
@given(st.lists(st.integers(1, 40)))
def test_it_does_not_matter_how_the_bytes_are_cut(cuts: list[int]):
    sent = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + OPEN
    sent += http2.frame(http2.DATA, http2.PADDED, 1, b"\x03" + MESSAGE[:4] + b"pad")
    sent += http2.frame(http2.DATA, 0, 1, MESSAGE[4:])
    with connected() as (connection, wire):
        for cut in cuts:
            connection.data_received(sent[:cut])
            sent = sent[cut:]
        connection.data_received(sent)
        assert data_sent(wire) == MESSAGE
        assert not wire.closed


def test_headers_may_come_in_pieces():
    pieces = http2.frame(http2.HEADERS, 0, 1, HEADERS[:3])
    pieces += http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, HEADERS[3:])
    with connected() as (connection, wire):
        connection.data_received(http2.PREFACE + pieces + http2.frame(http2.DATA, 0, 1, MESSAGE))
        assert data_sent(wire) == MESSAGE


def test_no_more_is_sent_than_the_window_allows():
    narrow = http2.frame(http2.SETTINGS, 0, 0, http2._SETTING.pack(4, 3))
    ask = http2.frame(http2.DATA, http2.END_STREAM, 1, MESSAGE)
    with connected() as (connection, wire):
        connection.data_received(http2.PREFACE + narrow + OPEN + ask)
        assert data_sent(wire) == MESSAGE[:3]
        connection.data_received(http2.frame(http2.WINDOW_UPDATE, 0, 1, b"\0\0\0\x02"))
        assert data_sent(wire) == MESSAGE[:5]
        connection.data_received(http2.frame(http2.SETTINGS, 0, 0, http2._SETTING.pack(4, 100)))
        assert data_sent(wire) == MESSAGE
        ended = [f for f in frames(wire.written) if f[0] == http2.HEADERS and f[1] & 1]
        assert len(ended) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        http2.PREFACE + http2.frame(http2.DATA, 0, 1, b"x"),
        http2.PREFACE + http2.frame(http2.HEADERS, http2.END_HEADERS, 2, HEADERS),
        http2.PREFACE + http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff\xff\xff\xff"),
        http2.PREFACE + http2.frame(http2.CONTINUATION, 4, 1, HEADERS),
        http2.PREFACE + http2.frame(http2.HEADERS, 0, 1, HEADERS) + OPEN,
        http2.PREFACE + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        http2.PREFACE + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f"),
        http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b"\x7f"),
        http2.PREFACE + http2.frame(http2.PUSH_PROMISE, 0, 1, b""),
        http2.PREFACE + OPEN + http2.frame(http2.DATA, http2.PADDED, 1, b"\x09x"),
        http2.PREFACE + b"\xff\xff\xff\0\0\0\0\0\x01",
    ],
)
def test_a_client_that_breaks_the_rules_is_hung_up_on(wrong: bytes):
    with connected() as (connection, wire):
        connection.data_received(wrong)
        assert wire.closed
        assert frames(wire.written)[-1][0] == http2.GOAWAY


@CALMLY
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10), st.integers(0, 255), st.integers(0, 5), st.binary(max_size=40)
        )
    )
)
def test_no_frames_whatever_make_it_fail(noise: list[tuple[int, int, int, bytes]]):
    with connected() as (connection, _):
        connection.data_received(http2.PREFACE + OPEN)
        for kind, flags, stream, payload in noise:
            connection.data_received(http2.frame(kind, flags, stream, payload))
