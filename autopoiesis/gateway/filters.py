"""What happens to a request and its answer on the way: Envoy's filters, in order."""

from collections.abc import Sequence

from autopoiesis.gateway.models import Fleet, model_filters
from autopoiesis.gateway.resource import (
    BODY_LIMIT,
    EXT_PROC,
    READ_JSON,
    READ_STREAM,
    Config,
    seconds,
    typed,
)
from autopoiesis.gateway.settings import (
    DECISION_NAMESPACE,
    ENDPOINT_NAMESPACE,
    LONGEST_HOLD_S,
    PATIENCE_HEADER,
    PATIENCE_KEY,
    SESSION_HEADER,
    USAGE_NAMESPACE,
    DataPlaneSettings,
)

USAGE_PATHS = {
    "prompt_tokens": ("usage", "prompt_tokens"),
    "completion_tokens": ("usage", "completion_tokens"),
    "input_tokens": ("usage", "input_tokens"),
    "output_tokens": ("usage", "output_tokens"),
    "stream_input_tokens": ("response", "usage", "input_tokens"),
    "stream_output_tokens": ("response", "usage", "output_tokens"),
    "cached_tokens": ("usage", "prompt_tokens_details", "cached_tokens"),
}
"""Metadata key → where the number stands in an answer (completions, then the responses API)."""

ATTRIBUTES_OF_REQUEST = (
    "request.path",
    "request.id",
    "request.headers['content-type']",
    f"request.headers['{SESSION_HEADER}']",
)
ATTRIBUTES_OF_ANSWER = ("response.code", "upstream.address")


def filters(settings: DataPlaneSettings, fleets: Sequence[Fleet]) -> list[Config]:
    """Return the filters."""
    return [
        *model_filters(fleets),
        typed(
            EXT_PROC,
            "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            grpc_service={"envoy_grpc": {"cluster_name": fleets[0].picker}},
            failure_mode_allow=True,
            message_timeout=seconds(settings.picker_timeout_s),
            max_message_timeout=seconds(LONGEST_HOLD_S),
            request_attributes=list(ATTRIBUTES_OF_REQUEST),
            response_attributes=list(ATTRIBUTES_OF_ANSWER),
            metadata_options={
                "receiving_namespaces": {"untyped": [ENDPOINT_NAMESPACE, DECISION_NAMESPACE]}
            },
            # What no route takes is none of its business; the routes say what is.
            processing_mode={"request_header_mode": "SKIP", "response_header_mode": "SKIP"},
            forward_rules={"allowed_headers": {"patterns": [{"exact": ":status"}]}},
        ),
        # The headers wait here for the body, and with it for the picker's answer.
        typed(
            BODY_LIMIT,
            "extensions.filters.http.buffer.v3.Buffer",
            max_request_bytes=settings.max_body_bytes,
        ),
        _patience(),
        typed(
            READ_JSON,
            "extensions.filters.http.json_to_metadata.v3.JsonToMetadata",
            response_rules={
                "rules": [_usage_rule(key, path) for key, path in USAGE_PATHS.items()],
                "allow_content_types_regex": {"regex": "application/json.*"},
            },
        ),
        typed(
            READ_STREAM,
            "extensions.filters.http.sse_to_metadata.v3.SseToMetadata",
            response_rules={
                "content_parser": typed(
                    "envoy.content_parsers.json",
                    "extensions.content_parsers.json.v3.JsonContentParser",
                    rules=[{"rule": _usage_rule(key, path)} for key, path in USAGE_PATHS.items()],
                )
            },
        ),
        typed(
            "envoy.filters.http.router",
            "extensions.filters.http.router.v3.Router",
            suppress_envoy_headers=True,
        ),
    ]


def _patience() -> Config:
    """Tell the router what the picker decided; what is no number, it ignores."""
    value = f"%DYNAMIC_METADATA({DECISION_NAMESPACE}:{PATIENCE_KEY})%"
    header = {"header": {"key": PATIENCE_HEADER, "value": value}}
    return typed(
        "patience",
        "extensions.filters.http.header_mutation.v3.HeaderMutation",
        mutations={
            "request_mutations": [
                {"append": {**header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
            ]
        },
    )


def _usage_rule(key: str, path: tuple[str, ...]) -> Config:
    target = {"metadata_namespace": USAGE_NAMESPACE, "key": key, "type": "NUMBER"}
    return {"selectors": [{"key": part} for part in path], "on_present": target}
