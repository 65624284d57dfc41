"""gRPC, the server's side: calls whose messages are bytes, answered by callbacks."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

log = logging.getLogger(__name__)

HEALTH = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""`HealthCheckResponse` as it is sent."""
GRACE_S = 0.5
"""How long calls may go on after the server was told to close."""

Code = grpc.StatusCode
_END: object = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue] - the stubs lack it


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

    __slots__ = ("_changed", "_status", "_unsent", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        """Ended by us or broken off; nothing more can be said."""
        self._unsent: list[bytes] = []
        self._status = (Code.OK, "")
        self._changed = asyncio.Event()

    def send(self, message: bytes) -> None:
        """Send a message; in vain if the call is over."""
        if not self.is_over:
            self._unsent.append(message)
            self._changed.set()

    def end(self, code: grpc.StatusCode = Code.OK, message: str = "") -> None:
        """End the call, once what was sent before has gone out."""
        if not self.is_over:
            self.is_over = True
            self._status = (code, message)
            self._changed.set()

    async def serve(self, caller: Caller, context: Any) -> None:
        """Hand on what comes in, send what the caller says, until either side ends the call."""
        reading = self._read(context)
        try:
            while not self.is_over:
                await self._changed.wait()
                self._changed.clear()
                if reading is not None and reading.done():
                    message = reading.result()
                    more = message is not _END
                    self._tell(caller, message if more else None)
                    reading = self._read(context) if more and not self.is_over else None
                await self._send_all(context)
            await self._send_all(context)
            context.set_code(self._status[0])
            context.set_details(self._status[1])
        finally:
            if reading is not None:
                reading.cancel()
            if not self.is_over:
                self.is_over = True
                caller.gone()

    def _read(self, context: Any) -> asyncio.Future[Any]:
        reading = asyncio.ensure_future(context.read())
        reading.add_done_callback(self._has_read)
        return reading

    def _has_read(self, _: asyncio.Future[Any]) -> None:
        self._changed.set()

    async def _send_all(self, context: Any) -> None:
        while self._unsent:
            await context.write(self._unsent.pop(0))

    def _tell(self, caller: Caller, message: bytes | None) -> None:
        try:
            if message is None:
                caller.half_closed()
            else:
                caller.received(message)
        except Exception:
            log.exception("A message could not be answered")
            self.end(Code.INTERNAL, "the message could not be answered")


Service = Callable[[Call], Caller]
"""Answers a new call with who is told its messages."""


class Server(grpc.GenericRpcHandler):
    """Serves calls by their path, `/package.Service/Method`."""

    def __init__(self, services: Mapping[str, Service], longest_message: int) -> None:
        """A call with a message of more than `longest_message` bytes is refused."""
        self._handlers = {path: _handler(service) for path, service in services.items()}
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", longest_message),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 100_000),
            ]
        )
        self._server.add_generic_rpc_handlers((self,))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return who serves a path, None if nobody does."""
        return self._handlers.get(handler_call_details.method)

    async def listen_on_socket(self, path: Path) -> None:
        """Listen on a Unix socket."""
        path.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{path}")
        await self._server.start()

    async def listen_on_port(
        self, host: str, port: int, tls: tuple[bytes, bytes] | None = None
    ) -> int:
        """Listen on a TCP port (0: any) and return it; OSError if it is taken. `tls`: key and certificate, PEM."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls:
                credentials = grpc.ssl_server_credentials([tls])
                taken = self._server.add_secure_port(address, credentials)
            else:
                taken = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(str(error)) from None
        await self._server.start()
        return taken

    async def close(self) -> None:
        """Listen no more and hang up."""
        await self._server.stop(GRACE_S)


def _handler(service: Service) -> Any:
    async def serve(_: Any, context: Any) -> None:
        call = Call()
        with suppress(grpc.aio.BaseError):  # the other side is gone; the caller was told
            await call.serve(service(call), context)

    return grpc.stream_stream_rpc_method_handler(serve)


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
