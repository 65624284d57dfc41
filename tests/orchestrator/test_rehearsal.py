from dataclasses import replace

import numpy as np
import pytest
from traffic import fleet, human, poisson, registry

from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.observation import Observation, unfinished
from autopoiesis.orchestrator.rehearsal import Rehearsal
from autopoiesis.orchestrator.replay import observe
from autopoiesis.orchestrator.reputation import reputation, usual_traffic
from autopoiesis.orchestrator.reward import judge
from autopoiesis.twin.simulation import SimCell, Simulation

OBJECTIVE = Objective(0.5, 0.04)
FLEET = fleet(3)
ARMS = registry(*human("random", "least-requests", "least-tokens"))
PROGRAMS = {a.id: ARMS.program(a.id) for a in ARMS.all()}
NAMES = {a.name: a.id for a in ARMS.all()}


def overloaded() -> tuple[Observation, Simulation]:
    """Eight windows of 5 s under more load than the fleet bears."""
    simulation = Simulation(poisson(0, 40, 60, 1500, 200), FLEET, OBJECTIVE, 0)
    everything = (tuple(range(3)), tuple(range(64)))
    simulation.allocate([SimCell(PROGRAMS[NAMES["least-requests"]], *everything)])
    simulation.advance(40.0)
    return observe(simulation, 7, 5.0, FLEET), simulation


def test_an_observation_reaches_back_and_holds_the_backlog():
    seen, simulation = overloaded()
    all_before = simulation.outcome().select(simulation.trace.arrival_s < 40.0)
    backlog = unfinished(all_before, 20.0) & (all_before.arrival_s < 20.0)
    assert backlog.sum() > 10
    assert (seen.trace.arrival_s < 20.0).sum() == backlog.sum()
    assert len(seen.trace) == len(seen.outcome.arrival_s)
    assert seen.trace.arrival_s == pytest.approx(seen.outcome.arrival_s)


def test_a_rehearsal_with_its_backlog_tells_what_really_happened():
    seen, _ = overloaded()
    observed = judge(seen.outcome, OBJECTIVE, 30.0, 35.0, 40.0).mean_utility()
    arm = NAMES["least-requests"]
    rehearsal = Rehearsal(seen, 30.0, 35.0, OBJECTIVE, 0)
    known = rehearsal.under({arm: PROGRAMS[arm]})[arm].mean_utility()
    rows = np.flatnonzero(seen.trace.arrival_s >= rehearsal.warm_s)
    blind = Rehearsal(
        replace(seen, trace=seen.trace.select(rows), outcome=seen.outcome.select(rows)),
        30.0,
        35.0,
        OBJECTIVE,
        0,
    )
    unaware = blind.under({arm: PROGRAMS[arm]})[arm].mean_utility()
    assert abs(known - observed) < 0.5 * abs(unaware - observed)


def test_under_more_load_the_better_arm_is_preferred():
    seen, _ = overloaded()
    lean = Rehearsal(seen, 30.0, 35.0, OBJECTIVE, 0).lean(PROGRAMS)
    assert sum(lean.values()) == pytest.approx(0.0)
    assert max(abs(v) for v in lean.values()) <= 0.1


def test_a_window_without_requests_or_replicas_needs_no_replay():
    seen, _ = overloaded()
    assert Rehearsal(seen, 30.0, 35.0, OBJECTIVE, 0).requests() > 0
    assert Rehearsal(seen, 50.0, 55.0, OBJECTIVE, 0).requests() == 0
    assert Rehearsal(replace(seen, replicas=()), 30.0, 35.0, OBJECTIVE, 0).requests() == 0


def test_reputation_knows_random_from_better_before_any_request():
    known = reputation(PROGRAMS, FLEET, Objective(0.3, 0.03), 0)
    assert sum(known.values()) == pytest.approx(0.0)
    assert known[NAMES["random"]] == min(known.values())
    assert usual_traffic(5.0, 1).arrival_s == pytest.approx(usual_traffic(5.0, 1).arrival_s)
