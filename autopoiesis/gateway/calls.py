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
BREAK_S = 0.005
"""How long after the last message a call is known not to be broken off."""
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

    __slots__ = ("_context", "_inside", "_late", "_serving", "_status", "_unsent", "is_over")

    def __init__(self, context: Any) -> None:
        self.is_over = False
        """Ended by us or broken off; nothing more can be said."""
        self._context = context
        self._unsent: list[bytes] = []
        self._status = (Code.OK, "")
        self._inside = False
        """The caller is being told something: what it says is sent when it returns."""
        self._serving: asyncio.Task[Any] | None = None
        self._late: asyncio.Task[None] | None = None

    def send(self, message: bytes) -> None:
        """Send a message; in vain if the call is over."""
        if not self.is_over:
            self._unsent.append(message)
            self._soon()

    def end(self, code: grpc.StatusCode = Code.OK, message: str = "") -> None:
        """End the call, once what was sent before has gone out."""
        if not self.is_over:
            self.is_over = True
            self._status = (code, message)
            self._soon()

    def header(self, name: str) -> str | None:
        """Return what the other side said at the call's beginning, None if it did not."""
        return dict(self._context.invocation_metadata() or ()).get(name)

    async def serve(self, caller: Caller) -> None:
        """Hand on what comes in, send what the caller says, until either side ends the call."""
        self._serving = asyncio.current_task()
        try:
            while not self.is_over:
                message = await self._context.read()
                if message is _END:  # so says a call that is broken off, too, just before it tells
                    await asyncio.sleep(BREAK_S)
                self._tell(caller, None if message is _END else message)
                await self._send_all()
                if message is _END and not self.is_over:
                    await asyncio.Event().wait()  # until `end`, which ends this wait too
        except asyncio.CancelledError:
            if not self.is_over:  # by the other side
                raise
        finally:
            if not self.is_over:
                self.is_over = True
                caller.gone()
        if self._late is not None:
            await self._late
        self._context.set_code(self._status[0])
        self._context.set_details(self._status[1])

    def _soon(self) -> None:
        """Send what was said while the other side was silent."""
        if not self._inside and self._late is None:
            self._late = asyncio.ensure_future(self._send_late())

    async def _send_late(self) -> None:
        with suppress(grpc.aio.BaseError):  # the call is broken off, as its reader learns
            await self._send_all()
        if self.is_over and self._serving is not None:
            self._serving.cancel()
        else:
            self._late = None

    async def _send_all(self) -> None:
        while self._unsent:
            await self._context.write(self._unsent.pop(0))

    def _tell(self, caller: Caller, message: bytes | None) -> None:
        self._inside = True
        try:
            if message is None:
                caller.half_closed()
            else:
                caller.received(message)
        except Exception:
            log.exception("A message could not be answered")
            self.end(Code.INTERNAL, "the message could not be answered")
        finally:
            self._inside = False


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
        call = Call(context)
        with suppress(grpc.aio.BaseError):  # the other side is gone; the caller was told
            await call.serve(service(call))

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
