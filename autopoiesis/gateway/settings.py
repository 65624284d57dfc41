"""What can be set about the data plane, and the names its parts call each other by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
CLIENT_HEADER = "x-autopoiesis-client"
"""Header that Envoy puts on a request: the name of the key with which it came."""
PATIENCE_KEY, PATIENCE_HEADER = "patience_ms", "x-envoy-upstream-rq-per-try-timeout-ms"
"""Where the picker says when to ask a second replica, too, and the header by which Envoy's router is told."""
RESERVED_PREFIXES = ("x-gateway-", "x-autopoiesis-", "x-envoy-")
"""Headers that steer the data plane; taken off every request of a client."""

LONGEST_ID = 128
"""Characters of a client's `x-request-id` and model name that are kept."""

INFERENCE_ROUTE = "inference"
"""Name of the routes on which the picker decides."""
USAGE_NAMESPACE = "usage"
"""Metadata namespace of the token counts that Envoy reads out of answers."""


STALL_HEADER = "x-autopoiesis-stall-timeout-s"
"""Header by which Envoy tells the picker, call by call, how long a stream may stall."""
LONGEST_HOLD_S = 90.0
"""Upper bound of the time for which the picker may keep a request waiting."""
LARGEST_BODY_BYTES = 256 << 20
"""Bound of what may be set as the largest body."""


class DataPlaneSettings(BaseModel):
    """What an operator can set about Envoy. Times are seconds, sizes bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tls_cert: Path | None = None
    """Certificate chain (PEM) of the gateway; with it, it speaks TLS only. Renewed files are taken up."""
    tls_key: Path | None = None
    """Private key of the certificate (PEM)."""
    api_keys: Path | None = None
    """File of the keys that clients need; None: nobody needs one. A changed file is taken up."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Most requests a minute for each key whose line says nothing else; None: no limit."""
    max_body_bytes: int = Field(default=32 << 20, ge=1 << 10, le=LARGEST_BODY_BYTES)
    """A larger request body is answered with 413."""
    headers_timeout_s: float = Field(default=10.0, gt=0.0)
    """Longest time a client may take to send its headers."""
    request_timeout_s: float = Field(default=120.0, gt=0.0)
    """Longest time a client may take to send its request."""
    idle_timeout_s: float = Field(default=900.0, gt=0.0)
    """A request in which nothing moves for this long is ended."""
    stall_timeout_s: float = Field(default=60.0, gt=0.0)
    """A stream that has begun is ended when its replica has answered nothing at all for this long."""
    connection_idle_s: float = Field(default=3600.0, gt=0.0)
    """A client's connection without a request is closed after this."""
    connect_timeout_s: float = Field(default=1.0, gt=0.0)
    """Longest time to connect to a replica."""
    keepalive_s: float = Field(default=4.0, gt=0.0)
    """Idle connections to replicas are closed after this; vLLM's server closes them after 5 s."""
    retries: int = Field(default=3, ge=0, le=10)
    """Further replicas tried before the first byte of an answer."""
    most_connections: int = Field(default=50_000, ge=1)
    """Clients' connections at one time; further ones are refused."""
    most_requests: int = Field(default=100_000, ge=1)
    """Requests in flight to the whole fleet; further ones are answered with 503."""
    most_retries: int = Field(default=1_000, ge=1)
    """Retries at one time."""
    eject_after: int = Field(default=2, ge=1)
    """A replica that cannot be reached so often in a row is left out for a while ..."""
    eject_s: float = Field(default=2.0, gt=0.0)
    """... this long, and longer each further time."""
    frozen_s: float = Field(default=10.0, ge=2.0)
    """A replica that answers no health check for about this long gets no new request; what it has, waits."""
    picker_timeout_s: float = Field(default=2.0, gt=0.0)
    """A picker that says nothing for this long is passed over."""
    log_interval_s: float = Field(default=0.02, gt=0.0)
    """Access-log entries, which tell the picker that requests ended, are sent this often."""
    workers: int = Field(default=1, ge=1, le=256)
    """Envoy's worker threads."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both or none")
        if self.requests_per_minute is not None and self.api_keys is None:
            raise ValueError("requests_per_minute limits keys; give api_keys, too")
        return self


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files and sockets through which the processes of one gateway meet."""

    path: Path

    @property
    def envoy_config(self) -> Path:
        """Envoy's bootstrap configuration (JSON, which is YAML)."""
        return self.path / "envoy.yaml"

    @property
    def listeners(self) -> Path:
        """Envoy's listener, watched by Envoy."""
        return self.path / "lds.json"

    @property
    def clusters(self) -> Path:
        """Envoy's clusters, watched by Envoy."""
        return self.path / "cds.json"

    @property
    def certificate(self) -> Path:
        """Where Envoy finds the gateway's certificate, watched by Envoy."""
        return self.path / "sds.json"

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
    def targets(self) -> Path:
        """What each replica that runs here is to do."""
        return self.path / "targets.json"

    @property
    def changes(self) -> Path:
        """What was done to replicas, and what it took."""
        return self.path / "changes.jsonl"

    @property
    def allocation(self) -> Path:
        """The last allocation the picker was given, with its arms."""
        return self.path / "allocation.json"

    @property
    def salt(self) -> Path:
        """Secret of the hashes of sessions and prompts."""
        return self.path / "salt"
