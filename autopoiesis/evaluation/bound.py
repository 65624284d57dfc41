"""A lower bound on the total time: what nobody can be faster than, however clever.

Changes are free and at once, replicas and GPUs can be divided, and each phase is served by the best mix of
ways to run its models, batch limits included. Only a GPU that comes later serves nothing before the model
that is loaded fastest could be there. A phase's rate then is the solution of a linear program:

    maximise   part
    subject to sum over ways of model m:  rate(way) x(way) >= part * requests(m)     for each model m
               sum over ways on GPU g:    width(way) x(way) <= GPUs(g)               for each type g
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog

from autopoiesis.arms.plan import Kind
from autopoiesis.evaluation.cluster import WIDTHS, Batch, Cluster, profile_of, rate_rps
from autopoiesis.evaluation.workload import Workload

LIMITS = ((256, 8192), (256, 16384), (1024, 8192), (1024, 16384))
"""`max_num_seqs` and `max_num_batched_tokens` that are looked at: what plans have, and the largest."""


INSTANT_S = 1e-6
"""Times that lie no farther apart are one, whatever they were added up of."""


class Way(NamedTuple):
    """One way to run a replica, and what it serves of a phase's requests."""

    kind: Kind
    rps: float


def bound_s(work: Workload) -> float:
    """Return the shortest time in which the workload could be done, if all went at once and could be divided."""
    now_s = 0.0
    for batch in work.batches:
        ways, left = ways_of(work.cluster, batch), 1.0
        while left > 0.0:
            start_s = min(work.costs.start_s(way.kind) for way in ways)
            there = usable(work.cluster, now_s, start_s)
            per_s = part_per_s(work.cluster, batch, ways, there)
            next_s = next_change_s(work.cluster, now_s, start_s)
            served = per_s * (next_s - now_s)
            if served >= left:
                now_s += left / per_s
                break
            left, now_s = left - served, next_s
    return now_s


def usable(cluster: Cluster, at_s: float, start_s: float) -> list[float]:
    """Return how many GPUs of each type may serve: those that were there for `start_s`, or from the beginning."""
    moments = [max(at_s - start_s, 0.0)]
    while moments[-1] < at_s:
        moments.append(min(cluster.next_change_s(moments[-1]), at_s))
    return [float(min(cluster.available(pool.gpu, s) for s in moments)) for pool in cluster.pools]


def next_change_s(cluster: Cluster, after_s: float, start_s: float) -> float:
    """Return when the number of GPUs that may serve can change next."""
    since_s = max(after_s - start_s + INSTANT_S, 0.0)
    return min(cluster.next_change_s(after_s), cluster.next_change_s(since_s) + start_s)


def ways_of(cluster: Cluster, batch: Batch) -> list[Way]:
    """Return the ways to run the cluster's models that serve such requests at all."""
    kinds = [
        Kind(model, pool.gpu, width, seqs, tokens, "serve")
        for model in cluster.models
        for pool in cluster.pools
        for width in WIDTHS
        if profile_of(model, pool.gpu, width) is not None
        for seqs, tokens in LIMITS
    ]
    ways = [Way(kind, rate_rps(kind, batch.input_tokens, batch.output_tokens)) for kind in kinds]
    return [way for way in ways if way.rps > 0.0]


def part_per_s(
    cluster: Cluster, batch: Batch, ways: Sequence[Way], there: Sequence[float]
) -> float:
    """Return which part of the phase so many GPUs of each type serve per second."""
    gpus = [
        [way.kind.tensor_parallel if way.kind.gpu == pool.gpu else 0.0 for way in ways] + [0.0]
        for pool in cluster.pools
    ]
    models = [
        [-way.rps if way.kind.model == model else 0.0 for way in ways] + [requests]
        for model, requests in zip(cluster.models, batch.requests, strict=True)
    ]
    found = linprog(
        [*np.zeros(len(ways)), -1.0],
        A_ub=np.array(gpus + models),
        b_ub=[*there, *np.zeros(len(models))],
    )
    return float(found.x[-1])
