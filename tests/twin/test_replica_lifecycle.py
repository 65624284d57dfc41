"""Replicas that start, drain, sleep, reload and vanish under traffic."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.capacity import Action, CapacityChange, ReplicaSpec, ReplicaState
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import SimCell, Simulation
from autopoiesis.twin.trace import Trace

H100 = profile("h100-llama-3-8b-tp1-bf16")
LEAST = compile_policy(
    verify("def score(request, replica, fleet):\n    return replica.in_flight\n")
)


def trace_at(times_s: list[float], output_tokens: int = 100, input_tokens: int = 200) -> Trace:
    n = len(times_s)
    return Trace(
        arrival_s=np.array(times_s, float),
        input_tokens=np.full(n, input_tokens),
        output_tokens=np.full(n, output_tokens),
        max_output_tokens=np.full(n, 4096),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.arange(n + 1, dtype=np.int64),
        blocks=np.ones(n, np.int64),
        block_tokens=128,
        name="made up",
    )


def fleet_of(trace: Trace, count: int = 2, **options) -> Simulation:
    specs = options.pop("specs", [ReplicaSpec(f"r{i}", H100) for i in range(count)])
    simulation = Simulation(trace, specs, Objective(), 0, **options)
    simulation.allocate([SimCell(LEAST, tuple(range(len(specs))), tuple(range(64)))])
    return simulation


def statuses(simulation: Simulation) -> list[str]:
    return [Status(s).name.lower() for s in simulation.outcome().status.tolist()]


def test_a_started_replica_serves_when_it_is_ready():
    simulation = fleet_of(
        trace_at([0.0, 1.0, 1.1, 6.5, 6.6]),
        present=[True, False],
        capacity=[CapacityChange(1.0, 1, Action.START, 5.0)],
    )
    simulation.advance(5.9)
    assert (ReplicaState.READY, ReplicaState.STARTING) == simulation.states()
    simulation.advance(math.inf)
    assert [0, 0, 0, 0, 1] == simulation.outcome().replica.tolist()


def test_requests_are_held_until_a_replica_is_there():
    simulation = fleet_of(
        trace_at([0.0]), 1, present=[False], capacity=[CapacityChange(2.0, 0, Action.START, 3.0)]
    )
    simulation.advance(math.inf)
    assert 5.0 == simulation.outcome().dispatched_s[0]
    assert ["completed"] == statuses(simulation)


def test_without_replicas_requests_are_shed_after_their_time_and_nothing_hangs():
    simulation = fleet_of(trace_at([0.0, 1.0]), 1, present=[False])
    simulation.advance(math.inf)
    assert ["shed", "shed"] == statuses(simulation)


def test_a_drained_replica_finishes_what_it_has():
    simulation = fleet_of(
        trace_at([0.0, 0.0, 0.2, 0.3]), capacity=[CapacityChange(0.1, 0, Action.DRAIN)]
    )
    simulation.advance(math.inf)
    assert ["completed"] * 4 == statuses(simulation)
    assert [0, 1, 1, 1] == simulation.outcome().replica.tolist()
    assert (ReplicaState.OFF, ReplicaState.READY) == simulation.states()


def test_a_lost_replica_fails_what_streamed_and_hands_on_the_rest():
    simulation = fleet_of(
        trace_at([0.0, 0.0, 0.5, 0.5]), capacity=[CapacityChange(0.505, 0, Action.LOSE)]
    )
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert ["failed", "completed", "completed", "completed"] == statuses(simulation)
    assert [0, 1, 1, 1] == o.replica.tolist()
    assert 0.505 == o.finished_s[0] == o.dispatched_s[2]


def test_a_notice_spares_what_streams():
    trace = trace_at([0.0, 0.0])
    notice = [CapacityChange(0.1, 0, Action.DRAIN), CapacityChange(30.0, 0, Action.LOSE)]
    simulation = fleet_of(trace, capacity=notice)
    simulation.advance(math.inf)
    assert ["completed", "completed"] == statuses(simulation)


@pytest.mark.parametrize("action", [Action.SLEEP, Action.RELOAD, Action.LOSE])
def test_prefix_caches_are_cold_afterwards(action: Action):
    back = {Action.SLEEP: Action.WAKE, Action.LOSE: Action.START}
    changes = [CapacityChange(10.0, 0, action, 1.0 if action is Action.RELOAD else 0.0)]
    if action in back:
        changes.append(CapacityChange(20.0, 0, back[action], 1.0))
    simulation = fleet_of(trace_at([0.0, 5.0, 30.0, 35.0]), 1, capacity=changes)
    simulation.advance(math.inf)
    assert [0, 128, 0, 128] == simulation.outcome().cached_tokens.tolist()


def test_a_reload_brings_back_other_limits_and_step_times():
    slow = ReplicaSpec("slow", replace(H100, max_num_seqs=1), speed=0.5)
    trace = trace_at([0.0, 10.0, 10.0])
    simulation = fleet_of(trace, 1, capacity=[CapacityChange(5.0, 0, Action.RELOAD, 1.0, slow)])
    simulation.advance(math.inf)
    first, second, third = simulation.outcome().e2e_s
    assert second == pytest.approx(2 * first, rel=0.05)
    assert third == pytest.approx(2 * second, rel=0.05)


def test_only_time_that_a_replica_is_there_is_paid():
    simulation = fleet_of(
        trace_at([0.0]),
        present=[True, False],
        capacity=[
            CapacityChange(10.0, 1, Action.START, 5.0),
            CapacityChange(20.0, 1, Action.SLEEP),
            CapacityChange(30.0, 1, Action.LOSE),
        ],
    )
    simulation.advance(100.0)
    assert 100.0 + 20.0 == simulation.replica_seconds()


def test_clients_give_up_where_the_first_token_does_not_come():
    one_at_a_time = [ReplicaSpec("r", replace(H100, max_num_seqs=1))]
    simulation = fleet_of(trace_at([0.0, 0.0, 0.0], 200), specs=one_at_a_time, patience_s=1.0)
    simulation.advance(math.inf)
    assert ["completed", "aborted", "aborted"] == statuses(simulation)
    assert 1.0 == simulation.outcome().finished_s[2]


def test_what_fits_no_replica_fails():
    small = [ReplicaSpec("small", replace(H100, kv_blocks=4)), ReplicaSpec("large", H100)]
    simulation = fleet_of(
        trace_at([0.0, 1.0]), specs=small, capacity=[CapacityChange(0.5, 1, Action.LOSE)]
    )
    simulation.advance(math.inf)
    assert "failed" == statuses(simulation)[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((0.0, 7, Action.LOSE), "there is no replica 7"),
        ((0.0, 0, Action.START, 1.0), "r0 is ready and cannot start"),
        ((0.0, 0, Action.WAKE, 1.0), "r0 is ready and cannot wake"),
        ((0.0, 1, Action.SLEEP), "r1 is off and cannot sleep"),
        ((0.0, 0, Action.RELOAD, 1.0, ReplicaSpec("x", replace(H100, max_num_seqs=9999))), "larger"),
        ((0.0, 0, Action.RELOAD, 1.0, ReplicaSpec("x", replace(H100, kv_block_tokens=32))), "KV blocks of 32"),
    ],
)  # fmt: skip
def test_a_change_that_makes_no_sense_is_refused(change: tuple, says: str):
    simulation = fleet_of(trace_at([0.0]), present=[True, False])
    simulation.advance(0.0)
    with pytest.raises(ValueError, match=says):
        simulation.change(CapacityChange(*change))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1.0, 0, Action.LOSE), "at_s must be at least 0"),
        ((math.nan, 0, Action.LOSE), "at_s must be at least 0"),
        ((0.0, 0, Action.START, math.inf), "duration_s must be at least 0"),
        ((0.0, -1, Action.LOSE), "needs a replica's index"),
        ((0.0, 0, Action.LOSE, 0.0, ReplicaSpec("x", H100)), "changes no spec"),
    ],
)
def test_an_impossible_change_is_refused(arguments: tuple, says: str):
    with pytest.raises(ValueError, match=says):
        CapacityChange(*arguments)


@pytest.mark.parametrize(
    "options", [{"patience_s": 0.0}, {"present": [True]}, {"patience_s": math.nan}]
)
def test_impossible_options_are_refused(options: dict):
    with pytest.raises(ValueError, match=r"patience_s|present"):
        fleet_of(trace_at([0.0]), **options)
