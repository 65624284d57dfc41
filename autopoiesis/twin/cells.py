"""Cells of the simulated fleet, and the groups that cells of equal programs form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.machine import Program
from autopoiesis.twin.events import Groups


@dataclass(frozen=True, slots=True)
class SimCell:
    """One policy on some replicas (by index), fed by some shards."""

    program: Program
    replicas: tuple[int, ...]
    shards: tuple[int, ...]


def check(cells: Sequence[SimCell], replicas: int) -> None:
    """Raise a ValueError unless every shard is in one cell and every replica in at most one."""
    owner: dict[int, int] = {}
    fed = np.zeros(SHARDS, np.int64)
    for index, cell in enumerate(cells):
        if not cell.replicas:
            raise ValueError(f"cell {index} has no replica")
        for r in cell.replicas:
            if not 0 <= r < replicas:
                raise ValueError(f"cell {index} names replica {r}; there are 0 to {replicas - 1}")
            if r in owner:
                raise ValueError(
                    f"replica {r} is in cells {owner[r]} and {index}; one arm a replica"
                )
            owner[r] = index
        for shard in cell.shards:
            if not 0 <= shard < SHARDS:
                raise ValueError(f"cell {index} names shard {shard}; there are 0 to {SHARDS - 1}")
            fed[shard] += 1
    for shard in np.flatnonzero(fed != 1):
        raise ValueError(f"shard {shard} is in {fed[shard]} cells; each shard belongs to one")


def pool(cells: Sequence[SimCell]) -> dict[tuple[bytes, ...], list[int]]:
    """Return the groups: program → indexes of its cells, in order of their first cell."""
    pooled: dict[tuple[bytes, ...], list[int]] = {}
    for index, cell in enumerate(cells):
        p = cell.program
        key = (p.code.tobytes(), p.entry.tobytes(), p.registers.tobytes())
        pooled.setdefault(key, []).append(index)
    return pooled


def groups(cells: Sequence[SimCell], replicas: int, first_cell: int) -> Groups:
    """Make the event loop's groups; cells are numbered from `first_cell` on."""
    pooled = list(pool(cells).values())
    programs = [cells[indexes[0]].program for indexes in pooled]
    members = [[r for index in indexes for r in cells[index].replicas] for indexes in pooled]
    count = len(pooled)
    of_shard = np.zeros(SHARDS, np.int64)
    cell_of_shard = np.full(SHARDS, -1, np.int64)
    of_replica = np.full(replicas, -1, np.int64)
    for g, indexes in enumerate(pooled):
        of_replica[members[g]] = g
        for index in indexes:
            own = list(cells[index].shards)
            of_shard[own] = g
            cell_of_shard[own] = first_cell + index
    return Groups(
        of_shard=of_shard,
        cell_of_shard=cell_of_shard,
        of_replica=of_replica,
        code=np.concatenate([np.zeros((0, 4), np.int32), *(p.code for p in programs)]),
        code_from=_starts([len(p.code) for p in programs]),
        entry=np.array([p.entry for p in programs], np.int64).reshape(count, 4),
        registers=np.concatenate([np.zeros(0), *(p.registers for p in programs)]),
        registers_from=_starts([len(p.registers) for p in programs]),
        constants=np.array([p.constants for p in programs], np.int64),
        members=np.array([r for group in members for r in group], np.int64),
        members_from=_starts([len(group) for group in members]),
        share=np.bincount(of_shard, minlength=count)[:count] / SHARDS,
        counters=np.zeros((count, 2)),
        held=np.full((count, 2), -1, np.int64),
    )


def _starts(lengths: list[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)
