from dataclasses import replace

import numpy as np
import pytest
from traffic import fleet, human, poisson, registry

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.loop import KEEP_WINDOWS
from autopoiesis.orchestrator.observation import Observation, unfinished
from autopoiesis.orchestrator.rehearsal import STRESS, Rehearsal
from autopoiesis.orchestrator.replay import observe
from autopoiesis.orchestrator.reputation import reputation, usual_traffic
from autopoiesis.orchestrator.rerun import Stage, sim_cells
from autopoiesis.orchestrator.reward import judge
from autopoiesis.twin.simulation import SimCell, Simulation

OBJECTIVE = Objective(0.5, 0.04)
FLEET = fleet(3)
ARMS = registry(*human("random", "least-requests", "least-tokens"))
PROGRAMS = {a.id: ARMS.program(a.id) for a in ARMS.all()}
NAMES = {a.name: a.id for a in ARMS.all()}

PATIENT = """
def score(request, replica, fleet):
    return replica.in_flight
def ceiling(request, replica, fleet):
    return 6
"""


def overloaded(rate_rps: float = 40.0, windows: int = 8) -> tuple[Observation, Simulation]:
    """Windows of 5 s, by default under more load than the fleet bears."""
    ended_s = 5.0 * windows
    trace = poisson(0, rate_rps, ended_s + 20.0, 1500, 200)
    simulation = Simulation(trace, FLEET, OBJECTIVE, 0)
    everything = (tuple(range(3)), tuple(range(64)))
    simulation.allocate([SimCell(PROGRAMS[NAMES["least-requests"]], *everything)])
    simulation.advance(ended_s)
    return observe(simulation, windows - 1, 5.0, FLEET), simulation


def test_an_observation_reaches_back_and_holds_the_backlog():
    seen, simulation = overloaded(windows=16)
    all_before = simulation.outcome().select(simulation.trace.arrival_s < 80.0)
    since_s = 80.0 - 5.0 * KEEP_WINDOWS
    backlog = unfinished(all_before, since_s) & (all_before.arrival_s < since_s)
    assert backlog.sum() > 10
    assert (seen.trace.arrival_s < since_s).sum() == backlog.sum()
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
    assert abs(known - observed) < 0.1 * abs(unaware - observed)


def test_who_served_before_serves_in_the_warm_up_and_lets_go_what_it_held():
    """Of a window after a hand-over the twin says what happened only if it knows who held what."""
    trace = poisson(1, 22.0, 70.0, 1500, 200)
    simulation = Simulation(trace, FLEET, OBJECTIVE, 0)
    everything = (tuple(range(3)), tuple(range(64)))
    hasty = PROGRAMS[NAMES["least-requests"]]
    patient = compile_policy(verify(PATIENT))
    before, now = SimCell(patient, *everything), SimCell(hasty, *everything)
    simulation.allocate([before])
    simulation.advance(40.0)
    simulation.allocate([now])
    simulation.advance(50.0)
    seen = observe(simulation, 9, 5.0, FLEET)
    observed = judge(seen.outcome, OBJECTIVE, 40.0, 45.0, 50.0).mean_utility()

    def error(stages: tuple[Stage, ...]) -> float:
        told = Rehearsal(seen, 40.0, 45.0, OBJECTIVE, 0, stages).under({"now": hasty})
        return abs(told["now"].mean_utility() - observed)

    told = error((Stage(0.0, (before,)),))
    assert told < 0.05
    assert told < 0.5 * error(())


def test_who_is_unknown_or_has_no_replica_left_is_left_out_and_its_shards_are_served():
    known, other = NAMES["random"], NAMES["least-tokens"]
    names = [replica.name for replica in FLEET]
    cells = (
        Cell("unknown", (names[0],), tuple(range(16))),
        Cell(known, (names[1],), tuple(range(16, 32))),
        Cell(other, ("gone",), tuple(range(32, 48))),
        Cell(other, (names[2], "gone"), tuple(range(48, 64))),
    )
    first, second = sim_cells(Allocation(0, cells), ARMS, FLEET)
    assert (first.program, first.replicas) == (PROGRAMS[known], (1,))
    assert sorted(first.shards) == list(range(48))
    assert (second.program, second.replicas, second.shards) == (
        PROGRAMS[other],
        (2,),
        tuple(range(48, 64)),
    )
    assert sim_cells(Allocation(0, cells[:1]), ARMS, FLEET) == []


def test_what_stands_in_a_replicas_queue_stays_there_whoever_serves_next():
    """An arm that would hold requests back cannot take back what another one has sent."""
    seen, _ = overloaded()
    patient = human("deadline-slack")[0]
    programs = {patient.id: registry(patient).program(patient.id)}
    begun = Rehearsal(seen, 30.0, 35.0, OBJECTIVE, 0)
    elsewhere = replace(
        seen, outcome=seen.outcome._replace(replica=np.full(len(seen.trace), -1, np.int64))
    )
    free = Rehearsal(elsewhere, 30.0, 35.0, OBJECTIVE, 0)
    (held_up,) = (j.mean_utility() for j in begun.under(programs).values())
    (unhindered,) = (j.mean_utility() for j in free.under(programs).values())
    assert held_up < unhindered


def test_the_first_request_of_all_may_come_in_the_middle_of_a_window():
    trace = poisson(0, 10.0, 10, 1500, 200)
    trace = replace(trace, arrival_s=trace.arrival_s + 7.0)
    simulation = Simulation(trace, FLEET, OBJECTIVE, 0)
    simulation.allocate([SimCell(PROGRAMS[NAMES["random"]], tuple(range(3)), tuple(range(64)))])
    simulation.advance(10.0)
    seen = observe(simulation, 1, 5.0, FLEET)
    whole = SimCell(PROGRAMS[NAMES["random"]], tuple(range(3)), tuple(range(64)))
    rehearsal = Rehearsal(seen, 5.0, 10.0, OBJECTIVE, 0, (Stage(0.0, (whole,)),))
    assert rehearsal.warm_s == 5.0
    assert rehearsal.under(PROGRAMS).keys() == PROGRAMS.keys()
    assert rehearsal.in_the_long_run(PROGRAMS).keys() == PROGRAMS.keys()


def test_in_the_long_run_an_arm_is_worth_what_it_makes_of_its_own_backlog():
    seen, _ = overloaded(20.0)
    long = Rehearsal(seen, 35.0, 40.0, OBJECTIVE, 0).in_the_long_run(PROGRAMS)
    best, random = NAMES["least-requests"], NAMES["random"]
    assert set(long) == set(PROGRAMS)
    assert long[best] > long[random]


def test_the_long_run_goes_on_where_the_traffic_is_too_much():
    seen, _ = overloaded()
    best = NAMES["least-requests"]
    earned = judge(seen.outcome, OBJECTIVE, 10.0, 40.0, 40.0).mean_utility()
    long = Rehearsal(seen, 35.0, 40.0, OBJECTIVE, 0).in_the_long_run({best: PROGRAMS[best]})
    assert long[best] < 0.6 * earned


def test_under_stress_everybody_does_worse():
    seen, _ = overloaded(15.0)
    rehearsal = Rehearsal(seen, 35.0, 40.0, OBJECTIVE, 0)
    usual = rehearsal.in_the_long_run(PROGRAMS)
    stressed = rehearsal.in_the_long_run(PROGRAMS, STRESS)
    assert all(stressed[arm] < 0.8 * usual[arm] for arm in PROGRAMS)


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
