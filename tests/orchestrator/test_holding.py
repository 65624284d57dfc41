from hypothesis import given
from hypothesis import strategies as st

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.orchestrator.allocator import Member
from autopoiesis.orchestrator.holding import keep, same_cells

HELD = Allocation(
    7,
    (
        Cell("a", ("r0", "r1"), tuple(range(24)), 0.6),
        Cell("a", ("r2",), tuple(range(24, 40)), 0.6),
        Cell("b", ("r3",), tuple(range(40, 64)), 0.3),
    ),
)


def fleet(*names: str) -> list[Member]:
    return [Member(name) for name in names]


def kept(*names: str, serving: tuple[str, ...] = ("a", "b", "human")) -> Allocation:
    return keep(HELD, 8, fleet(*names), serving, "human")


def shards_of(allocation: Allocation) -> dict[str, int]:
    return {cell.replicas[0]: len(cell.shards) for cell in allocation.cells}


def test_nothing_changes_while_the_fleet_stays():
    again = kept("r0", "r1", "r2", "r3")
    assert same_cells(again, HELD)
    assert (again.window, {cell.propensity for cell in again.cells}) == (8, {1.0})


def test_a_cell_goes_on_with_those_of_its_replicas_that_are_there():
    assert next((c.arm_id, c.replicas, c.shards) for c in kept("r1", "r2", "r3").cells) == (
        "a", ("r1",), HELD.cells[0].shards,
    )  # fmt: skip
    assert same_cells(kept("r0", "r1", "r2", "r3"), HELD)  # r0 is back where it was


def test_a_cell_without_replicas_gives_its_shards_to_its_own_arm_first():
    without_r2 = kept("r0", "r1", "r3")
    assert [(c.arm_id, c.replicas) for c in without_r2.cells] == [
        ("a", ("r0", "r1")),
        ("b", ("r3",)),
    ]
    assert shards_of(without_r2) == {"r0": 40, "r3": 24}
    without_b = kept("r0", "r1", "r2")
    assert {c.arm_id for c in without_b.cells} == {"a"}
    assert shards_of(without_b) == {"r0": 43, "r2": 21}


def test_a_new_replica_joins_the_cell_with_the_most_shards_for_its_capacity():
    assert kept("r0", "r1", "r2", "r3", "r4").cells[2].replicas == ("r3", "r4")


def test_a_fleet_of_strangers_is_served_by_the_arm_with_the_most_shards():
    (cell,) = kept("s0", "s1").cells
    assert (cell.arm_id, cell.replicas, cell.shards) == ("a", ("s0", "s1"), tuple(range(64)))


def test_the_baseline_serves_for_an_arm_that_serves_no_more():
    assert [c.arm_id for c in kept("r0", "r2", "r3", serving=("a", "human")).cells] == [
        "a",
        "a",
        "human",
    ]


names = st.lists(st.sampled_from([f"r{i}" for i in range(6)]), min_size=1, unique=True)
capacities = st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6)


@given(names, capacities)
def test_every_replica_and_every_shard_is_in_exactly_one_cell(
    there: list[str], capacity: list[float]
):
    members = [Member(name, capacity[int(name[1])]) for name in there]
    allocation = keep(HELD, 8, members, ("a", "b"), "human")
    assert sorted(r for c in allocation.cells for r in c.replicas) == sorted(there)
    assert sorted(s for c in allocation.cells for s in c.shards) == list(range(SHARDS))
    for cell in HELD.cells:
        if set(cell.replicas) & set(there):
            (same,) = [c for c in allocation.cells if set(c.replicas) & set(cell.replicas)]
            assert set(cell.shards) <= set(same.shards)
            assert same.arm_id == cell.arm_id
