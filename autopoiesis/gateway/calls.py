"""gRPC, the server's side: calls whose messages are bytes, answered by callbacks, over `http2`."""

import asyncio
import logging
import ssl
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from autopoiesis.gateway.http2 import Connection, Headers, Receiver, Stream, literals

log = logging.getLogger(__name__)

_PREFIX = struct.Struct(">BI")
"""Of a message: whether it is compressed, its length."""
_RESPONSE = literals({"content-type": "application/grpc"})
_RESPONSE_HEADERS = b"\x88" + _RESPONSE
"""Status 200, from HPACK's static table, and the content type."""
HEALTH = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""`HealthCheckResponse` as it is sent."""


class Code(IntEnum):
    """gRPC's status codes, as far as they are used here."""

    OK = 0
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13


class Caller(Protocol):
    """Who is told what the other side of a call says."""

    def received(self, message: bytes) -> None:
        """Take a message."""
        ...

    def half_closed(self) -> None:
        """The other side will send no more."""
        ...

    def gone(self) -> None:
        """The call was broken off before we ended it."""
        ...


class Call:
    """Our end of one call."""

    __slots__ = ("_caller", "_longest_message", "_partial", "_started", "_stream", "is_over")

    def __init__(self, stream: Stream, longest_message: int) -> None:
        self.is_over = False
        """Ended by us or broken off; nothing more can be said."""
        self._stream = stream
        self._started = False
        self._partial = bytearray()
        self._longest_message = longest_message
        self._caller: Caller | None = None

    def answered_by(self, caller: Caller) -> "Call":
        """Tell `caller` what comes in."""
        self._caller = caller
        return self

    def send(self, message: bytes) -> None:
        """Send a message; in vain if the call is over."""
        if self.is_over:
            return
        if not self._started:
            self._started = True
            self._stream.headers(_RESPONSE_HEADERS)
        self._stream.write(_PREFIX.pack(0, len(message)) + message)

    def end(self, code: Code = Code.OK, message: str = "") -> None:
        """End the call."""
        if self.is_over:
            return
        self.is_over = True
        trailers = _OK if code is Code.OK else _trailers(code, message)
        self._stream.end(trailers if self._started else _RESPONSE_HEADERS + trailers)

    # --- what the stream tells ----------------------------------------------------------------

    def data(self, data: bytes) -> None:
        """Put messages together from parts."""
        if self.is_over:
            return
        if not self._partial and len(data) >= 5:
            compressed, length = _PREFIX.unpack_from(data)
            if length == len(data) - 5 and not compressed:
                self._tell(data[5:])
                return
        self._partial += data
        while len(self._partial) >= 5 and not self.is_over:
            compressed, length = _PREFIX.unpack_from(self._partial)
            if compressed:
                self.end(Code.UNIMPLEMENTED, "messages must not be compressed")
            elif length > self._longest_message:
                self.end(Code.RESOURCE_EXHAUSTED, f"a message of {length} bytes is too long")
            elif len(self._partial) < 5 + length:
                return
            else:
                message = bytes(self._partial[5 : 5 + length])
                del self._partial[: 5 + length]
                self._tell(message)

    def ended(self) -> None:
        """The other side will send no more."""
        if self._caller and not self.is_over:
            self._caller.half_closed()

    def gone(self) -> None:
        """The other side broke off, or is gone itself."""
        if not self.is_over:
            self.is_over = True
            if self._caller:
                self._caller.gone()

    def _tell(self, message: bytes) -> None:
        assert self._caller
        try:
            self._caller.received(message)
        except Exception:
            log.exception("A message could not be answered")
            self.end(Code.INTERNAL, "the message could not be answered")


def _trailers(code: Code, message: str = "") -> bytes:
    told = {"grpc-message": quote(message)[:120]} if message else {}
    return literals({"grpc-status": str(int(code)), **told})


_OK = _trailers(Code.OK)

Service = Callable[[Call], Caller]
"""Answers a new call with who is told its messages."""


class Server:
    """Serves calls by their path, `/package.Service/Method`."""

    def __init__(self, services: Mapping[str, Service], longest_message: int) -> None:
        """A call with a message of more than `longest_message` bytes is refused."""
        self._services = {path.encode(): service for path, service in services.items()}
        self._longest_message = longest_message
        self._connections: set[Connection] = set()
        self._listeners: list[asyncio.Server] = []

    async def listen_on_socket(self, path: Path) -> None:
        """Listen on a Unix socket."""
        path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_unix_server(self._connection, str(path)))

    async def listen_on_port(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen on a TCP port (0: any) and return it; OSError if it is taken."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(self._connection, host, port, ssl=tls)
        self._listeners.append(listener)
        return int(listener.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Listen no more and hang up."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.close()

    def _connection(self) -> Connection:
        return Connection(self._open, self._connections)

    def _open(self, stream: Stream, headers: Headers) -> Receiver:
        call = Call(stream, self._longest_message)
        service = self._services.get(headers.get(b":path", b""))
        if service is None:
            call.end(Code.UNIMPLEMENTED, "there is no such method")
        else:
            call.answered_by(service(call))
        return call


class HealthCheck:
    """`grpc.health.v1.Health/Check`: a service is serving as long as it says so itself."""

    def __init__(self, call: Call, services: Mapping[str, Callable[[], bool]]) -> None:
        """`services` tells by name who is asked; `""` is the server as a whole."""
        self._call = call
        self._services = services

    def received(self, message: bytes) -> None:
        """Answer."""
        name = message[2:].decode("utf-8", "replace")  # one field, a text shorter than 128 bytes
        is_serving = self._services.get(name)
        if is_serving is None:
            self._call.end(Code.NOT_FOUND, "there is no such service")
            return
        self._call.send(SERVING if is_serving() else NOT_SERVING)
        self._call.end()

    def half_closed(self) -> None:
        """The question came before, or is none."""

    def gone(self) -> None:
        """Nothing is lost."""
