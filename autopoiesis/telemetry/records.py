"""The rows that the other rooms write and read. Times are Unix seconds."""

from dataclasses import dataclass, field
from enum import StrEnum

from autopoiesis.arms.allocation import Allocation


class Status(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    SHED = "shed"
    """Refused by the arm's `admit`, or the held queue was full."""
    FAILED = "failed"
    """The replica or the way to it failed, or it answered with an error of its own."""
    REJECTED = "rejected"
    """The request itself was wrong (4xx); it counts against nobody."""
    ABORTED = "aborted"
    """The client went away; it counts against nobody."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the gateway saw it. Never any content: lengths and salted hashes only."""

    id: str
    arrived_s: float
    path: str
    model: str
    status: Status
    http_status: int
    arm_id: str
    """The arm that decided; empty if the control plane was away and Envoy chose."""
    window: int
    """The window of the allocation it was decided under, -1 if none."""
    shard: int
    session: int
    replica: str
    """Name of the replica that answered, empty if none."""
    attempts: int
    stream: bool
    input_tokens: int
    output_tokens: int
    max_output_tokens: int
    cached_tokens: int
    """Prompt tokens expected in the replica's prefix cache when it was sent there."""
    usage_counted: bool
    """True: token counts are the replica's own `usage`; False: estimated."""
    priority_class: float
    held_s: float
    decision_s: float
    """CPU-side time from body received to answer sent, without the time held."""
    ttft_s: float | None
    """Arrival to first body chunk of a stream; None if there was none or it was no stream."""
    e2e_s: float
    blocks: tuple[int, ...] = ()

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first [s]; None where it is not defined."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return max(self.e2e_s - self.ttft_s, 0.0) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request that the gateway still has, as far as it is known."""

    arrived_s: float
    shard: int
    input_tokens: int
    max_output_tokens: int
    session: int = 0
    priority_class: float = 0.0
    replica: str = ""
    """Where it was sent, empty while it is held."""
    first_token_s: float | None = None
    """When its first token came."""
    cached_tokens: int = 0
    generated_tokens: int = -1
    """Tokens that have come so far, by its replica's pace; -1 where nobody knows."""
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """One replica at one moment."""

    at_s: float
    replica: str
    address: str
    healthy: bool
    in_flight: int
    running: float
    waiting: float
    kv_usage: float
    prefix_queries_total: float
    prefix_hits_total: float
    preemptions_total: float


@dataclass(frozen=True, slots=True)
class CellRow:
    """One cell of one window, with what came of it."""

    window: int
    cell: int
    arm_id: str
    replicas: tuple[str, ...]
    shards: int
    propensity: float
    requests: int
    completed: int
    shed: int
    failed: int
    unfinished: int
    input_tokens: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    goodput_rps: float
    utility: float | None
    """Mean utility of the requests that count [0..1]; None if none do."""
    replica_seconds: float


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """What one window says and what the bandit believes of one arm."""

    arm_id: str
    twin_utility: float | None
    observed_utility: float | None
    estimate: float | None
    """Doubly robust estimate of the window's utility had the arm served it all."""
    posterior_mean: float
    posterior_sd: float
    probability: float
    """Probability of being drawn for a cell of the next window."""


@dataclass(frozen=True, slots=True)
class WindowRow:
    """One window."""

    window: int
    started_s: float
    ended_s: float
    objective: dict[str, float]
    context: dict[str, float]
    requests: int
    completed: int
    shed: int
    failed: int
    throughput_tokens_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    goodput_rps: float
    utility: float | None
    regret: float | None
    regret_low: float | None
    regret_high: float | None
    drift: str
    """What drifted in this window: names of detectors, comma-separated; empty for none."""
    twin_weight: float


@dataclass(frozen=True, slots=True)
class TwinErrorRow:
    """The twin against what was observed, for one window."""

    window: int
    metric: str
    """ttft_mean_s, tpot_mean_s, e2e_mean_s or utility."""
    observed: float
    twin: float


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A slow policy's word on what the fleet should be. A plan that is carried out has a second row at its end."""

    window: int
    """After which it was asked."""
    arm_id: str
    outcome: str
    """begun, applied, given up, dry run, kept the old one, refused, failed."""
    plan: str
    """JSON; of a policy that failed, the plan that stays."""
    created_s: float
    scheduling_s: float = 0.0
    """What the fleet waited for the policy [s]."""
    cpu_s: float = 0.0
    """CPU time that the policy took [s]."""
    stale_s: float | None = None
    """From the question until the plan was carried out: the time on the old one [s]."""
    idle_replica_s: float | None = None
    """Replica-seconds in which replicas were there and served nobody."""
    finished_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reconfiguration:
    """What it took to change one replica. Durations are seconds; 0 where a phase was not seen."""

    replica: str
    action: str
    """start, stop, sleep, wake, restart."""
    began_s: float
    """When the change began, the replica being drained."""
    seconds: float
    """From then until it served, or was gone."""
    drain_s: float = 0.0
    """Before that: from the order until it was empty."""
    import_s: float = 0.0
    """Processes and imports: what is left of the seconds."""
    load_s: float = 0.0
    """Weights."""
    compile_s: float = 0.0
    capture_s: float = 0.0
    """CUDA graphs."""
    engine_s: float = 0.0
    """Profiling, making the KV cache, warming the engine up, without compiling and capturing."""
    warmup_s: float = 0.0
    """How much longer its first answer took than its second."""
    max_num_seqs: int = 0
    """The limits it got; 0: as it was started first."""
    max_num_batched_tokens: int = 0
    tensor_parallel: int = 0
    error: str = ""
    """Why it failed and was taken back, empty if it did not."""


@dataclass(frozen=True, slots=True)
class PrefixErrorRow:
    """Prefix-cache hits of one replica in one window: expected by the gateway, and counted by the replica."""

    window: int
    replica: str
    tokens: int
    """Prompt tokens that the replica looked up."""
    expected: float
    """Share of prompt tokens that were expected in the cache [0..1]."""
    observed: float
    """Share of looked-up tokens that were found there [0..1]."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something an operator would want to know, in one line."""

    at_s: float
    kind: str
    """allocation, drift, synthesis, arm, replica, fleet, gateway, operator, fault ..."""
    window: int
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class GuardRails:
    """What an operator has ordered: bounds within which the loop decides."""

    frozen: bool = False
    """Arms and allocation stay as they are; learning goes on."""
    dry_run: bool = False
    """The loop decides and records, nothing is applied."""
    human_only: bool = False
    """Only arms that people wrote have traffic."""
    only: str = ""
    """Id of the arm that has all traffic, empty for none."""
    held: Allocation | None = None
    """What serves while frozen or in dry run."""

    @property
    def hold(self) -> bool:
        """Whether arms and allocation stay as they are."""
        return self.frozen or self.dry_run


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One proposal and how far it came."""

    arm_id: str
    """Empty if it did not even verify."""
    source: str
    verdict: str
    """promoted, rejected."""
    gate: str
    """The gate that decided: verify, novelty, screen, race, holdout, tuning, promoted, or tuned."""
    reason: str
    gain: float | None
    """Paired mean gain in utility over the best incumbent."""
    gain_low: float | None
    gain_high: float | None
    parents: tuple[str, ...] = ()
    """Ids of the policies it was made from."""
    thought: str = ""
    """What its author said of it."""
    slow: str = ""
    """Source of its slow functions, empty for none."""
    model: str = ""
    """The language model that wrote it, empty for none."""
    tokens: int = 0
    """Its part of what the answer that holds it took, prompt and repair included."""
    cost_usd: float = 0.0
    prompt: str = ""
    """What the model was asked; kept of promoted ones only, with the arm."""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class SynthesisRow:
    """One synthesis cycle."""

    started_s: float
    window: int
    trigger: str
    synthesizer: str
    seconds: float
    cpu_seconds: float
    tokens: int
    cost_usd: float
    beaten: str = ""
    """Id of the best incumbent, over which gains are."""
    promoted: tuple[str, ...] = ()
    candidates: tuple[CandidateRow, ...] = field(default=())
    error: str = ""
    conclusion: str = ""
    """What came of it, in one line."""
    since_window: int | None = None
    """The first window of what it answers; None for a cycle by hand."""
