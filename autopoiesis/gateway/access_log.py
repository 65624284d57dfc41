"""What Envoy's access log tells of a request's end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autopoiesis.gateway import protocol
from autopoiesis.gateway.calls import Call
from autopoiesis.gateway.load_report import TOLD_HEADER, LoadReport, read_load
from autopoiesis.gateway.protocol import Message
from autopoiesis.gateway.settings import (
    DECISION_NAMESPACE,
    INFERENCE_ROUTE,
    LONGEST_ID,
    USAGE_NAMESPACE,
)
from autopoiesis.telemetry.records import Status

_BROKEN_FLAGS = (
    "upstream_remote_reset",
    "upstream_connection_termination",
    "upstream_protocol_error",
    "local_reset",
    "stream_idle_timeout",
)
"""An answer that began well, but with one of these, did not end well."""
_GONE_FLAGS = ("downstream_connection_termination", "downstream_remote_reset")
STALLED = "replica_stalled"
"""What the picker tells Envoy, and Envoy here, of a stream that it ended."""
CLIENT_CLOSED = 499
"""Status of a request whose client went away before there was an answer, as nginx writes it."""


@dataclass(frozen=True, slots=True)
class Ending:
    """One request as Envoy saw it end. Times `_s` count from Envoy's `started_unix_s`."""

    key: str
    """The picker's name of the request, empty if it did not decide on it."""
    arm_id: str
    window: int
    shard: int
    request_id: str
    path: str
    status: Status
    http_status: int
    address: str
    """Of the replica that answered, empty if none."""
    attempts: int
    started_unix_s: float
    ended_s: float
    """The replica's last byte, else the end of the stream."""
    body_bytes: int
    input_tokens: int | None
    output_tokens: int | None
    load: LoadReport | None = None
    """What the replica said of its load when it answered."""


class AccessLog:
    """One call in which Envoy tells of requests that ended, for as long as it lives."""

    def __init__(
        self, call: Call, on_entries: Callable[[Message], None], on_end: Callable[[], None]
    ) -> None:
        self._call = call
        self._on_entries = on_entries
        self._on_end = on_end

    def received(self, message: bytes) -> None:
        """Hand on what it tells."""
        self._on_entries(protocol.read_entries(message))

    def half_closed(self) -> None:
        """Say goodbye."""
        self._call.send(protocol.ACCESS_LOGS_TAKEN)
        self._call.end()
        self._on_end()

    def gone(self) -> None:
        """Envoy is gone."""
        self._on_end()


def read_entry(entry: Message) -> Ending | None:
    """Read an entry; None if it is not about a request on which the picker decides."""
    common, response = entry.common_properties, entry.response
    namespaces = common.metadata.filter_metadata
    decision = namespaces[DECISION_NAMESPACE].fields if DECISION_NAMESPACE in namespaces else None
    if common.route_name != INFERENCE_ROUTE and decision is None:
        return None
    usage = namespaces[USAGE_NAMESPACE].fields if USAGE_NAMESPACE in namespaces else None
    status, http_status = _status(response.response_code.value, common.response_flags)
    if response.response_code_details == STALLED:
        status = Status.FAILED
    ended_s = _seconds(common.time_to_last_upstream_rx_byte) or _seconds(common.duration)
    socket = common.upstream_remote_address.socket_address
    return Ending(
        key=decision["key"].string_value if decision else "",
        arm_id=decision["arm"].string_value if decision else "",
        window=int(decision["window"].number_value) if decision else -1,
        shard=int(decision["shard"].number_value) if decision else -1,
        request_id=entry.request.request_id[:LONGEST_ID],
        path=(entry.request.original_path or entry.request.path).partition("?")[0],
        status=status,
        http_status=http_status,
        address=_address(socket.address, socket.port_value) if socket.port_value else "",
        attempts=common.upstream_request_attempt_count,
        started_unix_s=common.start_time.seconds + common.start_time.nanos * 1e-9,
        ended_s=ended_s,
        body_bytes=response.response_body_bytes,
        input_tokens=_count(usage, "prompt_tokens", "input_tokens", "stream_input_tokens"),
        output_tokens=_count(usage, "completion_tokens", "output_tokens", "stream_output_tokens"),
        load=read_load(response.response_headers[TOLD_HEADER])
        if TOLD_HEADER in response.response_headers
        else None,
    )


def _status(code: int, flags: Any) -> tuple[Status, int]:
    flagged = flags.ByteSize() > 0  # most often not, and then there is no need to look at each
    if flagged and any(getattr(flags, flag) for flag in _GONE_FLAGS):
        return Status.ABORTED, code or CLIENT_CLOSED
    if code == 0:
        return Status.ABORTED, CLIENT_CLOSED
    if code >= 500 or (flagged and any(getattr(flags, flag) for flag in _BROKEN_FLAGS)):
        return Status.FAILED, code
    return (Status.REJECTED if code >= 400 else Status.COMPLETED), code


def _count(usage: Any, *names: str) -> int | None:
    if usage:
        for name in names:
            if name in usage:
                return int(usage[name].number_value)
    return None


def _seconds(duration: Any) -> float:
    return duration.seconds + duration.nanos * 1e-9


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
