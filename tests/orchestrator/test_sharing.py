"""Why two arms never share a replica: the reward would have the wrong sign."""

from dataclasses import replace

import numpy as np
from traffic import fleet, poisson

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.reward import utilities
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.simulation import SimCell, Simulation, run_arm, shards

SCORE = """
def score(request, replica, fleet):
    return replica.in_flight
"""
GREEDY = SCORE
"""Sends everything at once: under load every request of the fleet gets slow."""
PATIENT = (
    SCORE
    + """
def ceiling(request, replica, fleet):
    return 64
"""
)
BOTH_ON_THE_SAME_REPLICAS = (
    SCORE
    + """
def ceiling(request, replica, fleet):
    return 1000000 if request.priority_class > 0 else 64

def priority(request, fleet):
    return -1000000 if request.priority_class > 0 else -request.waited_s
"""
)
OBJECTIVE = Objective(slo_ttft_s=4.0, slo_tpot_s=0.02)


def program(source: str) -> Program:
    return compile_policy(verify(source))


def mean_utility(outcome: Outcome, where: np.ndarray | None = None) -> float:
    utility, _ = utilities(outcome, OBJECTIVE, np.inf)
    return float(utility.mean() if where is None else utility[where].mean())


def test_shared_replicas_reward_the_arm_that_steals_and_cells_do_not():
    trace, replicas = poisson(0, 80, 30, 500, 250), fleet(4)
    greedy_shards = shards(trace) < 32

    alone = {
        name: mean_utility(run_arm(trace, replicas, program(source), OBJECTIVE, 0))
        for name, source in (("greedy", GREEDY), ("patient", PATIENT))
    }
    truth = alone["greedy"] - alone["patient"]

    marked = replace(trace, priority=greedy_shards.astype(np.float64))
    mixed = run_arm(marked, replicas, program(BOTH_ON_THE_SAME_REPLICAS), OBJECTIVE, 0)
    shared = mean_utility(mixed, greedy_shards) - mean_utility(mixed, ~greedy_shards)

    simulation = Simulation(trace, replicas, OBJECTIVE, 0)
    simulation.allocate(
        [
            SimCell(program(GREEDY), (0, 1), tuple(range(32))),
            SimCell(program(PATIENT), (2, 3), tuple(range(32, 64))),
        ]
    )
    simulation.advance(np.inf)
    split = simulation.outcome()
    cells = mean_utility(split, greedy_shards) - mean_utility(split, ~greedy_shards)

    assert truth < -0.05
    assert shared > 0.05
    assert cells < -0.05
