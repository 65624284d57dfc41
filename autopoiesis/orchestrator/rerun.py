"""A window's requests, served once more in the twin: the same traffic and seed, whoever serves."""

from collections.abc import Mapping, Sequence

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.reward import Judged, judge
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import Trace


def replay_each(
    trace: Trace,
    replicas: Sequence[ReplicaSpec],
    programs: Mapping[str, Program],
    objective: Objective,
    bounds_s: tuple[float, float, float, float],
    seed: int,
    speed: float = 1.0,
) -> dict[str, Judged]:
    """Return the window's requests as each arm serves them on the whole fleet; the rest as `replay_under`."""
    everything = tuple(range(len(replicas))), tuple(range(SHARDS))
    return {
        arm: replay_under(
            trace, replicas, [SimCell(program, *everything)], objective, bounds_s, seed, speed
        )
        for arm, program in programs.items()
    }


def replay_under(
    trace: Trace,
    replicas: Sequence[ReplicaSpec],
    cells: Sequence[SimCell],
    objective: Objective,
    bounds_s: tuple[float, float, float, float],
    seed: int,
    speed: float = 1.0,
) -> Judged:
    """Return the window's requests as the twin serves them in these cells.

    `bounds_s` are the times where the warm-up, the window, what follows it, and nothing begin; what
    follows is replayed too, because it competes with the window's last requests. With a `speed` the
    requests come that many times as fast.
    """
    warm_s = bounds_s[0]
    started_s, ended_s, now_s = ((at - warm_s) / speed for at in bounds_s[1:])
    part = trace.slice(warm_s, bounds_s[3]).speed(speed)
    simulation = Simulation(part, replicas, objective, seed)
    simulation.allocate(cells)
    simulation.advance(now_s)
    return judge(simulation.outcome(), objective, started_s, ended_s, now_s)
