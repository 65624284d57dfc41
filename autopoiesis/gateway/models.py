"""Several models behind one gateway: which fleet serves which, and how Envoy tells them apart.

Each model has a fleet, a picker and arms of its own. Envoy itself reads the model's name out of the
body, so that a request comes to its model's replicas even while a picker is away.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson

from autopoiesis.gateway.errors import INVALID_REQUEST, openai_error
from autopoiesis.gateway.resource import (
    EXT_PROC,
    PICKER,
    READ_MODEL,
    REPLICAS,
    ROUTE_AGAIN,
    Config,
    type_url,
    typed,
)
from autopoiesis.gateway.settings import STALL_HEADER, RunDir

REQUEST_NAMESPACE, MODEL_KEY = "request", "model"
"""Metadata in which Envoy keeps what it read out of a request's body."""
UNKNOWN_MODEL, MISSING_MODEL = HTTPStatus.GONE, HTTPStatus.CONFLICT
"""What the routes answer inside Envoy, so that they are told from a path that is not there; clients see 404 and 400."""


class Fleet(NamedTuple):
    """The replicas of a model, and where the picker that decides on them is found."""

    run_dir: RunDir
    name: str = ""
    """Tells it from other fleets of the same gateway."""
    models: tuple[str, ...] = ()
    """Names by which requests ask for it; none: it is the only one, and serves every request."""

    @property
    def picker(self) -> str:
        """Name of its picker's cluster in Envoy."""
        return f"{PICKER}-{self.name}" if self.name else PICKER

    @property
    def replicas(self) -> str:
        """Name of its replicas' cluster in Envoy."""
        return f"{REPLICAS}-{self.name}" if self.name else REPLICAS

    @property
    def is_asked_for(self) -> Config:
        """Match what was read out of a request's body."""
        names = [{"string_match": {"exact": model}} for model in self.models]
        value = {"or_match": {"value_matchers": names}} if len(names) > 1 else names[0]
        return {**_MODEL, "value": value}


_MODEL: Config = {"filter": REQUEST_NAMESPACE, "path": [{"key": MODEL_KEY}]}


def model_filters(fleets: Sequence[Fleet]) -> list[Config]:
    """Return the filters that find out the model; none where there is but one fleet."""
    if len(fleets) == 1:
        return []
    target = {"metadata_namespace": REQUEST_NAMESPACE, "key": MODEL_KEY, "type": "STRING"}
    read = typed(
        READ_MODEL,
        "extensions.filters.http.json_to_metadata.v3.JsonToMetadata",
        request_rules={
            "rules": [{"selectors": [{"key": "model"}], "on_present": target}],
            "allow_content_types_regex": {"regex": ".*"},
            "allow_empty_content_type": True,
        },
    )
    script = "function envoy_on_request(request) request:clearRouteCache() end"
    again = typed(
        ROUTE_AGAIN,
        "extensions.filters.http.lua.v3.Lua",
        default_source_code={"inline_string": script},
    )
    return [read, again]


def routes_by_model(routes: Sequence[tuple[Fleet, Config]], stall_timeout_s: float) -> list[Config]:
    """Return routes for the same paths, one for each fleet, as they are taken once the model is known.

    Behind them stand the answers to requests for a model that is not there, or for none.
    """
    if len(routes) == 1:
        return [_asking(*routes[0], stall_timeout_s)]
    match, filters = routes[0][1]["match"], routes[0][1]["typed_per_filter_config"]
    known = [_for(fleet, route, stall_timeout_s) for fleet, route in routes]
    present = {**match, "dynamic_metadata": [{**_MODEL, "value": {"present_match": True}}]}
    return [
        *known,
        _refusal(present, filters, UNKNOWN_MODEL),
        _refusal(match, filters, MISSING_MODEL),
    ]


def listing(fleets: Sequence[Fleet]) -> list[Config]:
    """Return the route that tells the models, which no single replica knows."""
    if len(fleets) == 1:
        return []
    found = [
        {"id": model, "object": "model", "created": 0, "owned_by": "autopoiesis"}
        for fleet in fleets
        for model in fleet.models
    ]
    body = orjson.dumps({"object": "list", "data": found}).decode()
    is_get = [{"name": ":method", "string_match": {"exact": "GET"}}]
    kind = {"header": {"key": "content-type", "value": "application/json"}}
    return [
        {
            "match": {"path": "/v1/models", "headers": is_get},
            "direct_response": {"status": 200, "body": {"inline_string": body}},
            "response_headers_to_add": [{**kind, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
        }
    ]


def model_errors(fleets: Sequence[Fleet]) -> list[tuple[HTTPStatus, HTTPStatus, dict[str, Any]]]:
    """Return what to answer in place of a status of these routes: status inside, status told, body."""
    names = ", ".join(model for fleet in fleets for model in fleet.models)
    model = f"%DYNAMIC_METADATA({REQUEST_NAMESPACE}:{MODEL_KEY})%"
    unknown = openai_error(
        f"The model '{model}' does not exist; there are {names}.",
        INVALID_REQUEST,
        "model_not_found",
        "model",
    )
    missing = openai_error(
        f"The body must be JSON and name the model in the field 'model'; there are {names}.",
        INVALID_REQUEST,
        "bad_request",
        "model",
    )
    return [
        (UNKNOWN_MODEL, HTTPStatus.NOT_FOUND, unknown),
        (MISSING_MODEL, HTTPStatus.BAD_REQUEST, missing),
    ]


def _for(fleet: Fleet, route: Config, stall_timeout_s: float) -> Config:
    match = {**route["match"], "dynamic_metadata": [fleet.is_asked_for]}
    return {**_asking(fleet, route, stall_timeout_s), "match": match}


def _asking(fleet: Fleet, route: Config, stall_timeout_s: float) -> Config:
    """Have the fleet's picker decide, and told of the first byte, unless the route does without it."""
    asks = {
        "grpc_service": {
            "envoy_grpc": {"cluster_name": fleet.picker},
            "initial_metadata": [{"key": STALL_HEADER, "value": f"{stall_timeout_s:g}"}],
        },
        "processing_mode": {
            "request_header_mode": "SKIP",
            "response_header_mode": "SEND",  # they come with the first byte
            "request_body_mode": "BUFFERED",
            "response_body_mode": "NONE",
        },
    }
    filters: Config = route["typed_per_filter_config"]
    return {**route, "typed_per_filter_config": {EXT_PROC: _ext_proc(overrides=asks), **filters}}


def _refusal(match: Config, filters: Config, status: HTTPStatus) -> Config:
    """Refuse without asking a picker. The filters are those of the fleets' routes, for this one is found first."""
    return {
        "match": match,
        "direct_response": {"status": int(status)},
        "typed_per_filter_config": {EXT_PROC: _ext_proc(disabled=True), **filters},
    }


def _ext_proc(**fields: Any) -> Config:
    return {"@type": type_url("extensions.filters.http.ext_proc.v3.ExtProcPerRoute"), **fields}
