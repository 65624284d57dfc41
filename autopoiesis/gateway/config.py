"""Envoy's configuration, made from `DataPlaneSettings`: what the data plane does, in one place."""

from http import HTTPStatus
from typing import Any

from autopoiesis.gateway.errors import LOCAL_ERRORS, MALFORMED_HTTP, body_too_large
from autopoiesis.gateway.settings import (
    ARM_HEADER,
    DECISION_NAMESPACE,
    ENDPOINT_KEY,
    ENDPOINT_NAMESPACE,
    INFERENCE_ROUTE,
    REPLICA_HEADER,
    RESERVED_PREFIXES,
    SESSION_HEADER,
    USAGE_NAMESPACE,
    DataPlaneSettings,
    RunDir,
)

Config = dict[str, Any]

_CONNECTION_LIMIT = "extensions.resource_monitors.downstream_connections.v3"

PICKER, REPLICAS = "picker", "replicas"
"""Names of Envoy's clusters."""
REPLICA_NAMESPACE = "replica"
"""Endpoint metadata that carries the replica's name."""
EXT_PROC, READ_JSON, READ_STREAM, BODY_LIMIT = (
    "endpoint_picker",
    "usage_of_answer",
    "usage_of_stream",
    "body_limit",
)
"""Names of Envoy's filters."""

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

ANSWERED_WITH_USAGE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PASSED_GET = ("/health", "/version", "/ping")
PASSED_POST = ("/tokenize", "/detokenize", "/score", "/rerank", "/pooling", "/classify")
"""Answered by any replica, without the picker, like every GET under /v1/."""

ATTRIBUTES_OF_REQUEST = (
    "request.path",
    "request.id",
    "request.headers['content-type']",
    f"request.headers['{SESSION_HEADER}']",
)
ATTRIBUTES_OF_ANSWER = ("response.code", "upstream.address")


def bootstrap(settings: DataPlaneSettings, run_dir: RunDir) -> Config:
    """Return Envoy's whole configuration."""
    return {
        "node": {"id": "autopoiesis", "cluster": "autopoiesis"},
        "admin": {"address": {"pipe": {"path": str(run_dir.admin_socket), "mode": 0o600}}},
        "static_resources": {
            "listeners": [_listener(settings)],
            "clusters": [_picker_cluster(run_dir), _replica_cluster(settings, run_dir)],
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": _type(f"{_CONNECTION_LIMIT}.DownstreamConnectionsConfig"),
                        "max_active_downstream_connections": 50_000,
                    },
                }
            ]
        },
    }


def _type(name: str) -> str:
    return f"type.googleapis.com/envoy.{name}"


_OFF: Config = {"@type": _type("config.route.v3.FilterConfig"), "disabled": True}
"""Switches a filter off for a route."""


def _seconds(duration_s: float) -> str:
    return f"{duration_s:.3f}s"


def _typed(name: str, type_name: str, **fields: Any) -> Config:
    return {"name": name, "typed_config": {"@type": _type(type_name), **fields}}


def _listener(settings: DataPlaneSettings) -> Config:
    manager = _typed(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="gateway",
        server_name="autopoiesis",
        generate_request_id=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        request_id_extension={
            "typed_config": {
                "@type": _type("extensions.request_id.uuid.v3.UuidRequestIdConfig"),
                "pack_trace_reason": False,  # it would change the client's own id
            }
        },
        use_remote_address=True,
        normalize_path=True,
        merge_slashes=True,
        request_timeout=_seconds(settings.request_timeout_s),
        request_headers_timeout=_seconds(settings.headers_timeout_s),
        stream_idle_timeout=_seconds(settings.idle_timeout_s),
        drain_timeout="1s",
        common_http_protocol_options={
            "headers_with_underscores_action": "ALLOW",
            "idle_timeout": "3600s",
        },
        early_header_mutation_extensions=[_without_reserved_headers()],
        access_log=[_access_log(settings)],
        local_reply_config=_local_replies(settings),
        route_config=_routes(settings),
        http_filters=_filters(settings),
    )
    return {
        "name": "gateway",
        "address": {"socket_address": {"address": settings.host, "port_value": settings.port}},
        "per_connection_buffer_limit_bytes": 2 * settings.max_body_bytes,
        "filter_chains": [{"filters": [manager]}],
    }


def _without_reserved_headers() -> Config:
    return _typed(
        "envoy.http.early_header_mutation.header_mutation",
        "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=[{"remove_on_match": {"key_matcher": {"prefix": p}}} for p in RESERVED_PREFIXES],
    )


def _access_log(settings: DataPlaneSettings) -> Config:
    return _typed(
        "envoy.access_loggers.http_grpc",
        "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
        common_config={
            "log_name": "requests",
            "transport_api_version": "V3",
            "buffer_flush_interval": _seconds(settings.log_interval_s),
            "grpc_service": {"envoy_grpc": {"cluster_name": PICKER}},
        },
    )


def _local_replies(settings: DataPlaneSettings) -> Config:
    answers = {
        **LOCAL_ERRORS,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: body_too_large(settings.max_body_bytes),
    }
    mappers = [
        {"filter": _when_status(status), "body_format_override": {"json_format": body}}
        for status, body in answers.items()
    ]
    broken = {"response_flag_filter": {"flags": ["DPE"]}}
    mappers.append({"filter": broken, "body_format_override": {"json_format": MALFORMED_HTTP}})
    return {"mappers": mappers}


def _when_status(status: int) -> Config:
    value = {"default_value": int(status), "runtime_key": f"local_reply.{int(status)}"}
    return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}


def _routes(settings: DataPlaneSettings) -> Config:
    is_get, is_post = _method("GET"), _method("POST")
    counted = [_route({"path": p, **is_post}, name=INFERENCE_ROUTE) for p in ANSWERED_WITH_USAGE]
    other = _route(
        {"prefix": "/v1/", **is_post}, name=INFERENCE_ROUTE, without=(READ_JSON, READ_STREAM)
    )
    passed = [
        _route(match, without=(EXT_PROC, READ_JSON, READ_STREAM))
        for match in (
            {"prefix": "/v1/", **is_get},
            *({"path": p, **is_get} for p in PASSED_GET),
            *({"path": p, **is_post} for p in PASSED_POST),
        )
    ]
    unknown = _refusing({"prefix": "/"}, HTTPStatus.NOT_FOUND)
    return {
        "name": "routes",
        "virtual_hosts": [
            {
                "name": "gateway",
                "domains": ["*"],
                "routes": [_too_large(settings), *counted, other, *passed, unknown],
                "retry_policy": _retries(settings),
                "response_headers_to_add": [
                    _header(ARM_HEADER, f"%DYNAMIC_METADATA({DECISION_NAMESPACE}:arm)%"),
                    _header(REPLICA_HEADER, f"%UPSTREAM_METADATA({REPLICA_NAMESPACE}:name)%"),
                ],
            }
        ],
    }


def _too_large(settings: DataPlaneSettings) -> Config:
    """Refuse by its length a body that is not worth receiving."""
    length = {"start": settings.max_body_bytes + 1, "end": 1 << 62}
    match: Config = {"prefix": "/", "headers": [{"name": "content-length", "range_match": length}]}
    return _refusing(match, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def _refusing(match: Config, status: HTTPStatus) -> Config:
    """Answer without any replica, and without the picker, which would wait for the end of it."""
    return {
        "match": match,
        "direct_response": {"status": int(status)},
        "typed_per_filter_config": dict.fromkeys((EXT_PROC, BODY_LIMIT), _OFF),
    }


def _method(name: str) -> Config:
    return {"headers": [{"name": ":method", "string_match": {"exact": name}}]}


def _route(match: Config, name: str = "", without: tuple[str, ...] = ()) -> Config:
    return {
        "name": name,
        "match": match,
        "route": {"cluster": REPLICAS, "timeout": "0s"},
        "typed_per_filter_config": dict.fromkeys(without, _OFF),
    }


def _header(name: str, value: str) -> Config:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _retries(settings: DataPlaneSettings) -> Config:
    """Retry while nothing was answered: a killed replica's requests go to the next one on the list."""
    return {
        "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
        "retriable_status_codes": [int(HTTPStatus.SERVICE_UNAVAILABLE)],
        "num_retries": settings.retries,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
        "retry_host_predicate": [
            _typed(
                "envoy.retry_host_predicates.previous_hosts",
                "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            )
        ],
        "host_selection_retry_max_attempts": 5,
    }


def _filters(settings: DataPlaneSettings) -> list[Config]:
    return [
        _typed(
            EXT_PROC,
            "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            grpc_service={"envoy_grpc": {"cluster_name": PICKER}},
            failure_mode_allow=True,
            message_timeout=_seconds(settings.picker_timeout_s),
            max_message_timeout=_seconds(settings.longest_hold_s),
            request_attributes=list(ATTRIBUTES_OF_REQUEST),
            response_attributes=list(ATTRIBUTES_OF_ANSWER),
            metadata_options={
                "receiving_namespaces": {"untyped": [ENDPOINT_NAMESPACE, DECISION_NAMESPACE]}
            },
            processing_mode={
                "request_header_mode": "SKIP",
                "response_header_mode": "SKIP",
                "request_body_mode": "BUFFERED",
                "response_body_mode": "STREAMED",
            },
        ),
        # The headers wait here for the body, and with it for the picker's answer.
        _typed(
            BODY_LIMIT,
            "extensions.filters.http.buffer.v3.Buffer",
            max_request_bytes=settings.max_body_bytes,
        ),
        _typed(
            READ_JSON,
            "extensions.filters.http.json_to_metadata.v3.JsonToMetadata",
            response_rules={
                "rules": [_usage_rule(key, path) for key, path in USAGE_PATHS.items()],
                "allow_content_types_regex": {"regex": "application/json.*"},
            },
        ),
        _typed(
            READ_STREAM,
            "extensions.filters.http.sse_to_metadata.v3.SseToMetadata",
            response_rules={
                "content_parser": _typed(
                    "envoy.content_parsers.json",
                    "extensions.content_parsers.json.v3.JsonContentParser",
                    rules=[{"rule": _usage_rule(key, path)} for key, path in USAGE_PATHS.items()],
                )
            },
        ),
        _typed(
            "envoy.filters.http.router",
            "extensions.filters.http.router.v3.Router",
            suppress_envoy_headers=True,
        ),
    ]


def _usage_rule(key: str, path: tuple[str, ...]) -> Config:
    target = {"metadata_namespace": USAGE_NAMESPACE, "key": key, "type": "NUMBER"}
    return {"selectors": [{"key": part} for part in path], "on_present": target}


def _picker_cluster(run_dir: RunDir) -> Config:
    return {
        "name": PICKER,
        "type": "STATIC",
        "connect_timeout": "0.25s",
        "typed_extension_protocol_options": _protocol(
            {"explicit_http_config": {"http2_protocol_options": {}}}
        ),
        "circuit_breakers": _generous_limits(),
        "load_assignment": {
            "cluster_name": PICKER,
            "endpoints": [
                {
                    "lb_endpoints": [
                        {"endpoint": {"address": {"pipe": {"path": str(run_dir.picker_socket)}}}}
                    ]
                }
            ],
        },
    }


def _replica_cluster(settings: DataPlaneSettings, run_dir: RunDir) -> Config:
    return {
        "name": REPLICAS,
        "type": "EDS",
        "connect_timeout": _seconds(settings.connect_timeout_s),
        "per_connection_buffer_limit_bytes": settings.max_body_bytes,
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "path_config_source": {"path": str(run_dir.endpoints)},
            }
        },
        "typed_extension_protocol_options": _protocol(
            {
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": _seconds(settings.keepalive_s)},
            }
        ),
        "load_balancing_policy": {"policies": [_override_host()]},
        "outlier_detection": {
            # A 500 may be the request's own fault, so only a replica that is not there is ejected.
            "split_external_local_origin_errors": True,
            "consecutive_gateway_failure": 5,
            "enforcing_consecutive_gateway_failure": 100,
            "consecutive_local_origin_failure": 2,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
            "interval": "0.5s",
            "base_ejection_time": "2s",
            "max_ejection_time": "20s",
            "max_ejection_percent": 100,
        },
        "circuit_breakers": _generous_limits(),
    }


def _override_host() -> Config:
    """Take the picker's ordered list; without one, the replica with the fewest requests."""
    least_request = _typed(
        "envoy.load_balancing_policies.least_request",
        "extensions.load_balancing_policies.least_request.v3.LeastRequest",
    )
    return {
        "typed_extension_config": _typed(
            "envoy.load_balancing_policies.override_host",
            "extensions.load_balancing_policies.override_host.v3.OverrideHost",
            override_host_sources=[
                {"metadata": {"key": ENDPOINT_NAMESPACE, "path": [{"key": ENDPOINT_KEY}]}}
            ],
            fallback_policy={"policies": [{"typed_extension_config": least_request}]},
        )
    }


def _protocol(options: Config) -> Config:
    name = "extensions.upstreams.http.v3.HttpProtocolOptions"
    return {f"envoy.{name}": {"@type": _type(name), **options}}


def _generous_limits() -> Config:
    """Lift Envoy's default limits: admission is the arms' business."""
    limit = 100_000
    thresholds = {
        "max_connections": limit,
        "max_pending_requests": limit,
        "max_requests": limit,
        "max_retries": 1_000,
    }
    return {"thresholds": [thresholds]}
