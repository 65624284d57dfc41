"""The features policies see: one float each, with its unit. The names are a contract.

A policy reads them as `request.input_tokens`, `replica.in_flight`, `fleet.held`. The same kernels
(`arms.fleet`) fill them in the gateway and in the twin.
"""

from typing import NamedTuple


class Request(NamedTuple):
    """What is known of a request before it runs."""

    input_tokens: float
    """Prompt length [tokens], estimated from the body's bytes."""
    predicted_output_tokens: float
    """Expected output length [tokens]: what recent requests produced, at most `max_output_tokens`."""
    max_output_tokens: float
    """The client's own limit on the output [tokens]."""
    priority_class: float
    """The client's priority; 0 is normal, lower is more urgent."""
    waited_s: float
    """Time since arrival [s]; above 0 only when the request was held."""
    slack_s: float
    """Time left until the first token would miss the SLO [s]; may be negative."""


class Replica(NamedTuple):
    """What is known of one replica."""

    in_flight: float
    """Requests sent there and not finished, by our own count."""
    queued_prefill_tokens: float
    """Prompt tokens on their way there, not found in its prefix cache, whose first token is not out yet."""
    decoding_tokens: float
    """Context tokens (prompt and predicted output) of requests there past their first token."""
    running: float
    """Requests in its batch, as it last reported."""
    waiting: float
    """Requests in its own queue, as it last reported."""
    kv_usage: float
    """Share of its KV cache in use [0..1], as it last reported."""
    prefix_hit_tokens: float
    """Prompt tokens of this request that its prefix cache probably holds."""
    session_here: float
    """1 if this request's session was last served there, else 0."""
    ttft_ewma_s: float
    """Moving average of its time to first token [s]."""
    tpot_ewma_s: float
    """Moving average of its time per output token [s]."""
    error_rate: float
    """Moving share of its requests that failed [0..1]."""
    speed: float
    """Its speed relative to the fleet's reference replica (1 = equal)."""
    age_s: float
    """Time since it joined [s]; a young replica has a cold cache."""
    draining: float
    """1 if it should receive nothing new, else 0."""
    position: float
    """Its place in the group, 0 .. fleet.replicas - 1."""


class Fleet(NamedTuple):
    """What is known of the group of replicas that the arm governs, and of its traffic."""

    replicas: float
    """Replicas in the group."""
    in_flight: float
    """Requests in flight in the group."""
    held: float
    """Requests held at the gateway for the group."""
    arrival_rate_rps: float
    """Arrivals for the group [requests/s], moving average."""
    arrival_burstiness: float
    """Coefficient of variation of the time between arrivals (1 = Poisson), moving average."""
    input_tokens_mean: float
    """Mean prompt length of recent requests [tokens]."""
    kv_usage_mean: float
    """Mean of the group's `kv_usage` [0..1]."""
    prefix_share: float
    """Share of recent prompt tokens that some replica's prefix cache held [0..1]."""
    slo_ttft_s: float
    """Objective for the time to first token [s]."""
    slo_tpot_s: float
    """Objective for the time per output token [s]."""
    draw: float
    """One uniform number in [0, 1) per decision."""
    sequence: float
    """Number of the decision, counted per group: 0, 1, 2, ..."""


N_REQUEST = len(Request._fields)
N_REPLICA = len(Replica._fields)
N_FLEET = len(Fleet._fields)

FIRST_REQUEST = 0
"""Register of `request`'s first field; the other fields follow in order."""
FIRST_REPLICA = FIRST_REQUEST + N_REQUEST
"""Register of `replica`'s first field."""
FIRST_FLEET = FIRST_REPLICA + N_REPLICA
"""Register of `fleet`'s first field."""
FIRST_CONSTANT = FIRST_FLEET + N_FLEET
"""Register of a program's first constant; temporaries follow the constants."""

INPUTS: dict[str, tuple[type[Request] | type[Replica] | type[Fleet], int]] = {
    "request": (Request, FIRST_REQUEST),
    "replica": (Replica, FIRST_REPLICA),
    "fleet": (Fleet, FIRST_FLEET),
}
"""Parameter name → (its declared fields, its first register)."""

FUNCTIONS: dict[str, tuple[str, ...]] = {
    "score": ("request", "replica", "fleet"),
    "admit": ("request", "fleet"),
    "priority": ("request", "fleet"),
    "ceiling": ("request", "replica", "fleet"),
}
"""A policy's functions and their parameters; only `score` is required."""
