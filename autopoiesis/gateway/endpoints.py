"""The replicas as Envoy knows them: a file that it watches."""

import ipaddress
from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.gateway.resource import REPLICA_NAMESPACE, REPLICAS
from autopoiesis.gateway.settings import RunDir


class Endpoint(Protocol):
    """What Envoy needs to know of a replica."""

    @property
    def name(self) -> str:
        """The replica's name."""
        ...

    @property
    def address(self) -> str:
        """`IP:port` or `[IPv6]:port`."""
        ...


def split_address(address: str) -> tuple[str, int]:
    """Split `IP:port`; ValueError says what is wrong with another text."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"A replica's address is IP:port, but {address!r} is not.")
    numeric = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(numeric)
    except ValueError:
        raise ValueError(
            f"A replica's address is IP:port, but {address!r} has a name; resolve it first."
        ) from None
    return numeric, int(port)


def assignment(members: Iterable[Endpoint]) -> dict[str, Any]:
    """Return Envoy's answer to the question which replicas there are."""
    return {
        "resources": [
            {
                "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
                "cluster_name": REPLICAS,
                "endpoints": [{"lb_endpoints": [_endpoint(m) for m in members]}],
            }
        ]
    }


def write_endpoints(run_dir: RunDir, members: Iterable[Endpoint]) -> None:
    """Tell Envoy, running or not, which replicas there are."""
    write_atomically(run_dir.endpoints, orjson.dumps(assignment(members)))


def _endpoint(member: Endpoint) -> dict[str, Any]:
    host, port = split_address(member.address)
    return {
        "endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}},
        "metadata": {"filter_metadata": {REPLICA_NAMESPACE: {"name": member.name}}},
    }
