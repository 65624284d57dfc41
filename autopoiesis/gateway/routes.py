"""Which paths the gateway serves, and how each is treated."""

from collections.abc import Sequence
from http import HTTPStatus

from autopoiesis.gateway.load_report import ASK_HEADER, ASK_VALUE
from autopoiesis.gateway.models import Fleet, listing, routes_by_model
from autopoiesis.gateway.resource import (
    BODY_LIMIT,
    EXT_PROC,
    READ_JSON,
    READ_MODEL,
    READ_STREAM,
    REPLICA_NAMESPACE,
    ROUTE_AGAIN,
    Config,
    type_url,
    typed,
)
from autopoiesis.gateway.settings import (
    ARM_HEADER,
    DECISION_NAMESPACE,
    INFERENCE_ROUTE,
    REPLICA_HEADER,
    DataPlaneSettings,
)

ANSWERED_WITH_USAGE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PASSED_GET = ("/health", "/version", "/ping")
PASSED_POST = ("/tokenize", "/detokenize", "/score", "/rerank", "/pooling", "/classify")
"""Answered by any replica, without the picker, like every GET under /v1/."""

LONGEST_LISTING_BYTES = 1 << 20
"""Bound of the answer that tells all models."""

_OFF: Config = {"@type": type_url("config.route.v3.FilterConfig"), "disabled": True}
"""Switches a filter off for a route."""


def routes(settings: DataPlaneSettings, fleets: Sequence[Fleet]) -> Config:
    """Return the whole route table."""
    is_get, is_post = _method("GET"), _method("POST")
    uncounted = (READ_JSON, READ_STREAM)

    def by_model(match: Config, name: str = "", without: tuple[str, ...] = ()) -> list[Config]:
        of_fleets = [(f, _route(f, match, name, without)) for f in fleets]
        return routes_by_model(of_fleets, settings.stall_timeout_s)

    decided = [
        *(by_model({"path": p, **is_post}, INFERENCE_ROUTE) for p in ANSWERED_WITH_USAGE),
        by_model({"prefix": "/v1/", **is_post}, INFERENCE_ROUTE, uncounted),
    ]
    passed = [by_model({"path": p, **is_post}, without=(EXT_PROC, *uncounted)) for p in PASSED_POST]
    without_body = (EXT_PROC, *uncounted, *((READ_MODEL, ROUTE_AGAIN) if len(fleets) > 1 else ()))
    got = [
        _route(fleets[0], match, without=without_body)
        for match in ({"prefix": "/v1/", **is_get}, *({"path": p, **is_get} for p in PASSED_GET))
    ]
    unknown = _refusing({"prefix": "/"}, HTTPStatus.NOT_FOUND)
    return {
        "name": "routes",
        "max_direct_response_body_size_bytes": LONGEST_LISTING_BYTES,
        "virtual_hosts": [
            {
                "name": "gateway",
                "domains": ["*"],
                "routes": [
                    _too_large(settings),
                    *(route for of_path in (*decided, *passed) for route in of_path),
                    *listing(fleets),
                    *got,
                    unknown,
                ],
                "retry_policy": _retries(settings),
                "hedge_policy": {"hedge_on_per_try_timeout": True},
                "request_headers_to_add": [_header(ASK_HEADER, ASK_VALUE)],
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


def _route(fleet: Fleet, match: Config, name: str = "", without: tuple[str, ...] = ()) -> Config:
    return {
        "name": name,
        "match": match,
        "route": {"cluster": fleet.replicas, "timeout": "0s"},
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
            typed(
                "envoy.retry_host_predicates.previous_hosts",
                "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            )
        ],
        "host_selection_retry_max_attempts": 5,
    }
