"""The paper's total time T of a workload under a slow policy: scheduling, stale, reconfiguration, serving.

Serving never pauses. The policy is asked after each monitoring step; while it thinks, the fleet
serves under the old plan (stale); then replicas that the plans do not share go and come
(reconfiguration) while the others serve on. Requests wait in one queue and replicas are saturated
until it is empty, so what is served is the sum of the ready replicas' rates, which the twin has measured.
Thinking is measured as CPU time of the policy's own code.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, cast

import numpy as np

from autopoiesis.arms.migration import Order
from autopoiesis.arms.plan import Kind, Plan, ReplicaGroup
from autopoiesis.arms.plan_check import check
from autopoiesis.arms.slow import SlowPolicy
from autopoiesis.arms.slow_features import (
    DemandFeatures,
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    NodeFeatures,
    OptionFeatures,
    WindowFeatures,
)
from autopoiesis.evaluation.cluster import (
    GIB,
    PER_NODE,
    WIDTHS,
    Batch,
    Cluster,
    Costs,
    memory_gib,
    profile_of,
    rate_rps,
    weights_bytes,
)

MONITOR_S = 5.0
"""The paper's example of a monitoring step."""
LIMIT_S = 7200.0
"""A workload that is not done by then counts as done: the policy has left the fleet unable to serve."""
DEMAND_RPS = 1000.0
"""Demand that planners are told, split among models as their outstanding requests are: more than any
plan serves, because the aim is to be done soon."""
FIRST_OUTPUT_TOKENS = 256.0
"""Mean output length that planners are told before any request has finished."""
FIRST_STABLE_S = 60.0
"""How long traffic is expected to stay before a phase has ended."""


class Spell(StrEnum):
    """What a stretch of time counts as."""

    SCHEDULING = "scheduling_s"
    STALE = "stale_s"
    RECONFIGURATION = "reconfiguration_s"
    SERVING = "serving_s"


class Instance(NamedTuple):
    """One replica."""

    kind: Kind
    ready_s: float


@dataclass(slots=True)
class State:
    """A fleet at work."""

    now_s: float = 0.0
    plan: Plan = field(default_factory=Plan)
    instances: tuple[Instance, ...] = ()
    phase: int = 0
    left: tuple[float, ...] = ()
    """Outstanding requests per model."""
    began_s: float = 0.0
    """When the phase began."""
    lasted_s: tuple[float, ...] = ()
    """How long the phases before took."""
    output_tokens: float = FIRST_OUTPUT_TOKENS
    """Mean output length of what finished in the last step in which something did."""
    changed_s: float = 0.0
    changed_steps: int = 0
    reschedulings: int = 0
    lost: int = 0
    gpus_before: dict[str, int] = field(default_factory=dict[str, int])
    spent: Counter[str] = field(default_factory=Counter[str])
    """Time by spell."""
    gpu_seconds: float = 0.0
    faults: int = 0

    def copy(self) -> "State":
        """Return a state that may go another way."""
        return replace(self, gpus_before=dict(self.gpus_before), spent=Counter(self.spent))


class Answer(NamedTuple):
    """What a policy wants, and what it took to find out."""

    plan: Plan | None
    """None: stay."""
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """What there is to do, where, and at which costs."""

    cluster: Cluster
    batches: tuple[Batch, ...]
    costs: Costs


@dataclass(frozen=True, slots=True)
class Loaded:
    """A slow policy's functions in this process, and how far its changes go."""

    name: str
    should_reschedule: Callable[[WindowFeatures, FleetFeatures, Plan], bool]
    schedule: Callable[[WindowFeatures, FleetFeatures, Plan], Plan]
    order: Order = Order.MINIMAL
    known: dict[Hashable, Answer] = field(default_factory=dict[Hashable, Answer], compare=False)
    """What its planner answered before, and what that took."""

    def decide(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer:
        """Ask the policy; a failure keeps the plan, and its time counts."""
        began_s = time.process_time()
        wanted: Plan | None = None
        try:
            if self.should_reschedule(window, fleet, plan):
                wanted = self.schedule(window, fleet, plan)
        except Exception:
            wanted = None
        return Answer(wanted, time.process_time() - began_s)

    def imagine(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer:
        """Ask the policy in a trial run: near-equal questions to its planner are answered from memory.

        What the planner took the first time is charged each time.
        """
        try:
            if not self.should_reschedule(window, fleet, plan):
                return Answer(None, 0.0)
        except Exception:
            return Answer(None, 0.0)
        demand = tuple((round(d.arrival_rate_rps, -1), *map(_rough, d[2:])) for d in window.demand)
        question = demand, tuple((g.name, g.available) for g in fleet.gpus), fleet.lost > 0, plan
        if question not in self.known:
            began_s = time.process_time()
            try:
                wanted = self.schedule(window, fleet, plan)
            except Exception:
                wanted = None
            self.known[question] = Answer(wanted, time.process_time() - began_s)
        return self.known[question]


def _rough(value: float) -> float:
    return float(f"{value:.2g}")


def loaded(policy: SlowPolicy, name: str, order: Order = Order.MINIMAL) -> Loaded:
    """Load a verified slow policy into this process.

    Only for policies that this package composes of its own seeds and of numbers: what others
    wrote belongs into the sandbox.
    """
    names: dict[str, Any] = {"Plan": Plan, "ReplicaGroup": ReplicaGroup}
    exec(compile(policy.source, name, "exec"), names)  # noqa: S102
    return Loaded(name, names["should_reschedule"], names["schedule"], order)


Decide = Callable[[State, WindowFeatures, FleetFeatures], tuple[Answer, Order]]
"""Who is asked after each step; it may look at the state and must not change it."""


def total_time(work: Workload, decide: Decide) -> State:
    """Serve the workload from a cold start to its end."""
    state = State(left=work.batches[0].requests)
    run(work, state, decide, LIMIT_S)
    return state


def run(
    work: Workload, state: State, decide: Decide, until_s: float, step_s: float = MONITOR_S
) -> None:
    """Go on until all is served, or until `until_s`, asking every `step_s`."""
    while not done(work, state) and state.now_s < until_s:
        monitored_s = state.now_s
        window, fleet = features(work, state)
        answer, order = decide(state, window, fleet)
        state.gpus_before = {g.name: g.available for g in fleet.gpus}
        cold = not state.plan.groups
        spell = Spell.SCHEDULING if cold else Spell.STALE
        if answer.plan is not None or cold:
            advance(work, state, state.now_s + answer.cpu_s, spell)
            _change(work, state, answer.plan or Plan(), fleet, order)
        state.changed_steps += 1
        advance(work, state, max(monitored_s + step_s, state.now_s), None)


def done(work: Workload, state: State) -> bool:
    """Tell whether nothing is left."""
    return state.phase >= len(work.batches)


def advance(work: Workload, state: State, until_s: float, spell: Spell | None) -> None:
    """Serve up to `until_s`, or to the end; time counts as `spell`, or as what the replicas do."""
    while state.now_s < until_s and not done(work, state):
        _lose(work, state)
        batch = work.batches[state.phase]
        rates = served_rps(work.cluster, state, batch)
        pending = [i.ready_s for i in state.instances if i.ready_s > state.now_s]
        ends = [
            state.now_s + left / rate
            for left, rate in zip(state.left, rates, strict=True)
            if left > 0.0 and rate > 0.0
        ]
        next_s = min([until_s, work.cluster.next_change_s(state.now_s), *pending, *ends])
        step_s = max(next_s - state.now_s, 0.0)
        kind = spell or (Spell.RECONFIGURATION if pending else Spell.SERVING)
        state.spent[kind] += step_s  # pyright: ignore[reportArgumentType] - seconds, not counts
        state.gpu_seconds += step_s * sum(i.kind.tensor_parallel for i in state.instances)
        state.left = tuple(
            0.0
            if rate > 0.0 and left - rate * step_s < 1e-6 * max(left, 1.0)
            else left - rate * step_s
            for left, rate in zip(state.left, rates, strict=True)
        )
        if sum(rates) > 0.0:
            state.output_tokens = batch.output_tokens
        state.now_s = next_s
        if not any(left > 0.0 for left in state.left):
            _next_phase(work, state)


def _next_phase(work: Workload, state: State) -> None:
    state.lasted_s = (*state.lasted_s, state.now_s - state.began_s)
    state.phase, state.began_s = state.phase + 1, state.now_s
    if not done(work, state):
        state.left = work.batches[state.phase].requests


def served_rps(cluster: Cluster, state: State, batch: Batch) -> list[float]:
    """Return what the ready replicas serve of each model [requests/s]."""
    rates = dict.fromkeys(cluster.models, 0.0)
    for kind, ready_s in state.instances:
        if ready_s <= state.now_s:
            rates[kind.model] += rate_rps(kind, batch.input_tokens, batch.output_tokens)
    return [rates[model] for model in cluster.models]


def _lose(work: Workload, state: State) -> None:
    """Take replicas away whose GPUs are gone, the newest first."""
    if not work.cluster.elastic:
        return
    for pool in work.cluster.pools:
        here = [i for i in state.instances if i.kind.gpu == pool.gpu]
        used = sum(i.kind.tensor_parallel for i in here)
        while used > work.cluster.available(pool.gpu, state.now_s):
            newest = max(here, key=lambda i: i.ready_s)
            here.remove(newest)
            used -= newest.kind.tensor_parallel
            state.lost += 1
        state.instances = (*(i for i in state.instances if i.kind.gpu != pool.gpu), *here)


def _change(work: Workload, state: State, plan: Plan, fleet: FleetFeatures, order: Order) -> None:
    """Carry a plan out, if it can be; replicas that both plans have run on, unless all is to go."""
    if check(plan, fleet):
        state.faults += 1
        return
    there = Counter(i.kind for i in state.instances)
    wanted = plan.kinds()
    cold = not state.plan.groups
    if wanted == there:
        state.plan = plan
        return
    kept = Counter[Kind]() if order is Order.FULL else there & wanted
    going = there - kept
    left = Counter(kept)
    staying: list[Instance] = []
    for instance in sorted(state.instances, key=lambda i: i.ready_s):
        if left[instance.kind] > 0:
            left[instance.kind] -= 1
            staying.append(instance)
    costs = work.costs
    freed_s = costs.drain_s() + max((costs.stop_s(k.model, k.gpu) for k in going), default=0.0)
    if not going:
        freed_s = 0.0
    coming = list((wanted - kept).elements())
    slowest_s = max((costs.start_s(kind) for kind in coming), default=0.0)
    starts = [
        Instance(
            kind,
            # The paper's costs are maxima over models: no replica is there before the slowest.
            state.now_s
            + (
                0.0
                if cold
                else freed_s + (slowest_s if costs.name == "paper" else costs.start_s(kind))
            ),
        )
        for kind in coming
    ]
    state.instances = (*staying, *starts)
    state.plan, state.lost = plan, 0
    state.changed_s, state.changed_steps = state.now_s, 0
    state.reschedulings += 0 if cold else 1


# --- what policies see ------------------------------------------------------------------------


def features(work: Workload, state: State) -> tuple[WindowFeatures, FleetFeatures]:
    """Return what a slow policy sees: of outputs only what has finished, of time only the past."""
    cluster, batch = work.cluster, work.batches[state.phase]
    outstanding = sum(state.left)
    shape = (batch.input_tokens, state.output_tokens)
    demand = tuple(
        DemandFeatures(model, DEMAND_RPS * left / max(outstanding, 1e-9), *shape)
        for model, left in zip(cluster.models, state.left, strict=True)
    )
    fleet = _fleet(work, state, shape)
    serves = sum(fleet.capacity_rps(state.plan, model) for model in cluster.models)
    zero = dict.fromkeys(WindowFeatures._fields, 0.0)
    values: dict[str, Any] = {
        **zero,
        "seconds": MONITOR_S,
        "requests": round(outstanding),
        "unfinished": round(outstanding),
        "arrival_rate_rps": DEMAND_RPS,
        "arrival_rate_change": 1.0,
        "arrival_rates_rps": (DEMAND_RPS,),
        "arrival_burstiness": 1.0,
        "input_tokens_mean": shape[0],
        "input_tokens_p99": shape[0],
        "input_tokens_change": 1.0,
        "output_tokens_mean": shape[1],
        "output_tokens_p99": shape[1],
        "output_tokens_change": 1.0,
        "utilisation": DEMAND_RPS / max(serves, 1e-9),
        "held_mean": outstanding,
        "drifted": state.began_s > state.now_s - MONITOR_S,
        "windows_since_rescheduling": state.changed_steps,
        "seconds_since_rescheduling": state.now_s - state.changed_s,
        "slo_ttft_s": 1.0,
        "slo_tpot_s": 0.1,
        "demand": demand,
    }
    return WindowFeatures(**values), fleet


def stable_s(state: State) -> float:
    """Return how long the phase may still take, going by those before it."""
    usual_s = float(np.mean(state.lasted_s)) if state.lasted_s else FIRST_STABLE_S
    return max(usual_s - (state.now_s - state.began_s), MONITOR_S)


def _fleet(work: Workload, state: State, shape: tuple[float, float]) -> FleetFeatures:
    cluster = work.cluster
    available = {p.gpu: cluster.available(p.gpu, state.now_s) for p in cluster.pools}
    starting = sum(i.ready_s > state.now_s for i in state.instances)
    return FleetFeatures(
        gpus=tuple(
            GpuFeatures(
                name=p.gpu,
                total=p.count,
                available=available[p.gpu],
                available_before=state.gpus_before.get(p.gpu, available[p.gpu]),
                leaving=0,
                arriving=0,
                per_node=PER_NODE,
                price_usd_h=0.0,
                memory_gib=memory_gib(p.gpu),
                speed=1.0,
            )
            for p in cluster.pools
        ),
        nodes=tuple(
            NodeFeatures(f"{p.gpu}-{i}", p.gpu, min(PER_NODE, available[p.gpu] - i * PER_NODE))
            for p in cluster.pools
            for i in range(-(-available[p.gpu] // PER_NODE))
        ),
        models=tuple(ModelFeatures(m, weights_bytes(m) / GIB, 1) for m in cluster.models),
        options=options(work, shape),
        drain_s=work.costs.drain_s(),
        stop_s=max(work.costs.stop_s(m, p.gpu) for m in cluster.models for p in cluster.pools),
        stable_s=stable_s(state),
        starting=starting,
        lost=state.lost,
    )


def options(work: Workload, shape: tuple[float, float]) -> tuple[OptionFeatures, ...]:
    """Return the ways to run a replica, with what each serves of requests of this shape."""
    found: list[OptionFeatures] = []
    for model in work.cluster.models:
        for pool in work.cluster.pools:
            for width in WIDTHS:
                engine = profile_of(model, pool.gpu, width)
                if engine is None:
                    continue
                group = ReplicaGroup(model, pool.gpu, width)
                rps = rate_rps(group.kind, *shape)
                found.append(
                    OptionFeatures(
                        model, pool.gpu, width, rps, rps * sum(shape),
                        weights_bytes(model) / width / GIB, engine.kv_tokens,
                        work.costs.load_s(model, pool.gpu), work.costs.engine_s(), 0.0,
                    )
                )  # fmt: skip
    return tuple(found)


def parts_of(state: State) -> dict[str, float]:
    """Return the total time and its parts [s]."""
    spent = cast("dict[str, float]", state.spent)
    return {
        "total_s": state.now_s,
        **{spell.value: float(spent.get(spell, 0.0)) for spell in Spell},
    }
