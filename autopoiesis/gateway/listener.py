"""Where clients come in: Envoy's listener, its HTTP, its access log, and what it answers by itself."""

from collections.abc import Sequence
from http import HTTPStatus

from autopoiesis.gateway.access import RATE_LIMITED, access_filters
from autopoiesis.gateway.errors import (
    LOCAL_ERRORS,
    MALFORMED_HTTP,
    TOO_MANY_REQUESTS,
    body_too_large,
)
from autopoiesis.gateway.filters import filters
from autopoiesis.gateway.keys import ApiKey
from autopoiesis.gateway.load_report import TOLD_HEADER
from autopoiesis.gateway.models import Fleet, model_errors
from autopoiesis.gateway.resource import Config, seconds, type_url, typed, watched
from autopoiesis.gateway.routes import routes
from autopoiesis.gateway.settings import RESERVED_PREFIXES, DataPlaneSettings, RunDir

CERTIFICATE = "gateway"
"""Name of the secret with which the listener speaks TLS."""
MOST_STREAMS, STREAM_WINDOW_BYTES = 1_000, 1 << 20
"""Of an HTTP/2 connection: requests at one time, and bytes of a body sent ahead."""


def listener(
    host: str,
    port: int,
    settings: DataPlaneSettings,
    keys: Sequence[ApiKey],
    fleets: Sequence[Fleet],
    run_dir: RunDir | None,
) -> Config:
    """Return the gateway's listener, its certificate told by a file in `run_dir`, or by itself if None."""
    manager = typed(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="gateway",
        server_name="autopoiesis",
        generate_request_id=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        request_id_extension={
            "typed_config": {
                "@type": type_url("extensions.request_id.uuid.v3.UuidRequestIdConfig"),
                "pack_trace_reason": False,  # it would change the client's own id
            }
        },
        use_remote_address=True,
        normalize_path=True,
        merge_slashes=True,
        request_timeout=seconds(settings.request_timeout_s),
        request_headers_timeout=seconds(settings.headers_timeout_s),
        stream_idle_timeout=seconds(settings.idle_timeout_s),
        drain_timeout="1s",
        common_http_protocol_options={
            "headers_with_underscores_action": "ALLOW",
            "idle_timeout": seconds(settings.connection_idle_s),
        },
        http2_protocol_options={
            "max_concurrent_streams": MOST_STREAMS,
            "initial_stream_window_size": STREAM_WINDOW_BYTES,
            "initial_connection_window_size": 16 * STREAM_WINDOW_BYTES,
        },
        early_header_mutation_extensions=[_without_reserved_headers()],
        access_log=[_access_log(settings, fleet) for fleet in fleets],
        local_reply_config=_local_replies(settings, fleets),
        route_config=routes(settings, fleets),
        http_filters=[*access_filters(keys), *filters(settings, fleets)],
    )
    return {
        "name": "gateway",
        "address": {"socket_address": {"address": host, "port_value": port}},
        "per_connection_buffer_limit_bytes": 2 * settings.max_body_bytes,
        "filter_chains": [{"filters": [manager], **_tls(settings, run_dir)}],
    }


def certificate(settings: DataPlaneSettings) -> Config:
    """Return the secret: the files of certificate and key, read again when one is renamed into place."""
    return {"name": CERTIFICATE, "tls_certificate": _certificate(settings)}


def _certificate(settings: DataPlaneSettings) -> Config:
    assert settings.tls_cert
    assert settings.tls_key
    chain, key = settings.tls_cert.resolve(), settings.tls_key.resolve()
    return {
        "certificate_chain": {"filename": str(chain)},
        "private_key": {"filename": str(key)},
        "watched_directory": {"path": str(chain.parent)},
    }


def _tls(settings: DataPlaneSettings, run_dir: RunDir | None) -> Config:
    if not settings.tls_cert:
        return {}
    context: Config = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
    }
    if run_dir is None:
        context["tls_certificates"] = [_certificate(settings)]
    else:
        secret = {"name": CERTIFICATE, "sds_config": watched(run_dir.certificate)}
        context["tls_certificate_sds_secret_configs"] = [secret]
    return {
        "transport_socket": typed(
            "envoy.transport_sockets.tls",
            "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            common_tls_context=context,
        )
    }


def _without_reserved_headers() -> Config:
    return typed(
        "envoy.http.early_header_mutation.header_mutation",
        "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=[{"remove_on_match": {"key_matcher": {"prefix": p}}} for p in RESERVED_PREFIXES],
    )


def _access_log(settings: DataPlaneSettings, fleet: Fleet) -> Config:
    """Tell a fleet's picker of the requests for its models."""
    log = typed(
        "envoy.access_loggers.http_grpc",
        "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
        common_config={
            "log_name": "requests",
            "transport_api_version": "V3",
            "buffer_flush_interval": seconds(settings.log_interval_s),
            "grpc_service": {"envoy_grpc": {"cluster_name": fleet.picker}},
        },
        additional_response_headers_to_log=[TOLD_HEADER],
    )
    if not fleet.models:
        return log
    mine = {"metadata_filter": {"matcher": fleet.is_asked_for, "match_if_key_not_found": False}}
    return {**log, "filter": mine}


def _local_replies(settings: DataPlaneSettings, fleets: Sequence[Fleet]) -> Config:
    answers = {
        **LOCAL_ERRORS,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: body_too_large(settings.max_body_bytes),
    }
    mappers: list[Config] = [
        {"filter": _when_status(status), "body_format_override": {"json_format": body}}
        for status, body in answers.items()
    ]
    broken = {"response_flag_filter": {"flags": ["DPE"]}}
    mappers.append({"filter": broken, "body_format_override": {"json_format": MALFORMED_HTTP}})
    instead = [(RATE_LIMITED, HTTPStatus.TOO_MANY_REQUESTS, TOO_MANY_REQUESTS)]
    if len(fleets) > 1:
        instead += model_errors(fleets)
    mappers += [
        {
            "filter": _when_status(inside),
            "status_code": int(told),
            "body_format_override": {"json_format": body},
        }
        for inside, told, body in instead
    ]
    return {"mappers": mappers}


def _when_status(status: int) -> Config:
    value = {"default_value": int(status), "runtime_key": f"local_reply.{int(status)}"}
    return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}
