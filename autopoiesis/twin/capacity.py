"""Replicas that come and go: what they are, the states they pass through, and what moves them."""

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from autopoiesis.twin.latency import Profile


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """A replica of the simulated fleet; `speed` divides its step times."""

    name: str
    profile: Profile
    speed: float = 1.0
    declared_speed: float | None = None
    """What its speed was said to be, where `speed` was measured."""


class ReplicaState(IntEnum):
    """What a replica is doing."""

    OFF = 0
    """Not there: it costs nothing."""
    STARTING = 1
    """Starting, waking or reloading: it gets nothing yet."""
    READY = 2
    DRAINING = 3
    """It gets nothing new and finishes what it has."""
    ASLEEP = 4
    """Its memory is free, its caches are lost; it wakes faster than it starts."""


class Action(StrEnum):
    """What is done to a replica."""

    START = "start"
    """OFF → STARTING, READY after `duration_s` with cold caches."""
    DRAIN = "drain"
    """READY → DRAINING → OFF. A notice of loss, too."""
    SLEEP = "sleep"
    """READY → DRAINING → ASLEEP."""
    WAKE = "wake"
    """ASLEEP → STARTING, READY after `duration_s`."""
    RELOAD = "reload"
    """READY → DRAINING → STARTING, READY `duration_s` after it was drained, as `spec` says."""
    LOSE = "lose"
    """OFF at once. What had streamed has failed; the rest is placed again."""


FROM: dict[Action, frozenset[ReplicaState]] = {
    Action.START: frozenset({ReplicaState.OFF}),
    Action.DRAIN: frozenset(ReplicaState),
    Action.SLEEP: frozenset({ReplicaState.READY, ReplicaState.DRAINING}),
    Action.WAKE: frozenset({ReplicaState.ASLEEP}),
    Action.RELOAD: frozenset({ReplicaState.READY, ReplicaState.DRAINING}),
    Action.LOSE: frozenset(ReplicaState),
}
"""The states in which each action makes sense. Losing or draining what is off changes nothing."""


@dataclass(frozen=True, slots=True)
class CapacityChange:
    """One step of the fleet's capacity."""

    at_s: float
    replica: int
    """Index into the fleet."""
    action: Action
    duration_s: float = 0.0
    """Until it serves: of a start, a wake-up, or a reload once it is drained."""
    spec: ReplicaSpec | None = None
    """What comes back from a start or a reload; None: what was there."""

    def __post_init__(self) -> None:
        for name in ("at_s", "duration_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"a capacity change's {name} must be at least 0, got {value}")
        if self.replica < 0:
            raise ValueError(f"a capacity change needs a replica's index, got {self.replica}")
        if self.spec is not None and self.action not in (Action.START, Action.RELOAD):
            raise ValueError(f"{self.action} changes no spec; leave it out, or use reload")
