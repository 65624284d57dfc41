"""What slow policies see of the paper's clusters: of outputs only what has finished, of time only the past."""

from functools import lru_cache
from typing import Any

import numpy as np

from autopoiesis.arms.plan import ReplicaGroup
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
    Cluster,
    Costs,
    memory_gib,
    profile_of,
    rate_rps,
    rounded,
    weights_bytes,
)
from autopoiesis.evaluation.workload import State, Workload

MONITOR_S = 5.0
"""The paper's example of a monitoring step."""
DEMAND_RPS = 1000.0
"""Demand that planners are told, split among models as their outstanding requests are: more than any
plan serves, because the aim is to be done soon."""
FIRST_STABLE_S = 60.0
"""How long traffic is expected to stay before a phase has ended."""


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
        options=options(cluster, work.costs, rounded(shape[0]), rounded(shape[1])),
        drain_s=work.costs.drain_s(),
        stop_s=max(work.costs.stop_s(m, p.gpu) for m in cluster.models for p in cluster.pools),
        stable_s=stable_s(state),
        starting=starting,
        lost=state.lost,
    )


@lru_cache(maxsize=4096)
def options(
    cluster: Cluster, costs: Costs, input_tokens: float, output_tokens: float
) -> tuple[OptionFeatures, ...]:
    """Return the ways to run a replica, with what each serves of requests of this shape."""
    found: list[OptionFeatures] = []
    for model in cluster.models:
        for pool in cluster.pools:
            for width in WIDTHS:
                engine = profile_of(model, pool.gpu, width)
                if engine is None:
                    continue
                group = ReplicaGroup(model, pool.gpu, width)
                rps = rate_rps(group.kind, input_tokens, output_tokens)
                found.append(
                    OptionFeatures(
                        model, pool.gpu, width, rps, rps * (input_tokens + output_tokens),
                        weights_bytes(model) / width / GIB, engine.kv_tokens,
                        costs.load_s(model, pool.gpu), costs.engine_s(), 0.0,
                    )
                )  # fmt: skip
    return tuple(found)
