"""Envoy's configuration, made from typed settings: what the data plane does.

What stays for Envoy's lifetime is in the bootstrap; listener and clusters lie in files that Envoy
watches, so that they can change while it serves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from autopoiesis.gateway.clusters import picker_cluster, replica_cluster
from autopoiesis.gateway.keys import ApiKey
from autopoiesis.gateway.listener import certificate, listener
from autopoiesis.gateway.models import Fleet
from autopoiesis.gateway.resource import Config, resources, typed, watched
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir

_CONNECTION_LIMIT = "extensions.resource_monitors.downstream_connections.v3"


class Plan(NamedTuple):
    """All that Envoy's configuration is made from."""

    host: str
    port: int
    settings: DataPlaneSettings
    run_dir: RunDir
    fleets: Sequence[Fleet]
    """One, or one for each model."""
    keys: Sequence[ApiKey] = ()


def bootstrap(plan: Plan) -> Config:
    """Return what is fixed, and where the rest lies."""
    dynamic = {
        "lds_config": watched(plan.run_dir.listeners),
        "cds_config": watched(plan.run_dir.clusters),
    }
    return {**_fixed(plan), "dynamic_resources": dynamic}


def listeners(plan: Plan) -> Config:
    """Return the content of the file of listeners."""
    return resources("config.listener.v3.Listener", [_listener(plan, plan.run_dir)])


def clusters(plan: Plan) -> Config:
    """Return the content of the file of clusters."""
    return resources("config.cluster.v3.Cluster", _clusters(plan))


def secrets(plan: Plan) -> Config:
    """Return the content of the file that says where the certificate is."""
    found = [certificate(plan.settings)] if plan.settings.tls_cert else []
    return resources("extensions.transport_sockets.tls.v3.Secret", found)


def in_one_piece(plan: Plan) -> Config:
    """Return everything as Envoy validates it, which does not look into watched files."""
    everything: dict[str, Any] = {"listeners": [_listener(plan, None)], "clusters": _clusters(plan)}
    return {**_fixed(plan), "static_resources": everything}


def _listener(plan: Plan, certificate_in: RunDir | None) -> Config:
    return listener(plan.host, plan.port, plan.settings, plan.keys, plan.fleets, certificate_in)


def _clusters(plan: Plan) -> list[Config]:
    pickers = [picker_cluster(fleet) for fleet in plan.fleets]
    return [*pickers, *(replica_cluster(plan.settings, fleet) for fleet in plan.fleets)]


def _fixed(plan: Plan) -> Config:
    most_connections = typed(
        "envoy.resource_monitors.global_downstream_max_connections",
        f"{_CONNECTION_LIMIT}.DownstreamConnectionsConfig",
        max_active_downstream_connections=plan.settings.most_connections,
    )
    admin = {"path": str(plan.run_dir.admin_socket), "mode": 0o600}
    return {
        "node": {"id": "autopoiesis", "cluster": "autopoiesis"},
        "admin": {"address": {"pipe": admin}},
        "overload_manager": {"resource_monitors": [most_connections]},
    }
