"""The paper's three clusters, what replicas on them serve, and what it costs to change them.

Sizes and phases are the paper's (arXiv 2604.07144v1, section 7 and appendix H.3). What a replica
serves is measured in the twin: one engine, saturated with requests of the asked lengths.
"""

import time
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from autopoiesis.arms.arm import State
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Kind
from autopoiesis.arms.prefix import BLOCK_TOKENS
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.capacity_trace import CapacityTrace
from autopoiesis.twin.hardware import HardwareError, gpus, models
from autopoiesis.twin.latency import Profile, profile
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.phases import (
    HETEROGENEOUS,
    LENGTH_SPREAD,
    PAPER_TRACES,
    paper_capacity,
)
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace

GIB = float(1 << 30)
BYTES = 2
"""Per parameter: bf16."""
WIDTHS = (1, 2, 4, 8)
LEAST_KV_TOKENS = 16_384
"""An option whose KV cache holds less is none: it could not batch."""
PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs of one type."""

    gpu: str
    """By its name in `twin/hardware.json`."""
    count: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs and the models that they serve."""

    name: str
    pools: tuple[Pool, ...]
    models: tuple[str, ...]
    elastic: bool = False
    """Whether GPUs come and go as in the paper's table 16."""

    def available(self, gpu: str, at_s: float) -> int:
        """Return how many GPUs of a type there are at a time."""
        if self.elastic:
            schedule = _schedule()
            row = int(np.searchsorted(schedule.at_s, at_s, side="right")) - 1
            return int(schedule.nodes[row])
        return next(pool.count for pool in self.pools if pool.gpu == gpu)

    def next_change_s(self, after_s: float) -> float:
        """Return when the number of GPUs changes next; infinity for never."""
        if not self.elastic:
            return float("inf")
        later = _schedule().at_s
        later = later[later > after_s]
        return float(later[0]) if len(later) else float("inf")


@cache
def _schedule() -> CapacityTrace:
    return paper_capacity()


LARGE, SMALL, MEDIUM = "llama-3.1-70b", "llama-3.1-8b", "llama-2-13b"
HOMOGENEOUS_CLUSTER = Cluster("homogeneous", (Pool("h100", 32),), (LARGE,))
HETEROGENEOUS_CLUSTER = Cluster(
    "heterogeneous",
    (Pool("a100-40", 20), Pool("a100", 20), Pool("h100", 8), Pool("h20", 16)),
    (LARGE, SMALL, MEDIUM),
)
ELASTIC_CLUSTER = Cluster("elastic", (Pool("a100", 64),), (LARGE,), elastic=True)
CLUSTERS = {c.name: c for c in (HOMOGENEOUS_CLUSTER, HETEROGENEOUS_CLUSTER, ELASTIC_CLUSTER)}


# --- what there is to do ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """One phase: requests per model that are all there when it begins, around one mean shape."""

    requests: tuple[float, ...]
    """In the order of the cluster's models."""
    input_tokens: float
    output_tokens: float


COUNT_SPREAD, SHAPE_SPREAD = 0.1, 0.1
"""Standard deviations of the logarithms of a phase's count and mean lengths from seed to seed; ours."""
MIX = 4.0
"""Concentration of the Dirichlet distribution that the models' shares of a phase come from; ours."""


def batches(trace: str, cluster: Cluster, seed: int, scale: float = 1.0) -> tuple[Batch, ...]:
    """Return the phases of one of the paper's traces, with that fluctuation which a seed gives."""
    rng = np.random.default_rng([seed, 7])
    larger = HETEROGENEOUS if len(cluster.models) > 1 else 1.0
    made: list[Batch] = []
    for phase in PAPER_TRACES[trace]:
        count = phase.requests * larger * scale * rng.lognormal(0.0, COUNT_SPREAD)
        shares = rng.dirichlet([MIX] * len(cluster.models))
        made.append(
            Batch(
                tuple((count * shares).tolist()),
                phase.prefill_tokens * float(rng.lognormal(0.0, SHAPE_SPREAD)),
                max(phase.decode_tokens * float(rng.lognormal(0.0, SHAPE_SPREAD)), 1.0),
            )
        )
    return tuple(made)


# --- what replicas do -------------------------------------------------------------------------


@cache
def profile_of(model: str, gpu: str, width: int) -> Profile | None:
    """Return the engine of a model on that many GPUs, None if it does not fit."""
    try:
        found = profile(f"{gpu}-{model}-tp{width}-bf16")
    except (HardwareError, ValueError):
        return None
    return found if found.kv_tokens >= LEAST_KV_TOKENS else None


def weights_bytes(model: str) -> float:
    """Return the size of a model's weights."""
    return float(models()[model].parameters * BYTES)


DIGITS = 2
"""Significant digits of lengths between which a replica's rate is not told apart."""
SATURATED = 5
"""Requests per sequence slot that a replica is saturated with."""
STEADY = (0.3, 0.75)
"""Shares of the requests between whose ends the rate is taken: at the beginning the batch fills up,
at the end it runs dry."""


def rate_rps(kind: Kind, input_tokens: float, output_tokens: float) -> float:
    """Return what one saturated replica serves of requests around these mean lengths [requests/s].

    Measured in the twin and kept; 0 for a replica that fits nowhere or can hold no such request.
    """
    return _rate_rps(kind, rounded(input_tokens), rounded(output_tokens))


def rounded(tokens: float) -> float:
    """Return a length with as many digits as rates are told apart by."""
    return float(f"{max(tokens, 1.0):.{DIGITS}g}")


def measuring_cpu_s() -> float:
    """Return the CPU time that measuring rates has taken in this process so far."""
    return _measuring.cpu_s


@dataclass(slots=True)
class _Measuring:
    cpu_s: float = 0.0


_measuring = _Measuring()


@cache
def _rate_rps(kind: Kind, input_tokens: float, output_tokens: float) -> float:
    began_s = time.process_time()
    try:
        return _measured_rps(kind, input_tokens, output_tokens)
    finally:
        _measuring.cpu_s += time.process_time() - began_s


def _measured_rps(kind: Kind, input_tokens: float, output_tokens: float) -> float:
    found = profile_of(kind.model, kind.gpu, kind.tensor_parallel)
    if found is None:
        return 0.0
    engine = replace(
        found, max_num_seqs=kind.max_num_seqs, max_num_batched_tokens=kind.max_num_batched_tokens
    )
    n = SATURATED * min(kind.max_num_seqs, 512)
    trace = uniform_batch(n, input_tokens, output_tokens)
    outcome = run_arm(trace, [ReplicaSpec("one", engine)], _first(), Objective(), 0)
    done_s = np.sort(outcome.finished_s[outcome.status == Status.COMPLETED])
    first, last = (int(share * len(done_s)) for share in STEADY)
    if last <= first or done_s[last] <= done_s[first]:
        return 0.0
    return (last - first) / float(done_s[last] - done_s[first])


def uniform_batch(n: int, input_tokens: float, output_tokens: float, seed: int = 0) -> Trace:
    """Return n requests at time 0 with log-normal lengths around these means."""
    rng = np.random.default_rng([seed, 8])

    def lengths(mean: float) -> np.ndarray:
        drawn = mean * rng.lognormal(-(LENGTH_SPREAD**2) / 2, LENGTH_SPREAD, n)
        return np.maximum(np.rint(drawn), 1).astype(np.int64)

    outputs = lengths(output_tokens)
    return Trace(
        arrival_s=np.zeros(n),
        input_tokens=lengths(input_tokens),
        output_tokens=outputs,
        max_output_tokens=np.full(n, max(4096, int(outputs.max())), np.int64),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=BLOCK_TOKENS,
        name="batch",
    )


@cache
def _first() -> Program:
    arm = next(a for a in seed_arms() if a.name == "least-requests" and a.state is State.LIVE)
    return compile_policy(verify(arm.source))


# --- what a change costs ----------------------------------------------------------------------

PCIE_GB_S = {"h100": 64.0, "h20": 64.0, "a100": 32.0, "a100-40": 32.0}
CORRECTION = (5.3, 11.5)
"""The paper's c_z for the largest and the smallest model: small ones load less efficiently."""
CORRECTED_BYTES = (140e9, 16e9)
"""Sizes that those belong to; between them c_z is linear in the size's logarithm (ours)."""
READ_GB_S = 5.0
"""From the disk to a replica's GPUs; ours."""
ENGINE_S = 30.0
"""To start vLLM's engine and capture its graphs; ours, after public start-ups of 30 to over 100 s."""
DRAIN_S, STOP_S = 10.0, 5.0
"""Until running requests are done, and until the GPUs are free; ours."""


@dataclass(frozen=True, slots=True)
class Costs:
    """How long a replica takes to go and to come."""

    name: str
    """`paper`: weights over PCIe twice (terminate and load), the slowest counts for all; `replica`: each
    replica drains, frees its GPUs, reads its weights and starts its engine."""

    def drain_s(self) -> float:
        """Return the time until a replica that gets nothing new is empty."""
        return DRAIN_S if self.name == "replica" else 0.0

    def stop_s(self, model: str, gpu: str) -> float:
        """Return the time from then until its GPUs are free."""
        return STOP_S if self.name == "replica" else _transfer_s(model, gpu)

    def load_s(self, model: str, gpu: str) -> float:
        """Return the time to load the weights."""
        if self.name == "replica":
            return weights_bytes(model) / (READ_GB_S * 1e9)
        return _transfer_s(model, gpu)

    def engine_s(self) -> float:
        """Return the time to start the engine."""
        return ENGINE_S if self.name == "replica" else 0.0

    def start_s(self, kind: Kind) -> float:
        """Return the time from the command to start to the first request."""
        return self.load_s(kind.model, kind.gpu) + self.engine_s()


PAPER_COSTS, REPLICA_COSTS = Costs("paper"), Costs("replica")


def _transfer_s(model: str, gpu: str) -> float:
    """The paper's tau = W / P x c (appendix B)."""
    size = weights_bytes(model)
    large, small = CORRECTED_BYTES
    place = np.clip(np.log(large / size) / np.log(large / small), 0.0, 1.0)
    correction = CORRECTION[0] + float(place) * (CORRECTION[1] - CORRECTION[0])
    return size / (PCIE_GB_S[gpu] * 1e9) * correction


def memory_gib(gpu: str) -> float:
    """Return a GPU's memory."""
    return gpus()[gpu].memory_bytes / GIB
