"""From probabilities to cells: which replicas serve which arm, fed by which shards.

Replicas are dealt into cells of about `cell_replicas`; fewer than two cells mean that the whole
fleet is one cell and arms take turns in time. How many cells an arm gets is drawn by systematic
sampling: an arm with probability p has n * p cells in expectation and is never more than one off.
Cells keep their replicas, replicas their arm and shards their cell wherever the draw allows.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.twin.latency import at_speed, step_s
from autopoiesis.twin.simulation import ReplicaSpec

Floats = NDArray[np.float64]

CANARY_SHARE = 0.25
"""Most of the traffic that all canaries together get in the long run."""


@dataclass(frozen=True, slots=True)
class Member:
    """A replica that can serve, and how much it can serve relative to the others."""

    name: str
    capacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Arms that may not have the whole fleet."""

    canaries: frozenset[str] = frozenset()
    """At most one cell, at most half of the fleet."""
    unconfirmed: frozenset[str] = frozenset()
    """At most half of the fleet each."""

    def caps(self, cells: int) -> dict[str, float]:
        """Return the highest probability per cell that these limits allow, by arm."""
        half = (cells // 2) / cells if cells > 1 else 0.5
        caps = dict.fromkeys(self.unconfirmed, half)
        each = min(CANARY_SHARE / max(len(self.canaries), 1), 1.0 / cells)
        return caps | dict.fromkeys(self.canaries, each)

    def arms(self) -> frozenset[str]:
        """Return the arms that are limited at all."""
        return self.canaries | self.unconfirmed


def members_of(replicas: Sequence[ReplicaSpec]) -> tuple[Member, ...]:
    """Return the replicas with their capacity: steps of a typical mixed batch per second."""
    return tuple(Member(r.name, 1.0 / _typical_step_s(r)) for r in replicas)


def _typical_step_s(replica: ReplicaSpec) -> float:
    decodes, context, prefill = 32, 32 * 1024, 256
    sequences = decodes + 1
    return float(
        step_s(
            at_speed(replica.profile.step, replica.speed),
            decodes + prefill,
            sequences,
            sequences,
            decodes,
            context,
            prefill,
            prefill * prefill / 2.0,
            0,
        )
    )


def cells_of(replicas: int, cell_replicas: int) -> int:
    """Return how many cells a fleet of so many replicas makes."""
    cells = replicas // max(cell_replicas, 1)
    return cells if cells >= 2 else 1


def allocate(
    window: int,
    members: Sequence[Member],
    probabilities: Mapping[str, float],
    limits: Limits,
    previous: Allocation | None,
    rng: np.random.Generator,
    cell_replicas: int = 2,
) -> Allocation:
    """Return the allocation of one window.

    Raises:
        ValueError: there is no replica or no arm, or a name or a capacity is bad.
    """
    if not members or not probabilities:
        raise ValueError("an allocation needs at least one replica and one arm")
    capacity = {m.name: m.capacity for m in members}
    if len(capacity) < len(members) or min(capacity.values()) <= 0.0:
        raise ValueError("replicas need distinct names and capacities above 0")
    groups = _groups(capacity, cells_of(len(members), cell_replicas), previous)
    sizes = [sum(capacity[r] for r in group) for group in groups]
    arms = _arms(groups, sizes, probabilities, limits, previous, rng)
    shards = _shards(groups, np.array(sizes), previous)
    cells = (
        Cell(arm, tuple(group), tuple(own), probabilities[arm])
        for arm, group, own in zip(arms, groups, shards, strict=True)
    )
    return Allocation(window, tuple(cells))


def moved_shards(before: Allocation, after: Allocation) -> int:
    """Count the shards whose replicas change entirely: their prefix caches are lost."""
    old = {s: set(c.replicas) for c in before.cells for s in c.shards}
    return sum(old[s].isdisjoint(c.replicas) for c in after.cells for s in c.shards)


def _groups(capacity: Mapping[str, float], n: int, previous: Allocation | None) -> list[list[str]]:
    """Deal replicas into n groups of even capacity; kept as they were while their number fits."""
    groups: list[list[str]] = [[] for _ in range(n)]
    new = list(capacity)
    if previous is not None and len(previous.cells) == n:
        groups = [[r for r in cell.replicas if r in capacity] for cell in previous.cells]
        known = {r for group in groups for r in group}
        new = [r for r in capacity if r not in known]
    for name in sorted(new, key=lambda r: (-capacity[r], list(capacity).index(r))):
        _emptiest(groups, capacity).append(name)
    while any(not group for group in groups):
        largest = max(groups, key=lambda g: (len(g), sum(capacity[r] for r in g)))
        _emptiest(groups, capacity).append(largest.pop())
    return groups


def _emptiest(groups: Sequence[list[str]], capacity: Mapping[str, float]) -> list[str]:
    return min(groups, key=lambda g: (sum(capacity[r] for r in g), len(g)))


def _arms(
    groups: Sequence[Collection[str]],
    sizes: Sequence[float],
    probabilities: Mapping[str, float],
    limits: Limits,
    previous: Allocation | None,
    rng: np.random.Generator,
) -> list[str]:
    """Give each group an arm: limited arms first, on groups small enough, then the others."""
    n = len(groups)
    names = list(probabilities)
    drawn = systematic(np.array([probabilities[a] for a in names]), n, rng)
    counts = dict(zip(names, drawn.tolist(), strict=True))
    before = [_arm_before(group, previous) for group in groups]
    order = [int(i) for i in rng.permutation(n)]
    taken: dict[int, str] = {}
    limited = [a for a in names if a in limits.arms() and counts[a]]
    for arm in limited if n > 1 else ():
        room = sum(sizes) / 2.0 * (1.0 + 1e-9)
        wanted = min(counts[arm], 1) if arm in limits.canaries else counts[arm]
        for i in sorted(order, key=lambda i: (before[i] != arm, sizes[i])):
            if wanted and i not in taken and sizes[i] <= room:
                taken[i] = arm
                room -= sizes[i]
                wanted -= 1
        counts[arm] = 0
    free = [i for i in order if i not in taken]
    for i in list(free):
        if counts.get(before[i], 0) > 0:
            taken[i] = before[i]
            counts[before[i]] -= 1
            free.remove(i)
    left = [a for a in names for _ in range(counts[a])]
    unlimited = [a for a in names if a not in limits.arms()] or names
    default = max(unlimited, key=lambda a: probabilities[a])
    left += [default] * (len(free) - len(left))
    taken |= dict(zip(free, left, strict=True))
    return [taken[i] for i in range(n)]


def systematic(p: Floats, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw n times from p with one random number: each count is n * p rounded down or up."""
    ends = np.cumsum(p) / p.sum() * n
    ends[-1] = n
    below = np.ceil(np.round(ends, 9) - rng.random()).astype(np.int64)
    return np.diff(np.clip(below, 0, n), prepend=0)


def _arm_before(group: Collection[str], previous: Allocation | None) -> str:
    """Return the arm that most of the group's replicas served, empty if none did."""
    cells = previous.cells if previous else ()
    served = [c.arm_id for c in cells for r in c.replicas if r in group]
    return max(dict.fromkeys(served), key=served.count, default="")


def _shards(
    groups: Sequence[Collection[str]], sizes: Floats, previous: Allocation | None
) -> list[list[int]]:
    """Share out the shards in proportion to capacity (largest remainder); few change group."""
    exact = sizes / sizes.sum() * SHARDS
    quota = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - quota), kind="stable")
    quota[largest[: SHARDS - int(quota.sum())]] += 1
    own: list[list[int]] = [[] for _ in groups]
    home = {r: i for i, group in enumerate(groups) for r in group}
    homeless: list[int] = []
    before = {s: c.replicas for c in previous.cells for s in c.shards} if previous else {}
    for shard in range(SHARDS):
        homes = [home[r] for r in before.get(shard, ()) if r in home]
        target = max(dict.fromkeys(homes), key=homes.count, default=-1)
        if target >= 0 and len(own[target]) < quota[target]:
            own[target].append(shard)
        else:
            homeless.append(shard)
    for i, shards in enumerate(own):
        while len(shards) < quota[i]:
            shards.append(homeless.pop())
        shards.sort()
    return own
