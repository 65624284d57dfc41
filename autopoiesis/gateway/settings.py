"""What can be set about the data plane, and the names its parts call each other by."""

from dataclasses import dataclass
from pathlib import Path

ENDPOINT_NAMESPACE, ENDPOINT_KEY = "envoy.lb", "x-gateway-destination-endpoint"
"""Metadata in which the picker gives replica addresses in order (Gateway API Inference Extension)."""
DECISION_NAMESPACE = "autopoiesis"
"""Metadata in which the picker says what it decided: key, arm, window, shard."""
ARM_HEADER = "x-autopoiesis-arm"
"""Header of answers: who decided."""
REPLICA_HEADER = "x-autopoiesis-replica"
"""Header of answers: who answered."""
SESSION_HEADER = "x-session-id"
"""Header of requests: requests with the same value belong together."""
RESERVED_PREFIXES = ("x-gateway-", "x-autopoiesis-", "x-envoy-")
"""Headers that steer the data plane; taken off every request of a client."""

LONGEST_ID = 128
"""Characters of a client's `x-request-id` and model name that are kept."""

INFERENCE_ROUTE = "inference"
"""Name of the routes on which the picker decides."""
USAGE_NAMESPACE = "usage"
"""Metadata namespace of the token counts that Envoy reads out of answers."""


@dataclass(frozen=True, slots=True)
class DataPlaneSettings:
    """Envoy's settings. Times are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_body_bytes: int = 32 << 20
    """A larger request body is answered with 413."""
    headers_timeout_s: float = 10.0
    request_timeout_s: float = 120.0
    """Longest time a client may take to send its request."""
    idle_timeout_s: float = 900.0
    """A stream in which nothing moves for this long is ended."""
    connect_timeout_s: float = 1.0
    keepalive_s: float = 4.0
    """Idle connections to replicas are closed after this; vLLM's server closes them after 5 s."""
    retries: int = 3
    """Further replicas tried before the first byte of an answer."""
    picker_timeout_s: float = 2.0
    """A picker that says nothing for this long is passed over."""
    longest_hold_s: float = 90.0
    """Upper bound of the time for which the picker may keep a request waiting."""
    log_interval_s: float = 0.02
    """Access-log entries, which tell the picker that requests ended, are sent this often."""
    workers: int = 1
    """Envoy's worker threads."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files and sockets through which the processes of one gateway meet."""

    path: Path

    @property
    def envoy_config(self) -> Path:
        """Envoy's bootstrap configuration (JSON, which is YAML)."""
        return self.path / "envoy.yaml"

    @property
    def endpoints(self) -> Path:
        """Envoy's list of replicas, watched by Envoy."""
        return self.path / "eds.json"

    @property
    def admin_socket(self) -> Path:
        """Envoy's admin interface."""
        return self.path / "admin.sock"

    @property
    def picker_socket(self) -> Path:
        """The picker's gRPC services, for Envoy."""
        return self.path / "picker.sock"

    @property
    def link_socket(self) -> Path:
        """The picker's side of the link to the controller."""
        return self.path / "link.sock"

    @property
    def fleet(self) -> Path:
        """Members of the fleet."""
        return self.path / "fleet.json"

    @property
    def allocation(self) -> Path:
        """The last allocation the picker was given, with its arms."""
        return self.path / "allocation.json"

    @property
    def salt(self) -> Path:
        """Secret of the hashes of sessions and prompts."""
        return self.path / "salt"
