"""The configuration of a gateway that knows nothing of us but the endpoint picker protocol."""

from typing import Any

KEY = "x-gateway-destination-endpoint"


def typed(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/envoy.{kind}", **fields}}


def configuration(
    port: int, picker_port: int, replicas: list[str], body_mode: str, subset: list[str] | None
) -> dict[str, Any]:
    filters = [
        typed(
            "picker",
            "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            grpc_service={"envoy_grpc": {"cluster_name": "picker"}},
            failure_mode_allow=False,
            message_timeout="10s",
            metadata_options={
                "receiving_namespaces": {"untyped": ["envoy.lb"]},
                "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint", "envoy.lb"]},
            },
            processing_mode={
                "request_header_mode": "SEND",
                "response_header_mode": "SEND",
                "request_body_mode": body_mode,
                "response_body_mode": "STREAMED" if body_mode == "BUFFERED" else body_mode,
                "request_trailer_mode": "SKIP" if body_mode == "BUFFERED" else "SEND",
                "response_trailer_mode": "SKIP" if body_mode == "BUFFERED" else "SEND",
            },
        ),
        typed("router", "extensions.filters.http.router.v3.Router"),
    ]
    if subset is not None:
        hint = {"x-gateway-destination-endpoint-subset": subset}
        metadata = [{"metadata_namespace": "envoy.lb.subset_hint", "value": hint}]
        filters.insert(
            0,
            typed("hint", "extensions.filters.http.set_metadata.v3.Config", metadata=metadata),
        )
    retries = {"retry_on": "connect-failure,reset", "num_retries": 3}
    manager = typed(
        "http",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        generate_request_id=True,
        http_filters=filters,
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "pool", "timeout": "0s", "retry_policy": retries},
                        }
                    ],
                }
            ]
        },
    )
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "in",
                    "address": address(f"127.0.0.1:{port}"),
                    "filter_chains": [{"filters": [manager]}],
                }
            ],
            "clusters": [
                {
                    **cluster("picker", [f"127.0.0.1:{picker_port}"]),
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                },
                {
                    **cluster("pool", replicas),
                    "load_balancing_policy": {
                        "policies": [{"typed_extension_config": override_host()}]
                    },
                },
            ],
        }
    }


def override_host() -> dict[str, Any]:
    round_robin = typed(
        "envoy.load_balancing_policies.round_robin",
        "extensions.load_balancing_policies.round_robin.v3.RoundRobin",
    )
    return typed(
        "envoy.load_balancing_policies.override_host",
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[
            {"header": KEY},
            {"metadata": {"key": "envoy.lb", "path": [{"key": KEY}]}},
        ],
        fallback_policy={"policies": [{"typed_extension_config": round_robin}]},
    )


def address(text: str) -> dict[str, Any]:
    host, _, port = text.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def cluster(name: str, members: list[str]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": address(member)}} for member in members]
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }
