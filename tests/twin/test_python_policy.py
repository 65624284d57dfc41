"""Policies in plain Python decide exactly as their compiled forms do."""

import math

import numpy as np
import pytest

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.features import FUNCTIONS
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import LARGEST
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.capacity import Action, CapacityChange
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.python_policy import PythonPolicy, PythonPolicyError
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation, run_arm
from autopoiesis.twin.speed import PYTHON, conversations
from autopoiesis.twin.trace import Trace

SOURCES = {arm.name: arm.source for arm in seed_arms()}
OBJECTIVE = Objective()
ALL = tuple(range(SHARDS))


def as_python(source: str) -> PythonPolicy:
    """Run a seed's text as the ordinary Python that it also is."""
    names = {"floor": math.floor, "clip": lambda x, low, high: min(max(x, low), high)}
    exec(source, names)
    return PythonPolicy(**{name: names[name] for name in FUNCTIONS if name in names})


def busy_trace(requests: int = 400) -> Trace:
    """Make a trace that fills four replicas, with sessions, shared prefixes and priorities."""
    made = conversations(requests, 3, rate_rps=800.0)
    rng = np.random.default_rng(4)
    session = rng.integers(1, 40, requests)
    blocks = made.input_tokens // 512
    return Trace(
        arrival_s=made.arrival_s,
        input_tokens=made.input_tokens,
        output_tokens=made.output_tokens,
        max_output_tokens=made.max_output_tokens,
        session=session,
        priority=rng.choice([-1.0, 0.0, 1.0], requests),
        block_start=np.concatenate([[0], np.cumsum(blocks)]),
        blocks=np.concatenate(
            [s * 1000 + np.arange(n) for s, n in zip(session, blocks, strict=True)]
        ),
        block_tokens=512,
        name="busy",
    )


def fleet() -> list[ReplicaSpec]:
    return [
        ReplicaSpec(f"r{i}", profile("h100-llama-3-8b-tp1-bf16"), speed)
        for i, speed in enumerate((1.0, 1.0, 0.5, 1.5))
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_a_seed_as_plain_python_gives_the_same_outcome_bit_for_bit(name: str) -> None:
    trace = busy_trace()
    compiled = run_arm(trace, fleet(), compile_policy(verify(SOURCES[name])), OBJECTIVE, 7)
    plain = run_arm(trace, fleet(), as_python(SOURCES[name]), OBJECTIVE, 7)
    assert len(np.unique(compiled.replica)) > 1
    for expected, actual in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(expected, actual)


def test_the_busy_trace_makes_requests_wait() -> None:
    trace = busy_trace()
    held = run_arm(trace, fleet(), as_python(SOURCES["shortest-prompt-first"]), OBJECTIVE, 7)
    assert np.count_nonzero(held.dispatched_s > trace.arrival_s) > 50
    assert np.count_nonzero(held.cached_tokens) > 50


@pytest.mark.parametrize("name", PYTHON)
def test_the_measured_functions_are_the_seeds(name: str) -> None:
    trace = busy_trace()
    compiled = run_arm(trace, fleet(), compile_policy(verify(SOURCES[name])), OBJECTIVE, 7)
    np.testing.assert_array_equal(
        compiled.finished_s, run_arm(trace, fleet(), PYTHON[name], OBJECTIVE, 7).finished_s
    )


def test_a_python_policy_may_keep_state() -> None:
    turns: list[float] = []

    def score(request, replica, fleet):
        turns.append(replica.position)
        return (replica.position - (len(turns) - 1) // 4) % 4

    outcome = run_arm(busy_trace(40), fleet(), PythonPolicy(score), OBJECTIVE, 0)
    assert [0.0, 1.0, 2.0, 3.0] * 40 == turns
    assert outcome.replica.tolist() == [0, 1, 2, 3] * 10


def test_each_group_sees_its_own_replicas() -> None:
    seen: dict[str, set[float]] = {"slow": set(), "fast": set()}

    def looking(key):
        def score(request, replica, fleet):
            seen[key].add(replica.speed)
            return replica.in_flight

        return PythonPolicy(score)

    simulation = Simulation(busy_trace(), fleet(), OBJECTIVE, 0)
    simulation.allocate(
        [
            SimCell(looking("slow"), (0, 2), ALL[: SHARDS // 2]),
            SimCell(looking("fast"), (1, 3), ALL[SHARDS // 2 :]),
        ]
    )
    simulation.advance(math.inf)
    assert seen == {"slow": {1.0, 0.5}, "fast": {1.0, 1.5}}


def test_not_a_number_sorts_last_as_the_largest_float_does() -> None:
    for worst in (math.nan, math.inf, LARGEST):
        policy = PythonPolicy(lambda request, replica, fleet, worst=worst: (
            worst if replica.position < 3 else 1e300))  # fmt: skip
        outcome = run_arm(busy_trace(50), fleet(), policy, OBJECTIVE, 0)
        assert set(outcome.replica.tolist()) == {3}


def test_answers_may_be_whole_numbers_truths_and_numpy_floats() -> None:
    policy = PythonPolicy(
        score=lambda request, replica, fleet: np.float32(replica.position),
        admit=lambda request, fleet: fleet.in_flight < 4,
        ceiling=lambda request, replica, fleet: 3,
    )
    outcome = run_arm(busy_trace(60), fleet(), policy, OBJECTIVE, 0)
    assert {0, 1} == set(outcome.replica[outcome.status == Status.COMPLETED].tolist())
    assert np.count_nonzero(outcome.status == Status.SHED) > 0


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda request, replica, fleet: 1 / 0, "`score` failed: ZeroDivisionError"),
        (lambda request, replica, fleet: None, "returned None, which is no number"),
        (lambda request, replica, fleet: "7", "returned '7', which is no number"),
        (lambda request, replica, fleet: replica.speeed, "no attribute 'speeed'"),
        (lambda request: 1.0, "`score` failed: TypeError"),
    ],
)
def test_what_a_policy_raises_comes_out_of_advance_and_ends_the_simulation(function, says) -> None:
    simulation = Simulation(busy_trace(), fleet(), OBJECTIVE, 0)
    simulation.allocate([SimCell(PythonPolicy(function), (0, 1, 2, 3), ALL)])
    with pytest.raises(PythonPolicyError, match=says):
        simulation.advance(math.inf)
    stopped_s = simulation.now_s
    assert stopped_s == busy_trace().arrival_s[0]
    for again in (
        lambda: simulation.advance(math.inf),
        lambda: simulation.allocate([SimCell(PYTHON["least-requests"], (0, 1, 2, 3), ALL)]),
        lambda: simulation.change(CapacityChange(0.0, 0, Action.DRAIN)),
    ):
        with pytest.raises(PythonPolicyError, match=says):
            again()
    assert simulation.now_s == stopped_s


def test_the_first_failure_is_the_one_that_is_told() -> None:
    calls = iter(range(1000))

    def score(request, replica, fleet):
        if (n := next(calls)) >= 100:
            raise LookupError(f"call {n}")
        return 0.0

    with pytest.raises(PythonPolicyError, match="LookupError: call 100") as told:
        run_arm(busy_trace(), fleet(), PythonPolicy(score), OBJECTIVE, 0)
    assert isinstance(told.value.__cause__, LookupError)
    assert next(calls) <= 104  # the decision under way is finished, no other is begun


def test_an_interrupt_stays_an_interrupt() -> None:
    def score(request, replica, fleet):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_arm(busy_trace(), fleet(), PythonPolicy(score), OBJECTIVE, 0)


def test_compiled_and_python_policies_do_not_mix_but_may_follow_each_other() -> None:
    compiled = compile_policy(verify(SOURCES["least-requests"]))
    simulation = Simulation(busy_trace(), fleet(), OBJECTIVE, 0)
    with pytest.raises(ValueError, match="use one kind"):
        simulation.allocate(
            [SimCell(compiled, (0, 1), ALL), SimCell(PYTHON["least-requests"], (2, 3), ())]
        )
    simulation.allocate([SimCell(compiled, (0, 1, 2, 3), ALL)])
    simulation.advance(0.1)
    simulation.allocate([SimCell(PYTHON["least-requests"], (0, 1, 2, 3), ALL)])
    simulation.advance(0.2)
    simulation.allocate([SimCell(compiled, (0, 1, 2, 3), ALL)])
    simulation.advance(math.inf)
    assert (simulation.outcome().status == Status.COMPLETED).all()
