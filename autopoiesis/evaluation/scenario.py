"""What contestants are put into: traffic, a fleet, and what happens to both, all from a seed.

A scenario is plain data, so that a result can be filed under what it depends on. `situation_of`
makes it: it cuts the traces, finds out what the fleet can serve, and lets requests arrive at the
asked share of that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.orchestrator.replay_fleet import ReplayFleet, fleet_under
from autopoiesis.twin.capacity_trace import START_UP, fleet_course, read_capacity
from autopoiesis.twin.composition import splice
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace, TraceError, read_trace

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, lie far apart: where each seed begins in a trace."""
PROBED_REQUESTS = 1500
"""Requests that a fleet's capacity is measured with."""
PROBES = ("least-tokens", "prefix-affinity")
"""Human arms that the capacity is measured under; the faster one counts."""
SETTLED_SHARE = 0.9
"""The capacity is measured up to here: the last requests of a batch leave replicas idle."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one trace at a constant share of the fleet's capacity."""

    trace: str
    """A file in the folder of traces, without its suffix."""
    load: float
    """Mean arrivals over what the fleet can serve of this traffic."""
    seconds: float
    lengths: float = 1.0
    """Factor of prompts and answers: for models that take little at a time."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Simulated replicas."""

    profile: str
    speeds: tuple[float, ...]
    """One per replica."""
    kv_share: float = 1.0
    """Part of the profile's KV cache that there is."""

    def replicas(self) -> tuple[ReplicaSpec, ...]:
        """Return the replicas of the twin."""
        whole = profile(self.profile)
        one = replace(whole, kv_blocks=max(round(whole.kv_blocks * self.kv_share), 1))
        return tuple(ReplicaSpec(f"r{i}", one, speed) for i, speed in enumerate(self.speeds))


@dataclass(frozen=True, slots=True)
class Market:
    """A capacity trace that takes and gives replicas."""

    trace: str
    speed: float
    notice_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One setting in which contestants are compared; a seed makes it concrete."""

    name: str
    past: tuple[Segment, ...]
    """Served, and open to all that learn, but not judged."""
    judged: tuple[Segment, ...]
    fleet: FleetPlan
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.1
    late_worth: float = 0.1
    window_s: float = 10.0
    market: Market | None = None
    vllm: bool = False
    """Whether `live` serves it with real vLLM servers; the fleet then says how many, and how they are modelled."""

    @property
    def objective(self) -> Objective:
        """The service-level objective."""
        return Objective(self.slo_ttft_s, self.slo_tpot_s, self.late_worth)


@dataclass(frozen=True)
class Situation:
    """A scenario made concrete."""

    scenario: Scenario
    seed: int
    trace: Trace
    judged_from_s: float
    shifts_s: tuple[float, ...]
    """When the judged traffic changes; known to the measures, not to contestants."""
    fleet: ReplayFleet

    @property
    def objective(self) -> Objective:
        """The service-level objective."""
        return self.scenario.objective

    @property
    def window_s(self) -> float:
        """Length of a window."""
        return self.scenario.window_s

    @cached_property
    def past(self) -> Trace:
        """What may be learned from before the judged part begins."""
        return self.trace.slice(0.0, self.judged_from_s)


ReadTrace = Callable[[str], Trace]


def situation_of(scenario: Scenario, seed: int, traces: Path) -> Situation:
    """Make a scenario concrete with the traces of a folder.

    Raises:
        TraceError: a trace is missing, broken, or too short for what is asked of it.
    """

    def read(name: str) -> Trace:
        return read_trace(traces / f"{name}.parquet")

    replicas = scenario.fleet.replicas()
    parts = segments(scenario, seed, replicas, read)
    past = parts[: len(scenario.past)]
    starts_s = np.cumsum([0.0, *(segment.seconds for segment in _all(scenario))])
    moved = [
        replace(part, arrival_s=part.arrival_s + at)
        for part, at in zip(parts, starts_s.tolist(), strict=False)
    ]
    trace = _joined(moved, scenario.name)
    course = None
    if scenario.market is not None:
        market = scenario.market
        capacity = read_capacity(traces / f"{market.trace}.parquet").speed(market.speed)
        course = fleet_course(
            capacity, len(replicas), seed, notice_s=market.notice_s, start_up=START_UP
        )
    fleet = fleet_under(replicas, course)
    judged_from_s = float(starts_s[len(past)])
    shifts_s = tuple(starts_s[len(past) + 1 : -1].tolist())
    if course is not None:
        shifts_s = tuple(sorted({*shifts_s, *_losses(fleet, judged_from_s, float(starts_s[-1]))}))
    return Situation(scenario, seed, trace, judged_from_s, shifts_s, fleet)


def segments(
    scenario: Scenario, seed: int, replicas: Sequence[ReplicaSpec], read: ReadTrace
) -> list[Trace]:
    """Cut each segment out of its trace, one behind the other, at its share of the capacity.

    What the fleet can serve is measured on the requests where the segment begins, since lengths drift.
    """
    whole: dict[tuple[str, float], Trace] = {}
    next_row: dict[str, int] = {}
    cut: list[Trace] = []
    for segment in _all(scenario):
        name, of = segment.trace, (segment.trace, segment.lengths)
        if of not in whole:
            whole[of] = _scaled(read(name), segment.lengths)
        # Every seed begins elsewhere, so it has other requests, not only other random numbers.
        next_row.setdefault(name, int(len(whole[of]) * ((seed * GOLDEN) % 1.0)))
        trace, first = whole[of], next_row[name]
        probe = min(first, max(len(trace) - PROBED_REQUESTS, 0))
        probed = trace.select(np.arange(probe, min(probe + PROBED_REQUESTS, len(trace))))
        n = round(segment.load * capacity_rps(probed, replicas, seed) * segment.seconds)
        part, next_row[name] = _around(trace, first, max(n, 2))
        fitted = part.speed(part.duration_s / segment.seconds)
        # Rounding may put the last request behind the beginning of the next segment.
        ends_s = np.minimum(fitted.arrival_s, segment.seconds)
        cut.append(replace(fitted, arrival_s=ends_s))
    return cut


def _scaled(trace: Trace, lengths: float) -> Trace:
    """Return the trace with prompts and answers that many times as long; without prefixes, if they change."""
    if lengths == 1.0:
        return trace
    inputs, outputs, most = (
        np.maximum(np.rint(column * lengths), 1).astype(np.int64)
        for column in (trace.input_tokens, trace.output_tokens, trace.max_output_tokens)
    )
    return replace(
        trace,
        input_tokens=inputs,
        output_tokens=outputs,
        max_output_tokens=np.maximum(most, outputs),
        block_start=np.zeros(len(trace) + 1, np.int64),
        blocks=np.zeros(0, np.int64),
    )


def capacity_rps(trace: Trace, replicas: Sequence[ReplicaSpec], seed: int = 0) -> float:
    """Return how many of these requests a second the fleet completes when it never has to wait for any.

    All requests arrive at once; the fastest of `PROBES` counts, up to the time when 90 % are done.
    """
    batch = replace(trace, arrival_s=np.zeros(len(trace)))
    best = 0.0
    for program in _probes():
        outcome = run_arm(batch, replicas, program, Objective(), seed)
        done_s = np.sort(outcome.finished_s[outcome.status == Status.COMPLETED])
        if len(done_s):
            settled = max(int(SETTLED_SHARE * len(done_s)) - 1, 0)
            best = max(best, (settled + 1) / float(done_s[settled]))
    if best == 0.0:
        raise TraceError(f"{trace.name}: the fleet can serve no request of it; give it more memory")
    return best


def _probes() -> list[Program]:
    return [compile_policy(verify(arm.source)) for arm in seed_arms() if arm.name in PROBES]


def _all(scenario: Scenario) -> tuple[Segment, ...]:
    return scenario.past + scenario.judged


def _around(trace: Trace, first: int, n: int) -> tuple[Trace, int]:
    """Take n requests from one on, going on at the trace's beginning when it ends; times from 0."""
    if n > len(trace):
        raise TraceError(
            f"{trace.name}: has {len(trace)} requests, {n} are needed at this load; "
            "use a shorter segment or a smaller fleet"
        )
    last = first + n
    tail = _from_zero(trace.select(np.arange(first, min(last, len(trace)))))
    if last < len(trace):
        return tail, last
    head = _from_zero(trace.head(last - len(trace)))
    mean_gap_s = trace.duration_s / len(trace)
    late = replace(head, arrival_s=head.arrival_s + tail.duration_s + mean_gap_s)
    return _joined([tail, late], trace.name), last - len(trace)


def _from_zero(trace: Trace) -> Trace:
    """Return the trace with times from its first request on."""
    return replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[:1])


def _joined(parts: Sequence[Trace], name: str) -> Trace:
    """Put parts whose times do not overlap into one trace; sizes of blocks as `splice` has it."""
    there = [part for part in parts if len(part)]
    arrival_s = np.concatenate([part.arrival_s for part in there] or [np.zeros(0)])
    return replace(splice([_from_zero(part) for part in there], name), arrival_s=arrival_s)


def _losses(fleet: ReplayFleet, from_s: float, to_s: float) -> list[float]:
    return [c.at_s for c in fleet.changes if from_s < c.at_s < to_s]
