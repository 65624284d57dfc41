"""A window's requests, served once more in the twin: the same traffic and seed, whoever serves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.reward import Judged, judge
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import Trace

Ints = NDArray[np.int64]


def replay_each(
    trace: Trace,
    placed: Ints,
    replicas: Sequence[ReplicaSpec],
    programs: Mapping[str, Program],
    objective: Objective,
    bounds_s: tuple[float, float, float, float],
    seed: int,
    speed: float = 1.0,
    before: Program | None = None,
) -> dict[str, Judged]:
    """Return the window's requests as each arm serves them on the whole fleet; the rest as `replay_under`."""
    everything = tuple(range(len(replicas))), tuple(range(SHARDS))
    return {
        arm: replay_under(
            trace,
            placed,
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
    placed: Ints,
    replicas: Sequence[ReplicaSpec],
    cells: Sequence[SimCell],
    objective: Objective,
    bounds_s: tuple[float, float, float, float],
    seed: int,
    speed: float = 1.0,
    before: Program | None = None,
) -> Judged:
    """Return the window's requests as the twin serves them in these cells.

    `placed`, (n,), says in which replica's queue each request of the backlog is, -1 in none. `bounds_s` are
    the times where the warm-up, the window, what follows it, and nothing begin; what follows is replayed
    too, because it competes with the window's last requests. With a `speed` the requests come that many
    times as fast. Until the window begins the arm that was there `before` serves.
    """
    warm_s = bounds_s[0]
    started_s, ended_s, now_s = ((at - warm_s) / speed for at in bounds_s[1:])
    part = trace.until(bounds_s[3])
    part = replace(part, arrival_s=part.arrival_s - warm_s).speed(speed)
    simulation = Simulation(part, replicas, objective, seed, placed=placed[: len(part)])
    if before is not None:
        simulation.allocate([SimCell(before, tuple(range(len(replicas))), tuple(range(SHARDS)))])
        simulation.advance(started_s)
    simulation.allocate(cells)
    simulation.advance(now_s)
    return judge(simulation.outcome(), objective, started_s, ended_s, now_s)
