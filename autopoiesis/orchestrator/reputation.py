"""What arms are worth before any request has come: the twin's word on traffic of no fleet in particular.

It decides the first windows only. A fleet that starts under load with a bad arm pays for it long after.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.allocator import typical_step_s
from autopoiesis.orchestrator.reward import utilities
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace

LOADS = (1.0, 2.0)
"""Load of the runs, as a share of what the fleet is roughly able to do."""
REQUESTS = 400
"""Requests of a run."""
INPUT_TOKENS, OUTPUT_TOKENS, SPREAD = 1000.0, 200.0, 1.0
"""Medians of log-normal lengths and the standard deviation of their logarithms."""
TURNS = 4
"""Requests of a session, each with the prefix of the one before."""
BLOCK_TOKENS = 256


def reputation(
    programs: Mapping[str, Program],
    replicas: Sequence[ReplicaSpec],
    objective: Objective,
    seed: int,
) -> dict[str, float]:
    """Return how far each arm's utility is from the mean of all, over runs of increasing load."""
    step_tokens = 32 + 256
    able_rps = sum(step_tokens / typical_step_s(r) for r in replicas) / (
        (INPUT_TOKENS + OUTPUT_TOKENS) * np.exp(SPREAD**2 / 2.0)
    )
    runs = [
        {
            arm: float(
                utilities(run_arm(trace, replicas, p, objective, seed), objective, np.inf)[0].mean()
            )
            for arm, p in programs.items()
        }
        for trace in (usual_traffic(load * able_rps, seed) for load in LOADS)
    ]
    mean = {arm: float(np.mean([run[arm] for run in runs])) for arm in programs}
    level = float(np.mean(list(mean.values())))
    return {arm: utility - level for arm, utility in mean.items()}


def usual_traffic(rate_rps: float, seed: int) -> Trace:
    """Return sessions of a few turns: Poisson arrivals, log-normal lengths, growing prefixes."""
    rng = np.random.default_rng(seed)
    inputs, outputs = (
        np.maximum(rng.lognormal(np.log(median), SPREAD, REQUESTS), 1.0).astype(np.int64)
        for median in (INPUT_TOKENS, OUTPUT_TOKENS)
    )
    session = rng.integers(1, 1 << 62, REQUESTS // TURNS)[
        rng.integers(0, REQUESTS // TURNS, REQUESTS)
    ]
    blocks = [
        s // 64 * 64 + np.arange(n // BLOCK_TOKENS) for s, n in zip(session, inputs, strict=True)
    ]
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1.0 / rate_rps, REQUESTS)),
        input_tokens=inputs,
        output_tokens=outputs,
        max_output_tokens=np.full(REQUESTS, 8192),
        session=session,
        priority=np.zeros(REQUESTS),
        block_start=np.concatenate([[0], np.cumsum([len(b) for b in blocks])]),
        blocks=np.concatenate(blocks),
        block_tokens=BLOCK_TOKENS,
        name="usual",
    )
