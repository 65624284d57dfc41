"""The fleet of a replay: its replicas, and what takes and gives them on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.capacity import CapacityChange, ReplicaSpec, ReplicaState
from autopoiesis.twin.capacity_trace import FleetCourse
from autopoiesis.twin.cells import SimCell
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.simulation import Simulation
from autopoiesis.twin.trace import Trace


class Served(NamedTuple):
    """What became of a trace, and what it took."""

    outcome: Outcome
    replica_seconds: float
    """Until the last request's arrival or end, whichever is later."""


@dataclass(frozen=True, slots=True)
class ReplayFleet:
    """Replicas, which of them are there at first (None: all), and what changes."""

    replicas: tuple[ReplicaSpec, ...]
    present: tuple[bool, ...] | None = None
    changes: tuple[CapacityChange, ...] = ()
    """In order of time."""

    def simulation(self, trace: Trace, objective: Objective, seed: int) -> Simulation:
        """Return a twin of the fleet at the trace's beginning."""
        return Simulation(
            trace, self.replicas, objective, seed, capacity=self.changes, present=self.present
        )

    def alone(self, trace: Trace, program: Program, objective: Objective, seed: int) -> Served:
        """Serve the whole trace with one policy on all replicas that there are."""
        simulation = self.simulation(trace, objective, seed)
        everything = tuple(range(len(self.replicas))), tuple(range(SHARDS))
        simulation.allocate([SimCell(program, *everything)])
        return self.to_the_end(simulation)

    def to_the_end(self, simulation: Simulation) -> Served:
        """Serve what is left; changes after the last request's end do not count."""
        trace = simulation.trace
        simulation.advance(max(trace.duration_s, simulation.now_s))
        for change in self.changes:
            if not _pending(simulation):
                break
            before_s = float(np.nextafter(change.at_s, 0.0))
            if before_s > simulation.now_s:
                simulation.advance(before_s)
        if _pending(simulation):
            simulation.advance(np.inf)
        outcome = simulation.outcome()
        ends_s = outcome.finished_s[~np.isnan(outcome.finished_s)]
        lasted_s = max(trace.duration_s, float(ends_s.max(initial=0.0)))
        # Nothing has come or gone since the last end, as the steps above stop before each change.
        idle_s = max(simulation.now_s - lasted_s, 0.0)
        there = sum(state is not ReplicaState.OFF for state in simulation.states())
        return Served(outcome, simulation.replica_seconds() - idle_s * there)


def fleet_under(replicas: Sequence[ReplicaSpec], course: FleetCourse | None = None) -> ReplayFleet:
    """Return the fleet that a course makes of these replicas; without one they are all there."""
    if course is None:
        return ReplayFleet(tuple(replicas))
    present = tuple(r in course.present for r in range(len(replicas)))
    return ReplayFleet(tuple(replicas), present, course.changes)


def ready(simulation: Simulation) -> tuple[ReplicaSpec, ...]:
    """Return the replicas that take requests now; all of them if none does, as the live loop has it."""
    states = zip(simulation.replicas, simulation.states(), strict=True)
    return tuple(r for r, s in states if s is ReplicaState.READY) or simulation.replicas


def _pending(simulation: Simulation) -> bool:
    return bool((simulation.outcome().status == Status.PENDING).any())
