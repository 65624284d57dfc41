"""Whom Envoy talks to: the picker, and the replicas."""

from autopoiesis.gateway.first_byte import first_byte_filters
from autopoiesis.gateway.models import Fleet
from autopoiesis.gateway.resource import (
    REPLICAS,
    Config,
    seconds,
    type_url,
    typed,
    watched,
)
from autopoiesis.gateway.settings import (
    ENDPOINT_KEY,
    ENDPOINT_NAMESPACE,
    DataPlaneSettings,
)

HEALTH_PATH = "/health"


def picker_cluster(fleet: Fleet) -> Config:
    """Return the cluster of one: the picker."""
    return {
        "name": fleet.picker,
        "type": "STATIC",
        "connect_timeout": "0.25s",
        "typed_extension_protocol_options": _protocol(
            {"explicit_http_config": {"http2_protocol_options": {}}}
        ),
        "circuit_breakers": _limits(100_000, 1_000),
        "load_assignment": {
            "cluster_name": fleet.picker,
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "address": {"pipe": {"path": str(fleet.run_dir.picker_socket)}}
                            }
                        }
                    ]
                }
            ],
        },
    }


def replica_cluster(settings: DataPlaneSettings, fleet: Fleet) -> Config:
    """Return the cluster of the replicas."""
    return {
        "name": fleet.replicas,
        "type": "EDS",
        "connect_timeout": seconds(settings.connect_timeout_s),
        "per_connection_buffer_limit_bytes": settings.max_body_bytes,
        "eds_cluster_config": {
            "service_name": REPLICAS,  # as it is named in every fleet's file
            "eds_config": watched(fleet.run_dir.endpoints),
        },
        "typed_extension_protocol_options": _protocol(
            {
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": seconds(settings.keepalive_s)},
                "http_filters": first_byte_filters(),
            }
        ),
        "load_balancing_policy": {"policies": [_override_host()]},
        "outlier_detection": {
            # A 500 may be the request's own fault, so only a replica that is not there is ejected.
            "split_external_local_origin_errors": True,
            "consecutive_gateway_failure": 5,
            "enforcing_consecutive_gateway_failure": 100,
            "consecutive_local_origin_failure": settings.eject_after,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
            "interval": "0.5s",
            "base_ejection_time": seconds(settings.eject_s),
            "max_ejection_time": seconds(10.0 * settings.eject_s),
            "max_ejection_percent": 100,
        },
        "circuit_breakers": _limits(settings.most_requests, settings.most_retries),
        "health_checks": [_health_check(settings.frozen_s)],
        "ignore_health_on_host_removal": True,
    }


def _health_check(frozen_s: float) -> Config:
    """Find out who does not answer at all: any status will do, for not every server has this path."""
    pause, patience = seconds(0.2 * frozen_s), seconds(0.3 * frozen_s)
    return {
        "timeout": patience,
        "interval": pause,
        "no_traffic_interval": pause,
        "unhealthy_interval": pause,
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "http_health_check": {
            "path": HEALTH_PATH,
            "expected_statuses": [{"start": 100, "end": 600}],
        },
    }


def _override_host() -> Config:
    """Take the picker's ordered list; without one, the replica with the fewest requests."""
    least_request = typed(
        "envoy.load_balancing_policies.least_request",
        "extensions.load_balancing_policies.least_request.v3.LeastRequest",
    )
    return {
        "typed_extension_config": typed(
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
    return {f"envoy.{name}": {"@type": type_url(name), **options}}


def _limits(requests: int, retries: int) -> Config:
    """Bound what is under way; admission is the arms' business."""
    thresholds = {
        "max_connections": requests,
        "max_pending_requests": requests,
        "max_requests": requests,
        "max_retries": retries,
    }
    return {"thresholds": [thresholds]}
