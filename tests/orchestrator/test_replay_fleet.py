"""Replays of a fleet that replicas leave and join."""

import numpy as np
import pytest
from traffic import fleet, human, poisson

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.replay import replay
from autopoiesis.orchestrator.replay_fleet import fleet_under, ready
from autopoiesis.twin.capacity import Action, CapacityChange, ReplicaState
from autopoiesis.twin.capacity_trace import CapacityTrace, FleetCourse, StartUp, fleet_course
from autopoiesis.twin.outcome import Status

OBJECTIVE = Objective(0.5, 0.04)
PROGRAM = compile_policy(
    verify("def score(request, replica, fleet):\n    return replica.in_flight\n")
)
SHRINKS_AND_GROWS = CapacityTrace(np.array([0.0, 21.0, 47.0]), np.array([4, 2, 4]), "spot")
COURSE = fleet_course(SHRINKS_AND_GROWS, 4, 3, start_up=StartUp(8.0, 0.0))


def trace():
    return poisson(1, 12, 70, 600, 100)


@pytest.fixture(scope="module")
def report():
    return replay(
        trace(), fleet(4), human("random", "least-requests"), OBJECTIVE, 0,
        window_s=5.0, course=COURSE,
    )  # fmt: skip


def test_without_a_course_all_replicas_are_paid_to_the_last_end():
    served = fleet_under(fleet(3)).alone(trace(), PROGRAM, OBJECTIVE, 0)
    lasted_s = max(trace().duration_s, np.nanmax(served.outcome.finished_s))
    assert served.replica_seconds == pytest.approx(3 * lasted_s, rel=1e-9)


def test_a_lost_replica_is_not_paid_and_one_that_starts_is():
    served = fleet_under(fleet(4), COURSE).alone(trace(), PROGRAM, OBJECTIVE, 0)
    lasted_s = max(trace().duration_s, np.nanmax(served.outcome.finished_s))
    expected = 2 * lasted_s + 2 * 21.0 + 2 * (lasted_s - 47.0)
    assert served.replica_seconds == pytest.approx(expected, rel=1e-9)
    assert (served.outcome.status == Status.FAILED).any()


def test_changes_after_the_last_end_cost_nothing():
    late = FleetCourse((0,), (CapacityChange(5000.0, 1, Action.START, 10.0),))
    short = poisson(1, 2, 20, 300, 50)
    served = fleet_under(fleet(2), late).alone(short, PROGRAM, OBJECTIVE, 0)
    lasted_s = max(short.duration_s, np.nanmax(served.outcome.finished_s))
    assert served.replica_seconds == pytest.approx(lasted_s, rel=1e-9)


def test_a_loss_with_notice_fails_nobody():
    warned = fleet_course(SHRINKS_AND_GROWS, 4, 3, notice_s=20.0, start_up=StartUp(8.0, 0.0))
    served = fleet_under(fleet(4), warned).alone(trace(), PROGRAM, OBJECTIVE, 0)
    assert (served.outcome.status == Status.COMPLETED).all()


def test_the_replicas_that_are_ready_are_those_that_take_requests():
    there = fleet_under(fleet(4), COURSE)
    simulation = there.simulation(trace(), OBJECTIVE, 0)
    assert ready(simulation) == there.replicas
    simulation.change(CapacityChange(0.0, 0, Action.LOSE))
    simulation.change(CapacityChange(0.0, 1, Action.DRAIN))
    simulation.change(CapacityChange(0.0, 0, Action.START, 5.0))
    assert ready(simulation) == there.replicas[2:]
    for r in range(4):
        simulation.change(CapacityChange(0.0, r, Action.LOSE))
    assert set(simulation.states()) == {ReplicaState.OFF}
    assert ready(simulation) == there.replicas


def test_all_policies_suffer_the_same_losses(report):
    everyone = {r["policy"] for r in report.results}
    assert everyone == {"random", "least-requests", "online", "oracle"}
    for result in report.results:
        assert result["failed"] > 0
        assert result["completed"] + result["shed"] + result["failed"] == report.requests
        assert result["replica_seconds"] == pytest.approx(
            report.results[0]["replica_seconds"], rel=0.1
        )
        assert result["replica_seconds"] < 4 * report.duration_s


def test_the_online_system_is_told_who_is_there_as_a_live_one_is(report):
    """Lost at 21 s, in the window [20, 25); started at 47 s, serving from 55 s on."""
    lost = {f"r{c.replica}" for c in COURSE.changes if c.action is Action.LOSE}
    for settled in report.settled:
        started_s = 5.0 * settled.window.window
        cells = {replica for cell in settled.cells for replica in cell.replicas}
        everyone = {f"r{i}" for i in range(4)}
        assert cells == (everyone - lost if 25.0 <= started_s < 55.0 else everyone)


def test_a_replay_under_losses_repeats_itself(report):
    again = replay(
        trace(), fleet(4), human("random", "least-requests"), OBJECTIVE, 0,
        window_s=5.0, course=COURSE,
    )  # fmt: skip
    assert again.results == report.results
