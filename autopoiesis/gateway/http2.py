"""HTTP/2 (RFC 9113), the server's side, for calls between processes that know each other.

Written for one thing: to answer a proxy's gRPC calls with as little work per call as Python allows.
A stream is a pair of objects that call each other; there are no tasks and no queues. Both header
tables are kept empty, so a block of headers that came before is known by its bytes.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Protocol

import hpack

Headers = dict[bytes, bytes]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_BYTES = 16_384
"""Longest frame either side sends."""
MOST_STREAMS = 100_000
DEFAULT_WINDOW, LARGEST_WINDOW = 65_535, (1 << 31) - 1
LONGEST_HEADERS = 1 << 18
MOST_KNOWN_BLOCKS = 256

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 3, 4
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, CANCEL = 0, 1, 3, 6, 8
COMPRESSION_ERROR = 9

_HEAD = struct.Struct(">HBBBI")
"""Of a frame: length (16 and 8 bits), type, flags, stream."""
_SETTING = struct.Struct(">HI")
_WORD = struct.Struct(">I")
_EMPTY_TABLE = b"\x20"
"""HPACK: from here on the sender's table has no room."""


class ConnectionFault(Exception):  # noqa: N818 - the other side's, not ours
    """The other side broke the protocol; `code` is HTTP/2's name for how."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Receiver(Protocol):
    """Who is told what comes in on a stream."""

    def data(self, data: bytes) -> None:
        """Take a part of the other side's body."""
        ...

    def ended(self) -> None:
        """The other side has said all; we may go on."""
        ...

    def gone(self) -> None:
        """The stream was reset or its connection lost before we ended it."""
        ...


Opener = Callable[["Stream", Headers], Receiver]
"""Answers a new stream's headers with who receives the rest of it."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame as it is sent."""
    length = len(payload)
    return _HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def literals(headers: dict[str, str]) -> bytes:
    """Write headers (HPACK) so that the reader need remember nothing; each text below 127 bytes."""
    block = b""
    for name, value in headers.items():
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


class Stream:
    """Our end of one stream."""

    __slots__ = ("_connection", "_trailers", "_unsent", "_window", "id", "receiver")

    def __init__(self, connection: "Connection", stream_id: int, window: int) -> None:
        self.id = stream_id
        self.receiver: Receiver | None = None
        self._connection = connection
        self._window = window
        self._unsent = bytearray()
        self._trailers: bytes | None = None

    def headers(self, block: bytes) -> None:
        """Begin to answer; `block` is what `literals` makes."""
        self._connection.write_headers(self.id, block, END_HEADERS)

    def write(self, data: bytes) -> None:
        """Send a part of our body, as soon as the other side lets us."""
        connection, length = self._connection, len(data)
        if self._unsent or length > min(FRAME_BYTES, connection.window, self._window):
            self._unsent += data
            self.flush()
            return
        connection.window -= length
        self._window -= length
        connection.write(_HEAD.pack(length >> 8, length & 0xFF, DATA, 0, self.id) + data)

    def end(self, trailers: bytes) -> None:
        """Say that this was all, with a last block of headers."""
        self._trailers = trailers
        if not self._unsent:
            self._end()

    def flush(self) -> None:
        """Send what may be sent now."""
        connection = self._connection
        while self._unsent:
            length = min(len(self._unsent), FRAME_BYTES, connection.window, self._window)
            if length <= 0:
                connection.blocked[self.id] = self
                return
            connection.window -= length
            self._window -= length
            connection.write(frame(DATA, 0, self.id, bytes(self._unsent[:length])))
            del self._unsent[:length]
        connection.blocked.pop(self.id, None)
        if self._trailers is not None:
            self._end()

    def allow(self, more: int) -> None:
        """Widen (or narrow) what may be sent."""
        self._window += more
        if self._window > LARGEST_WINDOW:
            raise ConnectionFault(FLOW_CONTROL_ERROR, "a window is too wide")

    def _end(self) -> None:
        assert self._trailers is not None
        self._connection.write_headers(self.id, self._trailers, END_HEADERS | END_STREAM)
        self._connection.forget(self.id)


class Connection(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, opener: Opener, connections: "set[Connection]") -> None:
        """Hand new streams to `opener`; keep this connection in `connections` while it lasts."""
        self.window = DEFAULT_WINDOW
        self.blocked: dict[int, Stream] = {}
        self._opener = opener
        self._connections = connections
        self._streams: dict[int, Stream] = {}
        self._rest = b""
        self._greeted = False
        self._last_stream = 0
        self._stream_window = DEFAULT_WINDOW
        self._received = 0
        self._block: tuple[int, int, bytes] | None = None
        """Stream, flags and beginning of headers that go on in the next frame."""
        self._prefix = _EMPTY_TABLE
        self._decoder: Any = hpack.Decoder(max_header_list_size=LONGEST_HEADERS)
        self._known: dict[bytes, Headers] = {}

    # --- the transport ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say what we take."""
        self._transport: Any = transport
        self._connections.add(self)
        settings = ((HEADER_TABLE_SIZE, 0), (MAX_CONCURRENT_STREAMS, MOST_STREAMS))
        settings = (*settings, (INITIAL_WINDOW_SIZE, LARGEST_WINDOW))
        told = frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in settings))
        self.write(told + _window_update(LARGEST_WINDOW - DEFAULT_WINDOW))

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        buffer = self._rest + data if self._rest else data
        try:
            self._rest = buffer[self._take_frames(buffer) :]
        except ConnectionFault as fault:
            self.write(frame(GOAWAY, 0, 0, _WORD.pack(self._last_stream) + _WORD.pack(fault.code)))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason is all one
        """Tell every stream."""
        self._connections.discard(self)
        streams, self._streams = self._streams, {}
        self.blocked.clear()
        for stream in streams.values():
            if stream.receiver:
                stream.receiver.gone()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Hang up."""
        self.write(frame(GOAWAY, 0, 0, _WORD.pack(self._last_stream) + _WORD.pack(NO_ERROR)))
        self._transport.close()

    # --- what streams ask of it ---------------------------------------------------------------

    def write_headers(self, stream: int, block: bytes, flags: int) -> None:
        """Send a block of headers."""
        self.write(frame(HEADERS, flags, stream, self._prefix + block))
        self._prefix = b""

    def forget(self, stream: int) -> None:
        """Listen no longer to a stream; what still comes on it is dropped."""
        self._streams.pop(stream, None)
        self.blocked.pop(stream, None)

    # --- what comes in ------------------------------------------------------------------------

    def _take_frames(self, buffer: bytes) -> int:
        at = 0
        if not self._greeted:
            if not PREFACE.startswith(buffer[: len(PREFACE)]):
                raise ConnectionFault(PROTOCOL_ERROR, "this is not HTTP/2")
            if len(buffer) < len(PREFACE):
                return 0
            self._greeted, at = True, len(PREFACE)
        available = len(buffer)
        while available - at >= 9:
            high, low, kind, flags, stream = _HEAD.unpack_from(buffer, at)
            length = high << 8 | low
            if length > FRAME_BYTES:
                raise ConnectionFault(FRAME_SIZE_ERROR, "a frame is too long")
            end = at + 9 + length
            if end > available:
                break
            self._take(kind, flags, stream & LARGEST_WINDOW, buffer[at + 9 : end])
            at = end
        return at

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise ConnectionFault(PROTOCOL_ERROR, "headers were not ended")
        if kind == DATA:
            self._take_data(flags, stream, payload)
        elif kind == HEADERS:
            payload = _unpadded(flags, payload)
            self._take_headers(flags, stream, payload[5:] if flags & PRIORITISED else payload)
        elif kind == CONTINUATION:
            if self._block is None or self._block[0] != stream:
                raise ConnectionFault(PROTOCOL_ERROR, "headers go on that were not begun")
            _, first_flags, begun = self._block
            self._block = None
            self._take_headers(first_flags | flags & END_HEADERS, stream, begun + payload)
        elif kind == RST_STREAM:
            if (known := self._streams.get(stream)) is not None:
                self.forget(stream)
                if known.receiver:
                    known.receiver.gone()
        elif kind == WINDOW_UPDATE:
            self._widen(stream, _word(payload) & LARGEST_WINDOW)
        elif kind == SETTINGS:
            self._take_settings(flags, payload)
        elif kind == PING:
            if not flags & ACK:
                self.write(frame(PING, ACK, 0, payload))
        elif kind == PUSH_PROMISE:
            raise ConnectionFault(PROTOCOL_ERROR, "a client does not push")

    def _take_data(self, flags: int, stream: int, payload: bytes) -> None:
        self._received += len(payload)
        if self._received > LARGEST_WINDOW // 2:
            self.write(_window_update(self._received))
            self._received = 0
        known = self._streams.get(stream)
        if known is None or known.receiver is None:
            if stream > self._last_stream or not stream:
                raise ConnectionFault(PROTOCOL_ERROR, "data on a stream that was not opened")
            return
        known.receiver.data(_unpadded(flags, payload))
        if flags & END_STREAM and stream in self._streams:
            known.receiver.ended()

    def _take_headers(self, flags: int, stream: int, block: bytes) -> None:
        if not flags & END_HEADERS:
            if len(block) > LONGEST_HEADERS:
                raise ConnectionFault(PROTOCOL_ERROR, "the headers are too long")
            self._block = (stream, flags, block)
            return
        headers = self._decoded(block)
        known = self._streams.get(stream)
        if stream > self._last_stream and stream & 1:
            self._last_stream = stream
            known = self._streams[stream] = Stream(self, stream, self._stream_window)
            known.receiver = self._opener(known, headers)
        elif stream > self._last_stream or not stream & 1:
            raise ConnectionFault(PROTOCOL_ERROR, "a client's streams have odd numbers")
        if flags & END_STREAM and known and known.receiver and stream in self._streams:
            known.receiver.ended()

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            self._decoder.max_allowed_table_size = 0
            return
        if len(payload) % _SETTING.size:
            raise ConnectionFault(FRAME_SIZE_ERROR, "settings are cut off")
        for name, value in _SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                more, self._stream_window = value - self._stream_window, value
                for stream in self._streams.values():
                    stream.allow(more)
        self.write(frame(SETTINGS, ACK, 0))
        self._flush()

    def _widen(self, stream: int, more: int) -> None:
        if stream == 0:
            self.window += more
            if self.window > LARGEST_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "the window is too wide")
            self._flush()
        elif (known := self._streams.get(stream)) is not None:
            known.allow(more)
            known.flush()

    def _flush(self) -> None:
        for stream in list(self.blocked.values()):
            stream.flush()

    def _decoded(self, block: bytes) -> Headers:
        if (headers := self._known.get(block)) is not None:
            return headers
        try:
            headers = dict(self._decoder.decode(block, raw=True))
        except hpack.HPACKError as error:
            raise ConnectionFault(COMPRESSION_ERROR, str(error)) from None
        # With an empty table the same bytes always mean the same.
        if self._decoder.header_table_size == 0 and len(self._known) < MOST_KNOWN_BLOCKS:
            self._known[block] = headers
        return headers


def _window_update(more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, 0, _WORD.pack(more))


def _word(payload: bytes) -> int:
    if len(payload) != _WORD.size:
        raise ConnectionFault(FRAME_SIZE_ERROR, "a number is cut off")
    return _WORD.unpack(payload)[0]


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "there is more padding than frame")
    return payload[1 : len(payload) - payload[0]]
