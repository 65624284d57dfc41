"""The fast engine against the plain one: same tokens in the same steps, same times.

`TWIN_EXAMPLES=5000 pytest tests/twin/test_engine_equivalence.py` tries more cases than the default.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ReferenceEngine, Served, serve

from autopoiesis.arms.features import FIRST_CONSTANT, FIRST_REPLICA
from autopoiesis.arms.machine import Op, Program
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.engine import Engine
from autopoiesis.twin.latency import Profile, StepModel
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import Trace

EXAMPLES = int(os.environ.get("TWIN_EXAMPLES", "200"))
thorough = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="TWIN_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)

LEAST_IN_FLIGHT = Program(
    code=np.array([[Op.RETURN, 0, FIRST_REPLICA, 0]], np.int32),
    entry=np.array([0, -1, -1, -1], np.int64),
    registers=np.zeros(FIRST_CONSTANT),
    constants=0,
)

Arrival = tuple[float, int, int, list[int], float]


@dataclass(frozen=True)
class Case:
    profile: Profile
    entry_tokens: int
    arrivals: list[Arrival]


coefficient = st.floats(0.0, 1e-3)
step_models = st.builds(
    StepModel,
    weights_s=st.floats(1e-3, 2e-2),
    token_s=st.floats(0.0, 1e-4),
    knee=st.floats(1.0, 3.5),
    head_s=coefficient,
    head_sequence_s=coefficient,
    host_s=coefficient,
    host_sequence_s=coefficient,
    decode_s=coefficient,
    decode_context_token_s=st.sampled_from([0.0, 1e-7, 1e-5]),
    decode_sequence_s=coefficient,
    mixed_s=coefficient,
    mixed_decode_s=coefficient,
    mixed_context_token_s=st.floats(0.0, 1e-5),
    mixed_sequence_s=coefficient,
    prefill_token_s=st.floats(0.0, 1e-4),
    prefill_pair_s=st.floats(0.0, 1e-6),
    prefill_cached_token_s=st.floats(0.0, 1e-5),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_tokens = draw(st.sampled_from([4, 16]))
    entry_tokens = draw(st.sampled_from([0, 1, 1, 2, 3])) * block_tokens
    profile = Profile(
        name="small",
        step=draw(step_models),
        kv_blocks=draw(st.integers(4, 40)),
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.sampled_from([2, 3, 5, 8, 16, 33, 64, 4096])),
        source="made up",
        validated=False,
        kv_block_tokens=block_tokens,
        scheduling=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
    )
    families = draw(st.integers(1, 4))
    arrivals: list[Arrival] = []
    now_s = 0.0
    for i in range(draw(st.integers(1, 25))):
        now_s += draw(st.sampled_from([0.0, 0.0, 1e-3, 0.013, 0.1, 0.4]))
        input_tokens = draw(st.integers(1, 90))
        family = draw(st.integers(1, families))
        branch = draw(st.integers(0, 6))
        count = -(-input_tokens // entry_tokens) if entry_tokens else 0
        hashes = [family * 1000 + j if j < branch else (i + 1) * 100_000 + j for j in range(count)]
        priority = draw(st.sampled_from([0.0, 0.0, 1.0, -1.0]))
        arrivals.append((now_s, input_tokens, draw(st.integers(1, 70)), hashes, priority))
    return Case(profile, entry_tokens, arrivals)


def trace_of(arrivals: list[Arrival], entry_tokens: int) -> Trace:
    arrival_s, inputs, outputs, hashes, priority = zip(*arrivals, strict=True)
    n = len(arrival_s)
    return Trace(
        arrival_s=np.array(arrival_s, float),
        input_tokens=np.array(inputs, np.int64),
        output_tokens=np.array(outputs, np.int64),
        max_output_tokens=np.full(n, 4096, np.int64),
        session=np.zeros(n, np.int64),
        priority=np.array(priority, float),
        block_start=np.cumsum([0, *(len(h) for h in hashes)], dtype=np.int64),
        blocks=np.array([b for h in hashes for b in h], np.int64),
        block_tokens=entry_tokens or 16,
        name="small",
    )


def simulated(case: Case, *, jumps: bool) -> tuple[list[Served], int]:
    simulation = Simulation(
        trace_of(case.arrivals, case.entry_tokens),
        [ReplicaSpec("r", case.profile)],
        Objective(),
        seed=0,
        jumps=jumps,
    )
    simulation.allocate([SimCell(LEAST_IN_FLIGHT, (0,), tuple(range(64)))])
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert not np.any(o.status == Status.PENDING)
    served = [
        Served(
            float(o.first_token_s[i]),
            float(o.finished_s[i]) if o.status[i] == Status.COMPLETED else math.nan,
            int(o.cached_tokens[i]),
            bool(o.status[i] == Status.FAILED),
        )
        for i in range(len(o.status))
    ]
    return served, simulation.preemptions


@thorough
@given(cases())
def test_simulation_gives_the_times_of_the_plain_engine(case: Case) -> None:
    expected, preemptions = serve(case.profile, case.entry_tokens, case.arrivals)
    for jumps in (True, False):
        served, preempted = simulated(case, jumps=jumps)
        assert preempted == preemptions
        for fast, plain in zip(served, expected, strict=True):
            assert fast.failed == plain.failed
            assert fast.cached == plain.cached
            assert fast.first_token_s == pytest.approx(plain.first_token_s, rel=1e-6, nan_ok=True)
            assert fast.finished_s == pytest.approx(plain.finished_s, rel=1e-6, nan_ok=True)


@thorough
@given(cases(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 24)), max_size=8))
def test_engine_emits_what_the_plain_engine_emits(
    case: Case, aborts: list[tuple[int, int]]
) -> None:
    """In lockstep, with requests that come by step number, and aborts during and between steps."""
    fast = Engine(case.profile, case.entry_tokens)
    plain = ReferenceEngine(case.profile, case.entry_tokens)
    slots: dict[int, int] = {}
    names: dict[int, int] = {}
    cached: dict[int, int] = {}
    pending = list(enumerate(case.arrivals))
    for step in range(20_000):
        while pending and pending[0][1][0] * 30 <= step:
            name, (_, input_tokens, output_tokens, hashes, priority) = pending.pop(0)
            if not plain.fits(input_tokens, output_tokens):
                with pytest.raises(ValueError, match="exceed the KV cache"):
                    fast.submit(input_tokens, output_tokens, np.array(hashes, np.int64), priority)
                continue
            slot = fast.submit(input_tokens, output_tokens, np.array(hashes, np.int64), priority)
            plain.submit(name, input_tokens, output_tokens, hashes, priority)
            slots[name], names[slot] = slot, name
        for at, name in aborts:
            if at == step and at % 2 == 0 and name in slots:
                fast.abort(slots.pop(name))
                plain.abort(name)
        duration_s = fast.start_step()
        expected_s = plain.start_step()
        assert (duration_s is None) == (expected_s is None)
        if duration_s is None:
            if not pending:
                break
            continue
        assert duration_s == pytest.approx(expected_s, rel=1e-9)
        dropped = {name for at, name in aborts if at == step and at % 2 == 1 and name in slots}
        for name in dropped:
            fast.abort(slots.pop(name))
        emitted = {(names[e.slot], e.first, e.finished) for e in fast.finish_step()}
        ended = plain.finish_step()
        for name in dropped:
            plain.abort(name)
        assert emitted == {
            (s.name, first, last) for s, first, last in ended if s.name not in dropped
        }
        for sequence, first, last in ended:
            if sequence.name in dropped:
                continue
            if first:
                cached[sequence.name] = sequence.cached or 0
                assert fast.cached_tokens(slots[sequence.name]) == cached[sequence.name]
            if last:
                slots.pop(sequence.name)
        assert fast.running == len(plain.running)
        assert fast.waiting == len(plain.waiting)
        assert fast.preemptions == plain.preemptions
        assert fast.kv_usage == pytest.approx(plain.used() / case.profile.kv_blocks)
    assert fast.start_step() is None
    assert fast.kv_usage == 0.0
