"""gRPC, the server's side: calls whose messages are bytes, answered by callbacks."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc

log = logging.getLogger(__name__)

HEALTH = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""`HealthCheckResponse` as it is sent."""
BREAK_S = 0.005
"""How long after the last message a call is known not to be broken off."""
GRACE_S = 0.5
"""How long calls may go on after the server was told to close."""

AWAITED = 16
"""Calls that may come at once without waiting for our thread."""

Code = grpc.StatusCode
core: Any = cygrpc
"""gRPC's core, as the library itself uses it: not a public interface, so its version is pinned."""


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


Service = Callable[["Call"], Caller]
"""Answers a new call with who is told its messages."""


class Call:
    """Our end of one call. Its methods are for the event loop; what begins with `_on` runs in the core's thread."""

    __slots__ = (
        "_caller",
        "_core",
        "_inside",
        "_opened",
        "_sending",
        "_server",
        "_service",
        "_status",
        "_unsent",
        "is_over",
    )

    def __init__(self, server: "Server", core: Any, service: Service) -> None:
        self.is_over = False
        """Ended by us or broken off; nothing more can be said."""
        self._server = server
        self._core = core
        self._service = service
        self._caller: Caller | None = None
        self._unsent: list[bytes] = []
        self._status: tuple[int, bytes] | None = None
        self._opened = False
        self._sending = False
        """The core has not yet taken what was said last."""
        self._inside = False
        """The caller is being told something: what it says is sent when it returns."""

    def send(self, message: bytes) -> None:
        """Send a message; in vain if the call is over."""
        if not self.is_over:
            self._unsent.append(message)
            if not self._inside:
                self._flush()

    def end(self, code: grpc.StatusCode = Code.OK, message: str = "") -> None:
        """End the call, once what was sent before has gone out."""
        if not self.is_over:
            self.is_over = True
            self._status = (code.value[0], message.encode())
            if not self._inside:
                self._flush()

    def begin(self) -> None:
        """Follow the call."""
        self._core.start_server_batch((core.ReceiveCloseOnServerOperation(0),), self._on_close)
        self._read()

    def _read(self) -> None:
        self._core.start_server_batch((core.ReceiveMessageOperation(0),), self._on_message)

    def _on_message(self, event: Any) -> None:
        message: bytes | None = event.batch_operations[0].message()
        if message is None:
            self._server.in_loop(self._no_more)
        else:
            self._server.in_loop(self._take, message)

    def _on_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self._server.in_loop(self._broken_off)

    def _on_sent(self, _: Any) -> None:
        with self._server.turn:
            self._sending = False
        self._flush()

    def _flush(self) -> None:
        """Hand what is unsent to the core, which takes one message at a time."""
        with self._server.turn:
            if self._sending or not (self._unsent or self._status):
                return
            operations: list[Any] = []
            if not self._opened:
                self._opened = True
                operations.append(core.SendInitialMetadataOperation(None, 0))
            if self._unsent:
                operations.append(core.SendMessageOperation(self._unsent.pop(0), 0))
            if self._status and not self._unsent:
                operations.append(core.SendStatusFromServerOperation(None, *self._status, 0))
                self._status = None
            self._sending = True
        self._core.start_server_batch(operations, self._on_sent)

    def _take(self, message: bytes) -> None:
        self._tell(message)
        if not self.is_over:
            self._read()

    def _no_more(self) -> None:
        """So says a call that is broken off, too, just before it tells."""
        asyncio.get_running_loop().call_later(BREAK_S, self._tell, None)

    def _broken_off(self) -> None:
        if not self.is_over:
            self.is_over = True
            if self._caller is not None:
                self._caller.gone()

    def _tell(self, message: bytes | None) -> None:
        if self.is_over:
            return
        self._inside = True
        try:
            if self._caller is None:
                self._caller = self._service(self)
            if message is None:
                self._caller.half_closed()
            else:
                self._caller.received(message)
        except Exception:
            log.exception("A message could not be answered")
            self.end(Code.INTERNAL, "the message could not be answered")
        finally:
            self._inside = False
            self._flush()


class Server:
    """Serves calls by their path, `/package.Service/Method`.

    gRPC's core is driven as the library's own blocking server drives it, but without a thread per
    call: one thread waits for the core, and the event loop is woken for messages only.
    """

    def __init__(self, services: Mapping[str, Service], longest_message: int) -> None:
        """A call with a message of more than `longest_message` bytes is refused."""
        self.turn = threading.Lock()
        """Held while the state of a call changes that both threads look at."""
        self._services = dict(services)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._for_loop: deque[tuple[Callable[..., None], tuple[bytes, ...]]] = deque()
        self._is_woken = False
        self._is_closing = False
        self._closed = asyncio.Event()
        options = (
            (b"grpc.max_receive_message_length", longest_message),
            (b"grpc.so_reuseport", 0),
            (b"grpc.max_concurrent_streams", 100_000),
            (b"grpc.http2.bdp_probe", 0),
        )
        self._queue: Any = core.CompletionQueue()
        self._core: Any = core.Server(options, False)
        self._core.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._follow, name="gRPC", daemon=True)

    async def listen_on_socket(self, path: Path) -> None:
        """Listen on a Unix socket."""
        path.unlink(missing_ok=True)
        self._listen(f"unix:{path}", None)

    async def listen_on_port(
        self, host: str, port: int, tls: tuple[bytes, bytes] | None = None
    ) -> int:
        """Listen on a TCP port (0: any) and return it; OSError if it is taken. `tls`: key and certificate, PEM."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials: Any = grpc.ssl_server_credentials([tls]) if tls else None
        return self._listen(address, credentials)

    async def close(self) -> None:
        """Listen no more and hang up."""
        if not self._thread.is_alive():
            return
        self._is_closing = True
        self._core.shutdown(self._queue, self._on_shutdown)
        try:
            await asyncio.wait_for(self._closed.wait(), GRACE_S)
        except TimeoutError:
            self._core.cancel_all_calls()
            await self._closed.wait()
        self._core.destroy()
        self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)

    def in_loop(self, act: Callable[..., None], *given: bytes) -> None:
        """Have the event loop do something, in the order in which it was asked."""
        self._for_loop.append((act, given))
        if not self._is_woken:
            self._is_woken = True
            assert self._loop
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._do_all)

    def _listen(self, address: str, credentials: Any) -> int:
        self._loop = asyncio.get_running_loop()
        secret = (credentials._credentials,) if credentials else ()  # noqa: SLF001
        try:
            taken: int = self._core.add_http2_port(address.encode(), *secret)
        except RuntimeError as error:
            raise OSError(str(error)) from None
        if not taken:
            raise OSError(f"cannot listen on {address}")
        self._core.start()
        for _ in range(AWAITED):
            self._await_call()
        self._thread.start()
        return taken

    def _do_all(self) -> None:
        self._is_woken = False  # first: what comes from now on wakes again
        while self._for_loop:
            act, given = self._for_loop.popleft()
            act(*given)

    def _follow(self) -> None:
        """Wait for the core, until it has nothing more to tell."""
        while (event := self._queue.poll()).completion_type != core.CompletionType.queue_shutdown:
            try:
                event.tag(event)
            except Exception:
                log.exception("An event of gRPC's core could not be followed")
            del event  # it holds the call

    def _await_call(self) -> None:
        self._core.request_call(self._queue, self._queue, self._on_call)

    def _on_call(self, event: Any) -> None:
        if self._is_closing or not event.success:
            return
        self._await_call()
        path = event.call_details.method.decode()
        service = self._services.get(path)
        call = Call(self, event.call, service or _nobody)
        if service:
            call.begin()
        else:
            call.end(Code.UNIMPLEMENTED, f"{path} is not served")

    def _on_shutdown(self, _: Any) -> None:
        assert self._loop
        self._loop.call_soon_threadsafe(self._closed.set)


def _nobody(_: Call) -> Caller:
    raise NotImplementedError


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
