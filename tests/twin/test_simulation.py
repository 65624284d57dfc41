"""A simulated fleet under policies: decisions, queues, reallocation."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms.allocation import ROOT_TOKENS, SHARDS, shard_of
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.backlog import Backlog, no_backlog
from autopoiesis.twin.events import HELD_LIMIT, HELD_LIMIT_S
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation, run_arm, shards
from autopoiesis.twin.trace import Trace

H100 = profile("h100-llama-3-8b-tp1-bf16")
SMALL = replace(H100, kv_blocks=400, max_num_seqs=24, max_num_batched_tokens=512)
ALL_SHARDS = tuple(range(SHARDS))
SLO = Objective(slo_ttft_s=0.5, slo_tpot_s=0.05)
SEEDS = {arm.name: arm for arm in seed_arms()}


def policy(source: str) -> Program:
    return compile_policy(verify(source))


LEAST = policy("def score(request, replica, fleet):\n    return replica.in_flight\n")


def with_function(line: str, score: str = "replica.in_flight") -> Program:
    return policy(f"def score(request, replica, fleet):\n    return {score}\n\n{line}\n")


def random_trace(
    n: int, rate_rps: float, seed: int = 0, sessions: int = 40, longest: int = 300
) -> Trace:
    """Sessions whose prompts begin with what they share, at Poisson times."""
    rng = np.random.default_rng(seed)
    session = rng.integers(0, sessions + 1, n)
    inputs = rng.integers(5, 1500, n)
    blocks = [
        [int(s) * 1000 + j + 1 for j in range(k // 64)] if s else []
        for s, k in zip(session, inputs, strict=True)
    ]
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, n)),
        input_tokens=inputs,
        output_tokens=rng.integers(1, longest, n),
        max_output_tokens=np.full(n, 4096),
        session=session,
        priority=rng.integers(-1, 2, n).astype(float),
        block_start=np.cumsum([0, *(len(b) for b in blocks)]),
        blocks=np.array([x for b in blocks for x in b], np.int64),
        block_tokens=64,
        name="random",
    )


def burst(n: int, inputs: int = 100, outputs: int = 10, gap_s: float = 0.0) -> Trace:
    return Trace(
        arrival_s=np.arange(n) * gap_s,
        input_tokens=np.full(n, inputs),
        output_tokens=np.full(n, outputs),
        max_output_tokens=np.full(n, 4096),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.empty(0, np.int64),
        block_tokens=64,
        name="burst",
    )


def fleet(count: int, of: object = SMALL) -> list[ReplicaSpec]:
    return [ReplicaSpec(f"r{i}", of) for i in range(count)]  # type: ignore[arg-type]


def assert_conserved(o: Outcome) -> None:
    """Every request ended in one way, with the times that go with it."""
    done, shed = o.status == Status.COMPLETED, o.status == Status.SHED
    failed = o.status == Status.FAILED
    assert np.all(done | shed | failed)
    assert np.all(np.isfinite(o.first_token_s) == done)
    assert np.all(np.isfinite(o.finished_s) == (done | failed))
    assert np.all((o.replica >= 0) == (done | failed))
    assert np.all(o.cell >= 0)
    assert np.all(o.dispatched_s[done] >= o.arrival_s[done])
    assert np.all(o.first_token_s[done] > o.dispatched_s[done])
    later = o.output_tokens > 1
    assert np.all((o.finished_s > o.first_token_s)[done & later])
    assert np.all((o.finished_s == o.first_token_s)[done & ~later])


def in_flight(o: Outcome, replica: int) -> int:
    """Return the most requests that were in flight at a replica at once."""
    here = (o.replica == replica) & (o.status == Status.COMPLETED)
    times = np.concatenate([o.dispatched_s[here], o.finished_s[here]])
    change = np.concatenate([np.ones(here.sum()), -np.ones(here.sum())])
    order = np.lexsort((change, times))  # at one instant a place is given up before it is taken
    return int(np.cumsum(change[order]).max())


def same(a: Outcome, b: Outcome) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SEEDS)
def test_every_request_ends_once_under_every_human_arm(name: str) -> None:
    program = policy(SEEDS[name].source)
    trace = random_trace(600, 40.0)
    outcome = run_arm(trace, fleet(3), program, SLO, seed=3)
    assert_conserved(outcome)
    assert np.mean(outcome.status == Status.COMPLETED) > 0.3


def test_nothing_is_left_in_the_fleets_books() -> None:
    simulation = Simulation(random_trace(500, 40.0), fleet(3), SLO, 1)
    simulation.allocate([SimCell(LEAST, (0, 1, 2), ALL_SHARDS)])
    simulation.advance(math.inf)
    books = simulation._world.fleet.replica
    assert np.all(books[:, :3] == 0.0)  # in flight, queued prefill, decoding
    assert np.all(simulation._world.engines.kv.blocks[:, 1] == 0)
    assert simulation.preemptions > 0


def test_a_seed_gives_one_outcome_however_it_is_advanced() -> None:
    program = policy(SEEDS["power-of-two"].source)
    trace = random_trace(400, 40.0)
    whole = run_arm(trace, fleet(4), program, SLO, seed=7)
    assert same(whole, run_arm(trace, fleet(4), program, SLO, seed=7))
    assert not same(whole, run_arm(trace, fleet(4), program, SLO, seed=8))
    pieces = Simulation(trace, fleet(4), SLO, 7)
    pieces.allocate([SimCell(program, (0, 1, 2, 3), ALL_SHARDS)])
    for t in np.arange(0.0, 12.0, 0.37):
        pieces.advance(float(t))
        assert pieces.now_s == t
    pieces.advance(math.inf)
    assert same(whole, pieces.outcome())


@pytest.mark.parametrize(
    "name", ["power-of-two", "least-tokens", "prefix-affinity", "shed-when-saturated"]
)
def test_jumps_change_nothing(name: str) -> None:
    trace = random_trace(400, 40.0, seed=5)
    outcomes: list[Outcome] = []
    for jumps in (True, False):
        simulation = Simulation(trace, fleet(3), SLO, 2, jumps=jumps)
        simulation.allocate([SimCell(policy(SEEDS[name].source), (0, 1, 2), ALL_SHARDS)])
        simulation.advance(math.inf)
        outcomes.append(simulation.outcome())
    for a, b in zip(*outcomes, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_cells_keep_to_their_replicas_through_reallocations() -> None:
    other = policy(
        "def score(request, replica, fleet):\n    return replica.queued_prefill_tokens\n"
    )
    trace = random_trace(600, 40.0)
    simulation = Simulation(trace, fleet(4), SLO, 1)
    even, odd = tuple(range(0, SHARDS, 2)), tuple(range(1, SHARDS, 2))
    simulation.allocate([SimCell(LEAST, (0, 1), even), SimCell(other, (2, 3), odd)])
    simulation.advance(5.0)
    halfway = simulation.outcome()
    simulation.allocate([SimCell(other, (0,), even), SimCell(LEAST, (1, 2, 3), odd)])
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert_conserved(o)
    flying = (halfway.replica >= 0) & (halfway.status == Status.PENDING)
    assert flying.any()
    assert np.array_equal(o.replica[flying], halfway.replica[flying])
    allowed = {0: {0, 1}, 1: {2, 3}, 2: {0}, 3: {1, 2, 3}}
    for cell, replicas in allowed.items():
        used = set(o.replica[o.cell == cell].tolist())
        assert used == replicas
        assert set((o.shard[o.cell == cell] % 2).tolist()) == {cell % 2}
    assert np.all((o.cell >= 2) == (o.dispatched_s > 5.0))


def test_cells_of_equal_programs_are_one_group() -> None:
    again = policy("def score(request, replica, fleet):\n    return replica.in_flight\n")
    trace = random_trace(300, 40.0)
    pooled = Simulation(trace, fleet(4), SLO, 1)
    pooled.allocate(
        [SimCell(LEAST, (0, 1), ALL_SHARDS[:10]), SimCell(again, (2, 3), ALL_SHARDS[10:])]
    )
    pooled.advance(math.inf)
    o, whole = pooled.outcome(), run_arm(trace, fleet(4), LEAST, SLO, seed=1)
    assert same(o._replace(cell=whole.cell), whole)
    assert np.array_equal(o.cell, (o.shard >= 10).astype(int))


def test_a_ceiling_holds_requests_and_completions_release_them() -> None:
    program = with_function("def ceiling(request, replica, fleet):\n    return 3")
    o = run_arm(burst(60, gap_s=1e-3), fleet(2, H100), program, SLO, seed=0)
    assert_conserved(o)
    assert np.all(o.status == Status.COMPLETED)
    assert in_flight(o, 0) == in_flight(o, 1) == 3
    assert np.all(np.diff(o.dispatched_s) >= 0)  # without `priority`, in order of arrival
    held = o.dispatched_s > o.arrival_s
    assert held.sum() > 40
    assert np.all(np.isin(o.dispatched_s[held], np.concatenate([o.first_token_s, o.finished_s])))


def test_held_requests_leave_by_priority() -> None:
    program = with_function(
        "def priority(request, fleet):\n    return request.input_tokens\n\n"
        "def ceiling(request, replica, fleet):\n    return 1"
    )
    trace = replace(burst(30), input_tokens=np.random.default_rng(0).permutation(30) * 40 + 10)
    o = run_arm(trace, fleet(1, H100), program, SLO, seed=0)
    waited = np.argsort(o.dispatched_s[1:], kind="stable") + 1  # the first one found a free replica
    assert np.all(np.diff(o.input_tokens[waited]) > 0)


def test_what_one_policy_holds_leaves_by_its_rules_where_another_takes_its_place() -> None:
    one_each = with_function(
        "def priority(request, fleet):\n    return request.input_tokens\n\n"
        "def ceiling(request, replica, fleet):\n    return 1"
    )
    trace = replace(burst(40), input_tokens=np.random.default_rng(0).permutation(40) * 40 + 10)
    late = trace.arrival_s.copy()
    late[30:] = 0.5
    trace = replace(trace, arrival_s=late)
    simulation = Simulation(trace, fleet(1, H100), SLO, 0)
    simulation.allocate([SimCell(one_each, (0,), ALL_SHARDS)])
    simulation.advance(0.3)
    waiting = np.isnan(simulation.outcome().dispatched_s) & (trace.arrival_s < 0.5)
    assert waiting.sum() > 20
    simulation.allocate([SimCell(LEAST, (0,), ALL_SHARDS)])
    simulation.advance(0.4)
    assert in_flight(simulation.outcome(), 0) == 1
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert_conserved(o)
    assert np.all(o.status == Status.COMPLETED)
    assert np.all(o.dispatched_s[30:] == 0.5)  # the policy that serves now holds nothing
    left_s = o.dispatched_s[waiting]
    assert not np.any((left_s > 0.5) & (left_s < o.finished_s[30:].min()))
    order = np.flatnonzero(waiting)[np.argsort(o.dispatched_s[waiting], kind="stable")]
    assert np.all(np.diff(o.input_tokens[order]) > 0)


def test_what_is_held_survives_any_number_of_reallocations() -> None:
    rng = np.random.default_rng(3)
    policies = [
        LEAST,
        *(
            with_function(f"def ceiling(request, replica, fleet):\n    return {n}")
            for n in (1, 2, 4)
        ),
    ]
    trace = random_trace(600, 60.0)
    simulation = Simulation(trace, fleet(4, H100), SLO, 0, patience_s=8.0)
    for window in range(1, 30):
        first, second = rng.choice(4, 2, replace=False).tolist()
        split = int(rng.integers(8, 56))
        cells = [
            SimCell(policies[first], (0, 1), ALL_SHARDS[:split]),
            SimCell(policies[second], (2, 3), ALL_SHARDS[split:]),
        ]
        standing = None if window % 3 else [policies[i] for i in rng.choice(4, 2).tolist()]
        simulation.allocate(cells, standing)
        simulation.advance(window * 0.5)
    simulation.allocate([SimCell(LEAST, (0, 1, 2, 3), ALL_SHARDS)])
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert_conserved(o.select(o.status != Status.ABORTED))
    assert (o.status == Status.COMPLETED).sum() > 300
    assert (o.status == Status.ABORTED).sum() > 20
    assert np.all(o.status != Status.PENDING)


def test_held_requests_move_with_their_shard_where_who_holds_them_stands_no_more() -> None:
    closed = with_function("def ceiling(request, replica, fleet):\n    return 0")
    simulation = Simulation(burst(50), fleet(2, H100), SLO, 0)
    simulation.allocate([SimCell(closed, (0, 1), ALL_SHARDS)])
    simulation.advance(1.0)
    assert np.all(simulation.outcome().status == Status.PENDING)
    assert np.all(simulation.outcome().cell == -1)
    simulation.allocate(
        [SimCell(LEAST, (0,), ALL_SHARDS[:32]), SimCell(closed, (1,), ALL_SHARDS[32:])], []
    )
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert_conserved(o)
    served = o.shard < 32
    assert np.all(o.status[served] == Status.COMPLETED)
    assert np.all(o.dispatched_s[served] == 1.0)
    assert np.all(o.status[~served] == Status.SHED)
    assert simulation.now_s <= HELD_LIMIT_S + 1.0


def test_a_full_queue_sheds() -> None:
    program = with_function("def ceiling(request, replica, fleet):\n    return 1")
    o = run_arm(burst(HELD_LIMIT + 101, outputs=2), fleet(1, H100), program, SLO, seed=0)
    assert_conserved(o)
    assert (o.status == Status.SHED).sum() == 100
    assert np.all(o.status[: HELD_LIMIT + 1] == Status.COMPLETED)


def test_admission_sheds_what_the_policy_refuses() -> None:
    program = with_function("def admit(request, fleet):\n    return 300.5 - request.input_tokens")
    trace = random_trace(200, 20.0)
    o = run_arm(trace, fleet(2), program, SLO, seed=0)
    assert np.array_equal(o.status == Status.SHED, trace.input_tokens > 300)


def test_a_request_that_can_never_fit_fails_and_the_rest_goes_on() -> None:
    trace = random_trace(100, 20.0)
    huge = trace.input_tokens.copy()
    huge[[3, 50]] = 10_000_000
    o = run_arm(replace(trace, input_tokens=huge), fleet(2), LEAST, SLO, seed=0)
    assert_conserved(o)
    assert np.flatnonzero(o.status == Status.FAILED).tolist() == [3, 50]


def test_no_decision_depends_on_lengths_not_yet_seen() -> None:
    trace = random_trace(60, 2000.0)
    longer = replace(trace, output_tokens=trace.output_tokens + 500)
    program = policy(SEEDS["least-tokens"].source)
    a, b = (run_arm(t, fleet(4, H100), program, SLO, seed=0) for t in (trace, longer))
    unseen = trace.arrival_s < min(np.nanmin(a.finished_s), np.nanmin(b.finished_s))
    assert unseen.sum() > 20
    assert np.array_equal(a.replica[unseen], b.replica[unseen])


def test_affinity_finds_cached_prefixes() -> None:
    trace = random_trace(400, 20.0)
    scattered = run_arm(trace, fleet(4, H100), LEAST, SLO, seed=0)
    together = policy(
        "def score(request, replica, fleet):\n    return 0 - replica.prefix_hit_tokens\n"
    )
    affine = run_arm(trace, fleet(4, H100), together, SLO, seed=0)
    assert affine.cached_tokens.sum() > 1.2 * scattered.cached_tokens.sum()
    assert np.all(affine.cached_tokens < affine.input_tokens)


def test_a_faster_replica_is_as_much_faster() -> None:
    one = burst(1, outputs=50)
    slow = run_arm(one, [ReplicaSpec("r", H100)], LEAST, SLO, seed=0)
    fast = run_arm(one, [ReplicaSpec("r", H100, speed=2.0)], LEAST, SLO, seed=0)
    assert fast.e2e_s[0] == pytest.approx(slow.e2e_s[0] / 2)


def test_mixed_profiles_serve_side_by_side() -> None:
    replicas = [ReplicaSpec("h", H100), ReplicaSpec("a", profile("a100-llama-3-70b-tp4-bf16"))]
    program = policy(
        "def score(request, replica, fleet):\n    return (fleet.sequence + replica.position) % 2\n"
    )
    o = run_arm(burst(20, outputs=30, gap_s=1.0), replicas, program, SLO, seed=0)
    assert set(o.replica.tolist()) == {0, 1}
    assert np.all(o.e2e_s[o.replica == 1] > 2.0 * o.e2e_s[o.replica == 0].max())


def test_the_http_path_comes_on_top_only_when_asked() -> None:
    simulation = Simulation(burst(5), fleet(1, H100), SLO, 0)
    simulation.allocate([SimCell(LEAST, (0,), ALL_SHARDS)])
    simulation.advance(math.inf)
    engine, client = simulation.outcome(), simulation.outcome(client_side=True)
    path = H100.client
    assert client.ttft_s - engine.ttft_s == pytest.approx(path.request_s + path.token_s)
    assert client.e2e_s - engine.e2e_s == pytest.approx(
        path.request_s + path.end_s + 10 * path.token_s
    )


def test_shards_are_those_of_the_gateway() -> None:
    trace = random_trace(300, 20.0)
    trace = replace(trace, session=np.where(np.arange(300) % 3 == 0, -trace.session, 0))
    for i, shard in enumerate(shards(trace).tolist()):
        if trace.session[i]:
            assert shard == shard_of(int(trace.session[i]))
        elif len(trace.blocks_of(i)):
            root = trace.blocks_of(i)[: ROOT_TOKENS // trace.block_tokens][-1]
            assert shard == shard_of(int(root))
    spread = np.bincount(shards(burst(6400)), minlength=SHARDS)
    assert spread.min() > 50
    assert spread.max() < 160


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([((0, 1), ALL_SHARDS[:9]), ((1,), ALL_SHARDS[9:])], "replica 1 is in cells 0 and 1"),
        ([((0,), ALL_SHARDS[:9]), ((1,), ALL_SHARDS[10:])], "shard 9 is in 0 cells"),
        ([((0,), ALL_SHARDS), ((1,), (5,))], "shard 5 is in 2 cells"),
        ([((0, 7), ALL_SHARDS)], "names replica 7"),
        ([((), ALL_SHARDS)], "cell 0 has no replica"),
        ([((0,), (*ALL_SHARDS, 64))], "names shard 64"),
        ([], "shard 0 is in 0 cells"),
    ],
)
def test_allocations_are_checked(
    cells: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str
) -> None:
    simulation = Simulation(burst(3), fleet(2), SLO, 0)
    with pytest.raises(ValueError, match=message):
        simulation.allocate([SimCell(LEAST, *cell) for cell in cells])


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one replica"):
        Simulation(burst(3), [], SLO, 0)
    with pytest.raises(ValueError, match="scrape_interval_s"):
        Simulation(burst(3), fleet(1), SLO, 0, 0.0)
    with pytest.raises(ValueError, match="whole KV blocks"):
        Simulation(replace(random_trace(9, 1.0), block_tokens=100), fleet(1), SLO, 0)
    simulation = Simulation(burst(3), fleet(1), SLO, 0)
    with pytest.raises(ValueError, match="allocate"):
        simulation.advance(1.0)
    simulation.allocate([SimCell(LEAST, (0,), ALL_SHARDS)])
    simulation.advance(1.0)
    with pytest.raises(ValueError, match="already"):
        simulation.advance(0.5)
    with pytest.raises(ValueError, match="already"):
        simulation.advance(math.nan)


def test_an_empty_trace_ends_at_once() -> None:
    assert len(run_arm(burst(0), fleet(2), LEAST, SLO, seed=0).status) == 0


def arrays(part: object) -> Iterator[np.ndarray]:
    if isinstance(part, np.ndarray):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from arrays(inner)


def test_the_kernels_neither_keep_nor_drop_references() -> None:
    """They run without reference counting; the counts must come out even all the same."""
    simulation = Simulation(random_trace(300, 40.0), fleet(3), SLO, 1)
    program = with_function("def ceiling(request, replica, fleet):\n    return 4")
    simulation.allocate([SimCell(program, (0, 1, 2), ALL_SHARDS)])
    before = [sys.getrefcount(a) for a in arrays(simulation._world)]
    for t in range(20):
        simulation.advance(float(t))
    assert [sys.getrefcount(a) for a in arrays(simulation._world)] == before


def backlog_at(o: Outcome, rows: np.ndarray, at_s: float) -> Backlog:
    """Where a simulation's unfinished requests are at a time, counted from that time."""
    return Backlog(
        replica=np.where(o.dispatched_s[rows] < at_s, o.replica[rows], -1),
        generated_tokens=np.where(o.arrival_s[rows] < at_s, o.generated_tokens[rows], 0),
        first_token_s=o.first_token_s[rows] - at_s,
        held_by=np.where(o.arrival_s[rows] < at_s, 0, -1),
    )


def test_a_simulation_goes_on_from_the_backlog_of_another():
    """What ran goes on where it was, what was queued is queued, and what comes later fares as it did."""
    trace, fleet = random_trace(1200, 30.0), [ReplicaSpec(f"r{i}", SMALL) for i in range(2)]
    whole = [SimCell(LEAST, (0, 1), ALL_SHARDS)]
    first = Simulation(trace, fleet, SLO, 0)
    first.allocate(whole)
    first.advance(20.0)
    so_far = first.outcome()
    rows = np.flatnonzero((trace.arrival_s >= 20.0) | (so_far.status == Status.PENDING))
    first.advance(np.inf)
    again = trace.select(rows)
    again = replace(again, arrival_s=again.arrival_s - 20.0)
    backlog = backlog_at(so_far, rows, 20.0)
    assert (backlog.generated_tokens > 1).sum() > 10
    assert ((backlog.replica >= 0) & (backlog.generated_tokens == 0)).sum() > 10
    second = Simulation(again, fleet, SLO, 0, backlog=backlog)
    second.allocate(whole)
    second.advance(np.inf)
    told, really = second.outcome(), first.outcome().select(rows)
    assert np.all(told.status == Status.COMPLETED)
    there = again.arrival_s < 0.0
    assert (told.replica[there] == backlog.replica[there]).all()
    assert (told.dispatched_s[there] == 0.0).all()
    ran = backlog.generated_tokens > 0
    assert np.allclose(told.first_token_s[ran], really.first_token_s[ran] - 20.0)
    late_s = told.finished_s[ran] - (really.finished_s[ran] - 20.0)
    assert np.abs(late_s).max() < 1.0
    later = ~there
    assert np.median(told.ttft_s[later]) == pytest.approx(np.median(really.ttft_s[later]), rel=0.1)
    assert np.nanmedian(told.tpot_s[later]) == pytest.approx(
        np.nanmedian(really.tpot_s[later]), rel=0.1
    )


def test_what_is_held_at_first_is_held_by_who_held_it():
    one_each = with_function("def ceiling(request, replica, fleet):\n    return 1")
    shed_all = with_function("def admit(request, fleet):\n    return 0")
    trace = replace(burst(20), arrival_s=np.linspace(-2.0, -1.0, 20))
    held = no_backlog(20)._replace(held_by=np.zeros(20, np.int64), holders=(one_each,))
    simulation = Simulation(trace, fleet(1, H100), SLO, 0, backlog=held)
    simulation.allocate([SimCell(shed_all, (0,), ALL_SHARDS)])
    simulation.advance(math.inf)
    o = simulation.outcome()
    assert_conserved(o)
    assert np.all(o.status == Status.COMPLETED)  # nobody is asked a second time
    assert in_flight(o, 0) == 1
    free = Simulation(trace, fleet(1, H100), SLO, 0)  # nobody knows who held it
    free.allocate([SimCell(shed_all, (0,), ALL_SHARDS)])
    free.advance(math.inf)
    assert np.all(free.outcome().dispatched_s == 0.0)


def test_a_backlog_that_cannot_be_is_refused():
    trace, there = random_trace(3, 30.0), [ReplicaSpec(f"r{i}", SMALL) for i in range(2)]
    elsewhere = no_backlog(3)._replace(replica=np.full(3, 2))
    with pytest.raises(ValueError, match="`backlog` names replica 2; there are 2"):
        Simulation(trace, there, SLO, 0, backlog=elsewhere)
    done = no_backlog(3)._replace(generated_tokens=trace.output_tokens)
    with pytest.raises(ValueError, match="tokens to generate yet"):
        Simulation(trace, there, SLO, 0, backlog=done)


def test_the_tokens_of_a_running_stream_are_counted_at_any_moment():
    """Whatever runs of steps the engine has planned: one token after the other, and all of them in the end."""
    trace = random_trace(200, 12.0, 3)
    simulation = Simulation(trace, [ReplicaSpec(name, SMALL) for name in "ab"], SLO, 0)
    simulation.allocate([SimCell(LEAST, (0, 1), ALL_SHARDS)])
    before = np.zeros(len(trace), np.int64)
    for at_s in np.arange(0.5, 20.0, 0.173):
        simulation.advance(float(at_s))
        seen = simulation.outcome()
        assert np.all(seen.generated_tokens >= before)
        assert np.all((seen.generated_tokens > 0) == (seen.first_token_s <= at_s))
        running = (seen.generated_tokens > 1) & (seen.status == Status.PENDING)
        pace_s = (at_s - seen.first_token_s[running]) / (seen.generated_tokens[running] - 1)
        assert np.all(pace_s < 0.2)
        before = seen.generated_tokens
    simulation.advance(np.inf)
    assert np.array_equal(simulation.outcome().generated_tokens, trace.output_tokens)
