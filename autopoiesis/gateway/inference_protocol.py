"""The messages of the Inference Extension's endpoint picker protocol, read and ready to send.

The generated protobuf classes carry no types; what is untyped is here and in `protocol`.
"""

# pyright: reportAttributeAccessIssue=false
from collections.abc import Iterator
from enum import Enum
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from autopoiesis.gateway.protocol import Message
from autopoiesis.gateway.settings import ENDPOINT_KEY, ENDPOINT_NAMESPACE

SUBSET_NAMESPACE, SUBSET_KEY = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
SERVED_KEY = "x-gateway-destination-endpoint-served"
CHUNK_BYTES = 62_000
"""Longest part of a body in one message; proxies bound what they take at 64 KiB."""


class BodyMode(Enum):
    """How a body comes, and so how it is answered."""

    NONE = "none"
    """It does not come, or not before the headers go on."""
    BUFFERED = "buffered"
    """In one message, which changes nothing of it."""
    FULL_DUPLEX = "full duplex"
    """In parts; what is to go on must be sent back."""


def request_mode(told: Message) -> BodyMode:
    """Return how the request's body will come, from the first message of a call."""
    return _mode(told, "request_body_mode")


def answer_mode(told: Message) -> BodyMode:
    """Return how the answer's body will come, from the first message of a call."""
    mode = _mode(told, "response_body_mode")
    return BodyMode.BUFFERED if mode is BodyMode.NONE else mode


def _mode(told: Message, name: str) -> BodyMode:
    if not told.HasField("protocol_config"):
        return BodyMode.BUFFERED
    number = getattr(told.protocol_config, name)
    return {2: BodyMode.BUFFERED, 3: BodyMode.BUFFERED, 4: BodyMode.FULL_DUPLEX}.get(
        number, BodyMode.NONE
    )


def headers(told: Message) -> dict[str, str]:
    """Return headers by their lower-case names; of several with one name the first."""
    found: dict[str, str] = {}
    for header in told.headers.headers:
        value = header.raw_value.decode("utf-8", "replace") if header.raw_value else header.value
        found.setdefault(header.key, value)
    return found


def subset(told: Message) -> frozenset[str] | None:
    """Return the addresses among which the gateway lets us choose; None: among all."""
    namespaces = told.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in namespaces or SUBSET_KEY not in namespaces[SUBSET_NAMESPACE].fields:
        return None
    value = namespaces[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    if value.WhichOneof("kind") == "string_value":
        listed = value.string_value.split(",")
    else:
        listed = [item.string_value for item in value.list_value.values]
    return frozenset(address.strip() for address in listed if address.strip())


def served(told: Message) -> str:
    """Return the address of the replica that answered, empty if the gateway does not tell."""
    namespaces = told.metadata_context.filter_metadata
    if ENDPOINT_NAMESPACE not in namespaces:
        return ""
    fields = namespaces[ENDPOINT_NAMESPACE].fields
    return fields[SERVED_KEY].string_value if SERVED_KEY in fields else ""


def destination(addresses: tuple[str, ...], mode: BodyMode) -> bytes:
    """Answer where to send the request, in order: in the header and, the same, in the metadata."""
    told = ",".join(addresses)
    option = base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=ENDPOINT_KEY, raw_value=told.encode()),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    common = ext_proc.CommonResponse(
        clear_route_cache=True, header_mutation=ext_proc.HeaderMutation(set_headers=[option])
    )
    if mode is BodyMode.BUFFERED:
        answer = ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=common))
    else:
        answer = ext_proc.ProcessingResponse(
            request_headers=ext_proc.HeadersResponse(response=common)
        )
    fields = answer.dynamic_metadata.fields[ENDPOINT_NAMESPACE].struct_value.fields
    fields[ENDPOINT_KEY].string_value = told
    return answer.SerializeToString()


def body_back(body: bytes) -> Iterator[bytes]:
    """Answer a whole request body with itself, in parts."""
    for at in range(0, max(len(body), 1), CHUNK_BYTES):
        part = body[at : at + CHUNK_BYTES]
        yield _streamed("request_body", part, at + CHUNK_BYTES >= len(body))


def answer_on(body: Message) -> Iterator[bytes]:
    """Answer a part of an answer's body with itself."""
    data: bytes = body.body
    for at in range(0, max(len(data), 1), CHUNK_BYTES):
        is_last = at + CHUNK_BYTES >= len(data)
        part = data[at : at + CHUNK_BYTES]
        yield _streamed("response_body", part, is_last and body.end_of_stream)


def _streamed(kind: str, body: bytes, is_last: bool) -> bytes:
    part = ext_proc.StreamedBodyResponse(body=body, end_of_stream=is_last)
    mutation = ext_proc.BodyMutation(streamed_response=part)
    response = ext_proc.BodyResponse(response=ext_proc.CommonResponse(body_mutation=mutation))
    fields: dict[str, Any] = {kind: response}
    return ext_proc.ProcessingResponse(**fields).SerializeToString()
