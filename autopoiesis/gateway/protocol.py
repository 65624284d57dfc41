"""Envoy's protocols in messages that are ready to send: external processor and access log.

The generated protobuf classes carry no types; all that is untyped is in this file.
"""

# pyright: reportAttributeAccessIssue=false
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson
from envoy.config.core.v3 import base_pb2
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.type.v3 import http_status_pb2
from google.protobuf import duration_pb2

from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.settings import (
    DECISION_NAMESPACE,
    ENDPOINT_KEY,
    ENDPOINT_NAMESPACE,
    PATIENCE_KEY,
)

Message = Any
"""A protobuf message."""

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
STREAM_ACCESS_LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
ACCESS_LOGS_TAKEN: bytes = als_pb2.StreamAccessLogsResponse().SerializeToString()
_ATTRIBUTES = "envoy.filters.http.ext_proc"


def _serialized(**fields: Any) -> bytes:
    return ext_proc.ProcessingResponse(**fields).SerializeToString()


GO_ON: dict[str, bytes] = {
    "request_headers": _serialized(request_headers=ext_proc.HeadersResponse()),
    "response_headers": _serialized(response_headers=ext_proc.HeadersResponse()),
    "request_body": _serialized(request_body=ext_proc.BodyResponse()),
    "response_body": _serialized(response_body=ext_proc.BodyResponse()),
    "request_trailers": _serialized(request_trailers=ext_proc.TrailersResponse()),
    "response_trailers": _serialized(response_trailers=ext_proc.TrailersResponse()),
}
"""Kind of message → the answer that changes nothing."""


def read_request(data: bytes) -> Message:
    """Read a message to the external processor."""
    return ext_proc.ProcessingRequest.FromString(data)


def read_entries(data: bytes) -> Message:
    """Read a message to the access log: its entries, one per request."""
    return als_pb2.StreamAccessLogsMessage.FromString(data).http_logs.log_entry


def attributes(message: Message) -> Mapping[str, Any]:
    """Return what Envoy was asked to tell beside the message (`config.ATTRIBUTES_...`)."""
    return message.attributes[_ATTRIBUTES].fields


def wait(limit_s: float) -> bytes:
    """Ask Envoy to wait longer for the answer to this message; possible once per message."""
    return _serialized(override_message_timeout=duration_pb2.Duration(seconds=int(limit_s)))


def choice(flight: Flight, addresses: tuple[str, ...], patience_s: int | None = None) -> bytes:
    """Answer where to send the request, in order; without addresses Envoy itself chooses.

    Where nothing has come after `patience_s`, Envoy asks the next one too, and takes who answers first.
    """
    answer = ext_proc.ProcessingResponse()
    decision = answer.dynamic_metadata.fields[DECISION_NAMESPACE].struct_value.fields
    decision["key"].string_value = flight.key
    decision["arm"].string_value = flight.arm_id
    decision["window"].number_value = flight.window
    decision["shard"].number_value = flight.shard
    # Messages written one behind the other are read as one, their maps joined.
    if patience_s is not None:
        decision[PATIENCE_KEY].string_value = str(1000 * patience_s)
    return _destination(addresses) + answer.SerializeToString()


@lru_cache(maxsize=4096)
def _destination(addresses: tuple[str, ...]) -> bytes:
    answer = ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())
    if addresses:
        lb = answer.dynamic_metadata.fields[ENDPOINT_NAMESPACE].struct_value
        lb.fields[ENDPOINT_KEY].string_value = ",".join(addresses)
    return answer.SerializeToString()


def refusal(
    status: int,
    body: dict[str, Any],
    headers: Mapping[str, str] | None = None,
    details: str = "picker",
) -> bytes:
    """Answer the client in place of a replica, with JSON; an answer that has begun is broken off.

    `details` is what the access log will tell of it.
    """
    options = [
        _header(name, value)
        for name, value in {"content-type": "application/json", **(headers or {})}.items()
    ]
    return _serialized(
        immediate_response=ext_proc.ImmediateResponse(
            status=http_status_pb2.HttpStatus(code=status),
            headers=ext_proc.HeaderMutation(set_headers=options),
            body=orjson.dumps(body),
            details=details,
        )
    )


def _header(name: str, value: str) -> Any:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, raw_value=value.encode()),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
