"""A window's requests, served once more in the twin: the same traffic and seed, whoever serves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from autopoiesis.arms.allocation import SHARDS, Allocation
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.reward import Judged, judge
from autopoiesis.twin.backlog import Backlog
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import Trace


class Stage(NamedTuple):
    """Who served from some time on."""

    began_s: float
    cells: tuple[SimCell, ...]


def stages(
    earlier: Sequence[tuple[float, Allocation]], registry: Registry, replicas: Sequence[ReplicaSpec]
) -> tuple[Stage, ...]:
    """Translate allocations, each with when it began, for the twin; those of which nothing is there are left out."""
    each = (Stage(at_s, tuple(sim_cells(cells, registry, replicas))) for at_s, cells in earlier)
    return tuple(stage for stage in each if stage.cells)


def sim_cells(
    allocation: Allocation, registry: Registry, replicas: Sequence[ReplicaSpec]
) -> list[SimCell]:
    """Translate an allocation for the twin.

    A cell whose arm is unknown or whose replicas are all gone is left out; the first of the others
    has its shards.
    """
    known = {arm.id for arm in registry.all()}
    index = {r.name: i for i, r in enumerate(replicas)}
    cells: list[SimCell] = []
    lost: list[int] = []
    for cell in allocation.cells:
        there = tuple(index[r] for r in cell.replicas if r in index)
        if there and cell.arm_id in known:
            cells.append(SimCell(registry.program(cell.arm_id), there, cell.shards))
        else:
            lost += cell.shards
    if cells and lost:
        cells[0] = replace(cells[0], shards=(*cells[0].shards, *lost))
    return cells


def replay_each(
    trace: Trace,
    backlog: Backlog,
    replicas: Sequence[ReplicaSpec],
    programs: Mapping[str, Program],
    objective: Objective,
    bounds_s: tuple[float, float, float, float],
    seed: int,
    speed: float = 1.0,
    before: Sequence[Stage] = (),
) -> dict[str, Judged]:
    """Return the window's requests as each arm serves them on the whole fleet; the rest as `replay_under`."""
    everything = tuple(range(len(replicas))), tuple(range(SHARDS))
    return {
        arm: replay_under(
            trace,
            backlog,
            replicas,
            [SimCell(program, *everything)],
            objective,
            bounds_s,
            seed,
            speed,
            before,
        )
        for arm, program in programs.items()
    }


def replay_under(
    trace: Trace,
    backlog: Backlog,
    replicas: Sequence[ReplicaSpec],
    cells: Sequence[SimCell],
    objective: Objective,
    bounds_s: tuple[float, float, float, float],
    seed: int,
    speed: float = 1.0,
    before: Sequence[Stage] = (),
) -> Judged:
    """Return the window's requests as the twin serves them in these cells.

    `backlog` says where each request is that arrived before the warm-up. `bounds_s` are the times where
    the warm-up, the window, what follows it, and nothing begin; what follows is replayed too, because it
    competes with the window's last requests. With a `speed` the requests come that many times as fast.
    Until the window begins those serve who did `before`, if anybody is named: the first from the warm-up
    on, each other one from its time on.
    """
    warm_s = bounds_s[0]
    started_s, ended_s, now_s = ((at - warm_s) / speed for at in bounds_s[1:])
    part = trace.until(bounds_s[3])
    part = replace(part, arrival_s=part.arrival_s - warm_s).speed(speed)
    there = backlog.resized(len(part))
    there = there._replace(first_token_s=(there.first_token_s - warm_s) / speed)
    simulation = Simulation(part, replicas, objective, seed, backlog=there)
    for i, stage in enumerate(before):
        if i:
            simulation.advance((stage.began_s - warm_s) / speed)
        simulation.allocate(stage.cells)
    if before:
        simulation.advance(started_s)
    simulation.allocate(cells)
    simulation.advance(now_s)
    return judge(simulation.outcome(), objective, started_s, ended_s, now_s)
