import pytest
from traffic import fleet, human, poisson, registry, written

from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.aftermath import aftermath

OBJECTIVE = Objective(0.5, 0.04)
FLEET = fleet(2)
REFUSES = written(
    """def score(request, replica, fleet):
    return replica.in_flight

def admit(request, fleet):
    return 2.0 - fleet.held / fleet.replicas

def ceiling(request, replica, fleet):
    return 12.0
""",
    "refuses",
)
ARMS = registry(*human("least-requests"), REFUSES)
PROGRAMS = {a.id: ARMS.program(a.id) for a in ARMS.all()}
BOUNDS_S = 0.0, 20.0, 30.0


def test_who_comes_after_an_overload_is_better_served_by_an_arm_that_refused_some():
    told = aftermath(poisson(0, 40, 30, 1500, 200), FLEET, PROGRAMS, OBJECTIVE, 0, BOUNDS_S)
    assert sum(told.values()) == pytest.approx(0.0)
    assert told[REFUSES.id] > 0.1


def test_a_fleet_that_keeps_up_leaves_nothing_behind():
    assert not aftermath(poisson(0, 2, 30, 500, 50), FLEET, PROGRAMS, OBJECTIVE, 0, BOUNDS_S)


def test_after_a_window_without_requests_nothing_comes():
    assert not aftermath(poisson(0, 20, 10, 500, 50), FLEET, PROGRAMS, OBJECTIVE, 0, BOUNDS_S)
