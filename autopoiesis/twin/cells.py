"""Cells of the simulated fleet, and the groups that cells of equal programs form."""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.features import FIRST_CONSTANT, FUNCTIONS
from autopoiesis.arms.machine import Program
from autopoiesis.twin.events import Groups
from autopoiesis.twin.python_policy import Functions, PythonPolicy


@dataclass(frozen=True, slots=True)
class SimCell:
    """One policy on some replicas (by index), fed by some shards."""

    program: Program | PythonPolicy
    replicas: tuple[int, ...]
    shards: tuple[int, ...]


class Guest(NamedTuple):
    """A policy whose place another has taken, with what it still holds there."""

    program: Program | PythonPolicy
    host: int
    """The group that serves there now."""


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
    if len({type(cell.program) for cell in cells}) > 1:
        raise ValueError("compiled and Python policies cannot serve at the same time; use one kind")
    for shard in np.flatnonzero(fed != 1):
        raise ValueError(f"shard {shard} is in {fed[shard]} cells; each shard belongs to one")


def pool(cells: Sequence[SimCell]) -> dict[Hashable, list[int]]:
    """Return the groups: program → indexes of its cells, in order of their first cell."""
    pooled: dict[Hashable, list[int]] = {}
    for index, cell in enumerate(cells):
        pooled.setdefault(identity(cell.program), []).append(index)
    return pooled


def identity(p: Program | PythonPolicy) -> Hashable:
    """Return what is equal for programs that decide alike."""
    if isinstance(p, PythonPolicy):
        return p
    return p.code.tobytes(), p.entry.tobytes(), p.registers.tobytes()


def groups(
    cells: Sequence[SimCell], replicas: int, first_cell: int, guests: Sequence[Guest] = ()
) -> Groups:
    """Make the event loop's groups, guests last; cells are numbered from `first_cell` on."""
    pooled = list(pool(cells).values())
    programs = [_as_data(p) for p in programs_of(cells, guests)]
    members = [[r for index in indexes for r in cells[index].replicas] for indexes in pooled]
    of_shard = np.zeros(SHARDS, np.int64)
    cell_of_shard = np.full(SHARDS, -1, np.int64)
    of_replica = np.full(replicas, -1, np.int64)
    for g, indexes in enumerate(pooled):
        of_replica[members[g]] = g
        for index in indexes:
            own = list(cells[index].shards)
            of_shard[own] = g
            cell_of_shard[own] = first_cell + index
    host = [*range(len(pooled)), *(guest.host for guest in guests)]
    members = [members[g] for g in host]
    count = len(host)
    share = np.bincount(of_shard, minlength=len(pooled)) / SHARDS
    return Groups(
        of_shard=of_shard,
        cell_of_shard=cell_of_shard,
        of_replica=of_replica,
        code=np.concatenate([p.code for p in programs] or [np.zeros((0, 4), np.int32)]),
        code_from=_starts([len(p.code) for p in programs]),
        entry=np.array([p.entry for p in programs], np.int64).reshape(count, 4),
        registers=np.concatenate([np.zeros(0), *(p.registers for p in programs)]),
        registers_from=_starts([len(p.registers) for p in programs]),
        constants=np.array([p.constants for p in programs], np.int64),
        members=np.array([r for group in members for r in group], np.int64),
        members_from=_starts([len(group) for group in members]),
        host=np.array(host, np.int64),
        share=share[host],
        counters=np.zeros((count, 2)),
        held=np.full((count, 2), -1, np.int64),
    )


def taken_over(
    cells: Sequence[SimCell],
    held: Sequence[tuple[int, Program | PythonPolicy | None]],
    standing: Collection[Program | PythonPolicy] | None,
) -> tuple[list[Guest], list[int]]:
    """Return the guests there are beside these cells, and each held request's group among all.

    `held` are requests' shards and the policies that hold them, None where nobody knows. One that is not
    `standing` (None: all are), or of another kind than those that serve now, leaves its requests to the
    group of the shard.
    """
    may_stay = None if standing is None else set(map(identity, standing))
    pooled = pool(cells)
    numbers = {key: g for g, key in enumerate(pooled)}
    owner = {s: g for g, own in enumerate(pooled.values()) for c in own for s in cells[c].shards}
    guests: dict[tuple[Hashable, int], Guest] = {}
    at: list[int] = []
    for shard, program in held:
        host = owner[shard]
        if program is None or type(program) is not type(cells[0].program):
            at.append(host)
            continue
        key = identity(program)
        if numbers.get(key) == host or not (may_stay is None or key in may_stay):
            at.append(host)
            continue
        guests.setdefault((key, host), Guest(program, host))
        at.append(len(pooled) + list(guests).index((key, host)))
    return list(guests.values()), at


def programs_of(cells: Sequence[SimCell], guests: Sequence[Guest]) -> list[Program | PythonPolicy]:
    """Return the program of each group that `groups` makes of these cells and guests."""
    first = [cells[indexes[0]].program for indexes in pool(cells).values()]
    return [*first, *(guest.program for guest in guests)]


def _as_data(p: Program | PythonPolicy) -> Program:
    """Return the program; a Python policy's has room for its functions' addresses instead of code."""
    if not isinstance(p, PythonPolicy):
        return p
    there = np.array([getattr(p, name) is not None for name in FUNCTIONS])
    return Program(
        code=np.zeros(int(there.sum()), np.int64),  # pyright: ignore[reportArgumentType]
        entry=np.where(there, np.cumsum(there) - 1, -1),
        registers=np.zeros(FIRST_CONSTANT),
        constants=0,
    )


def python_functions(
    programs: Sequence[Program | PythonPolicy], made: Groups, stop: Callable[[], None]
) -> list[Functions]:
    """Write the addresses of Python policies' functions into the groups of these programs.

    The caller keeps what is returned as long as it uses the groups. `stop` is called when a function
    fails.
    """
    bound: list[Functions] = []
    for g, policy in enumerate(programs):
        if isinstance(policy, PythonPolicy):
            first, end = made.registers_from[g : g + 2]
            functions = Functions(policy, made.registers[first:end], stop)
            made.code[made.code_from[g] : made.code_from[g + 1]] = functions.addresses
            bound.append(functions)
    return bound


def _starts(lengths: list[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)
