"""Simulated replicas of a running instance as places of a plan.

The controller decides which processes should run, and the supervisor, which is their parent, follows a
file that says which should not. A replica that is to go gets no more traffic from the next allocation on,
and its process ends once nothing is in flight there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from autopoiesis.arms.migration import Action, Step
from autopoiesis.atomic import write_atomically
from autopoiesis.orchestrator.capacity import Slot, Standing, kinds_of, slot_for
from autopoiesis.telemetry.records import ReplicaSample
from autopoiesis.twin.simulation import ReplicaSpec

QUIET_S = 1.0
"""How long nothing must have been in flight at a draining replica before its process ends."""


class SwitchFile:
    """Names of the replicas whose processes should not run, in a file that survives the controller."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> frozenset[str]:
        """Return the names; none where there is no file, or none that can be read."""
        try:
            names = orjson.loads(self._path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return frozenset()
        return frozenset(str(name) for name in names) if isinstance(names, list) else frozenset()  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

    def write(self, names: frozenset[str]) -> None:
        """Replace the names. Raises OSError."""
        write_atomically(self._path, orjson.dumps(sorted(names)))


class LiveBackend:
    """Starts and stops simulated replicas through the supervisor; `saw` tells it what they report."""

    def __init__(self, fleet: Sequence[ReplicaSpec], switches: SwitchFile) -> None:
        self._fleet = tuple(fleet)
        self._kinds = kinds_of(self._fleet)
        self._switches = switches
        self._off = switches.read()
        self._draining: dict[str, float | None] = {}
        """Since when nothing has been in flight there."""
        self._starting: set[str] = set()
        self._healthy: dict[str, bool] = {}

    def slots(self) -> tuple[Slot, ...]:
        """Return every replica with what it does now."""
        return tuple(
            Slot(spec, kind, self.standing(spec.name))
            for spec, kind in zip(self._fleet, self._kinds, strict=True)
        )

    def carry_out(self, step: Step) -> str:
        """Begin a step; raises StepError if no replica stands so that it could, OSError if it cannot be told."""
        slot = slot_for(self.slots(), step)
        name = slot.spec.name
        if step.action is Action.START:
            self._switch(self._off - {name})
            self._starting.add(name)
        elif slot.standing is Standing.LOST:
            self._switch(self._off | {name})
        else:
            self._draining[name] = None
        return name

    def standing(self, name: str) -> Standing:
        """Return what a replica does now."""
        healthy = self._healthy.get(name, True)
        if name in self._off:
            return Standing.OFF
        if name in self._draining:
            return Standing.DRAINING
        if name in self._starting:
            return Standing.STARTING
        return Standing.READY if healthy else Standing.LOST

    def draining(self) -> list[str]:
        """Return the replicas that drain."""
        return list(self._draining)

    def go_on_draining(self, names: Sequence[str]) -> None:
        """Take up again what another controller had begun."""
        self._draining |= {name: None for name in names if name not in self._off}

    def expected_away(self, name: str) -> bool:
        """Tell whether it is no fault that the replica does not answer."""
        return self.standing(name) in {Standing.OFF, Standing.STARTING, Standing.DRAINING}

    def saw(self, samples: Sequence[ReplicaSample], serving: Mapping[str, int]) -> None:
        """Take in what replicas report; `serving` counts the cells that still feed each of them."""
        for sample in samples:
            name = sample.replica
            self._healthy[name] = sample.healthy
            # What was just started reports its old self's health until it was asked again.
            if sample.healthy and name in self._starting:
                self._starting.discard(name)
            if name in self._draining:
                busy = sample.in_flight > 0 or serving.get(name, 0) > 0
                since_s = self._draining[name]
                self._draining[name] = None if busy else (since_s or sample.at_s)
                if since_s is not None and not busy and sample.at_s - since_s >= QUIET_S:
                    del self._draining[name]
                    self._switch(self._off | {name})

    def _switch(self, off: frozenset[str]) -> None:
        self._switches.write(off)
        self._off = off
