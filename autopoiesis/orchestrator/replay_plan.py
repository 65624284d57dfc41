"""Plans in a replay: the twin's replicas start and drain as a slow policy says."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopoiesis.arms.migration import Action, Step
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.capacity import Slot, Standing, kinds_of, slot_for
from autopoiesis.orchestrator.plan_control import PlanControl
from autopoiesis.orchestrator.plan_terms import PlanSettings
from autopoiesis.orchestrator.planners import NEVER, planners
from autopoiesis.twin.capacity import Action as Change
from autopoiesis.twin.capacity import CapacityChange, ReplicaState
from autopoiesis.twin.simulation import Simulation

_STANDING = {
    ReplicaState.OFF: Standing.OFF,
    ReplicaState.ASLEEP: Standing.OFF,
    ReplicaState.STARTING: Standing.STARTING,
    ReplicaState.READY: Standing.READY,
    ReplicaState.DRAINING: Standing.DRAINING,
}


@dataclass(frozen=True, slots=True)
class ReplayPlans:
    """How slow policies act in a replay."""

    settings: PlanSettings
    stand_in: str = NEVER
    """Slow seed that plans where an arm has no slow policy of its own."""
    start_s: float = 60.0
    """How long a replica takes to start."""


def plan_control(
    plans: ReplayPlans,
    registry: Registry,
    simulation: Simulation,
    course: Sequence[CapacityChange],
) -> PlanControl:
    """Return plan control over the replicas of a simulation."""
    backend = TwinBackend(simulation, plans.start_s, course)
    return PlanControl(plans.settings, backend, planners(registry, plans.stand_in))


class TwinBackend:
    """The replicas of a simulation as places of a plan.

    What the replay's own course takes is lost: a plan can give it up, and have it again when the course
    gives it back.
    """

    def __init__(
        self, simulation: Simulation, start_s: float, course: Sequence[CapacityChange] = ()
    ) -> None:
        self._simulation = simulation
        self._start_s = start_s
        self._course = tuple(course)
        self._kinds = kinds_of(simulation.replicas)
        self._given_up: set[int] = set()

    def slots(self) -> tuple[Slot, ...]:
        """Return the places that there are; those that the course took and the plan gave up are none."""
        gone = self._taken()
        self._given_up &= gone
        found: list[Slot] = []
        for r, state in enumerate(self._simulation.states()):
            if r in self._given_up:
                continue
            off = state is ReplicaState.OFF
            standing = Standing.LOST if off and r in gone else _STANDING[state]
            found.append(Slot(self._simulation.replicas[r], self._kinds[r], standing))
        return tuple(found)

    def carry_out(self, step: Step) -> str:
        """Begin a step; raises StepError if no replica stands so that it could."""
        slot = slot_for(self.slots(), step)
        r = self._simulation.replicas.index(slot.spec)
        if slot.standing is Standing.LOST:
            self._given_up.add(r)
            return slot.spec.name
        starts = step.action is Action.START
        change = Change.START if starts else Change.DRAIN
        duration_s = self._start_s if starts else 0.0
        self._simulation.change(CapacityChange(self._simulation.now_s, r, change, duration_s))
        return slot.spec.name

    def _taken(self) -> set[int]:
        """Return the replicas that the course has taken and not given back."""
        taken: set[int] = set()
        for change in self._course:
            if change.at_s > self._simulation.now_s:
                break
            if change.action in {Change.LOSE, Change.DRAIN}:
                taken.add(change.replica)
            elif change.action is Change.START:
                taken.discard(change.replica)
        return taken
