"""How Envoy's configuration is written: typed objects, durations, files that Envoy watches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Config = dict[str, Any]

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
API_KEYS, RATE_LIMIT = "api_keys", "rate_limit"
READ_MODEL, ROUTE_AGAIN = "model_of_request", "route_by_model"
"""Names of Envoy's filters."""


def type_url(name: str) -> str:
    """Return a message's type as Envoy wants it."""
    return f"type.googleapis.com/envoy.{name}"


def typed(name: str, type_name: str, **fields: Any) -> Config:
    """Return an extension with its typed configuration."""
    return {"name": name, "typed_config": {"@type": type_url(type_name), **fields}}


def seconds(duration_s: float) -> str:
    """Return a duration as Envoy wants it."""
    return f"{duration_s:.3f}s"


def watched(path: Path) -> Config:
    """Return the source of resources that lie in a file; a new one counts once it is renamed into place."""
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path)}}


def resources(type_name: str, found: Sequence[Config]) -> Config:
    """Return the content of such a file."""
    return {"resources": [{"@type": type_url(type_name), **one} for one in found]}
