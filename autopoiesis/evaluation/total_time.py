"""The paper's total time T of a workload under a slow policy: scheduling, stale, reconfiguration, serving.

Serving never pauses. The policy is asked after each monitoring step; while it thinks, the fleet
serves under the old plan (stale); then replicas that the plans do not share go and come
(reconfiguration) while the others serve on. Requests wait in one queue and replicas are saturated
until it is empty, so what is served is the sum of the ready replicas' rates, which the twin has measured.
Thinking is measured as CPU time of the policy's own code.
"""

from collections import Counter
from collections.abc import Callable

from autopoiesis.arms.migration import Order
from autopoiesis.arms.plan import Kind, Plan
from autopoiesis.arms.plan_check import check
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures
from autopoiesis.evaluation.cluster import Batch, Cluster, rate_rps
from autopoiesis.evaluation.plan_view import MONITOR_S, features
from autopoiesis.evaluation.slow_policy import Answer
from autopoiesis.evaluation.workload import Instance, Spell, State, Workload, done

LIMIT_S = 7200.0
"""A workload that is not done by then counts as done: the policy has left the fleet unable to serve."""

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
