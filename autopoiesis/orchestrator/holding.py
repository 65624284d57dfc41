"""An allocation that stays as it is while the fleet beneath it changes."""

from collections.abc import Collection, Sequence

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.orchestrator.allocator import Member


def keep(
    held: Allocation,
    window: int,
    members: Sequence[Member],
    serving: Collection[str],
    instead: str,
) -> Allocation:
    """Return `held` for another window, changed only where it must be.

    A cell keeps those of its replicas that are there; `held` itself does not change, so replicas
    that come back return to their cell. A replica that `held` does not know joins the cell with the
    most shards for its capacity. A cell without any replica gives its shards to the other cells of
    its arm, or to all where there are none. `instead` serves for an arm that serves no more.
    Propensities are 1: nothing is drawn.

    Raises:
        ValueError: no replica is there.
    """
    if not members:
        raise ValueError("an allocation needs at least one replica")
    capacity = {m.name: m.capacity for m in members}
    arms = [cell.arm_id if cell.arm_id in serving else instead for cell in held.cells]
    groups = [[r for r in cell.replicas if r in capacity] for cell in held.cells]
    shards = [list(cell.shards) for cell in held.cells]
    known = {r for cell in held.cells for r in cell.replicas}
    if not any(groups):
        largest = max(range(len(groups)), key=lambda i: len(shards[i]))
        groups[largest] = list(capacity)
    else:
        for name in capacity:
            if name not in known:
                _neediest(groups, shards, capacity).append(name)
    for i, group in enumerate(groups):
        if not group:
            _give_away(i, arms, groups, shards, capacity)
    cells = zip(arms, groups, shards, strict=True)
    return Allocation(
        window, tuple(Cell(a, tuple(g), tuple(sorted(s)), 1.0) for a, g, s in cells if g)
    )


def _neediest(
    groups: list[list[str]], shards: list[list[int]], capacity: dict[str, float]
) -> list[str]:
    """Return the group with the most shards for its capacity, of those that have a replica."""
    there = [i for i, group in enumerate(groups) if group]
    return groups[max(there, key=lambda i: len(shards[i]) / _capacity(groups[i], capacity))]


def _give_away(
    empty: int,
    arms: list[str],
    groups: list[list[str]],
    shards: list[list[int]],
    capacity: dict[str, float],
) -> None:
    """Deal the shards of a group without replicas to others, in proportion to capacity."""
    there = [i for i, group in enumerate(groups) if group]
    others = [i for i in there if arms[i] == arms[empty]] or there
    for shard in shards[empty]:
        taker = min(others, key=lambda i: (len(shards[i]) + 1) / _capacity(groups[i], capacity))
        shards[taker].append(shard)
    shards[empty] = []


def _capacity(group: list[str], capacity: dict[str, float]) -> float:
    return sum(capacity[r] for r in group)


def same_cells(one: Allocation, other: Allocation) -> bool:
    """Tell whether two allocations give the same arms the same replicas and shards."""
    return [(c.arm_id, c.replicas, c.shards) for c in one.cells] == [
        (c.arm_id, c.replicas, c.shards) for c in other.cells
    ]
