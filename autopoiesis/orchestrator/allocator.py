"""From probabilities to cells: which replicas serve which arm, fed by which shards.

Replicas are dealt into cells of about `cell_replicas`, shards to cells so that load is in proportion
to capacity. A fleet that cannot be split evenly (fewer than two cells, or most of the load in one
shard) is one cell, and arms take turns in time. Splitting costs: small groups queue more. So one arm
holds the fleet, as one pooled group, and at most one cell of a window goes to a challenger. Cells keep
their replicas, replicas their arm and shards their cell wherever the draw allows.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.twin.latency import at_speed, step_s
from autopoiesis.twin.simulation import ReplicaSpec

Floats = NDArray[np.float64]

MOST_CELLS = 16
"""However large the fleet: each cell needs some shards."""
MOST_UNEVEN = 0.3
"""Furthest that a cell's load may be from its share of the capacity; else the fleet stays whole."""
UNEVEN = 0.15
"""Shards stay where they are while no cell is further off than this."""
UNIFORM_REQUESTS = 256.0
"""Requests, spread evenly over the shards, that are added to those seen: few say little."""
MOST_LOSS = 0.005
"""Utility that exploring arms believed to be worse may cost, in the mean over all traffic."""
LEAD = 1.5
"""How many times likelier than the incumbent an arm must be to take the lead from it."""
TRIAL_SHARE = 0.5
"""Share of the windows in which the canary that has served least has a cell, until it can be judged."""
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
    return tuple(Member(r.name, 1.0 / typical_step_s(r)) for r in replicas)


def typical_step_s(replica: ReplicaSpec) -> float:
    """Return how long a step with 32 decodes and 256 prompt tokens takes."""
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
    cells = min(replicas // max(cell_replicas, 1), MOST_CELLS)
    return cells if cells >= 2 else 1


@dataclass(frozen=True, slots=True)
class Layout:
    """The fleet cut into cells, before any arm is chosen."""

    groups: tuple[tuple[str, ...], ...]
    """Replicas of each cell."""
    capacity: tuple[float, ...]
    shards: tuple[tuple[int, ...], ...]


def lay_out(
    members: Sequence[Member],
    previous: Allocation | None,
    load: Floats | None = None,
    cell_replicas: int = 2,
) -> Layout:
    """Cut the fleet into cells. `load`, (SHARDS,), is each shard's recent traffic in usual requests.

    Raises:
        ValueError: there is no replica, or a name or a capacity is bad.
    """
    if not members:
        raise ValueError("an allocation needs at least one replica")
    capacity = {m.name: m.capacity for m in members}
    if len(capacity) < len(members) or min(capacity.values()) <= 0.0:
        raise ValueError("replicas need distinct names and capacities above 0")
    weights = np.full(SHARDS, UNIFORM_REQUESTS / SHARDS) + (0.0 if load is None else load)
    weights /= weights.sum()
    for cells in dict.fromkeys((cells_of(len(members), cell_replicas), 1)):
        groups = _groups(capacity, cells, previous)
        sizes = np.array([sum(capacity[r] for r in group) for group in groups])
        shards = _shards(groups, sizes, weights, previous)
        loads = np.array([weights[own].sum() for own in shards])
        if cells == 1 or np.all(np.abs(loads / (sizes / sizes.sum()) - 1.0) <= MOST_UNEVEN):
            return Layout(
                tuple(map(tuple, groups)), tuple(sizes.tolist()), tuple(map(tuple, shards))
            )
    raise AssertionError("one cell always fits")


def allocate(
    window: int,
    layout: Layout,
    probabilities: Mapping[str, float],
    limits: Limits,
    previous: Allocation | None,
    rng: np.random.Generator,
) -> Allocation:
    """Return the allocation of one window; ValueError without an arm.

    `probabilities` should be `concentrated`, so that at most one cell goes to a challenger.
    """
    if not probabilities:
        raise ValueError("an allocation needs at least one arm")
    arms = _arms(layout.groups, layout.capacity, probabilities, limits, previous, rng)
    cells = (
        Cell(arm, group, own, probabilities[arm])
        for arm, group, own in zip(arms, layout.groups, layout.shards, strict=True)
    )
    return Allocation(window, tuple(cells))


def concentrated(
    probabilities: Mapping[str, float],
    limits: Limits,
    cells: int,
    exploration: float = 1.0,
    incumbent: str | None = None,
    charged: Mapping[str, float] | None = None,
    gaps: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Leave challengers at most one cell of a window; the others go to the one that leads.

    Who leads: the likeliest arm that is not limited. The `incumbent` stays ahead
    until another is `LEAD` times as likely, so that equal arms do not take turns. Challengers have the
    probabilities `charged`, what a split of the fleet costs being paid. All but canaries, which have
    their caps, get at most `exploration` of all cells in the long run, and no more than is expected to
    cost `MOST_LOSS` of utility, by the `gaps` of the arms to the best one. Challengers come first in
    the result: `systematic` then draws at most one of them.
    """

    def standing(arm: str) -> float:
        return probabilities[arm] * (LEAD if arm == incumbent else 1.0)

    free = [a for a in probabilities if a not in limits.arms()]
    leader = max(free or probabilities, key=standing)
    challengers = {a: p for a, p in (charged or probabilities).items() if a != leader}
    exploring = {a: p for a, p in challengers.items() if a not in limits.canaries}
    loss = sum(p * max((gaps or {}).get(a, 0.0), 0.0) for a, p in exploring.items())
    scale = min(
        1.0,
        exploration / max(sum(exploring.values()), 1e-12),
        MOST_LOSS / max(loss, 1e-12),
    )
    challengers |= {a: p * scale for a, p in exploring.items()}
    total = sum(challengers.values())
    if total > 1.0 / cells:
        challengers = {a: p / total / cells for a, p in challengers.items()}
    return challengers | {leader: 1.0 - sum(challengers.values())}


def with_trial(probabilities: Mapping[str, float], arm: str, cells: int) -> dict[str, float]:
    """Give an arm that is on trial its cell in `TRIAL_SHARE` of the windows; the others give way.

    Its race has paid for it, its limits bound what it can cost, and without traffic nobody would learn.
    """
    wanted = TRIAL_SHARE / cells
    if probabilities[arm] >= wanted:
        return dict(probabilities)
    room = (1.0 - wanted) / (1.0 - probabilities[arm])
    return {a: wanted if a == arm else p * room for a, p in probabilities.items()}


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
    groups: Sequence[Collection[str]], sizes: Floats, load: Floats, previous: Allocation | None
) -> list[list[int]]:
    """Share out the shards so that load is in proportion to capacity; few change their cell."""
    quota = sizes / sizes.sum() * load.sum()
    own: list[list[int]] = [[] for _ in groups]
    held = np.zeros(len(groups))
    home = {r: i for i, group in enumerate(groups) for r in group}
    before = {s: c.replicas for c in previous.cells for s in c.shards} if previous else {}
    for shard in np.argsort(-load, kind="stable").tolist():
        homes = [home[r] for r in before.get(shard, ()) if r in home]
        known = max(dict.fromkeys(homes), key=homes.count, default=-1)
        cell = known if known >= 0 else int(np.argmax(quota - held))
        own[cell].append(shard)
        held[cell] += load[shard]
    while np.max(np.abs(held / quota - 1.0)) > UNEVEN:
        over, under = int(np.argmax(held / quota)), int(np.argmin(held / quota))
        ideal = (held[over] / quota[over] - held[under] / quota[under]) / (
            1.0 / quota[over] + 1.0 / quota[under]
        )
        # A smaller shard than twice the ideal one brings the two cells closer together.
        fitting = [s for s in own[over] if load[s] < 2.0 * ideal * (1.0 - 1e-9)]
        if not fitting:
            break
        shard = min(fitting, key=lambda s: abs(load[s] - ideal))
        own[over].remove(shard)
        own[under].append(shard)
        held[over] -= load[shard]
        held[under] += load[shard]
    return [sorted(shards) for shards in own]
