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
    moved_shards,
    systematic,
)


def fleet(n: int) -> list[Member]:
    return [Member(f"r{i}") for i in range(n)]


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


def check_whole(allocation: Allocation, members: list[Member], cell_replicas: int) -> None:
    assert sorted(s for c in allocation.cells for s in c.shards) == list(range(SHARDS))
    assert sorted(r for c in allocation.cells for r in c.replicas) == sorted(
        m.name for m in members
    )
    assert len(allocation.cells) == cells_of(len(members), cell_replicas)
    assert all(c.replicas for c in allocation.cells)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(fleets, draws()), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_every_shard_and_replica_is_in_exactly_one_cell(rounds, cell_replicas, seed):
    previous = None
    for window, (capacities, (probabilities, limits)) in enumerate(rounds):
        members = [Member(n, c) for n, c in capacities.items()]
        rng = np.random.default_rng([seed, window])
        previous = allocate(window, members, probabilities, limits, previous, rng, cell_replicas)
        check_whole(previous, members, cell_replicas)
        total = sum(capacities.values())
        cells = previous.cells
        for arm in limits.arms():
            if len(cells) > 1:
                held = sum(capacities[r] for r in previous.group(arm))
                assert held <= total / 2 * (1 + 1e-6)
            if arm in limits.canaries:
                assert sum(c.arm_id == arm for c in cells) <= 1
        for cell in cells:
            assert cell.propensity == probabilities[cell.arm_id]
            exact = sum(capacities[r] for r in cell.replicas) / total * SHARDS
            assert abs(len(cell.shards) - exact) < 1.0


def test_nothing_moves_while_nothing_changes():
    members = fleet(8)
    first = allocate(0, members, {"a": 0.5, "b": 0.5}, Limits(), None, np.random.default_rng(0))
    for seed in range(20):
        again = allocate(
            1, members, {"a": 0.5, "b": 0.5}, Limits(), first, np.random.default_rng(seed)
        )
        assert again.cells == first.cells


def test_a_changed_share_moves_arms_but_no_shards():
    members = fleet(8)
    first = allocate(0, members, {"a": 0.5, "b": 0.5}, Limits(), None, np.random.default_rng(0))
    second = allocate(1, members, {"a": 0.75, "b": 0.25}, Limits(), first, np.random.default_rng(1))
    assert moved_shards(first, second) == 0
    assert len(second.group("a")) == 6
    assert set(first.group("a")) <= set(second.group("a"))


def test_a_lost_replica_moves_only_what_it_must():
    first = allocate(0, fleet(8), {"a": 1.0}, Limits(), None, np.random.default_rng(0))
    gone = first.cells[0].replicas[0]
    members = [m for m in fleet(8) if m.name != gone]
    second = allocate(
        1, members, {"a": 1.0}, Limits(), first, np.random.default_rng(1), cell_replicas=1
    )
    check_whole(second, members, 1)
    third = allocate(1, members, {"a": 1.0}, Limits(), first, np.random.default_rng(1))
    assert moved_shards(first, third) <= SHARDS * 2 // 3


def test_a_small_fleet_is_one_cell_and_arms_take_turns():
    served = []
    previous = None
    for window in range(200):
        rng = np.random.default_rng([7, window])
        previous = allocate(window, fleet(3), {"a": 0.7, "b": 0.3}, Limits(), previous, rng)
        assert len(previous.cells) == 1
        served.append(previous.cells[0].arm_id)
    assert 0.2 < served.count("b") / 200 < 0.4


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


@pytest.mark.parametrize("members", [[], [Member("a"), Member("a")], [Member("a", 0.0)]])
def test_a_bad_fleet_is_refused(members):
    with pytest.raises(ValueError):
        allocate(0, members, {"a": 1.0}, Limits(), None, np.random.default_rng(0))
