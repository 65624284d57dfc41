"""The fleet as places where replicas can run, and the interface through which a plan changes it.

A plan counts replicas by kind; a backend knows them by name. `CapacityBackend` is all that plan control
needs of one: the twin in a replay, simulated processes under `serve`, or a fleet of real servers.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean
from typing import Protocol

from autopoiesis.arms.migration import Action, Step
from autopoiesis.arms.plan import Kind, Plan, ReplicaGroup
from autopoiesis.twin.capacity import ReplicaSpec

MIXED = "mixed"
"""Model of a fleet whose profiles are of several models: the gateway serves them under one name."""
_NAME = re.compile(r"(?P<gpu>[^-]+)-(?P<model>.+)-tp(?P<tp>\d+)-(?P<precision>[^-]+)")


class Standing(StrEnum):
    """What runs at a place now."""

    OFF = "off"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It gets nothing new, and stops when it is empty."""
    LOST = "lost"
    """It should run and does not answer."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place where a replica of one kind can run."""

    spec: ReplicaSpec
    kind: Kind
    standing: Standing
    adapts: bool = False
    """Whether a start can give it other limits."""
    leaving: bool = False
    """Whether it is about to be lost."""

    def fits(self, kind: Kind) -> bool:
        """Tell whether a replica of this kind can run here, now or after a start."""
        other = self.kind._replace(
            max_num_seqs=kind.max_num_seqs, max_num_batched_tokens=kind.max_num_batched_tokens
        )
        return self.kind == kind or (self.adapts and other == kind)


class StepError(RuntimeError):
    """A step of a plan cannot be carried out: one sentence."""


class CapacityBackend(Protocol):
    """What can start and stop replicas. Calls return at once; `slots` tells how far things are."""

    def slots(self) -> tuple[Slot, ...]:
        """Return every place with what runs there now, always in the same order."""
        ...

    def carry_out(self, step: Step) -> str:
        """Begin a step on one replica of its kind and return the replica's name.

        START brings a place that is off up; it is ready when it answers. STOP gives up a replica that
        is lost, else drains one and then stops it: what it has begun, it finishes.

        Raises:
            StepError: no replica of that kind is off (to start), or runs (to stop).
        """
        ...


def kinds_of(fleet: Sequence[ReplicaSpec]) -> tuple[Kind, ...]:
    """Return the kind of each replica, by the parts of its profile's name where it has them.

    Replicas are of one kind whatever was measured of each: one takes the place of another.
    """
    parts = [_NAME.fullmatch(spec.profile.name) for spec in fleet]
    models = {
        part["model"] if part else spec.profile.name
        for part, spec in zip(parts, fleet, strict=True)
    }
    kinds: list[Kind] = []
    for part, spec in zip(parts, fleet, strict=True):
        one = len(models) == 1
        gpu = part["gpu"] if part and one else spec.profile.name
        speed = spec.speed if spec.declared_speed is None else spec.declared_speed
        gpu += "" if speed == 1.0 else f" x{speed:g}"
        kinds.append(
            Kind(
                model=next(iter(models)) if one else MIXED,
                gpu=gpu,
                tensor_parallel=int(part["tp"]) if part else 1,
                max_num_seqs=spec.profile.max_num_seqs,
                max_num_batched_tokens=spec.profile.max_num_batched_tokens,
                role="serve",
            )
        )
    return tuple(kinds)


def typical(fleet: Sequence[ReplicaSpec], kinds: Sequence[Kind]) -> dict[Kind, ReplicaSpec]:
    """Return what stands for each kind of replica: the first one, at the mean of their speeds."""
    of_kind: dict[Kind, list[ReplicaSpec]] = {}
    for spec, kind in zip(fleet, kinds, strict=True):
        of_kind.setdefault(kind, []).append(spec)
    return {
        kind: replace(specs[0], speed=fmean(spec.speed for spec in specs))
        for kind, specs in of_kind.items()
    }


RUNS = frozenset({Standing.STARTING, Standing.READY})
"""A place at which a replica is there to stay."""


def plan_of(slots: Sequence[Slot]) -> Plan:
    """Return the plan that is in force: what runs, what is coming up, and what is lost without being given up."""
    planned = RUNS | {Standing.LOST}
    return plan_from_kinds(Counter(slot.kind for slot in slots if slot.standing in planned))


def plan_from_kinds(kinds: Counter[Kind]) -> Plan:
    """Return a plan with so many replicas of each kind, the traffic shared out by their number."""
    of_model = Counter[tuple[str, str]]()
    for kind, n in kinds.items():
        of_model[kind.model, kind.role] += n
    return Plan(
        tuple(
            ReplicaGroup(
                kind.model,
                kind.gpu,
                kind.tensor_parallel,
                n,
                kind.max_num_seqs,
                kind.max_num_batched_tokens,
                kind.role,
                n / of_model[kind.model, kind.role],
            )
            for kind, n in sorted(kinds.items())
            if n
        )
    )


STANDS = {Action.START: (Standing.OFF,), Action.STOP: (Standing.LOST, Standing.READY)}
"""What a step is carried out on, what comes first being preferred."""


def slot_for(slots: Sequence[Slot], step: Step) -> Slot:
    """Return the place on which a backend carries out a step: the last one of its kind, else one that adapts.

    Raises StepError.
    """
    starts = step.action is Action.START
    for standing in STANDS[step.action]:
        there = [s for s in slots if s.standing is standing]
        fitting = [s for s in there if s.kind == step.kind]
        fitting = fitting or [s for s in there if starts and s.fits(step.kind)]
        if fitting:
            return fitting[-1]
    kind = f"{step.kind.model} on {step.kind.tensor_parallel} x {step.kind.gpu}"
    raise StepError(f"No replica of {kind} can {step.action} now.")
