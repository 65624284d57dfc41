"""Arms that fail in the request path: the baseline answers for them, and soon takes their place."""

from dataclasses import replace

import numpy as np
import pytest
from test_state import ALL_SHARDS, LEAST, ONE_EACH, Clock, flight, members, program

from autopoiesis.arms.allocation import Cell
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.held import Queue
from autopoiesis.gateway.serving import MOST_FAULTS
from autopoiesis.gateway.state import GatewayState, Shed

BASELINE = """
def score(request, replica, fleet):
    return -replica.position
def admit(request, fleet):
    return 0 if request.input_tokens > 1000 else 1
def ceiling(request, replica, fleet):
    return 0
"""
OWN = Queue("arm", "arm")
INFINITE = "def score(request, replica, fleet):\n    return exp(1000)\n"
OVERFLOWING = (
    "def score(request, replica, fleet):\n    return 1e308 * 10 * (1 + replica.position)\n"
)
NO_NUMBER = """
def score(request, replica, fleet):
    x = 1e308 * 10
    return (x - x) * x + log(0) * -1e300
"""
AT_TIMES = """
def score(request, replica, fleet):
    return 1 / (request.input_tokens - 500) if request.input_tokens >= 500 else replica.position
"""
HOLDS = """
def score(request, replica, fleet):
    return 1 / (1 - replica.in_flight) if request.waited_s > 0 else 1
def ceiling(request, replica, fleet):
    return 1
"""


def damaged(source: str):
    """A compiled policy whose program is lost: the machine cannot run it."""
    return program(source)._replace(code=None)


def make(arm, replicas=("r0", "r1"), count: int = 3, baseline: str = BASELINE) -> GatewayState:
    state = GatewayState(
        Objective(), ("own", program(LEAST.source)), np.random.default_rng(0), Clock()
    )
    state.set_members(members(count))
    state.set_baseline("base", program(baseline))
    state.allocate(5, [Cell("arm", replicas, ALL_SHARDS)], {"arm": arm})
    return state


@pytest.mark.parametrize("source", [INFINITE, OVERFLOWING, NO_NUMBER])
def test_nonsense_is_answered_by_the_baseline_on_the_arms_replicas_for_that_same_request(source):
    state = make(program(source))
    one = flight()
    addresses = state.decide(one)
    assert addresses
    assert addresses[:2] == ("127.0.0.1:2", "127.0.0.1:1")  # the baseline's order, and no ceiling
    assert addresses[2] == "127.0.0.1:3"  # of another group: a last resort
    assert (one.arm_id, one.window) == ("base", 5)
    assert state.membership.in_flight("r1") == 1
    assert dict(state.faults.untold) == {("arm", "the scores of all replicas are infinite"): 1}


def test_a_program_that_cannot_run_is_answered_by_the_baseline():
    state = make(damaged(ONE_EACH))
    one = flight()
    assert (state.decide(one) or ("",))[0] == "127.0.0.1:2"
    assert one.arm_id == "base"
    ((arm, told),) = state.faults.untold
    assert arm == "arm"
    assert "Error: " in told


def test_what_the_baseline_does_not_admit_is_shed():
    state = make(program(INFINITE))
    with pytest.raises(Shed):
        state.decide(flight(tokens=2000.0))
    assert state.membership.in_flight("r0") == state.membership.in_flight("r1") == 0


def test_only_the_requests_in_which_an_arm_fails_go_to_the_baseline():
    state = make(program(AT_TIMES))
    short, failing, long = flight(1, 100.0), flight(2, 500.0), flight(3, 600.0)
    for one in (short, failing, long):
        assert state.decide(one)
    assert [one.arm_id for one in (short, failing, long)] == ["arm", "base", "arm"]
    assert [state.membership.name_of(one.replica) for one in (short, failing)] == ["r0", "r1"]


def test_after_some_faults_the_baseline_takes_the_arms_place_until_the_next_allocation():
    state = make(program(INFINITE))
    flights = [flight(i) for i in range(MOST_FAULTS + 5)]
    assert all(state.decide(one) for one in flights)
    assert {one.arm_id for one in flights} == {"base"}
    assert sum(state.faults.untold.values()) == MOST_FAULTS
    state.set_members(members(4))  # the groups are made anew, and nothing is forgotten
    assert state.decide(flight(99))
    assert sum(state.faults.untold.values()) == MOST_FAULTS
    state.allocate(6, [Cell("arm", ("r0",), ALL_SHARDS)], {"arm": program(INFINITE)})
    assert state.decide(flight(100))
    assert sum(state.faults.untold.values()) == MOST_FAULTS + 1


def test_held_requests_on_which_their_arm_fails_leave_by_the_baseline():
    state = make(program(HOLDS))
    running = [flight(i) for i in range(2)]
    assert all(state.decide(one) for one in running)
    waiting = [flight(10 + i) for i in range(MOST_FAULTS + 2)]
    assert [state.decide(one) for one in waiting] == [None] * len(waiting)
    state.clock.now_s += 1.0
    for one in running:
        state.accounts.finish(one, -1, 0.0, 1.0, failed=False)
    assert [one for one, _ in state.release()] == waiting[:2]  # 1 / 1: still a score
    state.clock.now_s += 1.0
    broken = replace(state._arms[OWN], program=damaged(HOLDS))
    state._arms[OWN] = broken
    released = state.release()
    assert [one for one, _ in released] == waiting[2:]
    assert {one.arm_id for one, _ in released} == {"base"}
    assert all(one.held_s == 2.0 for one, _ in released)
    assert not len(state.held)
    assert sum(state.faults.untold.values()) == MOST_FAULTS
    assert broken.group.counters[1] == 0.0


def test_where_the_baseline_fails_too_our_own_count_decides():
    state = make(program(INFINITE), baseline=OVERFLOWING)
    flights = [flight(i) for i in range(3)]
    assert all(state.decide(one) for one in flights)
    assert sorted(state.membership.name_of(one.replica) for one in flights) == ["r0", "r1", "r2"]
    assert {arm for arm, _ in state.faults.untold} == {"arm", "base"}


def test_without_an_allocation_a_failing_baseline_is_no_way_to_lose_a_request():
    state = make(program(INFINITE), baseline=INFINITE)
    state.allocate(6, [], {})
    one = flight()
    assert state.decide(one)
    assert one.arm_id == "base"
    assert {arm for arm, _ in state.faults.untold} == {"base"}
