"""The twin's fleet against the plain one: losses, starts, sleeps, reloads, clients that give up.

`TWIN_EXAMPLES=5000 pytest tests/twin/test_fleet_equivalence.py` tries more cases than the default.
"""

import math
import os
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_fleet import Arrival, ReferenceFleet
from test_engine_equivalence import step_models, trace_of

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.capacity import Action, CapacityChange, ReplicaSpec
from autopoiesis.twin.latency import Profile
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import SimCell, Simulation

EXAMPLES = int(os.environ.get("TWIN_EXAMPLES", "200"))


@dataclass(frozen=True)
class Case:
    specs: list[ReplicaSpec]
    present: list[bool]
    entry_tokens: int
    arrivals: list[Arrival]
    changes: list[CapacityChange]
    ceiling: float
    patience_s: float


@st.composite
def profiles(draw: st.DrawFn, block_tokens: int) -> Profile:
    return Profile(
        name="small",
        step=draw(step_models),
        kv_blocks=draw(st.integers(4, 40)),
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.sampled_from([3, 8, 33, 4096])),
        source="made up",
        validated=False,
        kv_block_tokens=block_tokens,
        scheduling=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_tokens = draw(st.sampled_from([4, 16]))
    entry_tokens = draw(st.sampled_from([0, 1, 2])) * block_tokens
    speeds = st.sampled_from([1.0, 1.0, 0.37, 2.9])
    count = draw(st.integers(1, 3))
    specs = [ReplicaSpec(f"r{i}", draw(profiles(block_tokens)), draw(speeds)) for i in range(count)]
    other = ReplicaSpec("other", draw(profiles(block_tokens)), draw(speeds))
    arrivals: list[Arrival] = []
    now_s = 0.0
    for i in range(draw(st.integers(1, 25))):
        now_s += draw(st.sampled_from([0.0, 0.0, 1e-3, 0.013, 0.1, 0.4]))
        tokens = draw(st.integers(1, 90))
        branch = draw(st.integers(0, 6))
        blocks = -(-tokens // entry_tokens) if entry_tokens else 0
        hashes = [1000 + j if j < branch else (i + 1) * 100_000 + j for j in range(blocks)]
        priority = draw(st.sampled_from([0.0, 0.0, 1.0, -1.0]))
        arrivals.append((now_s, tokens, draw(st.integers(1, 70)), hashes, priority))
    changes: list[CapacityChange] = []
    at_s = 0.0
    for _ in range(draw(st.integers(0, 8))):
        at_s += draw(st.sampled_from([0.0, 0.007, 0.05, 0.31, 1.1]))
        action = draw(st.sampled_from(Action))
        changes.append(
            CapacityChange(
                at_s,
                draw(st.integers(0, count - 1)),
                action,
                draw(st.sampled_from([0.0, 0.02, 0.6])),
                other if action in (Action.START, Action.RELOAD) and draw(st.booleans()) else None,
            )
        )
    return Case(
        specs,
        [draw(st.sampled_from([True, True, True, False])) for _ in specs],
        entry_tokens,
        arrivals,
        changes,
        draw(st.sampled_from([math.inf, math.inf, 1, 2, 5])),
        draw(st.sampled_from([math.inf, math.inf, 0.003, 0.05, 0.7])),
    )


def simulated(case: Case, *, jumps: bool) -> Simulation:
    simulation = Simulation(
        trace_of(case.arrivals, case.entry_tokens),
        case.specs,
        Objective(),
        seed=0,
        present=case.present,
        may_become=[c.spec for c in case.changes if c.spec],
        patience_s=case.patience_s,
        jumps=jumps,
    )
    score = "def score(request, replica, fleet):\n    return replica.in_flight\n"
    if case.ceiling < math.inf:
        score += f"\n\ndef ceiling(request, replica, fleet):\n    return {case.ceiling}\n"
    program = compile_policy(verify(score))
    simulation.allocate([SimCell(program, tuple(range(len(case.specs))), tuple(range(64)))])
    for change in case.changes:
        simulation.advance(change.at_s)
        with suppress(ValueError):
            simulation.change(change)
    simulation.advance(math.inf)
    return simulation


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="TWIN_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(cases())
def test_fleet_fares_as_the_plain_one(case: Case) -> None:
    plain = ReferenceFleet(
        case.specs, case.present, case.entry_tokens, case.arrivals, case.ceiling, case.patience_s
    )
    for change in case.changes:
        plain.advance(change.at_s)
        with suppress(ValueError):
            plain.change(change)
    plain.advance(math.inf)
    for jumps in (True, False):
        simulation = simulated(case, jumps=jumps)
        o = simulation.outcome()
        for i, request in enumerate(plain.requests):
            status = Status(int(o.status[i])).name.lower()
            assert (status, int(o.replica[i])) == (request.status, request.replica)
            assert o.first_token_s[i] == pytest.approx(request.first_token_s, rel=1e-6, nan_ok=True)
            assert o.finished_s[i] == pytest.approx(request.finished_s, rel=1e-6, nan_ok=True)
            if status == "completed":
                assert o.cached_tokens[i] == request.cached
        states = [state.name.lower() for state in simulation.states()]
        assert states == [replica.state for replica in plain.replicas]
        assert simulation.replica_seconds() == pytest.approx(plain.replica_seconds(), rel=1e-6)
