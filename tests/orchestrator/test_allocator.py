import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopoiesis.arms.allocation import SHARDS, Allocation
from autopoiesis.orchestrator.allocator import (
    Limits,
    Member,
    allocate,
    cells_of,
    concentrated,
    lay_out,
    members_of,
    moved_shards,
    systematic,
)
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec

UNLIMITED = Limits()


def fleet(n: int) -> list[Member]:
    return [Member(f"r{i}") for i in range(n)]


def drawn(
    members: list[Member],
    probabilities: dict[str, float],
    previous: Allocation | None = None,
    seed: int = 0,
    limits: Limits = UNLIMITED,
    load: np.ndarray | None = None,
    cell_replicas: int = 2,
) -> Allocation:
    window = previous.window + 1 if previous else 0
    layout = lay_out(members, previous, load, cell_replicas)
    return allocate(window, layout, probabilities, limits, previous, np.random.default_rng(seed))


fleets = st.dictionaries(
    st.sampled_from([f"r{i}" for i in range(12)]), st.floats(0.2, 5.0), min_size=1
)


@st.composite
def draws(draw: st.DrawFn) -> tuple[dict[str, float], Limits]:
    arms = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True))
    weights = np.array([draw(st.floats(0.01, 1.0)) for _ in arms])
    kinds = {a: draw(st.sampled_from(["free", "canary", "unconfirmed"])) for a in arms[1:]}
    limits = Limits(
        frozenset(a for a, k in kinds.items() if k == "canary"),
        frozenset(a for a, k in kinds.items() if k == "unconfirmed"),
    )
    return dict(zip(arms, (weights / weights.sum()).tolist(), strict=True)), limits


def check_whole(allocation: Allocation, members: list[Member]) -> None:
    assert sorted(s for c in allocation.cells for s in c.shards) == list(range(SHARDS))
    assert sorted(r for c in allocation.cells for r in c.replicas) == sorted(
        m.name for m in members
    )
    assert all(c.replicas and c.shards for c in allocation.cells)


loads = st.one_of(
    st.none(),
    st.lists(st.floats(0, 100), min_size=SHARDS, max_size=SHARDS).map(np.array),
    st.integers(0, SHARDS - 1).map(lambda i: 1000.0 * np.eye(SHARDS)[i]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(fleets, draws(), loads), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_every_shard_and_replica_is_in_exactly_one_cell(rounds, cell_replicas, seed):
    previous = None
    for capacities, (probabilities, limits), load in rounds:
        members = [Member(n, c) for n, c in capacities.items()]
        previous = drawn(members, probabilities, previous, seed, limits, load, cell_replicas)
        check_whole(previous, members)
        cells = previous.cells
        assert len(cells) in {cells_of(len(members), cell_replicas), 1}
        total = sum(capacities.values())
        for arm in limits.arms():
            if len(cells) > 1:
                held = sum(capacities[r] for r in previous.group(arm))
                assert held <= total / 2 * (1 + 1e-6)
            if arm in limits.canaries:
                assert sum(c.arm_id == arm for c in cells) <= 1
        assert all(c.propensity == probabilities[c.arm_id] for c in cells)


@settings(max_examples=50, deadline=None)
@given(st.lists(fleets, min_size=1, max_size=4))
def test_shards_are_in_proportion_to_capacity(rounds):
    previous = None
    for capacities in rounds:
        members = [Member(n, c) for n, c in capacities.items()]
        previous = drawn(members, {"a": 1.0}, previous)
        total = sum(capacities.values())
        for cell in previous.cells:
            exact = sum(capacities[r] for r in cell.replicas) / total * SHARDS
            assert abs(len(cell.shards) - exact) <= max(1.0, 0.31 * exact)


def test_uneven_shards_are_spread_by_their_load():
    load = np.zeros(SHARDS)
    load[:8] = [3000, 2500, 2000, 1500, 1500, 1200, 1000, 800]
    cells = drawn(fleet(8), {"a": 1.0}, load=load).cells
    shares = np.array([load[list(c.shards)].sum() for c in cells]) / load.sum()
    assert len(cells) == 4
    assert shares == pytest.approx(0.25, abs=0.08)


def test_a_fleet_whose_traffic_is_one_shard_stays_whole():
    allocation = drawn(fleet(8), {"a": 1.0}, load=200.0 * np.eye(SHARDS)[5])
    assert len(allocation.cells) == 1
    again = drawn(fleet(8), {"a": 1.0}, allocation)
    assert len(again.cells) == 4


def test_nothing_moves_while_nothing_changes():
    members = fleet(8)
    first = drawn(members, {"a": 0.5, "b": 0.5})
    for seed in range(20):
        assert drawn(members, {"a": 0.5, "b": 0.5}, first, seed).cells == first.cells


def test_a_changed_share_moves_arms_but_no_shards():
    members = fleet(8)
    first = drawn(members, {"a": 0.5, "b": 0.5})
    second = drawn(members, {"a": 0.75, "b": 0.25}, first, seed=1)
    assert moved_shards(first, second) == 0
    assert len(second.group("a")) == 6
    assert set(first.group("a")) <= set(second.group("a"))


def test_a_lost_replica_moves_only_what_it_must():
    first = drawn(fleet(9), {"a": 1.0})
    gone = first.cells[0].replicas[0]
    second = drawn([m for m in fleet(9) if m.name != gone], {"a": 1.0}, first, seed=1)
    assert moved_shards(first, second) <= SHARDS // 4


def test_a_small_fleet_is_one_cell_and_arms_take_turns():
    served = []
    previous = None
    for seed in range(200):
        previous = drawn(fleet(3), {"a": 0.7, "b": 0.3}, previous, seed)
        assert len(previous.cells) == 1
        served.append(previous.cells[0].arm_id)
    assert 0.2 < served.count("b") / 200 < 0.4


def test_a_thousand_replicas_make_few_cells_with_shards_each():
    allocation = drawn(fleet(1000), {"a": 1.0})
    check_whole(allocation, fleet(1000))
    assert len(allocation.cells) == 16


@settings(deadline=None)
@given(draws(), st.integers(1, 12), st.integers(0, 1000))
def test_at_most_one_cell_goes_to_a_challenger(draw, cells, seed):
    probabilities, limits = draw
    p = concentrated(probabilities, limits, cells)
    assert set(p) == set(probabilities)
    assert sum(p.values()) == pytest.approx(1.0)
    free = [a for a in probabilities if a not in limits.arms()]
    leading = {max(free, key=lambda a: probabilities[a])}
    if cells > 1:
        counts = systematic(np.array(list(p.values())), cells, np.random.default_rng(seed))
        assert sum(n for a, n in zip(p, counts, strict=True) if a not in leading) <= 1
    else:
        assert p == pytest.approx(probabilities)


def test_equal_arms_do_not_take_turns():
    nearly = {"a": 0.30, "b": 0.40, "c": 0.30}
    p = concentrated(nearly, UNLIMITED, 4, exploration=0.1, incumbent="a")
    assert p["a"] == pytest.approx(0.9)
    assert concentrated(nearly, UNLIMITED, 4, 0.1)["b"] == pytest.approx(0.9)
    better = concentrated({"a": 0.2, "b": 0.8}, UNLIMITED, 4, 0.1, incumbent="a")
    assert better["b"] == pytest.approx(0.9)


@given(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(0, 10_000),
)
def test_systematic_counts_are_at_most_one_off(weights, n, seed):
    p = np.array(weights) / np.sum(weights)
    counts = systematic(p, n, np.random.default_rng(seed))
    assert counts.sum() == n
    assert np.all(counts >= np.floor(n * p - 1e-6))
    assert np.all(counts <= np.ceil(n * p + 1e-6))


def test_systematic_sampling_is_unbiased():
    p = np.array([0.05, 0.6, 0.35])
    rng = np.random.default_rng(3)
    mean = np.mean([systematic(p, 3, rng) for _ in range(4000)], axis=0)
    assert mean == pytest.approx(3 * p, abs=0.03)


def test_caps_keep_canaries_below_their_share_in_time_too():
    caps = Limits(canaries=frozenset("xy"), unconfirmed=frozenset("z")).caps(1)
    assert caps == {"x": 0.125, "y": 0.125, "z": 0.5}
    assert Limits(unconfirmed=frozenset("z")).caps(5)["z"] == pytest.approx(0.4)


def test_a_faster_replica_has_more_capacity():
    slow = ReplicaSpec("slow", profile("a100-llama-3-8b-tp1-bf16"))
    fast = ReplicaSpec("fast", profile("h100-llama-3-8b-tp1-bf16"))
    twice = ReplicaSpec("twice", profile("h100-llama-3-8b-tp1-bf16"), 2.0)
    a, b, c = (m.capacity for m in members_of((slow, fast, twice)))
    assert a < b
    assert c == pytest.approx(2 * b)


@pytest.mark.parametrize("members", [[], [Member("a"), Member("a")], [Member("a", 0.0)]])
def test_a_bad_fleet_is_refused(members):
    with pytest.raises(ValueError):
        drawn(members, {"a": 1.0})
